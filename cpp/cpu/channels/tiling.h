// The `channels` variant of involution2d and the `fused` variant of span_involution2d: how a problem is cut into tasks.
//
// Equations and shapes: pyinvolution/problem.h. A task is one image, a strip of output rows and some groups. The lanes
// of a vector are channels of a group, 16 to a block: a weight is broadcast to the block, and a vector of x serves all
// taps of a row that read it. For each group a task
//
//   reduces   in a `layer`, pixels of X (means of cells) as [pixel][c] times A as [c][r], into the R that the strip
//             packs
//   packs     the rows of X that the strip reads as [block][row][column][16], zero-padded, in the arithmetic type
//   weights   a tile of pixels at a time: W as [tap][pixel], copied from memory (`channels`) or computed (`fused`):
//             S broadcast from where it lies, vectors along the pixels of R, packed once per strip as [vector][r][lane]
//   applies   them to the tile. For 5 columns (AVX2) a row of 7 taps takes 35 broadcasts + 11 x 2 loads for 70 FMA; for
//             14 columns (AVX-512) 98 FMA, of which 70 broadcast a weight themselves, + 20 loads of x + 7 of four
//             weights: no more than a load for each FMA, so that FMA throughput is the limit
//   finishes  with scale, shift and ReLU in registers, in the layout of Y
//
// Where chunks of groups share a strip, its R is computed once, by a first round of tasks.
//
// A tile of W is 22 KB at 49 taps, so it never leaves the first two levels of cache. Backward computes it again and
// reverses the products: grad_W as [tap][pixel] from X and grad_output as [channel][pixel], then with the same
// micro-kernels grad_R = S^T grad_W, grad_S = grad_W R^T and grad_X, gathered into padded rows of the strip. Sums that
// strips and images share are added in a fixed order after all tasks. Every order depends only on the problem, so the
// bits are the same for any number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/shift.h"
#include "pyinvolution/problem.h"

namespace pyinvolution::cpu {

constexpr int64_t block_channels = 16;
// The pitch of a tile of weights: known at compile time, so that addresses need no registers.
constexpr int64_t tile_pixels = 112;

struct ChannelsTiling {
  SpanProblem problem;  // reduced = 0: the weights are in memory, at w
  SpanBuffers buffers;
  const void* w;

  // The loops of forward_pairs.inl, with R as pairs: half as many as floats, and of up to last_pixels pixels past the
  // last whole vector of a tile once more, each on its own.
  bool pairs;
  int64_t last_pixels;
  int64_t lanes;
  int64_t blocks;  // of a group
  int64_t height;  // rows of a strip
  int64_t strips;
  int64_t chunks;  // of groups

  // A tile is some whole rows, or where a row has more than tile_pixels some columns of one.
  int64_t tile_rows;
  int64_t tile_columns;

  int64_t packed_rows;     // of a strip of X
  int64_t packed_step;     // from one to the next in X; not 1 where pairs of tap rows begin at no row between them
  int64_t packed_columns;  // of a row
  int64_t vectors;         // of pixels in a tile
  int64_t tiles;           // of a strip
  // With a border that shifts: the columns of the i-th tile of a row are the runs [tile_runs[i], tile_runs[i + 1]).
  const WindowRun* runs;
  const int64_t* tile_runs;
  int64_t tile_floats;  // of R, of a tile

  // A layer: R is computed in slices of channels for each tile, by a first round of tasks where chunks share it.
  bool layer;
  int64_t slices;
  int64_t slice_vectors;
  int64_t shared_bytes;
  float* shared;  // [n][strip][tile] of R, packed; nullptr where each task computes its own

  // In floats from the start of a task's scratch memory; x is at 0.
  int64_t reduced_at, span_at, bias_at, weights_at, result_at, reduce_at, pooled_at, dense_at, staging_at;
  int64_t scratch_bytes;
};

// The memory that tilings point to; see ColumnsTables.
struct WindowTables {
  std::vector<WindowRun> runs;
  std::vector<int64_t> tile_runs;
};

// The tiling of a forward pass for vectors of `vector_bytes`, or for pairs of bfloat16. `tables` must outlive it.
ChannelsTiling make_channels_tiling(const SpanProblem&, const SpanBuffers&, const void* w, int64_t vector_bytes,
                                    bool pairs, int threads, WindowTables& tables);

// Backward: a task is some strips of images (a part) and some groups (a chunk). Each part has its own sums of grad_S
// and grad_b and each chunk its own of grad_R; a second round of tasks adds them up. The numbers of parts and chunks
// depend only on the problem. While a group is computed, the rows of the next one are fetched: in channels_last memory
// a group's pixels are as far apart as all channels are wide, and waiting for them took as long as the arithmetic.
//
// Backward works on 96 columns of a row at a time, with zeros on either side of their weights: a window of up to 9
// columns reads past the row.
constexpr int64_t backward_columns = 96;
constexpr int64_t backward_margin = (tile_pixels - backward_columns) / 2;
// Shorter rows begin after a whole vector, so that their weights are stored to whole cache lines.
constexpr int64_t aligned_margin = 16;
// The pitch of a tile of grad_W: its last row is written in whole vectors, and cache lines of neighbouring taps should
// not compete for the same places.
constexpr int64_t gradient_pitch = tile_pixels + 32;

// Pairs of bfloat16 (backward_pairs.inl) are for windows of up to max_pair_taps rows and columns without dilation, and for
// rows of up to tile_pixels columns: a row of weights has zeros on either side.
constexpr int64_t max_pair_taps = 15;
constexpr int64_t weight_margin = 16;
constexpr int64_t weight_row_pitch = tile_pixels + 2 * weight_margin;
// A tile of rows that follow each other, with the zeros of the border between them, has at most so many columns.
constexpr int64_t flat_columns = 256;

// Pairs of tap rows that read neighbouring rows of the output: tap rows i and i + stride.
[[gnu::always_inline]] inline int64_t pairs_of_tap_rows(const Problem& p) {
  int64_t pairs = 0;
  for (int64_t i = 0; i < p.stride_h && i < p.kernel_h; ++i)
    pairs += ((p.kernel_h - i + p.stride_h - 1) / p.stride_h + 1) / 2;
  return pairs;
}
// Columns [begin, end) of a phase of a padded row of X, which are those stride * m + phase, that are inside of X and that
// windows read.
[[gnu::always_inline]] inline int64_t flat_begin(const Problem& p, int64_t phase) {
  return p.padding_w <= phase ? 0 : (p.padding_w - phase + p.stride_w - 1) / p.stride_w;
}
[[gnu::always_inline]] inline int64_t flat_reach(const Problem& p, int64_t phase) {
  return p.kernel_w <= phase ? 0 : p.out_w + (p.kernel_w - 1 - phase) / p.stride_w;
}
[[gnu::always_inline]] inline int64_t flat_end(const Problem& p, int64_t phase) {
  const int64_t inside = p.in_w + p.padding_w - phase;
  const int64_t end = inside <= 0 ? 0 : (inside + p.stride_w - 1) / p.stride_w, reach = flat_reach(p, phase);
  return end < reach ? end : reach;
}

// A strip computes the gradients of W of the output rows [begin, end), and of X those of the rows [in_begin, in_end).
// The latter come from the output rows [first, last), which include rows of its neighbours: their weights are computed
// twice.
// Its gradients of W read the rows [x_begin, x_end) of X, or of the padding around it.
struct BackwardStrip {
  int64_t begin, end, in_begin, in_end, first, last, x_begin, x_end;
};

struct BackwardTiling {
  // The loops of backward_pairs.inl. X is [pair of channels][phases][row][column] then, with x_channel and x_phase in
  // pairs and rows of flat_row; weights and grad_Y of kept_rows rows of the output are kept.
  bool pairs;
  bool flat;  // vectors of pixels run from one row to the next
  int64_t flat_row, kept_rows;
  // Otherwise: products are those of pairs of bfloat16, where this is not nullptr. grad_W is rounded for them.
  void (*pair_product)(const PairProduct&);
  SpanProblem problem;  // reduced = 0: the weights are in memory, at w, or their gradient goes to grad_w
  SpanBuffers buffers;
  const void* w;
  void* grad_w;

  int64_t lanes;
  int64_t blocks;
  int64_t parts, chunks;
  const BackwardStrip* strips;  // of an image
  int64_t strip_count;
  int64_t height;          // most output rows of a strip
  int64_t reduced_padded;  // R in whole vectors
  int64_t row_padded;      // output columns in whole vectors

  // A tile is some whole rows, so that short rows share the vectors of products, or where they are long some columns of
  // one. In grad_R and R, the pixels of a tile of rows have `tile_pitch` places.
  int64_t tile_rows, tile_pitch;
  int64_t margin;                                                            // zeros before the weights of a row
  int64_t plane;                                                             // places of a strip, for one channel
  [[gnu::always_inline]] int64_t place(int64_t row, int64_t column) const {  // row of the strip
    return row / tile_rows * tile_pitch + row % tile_rows * problem.involution.out_w + column;
  }

  // X as [row][channel][phase][column / stride].
  int64_t x_rows, x_channel, x_phase;
  int64_t grad_x_rows;        // most rows of X of a strip
  const int64_t* tap_offset;  // [kw] in a channel

  // With a border that shifts, which only windows do that slide by a column (stride_w = 1): the runs of a tile's columns
  // as in ChannelsTiling, and the vectors of a row of the output. In the middle of a row windows lie as with a padding of
  // half a window, and that is `problem`'s padding_w here.
  const WindowRun* runs;
  const int64_t* tile_runs;
  const ShiftedVector* vectors;

  // In floats from the start of a task's scratch memory.
  int64_t x_at, grad_x_at, grad_reduced_at, panels_at, pixels_at, span_at, bias_at, weights_at, dense_at,
      span_across_at, rounded_at, rounded_across_at, grad_weights_at, grad_y_at, grad_y_across_at, bias_sums_at,
      staging_at;
  int64_t scratch_bytes;

  float* shared;  // [parts] grad_S, [parts] grad_b, [chunks][n][r][strip] grad_R where there are more chunks than one
  int64_t shared_bytes;
  [[gnu::always_inline]] float* span_part(int64_t part) const {
    return shared + part * problem.span_rows() * reduced_padded;
  }
  [[gnu::always_inline]] float* bias_part(int64_t part) const { return span_part(parts) + part * problem.span_rows(); }
  [[gnu::always_inline]] float* reduced_part(int64_t chunk, int64_t n) const {
    return bias_part(parts) + (chunk * problem.involution.batch + n) * problem.reduced * strip_count * plane;
  }
};

// The memory that a tiling points to; see ColumnsTables.
struct BackwardTables : WindowTables {
  std::vector<BackwardStrip> strips;
  std::vector<int64_t> tap_offset;
  std::vector<ShiftedVector> vectors;
};

// Whether a backward pass runs the loops of backward_pairs.inl.
bool backward_in_pairs(const SpanProblem&, const CpuKernels&);

// `tables` must outlive the tiling.
BackwardTiling make_backward_tiling(const SpanProblem&, const SpanBuffers&, const void* w, void* grad_w,
                                    const CpuKernels&, int threads, BackwardTables& tables);

// What the variants may refuse: the bytes of X that a strip of `height` output rows packs for a group, and those of the
// scratch memory of a backward strip. In double, since a product of sizes may pass 2^63.
double strip_input_bytes(const Problem&, int64_t height);
double backward_bytes(const SpanProblem&, int64_t height);
constexpr double max_backward_bytes = 64 << 20;

}  // namespace pyinvolution::cpu
