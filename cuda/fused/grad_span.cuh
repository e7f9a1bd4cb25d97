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

// How a warp's product G * X becomes operands. A unit is 16 pixels, 8 of a row and 8 of the next one. Of each, a lane
// has in the product the pair of taps that it has in the band (../band.cuh); as operand A [16 pixels][8 slots], lane
// (pixel, t) of the warp has slots 2t and 2t + 1 of its pixel in both rows. The pairs move among the four lanes of a
// pixel. With stride 1 those of odd pixels straddle two of them: so the even and the odd taps move apart, both rows at
// once. With stride 2 pairs stay together.
template <int S>
struct Turn {
  int from[2];         // lanes
  uint32_t halves[2];  // for __byte_perm: where the even and the odd taps are
  uint32_t mask[2];    // of what arrives: no tap is in the last slot, and none belongs to pixels outside the image

  __device__ __forceinline__ Turn(int lane, bool upper_inside, bool lower_inside) {
    const int pixel = lane / 4, t = lane % 4;
    if constexpr (S == 1) {
      from[0] = pixel * 4 + ((t + pixel / 2) & 3), from[1] = pixel * 4 + ((t + (pixel + 1) / 2) & 3);
      halves[0] = pixel % 2 == 0 ? 0x5410 : 0x7632, halves[1] = pixel % 2 == 0 ? 0x7632 : 0x5410;
      mask[0] = (upper_inside ? 0xffffu : 0) | (lower_inside ? 0xffff0000u : 0), mask[1] = t == 3 ? 0 : mask[0];
    } else {
      from[0] = from[1] = pixel * 4 + ((t + pixel) & 3);
      const uint32_t taps_of_lane = t == 3 ? 0xffffu : ~0u;
      mask[0] = upper_inside ? taps_of_lane : 0, mask[1] = lower_inside ? taps_of_lane : 0;
    }
  }
  // Turns the pairs of a kernel row, one for each row of the unit.
  __device__ __forceinline__ void operator()(uint32_t (&rows)[2]) const {
    if constexpr (S == 1) {
      const uint32_t even = __shfl_sync(~0u, __byte_perm(rows[0], rows[1], halves[0]), from[0]) & mask[0];
      const uint32_t odd = __shfl_sync(~0u, __byte_perm(rows[0], rows[1], halves[1]), from[1]) & mask[1];
      rows[0] = __byte_perm(even, odd, 0x5410), rows[1] = __byte_perm(even, odd, 0x7632);
    } else {
#pragma unroll
      for (int r = 0; r < 2; ++r) rows[r] = __shfl_sync(~0u, rows[r], from[r]) & mask[r];
    }
  }
};

// Adds to dS, [16 channels][8 slots] of each kernel row, and to db what a unit contributes. In db, lane / 4 is the slot
// and kernel row 2j + e is in column j of half e.
template <class T, int Tiles>
__device__ __forceinline__ void add_unit(float (&span_sum)[Tiles][K][4], float (&bias_sum)[4],
                                         const uint32_t (&w)[K][2], const char* pixels, int pitch, bool with_bias) {
  const int lane = int(threadIdx.x) % 32, matrix = lane / 8, i = lane % 8;
  const uint32_t ones = pack<T>(1.0f, 1.0f);
  uint32_t operand[Tiles][4];  // [16 channels][16 pixels]
#pragma unroll
  for (int m = 0; m < Tiles; ++m)
    load_matrices_transposed(operand[m], pixels + (matrix / 2 * 8 + i) * pitch + m * 32 + matrix % 2 * 16);
#pragma unroll
  for (int kh = 0; kh < K; kh += 2) {
    uint32_t slots[2][2] = {};  // [16 pixels][8 slots]
#pragma unroll
    for (int e = 0; e < 2 && kh + e < K; ++e) {
#pragma unroll
      for (int r = 0; r < 2; ++r) slots[e][r] = transpose_matrix(w[kh + e][r]);
#pragma unroll
      for (int m = 0; m < Tiles; ++m) multiply<T>(span_sum[m][kh + e], operand[m], slots[e]);
    }
    if (with_bias) {
      const uint32_t column = lane / 4 == kh / 2 ? ones : 0;
      multiply<T>(bias_sum, {slots[0][0], slots[1][0], slots[0][1], slots[1][1]}, {column, column});
    }
  }
}

template <class C, class T>
__global__ void __launch_bounds__(C::threads, 2)
    grad_span(KernelParams q, Span span, Partial partial, const T* __restrict__ x, const T* __restrict__ reduced,
              const T* __restrict__ weight, const T* __restrict__ y, T* __restrict__ grad_reduced) {
  constexpr int S = C::S, Tiles = C::Tiles, pairs = C::pairs;
  using X = typename C::Input;
  using Y = typename C::Output;
  char* const image = shared_memory();
  char* const gradients = image + C::gradients;
  char* const span_rows = image + C::rows;
  // Of dR, [unit][16 channels][half of them][group][lane].
  auto* const group_sums = reinterpret_cast<Vector<4, float>*>(image + C::sums);
  // Where a block has more than two tiles of channels, dW as operands, [unit][group].
  const auto operands_of = [&](int unit, int g) { return image + (unit * chunk_groups + g) * C::operand_bytes; };
  // With one or two tiles a block has all the reduced channels.
  const int parts = Tiles > 2 ? partial.parts : 1, stripe = int(blockIdx.x) / parts;
  const int first_reduced = int(blockIdx.x) % parts * C::part;
  const int width = Tiles > 2 ? min(C::part, span.reduced - first_reduced) : C::part;
  const int first_tile = int(int64_t{partial.tiles} * stripe / partial.stripes);
  const int last_tile = int(int64_t{partial.tiles} * (stripe + 1) / partial.stripes);

  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int group = warp % chunk_groups, side = warp / chunk_groups;
  const int quad = lane / 4, t = lane % 4, matrix = lane / 8, i = lane % 8;
  const Pair pair = Pair::of_lane<C>(lane, 0);

#pragma unroll 1
  for (int chunk = 0; chunk < q.chunks; ++chunk) {
    const int first_group = chunk * chunk_groups, groups = min(chunk_groups, q.groups - first_group);
    const int first_channel = first_group * group_channels;
    const auto pixels_of = [&](int tile) {
      return image + C::reduced + (tile - first_tile) % C::stages * C::reduced_bytes;
    };
    const auto bring = [&](int tile) {
      uint32_t number = uint32_t(tile);
      const int column = q.by_tiles_w.split(number) * 8, row = q.by_tiles_h.split(number) * C::Rows;
      const int n = int(number);
      bring_image<X, C::Warps>(image, x + (int64_t{n} * q.x.n + first_channel), q.x, groups * group_channels,
                               q.x_height, q.x_width, row * S - q.padding_h, column * S - q.padding_w);
      bring_image<Y, C::Warps>(gradients, y + (int64_t{n} * q.y.n + first_channel), q.y, groups * group_channels,
                               q.y_height, q.y_width, row, column);
      bring_part<C::threads, C::part>(pixels_of(tile), reduced + (int64_t{n} * span.reduced_n + first_reduced),
                                      C::pixels, width, span.reduced_vector, [&](int pixel) {
                                        const int h = row + pixel / 8, v = column + pixel % 8;
                                        const bool inside = h < q.y_height && v < q.y_width;
                                        return inside ? h * span.reduced_h + v * span.reduced_w : -1;
                                      });
    };
    float span_sum[C::span_tiles][K][4] = {}, bias_sum[4] = {};
    bring_part<C::threads, C::part>(span_rows, weight + int64_t(first_group * taps) * span.row + first_reduced,
                                    C::slots, width, span.row_vector, [&](int slot) {
                                      const int g = slot / C::group_slots, kh = slot / 8 % K, kw = slot % 8;
                                      return g < groups && kw < K ? (g * taps + kh * K + kw) * span.row : -1;
                                    });
    if (C::stages > 1) bring(first_tile);
#pragma unroll 1
    for (int tile = first_tile; tile < last_tile; ++tile) {
      if (C::stages == 1) {
        __syncthreads();
        bring(tile);
      }
      wait_for_tile();
      uint32_t number = uint32_t(tile);
      const int column = q.by_tiles_w.split(number) * 8, row = q.by_tiles_h.split(number) * C::Rows;
      const int n = int(number);

      const auto inside_height = [&](int unit) { return row + 2 * unit < q.y_height; };
      const bool works = group < groups && inside_height(side * pairs);
      uint32_t w[pairs][K][2];  // dW of the warp's units
      if (works) {
        const int first_row = side * 2 * pairs;
        uint32_t a[pairs][4];  // [16 pixels][16 channels]
#pragma unroll
        for (int u = 0; u < pairs; ++u)
          load_matrices(a[u], gradients + Y::at(first_row + 2 * u + matrix % 2, i,
                                                group * group_channels + matrix / 2 * 8));
        // Outside the image a zero of G may have met an Inf in X.
        const int rows_inside = column + quad < q.y_width ? q.y_height - row - first_row : 0;
        const Positions<C, X> positions(image, group, 0, first_row * S, lane);
#pragma unroll
        for (int x_row = 0; x_row < (2 * pairs - 1) * S + K; ++x_row) {
          uint32_t b[4], b_last[2];
          positions.template load<false>(b, b_last, x_row);
#pragma unroll
          for (int u = 0; u < pairs; ++u) {
            if (x_row < 2 * u * S || x_row >= (2 * u + 1) * S + K) continue;
            const float zeros[4] = {};
            float d[C::fragments][4];
            multiply<T>(d[0], a[u], {b[0], b[1]}, zeros);
            multiply<T>(d[1], a[u], {b[2], b[3]}, zeros);
            if constexpr (C::fragments > 2) multiply<T>(d[2], a[u], b_last, zeros);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const int kh = x_row - (2 * u + r) * S;
              if (kh < 0 || kh >= K) continue;
              float first = d[0][2 * r], second = d[0][2 * r + 1];
#pragma unroll
              for (int f = 1; f < C::fragments; ++f) {
                if (pair.fragment == f) first = d[f][2 * r], second = d[f][2 * r + 1];
              }
              w[u][kh][r] = pack<T>(first, second);
              if (r == 1) Turn<S>(lane, 2 * u < rows_inside, 2 * u + 1 < rows_inside)(w[u][kh]);
            }
          }
        }
      }
      __syncthreads();
      if (C::stages > 1 && tile + 1 < last_tile) bring(tile + 1);

      // Writes or keeps dR of a unit and 16 channels.
      const auto put = [&](int unit, int m, const float (&sums)[2][4]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int h = row + unit * 2 + r, v = column + quad, channel = m * 16;
          const bool inside = h < q.y_height && v < q.y_width && channel < width;
          float own[2][2];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            own[half][0] = sums[half][2 * r], own[half][1] = sums[half][2 * r + 1];
            if (q.chunks > 1 && inside) {
              auto* kept = reinterpret_cast<Vector<2, float>*>(
                  partial.reduced + (((int64_t{n} * q.y_height + h) * q.y_width + v) * span.reduced + first_reduced +
                                     channel + half * 8 + 2 * t));
              if (chunk > 0) own[half][0] += kept->v[0], own[half][1] += kept->v[1];
              if (chunk + 1 < q.chunks) *kept = {{own[half][0], own[half][1]}};
            }
          }
          if (chunk + 1 == q.chunks && grad_reduced != nullptr)
            put_channels(grad_reduced +
                             (n * partial.grad_n + h * partial.grad_h + v * partial.grad_w + first_reduced + channel),
                         inside, partial.grad_vector, pack<T>(own[0][0], own[0][1]), pack<T>(own[1][0], own[1][1]));
        }
      };
      // S of two kernel rows, or the last one, and 16 channels.
      const auto rows_of = [&](int g, int kh, int m) {
        return span_rows + (g * C::group_slots + kh * 8 + i) * C::part_pitch + m * 32;
      };
      if constexpr (Tiles <= 2) {
        if (works) {
#pragma unroll
          for (int m = 0; m < Tiles; ++m) {
            float sums[pairs][2][4] = {};
#pragma unroll
            for (int kh = 0; kh + 1 < K; kh += 2) {
              uint32_t b[4];
              load_matrices_transposed(b, rows_of(group, kh + matrix % 2, m) + matrix / 2 * 16);
#pragma unroll
              for (int u = 0; u < pairs; ++u) {
                const uint32_t slots[4] = {w[u][kh][0], w[u][kh][1], w[u][kh + 1][0], w[u][kh + 1][1]};
                multiply<T>(sums[u][0], slots, {b[0], b[1]});
                multiply<T>(sums[u][1], slots, {b[2], b[3]});
              }
            }
            uint32_t b[2];
            load_matrices_transposed(b, rows_of(group, K - 1, m) + matrix % 2 * 16);
#pragma unroll
            for (int u = 0; u < pairs; ++u) {
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                const uint32_t last[1] = {b[half]};
                multiply<T>(sums[u][half], w[u][K - 1], last);
                memcpy(group_sums +
                           ((((side * pairs + u) * Tiles + m) * 2 + half) * chunk_groups + group) * 32 + lane,
                       sums[u][half], sizeof sums[u][half]);
              }
            }
          }
#pragma unroll
          for (int u = 0; u < pairs; ++u)
            add_unit<T>(span_sum, bias_sum, w[u], pixels_of(tile) + (side * pairs + u) * 16 * C::part_pitch,
                        C::part_pitch, true);
        }
        __syncthreads();
#pragma unroll 1
        for (int job = warp; job < C::units * Tiles; job += C::Warps) {
          if (!inside_height(job / Tiles)) continue;
          float sums[2][4];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const Vector<4, float>* const from = group_sums + (job * 2 + half) * chunk_groups * 32 + lane;
            memcpy(sums[half], from, sizeof sums[half]);
#pragma unroll
            for (int g = 1; g < chunk_groups; ++g) {
              if (g >= groups) break;
              const Vector<4, float> more = from[g * 32];
#pragma unroll
              for (int e = 0; e < 4; ++e) sums[half][e] += more.v[e];
            }
          }
          put(job / Tiles, job % Tiles, sums);
        }
      } else {
        // Each warp has 16 channels of all groups of dR, and half of the channels of a group of dS.
        if (works) {
#pragma unroll
          for (int u = 0; u < pairs; ++u) {
            char* const to = operands_of(side * pairs + u, group);
#pragma unroll
            for (int kh = 0; kh + 1 < K; kh += 2)
              reinterpret_cast<Vector<4, uint32_t>*>(to)[kh / 2 * 32 + lane] = {
                  {w[u][kh][0], w[u][kh][1], w[u][kh + 1][0], w[u][kh + 1][1]}};
            reinterpret_cast<Vector<2, uint32_t>*>(to + K / 2 * 512)[lane] = {{w[u][K - 1][0], w[u][K - 1][1]}};
          }
        }
        __syncthreads();
        {
          const int m = warp % Tiles, first_unit = warp / Tiles * pairs;
          if (m * 16 < width && inside_height(first_unit)) {
            float sums[pairs][2][4] = {};
#pragma unroll 1
            for (int g = 0; g < groups; ++g) {
#pragma unroll
              for (int kh = 0; kh + 1 < K; kh += 2) {
                uint32_t b[4];
                load_matrices_transposed(b, rows_of(g, kh + matrix % 2, m) + matrix / 2 * 16);
#pragma unroll
                for (int u = 0; u < pairs; ++u) {
                  uint32_t slots[4];
                  memcpy(slots, operands_of(first_unit + u, g) + (kh / 2 * 32 + lane) * 16, sizeof slots);
                  multiply<T>(sums[u][0], slots, {b[0], b[1]});
                  multiply<T>(sums[u][1], slots, {b[2], b[3]});
                }
              }
              uint32_t b[2];
              load_matrices_transposed(b, rows_of(g, K - 1, m) + matrix % 2 * 16);
#pragma unroll
              for (int u = 0; u < pairs; ++u) {
                uint32_t slots[2];
                memcpy(slots, operands_of(first_unit + u, g) + K / 2 * 512 + lane * 8, sizeof slots);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                  const uint32_t last[1] = {b[half]};
                  multiply<T>(sums[u][half], slots, last);
                }
              }
            }
#pragma unroll
            for (int u = 0; u < pairs; ++u) {
              if (inside_height(first_unit + u)) put(first_unit + u, m, sums[u]);
            }
          }
        }
        if (group < groups && side * C::span_tiles * 16 < width) {
#pragma unroll 1
          for (int unit = 0; unit < C::units; ++unit) {
            if (!inside_height(unit / pairs * pairs)) break;
            uint32_t own[K][2];
            const char* const from = operands_of(unit, group);
#pragma unroll
            for (int kh = 0; kh + 1 < K; kh += 2) {
              const auto four = reinterpret_cast<const Vector<4, uint32_t>*>(from)[kh / 2 * 32 + lane];
              own[kh][0] = four.v[0], own[kh][1] = four.v[1], own[kh + 1][0] = four.v[2], own[kh + 1][1] = four.v[3];
            }
            const auto two = reinterpret_cast<const Vector<2, uint32_t>*>(from + K / 2 * 512)[lane];
            own[K - 1][0] = two.v[0], own[K - 1][1] = two.v[1];
            add_unit<T>(span_sum, bias_sum, own,
                        pixels_of(tile) + unit * 16 * C::part_pitch + side * C::span_tiles * 32, C::part_pitch,
                        side == 0);
          }
        }
      }
    }

    // The sums of the run: the sides meet where X was.
    if (Tiles <= 2) {
      auto* const other = reinterpret_cast<float*>(image) + group * 32 + lane;
      constexpr int step = chunk_groups * 32;
      const auto each = [&](const auto& body) {
#pragma unroll
        for (int e = 0; e < 4; ++e) body(bias_sum[e], other[e * step]);
#pragma unroll
        for (int m = 0; m < C::span_tiles; ++m) {
#pragma unroll
          for (int kh = 0; kh < K; ++kh) {
#pragma unroll
            for (int e = 0; e < 4; ++e) body(span_sum[m][kh][e], other[(4 + (m * K + kh) * 4 + e) * step]);
          }
        }
      };
      if (side == 1) each([](float sum, float& to) { to = sum; });
      __syncthreads();
      if (side == 0) each([](float& sum, float more) { sum += more; });
    }
    // As they lie in the lanes: 8 neighbouring channels of a tap make a sector.
    if (group < groups && (Tiles > 2 || side == 0)) {
      float* const out = partial.span + stripe * partial.span_size +
                         ((first_group + group) * taps + 2 * t) * span.reduced + first_reduced;
#pragma unroll
      for (int m = 0; m < C::span_tiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int channel = ((Tiles > 2 ? side * C::span_tiles : 0) + m) * 16 + half * 8 + quad;
          if (channel >= width) continue;
#pragma unroll
          for (int kh = 0; kh < K; ++kh) {
            out[kh * K * span.reduced + channel] = span_sum[m][kh][2 * half];
            if (2 * t + 1 < K) out[(kh * K + 1) * span.reduced + channel] = span_sum[m][kh][2 * half + 1];
          }
        }
      }
      if (first_reduced == 0 && side == 0 && quad < K) {
        float* const bias_out = partial.bias + stripe * partial.bias_size + ((first_group + group) * taps + quad);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int kh = 2 * (2 * t + e % 2) + e / 2;
          if (kh < K) bias_out[kh * K] = bias_sum[e];
        }
      }
    }
    __syncthreads();
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
  const int count = partial.stripes;
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
