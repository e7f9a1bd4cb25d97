// What a dtype is on a CPU: its storage type, and the type of its sums. Internal linkage, as in float16.h.
#pragma once

#include "cpu/simd/float16.h"

namespace pyinvolution {
namespace {

template <class T>
struct AccumulatorOf;
#define PYINVOLUTION_SUM(name, text, storage, sum, scalar_type) \
  template <>                                                   \
  struct AccumulatorOf<storage> {                               \
    using type = sum;                                           \
  };
PYINVOLUTION_DTYPES(PYINVOLUTION_SUM)
#undef PYINVOLUTION_SUM
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

template <class T>
constexpr bool is_float = false;
template <>
constexpr bool is_float<float> = true;
template <class T>
constexpr bool is_bfloat16 = false;
template <>
constexpr bool is_bfloat16<BFloat16> = true;

// Calls `body` with a value of the storage type.
template <class Body>
void dispatch(DType dtype, const Body& body) {
  switch (dtype) {
#define PYINVOLUTION_CASE(name, text, storage, sum, scalar_type) \
  case DType::name: return body(storage{});
    PYINVOLUTION_DTYPES(PYINVOLUTION_CASE)
#undef PYINVOLUTION_CASE
  }
}

}  // namespace
}  // namespace pyinvolution
