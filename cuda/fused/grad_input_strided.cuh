// The gradient of the input of the fused involution with stride 2; the problems are those of grad_input.cuh.
//
//   W[n,g,k,p] = b[49 g + k] + sum over r of S[49 g + k, r] * R[n,r,p]
//   dX[n,c,q]  = sum over taps k, 2p + k - padding = q, of W[n,g(c),k,p] * G[n,c,p]
//
// A warp has 8 columns of dX of one group and walks down the rows of G. For a row of G it makes the weights of the 8
// pixels that lead to its columns, [8 taps x 8 pixels] = S * R^T for each kernel row, which lie across the lanes as taps
// and pairs of pixels. The band [pixels x 8 columns] wants, in a lane, the same pixels at other taps: two shuffles bring
// them. Each kernel row adds to another row of dX; those that later rows of G add to stay in registers, so that each
// weight is made once per block of columns and nothing is added atomically. G and R come row by row through a ring in
// shared memory. A row of dX that is not finite is computed again tap by tap.
#pragma once

#include "span.cuh"

namespace pyinvolution::cuda::fused {

// Fills row `slot` of the ring from row h of G and of R, with zeros outside the image.
template <class T>
__device__ __forceinline__ void bring_row(char* ring, char* pixels, const WalkParams& q, const Span& span, const T* y,
                                          const T* reduced, int slot, int h, int first, int channels) {
  using C = StridedWalk;
  const int thread = opaque(int(threadIdx.x));
  const bool inside = h >= 0 && h < q.out_height;
  if (thread < C::pixels * 8) {
    const int column = thread / 8, channel = thread % 8 * 8, v = first + column;
    if (channel < channels)
      copy_piece(ring + C::Ring::at(slot, column, channel), y + (h * q.y.h + v * q.y.w + channel),
                 inside && v >= 0 && v < q.out_width, q.y.vector);
  }
  const int channel = thread % 16 * 8;
  if (channel < span.reduced) {
    for (int column = thread / 16; column < C::pixels; column += C::threads / 16) {
      const int v = first + column;
      copy_piece(pixels + (slot * C::pixels + column) * span.pitch() + channel * 2,
                 reduced + (h * span.reduced_h + v * span.reduced_w + channel), inside && v >= 0 && v < q.out_width,
                 span.reduced_vector);
    }
  }
}

// With Held there are 16 reduced channels, and most span weights of the group stay in registers.
template <bool Held, class T>
__global__ void __launch_bounds__(StridedWalk::threads, 2)
    grad_input_strided(WalkParams q, Span span, const T* __restrict__ y, const T* __restrict__ reduced,
                       const T* __restrict__ weight, const T* __restrict__ bias, T* __restrict__ x) {
  using C = StridedWalk;
  constexpr int S = C::S, kernel_pairs = (K + 1) / 2;
  const int pitch = span.pitch();
  char* ring = shared_memory();
  char* pixels = ring + C::Ring::bytes;
  char* span_rows = pixels + C::depth * C::pixels * pitch;

  uint32_t block = blockIdx.x;
  const int first_group = q.by_chunks.split(block) * chunk_groups;
  const int first_column = q.by_columns.split(block) * 8 * C::strips;
  const int first_row = q.by_segments.split(block) * q.rows;
  const int64_t n = block;
  const int last_row = min(first_row + q.rows, q.height), groups = min(chunk_groups, q.groups - first_group);
  const int channels = groups * group_channels, first_tap = first_group * taps;
  y += n * q.y.n + first_group * group_channels;
  x += n * q.x.n + first_group * group_channels;
  reduced += n * span.reduced_n;

  // Rounded down: a row of G that leads to no row of this segment costs little. The first row of dX that row h leads to
  // is S*h - padding; the tap of column `first_column` at the first pixel is 6 or 7.
  const int before = q.padding_h - (K - 1);
  const int first_h = (first_row + before + 8 * S) / S - 8;
  const int first_pixel = (first_column + q.padding_w) / 2 - 3;
  const auto bring = [&](int h) {
    bring_row(ring, pixels, q, span, y, reduced, (h - first_h) % C::depth, h, first_pixel, channels);
    commit_copies();
  };
  bring_rows<C::warps>(span_rows, pitch, weight + int64_t(first_tap) * span.row, groups * taps, span.reduced,
                       span.row_vector, [&](int i) { return i * span.row; });
#pragma unroll 1
  for (int h = first_h; h < first_h + C::depth - 1; ++h) bring(h);

  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, group = warp % chunk_groups;
  const int strip = warp / chunk_groups, row = lane / 4, t = lane % 4, matrix = lane / 8, i = lane % 8;
  const int first_q = first_column + strip * 8;
  const bool works = group < groups && first_q < q.width;
  // The tap of column `row` at the lane's first pixel. At the second pixel it is S less.
  const int tap = K - 1 + (first_column + q.padding_w) % 2 + row - 2 * S * t;
  const auto is_tap = [](int k) { return k >= 0 && k < K; };
  const uint32_t mask = (is_tap(tap) ? 0xffffu : 0) | (is_tap(tap - S) ? 0xffff0000u : 0);
  const int low_lane = (tap & 7) * 4 + t, high_lane = ((tap - S) & 7) * 4 + t;

  // Pairs of kernel rows with 8 taps each. Taps that do not exist repeat others, and the masks leave them out.
  Vector<2, T> biases[kernel_pairs];
#pragma unroll
  for (int kh = 0; kh < 2 * kernel_pairs; ++kh) {
    T& own = biases[kh / 2].v[kh % 2];
    store(0.0f, &own);
    if (works && bias != nullptr) own = bias[first_tap + group * taps + min(kh, K - 1) * K + min(row, K - 1)];
  }
  const char* tap_rows = span_rows + (works ? group : 0) * taps * pitch + matrix / 2 * 16;
  int tap_offsets[kernel_pairs];
#pragma unroll
  for (int pair = 0; pair < kernel_pairs; ++pair)
    tap_offsets[pair] = (min(2 * pair + matrix % 2, K - 1) * K + min(i, K - 1)) * pitch;
  const int pixel_offset = (strip * 4 + i) * pitch + matrix % 2 * 16;
  const int ring_offset = C::Ring::at(0, strip * 4 + i, (works ? group : 0) * group_channels + matrix % 2 * 8);
  constexpr int ring_row = C::pixels * C::Ring::pitch;
  constexpr int held_pairs = kernel_pairs - 1;  // as many as there are registers for
  uint32_t held[held_pairs][4] = {};

  float live[C::live][4] = {};
#pragma unroll 1
  for (int h = first_h; S * h - q.padding_h < last_row; ++h) {
    wait_for_copies<C::depth - 2>();
    __syncthreads();
    bring(h + C::depth - 1);
    if (!works) continue;
    if (Held && h == first_h) {
#pragma unroll
      for (int pair = 0; pair < held_pairs; ++pair) load_matrices(held[pair], tap_rows + tap_offsets[pair]);
    }
    float sums[K][4];
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[k][e] = k < C::live ? live[k][e] : 0.0f;
    }
    if (h >= 0 && h < q.out_height) {
      const int slot = (h - first_h) % C::depth;
      float w[kernel_pairs][4];
      const auto begin = [&](int pair) {
#pragma unroll
        for (int e = 0; e < 4; ++e) w[pair][e] = load(biases[pair].v[e / 2]);
      };
      const auto add = [&](int pair, const uint32_t (&a)[4], const uint32_t (&r)[2]) { multiply<T>(w[pair], a, r); };
      const char* pixel_row = pixels + slot * C::pixels * pitch + pixel_offset;
      uint32_t r[2];
      if constexpr (Held) {  // made pair by pair below
        load_matrices(r, pixel_row);
        begin(0), add(0, held[0], r);
      } else {
#pragma unroll
        for (int pair = 0; pair < kernel_pairs; ++pair) begin(pair);
#pragma unroll 1
        for (int c = 0; c < span.reduced; c += 16) {
          load_matrices(r, pixel_row + c * 2);
#pragma unroll
          for (int pair = 0; pair < kernel_pairs; ++pair) {
            uint32_t a[4];
            load_matrices(a, tap_rows + tap_offsets[pair] + c * 2);
            add(pair, a, r);
          }
        }
      }
      uint32_t g[2];
      load_matrices_transposed(g, ring + slot * ring_row + ring_offset);
#pragma unroll
      for (int pair = 0; pair < kernel_pairs; ++pair) {
        if (Held && pair + 1 < held_pairs) {
          begin(pair + 1), add(pair + 1, held[pair + 1], r);
        } else if (Held && pair + 1 < kernel_pairs) {
          uint32_t a[4];
          load_matrices(a, tap_rows + tap_offsets[pair + 1]);
          begin(pair + 1), add(pair + 1, a, r);
        }
        // A register has the same pixel of both kernel rows.
        const uint32_t low = __shfl_sync(~0u, pack<T>(w[pair][0], w[pair][2]), low_lane);
        const uint32_t high = __shfl_sync(~0u, pack<T>(w[pair][1], w[pair][3]), high_lane);
        multiply<T>(sums[2 * pair], g, {__byte_perm(low, high, 0x5410) & mask});
        if (2 * pair + 1 < K) multiply<T>(sums[2 * pair + 1], g, {__byte_perm(low, high, 0x7632) & mask});
      }
    }
#pragma unroll
    for (int k = 0; k < C::live; ++k) {
#pragma unroll
      for (int e = 0; e < 4; ++e) live[k][e] = sums[k + S][e];
    }

#pragma unroll
    for (int done = 0; done < S; ++done) {
      const int q_row = S * h - q.padding_h + done;
      if (q_row < first_row || q_row >= last_row) continue;
      float (&sum)[4] = sums[done];
      if (__any_sync(~0u, sum[0] * 0.0f + sum[1] * 0.0f + sum[2] * 0.0f + sum[3] * 0.0f != 0.0f)) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const int q_column = first_q + 2 * t + side;
          float again[2] = {};
#pragma unroll 1
          for (int k = 0; k < taps; ++k) {
            const int from_h = q_row + q.padding_h - k / K, from_v = q_column + q.padding_w - k % K;
            if (from_h < 0 || from_v < 0 || from_h % S != 0 || from_v % S != 0 || from_h / S >= q.out_height ||
                from_v / S >= q.out_width)
              continue;
            const T* r = reduced + (from_h / S * span.reduced_h + from_v / S * span.reduced_w);
            const T* gradient = y + (from_h / S * q.y.h + from_v / S * q.y.w + group * group_channels + row);
            const float factor =
                weight_of<T>(reinterpret_cast<const char*>(r), span_rows + (group * taps + k) * pitch,
                             bias != nullptr ? load(bias[first_tap + group * taps + k]) : 0.0f, span.reduced);
            again[0] += factor * load(gradient[0]);
            again[1] += factor * load(gradient[8]);
          }
          sum[side] = again[0], sum[2 + side] = again[1];
        }
      }
      const int q_column = first_q + row;
      put_channels(x + (q_row * q.x.h + q_column * q.x.w + group * group_channels), q_column < q.width, q.x.vector,
                   transpose_matrix(pack<T>(sum[0], sum[1])), transpose_matrix(pack<T>(sum[2], sum[3])));
    }
  }
  wait_for_copies<0>();
}

}  // namespace pyinvolution::cuda::fused
