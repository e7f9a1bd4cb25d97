// The 16-bit storage types and the conversion of every storage type to its arithmetic type. Everything here has
// internal linkage: the file is compiled with different instruction sets, and the linker must not let one object's copy
// serve another.
#pragma once

#include <cstdint>
#include <cstring>

#include "pyinvolution/problem.h"

namespace pyinvolution {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float load(float value) { return value; }
inline double load(double value) { return value; }
inline float load(BFloat16 value) { return float_of(uint32_t{value.bits} << 16); }

inline float load(Half value) {
  // A product moves the exponent by 127 - 15 and normalises subnormals. A result of 2^16 or above was Inf or NaN.
  const uint32_t magnitude = uint32_t{value.bits & 0x7fffu} << 13;
  uint32_t bits = bits_of(float_of(magnitude) * 0x1p112f);
  if (bits >= 0x47800000u) bits |= 0x7f800000u;
  return float_of(bits | uint32_t{value.bits & 0x8000u} << 16);
}

inline void store(float value, float* to) { *to = value; }
inline void store(double value, double* to) { *to = value; }

inline void store(float value, BFloat16* to) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    to->bits = uint16_t(bits >> 16 | 0x40u);
  } else {
    to->bits = uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
}

inline void store(float value, Half* to) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x47800000u) {
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Adding 0.5 aligns the last bit of a subnormal half with the last bit of the float, which rounds to even.
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  to->bits = uint16_t(half | (bits >> 16 & 0x8000u));
}

}  // namespace
}  // namespace pyinvolution
