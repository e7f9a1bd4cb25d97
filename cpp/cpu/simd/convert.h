// Vectors of floats into memory of any storage type but double. Vector::load reads it.
#pragma once

#include "cpu/simd/dtype.h"
#include "cpu/simd/vector.h"

namespace pyinvolution::cpu {
namespace {

typedef uint16_t Shorts __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));

inline void store_vector(const Vector<float>& vector, float* to) { vector.store(to); }

// Rounded as by `store`; AVX512-BF16 takes subnormal numbers as zeros.
inline void store_vector(const Vector<float>& vector, BFloat16* to) {
#if VECTOR_BYTES == 64 && defined(__AVX512BF16__)
  const __m256bh result = _mm512_cvtneps_pbh((__m512)vector.value);
#else
  const Words bits = (Words)vector.value;
  const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, nan = bits >> 16 | 0x40;
  const Words is_nan = (Words)((bits & 0x7fffffff) > 0x7f800000);
  const Shorts result = __builtin_convertvector((rounded & ~is_nan) | (nan & is_nan), Shorts);
#endif
  std::memcpy(to, &result, sizeof result);
}

inline void store_vector(const Vector<float>& vector, Half* to) {
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
  // (GCC 12 warns of the form without a mask.)
  const __m256i bits = _mm512_maskz_cvtps_ph(0xffff, (__m512)vector.value, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(to, &bits, sizeof bits);
#elif VECTOR_BYTES == 32 && defined(__F16C__)
  const __m128i bits = _mm256_cvtps_ph((__m256)vector.value, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(to, &bits, sizeof bits);
#else
  float values[Vector<float>::lanes];
  vector.store(values);
  for (int64_t i = 0; i < Vector<float>::lanes; ++i) store(values[i], &to[i]);
#endif
}

// The first `count` lanes.
template <class T>
void store_some(const Vector<float>& vector, T* to, int64_t count) {
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
  const __mmask16 first = __mmask16((1u << count) - 1);
  if constexpr (is_float<T>) {
    _mm512_mask_storeu_ps(to, first, (__m512)vector.value);
  } else {
    T values[Vector<float>::lanes];
    store_vector(vector, values);
    __m256i bits;
    std::memcpy(&bits, values, sizeof bits);
    _mm256_mask_storeu_epi16(to, first, bits);
  }
#else
  T values[Vector<float>::lanes];
  store_vector(vector, values);
  for (int64_t i = 0; i < count; ++i) to[i] = values[i];
#endif
}

}  // namespace
}  // namespace pyinvolution::cpu
