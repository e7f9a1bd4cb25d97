// Products of small matrices of bfloat16 by dot products of pairs. Their results are pairs again.
#pragma once

#include <cstdint>

#include "cpu/arithmetic.h"
#include "cpu/simd/pairs.h"

namespace pyinvolution::cpu {
namespace {

constexpr int64_t pair_lanes = 16;

// A lies in memory, neighbours along a row next to each other. A result is a pair of its rows, `partner` apart, or
// where `partner` is 0 one row and zero. Neighbouring results are `step` rows apart. Each row has a number that its sum
// starts with.
struct PairRows {
  const BFloat16* at;
  int64_t row, step, partner;  // row: elements from one row to the next
  const float* start;
};
// Pair k of column vector v of B is at v * vector + k * pair_lanes.
struct PairColumns {
  const Pair* at;
  int64_t vector;
};
// Result i at column vector v is at i * result + v * vector.
struct PairResults {
  Pair* at;
  int64_t result, vector;
  bool relu;  // a sum below zero becomes zero
};

// Rows 0 to 6 of a set, `step` bytes apart. With the registers of these three steps an instruction addresses each of
// them. The compiler is not told how they depend on each other, or it would keep a pointer to each row.
struct RowSteps {
  int64_t step, step3, step5;

  explicit RowSteps(int64_t bytes) : step(bytes), step3(3 * bytes), step5(5 * bytes) {
    asm("" : "+r"(step), "+r"(step3), "+r"(step5));
  }
  template <int I>
  [[gnu::always_inline]] int64_t of() const {
    static_assert(I < 7);
    return I == 3 ? step3 : I == 5 ? step5 : I == 6 ? 2 * step3 : I * step;
  }
};

// Results [0, Count) at `blocks` times Whole vectors of columns or, with Half, half a vector more.
template <int Count, bool Partner, int Whole, bool Half>
[[gnu::noinline]] void multiply_pairs_blocks(const PairRows& a, PairColumns b, int64_t blocks, int64_t depth,
                                             PairResults to) {
  constexpr int rows = Partner ? 2 : 1;
  const RowSteps steps(a.step * a.row * int64_t(sizeof(BFloat16)));
  for (; blocks > 0; --blocks, b.at += Whole * b.vector, to.at += Whole * to.vector) {
    PairSums<16> sum[rows][Count][Whole + 1];  // one more, since arrays are not empty; it takes no register
    PairSums<8> half[rows][Count];
    unroll<rows>([&](auto r) {
      unroll<Count>([&](auto i) {
        const float start = a.start[i.value * a.step + r.value * a.partner];
        unroll<Whole>([&](auto v) { sum[r.value][i.value][v.value] = PairSums<16>::splat(start); });
        if constexpr (Half) half[r.value][i.value] = PairSums<8>::splat(start);
      });
    });
    const char* first = reinterpret_cast<const char*>(a.at);
    const char* second = reinterpret_cast<const char*>(a.at + a.partner * a.row);
    const Pair* columns = b.at;
    for (int64_t k = depth; k > 0; --k, first += sizeof(Pair), second += sizeof(Pair), columns += pair_lanes) {
      Pairs<16> along[Whole + 1];
      Pairs<8> along_half;
      unroll<Whole>([&](auto v) { along[v.value] = Pairs<16>::load(columns + v.value * b.vector); });
      if constexpr (Half) along_half = Pairs<8>::load(columns + Whole * b.vector);
      unroll<rows>([&](auto r) {
        unroll<Count>([&](auto i) {
          const Pair& pair = *reinterpret_cast<const Pair*>((r.value == 0 ? first : second) + steps.of<i.value>());
          unroll<Whole>([&](auto v) { sum[r.value][i.value][v.value].add_dot(along[v.value], pair); });
          if constexpr (Half) half[r.value][i.value].add_dot(along_half, pair);
        });
      });
    }
    const auto finish = [&](auto& low, auto& high, Pair* result) {
      if (to.relu) low.relu();
      if constexpr (Partner) {
        if (to.relu) high.relu();
        low.round_with(high).store(result);
      } else {
        low.round_low().store(result);
      }
    };
    unroll<Count>([&](auto i) {
      Pair* result = to.at + i.value * to.result;
      unroll<Whole>([&](auto v) {
        finish(sum[0][i.value][v.value], sum[rows - 1][i.value][v.value], result + v.value * to.vector);
      });
      if constexpr (Half) finish(half[0][i.value], half[rows - 1][i.value], result + Whole * to.vector);
    });
  }
}

// Results [0, Count) at `whole` vectors of columns and, with `half`, half a vector more. 14 sums or more hide the
// latency of a dot product; 28 and the 4 vectors that they read fill the registers.
template <int Count, bool Partner>
void multiply_pairs_rows(const PairRows& a, PairColumns b, int64_t whole, bool half, int64_t depth, PairResults to) {
  constexpr int most = (Partner ? 2 : 1) * Count <= 7 ? 4 : 2;
  const int64_t blocks = whole / most, rest = whole % most;
  if (blocks > 0) multiply_pairs_blocks<Count, Partner, most, false>(a, b, blocks, depth, to);
  b.at += blocks * most * b.vector;
  to.at += blocks * most * to.vector;
  if (rest == 0) {
    if (half) multiply_pairs_blocks<Count, Partner, 0, true>(a, b, 1, depth, to);
    return;
  }
  with_count<most - 1>(rest, [&](auto n) {
    if (half)
      multiply_pairs_blocks<Count, Partner, decltype(n)::value, true>(a, b, 1, depth, to);
    else
      multiply_pairs_blocks<Count, Partner, decltype(n)::value, false>(a, b, 1, depth, to);
  });
}

// The sum of the lanes.
inline float total(const PairSums<16>& sums) {
  float lanes[16], fours[4] = {};
  sums.store(lanes);
  for (int i = 0; i < 16; ++i) fours[i % 4] += lanes[i];
  return (fours[0] + fours[1]) + (fours[2] + fours[3]);
}

// Results at one column, which lies together: pair k at column[k]. `depth` is a multiple of pair_lanes. This takes a
// dot product for 16 pairs and a sum over lanes, where a vector of columns takes one for each pair.
inline void multiply_pairs_column(const PairRows& a, int64_t count, const Pair* column, int64_t depth,
                                  const PairResults& to) {
  const auto sum_of = [&](int64_t row) {
    auto sums = PairSums<16>::splat(0);
    const Pair* pairs = reinterpret_cast<const Pair*>(a.at + row * a.row);
    for (int64_t k = 0; k < depth; k += pair_lanes)
      sums.add_dot(Pairs<16>::load(column + k), Pairs<16>::load(pairs + k));
    const float sum = a.start[row] + total(sums);
    return to.relu && sum < 0 ? 0.0f : sum;
  };
  for (int64_t i = 0; i < count; ++i) {
    Pair& result = to.at[i * to.result];
    store(sum_of(i * a.step), &result.low);
    store(a.partner > 0 ? sum_of(i * a.step + a.partner) : 0.0f, &result.high);
  }
}

// `count` results at `columns` columns; their last vector may hold anything past them.
void multiply_pairs(const PairRows& a, int64_t count, const PairColumns& b, int64_t columns, int64_t depth,
                    const PairResults& to) {
  constexpr int block = 7;
  const int64_t tail = columns % pair_lanes, blocks = ceil_div(count, block);
  const bool half = tail > 0 && tail <= pair_lanes / 2;
  const int64_t whole = columns / pair_lanes + (tail > pair_lanes / 2 ? 1 : 0);
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = count * i / blocks;
    const PairRows rows{a.at + first * a.step * a.row, a.row, a.step, a.partner, a.start + first * a.step};
    const PairResults results{to.at + first * to.result, to.result, to.vector, to.relu};
    with_count<block>(count * (i + 1) / blocks - first, [&](auto n) {
      constexpr int rows_of_block = decltype(n)::value;
      if (a.partner > 0)
        multiply_pairs_rows<rows_of_block, true>(rows, b, whole, half, depth, results);
      else
        multiply_pairs_rows<rows_of_block, false>(rows, b, whole, half, depth, results);
    });
  }
}

}  // namespace
}  // namespace pyinvolution::cpu
