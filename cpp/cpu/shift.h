// Where a border shifts windows: a row of the output as vectors and as runs of columns, by the columns of the input that
// their taps read.
#pragma once

#include <cstdint>
#include <vector>

#include "pyinvolution/axis.h"

namespace pyinvolution::cpu {

constexpr int64_t max_lanes = 16;

// Neighbouring output columns. Lane i reads from `at` on, and its other taps a dilation further each. A vector of
// neighbours is one load; the others are one load whose lanes change places, or two where the dilation is so large that
// windows jump beyond the vector. Lanes past the last column repeat one before them.
struct ShiftedVector {
  enum Kind : int32_t {
    neighbours,  // column at + i
    permuted,    // column at + lane[i], lane[i] < lanes
    joined,      // column at + i, from lane `split` on after + i
    scattered,   // column at + lane[i]
  } kind;
  int32_t split;
  int64_t at, after;
  int32_t lane[max_lanes];
};

// All of a row, `lanes` columns to each.
void append_vectors(const Axis<int64_t>&, int64_t lanes, std::vector<ShiftedVector>&);

// Output columns of a row, `column` and `count` - 1 more that are `step` apart, whose taps 0 read the columns `first`,
// first + slope, ... of X. A border that shifts makes several of a row: pixels next to it share a window (slope 0), and
// in between windows slide.
struct WindowRun {
  int64_t column, count, step, first, slope;
};

// The columns [begin, end): of pixels that share a window, or if none do neighbours.
void append_runs(const Axis<int64_t>&, int64_t begin, int64_t end, std::vector<WindowRun>&);
// The same of neighbours only.
void append_neighbours(const Axis<int64_t>&, int64_t begin, int64_t end, std::vector<WindowRun>&);

}  // namespace pyinvolution::cpu
