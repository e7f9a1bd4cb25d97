// The gradients of the reduced channels R, the span weights S and the bias b of the fused involution: half and
// bfloat16, channels_last, kernels of 7 x 7, stride S, dilation 1, 16 channels a group. G is grad_output; dW does not
// exist in memory.
//
//   dW[n,g,k,p]  = sum over c of group g of G[n,c,p] * X[n,c, S*p + k - padding]
//   dR[n,r,p]    = sum over g, k of S[49 g + k, r] * dW[n,g,k,p]
//   dS[49 g + k,r] = sum over n, p of dW[n,g,k,p] * R[n,r,p],   db = sum over n, p of dW
//
// A block walks down the images, 4 rows of 16 columns of G (stride 2: 4 of 8) at a time, once for each chunk of 4 groups.
// X is in a ring of rows, of which 4 (8) are new in a step; they and G arrive while the rest of the step is computed. A
// warp has a group and a side, two units (stride 2: one) of 2 rows x 8 pixels. Of a unit, dW is [16 pixels x 8*(S+1)
// positions] = G * X over a group's channels, from which each lane takes its own pair of taps; two shuffles for a kernel
// row and both rows of pixels move the pairs to where operands have them (`Turn`). Rounded to the storage type, as a
// convolution's gradient would be, dW stays in registers: it is the operand of dR, which is summed over the groups of a
// chunk in shared memory and over the chunks in `scratch`, by the thread that owns it; and, transposed, that of dS, which
// is summed over the block's steps in registers. With more than 32 reduced channels there are no registers for that:
// then dW goes through shared memory, to warps that have half of the channels of dS, or 16 channels of dR for all
// groups; ldmatrix makes both operands of it. It lies where G and the rows of X were that the next step does not need
// (stride 2: where X was), so these arrive only when the step is done. A block leaves one partial sum of dS and db, which
// `sum_partials` adds in order; how many there are, and so the last bits, depends on the number of multiprocessors.
//
// Bytes: X, G, R / C of X, dR / C of X once, 2.5 elements a channel and pixel with R = C / 4, and the partial sums.
// L2: X 1.5 times (stride 2: 1.5). The limit is issue: with R = 16, about 390 instructions (PTX for sm_90) for a unit and
// what a step costs, among them 35 HMMA and 28 shuffles and transpositions. With more than 32 it is shared memory, most
// of which is for dR: a warp reads dW of two units and all groups for its 16 channels, and S of these once for both.
#pragma once

#include "span.cuh"

namespace pyinvolution::cuda::fused {

// How a warp's product G * X becomes operands. A unit is 16 pixels, 8 of a row and 8 of the next one. Of each, a lane
// has in the product the pair of taps that it has in the band (../band.cuh); as operand A [16 pixels][8 slots], lane
// (pixel, t) of the warp has slots 2t and 2t + 1 of its pixel in both rows. The pairs move among the four lanes of a
// pixel. With stride 1 those of odd pixels straddle two of them: so the even and the odd taps move apart, both rows at
// once. With stride 2 pairs stay together.
template <int S>
struct Turn {
  int from[2];         // lanes
  uint32_t halves[2];  // for __byte_perm: where the even and the odd taps are
  bool last;           // no tap is in the lane's second slot
  uint32_t fragment;   // which has the lane's pair

  // What lanes have in shared memory, as they have no registers to keep it in.
  struct Table {
    Vector<2, int> from[32];
    uint32_t bits[32];  // `halves[0]`, `fragment` << 16, and `last` as the highest bit
  };
  template <class C>
  static __device__ __forceinline__ void write(Table& table, int lane) {
    const int pixel = lane / 4, t = lane % 4;
    const int more = S == 1 ? pixel / 2 : pixel, odd = S == 1 ? (pixel + 1) / 2 : pixel;
    table.from[lane] = {{pixel * 4 + ((t + more) & 3), pixel * 4 + ((t + odd) & 3)}};
    table.bits[lane] = (pixel % 2 == 0 ? 0x5410u : 0x7632u) | uint32_t(Pair::of_lane<C>(lane, 0).fragment) << 16 |
                       (t == 3 ? 1u << 31 : 0);
  }
  __device__ __forceinline__ Turn(const Table& table, int lane) {
    const Vector<2, int> lanes = table.from[lane];
    const uint32_t bits = table.bits[lane];
    from[0] = lanes.v[0], from[1] = lanes.v[1];
    halves[0] = bits, halves[1] = bits ^ (0x5410 ^ 0x7632);  // of which __byte_perm uses the lower half
    last = int(bits) < 0;
    fragment = bits >> 16 & 3;
  }
  // Turns the pairs of a kernel row, one for each row of the unit.
  __device__ __forceinline__ void operator()(uint32_t (&rows)[2]) const {
    if constexpr (S == 1) {
      const uint32_t even = __shfl_sync(~0u, __byte_perm(rows[0], rows[1], halves[0]), from[0]);
      const uint32_t all_odd = __shfl_sync(~0u, __byte_perm(rows[0], rows[1], halves[1]), from[1]);
      const uint32_t odd = last ? 0 : all_odd;
      rows[0] = __byte_perm(even, odd, 0x5410), rows[1] = __byte_perm(even, odd, 0x7632);
    } else {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t both = __shfl_sync(~0u, rows[r], from[0]);
        rows[r] = last ? both & 0xffffu : both;
      }
    }
  }
};

// Adds to dS, [16 channels][8 slots] of each kernel row, and to db what a unit contributes. `slots_of` gives dW,
// [16 pixels][8 slots], of two kernel rows, where there are two. In db, lane / 4 is the slot, and lane % 4 and the index
// are the kernel row. Fewer: with fewer registers and a few instructions more.
template <class T, bool Fewer, int Tiles, class SlotsOf>
__device__ __forceinline__ void add_unit(float (&span_sum)[Tiles][K][4], float (&bias_sum)[2], const SlotsOf& slots_of,
                                         const char* pixels, int pitch, int lane, bool with_bias) {
  const int matrix = lane / 8, i = lane % 8;
  const uint32_t ones = pack<T>(1.0f, 1.0f);
  uint32_t operand[Tiles][4];  // [16 channels][16 pixels]
#pragma unroll
  for (int m = 0; m < Tiles; ++m)
    load_matrices_transposed(operand[m], pixels + (matrix / 2 * 8 + i) * pitch + m * 32 + matrix % 2 * 16);
  float own[2] = {};
#pragma unroll
  for (int kh = 0; kh < K; kh += 2) {
    uint32_t slots[2][2] = {};
    slots_of(kh, slots);
#pragma unroll
    for (int e = 0; e < 2 && kh + e < K; ++e) {
#pragma unroll
      for (int m = 0; m < Tiles; ++m) multiply<T>(span_sum[m][kh + e], operand[m], slots[e]);
    }
    if (with_bias) {
      // Every column of the product has the sums over the pixels.
      const float zeros[4] = {};
      float d[4];
      multiply<T>(d, {slots[0][0], slots[1][0], slots[0][1], slots[1][1]}, {ones, ones}, zeros);
      if (lane % 4 == kh / 2) {
        float (&to)[2] = Fewer ? bias_sum : own;
        to[0] = Fewer ? to[0] + d[0] : d[0], to[1] = Fewer ? to[1] + d[2] : d[2];
      }
    }
  }
  if (!Fewer) bias_sum[0] += own[0], bias_sum[1] += own[1];
}

// A thread's place, computed again in each phase of a kernel that has no registers to keep it in. `unit` is the first of
// the warp's units.
template <class C>
struct Place {
  int lane, warp, group, side, unit, quad, t, matrix, i;

  static __device__ __forceinline__ Place here() {
    const unsigned thread = thread_again();
    const unsigned lane = thread % 32, warp = thread / 32;
    return {int(lane),
            int(warp),
            int(warp % chunk_groups),
            int(warp / chunk_groups),
            int(warp / chunk_groups * C::pairs),
            int(lane / 4),
            int(lane % 4),
            int(lane / 8),
            int(lane % 8)};
  }
};

// A step of a block: the first pixel of its tile, the image, which is negative behind the last step, and, in `place`,
// the chunk of groups and the batch of the ring with the first rows below the tile.
struct alignas(16) Step {
  int row, column, n, place;

  __device__ __forceinline__ int chunk() const { return place / 4; }
  __device__ __forceinline__ int slot() const { return place % 4; }
};
// What a block's threads know about their walk, in shared memory, as they have no registers to keep it in; a thread
// writes it for all. Between the steps, threads have the next one in
// registers.
struct Walk {
  Step here, next;
  int left;  // steps behind `here`
};

// Aligned: X, G, R and dR can be moved 8 channels at a time.
template <class C, bool Aligned, class T>
__global__ void __launch_bounds__(C::threads, Aligned ? 2 : 1)
    grad_span(KernelParams q, Span span, Partial partial, const T* __restrict__ x, const T* __restrict__ reduced,
              const T* __restrict__ weight, const T* __restrict__ y, T* __restrict__ grad_reduced) {
  constexpr int S = C::S, Tiles = C::Tiles, pairs = C::pairs;
  using X = typename C::Ring;
  using Y = typename C::Output;
  using At = Place<C>;
  char* const ring = shared_memory();
  char* const gradients = ring + C::gradients;
  char* const pixels = ring + C::reduced;
  char* const span_rows = ring + C::rows;
  Walk& walk = *reinterpret_cast<Walk*>(ring + C::walk);
  auto& turns = *reinterpret_cast<typename Turn<S>::Table*>(ring + C::turns);
  // Of dR, [unit][16 channels][half of them][group][lane].
  auto* const group_sums = reinterpret_cast<Vector<4, float>*>(ring + C::sums);
  // Where a block has more than two tiles of channels, dW as operands, [unit][group][kernel row][row][8 pixels][8 slots].
  const auto operands_of = [&](const Step& here, int unit, int g) {
    char* to = ring + unit * chunk_groups * C::operand_bytes;
    if (C::walks) {
      to = unit < 2    ? ring + C::sums + unit * chunk_groups * C::operand_bytes
           : unit == 2 ? ring + here.slot() * (4 * X::Columns * X::pitch)
                       : gradients;
    }
    return to + g * C::operand_bytes;
  };
  // What a block works on is computed again where it is used, as a thread's place is: there are no registers to keep it
  // in. With one or two tiles a block has all the reduced channels; else there are one or two parts of them.
  const auto stripe_of = [&] { return opaque(int(blockIdx.x)) >> (Tiles > 2 ? partial.parts - 1 : 0); };
  const auto first_reduced_of = [&] {
    return Tiles > 2 ? (opaque(int(blockIdx.x)) & (partial.parts - 1)) * C::part : 0;
  };
  const auto width_of = [&] { return Tiles > 2 ? min(C::part, span.reduced - first_reduced_of()) : C::part; };

  const auto groups_of = [&](const Step& step) { return min(chunk_groups, q.groups - step.chunk() * chunk_groups); };
  // Branches on this end a block of instructions. ptxas moves instructions ahead within one, and spills a few registers
  // for that. Where the branches are was found by trial.
  const bool never = q.chunks < 1;
  if (threadIdx.x < 32) Turn<S>::template write<C>(turns, int(threadIdx.x));
  // One access.
  const auto read = [](const Step& from) {
    const auto four = reinterpret_cast<const Vector<4, int>&>(from);
    return Step{four.v[0], four.v[1], four.v[2], four.v[3]};
  };

#pragma unroll 1
  for (int chunk = 0; chunk < q.chunks;) {
    // R: a thread has one piece of 8 channels of some of the pixels.
    const auto bring_pixels = [&](const Step& to) {
      constexpr unsigned pieces = C::part / 8, moves = C::pixels * pieces, more = C::threads / pieces;
      const unsigned thread = C::threads - 1 - thread_again();
      if (thread >= moves) return;
      const int piece = int(thread % pieces), first = int(thread / pieces);
      if (piece * 8 >= width_of()) return;
      const int first_h = to.row + C::row_of(first / 16) + first / 8 % 2;
      const int first_v = to.column + C::column_of(first / 16) + first % 8;
      const T* const from = reduced + (int64_t{to.n} * span.reduced_n + first_reduced_of() + piece * 8);
      char* const place = pixels + first * C::part_pitch + piece * 16;
#pragma unroll
      for (int pixel = 0; pixel < C::pixels; pixel += int(more)) {
        const int h = first_h + C::row_of(pixel / 16) + pixel / 8 % 2, v = first_v + C::column_of(pixel / 16);
        copy_piece(place + pixel * C::part_pitch, from + (h * span.reduced_h + v * span.reduced_w),
                   h < q.y_height && v < q.y_width, Aligned ? 8 : span.reduced_vector);
      }
    };
    // Six warps bring X below a tile, all of it or what is new; two bring G.
    const auto bring = [&](const Step& to, bool all) {
      const unsigned thread = thread_again();
      const int piece = int(thread % 8), first_channel = to.chunk() * chunk_channels;
      if (piece >= 2 * groups_of(to)) return;
      if (thread < C::x_threads) {
        const int position = int(thread / 8), v = to.column * S - q.padding_w + position;
        const unsigned limit = unsigned(v) < unsigned(q.x_width) ? q.x_height : 0;
        int h = to.row * S - q.padding_h + (all ? 0 : (C::live - C::fresh) * 4), left = all ? C::live : C::fresh;
        const T* from = x + (int64_t{to.n} * q.x.n + first_channel) + (h * q.x.h + v * q.x.w + piece * 8);
        const int place = X::at(0, position, piece * 8);
        int slot = all ? to.slot() : C::after(to.slot(), C::live - C::fresh);
#pragma unroll 1
        do {
          char* const batch = ring + (place + slot * (4 * X::Columns * X::pitch));
#pragma unroll
          for (int r = 0; r < 4; ++r, from += q.x.h)
            copy_piece(batch + r * X::Columns * X::pitch, from, unsigned(h + r) < limit, Aligned ? 8 : q.x.vector);
          h += 4, slot = C::after(slot, 1);
        } while (--left > 0);
      } else {
        const int place = int(thread - C::x_threads) / 8, v = to.column + place;
        const T* const from = y + (int64_t{to.n} * q.y.n + first_channel) + (to.row * q.y.h + v * q.y.w + piece * 8);
        char* const column = gradients + Y::at(0, place, piece * 8);
#pragma unroll
        for (int strip = 0; strip < C::strips; ++strip) {
          const int limit = v + strip * 8 < q.y_width ? q.y_height : 0;
          const T* row = from + strip * 8 * q.y.w;
#pragma unroll
          for (int r = 0; r < C::Rows; ++r, row += q.y.h)
            copy_piece(column + (r * Y::Columns + strip * 8) * Y::pitch, row, to.row + r < limit,
                       Aligned ? 8 : q.y.vector);
        }
      }
    };
    float span_sum[C::span_tiles][K][4] = {}, bias_sum[2] = {};
    const int first_group = chunk * chunk_groups, groups = min(chunk_groups, q.groups - first_group);
    {
      // S: a thread has one piece of 8 channels of one column of taps. Kernel rows with 8 slots each, of which there are
      // 7 a group, follow each other in memory, too.
      constexpr int pieces = C::part / 8, at_once = C::threads / pieces / 8;
      const unsigned thread = unsigned(opaque(int(threadIdx.x)));
      const int piece = int(thread % pieces), kw = int(thread / pieces % 8), first = int(thread / (pieces * 8));
      const int end = kw < K && piece * 8 < width_of() ? groups * K : 0;
      const T* const from =
          weight + int64_t{(first_group * K + first) * K + kw} * span.row + (first_reduced_of() + piece * 8);
      char* const to = span_rows + (first * 8 + kw) * C::part_pitch + piece * 16;
#pragma unroll
      for (int row = 0; row < chunk_groups * K; row += at_once) {
        if (chunk_groups * K % at_once != 0 && row + at_once > chunk_groups * K && first + row >= chunk_groups * K)
          break;
        copy_piece(to + row * 8 * C::part_pitch, from + int64_t{row * K} * span.row, first + row < end,
                   Aligned ? 8 : span.row_vector);
      }
    }
    if (threadIdx.x == 0) {
      const int stripe = stripe_of();
      uint32_t number = uint32_t(stripe * partial.steps + min(stripe, partial.longer));
      const int row = q.by_tiles_h.split(number) * C::Rows, column = q.by_tiles_w.split(number) * C::Columns;
      walk.here = {row, column, int(number), chunk * 4};
      walk.left = partial.steps - (stripe >= partial.longer);
    }
    __syncthreads();
    Step entered = read(walk.here);
    if (entered.n >= 0) {
      bring(entered, true);
      bring_pixels(entered);
    }
#pragma unroll 1
    while (entered.n >= 0) {
      wait_for_tile();
      if (threadIdx.x == 0) {
        Step next = entered;
        next.row += C::Rows, next.place += C::after(next.slot(), C::fresh) - next.slot();
        if (next.row >= q.y_height) {
          next.row = 0, next.column += C::Columns;
          if (next.column >= q.y_width) next.column = 0, ++next.n;
        }
        if (--walk.left < 0) next.n = -1;
        walk.here = entered, walk.next = next;
      }

      uint32_t w[pairs][K][2];  // dW of the warp's units
      const auto is_inside = [&](const Step& here, int unit) {
        return here.row + C::row_of(unit) < q.y_height && here.column + C::column_of(unit) < q.y_width;
      };
      bool works;
      {
        const At at = At::here();
        const Step& here = entered;
        works = at.group < groups_of(here) && is_inside(here, at.unit);
        if (works) {
          uint32_t a[pairs][4];  // [16 pixels][16 channels]
          const int first_row = C::row_of(at.unit), first_column = C::column_of(at.unit);
#pragma unroll
          for (int u = 0; u < pairs; ++u)
            load_matrices(a[u], gradients + Y::at(first_row + 2 * u + at.matrix % 2, first_column + at.i,
                                                  at.group * group_channels + at.matrix / 2 * 8));
          const Turn<S> turn(turns, at.lane);
          const int rows_left = q.y_height - here.row - first_row,
                    columns_left = q.y_width - here.column - first_column;
          const bool whole = rows_left >= 2 * pairs && columns_left >= 8;
          const int rows_inside = at.quad < columns_left ? rows_left : 0;
          const bool last_is_outside = here.row + first_row + 2 * (pairs - 1) >= q.y_height;
          const char* batches[C::own_batches];
          int from = here.slot() + first_row * S / 4;
#pragma unroll
          for (int b = 0; b < C::own_batches; ++b, ++from) {
            if (from >= C::live) from -= C::live;
            batches[b] = Positions<C, X>(ring, at.group, first_column / 8, from * 4, at.lane).row;
          }
#pragma unroll
          for (int x_row = 0; x_row < (2 * pairs - 1) * S + K; ++x_row) {
            uint32_t b[4], b_last[2];
            Positions<C, X>(batches[x_row / 4]).template load<false>(b, b_last, x_row % 4);
#pragma unroll
            for (int u = 0; u < pairs; ++u) {
              if (x_row < 2 * u * S || x_row >= (2 * u + 1) * S + K) continue;
              if (pairs > 1 ? u > 0 && last_is_outside : (Tiles > 2 || (Tiles == 2 && x_row % 3 == 1)) && never)
                continue;
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
                  if (int(turn.fragment) == f) first = d[f][2 * r], second = d[f][2 * r + 1];
                }
                w[u][kh][r] = pack<T>(first, second);
                if (r == 1) turn(w[u][kh]);
              }
            }
          }
          // Outside the image a zero of G may have met an Inf in X.
          if (!whole) {
#pragma unroll
            for (int u = 0; u < pairs; ++u) {
#pragma unroll
              for (int r = 0; r < 2; ++r) {
#pragma unroll
                for (int kh = 0; kh < K; ++kh) w[u][kh][r] = 2 * u + r < rows_inside ? w[u][kh][r] : 0;
              }
            }
          }
        }
      }
      __syncthreads();
      if constexpr (Tiles <= 2) {
        const Step next = read(walk.next);
        if (next.n >= 0) bring(next, next.row == 0);
      }

      // Writes or keeps dR of a unit and 16 channels.
      const auto put = [&](const Step& here, int unit, int m, float (&sums)[2][4]) {
        const At at = At::here();
        if (q.chunks > 1) {
          // The sums so far, as they lie in the lanes: [tile][unit][16 channels][half of them][lane].
          const int tile = (here.n * q.tiles_w + here.column / C::Columns) * q.tiles_h + here.row / C::Rows;
          auto* const kept =
              reinterpret_cast<Vector<4, float>*>(partial.reduced) +
              (int64_t{tile * C::units + unit} * (span.reduced / 16) + (first_reduced_of() / 16 + m)) * 64 + at.lane;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if (here.chunk() > 0) {
              const Vector<4, float> more = kept[half * 32];
#pragma unroll
              for (int e = 0; e < 4; ++e) sums[half][e] += more.v[e];
            }
            if (here.chunk() + 1 < q.chunks)
              kept[half * 32] = {{sums[half][0], sums[half][1], sums[half][2], sums[half][3]}};
          }
          if (here.chunk() + 1 < q.chunks) return;
        }
        if (grad_reduced == nullptr) return;
        const int h = here.row + C::row_of(unit), v = here.column + C::column_of(unit) + at.quad;
        const int rows_inside = v < q.y_width ? q.y_height - h : 0;
        T* to = grad_reduced + (int64_t{here.n} * partial.grad_n + first_reduced_of()) +
                (h * partial.grad_h + v * partial.grad_w + m * 16);
#pragma unroll
        for (int r = 0; r < 2; ++r, to += partial.grad_h) {
          const uint32_t low = pack<T>(sums[0][2 * r], sums[0][2 * r + 1]);
          const uint32_t high = pack<T>(sums[1][2 * r], sums[1][2 * r + 1]);
          if constexpr (Aligned) {
            const Vector<2, uint32_t> four = four_channels(low, high, at.lane % 2 == 1);
            if (r < rows_inside) *reinterpret_cast<Vector<2, uint32_t>*>(to + (at.t % 2 * 8 + at.t / 2 * 4)) = four;
          } else {
            put_channels(to, r < rows_inside, partial.grad_vector, low, high);
          }
        }
      };
      if constexpr (Tiles <= 2) {
        const At at = At::here();
        if (works) {
          // S of four kernel rows and 8 channels; of the last three, one of them twice.
          const char* const rows = span_rows + (at.group * C::group_slots + at.matrix * 8 + at.i) * C::part_pitch;
          const char* const last_rows = rows + (4 - at.matrix / 3) * 8 * C::part_pitch;
          auto* const to = group_sums + (at.unit * Tiles * 2 * chunk_groups + at.group) * 32 + at.lane;
#pragma unroll
          for (int half = 0; half < 2 * Tiles; ++half) {
            float sums[pairs][4];
            uint32_t b[2][4];
            if (half > 0 && never) break;
            load_matrices_transposed(b[0], rows + half * 16);
            load_matrices_transposed(b[1], last_rows + half * 16);
#pragma unroll
            for (int kh = 0; kh < K; kh += 2) {
              const uint32_t (&four)[4] = b[kh / 4];
#pragma unroll
              for (int u = 0; u < pairs; ++u) {
                const float zeros[4] = {};
                if (kh + 1 == K) {
                  multiply<T>(sums[u], w[u][kh], {four[2]});
                } else if (kh == 0) {
                  multiply<T>(sums[u], {w[u][0][0], w[u][0][1], w[u][1][0], w[u][1][1]}, {four[0], four[1]}, zeros);
                } else {
                  multiply<T>(sums[u], {w[u][kh][0], w[u][kh][1], w[u][kh + 1][0], w[u][kh + 1][1]},
                              {four[kh % 4], four[kh % 4 + 1]});
                }
              }
            }
#pragma unroll
            for (int u = 0; u < pairs; ++u)
              memcpy(to + (u * Tiles * 2 + half) * chunk_groups * 32, sums[u], sizeof sums[u]);
          }
#pragma unroll
          for (int u = 0; u < pairs; ++u) {
            if (u == 0 && std::is_same_v<T, BFloat16> && never) continue;
            if (u > 0 && walk.here.row + C::row_of(at.unit + u) >= q.y_height) continue;
            const auto slots_of = [&](int kh, uint32_t (&slots)[2][2]) {
#pragma unroll
              for (int e = 0; e < 2 && kh + e < K; ++e) {
#pragma unroll
                for (int r = 0; r < 2; ++r) slots[e][r] = transpose_matrix(w[u][kh + e][r]);
              }
            };
            add_unit<T, Tiles == 2>(span_sum, bias_sum, slots_of, pixels + (at.unit + u) * 16 * C::part_pitch,
                                    C::part_pitch, at.lane, true);
          }
        }
        __syncthreads();
        entered = read(walk.next);
        if (entered.n >= 0) bring_pixels(entered);
        const Step now = read(walk.here);
#pragma unroll 1
        for (int job = At::here().warp; job < C::units * Tiles; job += C::Warps) {
          if (!is_inside(now, job / Tiles)) continue;
          float sums[2][4];
          const Vector<4, float>* const from = group_sums + (job * 2 * chunk_groups * 32 + At::here().lane);
          const auto add = [&](int g) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const Vector<4, float> more = from[(half * chunk_groups + g) * 32];
#pragma unroll
              for (int e = 0; e < 4; ++e) sums[half][e] = g > 0 ? sums[half][e] + more.v[e] : more.v[e];
              if (never) break;
            }
          };
          add(0);
          const int groups = groups_of(now);
          if (groups == chunk_groups) {
            add(1), add(2), add(3);
          } else {
#pragma unroll 1
            for (int g = 1; g < groups; ++g) add(g);
          }
          put(now, job / Tiles, job % Tiles, sums);
        }
      } else {
        // Each warp has 16 channels of all groups of dR, and half of the channels of a group of dS.
        const At at = At::here();
        const Step here = read(walk.here);
        if (works) {
#pragma unroll
          for (int u = 0; u < pairs; ++u) {
            auto* const to = reinterpret_cast<uint32_t*>(operands_of(here, at.unit + u, at.group)) + at.lane;
#pragma unroll
            for (int kh = 0; kh < K; ++kh) to[kh * 64] = w[u][kh][0], to[kh * 64 + 32] = w[u][kh][1];
          }
        }
        __syncthreads();
        const int groups = groups_of(here);
        {
          const int m = at.warp % Tiles, first_unit = at.warp / Tiles * pairs;
          if (m * 16 < width_of() && is_inside(here, first_unit)) {
            float sums[pairs][2][4] = {};
            const char* rows = span_rows + (at.matrix % 2 * 8 + at.i) * C::part_pitch + m * 32 + at.matrix / 2 * 16;
            // Of the last kernel row, lanes 0 to 15 give the addresses.
            const char* last_row = span_rows + ((K - 1) * 8 + at.i) * C::part_pitch + m * 32 + at.matrix % 2 * 16;
            const char* operands[pairs];
#pragma unroll
            for (int u = 0; u < pairs; ++u) operands[u] = operands_of(here, first_unit + u, 0) + at.lane * 16;
#pragma unroll 1
            for (int left = groups; left > 0; --left) {
#pragma unroll
              for (int kh = 0; kh + 1 < K; kh += 2) {
                uint32_t b[4];
                load_matrices_transposed(b, rows + kh * 8 * C::part_pitch);
#pragma unroll
                for (int u = 0; u < pairs; ++u) {
                  uint32_t slots[4];
                  load_matrices(slots, operands[u] + kh * 256);
                  multiply<T>(sums[u][0], slots, {b[0], b[1]});
                  multiply<T>(sums[u][1], slots, {b[2], b[3]});
                }
              }
              uint32_t b[2];
              load_matrices_transposed(b, last_row);
#pragma unroll
              for (int u = 0; u < pairs; ++u) {
                uint32_t slots[2];
                load_matrices(slots, operands[u] + (K - 1) * 256);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                  const uint32_t last[1] = {b[half]};
                  multiply<T>(sums[u][half], slots, last);
                }
                operands[u] += C::operand_bytes;
              }
              rows += C::group_slots * C::part_pitch, last_row += C::group_slots * C::part_pitch;
            }
#pragma unroll
            for (int u = 0; u < pairs; ++u) {
              if (is_inside(here, first_unit + u)) put(here, first_unit + u, m, sums[u]);
            }
          }
        }
        if (at.group < groups && at.side * C::span_tiles * 16 < width_of()) {
#pragma unroll
          for (int unit = 0; unit < C::units; ++unit) {
            if (!is_inside(here, unit)) continue;
            const char* const operands = operands_of(here, unit, at.group) + at.lane * 16;
            const auto slots_of = [&](int kh, uint32_t (&slots)[2][2]) {
              if (kh + 1 < K) {
                uint32_t four[4];
                load_matrices_transposed(four, operands + kh * 256);
                slots[0][0] = four[0], slots[0][1] = four[1], slots[1][0] = four[2], slots[1][1] = four[3];
              } else {
                load_matrices_transposed(slots[0], operands + kh * 256);
              }
            };
            add_unit<T, false>(span_sum, bias_sum, slots_of,
                               pixels + unit * 16 * C::part_pitch + at.side * C::span_tiles * 32, C::part_pitch,
                               at.lane, at.side == 0);
          }
        }
        __syncthreads();
        entered = read(walk.next);
        if (entered.n >= 0) {
          bring_pixels(entered);
          bring(entered, !C::walks || entered.row == 0);
        }
      }
    }

    // The sums of the run: the sides meet where X was.
    const At at = At::here();
    if (Tiles <= 2) {
      auto* const other = reinterpret_cast<float*>(ring) + at.group * 32 + at.lane;
      constexpr int stride = chunk_groups * 32;
      const auto each = [&](const auto& body) {
#pragma unroll
        for (int e = 0; e < 2; ++e) body(bias_sum[e], other[e * stride]);
#pragma unroll
        for (int m = 0; m < C::span_tiles; ++m) {
#pragma unroll
          for (int kh = 0; kh < K; ++kh) {
#pragma unroll
            for (int e = 0; e < 4; ++e) body(span_sum[m][kh][e], other[(2 + (m * K + kh) * 4 + e) * stride]);
          }
        }
      };
      if (at.side == 1) each([](float sum, float& to) { to = sum; });
      __syncthreads();
      if (at.side == 0) each([](float& sum, float more) { sum += more; });
    }
    // As they lie in the lanes: 8 neighbouring channels of a tap make a sector.
    const int ended = walk.here.chunk();
    if (at.group < groups_of(walk.here) && (Tiles > 2 || at.side == 0)) {
      const int first_group = ended * chunk_groups, first_reduced = first_reduced_of(), width = width_of();
      const int stripe = stripe_of();
      float* const out = partial.span + stripe * partial.span_size +
                         ((first_group + at.group) * taps + 2 * at.t) * span.reduced + first_reduced;
#pragma unroll
      for (int m = 0; m < C::span_tiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int channel = ((Tiles > 2 ? at.side * C::span_tiles : 0) + m) * 16 + half * 8 + at.quad;
          if (channel >= width) continue;
          float *to = out + channel, *next = to + span.reduced;
#pragma unroll
          for (int kh = 0; kh < K; ++kh) {
            *to = span_sum[m][kh][2 * half];
            if (2 * at.t + 1 < K) *next = span_sum[m][kh][2 * half + 1];
            to = kept(to + K * span.reduced), next = kept(next + K * span.reduced);
          }
        }
      }
      if (first_reduced == 0 && at.side == 0 && at.quad < K) {
        float* const bias_out = partial.bias + stripe * partial.bias_size + ((first_group + at.group) * taps + at.quad);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (2 * at.t + e < K) bias_out[(2 * at.t + e) * K] = bias_sum[e];
        }
      }
    }
    chunk = ended + 1;
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
