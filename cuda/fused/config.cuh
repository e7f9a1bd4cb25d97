// The sizes of `fused`'s tiles, what its kernels are told besides KernelParams, and what it takes.
#pragma once

#include "../band.cuh"

namespace pyinvolution::cuda::fused {

constexpr bool takes(DType dtype) { return dtype == DType::f16 || dtype == DType::bf16; }

constexpr int K = 7, taps = K * K;

// The reduced channels R and the span weights S; in a layer, the weights A that R is made with.
struct Span {
  int reduced;        // R, a multiple of 16
  int64_t reduced_n;  // strides, in elements
  int reduced_h, reduced_w, row;
  int reduced_vector, row_vector;  // elements that can be moved at once, 8 or 1
  int reduce_row, reduce_vector;   // of A: a stride, and elements that can be moved at once
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

constexpr int layer_padding = 4;  // the largest one that a layer takes

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
  static constexpr int reduce_pitch = Ring::pitch + 16;  // of A in a layer, bytes; as Span::pitch
  static int bytes(int reduced, bool layer) {
    return Ring::bytes + (2 * Rows * Columns + chunk_groups * taps) * Span::pitch(reduced) +
           (layer ? reduced * reduce_pitch : 0);
  }
  // The rows of X that R of the next step of a stripe is made of are at hand up to this padding.
  static constexpr int most_padding = live * batch - 2 * Rows;
  static_assert(S != 1 || (most_padding >= layer_padding && Columns + layer_padding <= positions), "");
};

// Calls `body` with the configuration for a problem, and whether it is the one for tensors that cannot be moved in
// vectors.
template <bool Layer, class Body>
auto with_stripe_config(const SpanProblem& p, bool aligned, const Body& body) {
  constexpr std::true_type yes;
  constexpr std::false_type no;
  if constexpr (!Layer) {
    if (p.involution.stride_h == 2)
      return aligned ? body(StripeConfig<2, 2, 8, 0, 1>{}, yes) : body(StripeConfig<2, 2, 8, 0, 1>{}, no);
  }
  if (!aligned) return body(StripeConfig<1, 2, 8, 0, 1>{}, no);
  if (p.reduced == 16) return body(StripeConfig<1, 4, 16, 16, 3>{}, yes);
  if (p.reduced == 32) return body(StripeConfig<1, 4, 16, 32, Layer ? 1 : 3>{}, yes);
  if (p.reduced == 48) return body(StripeConfig<1, 4, 16, 48, 1>{}, yes);
  if constexpr (Layer) {
    return body(StripeConfig<1, 4, 8, 0, 1>{}, yes);
  } else {
    if (p.reduced == 64) return body(StripeConfig<1, 4, 16, 64, 1>{}, yes);
    if (p.reduced < 128) return body(StripeConfig<1, 4, 8, 0, 1>{}, yes);
    return body(StripeConfig<1, 2, 8, 0, 1>{}, yes);
  }
}

// The block of grad_input with stride 1: a warp for each tile of 8 pixels of each group.
struct WalkLayout {
  static constexpr int rows = 2, depth = 4;  // rows of G at a time, and how many such pairs are in the ring
  static constexpr int most_threads = 512;   // 128 registers each
  static constexpr int slots = 8 * K;        // of a group: kernel rows have 8, the last without a tap
  int groups, tiles;                         // 2 or 4 groups

  __host__ __device__ int warps() const { return groups * tiles; }
  __host__ __device__ int pixels() const { return 8 * tiles; }
  __host__ __device__ int position_bytes() const { return groups * group_channels * 2; }
  __host__ __device__ int ring_bytes() const { return depth * rows * pixels() * position_bytes(); }
  // A piece of 8 channels of G; those of 8 neighbours are in different banks.
  __host__ __device__ int at(int position, int piece) const {
    return position * position_bytes() + (piece ^ (groups == 4 ? position & 7 : position >> 1 & 3)) * 16;
  }
  int bytes(int reduced) const {
    const int biases = groups * (K + 1) / 2 * 8 * 8, moves = warps() * 32 * 32;
    return ring_bytes() + (depth * rows * pixels() + groups * slots + 8) * Span::pitch(reduced) +
           (warps() + groups) * rows * 32 * 16 + biases + moves;
  }
  // Blocks next to each other that cover `wanted` tiles; each begins with the last tile of the one before.
  int64_t blocks(int64_t wanted) const { return wanted <= tiles ? 1 : 1 + (wanted - 2) / (tiles - 1); }

  // As many tiles as are needed, or as fit, so that as few as possible are computed twice.
  static WalkLayout of(int64_t groups, int64_t width, int reduced) {
    const int64_t wanted = (width + 7) / 8;
    WalkLayout best{0, 0};
    for (const int at_once : {4, 2}) {
      for (int tiles = 1; at_once * tiles * 32 <= most_threads && tiles <= wanted; ++tiles) {
        const WalkLayout layout{at_once, tiles};
        if (layout.bytes(reduced) > max_shared_bytes || (tiles == 1 && wanted > 1)) continue;
        const auto cost = [&](const WalkLayout& l) {
          return l.blocks(wanted) * l.tiles * l.groups * ((groups + l.groups - 1) / l.groups);
        };
        if (best.groups == 0 || cost(layout) < cost(best)) best = layout;
      }
    }
    return best;
  }
};

// Where the warps of grad_input walk.
struct WalkParams {
  int groups, chunks;
  int height, width;          // of dX
  int out_height, out_width;  // of G
  int padding_h, padding_w;
  int columns, segments, rows;  // blocks of columns, parts of the height and the rows of one
  Division by_chunks, by_columns, by_segments;
  WalkLayout layout;  // with stride 1
  View y, x;          // G and dX
};

// The block of grad_input with stride 2.
struct StridedWalk {
  static constexpr int S = 2, warps = 8, threads = 32 * warps, strips = 2;
  static constexpr int pixels = (strips - 1) * 4 + 8;
  static constexpr int depth = 4;     // rows in the ring
  static constexpr int live = K - S;  // rows of dX that the next row of G adds to
  using Ring = Image<depth, pixels, true>;
  static int bytes(int reduced) { return Ring::bytes + (depth * pixels + chunk_groups * taps) * Span::pitch(reduced); }
};

// Sums over runs of steps, in float. The run of a stripe has `steps` steps, those of the first `longer` ones one more.
struct Partial {
  float* span;                   // [stripe][49 G][R]
  float* bias;                   // [stripe][49 G]
  float* reduced;                // of dR in tiles, where there is more than one chunk
  int64_t span_size, bias_size;  // of one stripe
  int stripes, parts;            // parts of the reduced channels, 1 or 2
  int steps, longer;
  int64_t grad_n;  // strides of dR
  int grad_h, grad_w, grad_vector;
};

// A block works on Tiles x 16 reduced channels and walks down the images, Rows x Columns pixels of G at a time. A unit is
// 2 x 8 of them; with stride 1, units go down first. Each of two sides of the warps has `pairs` units.
template <int S_, int Tiles_>
struct SpanConfig : TileConfig<K, S_, 4, S_ == 1 ? 16 : 8, 8> {
  using Base = TileConfig<K, S_, 4, S_ == 1 ? 16 : 8, 8>;
  static constexpr int Tiles = Tiles_, part = 16 * Tiles, pixels = Base::Rows * Base::Columns;
  static constexpr int units = pixels / 16, pairs = units / 2, span_tiles = Tiles > 2 ? Tiles / 2 : Tiles;
  static __host__ __device__ constexpr int row_of(int unit) { return unit % 2 * 2; }
  static __host__ __device__ constexpr int column_of(int unit) { return unit / 2 * 8; }
  // X is in batches of 4 rows: so many are below a tile, are below the warp's rows, and are new in the next tile.
  static constexpr int live = (Base::x_rows + 3) / 4, own_batches = ((2 * pairs - 1) * S_ + K + 3) / 4;
  static constexpr int fresh = Base::Rows * S_ / 4;
  using Ring = Image<live * 4, Base::x_columns, true>;
  using Output = Image<Base::Rows, Base::Columns, true>;
  static constexpr int x_threads = Base::x_columns * 8;  // that bring X
  // Only what is new of X arrives.
  static constexpr bool walks = Tiles <= 2 || S_ == 1;
  // A kernel row has 8 slots, the last without a tap: rows of S are [slot][reduced channel].
  static constexpr int group_slots = 8 * K, slots = chunk_groups * group_slots, part_pitch = part * 2 + 16;
  static constexpr int operand_bytes = K * 2 * 32 * 4;  // dW of a unit and a group
  static constexpr int gradients = Ring::bytes, reduced = gradients + Output::bytes;
  static constexpr int rows = reduced + pixels * part_pitch, sums = rows + slots * part_pitch;
  static constexpr int walk = sums + (Tiles <= 2 ? units * Tiles * 2 * chunk_groups * 32 * 16
                                      : walks    ? 2 * chunk_groups * operand_bytes
                                                 : 0);
  static constexpr int turns = walk + 48, bytes = turns + 384;
  static __host__ __device__ constexpr int after(int slot, int batches) {
    return slot + batches < live ? slot + batches : slot + batches - live;
  }
  static_assert(units * chunk_groups * operand_bytes <= Ring::bytes && bytes <= max_shared_bytes, "");
  static_assert(chunk_groups * 32 * 4 * (4 + span_tiles * K * 4) <= reduced, "");
};

inline int parts_of(int64_t reduced) { return int((reduced + 63) / 64); }

// One run of steps for each block that the GPU can hold at once: two per multiprocessor.
template <class C>
Partial partial_of(const SpanProblem& p) {
  const Problem& q = p.involution;
  Partial partial{};
  partial.parts = parts_of(p.reduced);
  const int steps = int(q.batch * ((q.out_h + C::Rows - 1) / C::Rows) * ((q.out_w + C::Columns - 1) / C::Columns));
  partial.stripes = std::max(1, std::min(steps, 2 * multiprocessors() / partial.parts));
  partial.steps = steps / partial.stripes, partial.longer = steps % partial.stripes;
  partial.span_size = p.span_rows() * p.reduced, partial.bias_size = p.span_rows();
  return partial;
}

// Floats of the stripes' sums. 16 divides the first, and the second is rounded up, so that what follows is aligned.
inline int64_t span_floats(const Partial& partial) { return partial.stripes * partial.span_size; }
inline int64_t bias_floats(const Partial& partial) { return (partial.stripes * partial.bias_size + 3) / 4 * 4; }
template <class C>
int64_t reduced_floats(const Partial& partial, const SpanProblem& p) {
  const int64_t tiles = int64_t{partial.stripes} * partial.steps + partial.longer;
  return p.involution.groups > chunk_groups ? tiles * C::pixels * p.reduced : 0;
}

// Launch the kernels for one dtype; instances/ has one file for each, so that they compile at the same time.
template <DType dtype>
void run_forward(const SpanProblem&, const SpanBuffers&, const Execution&);
template <DType dtype>
void run_layer(const SpanProblem&, const SpanBuffers&, const Execution&);
template <DType dtype>
void run_backward(const SpanProblem&, const SpanBuffers&, const Execution&);

}  // namespace pyinvolution::cuda::fused
