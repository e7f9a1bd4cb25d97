// Integer arithmetic that the strategies share. Internal linkage: the file is compiled with different instruction sets.
#pragma once

#include <cstdint>

namespace pyinvolution::cpu {
namespace {

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The output position whose tap `tap` reads input position `at`, or -1.
inline int64_t reader(int64_t at, int64_t tap, int64_t stride, int64_t padding, int64_t dilation, int64_t outputs) {
  const int64_t shifted = at + padding - dilation * tap;
  return shifted >= 0 && shifted % stride == 0 && shifted / stride < outputs ? shifted / stride : -1;
}

// A number that a generic lambda gets at compile time.
template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls body(Count<n>) for n in 1 .. Max.
template <int Max, class Body>
void with_count(int64_t n, const Body& body) {
  if constexpr (Max > 1) {
    if (n < Max) return with_count<Max - 1>(n, body);
  }
  body(Count<Max>{});
}

// Calls body(Count<i>) for each i in 0 .. N - 1.
template <int N, class Body>
[[gnu::always_inline]] inline void unroll(const Body& body) {
  if constexpr (N > 0) {
    unroll<N - 1>(body);
    body(Count<N - 1>{});
  }
}

}  // namespace
}  // namespace pyinvolution::cpu
