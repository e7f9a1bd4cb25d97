// The involution with weights that never leave the SM, forward: half and bfloat16, channels_last, kernels of 7 x 7,
// stride S, dilation 1, 16 channels a group.
//
//   W[n,g,k,p] = b[49 g + k] + sum over r of S[49 g + k, r] * R[n,r,p]
//   Y[n,c,p]   = sum over taps k of W[n,g(c),k,p] * X[n,c, S*p + k - padding]
//   Z[n,c,p]   = max(0, scale[c] * Y[n,c,p] + shift[c])     where there is an epilogue
//
// X is N,C,H,W; R is N,R,Ho,Wo; S is 49 G,R; Y is N,C,Ho,Wo.
//
// A block owns a chunk of 4 groups and walks down stripes of Y, C::Columns wide, step by step; warp w has group w % 4
// and columns 8 (w / 4) on. A step is C::Rows rows. The rows of X that the steps read lie in a ring in shared memory,
// with R of two steps and the rows of S beside it. While a step is computed, the rows of X that the next one reads
// besides, a batch, and its R arrive, so that each row is loaded once per stripe. All blocks run at once, and their
// shares of the steps differ by at most one; a share can begin and end inside a stripe.
//
// In a step, a warp first makes the weights of all kernel rows: [2 rows x 8 pixels x 8 taps] = R [16 x R] * S^T [R x 8]
// for each kernel row and pair of rows; the eighth tap does not exist. The reduced channels are the outer loop, so that
// a fragment of R is loaded once. The sums begin with b. With 16 reduced channels the group's rows of S stay in
// registers for good. The weights are rounded to the storage type, as a convolution would write them. In the fragment,
// lane l has taps 2 (l % 4) and the next of pixel l / 4 in both rows. The band (../band.cuh) needs another pair of the
// same pixel, which two shuffles among the 4 lanes of the pixel bring (with stride 2 the pair is whole and one shuffle
// is enough). Then each row of X is loaded once and multiplied for all rows of Y that it leads to. Where a sum is not
// finite, the warp computes weights and sums again, one by one.
//
// A whole layer of one chunk makes R, too, from the rows of X in the ring:
//
//   R[n,r,p] = max(0, a[r] + sum over c of A[r,c] * X[n,c,p])
//
// A is R,C. It stays in shared memory, 144 bytes a row, with a in float behind it. The warps make R of the next step
// before they compute the current one: the ring has its pixels already (they lie `padding` rows and columns into its
// window), and R has two places, so that one barrier a step is enough. Only the first step of a stripe takes a second
// one. A warp has 2 rows of 8 pixels and every other 8 reduced channels: [2 rows x 8 pixels x 64 channels] * A^T. R is
// rounded to the storage type after ReLU, as in memory. An X that is not finite makes such an R, and that such weights.
//
// Limits, bytes: x, R/C of x, y once: 2.25 elements a channel and pixel with R = C/4, where `mma` and the convolution
// before it move 5.06 + 3.06 + 0.25. X comes 1.5 times from the L2 cache, since stripes have halos. Then shared memory:
// for 4 rows of 8 pixels of a group at stride 1, 10 ldmatrix of 4 cycles for X; 2 for R, 3.5 for S and 14 HMMA for each
// 16 reduced channels; 28 HMMA and 28 shuffles. With R = 16 these are 460 instructions, counted in the PTX with all
// that surrounds them, of which 42 are HMMA.
#pragma once

#include "span.cuh"

namespace pyinvolution::cuda::fused {

// Aligned: vectors of 8 elements of x, reduced and y can be moved at once. Layer: `reduced` is A, and reduce_bias a.
template <class C, bool Aligned, bool Layer, class T>
__global__ void __launch_bounds__(C::threads, C::blocks)
    forward(StripeParams q, Span span, const T* __restrict__ x, const T* __restrict__ reduced,
            const T* __restrict__ reduce_bias, const T* __restrict__ weight, const T* __restrict__ bias,
            const float* __restrict__ scale, const float* __restrict__ shift, T* __restrict__ y) {
  using Ring = typename C::Ring;
  constexpr bool held = C::Reduced == 16 && keeps_many_registers;  // the group's rows of S, and what sums begin with
  constexpr int S = C::S, row_bytes = C::positions * Ring::pitch, step_pixels = C::Rows * C::Columns;
  const int reduced_channels = C::Reduced > 0 ? C::Reduced : span.reduced, pitch = Span::pitch(reduced_channels);
  const int half_bytes = step_pixels * pitch;  // R of a step
  char* const ring = shared_memory();
  char* const pixels = ring + Ring::bytes;
  char* const span_rows = pixels + 2 * half_bytes;
  char* const reduce_rows = span_rows + (held ? 0 : chunk_groups * taps * pitch);

  const int first_group = int(blockIdx.x % unsigned(q.chunks)) * chunk_groups;
  const int run = int(blockIdx.x / unsigned(q.chunks));
  const int groups = min(chunk_groups, q.groups - first_group), first_tap = first_group * taps;
  const int begin = int(int64_t{q.all_steps} * run / q.runs), end = int(int64_t{q.all_steps} * (run + 1) / q.runs);
  const int first = begin / q.steps;  // of the stripes of all images
  int step = begin - first * q.steps, n = first / q.stripes, stripe = first - n * q.stripes;
  const auto next_stripe_of = [&](int& image, int& of_image) {
    if (++of_image == q.stripes) of_image = 0, ++image;
  };
  const auto copy = [](char* to, const T* from, bool valid) {
    if constexpr (Aligned) {
      copy_async<16>(to, from, valid);
    } else {
#pragma unroll 1
      for (int e = 0; e < 8; ++e) {
        T value;
        store(0.0f, &value);
        if (valid) value = from[e];
        reinterpret_cast<T*>(to)[e] = value;
      }
    }
  };

  // A thread's vectors of a batch of X. `from` is the channel's first column in the batch that comes next.
  const int thread = int(threadIdx.x), position = thread / 8, channel = thread % 8 * 8;
  int offsets[C::copies];
#pragma unroll
  for (int i = 0; i < C::copies; ++i) {
    const int at = position + i * (C::threads / 8);
    offsets[i] = kept(at / C::positions * q.x.h + at % C::positions * q.x.w);
  }
  char* first_to = ring + Ring::at(0, position, channel);
  if constexpr (Aligned) first_to = kept(first_to);
  const T* from = nullptr;
  uint32_t inside = 0;  // a bit for each copy: whether its column is in the image
  const auto enter_stripe = [&](int image, int of_image, int batch) {
    const int first_row = batch * C::batch - q.padding_h, first_column = of_image * C::Columns * S - q.padding_w;
    from = x + (image * q.x.n + int64_t{first_row} * q.x.h +
                (first_column * q.x.w + first_group * group_channels + channel));
    inside = 0;
#pragma unroll
    for (int i = 0; i < C::copies; ++i) {
      const int v = first_column + (position + i * (C::threads / 8)) % C::positions;
      inside |= unsigned(v) < unsigned(q.x_width) && channel < groups * group_channels ? 1u << i : 0u;
    }
  };
  const auto bring_batch = [&](int batch, int place) {
    // The positions of the batch whose rows are in the image are between two.
    const int first_row = batch * C::batch - q.padding_h, before = max(0, -first_row) * C::positions;
    const int count = max(0, min(C::batch, q.x_height - first_row) * C::positions - before);
    char* to = first_to + place;
#pragma unroll
    for (int i = 0; i < C::copies; ++i) {
      const int at = position - before + i * (C::threads / 8);
      copy(to + i * (C::threads * 16), from + offsets[i], (unsigned(at) < unsigned(count)) & (inside >> i & 1));
    }
    from += int64_t{C::batch} * q.x.h;
  };
  // Of R a thread brings the same vector of every at_once-th pixel.
  const int vectors = reduced_channels / 8, at_once = C::threads / vectors;
  const auto bring_reduced = [&](int half, int image, int of_image, int of_stripe) {
    const int own = opaque(thread), own_pixel = own / vectors, own_vector = (own - own_pixel * vectors) * 8;
    const int first_row = of_stripe * C::Rows, first_column = of_image * C::Columns;
    const T* base = reduced + (image * span.reduced_n + int64_t{first_row} * span.reduced_h +
                               (first_column * span.reduced_w + own_vector));
    char* to_half = pixels + half * half_bytes + own_vector * 2;
    const auto bring = [&](int i) {
      const int h = i / C::Columns, v = i % C::Columns;
      copy(to_half + i * pitch, base + (h * span.reduced_h + v * span.reduced_w),
           first_row + h < q.y_height && first_column + v < q.y_width);
    };
    if constexpr (C::Reduced > 0) {
      constexpr int pixels_at_once = C::threads / (C::Reduced / 8);
#pragma unroll
      for (int i = 0; i < step_pixels; i += pixels_at_once)
        if (own_pixel < pixels_at_once && i + own_pixel < step_pixels) bring(i + own_pixel);
    } else if (own_pixel < at_once) {
#pragma unroll 1
      for (int i = own_pixel; i < step_pixels; i += at_once) bring(i);
    }
  };
  if constexpr (!held)
    bring_rows<C::warps>(span_rows, pitch, weight + int64_t{first_tap} * span.row, groups * taps, reduced_channels,
                         span.row_vector, [&](int i) { return i * span.row; });
  if constexpr (Layer) {
    // Beside the channels there are zeros, as in the ring.
    constexpr int pieces = chunk_channels / 8;
#pragma unroll 1
    for (int piece = thread; piece < reduced_channels * pieces; piece += C::threads) {
      const int row = piece / pieces, from_channel = piece % pieces * 8;
      copy_piece(reduce_rows + row * C::reduce_pitch + from_channel * 2,
                 reduced + (int64_t{row} * span.reduce_row + from_channel), from_channel < groups * group_channels,
                 span.reduce_vector);
    }
    // Pairs of a lie behind every other row of A.
#pragma unroll 1
    for (int r = thread; r < reduced_channels; r += C::threads)
      *reinterpret_cast<float*>(reduce_rows + r / 2 * 2 * C::reduce_pitch + Ring::pitch + r % 2 * 4) =
          reduce_bias != nullptr ? load(reduce_bias[r]) : 0.0f;
  } else {
    bring_reduced(0, n, stripe, step);
  }

  const int lane = thread % 32, warp = thread / 32, group = warp % chunk_groups, strip = warp / chunk_groups;
  const int pixel = lane / 4, t = lane % 4, matrix = lane / 8, i = lane % 8;
  const int own_tap = first_tap + (group < groups ? group : 0) * taps;
  const Pair pair = Pair::of_lane<C>(lane, 0);
  const uint32_t mask = pair.mask<K>();
  uint32_t masks[C::fragments];
#pragma unroll
  for (int f = 0; f < C::fragments; ++f) masks[f] = pair.fragment == f ? mask : 0;
  // Which lanes of the pixel have the taps of the pair, and how they are put together.
  const bool odd = S == 1 && pixel % 2 == 1;
  const int high_lane = kept((lane & ~3) | ((pair.low + 1) / 2 & 3));
  const int low_lane = odd ? kept((lane & ~3) | ((pair.low - 1) / 2 & 3)) : high_lane;
  const uint32_t halves = kept(odd ? 0x1054 : 0x5410);  // of the first row, those of the second are two bytes on

  // The eighth tap repeats the seventh; the masks leave it out.
  int biases[K];  // pairs
  float first_sums[K][4];
#pragma unroll
  for (int kh = 0; kh < K; ++kh) {
    float two[2] = {};
#pragma unroll
    for (int side = 0; side < 2; ++side)
      if (bias != nullptr) two[side] = load(bias[own_tap + kh * K + min(2 * t + side, K - 1)]);
    biases[kh] = int(pack<T>(two[0], two[1]));
#pragma unroll
    for (int e = 0; e < 4; ++e) first_sums[kh][e] = kept(two[e % 2]);
  }
  uint32_t own_span[K][2];
  if constexpr (held) {
#pragma unroll
    for (int kh = 0; kh < K; ++kh) {
      const T* row = weight + (int64_t{own_tap + kh * K + min(pixel, K - 1)} * span.row + 2 * t);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const Vector<2, T> two{{row[c * 8], row[c * 8 + 1]}};
        memcpy(&own_span[kh][c], &two, sizeof two);
      }
    }
  }
  Positions<C, Ring> positions(ring, group, strip, 0, lane);
  positions.row = kept(positions.row);
  const char* pixel_row = kept(pixels + (matrix % 2 * C::Columns + strip * 8 + i) * pitch + matrix / 2 * 16);
  const char* tap_rows =
      span_rows + ((group < groups ? group : 0) * taps + matrix / 2 * K + min(i, K - 1)) * pitch + matrix % 2 * 16;
  T* out = nullptr;  // of the lane, in the first row of the step
  const auto enter_out = [&] {
    const int own_channel = Aligned ? t % 2 * 8 + t / 2 * 4 : 0;
    out = y +
          (n * q.y.n + int64_t{step} * C::Rows * q.y.h +
           ((stripe * C::Columns + strip * 8 + pixel) * q.y.w + (first_group + group) * group_channels + own_channel));
  };
  enter_out();

  // Where the step's first batch and its R are, and how many of its batches have come.
  int base = 0, half = 0, have = 0;
  const auto batch_after = [](int at, int count) {
    at += count * C::batch_bytes;
    return at < C::depth * C::batch_bytes ? at : at - C::depth * C::batch_bytes;
  };

  // Of a layer's R a warp makes every makers-th 8 channels of 2 rows of 8 pixels: [2 rows x 8 pixels] x [64 channels]
  // of X, times A^T. Where a thread finds A and puts R is kept, if there are registers for it.
  struct Making {
    int row, pixel;
  };
  constexpr int tiles = C::pairs * C::strips, makers = C::warps / tiles;
  static_assert(C::warps % tiles == 0 && C::Reduced / 8 % makers == 0, "");
  const auto making_of = [&](unsigned own) {
    const unsigned in_warp = own % 32, of_pair = own / 32 % C::pairs, of_strip = own / 32 % tiles / C::pairs;
    const unsigned first_channel = own / 32 / tiles * 8;
    const unsigned of_pixel = 2 * of_pair * C::Columns + of_strip * 8 + in_warp / 4;
    return Making{int((first_channel + in_warp % 8) * C::reduce_pitch + in_warp / 8 * 16),
                  int(of_pixel * unsigned(pitch) + (first_channel + in_warp % 4 * 2) * 2)};
  };
  Making making = making_of(unsigned(thread));
  if constexpr (Layer && keeps_many_registers) making = {kept(making.row), kept(making.pixel)};
  // R of the step that comes `ahead` after the one whose first batch is at `base`.
  const auto make_reduced = [&](int to, int ahead) {
    const unsigned own = unsigned(opaque(thread)), of_pair = own / 32 % C::pairs,
                   of_strip = own / 32 % tiles / C::pairs;
    const unsigned x_row = unsigned(ahead * C::Rows + q.padding_h) + 2 * of_pair + own / 8 % 2;
    const unsigned column = unsigned(q.padding_w) + of_strip * 8 + own % 8;
    const int place = batch_after(base + Ring::at(int(x_row), int(column), int(own / 16 % 2 * 8)), 0);
    const Making of = keeps_many_registers ? making : making_of(own);
    uint32_t a[chunk_groups][4];
#pragma unroll
    for (int g = 0; g < chunk_groups; ++g) load_matrices(a[g], ring + (place ^ g * group_channels * 2));
    char* const to_half = pixels + to * half_bytes + of.pixel;
    const char* const of_row = reduce_rows + of.row;
    const unsigned first_two = own / 32 / tiles * 8 + own % 4 * 2;
    const char* const of_bias = reduce_rows + int(first_two * C::reduce_pitch + Ring::pitch);
    const auto make = [&](int c) {
      const auto two = *reinterpret_cast<const Vector<2, float>*>(of_bias + c * C::reduce_pitch);
      float sums[4] = {two.v[0], two.v[1], two.v[0], two.v[1]};
#pragma unroll
      for (int g = 0; g < chunk_groups; g += 2) {
        uint32_t b[4];
        load_matrices(b, of_row + c * C::reduce_pitch + g * group_channels * 2);
        multiply<T>(sums, a[g], {b[0], b[1]});
        multiply<T>(sums, a[g + 1], {b[2], b[3]});
      }
#pragma unroll
      for (float& sum : sums) sum = sum < 0.0f ? 0.0f : sum;  // a NaN stays a NaN
#pragma unroll
      for (int r = 0; r < 2; ++r)
        *reinterpret_cast<uint32_t*>(to_half + r * C::Columns * pitch + c * 2) = pack<T>(sums[2 * r], sums[2 * r + 1]);
    };
    if constexpr (C::Reduced > 0) {
#pragma unroll
      for (int c = 0; c < C::Reduced; c += 8 * makers) make(c);
    } else {
#pragma unroll 1
      for (int c = 0; c + warp / tiles * 8 < reduced_channels; c += 8 * makers) make(c);
    }
  };
  enter_stripe(n, stripe, step);
#pragma unroll 1
  for (int s = begin; s < end; ++s) {
    if (have < C::live) {  // at the beginning of a stripe
      if (s > begin) __syncthreads();
#pragma unroll 1
      for (; have < C::live; ++have) bring_batch(step + have, batch_after(base, have));
      commit_copies();
    }
    wait_for_copies<0>();
    __syncthreads();
    if constexpr (Layer) {
      if (step == 0 || s == begin) {  // nobody has made the first R of a stripe
        make_reduced(half, 0);
        __syncthreads();
      }
    }
    const int own_column = stripe * C::Columns + strip * 8, own_row = step * C::Rows;
    const bool last = ++step == q.steps;
    if (last) step = 0, next_stripe_of(n, stripe);
    if (s + 1 < end) {
      if (last) {
        enter_stripe(n, stripe, 0);
#pragma unroll 1
        for (int batch = 0; batch < C::Ahead; ++batch) bring_batch(batch, batch_after(base, C::live + batch));
      } else {
        bring_batch(step + C::live - 1, batch_after(base, C::live));
      }
      if constexpr (!Layer) bring_reduced(half ^ 1, n, stripe, step);
      commit_copies();
    }
    if constexpr (Layer) {
      if (s + 1 < end && !last) make_reduced(half ^ 1, 1);
    }

    if (group < groups && own_column < q.y_width) {
      uint32_t weights[K][C::pairs][2];
      {
        float w[K][C::pairs][4];
        const auto add = [&](int kh, bool first, const uint32_t (&r)[C::pairs][4], uint32_t low, uint32_t high) {
          const uint32_t b[2] = {low, high};
          float sums[4];
          if (first) {
            // There are registers for all first sums only where little else is held.
            Vector<2, T> two;
            const int bits = held ? 0 : opaque(biases[kh]);
            memcpy(&two, &bits, sizeof two);
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[e] = held ? first_sums[kh][e] : load(two.v[e % 2]);
          }
#pragma unroll
          for (int j = 0; j < C::pairs; ++j) {
            if (first) {
              multiply<T>(w[kh][j], r[j], b, sums);
            } else {
              multiply<T>(w[kh][j], r[j], b);
            }
          }
        };
        // 16 reduced channels, from c on.
        const auto add_channels = [&](int c, bool first) {
          uint32_t r[C::pairs][4];
#pragma unroll
          for (int j = 0; j < C::pairs; ++j)
            load_matrices(r[j], pixel_row + half * half_bytes + 2 * j * C::Columns * pitch + c * 2);
          if constexpr (held) {
#pragma unroll
            for (int kh = 0; kh < K; ++kh) add(kh, first, r, own_span[kh][0], own_span[kh][1]);
          } else {
            const char* tap_row = tap_rows + c * 2;
#pragma unroll
            for (int kh = 0; kh + 1 < K; kh += 2) {
              uint32_t b[4];
              load_matrices(b, tap_row + kh * K * pitch);
              add(kh, first, r, b[0], b[1]);
              add(kh + 1, first, r, b[2], b[3]);
            }
            uint32_t b[2];
            load_matrices(b, tap_row + (K - 1) * K * pitch);
            add(K - 1, first, r, b[0], b[1]);
          }
        };
        add_channels(0, true);
        if constexpr (C::Reduced > 0) {
#pragma unroll
          for (int c = 16; c < C::Reduced; c += 16) add_channels(c, false);
        } else {
#pragma unroll 1
          for (int c = 16; c < reduced_channels; c += 16) add_channels(c, false);
        }
#pragma unroll
        for (int kh = 0; kh < K; ++kh) {
#pragma unroll
          for (int j = 0; j < C::pairs; ++j) {
            const float (&own)[4] = w[kh][j];
            if constexpr (S == 1) {
              weights[kh][j][0] = __shfl_sync(~0u, pack<T>(own[0], own[2]), high_lane);
              weights[kh][j][1] = __shfl_sync(~0u, pack<T>(own[1], own[3]), low_lane);
            } else {
              weights[kh][j][0] = __shfl_sync(~0u, pack<T>(own[0], own[1]), low_lane);
              weights[kh][j][1] = __shfl_sync(~0u, pack<T>(own[2], own[3]), low_lane);
            }
          }
        }
      }

      float sums[C::Rows][4] = {};
#pragma unroll
      for (int batch = 0; batch < C::live; ++batch) {
        Positions<C, Ring> rows = positions;
        rows.row += batch_after(base, batch);
#pragma unroll
        for (int k = 0; k < C::batch; ++k) {
          const int x_row = batch * C::batch + k;
          if (x_row >= C::x_rows) continue;
          uint32_t a[4], a_last[2];
          rows.template load<true>(a, a_last, k);
#pragma unroll
          for (int r = 0; r < C::Rows; ++r) {
            const int kh = x_row - r * S;
            if (kh < 0 || kh >= K) continue;
            const uint32_t (&two)[2] = weights[kh][r / 2];
            const uint32_t band = S == 1 ? __byte_perm(two[0], two[1], halves + (r % 2 == 0 ? 0 : 0x2222)) : two[r % 2];
            const uint32_t b[2] = {band & masks[0], band & masks[1]};
            multiply<T>(sums[r], a, b);
            if constexpr (C::fragments > 2) {
              const uint32_t b_last[1] = {band & masks[2]};
              multiply<T>(sums[r], a_last, b_last);
            }
          }
        }
      }

      if (!all_finite<C::Rows>(sums)) {
        const char* step_rows = pixels + half * half_bytes;
#pragma unroll
        for (int r = 0; r < C::Rows; ++r) {
          float again[4] = {};
#pragma unroll 1
          for (int tap = 0; tap < taps; ++tap) {
            const T* row = weight + int64_t{own_tap + tap} * span.row;
            const float start = bias != nullptr ? load(bias[own_tap + tap]) : 0.0f;
            const int x_row = r * S + tap / K;
            const char* image = ring + batch_after(base, x_row / C::batch) + x_row % C::batch * row_bytes;
#pragma unroll
            for (int side = 0; side < 2; ++side) {
              const int v = strip * 8 + t * 2 + side;
              const float factor = weight_of<T>(step_rows + (r * C::Columns + v) * pitch,
                                                reinterpret_cast<const char*>(row), start, reduced_channels);
#pragma unroll
              for (int side_of_group = 0; side_of_group < 2; ++side_of_group)
                again[2 * side_of_group + side] +=
                    factor *
                    load(*reinterpret_cast<const T*>(
                        image + Ring::at(0, v * S + tap % K, group * group_channels + pixel + side_of_group * 8)));
            }
          }
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[r][e] = again[e];
        }
      }

      if (span.epilogue) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int own_channel = (first_group + group) * group_channels + pixel + e * 8;
          const float factor = scale[own_channel], offset = shift[own_channel];
#pragma unroll
          for (int r = 0; r < C::Rows; ++r) {
#pragma unroll
            for (int side = 0; side < 2; ++side) sums[r][2 * e + side] = sums[r][2 * e + side] * factor + offset;
          }
        }
      }
      if (span.relu) {
#pragma unroll
        for (int r = 0; r < C::Rows; ++r) {
#pragma unroll
          for (float& sum : sums[r]) sum = sum < 0.0f ? 0.0f : sum;  // a NaN stays a NaN
        }
      }
#pragma unroll
      for (int r = 0; r < C::Rows; ++r, out += q.y.h) {
        const bool valid = own_column + pixel < q.y_width && own_row + r < q.y_height;
        const uint32_t low = transpose_matrix(pack<T>(sums[r][0], sums[r][1]));
        const uint32_t high = transpose_matrix(pack<T>(sums[r][2], sums[r][3]));
        if constexpr (Aligned) {
          const Vector<2, uint32_t> four = four_channels(low, high);
          if (valid) *reinterpret_cast<Vector<2, uint32_t>*>(out) = four;
        } else {
          put_channels(out, valid, 1, low, high);
        }
      }
    }

    base = batch_after(base, last ? C::live : 1), half ^= 1;
    if (last) have = C::Ahead, enter_out();
  }
}

}  // namespace pyinvolution::cuda::fused
