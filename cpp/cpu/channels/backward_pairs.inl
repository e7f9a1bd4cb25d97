// The inner loops of the backward passes of `fused` and `channels` in bfloat16 by dot products of pairs. The tasks and their steps are
// those of tiling.h; a pair is
//
//   W       two reduced channels, as in the forward pass; W is rounded to bfloat16
//   grad_X  two tap rows at the same column. They read neighbouring rows of the output, so that a pair of weights is made
//           of two rows of W: [row][pair of tap rows][tap column][column], the low halves of a row and the high ones of the
//           row before it. grad_Y is [row][column][16] of the same two rows. Both are kept for as many rows as a row of
//           grad_X reads, which is summed in registers over all of its taps and stored once
//   grad_W  two channels: X and grad_Y are [pair of channels][row][column]. Rows of X follow each other without more than
//           the zeros of one border between them, so that short rows, too, fill vectors; a vector of sums is stored
//           without the lanes between rows
//   grad_R  two taps, and grad_S two pixels, of grad_W rounded to bfloat16
//
// For 7 x 7 taps 14 columns of grad_X take, per pair of tap rows, 98 dot products and 97 loads. grad_W takes, per pair of
// channels, tap row and three vectors, 21 dot products, 11 loads and 18 shifts.
#include <cstdint>
#include <cstring>

#include "cpu/channels/backward_strip.h"
#include "cpu/channels/packing_pairs.h"
#include "cpu/channels/tiling.h"
#include "cpu/simd/pairs.h"
#include "cpu/simd/pairs_gemm.h"
#include "cpu/simd/pairs_sums.h"

namespace pyinvolution::cpu {
namespace {

// How many neighbouring columns of grad_X are computed at a time.
constexpr int max_gather_columns = 16;

// How many of `rest` a block of up to `most` takes: the last two are of the same size, nearly.
inline int64_t next_block(int64_t rest, int64_t most) {
  return rest >= 2 * most ? most : rest > most ? (rest + 1) / 2 : rest;
}

// What a row of grad_X is the sum of: pairs of tap rows, each with the rows of grad_Y and of weights that it reads, at
// their first column. Of the last one, with `single`, only the low halves count.
struct GatherRows {
  struct {
    const Pair *gy, *w;
  } at[(max_pair_taps + 1) / 2];
  int64_t pairs;  // without the single one
  bool single;
};

// A block of channels of grad_X at Columns columns q = Stride m + Phase - padding from m = `first` on:
//
//   gx[m] = sum over t of  w[Phase + Stride t][m - t] * gy[m - t]
//
// Weights and grad_Y are zero where m - t is outside the row. Stride and Width are those of the window, or both 0 for any,
// whose stride, phase and number of taps of the phase are arguments.
template <int Columns, int Stride, int Width, int Phase>
[[gnu::noinline]] void gather_pairs_block(const GatherRows& rows, int64_t first, int64_t any_stride, int64_t any_phase,
                                          int64_t any_taps, const PixelResults& result) {
  constexpr bool any = Stride == 0;
  constexpr int known_taps = any ? 1 : (Width - Phase + Stride - 1) / (any ? 1 : Stride);
  // Sums of few columns would wait for each other.
  constexpr int chains = Columns <= max_gather_columns / 2 ? 2 : 1, spread_columns = any || Columns < 4 ? 0 : 4;
  const int64_t stride = any ? any_stride : Stride, phase = any ? any_phase : Phase, taps = any ? any_taps : known_taps;
  const int64_t tap = 1 - stride * weight_row_pitch;
  const int64_t gy_offset = (first - (taps - 1)) * block_channels;
  const int64_t w_offset = first + phase * weight_row_pitch - (taps - 1) * tap;
  PairSums<16> sums[chains][Columns];
#pragma GCC unroll 2
  for (int k = 0; k < chains; ++k)
#pragma GCC unroll 16
    for (int c = 0; c < Columns; ++c) sums[k][c] = PairSums<16>::splat(0);
  const auto add = [&](PairSums<16>(&sum)[Columns], int64_t row, auto load) __attribute__((always_inline)) {
    const Pair *gy = rows.at[row].gy + gy_offset, *w = rows.at[row].w + w_offset;
    // Hides where they come from: GCC would compute the addresses of all columns and taps before the loop.
    asm("" : "+r"(gy), "+r"(w));
    if constexpr (any) {
      for (int64_t t = 0; t < taps; ++t, gy += block_channels, w += tap)
#pragma GCC unroll 16
        for (int c = 0; c < Columns; ++c) sum[c].add_dot(load(gy + c * block_channels), w[c]);
    } else {
      constexpr int step = 1 - Stride * int(weight_row_pitch);
      Pairs<16> fours[known_taps];
#pragma GCC unroll 32
      for (int q = 0; q < Columns - 1 + known_taps; ++q) {
        const Pairs<16> at = load(gy + q * block_channels);
#pragma GCC unroll 16
        for (int c = 0; c < Columns; ++c) {
          const int t = q - c;
          if (t < 0 || t >= known_taps) continue;
          const Pair* weight = w + t * step + c;
          if (c < spread_columns) {
            if (c == 0) fours[t] = Pairs<16>::load_fours(weight);
            sum[c].add_dot(at, fours[t].spread(c));
          } else {
            sum[c].add_dot(at, *weight);
          }
        }
      }
    }
  };
  const auto whole = [](const Pair* from) __attribute__((always_inline)) { return Pairs<16>::load(from); };
  const auto low = [](const Pair* from) __attribute__((always_inline)) { return Pairs<16>::load_low(from); };
  int64_t row = 0;
  for (; row + chains <= rows.pairs; row += chains)
#pragma GCC unroll 2
    for (int k = 0; k < chains; ++k) add(sums[k], row + k, whole);
  if constexpr (chains == 2)
    if (row < rows.pairs) add(sums[0], row++, whole);
  if (rows.single) add(sums[chains - 1], row, low);
  if constexpr (chains == 2)
#pragma GCC unroll 16
    for (int c = 0; c < Columns; ++c) sums[0][c].value += sums[1][c].value;
  if (result.narrow != nullptr) {
#pragma GCC unroll 16
    for (int c = 0; c < Columns; ++c) sums[0][c].round_to(result.narrow + c * result.column);
  } else {
#pragma GCC unroll 16
    for (int c = 0; c < Columns; ++c) sums[0][c].store(result.wide + c * result.column);
  }
}

// All columns of a phase of a row of grad_X.
template <int Stride, int Width, int Phase>
void gather_pairs_phase(const Problem& p, const GatherRows& rows, int64_t any_phase, const PixelResults& row) {
  const int64_t stride = Stride > 0 ? Stride : p.stride_w, phase = Stride > 0 ? Phase : any_phase;
  const int64_t taps = max(0, ceil_div(p.kernel_w - phase, stride));
  const auto column = [&](int64_t q) { return q <= 0 ? 0 : ceil_div(q, stride); };
  const int64_t begin = column(p.padding_w - phase), columns = column(p.in_w + p.padding_w - phase) - begin;
  for (int64_t m = begin, end = begin + columns; m < end;) {
    const int64_t count = next_block(end - m, max_gather_columns);
    with_count<max_gather_columns>(count, [&](auto n) {
      gather_pairs_block<decltype(n)::value, Stride, Width, Phase>(
          rows, m, stride, phase, taps, row.at(0, stride * m + phase - p.padding_w).every(stride));
    });
    m += count;
  }
}

template <int Stride, int Width>
void gather_pairs(const Problem& p, const GatherRows& rows, const PixelResults& row) {
  if constexpr (Stride == 0) {
    for (int64_t phase = 0; phase < p.stride_w; ++phase) gather_pairs_phase<0, 0, 0>(p, rows, phase, row);
  } else {
    gather_pairs_phase<Stride, Width, 0>(p, rows, 0, row);
    if constexpr (Stride > 1) gather_pairs_phase<Stride, Width, 1>(p, rows, 1, row);
  }
}

using GatherPairs = void (*)(const Problem&, const GatherRows& rows, const PixelResults& row);

GatherPairs gather_pairs_for(const Problem& p) {
  if (p.stride_w == 1) {
    switch (p.kernel_w) {
      case 3: return gather_pairs<1, 3>;
      case 5: return gather_pairs<1, 5>;
      case 7: return gather_pairs<1, 7>;
      default: break;
    }
  } else if (p.stride_w == 2) {
    switch (p.kernel_w) {
      case 3: return gather_pairs<2, 3>;
      case 5: return gather_pairs<2, 5>;
      case 7: return gather_pairs<2, 7>;
      default: break;
    }
  }
  return gather_pairs<0, 0>;
}

// A vector of pixels of a tile: where it begins in packed rows, its pixels among its lanes, and how many pixels of the
// tile come before it.
struct PixelVector {
  int64_t at;
  uint32_t mask;
  int64_t place;
};

// What grad_weight_pairs_block is told besides addresses.
struct GradWeightPairs {
  int64_t depth;            // pairs of channels
  int64_t x_pair, x_phase;  // steps in packed X: to the next pair of channels, phase of columns
  int64_t stride;
};

// grad_W of Taps neighbouring taps of a row, from one of phase 0 on, at Vectors vectors of pixels. x is where the first
// tap reads for the first pixel of the tile. Stride 0 is any. A vector is stored whole, and what is past its pixels is
// overwritten by the next one; with Flat its pixels are not neighbours.
template <int Vectors, int Stride, int Taps, bool Flat>
[[gnu::noinline]] void grad_weight_pairs_block(const GradWeightPairs& params, const Pair* gy, const Pair* x,
                                               const PixelVector* vectors, float* to) {
  const int64_t x_pair = params.x_pair, x_phase = params.x_phase;
  PairSums<16> sum[Taps][Vectors];
#pragma GCC unroll 8
  for (int j = 0; j < Taps; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[j][v] = PairSums<16>::splat(0);
  const Pair *gy_at[Vectors], *x_at[Vectors];
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) gy_at[v] = gy + vectors[v].at, x_at[v] = x + vectors[v].at;
  for (int64_t c = params.depth; c > 0; --c) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const auto grad = Pairs<16>::load(gy_at[v]);
      if constexpr (Stride == 0) {
        for (int64_t j = 0; j < Taps; ++j)
          sum[j][v].add_dot(grad, Pairs<16>::load(x_at[v] + j % params.stride * x_phase + j / params.stride));
      } else {
#pragma GCC unroll 3
        for (int phase = 0; phase < Stride && phase < Taps; ++phase) {
          const Pair* from = x_at[v] + phase * x_phase;
          const auto low = Pairs<16>::load(from), high = Pairs<16>::load(from + pair_lanes);
#pragma GCC unroll 8
          for (int shift = 0; Stride * shift + phase < Taps; ++shift)
            sum[Stride * shift + phase][v].add_dot(grad, shift == 0 ? low : Pairs<16>::shifted(low, high, shift));
        }
      }
      gy_at[v] += flat_columns, x_at[v] += x_pair;
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) {
    const uint32_t mask = vectors[v].mask;
    float* place = to + vectors[v].place;
#pragma GCC unroll 8
    for (int j = 0; j < Taps; ++j)
      if constexpr (Flat)
        sum[j][v].store_lanes(mask, place + j * gradient_pitch);
      else
        sum[j][v].store(place + j * gradient_pitch);
  }
}

// --- a task ----------------------------------------------------------------------------------------------------------

struct BackwardPairsRun : BackwardTask<BFloat16, BackwardPairsRun> {
  const GatherPairs gather;
  const int64_t pair_rows;                         // pairs of tap rows
  const int64_t depth;                             // pairs of reduced channels
  PixelVector vectors[flat_columns / pair_lanes];  // of a tile with all its rows
  const BFloat16* rows_of_span = nullptr;
  int64_t span_pitch = 0;
  int64_t first_pair[max_pair_taps + 1];                 // of the tap rows of each phase
  const Pair* before = nullptr;                          // the last row of W of the tile before
  int64_t kept = 0;                                      // the row of the output that is kept first
  int64_t next_row = 0, next_first = 0, next_phase = 0;  // of grad_X, and of the output that its first tap row reads
  int64_t packed = 0;                                    // rows of X, from the first one of the strip on

  BackwardPairsRun(const BackwardTiling& backward, int64_t task, void* scratch)
      : BackwardTask(backward, task, scratch),
        gather(gather_pairs_for(p)),
        pair_rows(pairs_of_tap_rows(p)),
        depth(ceil_div(span.reduced, 2)) {
    first_pair[0] = 0;
    for (int64_t a = 0; a < p.kernel_h; ++a)
      first_pair[a + 1] = first_pair[a] + (a < p.stride_h ? ceil_div(ceil_div(p.kernel_h - a, p.stride_h), 2) : 0);
    int64_t row = 0, column = 0, place = 0;
    const auto next = [&](int64_t lanes, int64_t end) {
      column += lanes;
      if (column >= end) column = 0, ++row;
    };
    for (PixelVector& vector : vectors) {
      vector = {tiling.flat ? (&vector - vectors) * pair_lanes : row * tiling.flat_row + column, 0, place};
      if (tiling.flat) {
        for (int64_t lane = 0; lane < pair_lanes; ++lane, next(1, tiling.flat_row))
          if (column < p.out_w) vector.mask |= 1u << lane, ++place;
      } else {
        place += min(pair_lanes, p.out_w - column);
        next(pair_lanes, p.out_w);
      }
    }
  }

  Pair* pairs_at(int64_t offset) const { return reinterpret_cast<Pair*>(memory + offset); }
  BFloat16* elements_at(int64_t offset) const { return reinterpret_cast<BFloat16*>(memory + offset); }
  int64_t channel_pairs() const { return ceil_div(p.group_channels(), 2); }

  // Rows of the output whose weights and grad_Y are kept, from the zeros before them on. They are less than kept_rows away
  // from the first one.
  int64_t place_of(int64_t row) const {
    const int64_t place = row - kept;
    return place < 0 ? place + tiling.kept_rows : place < tiling.kept_rows ? place : place - tiling.kept_rows;
  }
  Pair* weight_rows() const { return pairs_at(tiling.weights_at); }
  Pair* weight_row(int64_t row) const {
    return weight_rows() + place_of(row) * pair_rows * p.kernel_w * weight_row_pitch;
  }
  Pair* gradient_rows() const { return pairs_at(tiling.grad_y_at); }
  Pair* gradient_row(int64_t block, int64_t row) const {
    return gradient_rows() +
           (block * tiling.kept_rows + place_of(row)) * (p.out_w + 2 * weight_margin) * block_channels;
  }

  // --- the steps of a task

  void start() const {
    // The zeros around images and rows are written once; tasks leave them alone.
    if (want_weights) {
      std::memset(pairs_at(tiling.x_at), 0, size_t(channel_pairs() * tiling.x_channel + flat_columns) * sizeof(Pair));
      std::memset(pairs_at(tiling.grad_y_across_at), 0, size_t(channel_pairs() * flat_columns) * sizeof(Pair));
    }
    if (tiling.buffers.grad_bias != nullptr)
      std::memset(bias_sums(0), 0, size_t(ceil_div(p.groups, tiling.chunks) * p.taps() * pair_lanes) * sizeof(float));
    if (!want_x) return;
    const Pairs<16> zeros{};
    const int64_t columns = p.out_w, taps = tiling.kept_rows * pair_rows * p.kernel_w;
    Pair* weights = weight_rows();
    for (int64_t k = 0; k < taps; ++k, weights += weight_row_pitch) {
      zeros.store(weights);
      zeros.store(weights + weight_margin + columns);
    }
    Pair* gradients = gradient_rows();
    for (int64_t row = tiling.blocks * tiling.kept_rows; row > 0; --row) {
      for (int64_t i = 0; i < weight_margin; ++i, gradients += block_channels) zeros.store(gradients);
      gradients += columns * block_channels;
      for (int64_t i = 0; i < weight_margin; ++i, gradients += block_channels) zeros.store(gradients);
    }
  }

  // grad_b of a group of the chunk as [tap][lane].
  float* bias_sums(int64_t group) const { return memory + tiling.bias_sums_at + group * p.taps() * pair_lanes; }

  // R at a tile as [vector][pair of r][lane], and of the strip itself as [pair of pixels][r].
  void pack_reduced(int64_t n, const BackwardStrip& strip) const {
    const BFloat16* image = static_cast<const BFloat16*>(tiling.buffers.reduced) + n * span.reduced_stride[0];
    const int64_t pixel = span.reduced_stride[3];
    for_each_tile(strip, [&](int64_t first, int64_t rows, int64_t index) {
      const BFloat16* from = image + first * span.reduced_stride[2];
      if (want_x) pack_channel_pairs(from, span.reduced_stride, span.reduced, rows, p.out_w, panel(index));
      if (tiling.buffers.grad_span == nullptr || first < strip.begin || first >= strip.end) return;
      Pair* to = pixel_pairs(first - strip.begin);
      const int64_t pitch = tiling.reduced_padded;
      if (rows == 1 || span.reduced_stride[2] == p.out_w * pixel)
        return pack_row_pairs(from, pixel, span.reduced_stride[1], rows * p.out_w, span.reduced, to, pitch);
      for (int64_t i = 0; i < rows * p.out_w; i += 2, to += pitch) {
        const auto at = [&](int64_t k) { return from + k / p.out_w * span.reduced_stride[2] + k % p.out_w * pixel; };
        const BFloat16* low = at(i);
        pack_row_pairs(low, i + 1 < rows * p.out_w ? at(i + 1) - low : 0, span.reduced_stride[1],
                       i + 1 < rows * p.out_w ? 2 : 1, span.reduced, to, pitch);
      }
    });
  }
  Pair* panel(int64_t index) const { return pairs_at(tiling.panels_at) + index * tiling.tile_pitch * depth; }
  Pair* pixel_pairs(int64_t row) const {
    return pairs_at(tiling.pixels_at) + tiling.place(row, 0) / 2 * tiling.reduced_padded;
  }

  void start_group(int64_t, int64_t g, const BackwardStrip& strip) {
    before = nullptr;
    kept = strip.first;
    next_row = strip.in_begin;
    next_first = (next_row + p.padding_h) / p.stride_h, next_phase = (next_row + p.padding_h) % p.stride_h;
    packed = 0;
    if (span.reduced == 0) return;
    const BFloat16* s = span_row<BFloat16>(span, tiling.buffers, g * p.taps());
    const int64_t row = span.span_stride[0], column = span.span_stride[1];
    if (want_x)
      rows_of_span = rows_in_pairs(s, row, column, p.taps(), span.reduced, elements_at(tiling.span_at), &span_pitch);
    if (tiling.buffers.grad_reduced != nullptr)
      pack_row_pairs(s, row, column, p.taps(), span.reduced, pairs_at(tiling.span_across_at), span.reduced);
  }

  // The next tile, or the first one of the next group: a group's pixels are as far apart as all channels are wide.
  void prefetch(const Group& group, const Group* next, int64_t row, int64_t rows) const {
    const bool here = row + rows < last_row(*group.strip);
    if (next != nullptr && next->begins && span.reduced_stride[1] == 1) {
      const int64_t first = first_row(*next->strip) + row - first_row(*group.strip);
      for (int64_t r = first; r < min(first + rows, last_row(*next->strip)); ++r)
        prefetch_pixels(static_cast<const BFloat16*>(tiling.buffers.reduced) + next->n * span.reduced_stride[0] +
                            r * span.reduced_stride[2],
                        1, span.reduced, span.reduced_stride[3], p.out_w);
    }
    // (What lies together the processor fetches by itself.)
    if ((!here && next == nullptr) || p.group_channels() == p.channels) return;
    const Group& at = here ? group : *next;
    const BackwardStrip& strip = *at.strip;
    const int64_t begin = here ? row + rows : first_row(strip), end = min(begin + tiling.tile_rows, last_row(strip));
    prefetch_output({at.n, at.g, at.strip, false}, begin, end);
    const auto last_read = [&](int64_t r) { return (r - 1) * p.stride_h - p.padding_h + p.kernel_h; };
    if (want_weights && end > strip.begin && begin < strip.end)
      prefetch_input(at, tiling.buffers.x, p.x_stride, begin <= strip.begin ? strip.x_begin : last_read(begin),
                     last_read(end));
    if (want_x)
      prefetch_input(at, tiling.buffers.grad_x, span.grad_x_stride,
                     max(strip.in_begin, begin * p.stride_h - p.padding_h),
                     end == strip.last ? strip.in_end : end * p.stride_h - p.padding_h);
  }

  // X of a group for a strip as [pair of channels][phase of rows][phase of columns][row][column]: column m of a phase is
  // column stride * m + phase - padding of X, and rows alike. The zeros after a row are those before the next one, too.
  // Rows [from_row, to_row) from the strip's first one on.
  void pack_input(int64_t n, int64_t g, const BackwardStrip& strip, int64_t from_row, int64_t to_row) const {
    const BFloat16* image =
        static_cast<const BFloat16*>(tiling.buffers.x) + n * p.x_stride[0] + g * p.group_channels() * p.x_stride[1];
    const bool in_pairs = p.x_stride[3] % 2 == 0 && channels_in_pairs(image, p.x_stride, p.group_channels(), 2);
    for (int64_t row = from_row; row < to_row; ++row)
      for (int64_t phase = 0; phase < p.stride_w; ++phase) {
        const int64_t h = strip.x_begin + row, begin = flat_begin(p, phase), end = flat_end(p, phase);
        if (begin >= end) continue;
        Pair* to = pairs_at(tiling.x_at) + plane(row % p.stride_h, phase) + row / p.stride_h * tiling.flat_row + begin;
        if (h >= 0 && h < p.in_h)
          pack_channel_rows(image + h * p.x_stride[2] + (begin * p.stride_w + phase - p.padding_w) * p.x_stride[3],
                            p.x_stride[1], p.group_channels(), p.stride_w * p.x_stride[3], end - begin, in_pairs, to,
                            tiling.x_channel);
        else if (tiling.height < p.out_h)
          for (int64_t c = 0; c < channel_pairs(); ++c)
            std::memset(to + c * tiling.x_channel, 0, size_t(end - begin) * sizeof(Pair));
      }
  }
  int64_t plane(int64_t row_phase, int64_t phase) const { return (row_phase * p.stride_w + phase) * tiling.x_phase; }

  // W at a tile as [pair of tap rows][tap column][pixel]; the partner of an odd tap row is zero.
  void compute_weights(int64_t index, int64_t pixels, Pair* to) const {
    const PairColumns columns{panel(index), depth * pair_lanes};
    for (int64_t a = 0; a < min(p.stride_h, p.kernel_h); ++a)
      for (int64_t i = a; i < p.kernel_h; i += 2 * p.stride_h, to += p.kernel_w * tile_pixels) {
        const int64_t first = i * p.kernel_w, partner = i + p.stride_h < p.kernel_h ? p.stride_h * p.kernel_w : 0;
        multiply_pairs({rows_of_span + first * span_pitch, span_pitch, 1, partner, bias + first}, p.kernel_w, columns,
                       pixels, depth, {to, tile_pixels, pair_lanes, false});
      }
  }

  // The same from memory.
  void load_weights(int64_t n, int64_t g, int64_t row, int64_t rows, Pair* to) const {
    const BFloat16* from = weights_of<BFloat16>(p, tiling.w, n, g, row, 0);
    Problem every = p;  // stride-th tap row
    every.w_stride[2] *= p.stride_h;
    for (int64_t a = 0; a < min(p.stride_h, p.kernel_h); ++a) {
      every.kernel_h = ceil_div(p.kernel_h - a, p.stride_h);
      load_weight_pairs(from + a * p.w_stride[2], every, rows, p.out_w, to, pairs_at(tiling.staging_at));
      to += ceil_div(every.kernel_h, 2) * p.kernel_w * tile_pixels;
    }
  }

  // Weights of a row of the output, the low halves, with those of the row before it. Either may be missing.
  void keep_weights(const Pair* low, const Pair* high, Pair* to) const {
    const int64_t taps = pair_rows * p.kernel_w, columns = p.out_w;
    to += weight_margin;
    const auto copy = [&](auto pairs_of) __attribute__((always_inline)) {
      for (int64_t v = 0; v < columns; v += pair_lanes) {
        const int64_t count = min(pair_lanes, columns - v);
        for (int64_t k = 0; k < taps; ++k) pairs_of(k * tile_pixels + v, count).store(to + k * weight_row_pitch + v);
      }
    };
    const Pairs<16> zero{};
    if (low == nullptr)
      copy([&](int64_t at, int64_t count) { return zero.with_high_of(Pairs<16>::load_first(high + at, count)); });
    else if (high == nullptr)
      copy([&](int64_t at, int64_t count) { return Pairs<16>::load_first(low + at, count).with_high_of(zero); });
    else
      copy([&](int64_t at, int64_t count) {
        return Pairs<16>::load_first(low + at, count).with_high_of(Pairs<16>::load_first(high + at, count));
      });
  }

  // A row of grad_Y of a block, the low halves, with the row before it.
  void keep_gradient(int64_t n, int64_t g, int64_t block, int64_t row, const BackwardStrip& strip) const {
    const BFloat16* channels =
        static_cast<const BFloat16*>(tiling.buffers.y) + n * p.y_stride[0] + first_channel(g, block) * p.y_stride[1];
    const auto row_of = [&](int64_t r) {
      return r < strip.first || r >= strip.last ? nullptr : channels + r * p.y_stride[2];
    };
    load_pixel_pairs(TwoRows(row_of(row), row_of(row - 1)), channels_of(block), p.out_w, p.y_stride[1], p.y_stride[3],
                     gradient_row(block, row) + weight_margin * block_channels, pairs_at(tiling.staging_at));
  }

  // Row next_row of grad_X.
  void gather_row(int64_t n, int64_t g, int64_t block, const BackwardStrip& strip) const {
    int64_t pair = first_pair[min(next_phase, p.kernel_h)], row = next_first;
    GatherRows rows{};
    const auto inside = [&](int64_t row) { return row >= strip.first && row < strip.last; };
    for (int64_t i = next_phase; i < p.kernel_h; i += 2 * p.stride_h, row -= 2, ++pair) {
      const bool partner = i + p.stride_h < p.kernel_h;
      if (!inside(row) && !(partner && inside(row - 1))) continue;
      rows.at[rows.pairs] = {gradient_row(block, row) + weight_margin * block_channels,
                             weight_row(row) + pair * p.kernel_w * weight_row_pitch + weight_margin};
      if (partner)
        ++rows.pairs;
      else
        rows.single = true;
    }
    const int64_t channels = channels_of(block), channel = span.grad_x_stride[1], pixel = span.grad_x_stride[3];
    BFloat16* to = static_cast<BFloat16*>(tiling.buffers.grad_x) + n * span.grad_x_stride[0] +
                   first_channel(g, block) * channel + next_row * span.grad_x_stride[2];
    if (channel == 1 && channels == block_channels) return gather(p, rows, {to, nullptr, 0, pixel});
    float* wide = memory + tiling.grad_x_at;
    gather(p, rows, {nullptr, wide, 0, block_channels});
    store_pixels(wide, channels, p.in_w, to, channel, pixel, staging);
  }

  // grad_W at a tile of rows of the strip as [tap][pixel].
  void grad_weights(int64_t n, int64_t g, int64_t first, int64_t rows, const BackwardStrip& strip, float* gw) const {
    const BFloat16* from = static_cast<const BFloat16*>(tiling.buffers.y) + n * p.y_stride[0] +
                           g * p.group_channels() * p.y_stride[1] + first * p.y_stride[2];
    const bool in_pairs = channels_in_pairs(from, p.y_stride, p.group_channels(), rows);
    Pair* gy = pairs_at(tiling.grad_y_across_at);
    for (int64_t r = 0; r < rows; ++r)
      pack_channel_rows(from + r * p.y_stride[2], p.y_stride[1], p.group_channels(), p.y_stride[3], p.out_w, in_pairs,
                        gy + r * tiling.flat_row, flat_columns);
    const int64_t count = tiling.flat ? ceil_div((rows - 1) * tiling.flat_row + p.out_w, pair_lanes)
                                      : rows * ceil_div(p.out_w, pair_lanes);
    const Pair* x = pairs_at(tiling.x_at) + (first - strip.begin) * tiling.flat_row;
    const GradWeightPairs params{channel_pairs(), tiling.x_channel, tiling.x_phase, p.stride_w};
    for (int64_t i = 0, phase = 0, row = 0; i < p.kernel_h; ++i, gw += p.kernel_w * gradient_pitch) {
      const Pair* x_row = x + plane(phase, 0) + row * tiling.flat_row;
      if (p.stride_w == 1)
        grad_weight_row<1>(params, gy, x_row, count, gw);
      else if (p.stride_w == 2)
        grad_weight_row<2>(params, gy, x_row, count, gw);
      else
        grad_weight_row<0>(params, gy, x_row, count, gw);
      if (++phase == p.stride_h) phase = 0, ++row;
    }
  }
  template <int Stride>
  void grad_weight_row(const GradWeightPairs& params, const Pair* gy, const Pair* x, int64_t count, float* to) const {
    constexpr int most = 7;
    for (int64_t j = 0; j < p.kernel_w;) {
      // Parts begin with a tap of phase 0: of more than one stride each has 6 taps, or as many as the stride.
      const int64_t rest = p.kernel_w - j;
      const int64_t taps = rest <= most         ? rest
                           : Stride > 0         ? most - 1
                           : p.stride_w <= most ? most / p.stride_w * p.stride_w
                                                : 1;
      const int64_t stride = Stride > 0 ? Stride : p.stride_w;
      const Pair* from = x + j % stride * params.x_phase + j / stride;
      with_count<most>(taps, [&](auto n) {
        constexpr int wide = decltype(n)::value <= 5 ? 4 : 3;
        for (int64_t v = 0; v < count;) {
          const int64_t together = next_block(count - v, wide);
          with_count<wide>(together, [&](auto m) {
            const auto block = tiling.flat
                                   ? grad_weight_pairs_block<decltype(m)::value, Stride, decltype(n)::value, true>
                                   : grad_weight_pairs_block<decltype(m)::value, Stride, decltype(n)::value, false>;
            block(params, gy, from, vectors + v, to + j * gradient_pitch);
          });
          v += together;
        }
      });
      j += taps;
    }
  }

  // grad_W of a tile rounded to [tap][pixel] and to [pair of taps][pixel]; its sums for grad_b.
  void round_weights(const float* gw, int64_t pixels, BFloat16* to, Pair* across, float* sums) const {
    const int64_t taps = p.taps();
    for (int64_t k = 0; k < taps; k += 2, gw += 2 * gradient_pitch, to += 2 * tile_pixels, across += tile_pixels) {
      const bool other = k + 1 < taps;
      auto total_low = PairSums<16>::splat(0), total_high = PairSums<16>::splat(0);
      const auto round = [&](int64_t v, auto load) __attribute__((always_inline)) {
        const auto low = load(gw + v), high = other ? load(gw + gradient_pitch + v) : PairSums<16>::splat(0);
        total_low.value += low.value, total_high.value += high.value;
        low.round_with(high).store(across + v);
        low.round_to(to + v);
        if (other) high.round_to(to + tile_pixels + v);
      };
      int64_t v = 0;
      for (; v + pair_lanes <= pixels; v += pair_lanes)
        round(v, [](const float* from) { return PairSums<16>::load(from); });
      if (v < pixels) round(v, [&](const float* from) { return PairSums<16>::load_first(from, pixels - v); });
      if (sums == nullptr) continue;
      const auto add = [&](PairSums<16> total, int64_t tap) {
        total.value += PairSums<16>::load(sums + tap * pair_lanes).value;
        total.store(sums + tap * pair_lanes);
      };
      add(total_low, k);
      if (other) add(total_high, k + 1);
    }
  }

  // grad_R at a row of the output.
  void store_reduced_row(const float* from, int64_t apart, BFloat16* to, int64_t channel, int64_t pixel) const {
    const int64_t columns = p.out_w;
    Pair* pairs = pairs_at(tiling.staging_at);
    for (int64_t v = 0; v < columns; v += pair_lanes)
      for (int64_t r = 0; r < span.reduced; r += 2 * pair_lanes) {
        const int64_t count = min(pair_lanes, columns - v), high = min(2 * pair_lanes, span.reduced - r);
        for (int64_t k = 0; k < high; k += 2) {
          const float* at = from + (r + k) * apart + v;
          const auto low = PairSums<16>::load_first(at, count);
          const auto other = k + 1 < high ? PairSums<16>::load_first(at + apart, count) : PairSums<16>::splat(0);
          low.round_with(other).store(pairs + k / 2 * pair_lanes);
        }
        BFloat16* out = to + r * channel + v * pixel;
        if (channel == 1 && high % 2 == 0 && pixel % 2 == 0 && reinterpret_cast<uintptr_t>(out) % sizeof(Pair) == 0) {
          transpose_pairs(pairs, pair_lanes, high / 2, count, reinterpret_cast<Pair*>(out), pixel / 2);
          continue;
        }
        for (int64_t k = 0; k < high; ++k)
          for (int64_t i = 0; i < count; ++i) {
            const Pair& pair = pairs[k / 2 * pair_lanes + i];
            out[k * channel + i * pixel] = k % 2 == 0 ? pair.low : pair.high;
          }
      }
  }

  // grad_R += S^T grad_W and grad_S += grad_W R^T of a tile of the strip.
  void multiply_gradients(int64_t g, int64_t row, int64_t pixels, const Pair* rounded, const Pair* across) const {
    const int64_t taps = p.taps(), pitch = tiling.reduced_padded;
    const auto bits = [](const Pair* pairs) { return reinterpret_cast<const uint32_t*>(pairs); };
    if (tiling.buffers.grad_reduced != nullptr)
      pair_product({bits(pairs_at(tiling.span_across_at)), 1, span.reduced, span.reduced, bits(across), pair_lanes,
                    tile_pixels, ceil_div(pixels, pair_lanes), ceil_div(taps, 2), nullptr, gr + tiling.place(row, 0),
                    tiling.plane});
    if (tiling.buffers.grad_span != nullptr)
      pair_product({bits(rounded), tile_pixels / 2, 1, taps, bits(pixel_pairs(row)), pair_lanes, pitch,
                    pitch / pair_lanes, ceil_div(pixels, 2), nullptr, tiling.span_part(part) + g * taps * pitch,
                    pitch});
  }

  void tile(int64_t n, int64_t g, int64_t first, int64_t rows, int64_t index, const BackwardStrip& strip) {
    const int64_t pixels = rows * p.out_w, end = first + rows;
    if (want_x) {
      // Two tiles of W by turns: a tile reads the last row of the one before.
      Pair* w = pairs_at(tiling.dense_at) + index % 2 * pair_rows * p.kernel_w * tile_pixels;
      if (tiling.w != nullptr)
        load_weights(n, g, first, rows, w);
      else
        compute_weights(index, pixels, w);
      const bool last = end == strip.last;
      for (int64_t row = first; row < end + (last ? 1 : 0); ++row) {
        const Pair* at = w + (row - first) * p.out_w;
        keep_weights(row < end ? at : nullptr, row > first ? at - p.out_w : before, weight_row(row));
        for (int64_t block = 0; block < tiling.blocks; ++block) keep_gradient(n, g, block, row, strip);
      }
      before = w + (rows - 1) * p.out_w;
      while (next_row < strip.in_end && (last || next_first < end)) {
        for (int64_t block = 0; block < tiling.blocks; ++block) gather_row(n, g, block, strip);
        ++next_row;
        if (++next_phase == p.stride_h) next_phase = 0, ++next_first;
      }
      if (end - kept >= tiling.kept_rows) kept += tiling.kept_rows;
    }
    if (!want_weights || first < strip.begin || first >= strip.end) return;
    const int64_t needed = (end - 1 - strip.begin) * p.stride_h + p.kernel_h;
    pack_input(n, g, strip, packed, needed);
    packed = needed;
    float* gw = memory + tiling.grad_weights_at;
    grad_weights(n, g, first, rows, strip, gw);
    if (tiling.grad_w != nullptr) {
      for (int64_t r = 0; r < rows; ++r)
        store_weights(gw + r * p.out_w, p, p.out_w, weights_of<BFloat16>(p, tiling.grad_w, n, g, first + r, 0));
      return;
    }
    round_weights(gw, pixels, elements_at(tiling.rounded_at), pairs_at(tiling.rounded_across_at),
                  tiling.buffers.grad_bias != nullptr ? bias_sums(g - first_group()) : nullptr);
    multiply_gradients(g, first - strip.begin, pixels, pairs_at(tiling.rounded_at), pairs_at(tiling.rounded_across_at));
  }

  void finish_group(int64_t, int64_t, const BackwardStrip&) const {}

  // Sums of lanes: 16 taps at a time.
  void finish_task() const {
    if (tiling.buffers.grad_bias == nullptr) return;
    const int64_t first = first_group() * p.taps(), count = last_group() * p.taps() - first;
    float* to = tiling.bias_part(part) + first;
    for (int64_t k = 0; k < count; k += pair_lanes) {
      const int64_t taps = min(pair_lanes, count - k);
      transpose(bias_sums(0) + k * pair_lanes, pair_lanes, taps, pair_lanes, staging, pair_lanes);
      auto sum = PairSums<16>::splat(0);
      for (int64_t lane = 0; lane < pair_lanes; ++lane)
        sum.value += PairSums<16>::load_first(staging + lane * pair_lanes, taps).value;
      float sums[pair_lanes];
      sum.store(sums);
      for (int64_t i = 0; i < taps; ++i) to[k + i] = sums[i];
    }
  }
};

}  // namespace
}  // namespace pyinvolution::cpu
