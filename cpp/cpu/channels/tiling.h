// The `channels` variant of involution2d and the `fused` variant of span_involution2d: strategy, geometry and the
// functions compiled for each instruction set.
//
// Equations and shapes: pyinvolution/problem.h. A task is one image, a strip of output rows and some groups. Lanes are
// channels of a group, 16 a block: a weight is broadcast and serves the block, an x vector serves all taps of a row
// that see it. For each group a task
//
//   reduces   in a `layer`, pixels of X (means of cells) as [pixel][c] times A as [c][r], into the R that the strip
//   packs packs     the rows of X that the strip reads as [block][row][column][16], zero-padded, in the arithmetic type
//   weighs    a tile of pixels at a time: W as [tap][pixel], copied from memory (`channels`) or computed (`fused`):
//             S broadcast from where it lies, vectors along the pixels of R, packed once a strip as [vector][r][lane]
//   applies   the tile: 8 to 10 accumulators, for 5 columns (AVX2) 35 broadcasts + 11 x 2 loads a row of 7 taps for 70
//             FMA, so that FMA throughput is the limit
//   finishes  with scale, shift and ReLU in registers, in the layout of Y
//
// Where chunks of groups share a strip, its R is computed once, by a first round of tasks.
//
// A tile of W is 22 KB at 49 taps, hence never leaves the first two levels of cache. Backward recomputes it and turns
// the products round: grad_W as [tap][pixel] from X and grad_output as [channel][pixel], then with the same
// micro-kernels grad_R = S^T grad_W, grad_S = grad_W R^T and grad_X, gathered into padded rows of the strip. What
// strips and images share is summed in a fixed order after all tasks. Every order depends on the problem alone, hence
// the same bits for any number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "pyinvolution/problem.h"

namespace pyinvolution::cpu {

constexpr int64_t block_channels = 16;
constexpr int64_t tile_pixels =
    112;  // the pitch of a tile of weights: known when compiling, so that addresses need no registers

struct Channels {
  SpanProblem problem;  // reduced = 0: the weights are in memory, at w
  SpanBuffers buffers;
  const void* w;

  int64_t lanes;
  int64_t blocks;  // of a group
  int64_t height;  // rows of a strip
  int64_t strips;
  int64_t chunks;  // of groups

  // A tile is some whole rows, or where a row has more than tile_pixels some columns of one.
  int64_t tile_rows;
  int64_t tile_columns;

  int64_t packed_rows;     // of a strip of X
  int64_t packed_columns;  // of a row
  int64_t vectors;         // of pixels in a tile
  int64_t tiles;           // of a strip
  int64_t tile_floats() const { return vectors * lanes * problem.reduced; }

  // A layer: R is computed in slices of channels for each tile, by a first round of tasks where chunks share it.
  bool layer;
  int64_t slices;
  int64_t slice_vectors;
  int64_t reducing_tasks() const { return shared == nullptr ? 0 : problem.involution.batch * strips * tiles * slices; }
  int64_t shared_bytes;
  float* shared;  // [n][strip][tile] of R, packed; nullptr where each task computes its own

  // In floats from the start of a task's scratch memory; x is at 0.
  int64_t reduced_at, span_at, bias_at, weights_at, result_at, reduce_at, pooled_at, dense_at, staging_at;
  int64_t scratch_bytes;
};

// Geometry of a forward pass for vectors of `vector_bytes`.
Channels plan_channels(const SpanProblem&, const SpanBuffers&, const void* w, int64_t vector_bytes, int threads);

// With `reduce` a task of the first round.
using ChannelsTask = void (*)(const Channels&, bool reduce, int64_t task, void* scratch);

void channels_task_baseline(const Channels&, bool reduce, int64_t task, void* scratch);
void channels_task_avx2(const Channels&, bool reduce, int64_t task, void* scratch);
void channels_task_avx512(const Channels&, bool reduce, int64_t task, void* scratch);

// Backward: a task is some strips of images (a part) and some groups (a chunk). What parts (grad_S, grad_b) or chunks
// (grad_R) share is kept apart, and summed by a second round of tasks; both are then by the problem alone. While a
// group is computed, the rows of the next one are fetched: in channels_last memory a group's pixels are as far apart as
// all channels are wide, and waiting for them took as long as the arithmetic.
constexpr int64_t backward_columns = 96;  // of a row at a time, with zeros on either side of its weights:
constexpr int64_t backward_margin =
    (tile_pixels - backward_columns) / 2;  // a window of up to 9 columns reads past the row

// Output rows [begin, end), from which the gradients of W come, and rows of X, whose gradient comes from output rows
// [first, last): those of neighbours, too, whose weights are then computed twice.
struct BackwardStrip {
  int64_t begin, end, in_begin, in_end, first, last;
};

struct FusedBackward {
  SpanProblem problem;  // reduced = 0: the weights are in memory, at w, or their gradient goes to grad_w
  SpanBuffers buffers;
  const void* w;
  void* grad_w;

  int64_t lanes;
  int64_t blocks;
  int64_t parts, chunks;
  std::vector<BackwardStrip> strips;  // of an image
  int64_t height;                     // most output rows of a strip
  int64_t reduced_padded;             // R in whole vectors
  int64_t row_padded;                 // output columns in whole vectors

  // X as [row][channel][phase][column / stride].
  int64_t x_rows, x_channel, x_phase;
  int64_t grad_x_rows, rows;        // most rows of X, and most output rows [first, last), of a strip
  std::vector<int64_t> tap_offset;  // [kw] in a channel

  // In floats from the start of a task's scratch memory.
  int64_t x_at, grad_x_at, grad_reduced_at, panels_at, pixels_at, span_at, bias_at, weights_at, grad_weights_at,
      grad_y_at, grad_y_across_at, staging_at;
  int64_t scratch_bytes;

  float* shared;  // [parts] grad_S, [parts] grad_b, [chunks][n] grad_R where there are more chunks than one
  int64_t shared_bytes;
  float* span_part(int64_t part) const { return shared + part * problem.span_rows() * reduced_padded; }
  float* bias_part(int64_t part) const { return span_part(parts) + part * problem.span_rows(); }
  float* reduced_part(int64_t chunk, int64_t n) const {
    return bias_part(parts) +
           (chunk * problem.involution.batch + n) * problem.reduced * problem.involution.out_h * row_padded;
  }
};

FusedBackward plan_backward(const SpanProblem&, const SpanBuffers&, const void* w, void* grad_w, int64_t vector_bytes,
                            int threads);

// With `finish` a task of the second round.
using BackwardTask = void (*)(const FusedBackward&, bool finish, int64_t task, void* scratch);

void backward_task_baseline(const FusedBackward&, bool finish, int64_t task, void* scratch);
void backward_task_avx2(const FusedBackward&, bool finish, int64_t task, void* scratch);
void backward_task_avx512(const FusedBackward&, bool finish, int64_t task, void* scratch);

}  // namespace pyinvolution::cpu
