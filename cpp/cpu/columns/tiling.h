// The `columns` variant: how a problem is cut into tasks.
//
// Equation and shapes: pyinvolution/problem.h. A task is one image, one group and a strip of rows. It copies what it
// reads into scratch memory in the arithmetic type, zero-padded, so that whatever the layout, dtype, stride, padding or
// dilation, the inner loops only see vectors of neighbouring columns:
//
//   forward      y[c][p]  = sum over taps k     of  w[k][p] * x[c][s p + d k]     one weight vector serves 8 channels
//   grad_weight  gw[k][p] = sum over channels c of gy[c][p] * x[c][s p + d k]     one gy vector serves 7 taps
//   grad_input   gx[c][q] = sum over taps k     of  w[k][p] * gy[c][p],  s p + d k = q    a gather: each
//                                                                                 place is written by one thread
//
// Limit: FMA throughput. 8 accumulators take 9 loads for 8 FMA (with two loads per cycle, 89% of two FMA per cycle). It
// beats the scalar loops by the vector width and by reading each weight once for 8 channels. A sum runs over taps (or
// channels) in the same order for every number of threads and every strip height, so the bits are the same.
#pragma once

#include <cstdint>
#include <vector>

#include "pyinvolution/problem.h"

namespace pyinvolution::cpu {

// A run of columns in a packed row: element i of the run, at packed position `at + i`, holds column `first + i * step`.
struct Segment {
  int64_t at, first, count, step;
};

struct ColumnsTiling {
  Problem problem;
  Pass pass;
  Buffers buffers;

  int64_t chunk;   // channels packed at a time
  int64_t height;  // rows of a strip
  int64_t strips;

  // Reads of a tensor shifted by the taps: X for forward and grad_weight, grad_output for grad_input. Where the shifted
  // rows of a strip (or the shifted columns of a row) overlap enough they are packed once, else once for each tap.
  bool share_rows;
  int64_t packed_rows;      // rows held for a strip
  int64_t width;            // of a packed row
  const Segment* segments;  // how a row is packed
  int64_t segment_count;
  const int64_t* tap_offset;  // [kw] where a tap's first column is in a packed row

  int64_t columns;     // vectors cover this many columns: out_w, or for grad_input the positions m of one phase
  int64_t padded;      // columns rounded up to whole vectors
  bool direct_weight;  // forward: W is read in place

  // grad_input: columns q = s * m + phase - padding, m = first_m ...; a phase is read by the taps with d * k = phase
  // mod s.
  int64_t first_m;
  const int64_t* phases;
  int64_t phase_count;
  const int64_t* phase_begin;  // [phase_count + 1] into phase_taps
  const int64_t* phase_taps;

  int64_t scratch_bytes;
};

// The memory that a tiling points to. The loops use pointers: a template of the standard library, compiled for a newer
// processor, could become the copy that the linker keeps for all.
struct ColumnsTables {
  std::vector<Segment> segments;
  std::vector<int64_t> tap_offset, phases, phase_begin, phase_taps;
};

// The tiling for vectors of `vector_bytes`; `tables` must outlive it.
ColumnsTiling make_columns_tiling(const Problem&, Pass, const Buffers&, int64_t vector_bytes, int threads,
                                  ColumnsTables& tables);

}  // namespace pyinvolution::cpu
