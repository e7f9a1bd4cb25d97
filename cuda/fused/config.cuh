// The sizes of `fused`'s tiles, what its kernels are told besides KernelParams, and what it takes.
#pragma once

#include "../band.cuh"

namespace pyinvolution::cuda::fused {

constexpr bool takes(DType dtype) { return dtype == DType::f16 || dtype == DType::bf16; }

constexpr int K = 7, taps = K * K;

// The reduced channels R and the span weights S.
struct Span {
  int reduced;        // R, a multiple of 16
  int64_t reduced_n;  // strides, in elements
  int reduced_h, reduced_w, row;
  int reduced_vector, row_vector;  // elements that can be moved at once, 8 or 1
  bool epilogue, relu;

  // Bytes of a pixel or a tap in shared memory: eight of them have their 16-byte pieces in different banks.
  static __host__ __device__ int pitch(int reduced) { return reduced * 2 + 16; }
  __host__ __device__ int pitch() const { return pitch(reduced); }
};

// How the blocks of the forward kernel walk.
struct StripeParams {
  int groups, chunks;
  int x_height, x_width, y_height, y_width;
  int padding_h, padding_w;
  int stripes, steps;   // of an image, and of a stripe
  int runs, all_steps;  // blocks and steps of a chunk of groups; block i takes the i-th of `runs` equal parts
  View x, y;
};

// A step is Rows x Columns pixels of Y, for which Rows * S more rows of X come, a batch. In the last step of a stripe,
// the first Ahead batches of the next one come. Reduced is the number of reduced channels, or 0 for any.
template <int S_, int Rows_, int Columns_, int Reduced_, int Ahead_>
struct StripeConfig {
  static constexpr int K = fused::K, S = S_, Rows = Rows_, Columns = Columns_;
  static constexpr int Reduced = Reduced_, Ahead = Ahead_;
  static constexpr int pairs = Rows / 2, strips = Columns / 8, warps = chunk_groups * strips, threads = 32 * warps;
  static constexpr int blocks = Columns == 8 ? 3 : 2;  // that registers are left for, on a multiprocessor
  static constexpr int fragments = S + 1;              // of 8 positions each, below a strip
  static constexpr int positions = S * Columns + 8, x_rows = (Rows - 1) * S + K;
  static constexpr int batch = Rows * S, live = (x_rows + batch - 1) / batch, depth = live + Ahead;  // batches
  static constexpr int copies = batch * positions * 8 / threads;                                     // of a thread
  static_assert(batch * positions * 8 % threads == 0 && Ahead <= live, "");
  using Ring = Image<depth * batch, positions, true>;
  static constexpr int batch_bytes = batch * positions * Ring::pitch;
  static int bytes(int reduced) {
    return Ring::bytes + (2 * Rows * Columns + chunk_groups * taps) * Span::pitch(reduced);
  }
};

// Calls `body` with the configuration for a problem, and whether it is the one for tensors that cannot be moved in
// vectors.
template <class Body>
auto with_stripe_config(const SpanProblem& p, bool aligned, const Body& body) {
  constexpr std::true_type yes;
  constexpr std::false_type no;
  if (p.involution.stride_h == 2)
    return aligned ? body(StripeConfig<2, 2, 8, 0, 1>{}, yes) : body(StripeConfig<2, 2, 8, 0, 1>{}, no);
  if (!aligned) return body(StripeConfig<1, 2, 8, 0, 1>{}, no);
  if (p.reduced == 16) return body(StripeConfig<1, 4, 16, 16, 3>{}, yes);
  if (p.reduced == 32) return body(StripeConfig<1, 4, 16, 32, 3>{}, yes);
  if (p.reduced == 48) return body(StripeConfig<1, 4, 16, 48, 1>{}, yes);
  if (p.reduced == 64) return body(StripeConfig<1, 4, 16, 64, 1>{}, yes);
  if (p.reduced < 128) return body(StripeConfig<1, 4, 8, 0, 1>{}, yes);
  return body(StripeConfig<1, 2, 8, 0, 1>{}, yes);
}

// Where the warps of grad_input walk.
struct WalkParams {
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

// A block works on Tiles x 16 reduced channels.
template <int S_, int Tiles_>
struct SpanConfig : TileConfig<K, S_, S_ == 1 ? 8 : 4, 8, 8> {
  using Base = TileConfig<K, S_, S_ == 1 ? 8 : 4, 8, 8>;
  static constexpr int Tiles = Tiles_, part = 16 * Tiles, pixels = Base::Rows * 8;
  using Input = Image<Base::x_rows, Base::x_columns, true>;
  using Output = Image<Base::Rows, 8, true>;
  // A kernel row has 8 slots, the last without a tap: [pixel][slot] and [slot][reduced channel].
  static constexpr int group_slots = 8 * K, slots = chunk_groups * group_slots;
  static constexpr int slot_pitch = slots * 2 + 16, part_pitch = part * 2 + 16;
  static constexpr int gradients = Input::bytes;  // of W, and before them the tile of G
  static constexpr int reduced = gradients + pixels * slot_pitch;
  // At the end the sums of dS, in floats, [slot][reduced channel], and those of db are here; until they have been read,
  // only memory from `rows` on may be written.
  static constexpr int copies = Tiles > 1 ? 1 : 2, sum_pitch = part + 4;
  static constexpr int sums_bytes = (copies * sum_pitch + 2) * slots * 4, tile_bytes = reduced + pixels * part_pitch;
  static constexpr int rows = sums_bytes > tile_bytes ? sums_bytes : tile_bytes;
  static constexpr int bytes = rows + slots * part_pitch;
  static_assert(Output::bytes <= pixels * slot_pitch && bytes <= max_shared_bytes, "");
};

inline int parts_of(int64_t reduced) { return int((reduced + 63) / 64); }

// One run of tiles for each block that the GPU can hold at once: two per multiprocessor.
template <class C>
Partial partial_of(const SpanProblem& p) {
  const Problem& q = p.involution;
  Partial partial{};
  partial.parts = parts_of(p.reduced);
  partial.tiles = int(q.batch * ((q.out_h + C::Rows - 1) / C::Rows) * ((q.out_w + 7) / 8));
  partial.stripes = std::max(1, std::min(partial.tiles, 2 * multiprocessors() / partial.parts));
  partial.stripe = p.span_rows() * (p.reduced + 1);
  return partial;
}

// Floats of the stripes' sums, rounded up so that what follows is aligned.
inline int64_t span_floats(const Partial& partial) { return (partial.stripes * partial.stripe + 3) / 4 * 4; }

// Launch the kernels for one dtype; instances/ has one file for each, so that they compile at the same time.
template <DType dtype>
void run_forward(const SpanProblem&, const SpanBuffers&, const Execution&);
template <DType dtype>
void run_backward(const SpanProblem&, const SpanBuffers&, const Execution&);

}  // namespace pyinvolution::cuda::fused
