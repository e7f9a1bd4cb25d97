// The involution with weights that never leave the SM, forward: half and bfloat16, channels_last, kernels of 7 x 7,
// stride S, dilation 1, 16 channels a group.
//
//   W[n,g,k,p] = b[49 g + k] + sum over r of S[49 g + k, r] * R[n,r,p]
//   Y[n,c,p]   = sum over taps k of W[n,g(c),k,p] * X[n,c, S*p + k - padding]
//   Z[n,c,p]   = max(0, scale[c] * Y[n,c,p] + shift[c])     where there is an epilogue
//
// X is N,C,H,W; R is N,R,Ho,Wo; S is 49 G,R; Y is N,C,Ho,Wo. Blocks, tiles and warps are those of `mma`: 4 groups, a
// warp for each group of 4 rows of 8 pixels. X with its halo, the R channels of the tile's pixels and the rows of S of
// the groups lie in shared memory.
//
// For a kernel row the warp computes the weights of 2 x 8 pixels, [16 pixels x 8 taps] = R [16 x R] * S^T [R x 8]; the
// eighth tap does not exist. A lane then has two taps of a pixel in each of two rows. The band (../band.cuh) needs
// another pair of the same pixel, which two shuffles among the 4 lanes of the pixel bring (with stride 2 the pair is
// whole and one shuffle is enough). The weights are rounded to the storage type, as a convolution would write them. A
// row of X serves 4 rows of Y. Where a sum is not finite, the warp computes weights and sums again, one by one.
//
// Limits, bytes: x, R/C of x, y once: 2.25 elements a channel and pixel with R = C/4, where `mma` and the convolution
// before it move 5.06 + 3.06 + 0.25. Shared memory is next: for 4 rows of 8 pixels of a group, with stride 1 and R =
// 16, 30 ldmatrix of 4 cycles and 56 loads, and 14 and 28 more for each 16 more reduced channels. So the composition is
// better with many reduced channels and with few pixels, whose W stays in the L2 cache.
#pragma once

#include "span.cuh"

namespace pyinvolution::cuda::fused {

template <class C, class T>
__global__ void __launch_bounds__(C::threads, 2)
    forward(KernelParams q, Span span, const T* __restrict__ x, const T* __restrict__ reduced,
            const T* __restrict__ weight, const T* __restrict__ bias, const float* __restrict__ scale,
            const float* __restrict__ shift, T* __restrict__ y) {
  constexpr int S = C::S, rows = 4;
  using I = Image<C::x_rows, C::x_columns, true>;
  static_assert(C::K == K && C::Warps == chunk_groups * C::strips * (C::Rows / rows), "");
  const int pitch = span.pitch();
  char* image = shared_memory();
  float* biases = reinterpret_cast<float*>(image + I::bytes);
  char* span_rows = image + I::bytes + Shared<C>::bias_bytes;
  char* pixels = span_rows + Shared<C>::all_taps * pitch;
  const Tile tile = tile_of_block<C>(q);
  const int channels = tile.groups * group_channels, first_channel = tile.first_group * group_channels;
  const int first_tap = tile.first_group * taps;

  bring_image<I, C::Warps>(image, x + (tile.n * q.x.n + int64_t(first_channel)), q.x, channels, q.x_height, q.x_width,
                           tile.row * S - q.padding_h, tile.column * S - q.padding_w);
  bring_rows<C::Warps>(span_rows, pitch, weight + int64_t(first_tap) * span.row, tile.groups * taps, span.reduced,
                       span.row_vector, [&](int i) { return i * span.row; });
  bring_rows<C::Warps>(pixels, pitch, reduced + tile.n * span.reduced_n, Shared<C>::pixels, span.reduced,
                       span.reduced_vector, [&](int i) {
                         const int h = tile.row + i / C::Columns, v = tile.column + i % C::Columns;
                         return h < q.y_height && v < q.y_width ? h * span.reduced_h + v * span.reduced_w : -1;
                       });
  for (int i = int(threadIdx.x); i < tile.groups * taps; i += C::threads)
    biases[i] = bias != nullptr ? load(bias[first_tap + i]) : 0.0f;
  wait_for_tile();

  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int group = warp % chunk_groups, strip = warp / chunk_groups % C::strips;
  const int row = warp / chunk_groups / C::strips * rows;
  float sums[rows][4] = {};
  if (group < tile.groups) {
    const int pixel = lane / 4, t = lane % 4, matrix = lane / 8, i = lane % 8;
    const Pair pair = Pair::of_lane<C>(lane, 0);
    const uint32_t mask = pair.mask<K>();
    uint32_t masks[C::fragments];
#pragma unroll
    for (int f = 0; f < C::fragments; ++f) masks[f] = pair.fragment == f ? mask : 0;
    // Which lanes of the pixel have the taps of the pair, and how they are put together.
    const bool odd = S == 1 && pixel % 2 == 1;
    const int high_lane = (lane & ~3) | ((pair.low + 1) / 2 & 3);
    const int low_lane = odd ? (lane & ~3) | ((pair.low - 1) / 2 & 3) : high_lane;
    const uint32_t halves = odd ? 0x1054 : 0x5410;  // of the first row, those of the second are two bytes on

    const char* pixel_rows = pixels + ((row + matrix % 2) * C::Columns + strip * 8 + i) * pitch + matrix / 2 * 16;
    // The eighth tap repeats the seventh; the masks leave it out.
    const char* tap_rows = span_rows + (group * taps + min(pixel, K - 1)) * pitch + t * 4;
    const float* tap_biases = biases + group * taps + 2 * t;
    const Positions<C, I> positions(image, group, strip, row * S, lane);
    uint32_t a[(rows - 1) * S + K][4], a_last[(rows - 1) * S + K][2];
#pragma unroll
    for (int kh = 0; kh < K; ++kh) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {  // one pair of rows after the other: both at once would need more registers
        float w[4];
        w[0] = w[2] = tap_biases[kh * K];
        w[1] = w[3] = tap_biases[kh * K + 1];
#pragma unroll 1
        for (int c = 0; c < span.reduced; c += 16) {
          const char* operand = tap_rows + kh * K * pitch + c * 2;
          const uint32_t b[2] = {*reinterpret_cast<const uint32_t*>(operand),
                                 *reinterpret_cast<const uint32_t*>(operand + 16)};
          uint32_t a_reduced[4];
          load_matrices(a_reduced, pixel_rows + 2 * j * C::Columns * pitch + c * 2);
          multiply<T>(w, a_reduced, b);
        }
        uint32_t band[2];
        if constexpr (S == 1) {
          const uint32_t even_taps = __shfl_sync(~0u, pack<T>(w[0], w[2]), high_lane);
          const uint32_t odd_taps = __shfl_sync(~0u, pack<T>(w[1], w[3]), low_lane);
          band[0] = __byte_perm(even_taps, odd_taps, halves);
          band[1] = __byte_perm(even_taps, odd_taps, halves + 0x2222);
        } else {
          band[0] = __shfl_sync(~0u, pack<T>(w[0], w[1]), low_lane);
          band[1] = __shfl_sync(~0u, pack<T>(w[2], w[3]), low_lane);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int r = 2 * j + half, x_row = r * S + kh;
          // With stride 1 two rows of X stay in registers for the next kernel row; there is no room for a third.
          if (S > 1 || kh == 0 || r >= rows - 2) positions.template load<true>(a[x_row], a_last[x_row], x_row);
          const uint32_t b[2] = {band[half] & masks[0], band[half] & masks[1]};
          multiply<T>(sums[r], a[x_row], b);
          if constexpr (C::fragments > 2) {
            const uint32_t b_last[1] = {band[half] & masks[2]};
            multiply<T>(sums[r], a_last[x_row], b_last);
          }
        }
      }
    }

    if (!all_finite(sums)) {
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        float again[4] = {};
#pragma unroll 1
        for (int tap = 0; tap < taps; ++tap) {
          const char* span_row = span_rows + (group * taps + tap) * pitch;
#pragma unroll
          for (int side = 0; side < 2; ++side) {
            const int v = strip * 8 + t * 2 + side;
            const float factor = weight_of<T>(pixels + ((row + r) * C::Columns + v) * pitch, span_row,
                                              biases[group * taps + tap], span.reduced);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int channel = group * group_channels + pixel + half * 8;
              again[2 * half + side] +=
                  factor *
                  load(*reinterpret_cast<const T*>(image + I::at((row + r) * S + tap / K, v * S + tap % K, channel)));
            }
          }
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) sums[r][n] = again[n];
      }
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int channel = first_channel + group * group_channels + pixel + half * 8;
      const float factor = span.epilogue ? scale[channel] : 1.0f, offset = span.epilogue ? shift[channel] : 0.0f;
#pragma unroll
      for (int r = 0; r < rows; ++r) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          float& sum = sums[r][2 * half + side];
          if (span.epilogue) sum = sum * factor + offset;
          if (span.relu && sum < 0.0f) sum = 0.0f;  // a NaN stays a NaN
        }
      }
    }
  }
  put_sums<C, Image<C::Rows, C::Columns, true>>(image, sums, y + (tile.n * q.y.n + int64_t(first_channel)), q, tile,
                                                group, strip, row);
}

}  // namespace pyinvolution::cuda::fused
