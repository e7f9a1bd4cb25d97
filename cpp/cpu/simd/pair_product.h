// A product of small matrices of pairs of bfloat16 with sums in float32, as an argument. A pair is a dword, the first
// number in its low half; where a depth is odd, the partner of its last element is zero in both matrices.
#pragma once

#include <cstdint>

namespace pyinvolution::cpu {

constexpr int64_t product_lanes = 16;

//   to[row][column] = start[row] + sum over k of  a[row][k].low * b[k][column].low + a[row][k].high * b[k][column].high
//
// Pair k of row r of A is at r * a_row + k * a_depth, and that of vector v of B, of 16 columns, at v * b_vector +
// k * b_depth. With a `start` of null the sum is added to what is in `to`.
struct PairProduct {
  const uint32_t* a;
  int64_t a_row, a_depth, rows;
  const uint32_t* b;
  int64_t b_vector, b_depth, vectors;
  int64_t depth;
  const float* start;
  float* to;
  int64_t pitch;  // of a row of `to`
};

}  // namespace pyinvolution::cpu
