// The gradient of the input, on tensor cores; the problems are those of forward.cuh, with stride S of the involution.
//
//   X[n,c,q] = sum over taps k of W[n,g(c),k,p] * Y[n,c,p],  p = (q + padding - k) / S where whole
//
// A block walks down a stripe of Columns pixels of Y (grad_output), one or two rows at a time, which come to shared
// memory in the background with their weights, both as they are stored. A row p of Y adds to the rows S*p - padding to
// S*p - padding + K - 1 of X; a warp keeps the sums of all rows that are not complete, for 8*S columns of one group:
//
//     X[16 channels x 8 pixels, S apart] += Y[16 channels x 16 positions] * band[16 positions x 8 pixels]
//
// for each kernel row and, with S = 2, each parity of X's columns. Pixel i of a parity and slot s of its kernel row
// meet at position i + s of Y, in tap last - S*s: the band of the forward, whose weights lie at other places. As there,
// zeros of the band can make NaN of an Inf; rows that are not finite are computed again, from memory.
//
// So a weight is moved once by its block, and once more where it is in the halo of a neighbour: (Columns + 6) / Columns
// times for K = 7, S = 1 and (Columns + 3) / Columns times for S = 2. The (K - 1) / S rows before a stripe that does
// not begin at the first row are moved again, too.
#pragma once

#include "config.cuh"

namespace pyinvolution::cuda::mma {

// Calls `body` for pieces of 4 sums that are next to each other in memory, of 16 channels of 8 pixels of each parity:
// with their bits, the channel and the column among 8*S.
template <int S, bool ChannelsInner, class T, class Body>
__device__ __forceinline__ void for_each_piece(const float (*sums)[4], int lane, const Body& body) {
  const int line = lane / 4, place = lane % 4;
  if constexpr (S == 2 && !ChannelsInner) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t bits[2] = {pack<T>(sums[0][2 * half], sums[1][2 * half]),
                                pack<T>(sums[0][2 * half + 1], sums[1][2 * half + 1])};
      body(bits, half * 8 + line, place * 4);
    }
  } else {
#pragma unroll
    for (int parity = 0; parity < S; ++parity) {
      uint32_t first = pack<T>(sums[parity][0], sums[parity][1]), second = pack<T>(sums[parity][2], sums[parity][3]);
      if constexpr (ChannelsInner) first = transpose_matrix(first), second = transpose_matrix(second);
      // A lane has two numbers in each half of the channels. Of two lanes, one takes the first half and one the second.
      const bool odd = place % 2 != 0;
      const uint32_t other = __shfl_xor_sync(~0u, odd ? first : second, 1);
      const uint32_t bits[2] = {odd ? other : first, odd ? second : other};
      const int half = place % 2 * 8, inner = place / 2 * 4;
      if constexpr (ChannelsInner) {
        body(bits, half + inner, line * S + parity);
      } else {
        body(bits, half + line, inner);
      }
    }
  }
}

// Writes the first `valid` of 4 numbers, `vector` at a time.
template <class T>
__device__ __forceinline__ void put_piece(T* to, const uint32_t (&bits)[2], int vector, int valid) {
  Vector<4, T> all;
  memcpy(&all, bits, sizeof all);
  if (vector == 4) {
    if (valid > 0) *reinterpret_cast<Vector<4, T>*>(to) = all;
  } else if (vector == 2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (2 * i < valid) *reinterpret_cast<Vector<2, T>*>(to + 2 * i) = {{all.v[2 * i], all.v[2 * i + 1]}};
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < valid) to[i] = all.v[i];
    }
  }
}

// One number of the gradient, computed from memory. `y` and `w` begin at its channel and group.
template <class C, class T>
__device__ __forceinline__ float gradient_at(const KernelParams& q, const T* y, const T* w, int row, int column) {
  float sum = 0;
#pragma unroll 1
  for (int tap = 0; tap < C::taps; ++tap) {
    const int h = row + q.padding_h - tap / C::K, v = column + q.padding_w - tap % C::K;
    if (h < 0 || v < 0 || h % C::Stride != 0 || v % C::Stride != 0) continue;
    const int p = h / C::Stride, r = v / C::Stride;
    if (p < q.w_height && r < q.w_width)
      sum += load(w[tap * q.w.tap + p * q.w.h + r * q.w.w]) * load(y[p * q.x.h + r * q.x.w]);
  }
  return sum;
}

// The image with the halo, q.x, is Y here, and the tiled one, q.y, is X. q.stages are those of a stripe, including the
// early ones.
template <class C, bool ChannelsInner, bool TapsInner, class T>
__global__ void __launch_bounds__(C::threads, 512 / C::threads)
    grad_input(KernelParams q, const T* __restrict__ y, const T* __restrict__ w, T* __restrict__ x) {
  constexpr int K = C::K, S = C::Stride, Rows = C::Rows;
  using W = Weights<C, TapsInner>;
  using I = Image<Rows, C::x_columns, ChannelsInner>;
  constexpr int stage_bytes = I::bytes + W::bytes;
  Tile tile = tile_of_block<C>(q);
  tile.row *= q.stages - C::early;
  const int channels = tile.groups * group_channels, first_channel = tile.first_group * group_channels;
  y += tile.n * q.x.n + int64_t(first_channel) * q.x.c;
  w += tile.n * q.w.n + int64_t(tile.first_group) * C::taps * q.w.tap;
  x += tile.n * q.y.n + int64_t(first_channel) * q.y.c;
  const int first_row = tile.row + C::first_row(q.padding_h) - C::early * Rows;
  const int first_column = tile.column + C::first_column(q.padding_w) - q.shift;
  const auto is_empty = [&](int stage) {
    const int row = first_row + stage * Rows;
    return row + Rows <= 0 || row >= q.w_height;
  };
  const auto memory_of = [](int stage) { return shared_memory() + stage % 2 * stage_bytes; };

  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int group = warp % chunk_groups, strip = warp / chunk_groups;
  const Pair pair = Pair::of_lane<C>(lane, q.shift);
  const int position = strip * 8 + lane % 4 * 2 + (pair.fragment > 0 ? 8 : 0);
  int low[S], high[S];
  uint32_t selectors[S][2];
#pragma unroll
  for (int parity = 0; parity < S; ++parity) {
    const int last = K - 1 - q.padding_w % S + parity;
    const int low_tap = last - S * pair.low, high_tap = low_tap - S;
    const bool has_low = pair.has_low<C::slots>() && low_tap >= 0 && low_tap < K;
    const bool has_high = pair.has_high<C::slots>() && high_tap >= 0 && high_tap < K;
    const uint32_t selector = tap_selector(has_low, has_high);
#pragma unroll
    for (int f = 0; f < 2; ++f) selectors[parity][f] = kept(int(pair.fragment == f ? selector : no_taps));
    low[parity] = I::bytes + W::at(0, position, group * C::taps + min(max(low_tap, 0), K - 1)) +
                  first_tap_in_piece(q, w, first_column + position);
    high[parity] = I::bytes + W::at(0, position + 1, group * C::taps + min(max(high_tap, 0), K - 1)) +
                   first_tap_in_piece(q, w, first_column + position + 1);
  }

  float sums[C::open_rows * S][4] = {};
#pragma unroll 1
  for (int stage = -1; stage < q.stages; ++stage) {
    wait_for_tile();
    if (stage + 1 < q.stages && !is_empty(stage + 1)) {
      char* image = memory_of(stage + 1);
      const int row = first_row + (stage + 1) * Rows;
      bring_image<I, C::Warps>(image, y, q.x, channels, q.x_height, q.x_width, row, first_column);
      bring_weights<C, W>(image + I::bytes, w, q, tile.groups, row, first_column);
    }
    if (stage < 0 || group >= tile.groups) continue;

    if (!is_empty(stage)) {
      const char* image = memory_of(stage);
      const Positions<C, I> positions(image, group, strip, 0, lane);
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        uint32_t a[4], none[2];
        positions.template load<true>(a, none, r);
#pragma unroll
        for (int parity = 0; parity < S; ++parity) {
#pragma unroll
          for (int kh = 0; kh < K; ++kh) {
            const int at = W::at(r, 0, kh * K);
            const uint32_t low_tap = bits_at(image + low[parity] + at), high_tap = bits_at(image + high[parity] + at);
            multiply<T>(sums[(r * S + kh) * S + parity], a,
                        {__byte_perm(low_tap, high_tap, selectors[parity][0]),
                         __byte_perm(low_tap, high_tap, selectors[parity][1])});
          }
        }
      }
    }

    if (stage >= C::early) {
      const int row = S * (tile.row + (stage - C::early) * Rows) - q.padding_h % S;
      const int column = S * (tile.column + strip * 8), channel = group * group_channels;
      if (all_finite<C::done_rows * S>(sums)) {
        const auto put = [&](auto channels_inner) {
          const int width = q.y_width - column, vector = min(q.y.vector, 4);
#pragma unroll
          for (int j = 0; j < C::done_rows; ++j) {
            for_each_piece<S, channels_inner.value, T>(
                sums + j * S, lane, [&](const uint32_t (&bits)[2], int piece_channel, int first) {
                  if (row + j < 0 || row + j >= q.y_height) return;
                  const int valid = channels_inner.value ? (first < width ? 4 : 0) : width - first;
                  put_piece(x + ((row + j) * q.y.h + (column + first) * q.y.w + (channel + piece_channel) * q.y.c),
                            bits, vector, valid);
                });
          }
        };
        if (q.y.channels_inner) {
          put(std::true_type{});
        } else {
          put(std::false_type{});
        }
      } else {
#pragma unroll 1
        for (int i = lane; i < C::done_rows * 8 * S * group_channels; i += 32) {
          const int c = channel + i % group_channels, v = column + i / group_channels % (8 * S);
          const int h = row + i / group_channels / (8 * S);
          if (h < 0 || h >= q.y_height || v >= q.y_width) continue;
          const float sum = gradient_at<C>(q, y + c * q.x.c, w + group * C::taps * q.w.tap, h, v);
          store(sum, x + (h * q.y.h + v * q.y.w + c * q.y.c));
        }
      }
    }

#pragma unroll
    for (int j = 0; j < C::open_rows * S; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[j][i] = j + C::done_rows * S < C::open_rows * S ? sums[j + C::done_rows * S][i] : 0.0f;
    }
  }
}

}  // namespace pyinvolution::cuda::mma
