// Involution on tensor cores: half and bfloat16, square kernels of K x K taps, stride S, dilation 1, 16 channels a
// group.
//
//   Y[n,c,p] = sum over taps k of W[n,g(c),k,p] * X[n,c, S*p + k - padding]
//
// X is N,C,H,W; W is N,G,K,K,Ho,Wo; Y is N,C,Ho,Wo. A block has a tile of Rows x Columns pixels of Y and a chunk of up
// to 4 groups; X below it with its halo and zeros outside the image, W and Y lie in shared memory as they are stored.
// Rows and strips outside the image are neither brought nor computed.
//
// A kernel row of 8 pixels of a group is one or two HMMA with the weights as a band (../band.cuh). X goes through
// ldmatrix and serves 4 rows of Y. A warp owns one group of one strip of 4 rows. The zeros of the band make NaN of an
// Inf beside a pixel's kernel. So where a sum is not finite, the warp computes it again tap by tap.
//
// 8 threads bring the 64 channels of a column of X, and as many threads as the taps have pieces of 16 bytes a column of
// W, each all rows of its piece; which rows are in the tensor is one word of bits. With K = 7, what a thread does once,
// its addresses and bounds, is more than half of a tile's instructions; products and their operands are less than a
// third.
//
// Limit: memory, for x, w and y once; cuda/README.md has what a tile costs. `tiled` is bound by shared memory: it keeps
// 4 bytes a number and issues an FMA for each 32 products, an HMMA makes 2048 (896 of them inside a kernel).
#pragma once

#include "config.cuh"

namespace pyinvolution::cuda::mma {

// Of the small tiles with a stride of 1, three fit on a multiprocessor.
template <class C, bool ChannelsInner, bool TapsInner, class T>
__global__ void __launch_bounds__(C::threads, C::S == 1 && C::threads == 256 ? 3 : 2)
    forward(KernelParams q, const T* __restrict__ x, const T* __restrict__ w, T* __restrict__ y) {
  constexpr int K = C::K, S = C::S, rows = 4;
  using W = Weights<C, TapsInner>;
  using I = Image<C::x_rows, C::x_columns, ChannelsInner>;
  static_assert(C::Warps == chunk_groups * C::strips * (C::Rows / rows),
                "a warp for each group and four rows of a strip");
  char* weights = shared_memory();
  char* image = weights + W::bytes;
  const Tile tile = tile_of_block<C>(q);
  const int channels = tile.groups * group_channels, first_channel = tile.first_group * group_channels;

  // Rows and columns of warps that have a pixel of the image.
  const int rows_inside = min(C::Rows, int(unsigned(q.y_height - tile.row + rows - 1) / rows * rows));
  const int columns_inside = min(C::Columns, int(unsigned(q.y_width - tile.column + 7) / 8 * 8));
  bring_image<I, C::Warps, rows * S>(image, x + (tile.n * q.x.n + int64_t(first_channel) * q.x.c), q.x, channels,
                                     q.x_height, q.x_width, tile.row * S - q.padding_h,
                                     tile.column * S - q.padding_w - q.shift, (rows_inside - 1) * S + K,
                                     columns_inside * S + 8);
  const T* group_weights = w + (tile.n * q.w.n + int64_t(tile.first_group) * C::taps * q.w.tap);
  bring_weights<C, W, rows>(weights, group_weights, q, tile.groups, tile.row, tile.column, rows_inside, columns_inside);
  wait_for_tile();

  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  const int group = warp % chunk_groups, strip = warp / chunk_groups % C::strips;
  const int row = warp / (chunk_groups * C::strips) * rows;
  const bool works = group < tile.groups && row < rows_inside && strip * 8 < columns_inside;
  float sums[rows][4] = {};
  if (works) {
    const Pair pair = Pair::of_lane<C>(lane, q.shift);
    const uint32_t selector = tap_selector(pair.has_low<K>(), pair.has_high<K>());
    uint32_t selectors[C::fragments];
#pragma unroll
    for (int f = 0; f < C::fragments; ++f) selectors[f] = pair.fragment == f ? selector : no_taps;
    const int column = strip * 8 + lane / 4, taps = group * C::taps;
    const int begin = W::at(row, column, taps) + first_tap_in_piece(q, group_weights, tile.column + column);
    const char* low = weights + begin + W::at(0, 0, min(max(pair.low, 0), K - 1));
    const char* high = weights + begin + W::at(0, 0, min(pair.low + 1, K - 1));
    const Positions<C, I> positions(image, group, strip, row * S, lane);
#pragma unroll
    for (int x_row = 0; x_row < (rows - 1) * S + K; ++x_row) {
      uint32_t a[4], a_last[2];
      positions.template load<true>(a, a_last, x_row);
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        const int kh = x_row - r * S;
        if (kh < 0 || kh >= K) continue;
        const int at = W::at(r, 0, kh * K);
        const uint32_t low_tap = bits_at(low + at), high_tap = bits_at(high + at);
        multiply<T>(sums[r], a,
                    {__byte_perm(low_tap, high_tap, selectors[0]), __byte_perm(low_tap, high_tap, selectors[1])});
        if constexpr (C::fragments > 2)
          multiply<T, 2, 1>(sums[r], a_last, {__byte_perm(low_tap, high_tap, selectors[C::fragments - 1])});
      }
    }

    if (!all_finite(sums)) {
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        float again[4] = {};
#pragma unroll 1
        for (int tap = 0; tap < C::taps; ++tap) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int channel = group * group_channels + lane / 4 + i / 2 * 8, v = strip * 8 + lane % 4 * 2 + i % 2;
            const int x_row = (row + r) * S + tap / K, position = v * S + tap % K + q.shift;
            const int begin = first_tap_in_piece(q, group_weights, tile.column + v);
            again[i] += load(*reinterpret_cast<const T*>(weights + begin + W::at(row + r, v, taps + tap))) *
                        load(*reinterpret_cast<const T*>(image + I::at(x_row, position, channel)));
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[r][i] = again[i];
      }
    }
  }

  T* out = y + (tile.n * q.y.n + int64_t(first_channel) * q.y.c);
  if (q.y.channels_inner) {
    put_sums<C, Image<C::Rows, C::Columns, true>>(image, sums, out, q, tile, group, strip, row, works);
  } else {
    put_sums<C, Image<C::Rows, C::Columns, false>>(image, sums, out, q, tile, group, strip, row, works);
  }
}

}  // namespace pyinvolution::cuda::mma
