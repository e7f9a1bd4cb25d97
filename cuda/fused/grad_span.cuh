// The gradients of the fused involution: half and bfloat16, channels_last, kernels of 7 x 7, stride S, dilation 1, 16
// channels a group. G is grad_output; neither W nor its gradient exists in memory.
//
//   W[n,g,k,p]   = b[49 g + k] + sum over r of S[49 g + k, r] * R[n,r,p]
//   dX[n,c,q]    = sum over taps k, S*p + k - padding = q, of W[n,g(c),k,p] * G[n,c,p]
//   dW[n,g,k,p]  = sum over c of group g of G[n,c,p] * X[n,c, S*p + k - padding]
//   dR[n,r,p]    = sum over g, k of S[49 g + k, r] * dW[n,g,k,p]
//   dS[49 g + k,r] = sum over n, p of dW[n,g,k,p] * R[n,r,p],   db = sum over n, p of dW
//
// grad_input: a warp has 8 columns of dX of one group and walks down the rows of G. For a row of G it makes the weights
// of the 16 pixels (with stride 2, of the 8) that lead to its columns, [8 taps x 8 pixels] = S * R^T for each kernel
// row, which lie across the lanes as taps and pairs of pixels. The band [pixels x 8 columns] wants, in a lane, the same
// pixels at other taps: two shuffles bring them. Each kernel row adds to another row of dX; those that later rows of G
// add to stay in registers, so that each weight is made once per block of columns and nothing is added atomically. G
// and R come row by row through a ring in shared memory. A row of dX that is not finite is computed again tap by tap.
//
// grad_span: a block has a run of tiles of 8 x 8 pixels (stride 2: 4 x 8) and goes through them once for each chunk of
// 4 groups. For a tile, dW is [16 pixels x 8*(S+1) positions] = G * X over a group's channels, from which each lane
// takes its own pair of taps; in shared memory, rounded to the storage type as a convolution's gradient would be, it is
// the operand of dR, summed over the groups of a chunk there and over the chunks in `scratch` by the thread that owns
// it, and of dS, summed over the run in registers. A block leaves one partial sum of dS and db, which `sum_partials`
// adds in order.
#pragma once

#include "fused.cuh"

namespace pyinvolution::cuda::fused {

// The 16 channels of a pixel that 4 lanes have, 2t and 2t+1 in `low`, 8 more on in `high`, to memory.
template <class T>
__device__ __forceinline__ void put_channels(T* pixel, bool valid, int vector, uint32_t low, uint32_t high) {
  const int t = int(threadIdx.x) % 4;
  if (vector == 8) {
    const bool odd = t % 2 == 1;
    const uint32_t other = __shfl_xor_sync(~0u, odd ? low : high, 1);
    const Vector<2, uint32_t> four{{odd ? other : low, odd ? high : other}};
    if (valid) *reinterpret_cast<Vector<2, uint32_t>*>(pixel + (t % 2 * 8 + t / 2 * 4)) = four;
  } else if (valid) {
    const uint32_t bits[2] = {low, high};
    Vector<2, T> pair;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      memcpy(&pair, &bits[half], sizeof pair);
      pixel[half * 8 + 2 * t] = pair.v[0], pixel[half * 8 + 2 * t + 1] = pair.v[1];
    }
  }
}

// Where the warps of grad_input walk.
struct Walk {
  int groups, chunks;
  int height, width;          // of dX
  int out_height, out_width;  // of G
  int padding_h, padding_w;
  int columns, segments, rows;  // blocks of columns, parts of the height and the rows of one
  View y, x;                    // G and dX
};

template <int S_>
struct WalkConfig {
  static constexpr int S = S_, warps = 8, threads = 32 * warps, strips = 2;
  static constexpr int tiles = S == 1 ? 2 : 1;  // of 8 pixels of G, for 8 columns of dX
  static constexpr int strip_pixels = 8 / S, pixels = (strips - 1) * strip_pixels + 8 * tiles;
  static constexpr int depth = 4;     // rows in the ring
  static constexpr int live = K - S;  // rows of dX that the next row of G adds to
  using Ring = Image<depth, pixels, true>;
  static int bytes(int reduced) { return Ring::bytes + (depth * pixels + chunk_groups * taps) * Span::pitch(reduced); }
};

// Row `slot` of the ring from a row of G and of R, zeros where `inside` says so or beside the image.
template <class C, class T>
__device__ __forceinline__ void bring_row(char* ring, char* pixels, const Walk& q, const Span& span, const T* y,
                                          const T* reduced, int slot, int h, int first, int channels) {
  const int thread = opaque(int(threadIdx.x));
  const bool inside = h >= 0 && h < q.out_height;
  const auto bring = [](char* to, const T* memory, int from, bool valid, int vector) {
    if (vector == 8) return copy_async<16>(to, memory + (valid ? from : 0), valid);
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
      T value;
      store(0.0f, &value);
      if (valid) value = memory[from + i];
      reinterpret_cast<T*>(to)[i] = value;
    }
  };
  if (thread < C::pixels * 8) {
    const int column = thread / 8, channel = thread % 8 * 8, v = first + column;
    if (channel < channels)
      bring(ring + C::Ring::at(slot, column, channel), y, h * q.y.h + v * q.y.w + channel,
            inside && v >= 0 && v < q.out_width, q.y.vector);
  }
  const int channel = thread % 16 * 8;
  if (channel < span.reduced) {
    for (int column = thread / 16; column < C::pixels; column += C::threads / 16) {
      const int v = first + column;
      bring(pixels + (slot * C::pixels + column) * span.pitch() + channel * 2, reduced,
            h * span.reduced_h + v * span.reduced_w + channel, inside && v >= 0 && v < q.out_width,
            span.reduced_vector);
    }
  }
}

// Held: there are 16 reduced channels, and most span weights of the group stay in registers.
template <class C, bool Held, class T>
__global__ void __launch_bounds__(C::threads, 2)
    grad_input(Walk q, Span span, const T* __restrict__ y, const T* __restrict__ reduced, const T* __restrict__ weight,
               const T* __restrict__ bias, T* __restrict__ x) {
  constexpr int S = C::S, kernel_pairs = (K + 1) / 2;
  const int pitch = span.pitch();
  char* ring = shared_memory();
  char* pixels = ring + C::Ring::bytes;
  char* span_rows = pixels + C::depth * C::pixels * pitch;

  unsigned block = blockIdx.x;
  const int first_group = int(block % unsigned(q.chunks)) * chunk_groups;
  block /= unsigned(q.chunks);
  const int first_column = int(block % unsigned(q.columns)) * 8 * C::strips;
  block /= unsigned(q.columns);
  const int first_row = int(block % unsigned(q.segments)) * q.rows;
  const int64_t n = block / unsigned(q.segments);
  const int last_row = min(first_row + q.rows, q.height), groups = min(chunk_groups, q.groups - first_group);
  const int channels = groups * group_channels, first_tap = first_group * taps;
  y += n * q.y.n + first_group * group_channels;
  x += n * q.x.n + first_group * group_channels;
  reduced += n * span.reduced_n;

  // Floors: a row of G that leads to no row of this segment costs little. The first row of dX that row h leads to is
  // S*h - padding; the tap of column `first_column` at the first pixel is 7, or 6 or 7 with stride 2.
  const int before = q.padding_h - (K - 1);
  const int first_h = (first_row + before + 8 * S) / S - 8;
  const int first_pixel = S == 1 ? first_column + q.padding_w - K : (first_column + q.padding_w) / 2 - 3;
  const auto bring = [&](int h) {
    bring_row<C>(ring, pixels, q, span, y, reduced, (h - first_h) % C::depth, h, first_pixel, channels);
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
  // Of column `row`, the tap at the lane's first pixel, and S less at the second; 8 pixels on, 8 less with stride 1.
  const int tap = (S == 1 ? K : K - 1 + (first_column + q.padding_w) % 2) + row - 2 * S * t;
  const auto is_tap = [](int k) { return k >= 0 && k < K; };
  uint32_t masks[C::tiles];
#pragma unroll
  for (int j = 0; j < C::tiles; ++j)
    masks[j] = (is_tap(tap - 8 * j) ? 0xffffu : 0) | (is_tap(tap - 8 * j - S) ? 0xffff0000u : 0);
  const int low_lane = (tap & 7) * 4 + t, high_lane = ((tap - S) & 7) * 4 + t;

  // Of a pair of kernel rows, 8 taps each; those that are none repeat others, and the masks leave them out.
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
  const int pixel_offset =
      (strip * C::strip_pixels + (C::tiles == 2 ? matrix / 2 * 8 : 0) + i) * pitch + matrix % 2 * 16;
  const int ring_offset = C::Ring::at(0, strip * C::strip_pixels + (C::tiles == 2 ? matrix / 2 * 8 : 0) + i,
                                      (works ? group : 0) * group_channels + matrix % 2 * 8);
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
      float w[kernel_pairs][C::tiles][4];
      const auto begin = [&](int pair) {
#pragma unroll
        for (int j = 0; j < C::tiles; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) w[pair][j][e] = load(biases[pair].v[e / 2]);
        }
      };
      const auto add = [&](int pair, const uint32_t (&a)[4], const uint32_t (&r)[2 * C::tiles]) {
#pragma unroll
        for (int j = 0; j < C::tiles; ++j) multiply<T>(w[pair][j], a, {r[2 * j], r[2 * j + 1]});
      };
      const char* pixel_row = pixels + slot * C::pixels * pitch + pixel_offset;
      uint32_t r[2 * C::tiles];
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
      uint32_t g[2 * C::tiles];
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
        // In one register, a pixel of both tiles, or of both kernel rows.
        uint32_t low[2], high[2], band[2][C::tiles];
#pragma unroll
        for (int e = 0; e < C::tiles; ++e) {
          const auto pick = [&](int at) {
            if constexpr (C::tiles == 2) return pack<T>(w[pair][0][2 * e + at], w[pair][1][2 * e + at]);
            return pack<T>(w[pair][0][at], w[pair][0][2 + at]);
          };
          if (2 * pair + e >= K) continue;
          low[e] = __shfl_sync(~0u, pick(0), low_lane), high[e] = __shfl_sync(~0u, pick(1), high_lane);
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int kh = 2 * pair + e;
          if (kh >= K) continue;
#pragma unroll
          for (int j = 0; j < C::tiles; ++j) {
            const int from = C::tiles == 2 ? e : 0, half = C::tiles == 2 ? j : e;
            band[e][j] = __byte_perm(low[from], high[from], half == 0 ? 0x5410 : 0x7632) & masks[j];
          }
          multiply<T>(sums[kh], g, band[e]);
        }
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

// Sums over runs of tiles, in float; the run of tiles of stripe i is the i-th of `stripes` equal parts.
struct Partial {
  float* span;     // [stripe][49 G][R] and then [49 G], `stripe` elements each
  float* reduced;  // [N][Ho][Wo][R], where there is more than one chunk
  int64_t stripe;
  int stripes, parts;  // parts of the reduced channels
  int tiles;
  int64_t grad_n;  // strides of dR
  int grad_h, grad_w, grad_vector;
};

// Tiles: of 16 reduced channels, which a block has.
template <int S_, int Tiles_>
struct SpanConfig : Config<K, S_, S_ == 1 ? 8 : 4, 8, 8> {
  using Base = Config<K, S_, S_ == 1 ? 8 : 4, 8, 8>;
  static constexpr int Tiles = Tiles_, part = 16 * Tiles, pixels = Base::Rows * 8;
  using Input = Image<Base::x_rows, Base::x_columns, true>;
  using Output = Image<Base::Rows, 8, true>;
  // The taps of a kernel row are 8, of which the last is none: [pixel][slot] and [slot][reduced channel].
  static constexpr int group_slots = 8 * K, slots = chunk_groups * group_slots;
  static constexpr int slot_pitch = slots * 2 + 16, part_pitch = part * 2 + 16;
  static constexpr int gradients = Input::bytes;  // of W, and before them the tile of G
  static constexpr int reduced = gradients + pixels * slot_pitch;
  // In the end the sums of dS, in floats, [slot][reduced channel], and those of db; only `rows` may be written
  // meanwhile.
  static constexpr int copies = Tiles > 1 ? 1 : 2, sum_pitch = part + 4;
  static constexpr int sums_bytes = (copies * sum_pitch + 2) * slots * 4, tile_bytes = reduced + pixels * part_pitch;
  static constexpr int rows = sums_bytes > tile_bytes ? sums_bytes : tile_bytes;
  static constexpr int bytes = rows + slots * part_pitch;
  static_assert(Output::bytes <= pixels * slot_pitch && bytes <= 99 * 1024, "");
};

// `width` of Part channels of `rows` rows into shared memory, zeros beyond; `at` as above.
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

// A thread's place, worked out anew in each phase of a kernel that has no registers to keep it in.
struct Place {
  int thread, lane, warp, group, side, quad, t, matrix, i;

  static __device__ __forceinline__ Place here() {
    const int thread = opaque(int(threadIdx.x)), lane = thread % 32, warp = thread / 32;
    return {thread, lane, warp, warp % chunk_groups, warp / chunk_groups, lane / 4, lane % 4, lane / 8, lane % 8};
  }
};

template <class C, class T>
__global__ void __launch_bounds__(C::threads, 2)
    grad_span(Geometry q, Span span, Partial partial, const T* __restrict__ x, const T* __restrict__ reduced,
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
  // How many warps share what, and the part of one.
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
      const int column = tile % q.tiles_w * 8, row = tile / q.tiles_w % q.tiles_h * C::Rows;
      const int n = tile / q.tiles_w / q.tiles_h;
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
      const uint32_t mask =
          at.group < groups ? (pair.has_low<K>() ? 0xffffu : 0) | (pair.has_high<K>() ? 0xffff0000u : 0) : 0;
      // Slots that are no tap get zeros: the low one below the first tap becomes the last one.
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
            // Beside the image a zero of G may have met an Inf in X.
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
            // db: every row of the product has the sums over the pixels, of which the lanes of one keep theirs.
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

    // The run's sums, by way of shared memory, where those of halves of the pixels meet.
    float* const span_sums = reinterpret_cast<float*>(image);
    float* const bias_sums = span_sums + C::copies * C::slots * C::sum_pitch;
    const Place end = Place::here();
    __syncthreads();
#pragma unroll
    for (int m = 0; m < span_tiles; ++m) {
      const int channel = ((Tiles > 1 ? end.side * span_tiles : 0) + m) * 16 + end.quad;
      float* const to =
          span_sums + ((Tiles > 1 ? 0 : end.side * C::slots) + end.group * C::group_slots + 2 * end.t) * C::sum_pitch +
          channel;
#pragma unroll
      for (int k = 0; k < K * 4; ++k)
        to[(k / 4 * 8 + k % 2) * C::sum_pitch + k % 4 / 2 * 8] = span_sum[m][k / 4][k % 4];
    }
    if (end.quad < K) {
      float* const to = bias_sums + end.side * C::slots + end.group * C::group_slots + end.quad * 8 + 2 * end.t;
      to[0] = bias_sum[0], to[1] = bias_sum[1];
    }
    __syncthreads();
    float* const out = partial.span + stripe * partial.stripe + int64_t{first_group * taps} * span.reduced;
    float* const bias_out =
        partial.span + stripe * partial.stripe + int64_t{q.groups} * taps * span.reduced + first_group * taps;
    const auto slot_of = [](int tap) { return tap / taps * C::group_slots + tap % taps / K * 8 + tap % K; };
#pragma unroll 1
    for (int k = end.thread; k < groups * taps * C::part; k += C::threads) {
      const int tap = k / C::part, channel = k % C::part;
      const float* from = span_sums + slot_of(tap) * C::sum_pitch + channel;
      float sum = from[0];
      if (C::copies > 1) sum += from[C::slots * C::sum_pitch];
      if (channel < width) out[tap * span.reduced + first_reduced + channel] = sum;
    }
    if (first_reduced == 0) {
      for (int tap = end.thread; tap < groups * taps; tap += C::threads)
        bias_out[tap] = bias_sums[slot_of(tap)] + bias_sums[C::slots + slot_of(tap)];
    }
  }
}

// Adds the stripes' sums in order: `first` elements to `span`, the rest to `bias`; nullptr where they are not wanted.
constexpr int sum_columns = 32, sum_rows = 8;
template <class T>
__global__ void __launch_bounds__(sum_columns* sum_rows)
    sum_partials(Partial partial, int64_t first, T* __restrict__ span, T* __restrict__ bias) {
  float* const sums = reinterpret_cast<float*>(shared_memory());
  const int column = int(threadIdx.x) % sum_columns, row = int(threadIdx.x) / sum_columns;
  const int64_t element = int64_t{blockIdx.x} * sum_columns + column;
  float sum = 0;
  if (element < partial.stripe) {
#pragma unroll 8
    for (int stripe = row; stripe < partial.stripes; stripe += sum_rows)
      sum += partial.span[stripe * partial.stripe + element];
  }
  sums[row * sum_columns + column] = sum;
  __syncthreads();
  if (row > 0 || element >= partial.stripe) return;
#pragma unroll
  for (int other = 1; other < sum_rows; ++other) sum += sums[other * sum_columns + column];
  if (element >= first) {
    if (bias != nullptr) store(sum, bias + (element - first));
  } else if (span != nullptr) {
    store(sum, span + element);
  }
}

}  // namespace pyinvolution::cuda::fused
