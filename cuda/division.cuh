// Division by a number that is known at the launch only: a multiplication and a shift, where the GPU, which has no
// instruction for it, would run about 20.
#pragma once

#include <cstdint>

#include "primitives.cuh"

namespace pyinvolution::cuda {

// For numbers from 0 to 2^31 - 1 and divisors from 1 to 2^31 - 1.
//
// With 2^(s-1) < d <= 2^s and m = ceil(2^(31+s) / d), n m / 2^(31+s) exceeds n / d by less than n / 2^(31+s) < 1 / d,
// which is too little to reach the next integer.
class Division {
 public:
  Division() = default;
  explicit Division(int64_t divisor) : divisor_(uint32_t(divisor)) {
    while ((int64_t{1} << shift_) < divisor) ++shift_;
    multiplier_ = uint32_t(((uint64_t{1} << (31 + shift_)) + uint64_t(divisor) - 1) / uint64_t(divisor));
  }

  __host__ __device__ __forceinline__ uint32_t quotient(uint32_t number) const {
    return uint32_t(uint64_t{2 * number} * multiplier_ >> 32) >> shift_;
  }
  // Divides `number` and returns the remainder.
  __host__ __device__ __forceinline__ int split(uint32_t& number) const {
    const uint32_t whole = number;
    number = quotient(whole);
    return int(whole - number * divisor_);
  }

 private:
  uint32_t divisor_ = 1, multiplier_ = uint32_t{1} << 31;
  int shift_ = 0;
};

}  // namespace pyinvolution::cuda
