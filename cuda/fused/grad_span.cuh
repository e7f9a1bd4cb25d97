// The gradients of the reduced channels R, the span weights S and the bias b of the fused involution: half and
// bfloat16, channels_last, kernels of 7 x 7, stride S, dilation 1, 16 channels a group. G is grad_output; dW does not
// exist in memory.
//
//   dW[n,g,k,p]  = sum over c of group g of G[n,c,p] * X[n,c, S*p + k - padding]
//   dR[n,r,p]    = sum over g, k of S[49 g + k, r] * dW[n,g,k,p]
//   dS[49 g + k,r] = sum over n, p of dW[n,g,k,p] * R[n,r,p],   db = sum over n, p of dW
//
// A block has a run of tiles of 8 x 8 pixels (stride 2: 4 x 8) and goes through them once for each chunk of 4 groups.
// For a tile, dW is [16 pixels x 8*(S+1) positions] = G * X over a group's channels, from which each lane takes its own
// pair of taps; in shared memory, rounded to the storage type as a convolution's gradient would be, it is the operand
// of dR, summed over the groups of a chunk there and over the chunks in `scratch` by the thread that owns it, and of
// dS, summed over the run in registers. A block leaves partial sums of dS and db, which `sum_partials` adds in
// order; how many there are, and so the last bits, depends on the number of multiprocessors.
#pragma once

#include "span.cuh"

namespace pyinvolution::cuda::fused {

// `width` of Part channels of `rows` rows into shared memory, zeros beyond them; `at` as for bring_rows.
template <int Threads, int Part, class T, class At>
__device__ __forceinline__ void bring_part(char* shared, const T* memory, int rows, int width, int vector,
                                           const At& at) {
  with_vector<true>(vector, [&](auto v) {
    constexpr int V = v.value, pieces = Part / V;
#pragma unroll 1
    for (int i = opaque(int(threadIdx.x)); i < rows * pieces; i += Threads) {
      const int row = i / pieces, channel = i % pieces * V, from = at(row);
      const bool valid = from >= 0 && channel < width;
      char* to = shared + row * (Part * 2 + 16) + channel * 2;
      if constexpr (V > 1) {
        copy_async<V * sizeof(T)>(to, memory + (valid ? from + channel : 0), valid);
      } else {
        T value;
        store(0.0f, &value);
        if (valid) value = memory[from + channel];
        *reinterpret_cast<T*>(to) = value;
      }
    }
  });
}

// A thread's place, computed again in each phase of a kernel that has no registers to keep it in.
struct Place {
  int thread, lane, warp, group, side, quad, t, matrix, i;

  static __device__ __forceinline__ Place here() {
    const int thread = opaque(int(threadIdx.x)), lane = thread % 32, warp = thread / 32;
    return {thread, lane, warp, warp % chunk_groups, warp / chunk_groups, lane / 4, lane % 4, lane / 8, lane % 8};
  }
};

template <class C, class T>
__global__ void __launch_bounds__(C::threads, 2)
    grad_span(KernelParams q, Span span, Partial partial, const T* __restrict__ x, const T* __restrict__ reduced,
              const T* __restrict__ weight, const T* __restrict__ y, T* __restrict__ grad_reduced) {
  constexpr int S = C::S, Tiles = C::Tiles;
  using X = typename C::Input;
  using Y = typename C::Output;
  char* image = shared_memory();
  char* gradients = image + C::gradients;
  char* pixels = image + C::reduced;
  char* span_rows = image + C::rows;
  // With one or two tiles a block has all the reduced channels.
  const int parts = Tiles > 2 ? partial.parts : 1, stripe = int(blockIdx.x) / parts;
  const int first_reduced = int(blockIdx.x) % parts * C::part;
  const int width = Tiles > 2 ? min(C::part, span.reduced - first_reduced) : C::part;
  const int first_tile = int(int64_t{partial.tiles} * stripe / partial.stripes);
  const int last_tile = int(int64_t{partial.tiles} * (stripe + 1) / partial.stripes);
  // How the warps share the work, and what one of them has:
  // dW: half of the rows of a group.
  constexpr int pairs = C::Rows / 4;
  // dR: 16 pixels and some tiles of channels, summed over all or some of the slots.
  constexpr int pixel_tiles = C::pixels / 16, others = C::Warps / pixel_tiles;
  constexpr int channel_parts = others < Tiles ? others : Tiles, slot_parts = others / channel_parts;
  constexpr int own_tiles = Tiles / channel_parts, steps = C::slots / 16;
  // dS: a group and half of the channels, or of the pixels.
  constexpr int span_tiles = Tiles > 1 ? Tiles / 2 : 1, pixel_steps = Tiles > 1 ? pixel_tiles : pixel_tiles / 2;

#pragma unroll 1
  for (int chunk = 0; chunk < q.chunks; ++chunk) {
    const int first_group = chunk * chunk_groups, groups = min(chunk_groups, q.groups - first_group);
    const int first_channel = first_group * group_channels;
    float span_sum[span_tiles][K][4] = {}, bias_sum[2] = {};
    bring_part<C::threads, C::part>(span_rows, weight + int64_t(first_group * taps) * span.row + first_reduced,
                                    C::slots, width, span.row_vector, [&](int slot) {
                                      const int g = slot / C::group_slots, kh = slot / 8 % K, kw = slot % 8;
                                      return g < groups && kw < K ? (g * taps + kh * K + kw) * span.row : -1;
                                    });
#pragma unroll 1
    for (int tile = first_tile; tile < last_tile; ++tile) {
      uint32_t number = uint32_t(tile);
      const int column = q.by_tiles_w.split(number) * 8, row = q.by_tiles_h.split(number) * C::Rows;
      const int n = int(number);
      __syncthreads();
      bring_image<X, C::Warps>(image, x + (int64_t{n} * q.x.n + first_channel), q.x, groups * group_channels,
                               q.x_height, q.x_width, row * S - q.padding_h, column * S - q.padding_w);
      bring_image<Y, C::Warps>(gradients, y + (int64_t{n} * q.y.n + first_channel), q.y, groups * group_channels,
                               q.y_height, q.y_width, row, column);
      bring_part<C::threads, C::part>(pixels, reduced + (int64_t{n} * span.reduced_n + first_reduced), C::pixels, width,
                                      span.reduced_vector, [&](int pixel) {
                                        const int h = row + pixel / 8, v = column + pixel % 8;
                                        const bool inside = h < q.y_height && v < q.y_width;
                                        return inside ? h * span.reduced_h + v * span.reduced_w : -1;
                                      });
      wait_for_tile();

      const Place at = Place::here();
      const int first_row = at.side * 2 * pairs;
      const Pair pair = Pair::of_lane<C>(at.lane, 0);
      const uint32_t mask = at.group < groups ? pair.mask<K>() : 0;
      // Slots without a tap get zeros: the low one below the first tap becomes the last slot.
      char* const slot = gradients + (first_row * 8 + at.quad) * C::slot_pitch + at.group * C::group_slots * 2;
      char* const low_slot = slot + (pair.low & 7) * 2;
      char* const high_slot = slot + (pair.low + 1) * 2;
      uint32_t a[pairs][4];  // [16 pixels][16 channels]
#pragma unroll
      for (int u = 0; u < pairs; ++u)
        load_matrices(a[u], gradients + Y::at(first_row + 2 * u + at.matrix % 2, at.i,
                                              at.group * group_channels + at.matrix / 2 * 8));
      __syncthreads();
      const Positions<C, X> positions(image, at.group, 0, first_row * S, at.lane);
#pragma unroll
      for (int x_row = 0; x_row < (2 * pairs - 1) * S + K; ++x_row) {
        uint32_t b[4], b_last[2];
        positions.template load<false>(b, b_last, x_row);
#pragma unroll
        for (int u = 0; u < pairs; ++u) {
          if (x_row < 2 * u * S || x_row >= (2 * u + 1) * S + K) continue;
          float d[C::fragments][4] = {};
          multiply<T>(d[0], a[u], {b[0], b[1]});
          multiply<T>(d[1], a[u], {b[2], b[3]});
          if constexpr (C::fragments > 2) multiply<T>(d[2], a[u], b_last);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int kh = x_row - (2 * u + r) * S;
            if (kh < 0 || kh >= K) continue;
            float first = d[0][2 * r], second = d[0][2 * r + 1];
#pragma unroll
            for (int f = 1; f < C::fragments; ++f) {
              if (pair.fragment == f) first = d[f][2 * r], second = d[f][2 * r + 1];
            }
            // Outside the image a zero of G may have met an Inf in X.
            const bool inside = row + first_row + 2 * u + r < q.y_height && column + at.quad < q.y_width;
            const uint32_t bits = pack<T>(first, second) & (inside ? mask : 0);
            const int to = (2 * u + r) * 8 * C::slot_pitch + kh * 16;
            *reinterpret_cast<uint16_t*>(low_slot + to) = uint16_t(bits);
            *reinterpret_cast<uint16_t*>(high_slot + to) = uint16_t(bits >> 16);
          }
        }
      }
      __syncthreads();

      const Place in = Place::here();
      const int pixel_tile = in.warp % pixel_tiles, channel_part = in.warp / pixel_tiles % channel_parts;
      const int slot_part = in.warp / pixel_tiles / channel_parts;
      float sums[own_tiles][2][4] = {};
      const char* const slot_operand =
          gradients + (pixel_tile * 16 + in.matrix % 2 * 8 + in.i) * C::slot_pitch + in.matrix / 2 * 16;
      const char* const row_operand =
          span_rows + (in.matrix % 2 * 8 + in.i) * C::part_pitch + channel_part * own_tiles * 32 + in.matrix / 2 * 16;
#pragma unroll 1
      for (int step = steps * slot_part / slot_parts; step < steps * (slot_part + 1) / slot_parts; ++step) {
        uint32_t slots[4];
        load_matrices(slots, slot_operand + step * 32);
#pragma unroll
        for (int m = 0; m < own_tiles; ++m) {
          uint32_t b[4];
          load_matrices_transposed(b, row_operand + step * 16 * C::part_pitch + m * 32);
          multiply<T>(sums[m][0], slots, {b[0], b[1]});
          multiply<T>(sums[m][1], slots, {b[2], b[3]});
        }
      }
      // The parts meet where X was.
      Vector<4, float>* const shared_sums = reinterpret_cast<Vector<4, float>*>(image);
      const auto place = [&](int from, int m, int half) {
        return (((from - 1) * channel_parts + channel_part) * pixel_tiles + pixel_tile) * own_tiles * 64 +
               (m * 2 + half) * 32 + in.lane;
      };
      if (slot_parts > 1 && slot_part > 0) {
#pragma unroll
        for (int m = 0; m < own_tiles; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half)
            memcpy(&shared_sums[place(slot_part, m, half)], sums[m][half], sizeof sums[m][half]);
        }
      }

      const Place on = Place::here();
      const uint32_t ones = pack<T>(1.0f, 1.0f);
#pragma unroll 1
      for (int step = 0; step < pixel_steps; ++step) {
        const int pixel = ((Tiles > 1 ? 0 : on.side * pixel_steps) + step) * 16 + on.i;
        uint32_t operand[span_tiles][4];  // [16 channels][16 pixels]
#pragma unroll
        for (int m = 0; m < span_tiles; ++m)
          load_matrices_transposed(operand[m], pixels + (pixel + on.matrix / 2 * 8) * C::part_pitch +
                                                   ((Tiles > 1 ? on.side * span_tiles : 0) + m) * 32 +
                                                   on.matrix % 2 * 16);
        const char* const slots =
            gradients + (pixel + on.matrix % 2 * 8) * C::slot_pitch + on.group * C::group_slots * 2;
        const bool own_step = Tiles == 1 || step % 2 == on.side;
#pragma unroll
        for (int kh = 0; kh < K; kh += 2) {
          uint32_t b[2][2];
          if (kh + 1 < K) {
            uint32_t both[4];
            load_matrices_transposed(both, slots + (kh + on.matrix / 2) * 16);
            b[0][0] = both[0], b[0][1] = both[1], b[1][0] = both[2], b[1][1] = both[3];
          } else {
            load_matrices_transposed(b[0], slots + kh * 16);
          }
#pragma unroll
          for (int j = 0; j < 2 && kh + j < K; ++j) {
#pragma unroll
            for (int m = 0; m < span_tiles; ++m) multiply<T>(span_sum[m][kh + j], operand[m], b[j]);
            // db: every row of the product has the sums over the pixels; the lanes of one row keep them.
            if (own_step) {
              float d[4] = {};
              multiply<T>(d, {ones, ones, ones, ones}, b[j]);
              if (on.quad == kh + j) bias_sum[0] += d[0], bias_sum[1] += d[1];
            }
          }
        }
      }

      if constexpr (slot_parts > 1) __syncthreads();
      if (slot_part == 0) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // of the 16 pixels
          const int pixel = pixel_tile * 16 + half * 8 + in.quad, h = row + pixel / 8, v = column + pixel % 8;
          const bool inside = h < q.y_height && v < q.y_width;
#pragma unroll
          for (int m = 0; m < own_tiles; ++m) {
            const int channel = (channel_part * own_tiles + m) * 16;
            float own[2][2];
#pragma unroll
            for (int eight = 0; eight < 2; ++eight) {
              own[eight][0] = sums[m][eight][2 * half], own[eight][1] = sums[m][eight][2 * half + 1];
#pragma unroll
              for (int from = 1; from < slot_parts; ++from) {
                const Vector<4, float>& other = shared_sums[place(from, m, eight)];
                own[eight][0] += other.v[2 * half], own[eight][1] += other.v[2 * half + 1];
              }
              if (q.chunks > 1 && inside && channel < width) {
                auto* kept = reinterpret_cast<Vector<2, float>*>(
                    partial.reduced + (((int64_t{n} * q.y_height + h) * q.y_width + v) * span.reduced + first_reduced +
                                       channel + eight * 8 + 2 * in.t));
                if (chunk > 0) own[eight][0] += kept->v[0], own[eight][1] += kept->v[1];
                if (chunk + 1 < q.chunks) *kept = {{own[eight][0], own[eight][1]}};
              }
            }
            if (chunk + 1 == q.chunks && grad_reduced != nullptr)
              put_channels(grad_reduced +
                               (n * partial.grad_n + h * partial.grad_h + v * partial.grad_w + first_reduced + channel),
                           inside && channel < width, partial.grad_vector, pack<T>(own[0][0], own[0][1]),
                           pack<T>(own[1][0], own[1][1]));
          }
        }
      }
    }

    // The sums of the run, as they lie in the lanes: 8 neighbouring channels of a tap make a sector.
    const Place end = Place::here();
    const int side = Tiles > 1 ? 0 : end.side;
    float* const out = partial.span + (stripe * C::copies + side) * partial.span_size +
                       ((first_group + end.group) * taps + 2 * end.t) * span.reduced + first_reduced;
#pragma unroll
    for (int m = 0; m < span_tiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int channel = ((Tiles > 1 ? end.side * span_tiles : 0) + m) * 16 + half * 8 + end.quad;
        if (end.group >= groups || channel >= width) continue;
#pragma unroll
        for (int kh = 0; kh < K; ++kh) {
          out[kh * K * span.reduced + channel] = span_sum[m][kh][2 * half];
          if (2 * end.t + 1 < K) out[(kh * K + 1) * span.reduced + channel] = span_sum[m][kh][2 * half + 1];
        }
      }
    }
    if (first_reduced == 0 && end.group < groups && end.quad < K) {
      float* const bias_out = partial.bias + (stripe * 2 + end.side) * partial.bias_size +
                              ((first_group + end.group) * taps + end.quad * K + 2 * end.t);
      bias_out[0] = bias_sum[0];
      if (2 * end.t + 1 < K) bias_out[1] = bias_sum[1];
    }
    if constexpr (slot_parts == 1)
      __syncthreads();  // the rows of S have been read; else so they are since the sums met
  }
}

// Adds the stripes' sums in order; nullptr where they are not wanted.
constexpr int sum_columns = 32, sum_rows = 8;
template <class T>
__global__ void __launch_bounds__(sum_columns* sum_rows)
    sum_partials(Partial partial, T* __restrict__ span, T* __restrict__ bias) {
  float* const sums = reinterpret_cast<float*>(shared_memory());
  const int column = int(threadIdx.x) % sum_columns, row = int(threadIdx.x) / sum_columns;
  const int64_t number = int64_t{blockIdx.x} * sum_columns + column;
  const bool is_bias = number >= partial.span_size;
  const int64_t element = is_bias ? number - partial.span_size : number;
  const int64_t size = is_bias ? partial.bias_size : partial.span_size;
  const int count = partial.stripes * (is_bias ? 2 : partial.copies);
  const float* const from = is_bias ? partial.bias : partial.span;
  T* const to = is_bias ? bias : span;
  float sum = 0;
  if (element < size) {
#pragma unroll 8
    for (int part = row; part < count; part += sum_rows) sum += from[part * size + element];
  }
  sums[row * sum_columns + column] = sum;
  __syncthreads();
  if (row > 0 || element >= size || to == nullptr) return;
#pragma unroll
  for (int other = 1; other < sum_rows; ++other) sum += sums[other * sum_columns + column];
  store(sum, to + element);
}

}  // namespace pyinvolution::cuda::fused
