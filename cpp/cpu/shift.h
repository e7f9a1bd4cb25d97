// Vectors of neighbouring output columns where a border shifts windows: which columns of the input their taps read.
#pragma once

#include <cstdint>

#include "cpu/arithmetic.h"
#include "pyinvolution/axis.h"

namespace pyinvolution::cpu {

constexpr int64_t max_lanes = 16;

// Lane i reads from `at` on, and its other taps a dilation further each. A vector of neighbours is one load; the others
// are one load whose lanes change places, or two where the dilation is so large that windows jump beyond the vector.
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

namespace {

// The output columns `column`, column + 1, ... Lanes past the last one repeat what is before them.
inline ShiftedVector shifted_vector(const Axis<int64_t>& axis, int64_t column, int64_t lanes) {
  const int64_t count = min(lanes, axis.outputs - column);
  int64_t first[max_lanes];
  ShiftedVector vector{};
  vector.at = axis.first(column), vector.split = int32_t(lanes);
  int64_t last = vector.at;
  for (int64_t i = 0; i < count; ++i) {
    first[i] = axis.first(column + i);
    vector.at = min(vector.at, first[i]), last = max(last, first[i]);
    if (i > 0 && first[i] != first[i - 1] + 1 && vector.split == lanes) vector.split = int32_t(i);
  }
  for (int64_t i = 0; i < lanes; ++i) vector.lane[i] = int32_t(first[min(i, count - 1)] - vector.at);
  if (vector.split == lanes) return vector;
  vector.kind = last - vector.at < lanes ? ShiftedVector::permuted : ShiftedVector::joined;
  if (vector.kind == ShiftedVector::permuted) return vector;
  for (int64_t i = vector.split + 1; i < count; ++i)
    if (first[i] != first[i - 1] + 1) vector.kind = ShiftedVector::scattered;
  if (vector.kind == ShiftedVector::joined) vector.at = first[0], vector.after = first[vector.split] - vector.split;
  return vector;
}

}  // namespace
}  // namespace pyinvolution::cpu
