// The gradient of the input of the fused involution with stride 1: half and bfloat16, channels_last, kernels of 7 x 7,
// dilation 1, 16 channels a group. G is grad_output; W does not exist in memory. (Stride 2: grad_input_strided.cuh.)
//
//   W[n,g,k,p] = b[49 g + k] + sum over r of S[49 g + k, r] * R[n,r,p]
//   dX[n,c,q]  = sum over taps k, p + k - padding = q, of W[n,g(c),k,p] * G[n,c,p]
//
// X, G are N,C,H,W; R is N,R,Ho,Wo; S is 49 G,R. A block has the whole width where 8 tiles of 8 pixels of G reach, 2 or
// 4 groups, and walks down G two rows at a time; a warp has one tile of one group. For kernel row k of the two rows it
// makes the weights [8 taps x 8 pixels] = S * R^T, of two kernel rows in one HMMA. They lie across the lanes as taps
// (lane / 4) and pairs of pixels (lane % 4). The product with G,
//
//     dX[16 columns x 16 channels] += band[16 columns x 8 pixels] * G[8 pixels x 16 channels],
//
// wants, in a lane, the same pixels at the taps (lane / 4 - pixel) mod 8: a shuffle for each of the two pixels, which
// carries the weights of both rows. Kernel row k of the first row of G and k - 1 of the second add to the same row of
// dX, so they are the two halves of a depth of 16. The 8 rows of dX that are not complete stay in registers, and every
// weight is made once. Of the 16 columns, the right half goes to the warp of the next tile, through shared memory, when
// a row is complete. Nothing is added atomically. Where the width takes several blocks, each begins with the last tile
// of the one before. A row of 8 columns that is not finite is computed again tap by tap: the zeros of the band make NaN
// of an Inf.
//
// Bytes: G, R / C of G, dX once: 2.25 elements a channel and pixel with R = C / 4. The limit is issue: with R = 16, 14
// warps take about 340 instructions (PTX for sm_90) for two rows of 8 pixels of a group, among them 24 HMMA, 14 shuffles
// and 6 ldmatrix. With R = 32 and 64, R of the two rows stays in registers for all kernel rows, and shared memory, most
// of which is for S, takes as long as issue.
#pragma once

#include "span.cuh"

namespace pyinvolution::cuda::fused {

// The work of a block and a warp, computed again where it is wanted: the walk has no registers to keep all of it in.
struct WalkPlace {
  int first_group, groups, group, tile, first_pixel, first_row;
  int64_t n;

  static __device__ __forceinline__ WalkPlace here(const WalkParams& q) {
    const int warp = int(thread_again() / 32);
    WalkPlace place;
    uint32_t block = blockIdx.x;
    place.first_group = q.by_chunks.split(block) * q.layout.groups;
    place.groups = min(q.layout.groups, q.groups - place.first_group);
    place.first_pixel = q.by_columns.split(block) * 8 * (q.layout.tiles - 1);
    place.first_row = q.by_segments.split(block) * q.rows;
    place.n = block;
    place.group = warp & (q.layout.groups - 1), place.tile = warp / q.layout.groups;
    return place;
  }
};

// What a thread moves of a pair of rows, from the first row of the image, and to bytes of a stage of the ring. Of G, `g`
// is negative where there is nothing, and rows from `end` on are zeros. In shared memory, as there are no registers.
template <class T>
struct alignas(16) WalkFrom {
  const T *g, *reduced;
};
struct alignas(16) WalkTo {
  int g, reduced, end;
};

// Computes 8 columns of the row of the warp's group from memory, a number at a time.
template <class T>
__device__ __forceinline__ void again_from_memory(const WalkParams& q, const Span& span, const T* y, const T* reduced,
                                                  const char* span_rows, const T* bias, T* x, int row, int half) {
  const WalkPlace at = WalkPlace::here(q);
  reduced += at.n * span.reduced_n;
#pragma unroll 1
  for (int number = int(thread_again() % 32); number < 8 * group_channels; number += 32) {
    const int channel = (at.first_group + at.group) * group_channels + number % group_channels;
    const int column = at.first_pixel + at.tile * 8 - q.padding_w + half + number / group_channels;
    if (column < 0 || column >= q.width) continue;
    float sum = 0;
#pragma unroll 1
    for (int k = 0; k < taps; ++k) {
      const int h = row + q.padding_h - k / K, v = column + q.padding_w - k % K;
      if (h < 0 || v < 0 || h >= q.out_height || v >= q.out_width) continue;
      const T* r = reduced + (h * span.reduced_h + v * span.reduced_w);
      const int slot = at.group * WalkLayout::slots + k / K * 8 + k % K;
      sum += weight_of<T>(reinterpret_cast<const char*>(r), span_rows + slot * span.pitch(),
                          bias != nullptr ? load(bias[(at.first_group + at.group) * taps + k]) : 0.0f, span.reduced) *
             load(y[at.n * q.y.n + (h * q.y.h + v * q.y.w + channel)]);
    }
    store(sum, x + (at.n * q.x.n + (row * q.x.h + column * q.x.w + channel)));
  }
}

// Aligned: G, R, S and dX can be moved 8 channels at a time. Steps: 16 reduced channels each, or 0: as many as there are.
template <bool Aligned, int Steps, class T>
__global__ void __launch_bounds__(WalkLayout::most_threads, 1)
    grad_input(WalkParams q, Span span, const T* __restrict__ y, const T* __restrict__ reduced,
               const T* __restrict__ weight, const T* __restrict__ bias, T* __restrict__ x) {
  constexpr int kernel_pairs = (K + 1) / 2, slots = WalkLayout::slots, depth = WalkLayout::depth,
                rows = WalkLayout::rows, open = K + rows - 1;
  const int steps = Steps > 0 ? Steps : span.reduced / 16, pitch = Span::pitch(16 * steps);
  const WalkLayout layout = q.layout;
  const int pixels = layout.pixels(), position_bytes = layout.position_bytes();
  char* const ring = shared_memory();
  char* const reduced_ring = ring + layout.ring_bytes();
  char* const span_rows = reduced_ring + depth * rows * pixels * pitch;
  char* const halves = span_rows + (layout.groups * slots + 8) * pitch;
  auto* const biases = reinterpret_cast<Vector<2, float>*>(halves + (layout.warps() + layout.groups) * rows * 32 * 16);
  auto* const all_from = reinterpret_cast<WalkFrom<T>*>(biases + layout.groups * kernel_pairs * 8);
  auto* const all_to = reinterpret_cast<WalkTo*>(all_from + layout.warps() * 32);

  const WalkPlace at = WalkPlace::here(q);
  const int last_row = min(at.first_row + q.rows, q.height);
  const int first_tap = at.first_group * taps;

  // The first pair of rows of G; before it there are none, or they lead to rows above the segment.
  const int first_h = max(0, (at.first_row + q.padding_h - (K - 1)) & ~1);

  // In each pair of rows a thread moves one piece, of 8 channels, of a pixel of G, and the pieces of R at the same place
  // among those of the pixel and as many further on. Consecutive threads have consecutive pieces.
  const int thread = int(threadIdx.x), lane = thread % 32, pieces = 2 * layout.groups;
  {
    const int piece = thread & (pieces - 1), pixel = layout.groups == 4 ? thread / 8 : thread / 4;
    const int side = pixel >= pixels, v = at.first_pixel + pixel - side * pixels;
    const bool exists = 2 * at.first_group + piece < 2 * q.groups;
    all_from[thread] = {y + (at.n * q.y.n + at.first_group * group_channels) + (side * q.y.h + v * q.y.w + piece * 8),
                        reduced + at.n * span.reduced_n + (side * span.reduced_h + v * span.reduced_w + piece * 8)};
    all_to[thread] = {exists ? layout.at(pixel, piece) : -1, pixel * pitch + piece * 16,
                      v < q.out_width ? q.out_height - side : 0};
  }
  const auto bring = [&](int h, int slot) {
    const WalkFrom<T> first = all_from[thread_again()];
    const WalkTo places = all_to[thread_again()];
    const bool inside = h < places.end;
    if (places.g >= 0)
      copy_piece(ring + slot * rows * pixels * position_bytes + places.g, first.g + h * q.y.h, inside,
                 Aligned ? 8 : q.y.vector);
    char* to = reduced_ring + slot * rows * pixels * pitch + places.reduced;
    const T* from = first.reduced + h * span.reduced_h;
    const int left = 2 * steps - int(thread_again() & unsigned(pieces - 1));
    if (left > 0) copy_piece(to, from, inside, Aligned ? 8 : span.reduced_vector);
#pragma unroll 1
    for (int p = pieces; p < 2 * steps; p += pieces) {
      if (p < left) copy_piece(to + 16 * p, from + 8 * p, inside, Aligned ? 8 : span.reduced_vector);
    }
    commit_copies();
  };
  // Zeros where there is no tap, also in the eighth kernel row of the last group. Kernel rows, of which there are 7 a
  // group, have 8 slots each. A thread has a piece of some of the slots, or none.
  {
    const int shift = steps <= 1 ? 1 : steps <= 2 ? 2 : steps <= 4 ? 3 : 4, piece = thread & ((1 << shift) - 1);
    const int at_once = layout.warps() * (32 >> shift), end = piece < 2 * steps ? layout.groups * slots + 8 : 0;
#pragma unroll 1
    for (int slot = thread >> shift; slot < end; slot += at_once)
      copy_piece(span_rows + slot * pitch + piece * 16,
                 weight + (int64_t{first_tap + slot - slot / 8} * span.row + piece * 8),
                 slot % 8 < K && slot < at.groups * slots, Aligned ? 8 : span.row_vector);
    if (thread < layout.groups * kernel_pairs * 8) {
      const int group = thread / (kernel_pairs * 8), pair = thread / 8 % kernel_pairs, kw = thread % 8;
      const bool exists = bias != nullptr && group < at.groups && kw < K;
      const T* const from = bias + (first_tap + group * taps + 2 * pair * K + kw);
      biases[thread] = {{exists ? load(from[0]) : 0.0f, exists && 2 * pair + 1 < K ? load(from[K]) : 0.0f}};
    }
  }
  // To the left of the first tile there is none.
  for (int number = thread; number < layout.groups * rows * 32 * 4; number += 32 * layout.warps())
    reinterpret_cast<float*>(halves)[number] = 0.0f;
#pragma unroll 1
  for (int stage = 0; stage < depth - 1; ++stage) bring(first_h + rows * stage, stage);

  const int group = at.group, tile = at.tile;
  const bool works = at.first_group + group < q.groups;
  const int line = lane / 4, t = lane % 4, matrix = lane / 8, i = lane % 8;
  // The lane's pixels are 2t and 2t + 1; in the left half of the columns it is at their taps line - 2t and one less, in
  // the right half at 8 more. Only in one of the halves do they exist, or are in the slot that holds zeros.
  const int tap = line - 2 * t;
  const bool is_left = tap >= 0;
  const int low_lane = (tap & 7) * 4 + t, high_lane = ((tap - 1) & 7) * 4 + t;

  // Kernel rows have 8 slots; the last one holds zeros. The products of an eighth kernel row are not used.
  const auto own_biases_again = [&] {
    const unsigned thread = thread_again();
    return biases + ((thread / 32 & unsigned(layout.groups - 1)) * (kernel_pairs * 8) + thread / 4 % 8);
  };
  const auto* const kept_biases = own_biases_again();
  const char* const tap_rows = span_rows + ((works ? group : 0) * slots + matrix % 2 * 8 + i) * pitch + matrix / 2 * 16;
  const char* const pixel_rows = reduced_ring + (matrix / 2 * pixels + tile * 8 + i) * pitch + matrix % 2 * 16;
  const char* const gradients = ring + layout.at(matrix % 2 * pixels + tile * 8 + i, group * 2 + matrix / 2);
  const int end = works ? q.out_height : 0;  // of the rows of G that the warp computes with
  // Where the lane writes its column of the left half, or negative: nowhere. The right half is written where there is
  // no tile to the right.
  const auto out_of = [&](int right_half) {
    const int lane = int(thread_again() % 32);
    const int column = at.first_pixel + tile * 8 - q.padding_w + right_half * 8 + lane / 4;
    return works && column >= 0 && column < q.width ? column * q.x.w + group * group_channels : -1;
  };
  const int left_out = tile > 0 || at.first_pixel == 0 ? out_of(0) : -1;
  const bool ends = at.first_pixel + pixels >= q.out_width && tile == layout.tiles - 1;
  T* const out = x + (at.n * q.x.n + at.first_group * group_channels);

  // The rows of dX that are not complete: row o of the pair of rows h is number (o + 2 * phase) % 8.
  const bool never = q.groups < 1;
  float sums[open][2][4] = {};  // [16 columns][16 channels]
  uint32_t again = 0;           // rows of 8 columns of a round that are not finite
  const auto step = [&](auto number, int h) {
    constexpr int phase = number.value;
    // Addresses are computed here again, instead of being kept in registers for each phase.
    const int stage = opaque(phase), filled = opaque((phase + depth - 1) % depth);
    const auto row_of = [](int o) { return (o + rows * phase) % open; };
    wait_for_copies<depth - 2>();
    __syncthreads();
    bring(h + rows * (depth - 1), filled);
    if (h < end) {
      const char* const reduced_row = pixel_rows + stage * rows * pixels * pitch;
      uint32_t g[4];  // [16 pixels][8 channels], twice
      load_matrices_transposed(g, gradients + stage * rows * pixels * position_bytes);
      constexpr int held = Steps > 0 ? Steps : 1;  // of the reduced channels, 16 each
      uint32_t r[held][4];
#pragma unroll
      for (int c = 0; c < held; ++c) load_matrices(r[c], reduced_row + c * 32);
      const auto* const own_biases = Steps > 2 ? own_biases_again() : kept_biases;
      uint32_t left_before = 0, right_before = 0;  // of the second row of G and the kernel row before
#pragma unroll
      for (int pair = 0; pair < kernel_pairs; ++pair) {
        // This branch ends a block of instructions. ptxas moves instructions ahead within one, and spills a few registers
        // for that.
        if (Steps > 2 && pair > 0 && never) break;
        float w[2][4];
        const Vector<2, float> of_pair = own_biases[pair * 8];
        const float begin[4] = {of_pair.v[0], of_pair.v[0], of_pair.v[1], of_pair.v[1]};
        const char* const rows_of_pair = tap_rows + 2 * pair * 8 * pitch;
        uint32_t a[4];
        load_matrices(a, rows_of_pair);
        multiply<T>(w[0], a, {r[0][0], r[0][1]}, begin);
        multiply<T>(w[1], a, {r[0][2], r[0][3]}, begin);
        if constexpr (Steps > 0) {
#pragma unroll
          for (int c = 1; c < Steps; ++c) {
            load_matrices(a, rows_of_pair + c * 32);
            multiply<T>(w[0], a, {r[c][0], r[c][1]});
            multiply<T>(w[1], a, {r[c][2], r[c][3]});
          }
        } else {
#pragma unroll 1
          for (int c = 1; c < steps; ++c) {
            uint32_t more[4];
            load_matrices(a, rows_of_pair + c * 32);
            load_matrices(more, reduced_row + c * 32);
            multiply<T>(w[0], a, {more[0], more[1]});
            multiply<T>(w[1], a, {more[2], more[3]});
          }
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int kh = 2 * pair + e;
          if (kh >= K) continue;
          const uint32_t low = __shfl_sync(~0u, pack<T>(w[0][2 * e], w[1][2 * e]), low_lane);
          const uint32_t high = __shfl_sync(~0u, pack<T>(w[0][2 * e + 1], w[1][2 * e + 1]), high_lane);
          const uint32_t first = __byte_perm(low, high, 0x5410), second = __byte_perm(low, high, 0x7632);
          const uint32_t left = is_left ? first : 0, right = is_left ? 0 : first;
          float (&sum)[2][4] = sums[row_of(kh)];
          if (kh == 0) {
            multiply<T>(sum[0], {left, right}, {g[0]});
            multiply<T>(sum[1], {left, right}, {g[2]});
          } else {
            const uint32_t band[4] = {left, right, left_before, right_before};
            if (kh == K - 1) {  // a row of dX begins
#pragma unroll
              for (int e = 0; e < 8; ++e) sum[e / 4][e % 4] = 0.0f;
            }
            multiply<T>(sum[0], band, {g[0], g[1]});
            multiply<T>(sum[1], band, {g[2], g[3]});
          }
          left_before = is_left ? second : 0, right_before = is_left ? 0 : second;
        }
      }
      const float zeros[4] = {};
      multiply<T>(sums[row_of(K)][0], {left_before, right_before}, {g[1]}, zeros);
      multiply<T>(sums[row_of(K)][1], {left_before, right_before}, {g[3]}, zeros);
    } else {
#pragma unroll
      for (int e = 0; e < 16; ++e) sums[row_of(K - 1 + e / 8)][e / 4 % 2][e % 4] = 0.0f;
    }
    // Of each row the channels 2t and 2t + 1, and 8 more.
    auto* const own = reinterpret_cast<Vector<4, float>*>(halves) + (layout.groups + thread_again() / 32) * rows * 32 +
                      thread_again() % 32;
    const auto* const other = own - layout.groups * rows * 32;
#pragma unroll
    for (int done = 0; done < rows; ++done) {
      const float (&sum)[2][4] = sums[row_of(done)];
      own[done * 32] = {{sum[0][2], sum[0][3], sum[1][2], sum[1][3]}};
    }
    __syncthreads();
#pragma unroll
    for (int done = 0; done < rows; ++done) {
      float (&sum)[2][4] = sums[row_of(done)];
      const int row = h - q.padding_h + done;
      const Vector<4, float> more = other[done * 32];
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[e / 2][e % 2] += more.v[e];
      const auto put = [&](int right_half, int own_out) {
        const int e = right_half * 2;
        const float zero = sum[0][e] * 0.0f + sum[0][e + 1] * 0.0f + sum[1][e] * 0.0f + sum[1][e + 1] * 0.0f;
        if (__any_sync(~0u, own_out >= 0 && zero != 0.0f)) {
          again |= 1u << ((phase * rows + done) * 2 + right_half);
        } else {
          put_channels(out + (row * q.x.h + own_out), own_out >= 0, Aligned ? 8 : q.x.vector,
                       pack<T>(sum[0][e], sum[0][e + 1]), pack<T>(sum[1][e], sum[1][e + 1]));
        }
      };
      if (row >= at.first_row && row < last_row) {
        put(0, left_out);
        if (ends) put(1, out_of(1));
      }
    }
  };

  constexpr int phases = open / rows;
  static_assert(phases == 4 && depth == phases, "the steps of a round");
#pragma unroll 1
  for (int h = first_h; h - q.padding_h < last_row; h += rows * phases) {
    const auto remains = [&](int phase) { return h + rows * phase - q.padding_h < last_row; };
    step(std::integral_constant<int, 0>{}, h);
    if (remains(1)) step(std::integral_constant<int, 1>{}, h + rows);
    if (remains(2)) step(std::integral_constant<int, 2>{}, h + 2 * rows);
    if (remains(3)) step(std::integral_constant<int, 3>{}, h + 3 * rows);
#pragma unroll 1
    for (int bit = 0; again != 0; ++bit, again >>= 1) {
      if (again % 2 == 0) continue;
      again_from_memory<T>(q, span, y, reduced, span_rows, bias, x, h - q.padding_h + bit / 2, bit % 2 * 8);
    }
  }
  wait_for_copies<0>();
}

}  // namespace pyinvolution::cuda::fused
