// The gradient of the weights, on tensor cores; the problems and tiles are those of forward.cuh.
//
//   W[n,g,k,p] = sum over c of group g of Y[n,c,p] * X[n,c, S*p + k - padding]
//
// W is the gradient, Y is grad_output. For 2 rows of 8 pixels and a row of X, D[16 pixels x 8*(S+1) positions] = Y * X
// over the 16 channels; each lane takes from it the pair of taps that it has in the band (../band.cuh). No product is
// beside a kernel.
#pragma once

#include "config.cuh"

namespace pyinvolution::cuda::mma {

template <class C, bool ChannelsInner, bool TapsInner, class T>
__global__ void __launch_bounds__(C::threads, 2)
    grad_weight(KernelParams q, const T* __restrict__ x, T* __restrict__ w, const T* __restrict__ y) {
  constexpr int K = C::K, S = C::S, units = C::strips * (C::Rows / 2), step = C::Warps / chunk_groups;
  using W = Weights<C, TapsInner>;
  using I = Image<C::x_rows, C::x_columns, ChannelsInner>;
  using ChannelsInside = Image<C::Rows, C::Columns, true>;
  using ColumnsInside = Image<C::Rows, C::Columns, false>;
  char* weights = shared_memory();
  char* image = weights + W::bytes;
  char* gradient = image + I::bytes;
  const Tile tile = tile_of_block<C>(q);
  const int channels = tile.groups * group_channels, first_channel = tile.first_group * group_channels;

  bring_image<I, C::Warps>(image, x + (tile.n * q.x.n + int64_t(first_channel) * q.x.c), q.x, channels, q.x_height,
                           q.x_width, tile.row * S - q.padding_h, tile.column * S - q.padding_w - q.shift);
  const T* gradients = y + (tile.n * q.y.n + int64_t(first_channel) * q.y.c);
  if (q.y.channels_inner) {
    bring_image<ChannelsInside, C::Warps>(gradient, gradients, q.y, channels, q.y_height, q.y_width, tile.row,
                                          tile.column);
  } else {
    bring_image<ColumnsInside, C::Warps>(gradient, gradients, q.y, channels, q.y_height, q.y_width, tile.row,
                                         tile.column);
  }
  wait_for_tile();

  const int lane = kept(int(threadIdx.x % 32)), warp = int(threadIdx.x / 32), group = warp % chunk_groups;
  if (group < tile.groups) {
    const Pair pair = Pair::of_lane<C>(lane, q.shift);
    const bool has_low = pair.has_low<K>(), has_high = pair.has_high<K>();
    const int taps = group * C::taps, matrix = lane / 8, i = lane % 8;
#pragma unroll 1
    for (int unit = warp / chunk_groups; unit < units; unit += step) {
      const int strip = unit % C::strips, row = unit / C::strips * 2;
      uint32_t a[4];  // [16 pixels][16 channels]
      const int channel = group * group_channels + matrix / 2 * 8;
      if (q.y.channels_inner) {
        load_matrices(a, gradient + ChannelsInside::at(row + matrix % 2, strip * 8 + i, channel));
      } else {
        load_matrices_transposed(a, gradient + ColumnsInside::at(row + matrix % 2, strip * 8, channel + i));
      }
      const Positions<C, I> positions(image, group, strip, row * S, lane);
      char* low = weights + W::at(row, strip * 8 + lane / 4, taps + max(pair.low, 0));
      char* high = weights + W::at(row, strip * 8 + lane / 4, taps + pair.low + 1);
#pragma unroll
      for (int x_row = 0; x_row < S + K; ++x_row) {
        uint32_t b[4], b_last[2];
        positions.template load<false>(b, b_last, x_row);
        float d[C::fragments][4] = {};
        multiply<T>(d[0], a, {b[0], b[1]});
        multiply<T>(d[1], a, {b[2], b[3]});
        if constexpr (C::fragments > 2) multiply<T>(d[2], a, b_last);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int kh = x_row - r * S;
          if (kh < 0 || kh >= K) continue;
          float first = d[0][2 * r], second = d[0][2 * r + 1];
#pragma unroll
          for (int f = 1; f < C::fragments; ++f) {
            if (pair.fragment == f) first = d[f][2 * r], second = d[f][2 * r + 1];
          }
          const int at = W::at(r, 0, kh * K);
          if (has_low) store(first, reinterpret_cast<T*>(low + at));
          if (has_high) store(second, reinterpret_cast<T*>(high + at));
        }
      }
    }
  }
  __syncthreads();
  T* out = w + (tile.n * q.w.n + int64_t(tile.first_group) * C::taps * q.w.tap);
  with_vector<false>(q.w.vector, [&](auto v) {
    for_each_line<C, W, v.value>(
        q, tile.groups, tile.row, tile.column, C::w_rows,
        [&](int from, int step, const Line& line) { put_line<v.value>(weights + from, step, out, line); });
  });
}

}  // namespace pyinvolution::cuda::mma
