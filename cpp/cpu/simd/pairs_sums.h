// The loops of PairProduct.
#pragma once

#include "cpu/arithmetic.h"
#include "cpu/simd/pair_product.h"
#include "cpu/simd/pairs.h"

namespace pyinvolution::cpu {
namespace {

// `blocks` times Rows rows from `first` on, at Vectors vectors from `vector` on. Rows are addressed from a pointer for
// each four, of which the compiler is not told how they depend on each other: a pointer to each row would be too many.
template <int Rows, int Vectors>
[[gnu::noinline]] void sum_pairs_blocks(const PairProduct& product, int64_t first, int64_t blocks, int64_t vector) {
  constexpr int fours = (Rows + 3) / 4;
  const int64_t a_depth = product.a_depth, b_depth = product.b_depth, b_vector = product.b_vector;
  int64_t row = product.a_row, third = 3 * row;
  asm("" : "+r"(row), "+r"(third));
  for (; blocks > 0; --blocks, first += Rows) {
    const uint32_t* a[fours];
#pragma GCC unroll 4
    for (int i = 0; i < fours; ++i) {
      a[i] = product.a + (first + 4 * i) * product.a_row;
      asm("" : "+r"(a[i]));
    }
    const uint32_t* b = product.b + vector * b_vector;
    PairSums<16> sum[Rows][Vectors];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v)
        sum[r][v] = PairSums<16>::splat(product.start == nullptr ? 0.0f : product.start[first + r]);
    for (int64_t k = product.depth; k > 0; --k, b += b_depth) {
      Pairs<16> along[Vectors];
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) along[v] = Pairs<16>::load(reinterpret_cast<const Pair*>(b + v * b_vector));
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        const uint32_t* at = a[r / 4] + (r % 4 == 0 ? 0 : r % 4 == 3 ? third : r % 4 * row);
        if constexpr (Vectors == 1) {
          sum[r][0].add_dot(along[0], *reinterpret_cast<const Pair*>(at));
        } else {
          // A load of its own that serves all vectors.
          uint32_t bits;
          std::memcpy(&bits, at, sizeof bits);
          const Pairs<16> pair{Pairs<16>::Bits{} + bits};
#pragma GCC unroll 2
          for (int v = 0; v < Vectors; ++v) sum[r][v].add_dot(along[v], pair);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < fours; ++i) a[i] += a_depth;
    }
    float* to = product.to + first * product.pitch + vector * product_lanes;
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r, to += product.pitch)
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) {
        float* at = to + v * product_lanes;
        if (product.start == nullptr) sum[r][v].value = sum[r][v].value + PairSums<16>::load(at).value;
        sum[r][v].store(at);
      }
  }
}

template <int Vectors>
void sum_pairs_vectors(const PairProduct& product, int64_t vector, int64_t end) {
  constexpr int most = 14;
  const int64_t blocks = ceil_div(product.rows, most), height = product.rows / blocks, higher = product.rows % blocks;
  for (; vector + Vectors <= end; vector += Vectors) {
    if (higher > 0)
      with_count<most>(height + 1,
                       [&](auto n) { sum_pairs_blocks<decltype(n)::value, Vectors>(product, 0, higher, vector); });
    with_count<most>(height, [&](auto n) {
      sum_pairs_blocks<decltype(n)::value, Vectors>(product, higher * (height + 1), blocks - higher, vector);
    });
  }
}

void pair_product(const PairProduct& product) {
  if (product.rows == 0) return;
  sum_pairs_vectors<2>(product, 0, product.vectors);
  if (product.vectors % 2 != 0) sum_pairs_vectors<1>(product, product.vectors - 1, product.vectors);
}

}  // namespace
}  // namespace pyinvolution::cpu
