// Copies of bfloat16 tensors as pairs, in the order that forward_pairs.inl reads. Compiled with the instruction set of
// the including file.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/channels/packing.h"
#include "cpu/simd/pairs_gemm.h"

namespace pyinvolution::cpu {
namespace {

// Pairs of elements of two rows, of which either may be missing and counts as zeros.
struct TwoRows {
  const BFloat16 *low, *high;
  uint32_t mask;

  TwoRows(const BFloat16* one, const BFloat16* other)
      : low(one != nullptr ? one : other),
        high(other != nullptr ? other : one),
        mask((one != nullptr ? 0xffffu : 0) | (other != nullptr ? 0xffff0000u : 0)) {}
  TwoRows operator+(int64_t offset) const { return TwoRows(low + offset, high + offset, mask); }

  [[gnu::always_inline]] void copy(int64_t at, Pair* to) const {
    const uint32_t bits = (low[at].bits | uint32_t{high[at].bits} << 16) & mask;
    std::memcpy(to, &bits, sizeof bits);
  }
  template <int Lanes>
  [[gnu::always_inline]] void copy_vector(int64_t at, Pair* to) const {
    Pairs<Lanes> pairs = Pairs<Lanes>::interleave(low + at, high + at);
    pairs.bits &= mask;
    pairs.store(to);
  }
  // The first `count` of a vector, with zeros after them.
  void copy_first(int64_t count, Pair* to) const {
    Pairs<16> pairs = Pairs<16>::interleave_first(low, high, count);
    pairs.bits &= mask;
    pairs.store(to);
  }
  // `count` neighbours. The last vector overlaps the one before it.
  void copy_run(int64_t count, Pair* to) const {
    if (count >= 16) {
      for (int64_t i = 0; i < count; i += 16) {
        const int64_t at = min(i, count - 16);
        copy_vector<16>(at, to + at);
      }
    } else if (count >= 8) {
      copy_vector<8>(0, to);
      copy_vector<8>(count - 8, to + count - 8);
    } else {
      for (int64_t i = 0; i < count; ++i) copy(i, to + i);
    }
  }

 private:
  TwoRows(const BFloat16* one, const BFloat16* other, uint32_t halves) : low(one), high(other), mask(halves) {}
};

#if !defined(PYINVOLUTION_EMULATED_BF16)
// 8 columns of 16 rows or, without Whole, of fewer.
template <bool Whole>
[[gnu::always_inline]] inline void transpose_eight(const Pair* from, int64_t from_pitch, int64_t rows, Pair* to,
                                                   int64_t to_pitch) {
  const auto row = [&](int64_t r) __attribute__((always_inline)) {
    return reinterpret_cast<const __m256i*>(from + (Whole ? r : min(r, rows - 1)) * from_pitch);
  };
  const auto two_rows = [&](int64_t r) __attribute__((always_inline)) {
    const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256(row(r)));
    return _mm512_maskz_inserti64x4(0xff, low, _mm256_loadu_si256(row(r + 8)), 1);
  };
  // Rows r to r + 3 of columns c and c + 4 in a quarter each, and rows r + 8 to r + 11.
  const auto four_rows = [&](int64_t r, __m512i(&out)[4]) __attribute__((always_inline)) {
    const __m512i in[4] = {two_rows(r), two_rows(r + 1), two_rows(r + 2), two_rows(r + 3)};
    const __m512i low01 = _mm512_maskz_unpacklo_epi32(0xffff, in[0], in[1]);
    const __m512i high01 = _mm512_maskz_unpackhi_epi32(0xffff, in[0], in[1]);
    const __m512i low23 = _mm512_maskz_unpacklo_epi32(0xffff, in[2], in[3]);
    const __m512i high23 = _mm512_maskz_unpackhi_epi32(0xffff, in[2], in[3]);
    out[0] = _mm512_maskz_unpacklo_epi64(0xff, low01, low23);
    out[1] = _mm512_maskz_unpackhi_epi64(0xff, low01, low23);
    out[2] = _mm512_maskz_unpacklo_epi64(0xff, high01, high23);
    out[3] = _mm512_maskz_unpackhi_epi64(0xff, high01, high23);
  };
  __m512i even[4], odd[4];
  four_rows(0, even), four_rows(4, odd);
  const __m512i first = _mm512_set_epi64(13, 12, 5, 4, 9, 8, 1, 0),
                second = _mm512_set_epi64(15, 14, 7, 6, 11, 10, 3, 2);
  const auto store = [&](int64_t c, __m512i lanes) __attribute__((always_inline)) {
    if constexpr (Whole)
      _mm512_storeu_si512(to + c * to_pitch, lanes);
    else
      _mm512_mask_storeu_epi32(to + c * to_pitch, __mmask16((1u << rows) - 1), lanes);
  };
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    store(c, _mm512_permutex2var_epi64(even[c], first, odd[c]));
    store(c + 4, _mm512_permutex2var_epi64(even[c], second, odd[c]));
  }
}
#endif

// Dwords `from_pitch` and `to_pitch` apart as to[column][row].
inline void transpose_pairs(const Pair* from, int64_t from_pitch, int64_t rows, int64_t columns, Pair* to,
                            int64_t to_pitch) {
#if !defined(PYINVOLUTION_EMULATED_BF16)
  for (; columns >= 8; columns -= 8, from += 8, to += 8 * to_pitch) {
    int64_t r = 0;
    for (; r + 16 <= rows; r += 16) transpose_eight<true>(from + r * from_pitch, from_pitch, 16, to + r, to_pitch);
    if (r < rows) transpose_eight<false>(from + r * from_pitch, from_pitch, rows - r, to + r, to_pitch);
  }
#endif
  if (columns > 0)
    transpose(reinterpret_cast<const float*>(from), from_pitch, rows, columns, reinterpret_cast<float*>(to), to_pitch);
}

// load_pixel_pairs for neighbouring channels, fewer than a block has. Apart from its caller it has registers enough.
[[gnu::noinline]] inline void load_few_channels(TwoRows from, int64_t channels, int64_t pixels, int64_t pixel,
                                                Pair* to) {
  for (; pixels > 0; --pixels, from.low += pixel, from.high += pixel, to += block_channels)
    from.copy_first(channels, to);
}

// Two rows of X at a run of pixels as [pixel][16]; missing channels are zero-filled up to the lanes that are read.
// `staging` holds tile_pixels * 16 pairs.
inline void load_pixel_pairs(const TwoRows from, int64_t channels, int64_t pixels, int64_t channel, int64_t pixel,
                             Pair* to, Pair* staging) {
  if (channel == 1 && channels == block_channels) {
    for (int64_t v = 0; v < pixels; ++v) from.copy_vector<16>(v * pixel, to + v * block_channels);
  } else if (channel == 1 && channels == block_channels / 2) {
    for (int64_t v = 0; v < pixels; ++v) from.copy_vector<8>(v * pixel, to + v * block_channels);
  } else if (channel == 1) {
    load_few_channels(from, channels, pixels, pixel, to);
  } else {
    if (channels < block_channels) std::memset(to, 0, size_t(pixels * block_channels) * sizeof(Pair));
    if (pixel == 1 && channel != 1) {
      for (int64_t first = 0; first < pixels; first += tile_pixels) {
        const int64_t run = min(tile_pixels, pixels - first);
        for (int64_t c = 0; c < channels; ++c) (from + (c * channel + first)).copy_run(run, staging + c * tile_pixels);
        transpose_pairs(staging, tile_pixels, channels, run, to + first * block_channels, block_channels);
      }
    } else {
      for (int64_t v = 0; v < pixels; ++v)
        for (int64_t c = 0; c < channels; ++c) from.copy(v * pixel + c * channel, to + v * block_channels + c);
    }
  }
}

// Whether pairs of neighbouring channels are dwords of memory; `stride` has those of n, c, h and w.
inline bool channels_in_pairs(const BFloat16* from, const int64_t (&stride)[4], int64_t channels, int64_t rows) {
  return stride[1] == 1 && channels % 2 == 0 && stride[3] % 2 == 0 &&
         reinterpret_cast<uintptr_t>(from) % sizeof(Pair) == 0 && (rows == 1 || stride[2] % 2 == 0);
}

// Pairs of channels at a run of pixels as [pair][pixel], rows `pitch` apart. The partner of an odd channel is zero. With
// `in_pairs` pairs are dwords of memory.
inline void pack_channel_rows(const BFloat16* from, int64_t channel, int64_t channels, int64_t pixel, int64_t pixels,
                              bool in_pairs, Pair* to, int64_t pitch) {
  const int64_t depth = ceil_div(channels, 2);
  if (in_pairs) return transpose_pairs(reinterpret_cast<const Pair*>(from), pixel / 2, pixels, depth, to, pitch);
  for (int64_t k = 0; k < depth; ++k, to += pitch) {
    const BFloat16* low = from + 2 * k * channel;
    const TwoRows both(low, 2 * k + 1 < channels ? low + channel : nullptr);
    if (pixel == 1)
      both.copy_run(pixels, to);
    else
      for (int64_t i = 0; i < pixels; ++i) both.copy(i * pixel, to + i);
  }
}

// Pairs of channels at rows x columns pixels as [vector of pixels][pair][lane]. Lanes past the last pixel are zero, as
// is the partner of an odd channel. `stride` has those of n, c, h and w.
inline void pack_channel_pairs(const BFloat16* from, const int64_t (&stride)[4], int64_t channels, int64_t rows,
                               int64_t columns, Pair* to) {
  const int64_t pixels = rows * columns, depth = ceil_div(channels, 2);
  const bool in_pairs = channels_in_pairs(from, stride, channels, rows);
  if (rows > 1 && stride[2] == columns * stride[3]) columns = pixels;
  for (int64_t at = 0; at < pixels; at += pair_lanes, to += pair_lanes * depth) {
    const int64_t count = min(pair_lanes, pixels - at);
    if (count < pair_lanes) std::memset(to, 0, size_t(pair_lanes * depth) * sizeof(Pair));
    // Runs of pixels in one row.
    for (int64_t lane = 0; lane < count;) {
      const int64_t row = (at + lane) / columns, first = (at + lane) % columns;
      const int64_t run = min(count - lane, columns - first);
      pack_channel_rows(from + row * stride[2] + first * stride[3], stride[1], channels, stride[3], run, in_pairs,
                        to + lane, pair_lanes);
      lane += run;
    }
  }
}

// Pairs of rows [row][column] as [pair of rows][column], `pitch` apart; the partner of an odd row is zero, as is what is
// past the last column. The last row is written in whole vectors.
inline void pack_row_pairs(const BFloat16* from, int64_t row, int64_t column, int64_t rows, int64_t columns, Pair* to,
                           int64_t pitch) {
  for (int64_t r = 0; r < rows; r += 2, from += 2 * row, to += pitch) {
    const TwoRows both(from, r + 1 < rows ? from + row : nullptr);
    if (column == 1) {
      for (int64_t c = 0; c < columns; c += pair_lanes) (both + c).copy_first(columns - c, to + c);
    } else {
      for (int64_t c = 0; c < columns; ++c) both.copy(c * column, to + c);
      for (int64_t c = columns; c < pitch; ++c) to[c] = Pair{};
    }
  }
}

// Rows whose neighbours are pairs: in place where they are neighbours in memory and their number is even, else copied
// to `to`, an odd one with a zero. `pitch` is set to the elements from one row to the next.
inline const BFloat16* rows_in_pairs(const BFloat16* from, int64_t row, int64_t column, int64_t rows, int64_t columns,
                                     BFloat16* to, int64_t* pitch) {
  if (column == 1 && columns % 2 == 0) {
    *pitch = row;
    return from;
  }
  *pitch = round_up(columns, 2);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < *pitch; ++c) to[r * *pitch + c] = c < columns ? from[r * row + c * column] : BFloat16{0};
  return to;
}

// W at rows x columns pixels as [pair of tap rows][tap column][pixel]; the partner of an odd row is zero. `staging`
// holds 16 pairs for each pair of taps.
inline void load_weight_pairs(const BFloat16* from, const Problem& p, int64_t rows, int64_t columns, Pair* to,
                              Pair* staging) {
  const int64_t pixel = p.w_stride[5], tap_row = p.w_stride[2], tap_column = p.w_stride[3];
  const bool one_run = rows == 1 || p.w_stride[4] == columns * pixel;
  const int64_t runs = one_run ? 1 : rows, run = rows * columns / runs;
  const int64_t pair_rows = ceil_div(p.kernel_h, 2), pairs = pair_rows * p.kernel_w;
  const auto taps_of = [&](const BFloat16* source, int64_t i) {
    const BFloat16* low = source + 2 * i * tap_row;
    return TwoRows(low, 2 * i + 1 < p.kernel_h ? low + tap_row : nullptr);
  };
  for (int64_t r = 0; r < runs; ++r, to += run) {
    const BFloat16* source = from + r * p.w_stride[4];
    if (pixel != 1 && tap_column == 1) {
      for (int64_t first = 0; first < run; first += block_channels) {
        const int64_t count = min(block_channels, run - first);
        for (int64_t v = 0; v < count; ++v) {
          const BFloat16* taps = source + (first + v) * pixel;
          Pair* target = staging + v * pairs;
          // A whole vector reads into the next pixel, and what it writes too much is overwritten.
          const bool whole = p.kernel_w <= 8 && first + v + 1 < run && pixel >= 8;
          for (int64_t i = 0; i < pair_rows; ++i, target += p.kernel_w)
            if (whole)
              taps_of(taps, i).copy_vector<8>(0, target);
            else
              taps_of(taps, i).copy_run(p.kernel_w, target);
        }
        transpose_pairs(staging, pairs, count, pairs, to + first, tile_pixels);
      }
      continue;
    }
    for (int64_t i = 0; i < pair_rows; ++i)
      for (int64_t j = 0; j < p.kernel_w; ++j) {
        const TwoRows taps = taps_of(source + j * tap_column, i);
        Pair* target = to + (i * p.kernel_w + j) * tile_pixels;
        if (pixel == 1)
          taps.copy_run(run, target);
        else
          for (int64_t v = 0; v < run; ++v) taps.copy(v * pixel, target + v);
      }
  }
}

}  // namespace
}  // namespace pyinvolution::cpu
