#include "cpu/shift.h"

#include <algorithm>

namespace pyinvolution::cpu {
namespace {

ShiftedVector shifted_vector(const Axis<int64_t>& axis, int64_t column, int64_t lanes) {
  const int64_t count = std::min(lanes, axis.outputs - column);
  int64_t first[max_lanes];
  ShiftedVector vector{};
  vector.at = axis.first(column), vector.split = int32_t(lanes);
  int64_t last = vector.at;
  for (int64_t i = 0; i < count; ++i) {
    first[i] = axis.first(column + i);
    vector.at = std::min(vector.at, first[i]), last = std::max(last, first[i]);
    if (i > 0 && first[i] != first[i - 1] + 1 && vector.split == lanes) vector.split = int32_t(i);
  }
  for (int64_t i = 0; i < lanes; ++i) vector.lane[i] = int32_t(first[std::min(i, count - 1)] - vector.at);
  if (vector.split == lanes) return vector;
  vector.kind = last - vector.at < lanes ? ShiftedVector::permuted : ShiftedVector::joined;
  if (vector.kind == ShiftedVector::permuted) return vector;
  for (int64_t i = vector.split + 1; i < count; ++i)
    if (first[i] != first[i - 1] + 1) vector.kind = ShiftedVector::scattered;
  if (vector.kind == ShiftedVector::joined) vector.at = first[0], vector.after = first[vector.split] - vector.split;
  return vector;
}

}  // namespace

void append_vectors(const Axis<int64_t>& axis, int64_t lanes, std::vector<ShiftedVector>& vectors) {
  for (int64_t column = 0; column < axis.outputs; column += lanes)
    vectors.push_back(shifted_vector(axis, column, lanes));
}

void append_neighbours(const Axis<int64_t>& axis, int64_t begin, int64_t end, std::vector<WindowRun>& runs) {
  for (int64_t column = begin; column < end; column += runs.back().count) {
    WindowRun run{column, 1, 1, axis.first(column), 0};
    if (column + 1 < end) run.slope = axis.first(column + 1) - run.first;
    while (column + run.count < end && axis.first(column + run.count) == run.first + run.count * run.slope) ++run.count;
    runs.push_back(run);
  }
}

void append_runs(const Axis<int64_t>& axis, int64_t begin, int64_t end, std::vector<WindowRun>& runs) {
  if (axis.stride != 1) return append_neighbours(axis, begin, end, runs);
  // From `left` to `right` windows slide. On either side those of a residue class are the same.
  const int64_t dilation = axis.dilation, half = axis.kernel / 2 * dilation;
  const int64_t left = std::clamp(half + dilation, begin, end);
  const int64_t right = std::clamp(axis.size - axis.kernel * dilation + half, left, end);
  if (left < right) runs.push_back({left, right - left, 1, axis.first(left), 1});
  for (int64_t residue = 0; residue < std::min(dilation, end - begin); ++residue) {
    WindowRun run{};
    for (int64_t column = begin + residue; column < end; column += dilation) {
      if (column >= left && column < right) continue;
      const int64_t first = axis.first(column);
      if (run.count > 0 && first == run.first && column == run.column + run.count * dilation) {
        ++run.count;
        continue;
      }
      if (run.count > 0) runs.push_back(run);
      run = {column, 1, dilation, first, 0};
    }
    if (run.count > 0) runs.push_back(run);
  }
}

}  // namespace pyinvolution::cpu
