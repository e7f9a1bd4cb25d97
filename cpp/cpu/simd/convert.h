// Vectors of floats from and to memory in any storage type but double.
#pragma once

#include "cpu/simd/dtype.h"
#include "cpu/simd/vector.h"

namespace pyinvolution::cpu {
namespace {

typedef uint16_t Shorts __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));

inline Vector<float> load_vector(const float* from) { return Vector<float>::load(from); }
inline void store_vector(const Vector<float>& vector, float* to) { vector.store(to); }

inline Vector<float> load_vector(const BFloat16* from) {
  Shorts bits;
  std::memcpy(&bits, from, sizeof bits);
  return {(Vector<float>::Lanes)(__builtin_convertvector(bits, Words) << 16)};
}
// Rounded as by `store`.
inline void store_vector(const Vector<float>& vector, BFloat16* to) {
  const Words bits = (Words)vector.value;
  const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, nan = bits >> 16 | 0x40;
  const Words is_nan = (Words)((bits & 0x7fffffff) > 0x7f800000);
  const Shorts result = __builtin_convertvector((rounded & ~is_nan) | (nan & is_nan), Shorts);
  std::memcpy(to, &result, sizeof result);
}

#if VECTOR_BYTES == 64 && defined(__AVX512F__)
// (GCC 12 warns of the instructions' forms without a mask.)
inline Vector<float> load_vector(const Half* from) {
  return {(Vector<float>::Lanes)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
}
inline void store_vector(const Vector<float>& vector, Half* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtps_ph(0xffff, (__m512)vector.value, _MM_FROUND_TO_NEAREST_INT));
}
#elif VECTOR_BYTES == 32 && defined(__F16C__)
inline Vector<float> load_vector(const Half* from) {
  return {(Vector<float>::Lanes)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
}
inline void store_vector(const Vector<float>& vector, Half* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)vector.value, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline Vector<float> load_vector(const Half* from) {
  float values[Vector<float>::lanes];
  for (int64_t i = 0; i < Vector<float>::lanes; ++i) values[i] = load(from[i]);
  return Vector<float>::load(values);
}
inline void store_vector(const Vector<float>& vector, Half* to) {
  float values[Vector<float>::lanes];
  vector.store(values);
  for (int64_t i = 0; i < Vector<float>::lanes; ++i) store(values[i], &to[i]);
}
#endif

// The first `count` lanes: the others are zero, and their memory is not touched.
inline Vector<float> load_some(const float* from, int64_t count) { return Vector<float>::load_first(from, count); }
template <class T>
Vector<float> load_some(const T* from, int64_t count) {
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
  const __m256i bits = _mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), from);
  T values[Vector<float>::lanes];
  std::memcpy(values, &bits, sizeof bits);
#else
  T values[Vector<float>::lanes] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = from[i];
#endif
  return load_vector(values);
}
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
