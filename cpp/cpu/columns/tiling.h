// The `columns` variant: how a problem is cut into tasks.
//
// Equation and shapes: pyinvolution/problem.h. The lanes of a vector are neighbouring output columns. A task is one
// image, some groups and a strip of rows. The tensor that the taps shift (X, or grad_output for grad_input) is packed
// into scratch memory in the arithmetic type, zero-padded, so that whatever its layout, dtype, stride, padding or
// dilation, the inner loops see vectors of neighbouring columns:
//
//   forward      y[c][p]  = sum over taps k     of  w[k][p] * x[c][s p + d k]          a vector of w serves all channels
//   grad_weight  gw[k][p] = sum over channels c of gy[c][p] * x[c][s p + d k]          a vector of gy serves 9 taps
//   grad_input   gx[c][q] = sum over taps k     of  w[k][p] * gy[c][p],  s p + d k = q a gather: each place is written
//                                                                                      by one thread
//
// Groups of few channels read far more of W than of anything else: N G K^2 Ho Wo elements for C/G products each, so the
// limit is the memory that W comes from or goes to, and its order is that of the loops:
//
//   in place     Columns of W are neighbours (NCHW). Then each tap of a strip is a run of memory, and a processor
//                follows only a few runs at a time. So the taps are outside and the strip's rows inside: up to 9 taps
//                at once, K of a row where they are that many; sums stay in scratch memory from one block of taps to
//                the next. Each run is read once, in order, and prefetched. grad_weight makes a block of runs in the
//                cache and copies them out, past the caches where the tensor is larger than they are.
//   by pixel     Otherwise, above all where a pixel's taps are neighbours, as the 1x1 convolution of a channels_last
//                network writes them. Rows are outside, groups inside, and all taps of a row and group are transposed
//                into scratch memory, 4 K^2 Wo bytes. Lines that two groups share are still in the cache for the second.
//
// Short rows leave lanes idle, 5 of 16 for 11 columns, and each begins anew. Where W is in place and rows are short, a
// strip is one long row (`flat`): X is packed once for each tap column (and its rows by their phase in the stride), so
// that a shift by whole rows is a shift of the long row. grad_input then keeps a sum for each tap column, and adds them
// where the result is written.
//
// A border that shifts bends rows, so that the taps of a row no longer share a run of packed columns: each has its own,
// whose vectors are loads of the row of X with their lanes in another order. grad_input keeps a sum for each tap column,
// as in a flat strip. Strips are never flat.
//
// Arithmetic takes a load for each FMA, and one of W for each tap. A sum runs over taps (or channels) in an order that
// depends only on the problem, so that every number of threads and every height of strips gives the same bits.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/shift.h"
#include "pyinvolution/problem.h"

namespace pyinvolution::cpu {

// A run of columns in a packed row: element i of the run, at packed position `at + i`, holds column `first + i * step`.
struct Segment {
  int64_t at, first, count, step;
};

// Taps whose runs of W are open at the same time: `taps[begin] ... taps[end - 1]`, which add to sums of one phase.
struct TapBlock {
  int64_t begin, end, phase;
};
constexpr int64_t max_block_taps = 9;

struct TapIndex {
  int64_t i, j;
};

struct ColumnsTiling {
  Problem problem;
  Pass pass;
  Buffers buffers;

  bool in_place;    // W is read or written where it is, block by block; otherwise a row of all taps is transposed
  bool flat;        // a strip is one long row
  bool cached;      // W is read from the caches: all taps at once, nothing to prefetch
  bool past_cache;  // grad_weight is stored past the caches

  int64_t task_groups, group_chunks;  // groups of a task, and how many such chunks there are
  int64_t chunk;                      // channels packed at a time
  int64_t height, strips;             // of rows: of Y, or of X for grad_input

  // The packed rows of the tensor that taps shift. Where the rows of a strip (or the columns of a row) that taps read
  // overlap enough they are packed once, otherwise once for each tap.
  bool share_rows;
  int64_t packed_rows;                 // of a strip
  int64_t packed_row, packed_channel;  // distances of rows and of channels
  int64_t packed_phase;                // flat: of long rows of input rows that differ modulo the stride
  const Segment* segments;             // how a row is packed
  int64_t segment_count;
  const int64_t* tap_offset;  // [kw] where a tap's first column is in a packed row
  // Where the border shifts a row is packed by the vectors of a row of Y. grad_input is joined by its runs, and a row of
  // it is a sum of what `readers`, [in_h][kernel_h], have.
  const ShiftedVector* vectors;
  int64_t vector_count;
  const WindowRun* runs;
  int64_t run_count;
  const Positions<int64_t>* readers;

  // Rows of sums (of Y or grad_input), or of grad_output for grad_weight: unshifted, from a vector's beginning.
  int64_t columns;   // that vectors cover in a row: out_w, or for grad_input the positions m of one phase
  int64_t sum_rows;  // distance of rows; then of phases and of channels
  int64_t sum_phase, sum_channel;

  // The taps in the order of sums, by phase, then row, then column. Only in grad_input is there more than one phase:
  // columns q = s * m + phase - padding, m = first_m ..., are read by the taps with d * j = phase mod s; in a flat
  // strip, or where the border shifts, a phase is a tap column (`by_column`).
  bool by_column;
  const TapIndex* taps;
  const TapBlock* blocks;
  int64_t block_count;
  const int64_t* phases;
  int64_t phase_count;
  const int64_t* phase_begin;  // [phase_count + 1] into taps
  int64_t first_m;

  // Rows of W in scratch memory: a block's runs of grad_weight, or all taps of a row by pixel.
  int64_t weight_row, weight_tap;  // distances of rows and of taps

  // In bytes from the start of a task's scratch memory; the packed rows are at 0.
  int64_t sums_at, weights_at, staging_at, row_at, list_at;
  int64_t scratch_bytes;
};

// The memory that a tiling points to. The loops use pointers: a template of the standard library, compiled for a newer
// processor, could become the copy that the linker keeps for all.
struct ColumnsTables {
  std::vector<Segment> segments;
  std::vector<ShiftedVector> vectors;
  std::vector<WindowRun> runs;
  std::vector<Positions<int64_t>> readers;
  std::vector<int64_t> tap_offset, phases, phase_begin;
  std::vector<TapIndex> taps;
  std::vector<TapBlock> blocks;
};

// The tiling for vectors of `vector_bytes`; `tables` must outlive it.
ColumnsTiling make_columns_tiling(const Problem&, Pass, const Buffers&, int64_t vector_bytes, int threads,
                                  ColumnsTables& tables);

}  // namespace pyinvolution::cpu
