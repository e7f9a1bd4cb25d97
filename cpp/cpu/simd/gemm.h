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

// What is common to the blocks of a product. With a `start` of null the sums are added to what is in `to`.
struct Product {
  MatrixA a;
  MatrixB b;
  int64_t depth;
  const float* start;
  float* to;
  int64_t pitch;  // of a row of `to`
};

// Hides where a value comes from. GCC would derive the addresses of a loop from one pointer and a table of offsets, for
// which there are not enough registers.
template <class T>
void hide(T& value) {
  __asm__("" : "+r"(value));
}

// to[row][v] = start[row] + sum over k of a[row][k] * b[k][v] for `blocks` times Rows rows from `first` on, and Vectors
// vectors from `vector` on. Rows are addressed from a pointer for each four.
template <int Rows, int Vectors>
[[gnu::noinline]] void multiply_blocks(const Product& product, int64_t first, int64_t blocks, int64_t vector) {
  constexpr int fours = (Rows + 3) / 4;
  const int64_t depth_step = product.a.depth, next_vector = product.b.vector, b_step = product.b.depth;
  int64_t row = product.a.row, third = 3 * row;
  hide(row), hide(third);
  for (; blocks > 0; --blocks, first += Rows) {
    const float* a[fours];
#pragma GCC unroll 4
    for (int i = 0; i < fours; ++i) {
      a[i] = product.a.at + (first + 4 * i) * product.a.row;
      hide(a[i]);
    }
    const float* b = product.b.at + vector * next_vector;
    const float* start = product.start == nullptr ? nullptr : product.start + first;
    V sum[Rows][Vectors];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) sum[r][v].value = typename V::Lanes{} + (start == nullptr ? 0.0f : start[r]);
    for (int64_t k = product.depth; k > 0; --k, b += b_step) {
      V along[Vectors];
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) along[v] = V::load(b + v * next_vector);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        const float* at = a[r / 4] + (r % 4 == 0 ? 0 : r % 4 == 3 ? third : r % 4 * row);
        if constexpr (Vectors == 1) {
          sum[r][0].add_product_at(along[0], at);
        } else {
          const float scalar = *at;
#pragma GCC unroll 2
          for (int v = 0; v < Vectors; ++v) sum[r][v].add_product(along[v], scalar);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < fours; ++i) a[i] += depth_step;
    }
    float* to = product.to + first * product.pitch + vector * V::lanes;
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r, to += product.pitch)
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) {
        float* at = to + v * V::lanes;
        // Sums over many tiles are sums of sums: their rounding errors grow slower than those of one long sum.
        if (start == nullptr) sum[r][v].value += V::load(at).value;
        sum[r][v].store(at);
      }
  }
}

// Blocks of the same height, as nearly as they can be: some with a row more than the others.
template <int Vectors>
void multiply_vectors(const Product& product, int64_t rows, int64_t vector, int64_t end) {
  constexpr int most = Vectors == 1 ? max_single_rows : max_rows;
  const int64_t blocks = (rows + most - 1) / most, height = rows / blocks, higher = rows % blocks;
  for (; vector + Vectors <= end; vector += Vectors) {
    if (higher > 0)
      with_count<most>(height + 1,
                       [&](auto n) { multiply_blocks<decltype(n)::value, Vectors>(product, 0, higher, vector); });
    with_count<most>(height, [&](auto n) {
      multiply_blocks<decltype(n)::value, Vectors>(product, higher * (height + 1), blocks - higher, vector);
    });
  }
}

// to[row][v] = start[row] + sum over k of a[row][k] * b[k][v] for any number of rows and vectors. With a `start` of null
// the sums are added to what is in `to`.
void multiply(const MatrixA& a, int64_t rows, const MatrixB& b, int64_t vectors, int64_t depth, const float* start,
              float* to, int64_t pitch) {
  if (rows == 0) return;
  const Product product{a, b, depth, start, to, pitch};
  multiply_vectors<2>(product, rows, 0, vectors);
  if (vectors % 2 != 0) multiply_vectors<1>(product, rows, vectors - 1, vectors);
}

}  // namespace
}  // namespace pyinvolution::cpu
