// Products of small matrices in float32, compiled with the instruction set of the including file.
#pragma once

#include <cstdint>

#include "cpu/arithmetic.h"
#include "cpu/simd/vector.h"

namespace pyinvolution::cpu {
namespace {

using V = Vector<float>;

// How many rows `multiply` works on: its registers hold max_rows x 2 (or max_single_rows x 1) accumulators, the vectors
// of B and one scalar. The instance file says how many.
constexpr int max_rows = MULTIPLY_ROWS, max_single_rows = MULTIPLY_SINGLE_ROWS;

// Where a matrix lies: element (i, k) of A at i * row + k * depth, vector v of row k of B at v * vector +
// k * depth.
struct MatrixA {
  const float* at;
  int64_t row, depth;
};
struct MatrixB {
  const float* at;
  int64_t vector, depth;
};

// to[row][v] = start[row] + sum over k of a[row][k] * b[k][v] for Rows rows, `pitch` apart, and Vectors vectors. With a
// `start` of null the sum is added to what is in `to`.
template <int Rows, int Vectors>
void multiply_block(MatrixA a, MatrixB b, int64_t depth, const float* start, float* to, int64_t pitch) {
  V sum[Rows][Vectors];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) sum[r][v].value = typename V::Lanes{} + (start == nullptr ? 0.0f : start[r]);
  for (int64_t k = 0; k < depth; ++k, a.at += a.depth, b.at += b.depth) {
    V along[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) along[v] = V::load(b.at + v * b.vector);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const float scalar = a.at[r * a.row];
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) sum[r][v].add_product(along[v], scalar);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      float* at = to + r * pitch + v * V::lanes;
      // Sums over many tiles are sums of sums: their rounding errors grow slower than those of one long sum.
      if (start == nullptr) sum[r][v].value += V::load(at).value;
      sum[r][v].store(at);
    }
}

template <int Vectors>
void multiply_rows(const MatrixA& a, int64_t rows, const MatrixB& b, int64_t depth, const float* start, float* to,
                   int64_t pitch) {
  constexpr int block = Vectors == 1 ? max_single_rows : max_rows;
  const int64_t count = (rows + block - 1) / block;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = rows * i / count;
    with_count<block>(rows * (i + 1) / count - first, [&](auto n) {
      multiply_block<decltype(n)::value, Vectors>({a.at + first * a.row, a.row, a.depth}, b, depth,
                                                  start == nullptr ? nullptr : start + first, to + first * pitch,
                                                  pitch);
    });
  }
}

// The same for any number of rows and vectors.
void multiply(const MatrixA& a, int64_t rows, const MatrixB& b, int64_t vectors, int64_t depth, const float* start,
              float* to, int64_t pitch) {
  int64_t v = 0;
  for (; v + 2 <= vectors; v += 2)
    multiply_rows<2>(a, rows, {b.at + v * b.vector, b.vector, b.depth}, depth, start, to + v * V::lanes, pitch);
  if (v < vectors)
    multiply_rows<1>(a, rows, {b.at + v * b.vector, b.vector, b.depth}, depth, start, to + v * V::lanes, pitch);
}

}  // namespace
}  // namespace pyinvolution::cpu
