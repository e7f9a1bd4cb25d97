// A vector of VECTOR_BYTES in the arithmetic type. An instance file, which is compiled with its own instruction set,
// defines VECTOR_BYTES. The vectors are GCC's and Clang's extension, so that the same loops serve SSE2, AVX and NEON.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/simd/float16.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// GCC before 12 has no __builtin_shufflevector, Clang has no __builtin_shuffle.
#if defined(__clang__)
#define PYINVOLUTION_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PYINVOLUTION_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (int32_t __attribute__((vector_size(16)))){__VA_ARGS__})
#endif

namespace pyinvolution::cpu {
namespace {

template <class A>
struct Vector {
  static constexpr int64_t lanes = VECTOR_BYTES / sizeof(A);
  typedef A Lanes __attribute__((vector_size(VECTOR_BYTES)));

  Lanes value;

  static Vector zero() { return {Lanes{}}; }
  static Vector load(const A* from) {
    Vector v;
    std::memcpy(&v.value, from, sizeof v.value);
    return v;
  }
  void store(A* to) const { std::memcpy(to, &value, sizeof value); }
  void add_product(const Vector& a, const Vector& b) { value += a.value * b.value; }
  void add_product(const Vector& a, A b) { value += a.value * b; }

  // Adds a times the element at `b`. AVX-512 can broadcast an operand as it multiplies, which GCC often leaves to an
  // instruction of its own; on Zen 4 that one occupies a load port for twice as long.
  void add_product_at(const Vector& a, const A* b) {
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
    if constexpr (sizeof(A) == 4)
      __asm__("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(value) : "v"(a.value), "m"(*b));
    else
      __asm__("vfmadd231pd %2%{1to8%}, %1, %0" : "+v"(value) : "v"(a.value), "m"(*b));
#else
    add_product(a, *b);
#endif
  }

  Vector square_root() const {
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) return {(Lanes)_mm512_maskz_sqrt_ps(0xffff, (__m512)value)};
#elif VECTOR_BYTES == 32 && defined(__AVX2__)
    if constexpr (sizeof(A) == 4) return {(Lanes)_mm256_sqrt_ps((__m256)value)};
#endif
    Vector v;
    for (int64_t i = 0; i < lanes; ++i)
      v.value[i] = sizeof(A) == 4 ? A(__builtin_sqrtf(float(value[i]))) : A(__builtin_sqrt(double(value[i])));
    return v;
  }

  // Four neighbours, as often as there is room for them, and lane `lane` of each four in its four lanes.
  static Vector load_fours(const A* from) {
    Vector v;
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) return {(Lanes)_mm512_maskz_broadcast_f32x4(0xffff, _mm_loadu_ps(from))};
#endif
    for (int64_t i = 0; i < lanes; ++i) v.value[i] = from[i % 4];
    return v;
  }
  [[gnu::always_inline]] Vector spread(int lane) const {
    Vector v;
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) {
      switch (lane) {
        case 0: return {(Lanes)_mm512_maskz_permute_ps(0xffff, (__m512)value, 0x00)};
        case 1: return {(Lanes)_mm512_maskz_permute_ps(0xffff, (__m512)value, 0x55)};
        case 2: return {(Lanes)_mm512_maskz_permute_ps(0xffff, (__m512)value, 0xaa)};
        default: return {(Lanes)_mm512_maskz_permute_ps(0xffff, (__m512)value, 0xff)};
      }
    }
#endif
    for (int64_t i = 0; i < lanes; ++i) v.value[i] = value[i / 4 * 4 + lane];
    return v;
  }

  // Lanes shift, shift + 1, ... of `low` and then of `high`, for a shift of 1 to 7: a vector that begins in the middle of
  // another, without the load across two cache lines.
  static constexpr bool shifts = VECTOR_BYTES == 64;
  [[gnu::always_inline]] static Vector shifted(const Vector& low, const Vector& high, int shift) {
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
    const __m512i a = (__m512i)high.value, b = (__m512i)low.value;
    if constexpr (sizeof(A) == 4) {
      switch (shift) {
#define PYINVOLUTION_CASE(n) \
  case n: return {(Lanes)_mm512_maskz_alignr_epi32(0xffff, a, b, n)};
        PYINVOLUTION_CASE(1)
        PYINVOLUTION_CASE(2)
        PYINVOLUTION_CASE(3)
        PYINVOLUTION_CASE(4)
        PYINVOLUTION_CASE(5)
        PYINVOLUTION_CASE(6)
        PYINVOLUTION_CASE(7)
#undef PYINVOLUTION_CASE
        default: break;
      }
    }
#endif
    Vector v;
    for (int64_t i = 0; i < lanes; ++i)
      v.value[i] = i + shift < lanes ? low.value[i + shift] : high.value[i + shift - lanes];
    return v;
  }

  // Numbers of lanes.
  typedef std::conditional_t<sizeof(A) == 8, int64_t, int32_t> Number;
  typedef Number Order __attribute__((vector_size(VECTOR_BYTES)));
  [[gnu::always_inline]] static Order order(const int32_t* lane, int32_t plus = 0) {
    Order numbers;
    if constexpr (sizeof(A) == 4) {
      std::memcpy(&numbers, lane, sizeof numbers);
      return numbers + plus;
    }
    for (int64_t i = 0; i < lanes; ++i) numbers[i] = lane[i] + plus;
    return numbers;
  }
  // Lane i is lane order[i] of this one.
  [[gnu::always_inline]] Vector permuted(const Order& order) const {
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
    if constexpr (sizeof(A) == 4)
      return {(Lanes)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)order, (__m512)value)};
    else
      return {(Lanes)_mm512_maskz_permutexvar_pd(0xff, (__m512i)order, (__m512d)value)};
#elif VECTOR_BYTES == 32 && defined(__AVX2__)
    if constexpr (sizeof(A) == 4) return {(Lanes)_mm256_permutevar8x32_ps((__m256)value, (__m256i)order)};
#endif
    Vector v;
    for (int64_t i = 0; i < lanes; ++i) v.value[i] = value[order[i]];
    return v;
  }
  // Lane i is lane order[i] of `low`, or if that is past its last one of `high`.
  [[gnu::always_inline]] static Vector permuted(const Vector& low, const Vector& high, const Order& order) {
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
    if constexpr (sizeof(A) == 4)
      return {(Lanes)_mm512_permutex2var_ps((__m512)low.value, (__m512i)order, (__m512)high.value)};
#endif
    Vector v;
    for (int64_t i = 0; i < lanes; ++i)
      v.value[i] = order[i] < lanes ? low.value[order[i]] : high.value[order[i] - lanes];
    return v;
  }

  // Of a 16-bit type, converted.
  template <class T>
  static Vector load(const T* from) {
    static_assert(sizeof(T) == 2 && sizeof(A) == 4);
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
    return widened<T>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif VECTOR_BYTES == 32 && defined(__AVX2__)
    return widened<T>(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    A values[lanes];
    for (int64_t i = 0; i < lanes; ++i) values[i] = pyinvolution::load(from[i]);
    return load(values);
#endif
  }

  // from[first + lane] where that is one of [begin, end); the other lanes are zero and their memory is not touched.
  template <class T>
  static Vector load_range(const T* from, int64_t first, int64_t begin, int64_t end) {
    int64_t low = begin - first < 0 ? 0 : begin - first, high = end - first < lanes ? end - first : lanes;
    low = low < lanes ? low : lanes;
    high = high < low ? low : high;
    from += first;
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
    const uint32_t mask = ((1u << high) - 1) & ~((1u << low) - 1);
    if constexpr (sizeof(T) == 8)
      return {(Lanes)_mm512_maskz_loadu_pd(__mmask8(mask), from)};
    else if constexpr (sizeof(T) == 4)
      return {(Lanes)_mm512_maskz_loadu_ps(__mmask16(mask), from)};
    else
      return widened<T>(_mm256_maskz_loadu_epi16(__mmask16(mask), from));
#elif VECTOR_BYTES == 32 && defined(__AVX2__)
    if constexpr (sizeof(T) == 8) {
      const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
      const __m256i inside = _mm256_andnot_si256(_mm256_cmpgt_epi64(_mm256_set1_epi64x(low), lane),
                                                 _mm256_cmpgt_epi64(_mm256_set1_epi64x(high), lane));
      return {(Lanes)_mm256_maskload_pd(from, inside)};
    } else if constexpr (sizeof(T) == 4) {
      const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
      const __m256i inside = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(int(low)), lane),
                                                 _mm256_cmpgt_epi32(_mm256_set1_epi32(int(high)), lane));
      return {(Lanes)_mm256_maskload_ps(from, inside)};
    }
#endif
    A values[lanes] = {};
    for (int64_t i = low; i < high; ++i) values[i] = pyinvolution::load(from[i]);
    return load(values);
  }

#if VECTOR_BYTES == 64 && defined(__AVX512F__)
  template <class T>
  static Vector widened(__m256i bits) {
    if constexpr (std::is_same_v<T, Half>)
      return {(Lanes)_mm512_maskz_cvtph_ps(0xffff, bits)};
    else
      return {(Lanes)_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, bits), 16)};
  }
#elif VECTOR_BYTES == 32 && defined(__AVX2__)
  template <class T>
  static Vector widened(__m128i bits) {
    if constexpr (std::is_same_v<T, Half>)
      return {(Lanes)_mm256_cvtph_ps(bits)};
    else
      return {(Lanes)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)};
  }
#endif
};

typedef float Four __attribute__((vector_size(16)));

// Copies `count` neighbours. The last vector overlaps the one before it, because masked stores are slow.
template <class Block>
void copy_blocks(const float* from, int64_t count, float* to) {
  constexpr int64_t lanes = sizeof(Block) / sizeof(float);
  for (int64_t i = 0; i < count; i += lanes) {
    const int64_t at = i + lanes <= count ? i : count - lanes;
    std::memcpy(to + at, from + at, sizeof(Block));
  }
}
inline void copy(const float* from, int64_t count, float* to) {
  if (count >= Vector<float>::lanes) return copy_blocks<Vector<float>>(from, count, to);
  if (count >= 4) return copy_blocks<Four>(from, count, to);
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

// Copies every second one of `count` x 2 neighbours, beginning with the first.
inline void copy_even(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count && count < 4; ++i) to[i] = from[2 * i];
  for (int64_t i = 0; i < count && count >= 4; i += 4) {
    const int64_t at = i + 4 <= count ? i : count - 4;
    Four low, high;
    std::memcpy(&low, from + 2 * at, sizeof low);
    std::memcpy(&high, from + 2 * at + 3, sizeof high);
    const Four even = PYINVOLUTION_SHUFFLE(low, high, 0, 2, 5, 7);
    std::memcpy(to + at, &even, sizeof even);
  }
}

// Writes zeros in whole vectors; for a few of them, memset takes longer.
inline void clear(float* to, int64_t vectors) {
  for (int64_t v = 0; v < vectors; ++v) Vector<float>::zero().store(to + v * Vector<float>::lanes);
}

// Two neighbours and two others. (As doubles, since a vector that is written in parts would go through memory.)
inline Four load_two_pairs(const float* low, const float* high) {
  typedef double Two __attribute__((vector_size(16)));
  double pairs[2];
  std::memcpy(&pairs[0], low, sizeof(double));
  std::memcpy(&pairs[1], high, sizeof(double));
  return (Four)Two{pairs[0], pairs[1]};
}

template <int Rows>
void transpose_rows(const float* from, int64_t from_pitch, int64_t columns, float* to, int64_t to_pitch) {
  const int64_t whole = columns / 4 * 4;
  int64_t begin = 0;
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
  // The same for four times four columns at once, one in each quarter of a vector.
  if constexpr (Rows == 4)
    for (; begin + 16 <= columns; begin += 16) {
      __m512d pair[4];
      for (int i = 0; i < 2; ++i) {
        const __m512 a = _mm512_loadu_ps(from + 2 * i * from_pitch + begin);
        const __m512 b = _mm512_loadu_ps(from + (2 * i + 1) * from_pitch + begin);
        pair[2 * i] = _mm512_castps_pd(_mm512_maskz_unpacklo_ps(0xffff, a, b));
        pair[2 * i + 1] = _mm512_castps_pd(_mm512_maskz_unpackhi_ps(0xffff, a, b));
      }
      const __m512 out[4] = {_mm512_castpd_ps(_mm512_maskz_unpacklo_pd(0xff, pair[0], pair[2])),
                             _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(0xff, pair[0], pair[2])),
                             _mm512_castpd_ps(_mm512_maskz_unpacklo_pd(0xff, pair[1], pair[3])),
                             _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(0xff, pair[1], pair[3]))};
      float* at = to + begin * to_pitch;
      for (int i = 0; i < 4; ++i, at += to_pitch) {
        _mm_storeu_ps(at, _mm512_maskz_extractf32x4_ps(0xf, out[i], 0));
        _mm_storeu_ps(at + 4 * to_pitch, _mm512_maskz_extractf32x4_ps(0xf, out[i], 1));
        _mm_storeu_ps(at + 8 * to_pitch, _mm512_maskz_extractf32x4_ps(0xf, out[i], 2));
        _mm_storeu_ps(at + 12 * to_pitch, _mm512_maskz_extractf32x4_ps(0xf, out[i], 3));
      }
    }
#endif
  for (int64_t c = begin; c < whole; c += 4) {
    Four in[4] = {};
    for (int i = 0; i < Rows; ++i) std::memcpy(&in[i], from + i * from_pitch + c, sizeof(Four));
    const Four low01 = PYINVOLUTION_SHUFFLE(in[0], in[1], 0, 4, 1, 5);
    const Four high01 = PYINVOLUTION_SHUFFLE(in[0], in[1], 2, 6, 3, 7);
    const Four low23 = PYINVOLUTION_SHUFFLE(in[2], in[3], 0, 4, 1, 5);
    const Four high23 = PYINVOLUTION_SHUFFLE(in[2], in[3], 2, 6, 3, 7);
    const Four out[4] = {PYINVOLUTION_SHUFFLE(low01, low23, 0, 1, 4, 5), PYINVOLUTION_SHUFFLE(low01, low23, 2, 3, 6, 7),
                         PYINVOLUTION_SHUFFLE(high01, high23, 0, 1, 4, 5),
                         PYINVOLUTION_SHUFFLE(high01, high23, 2, 3, 6, 7)};
    for (int i = 0; i < 4; ++i) std::memcpy(to + (c + i) * to_pitch, &out[i], Rows * sizeof(float));
  }
  int64_t c = whole;
  if constexpr (Rows == 4)
    for (; c + 2 <= columns; c += 2) {
      const Four rows01 = load_two_pairs(from + c, from + from_pitch + c);
      const Four rows23 = load_two_pairs(from + 2 * from_pitch + c, from + 3 * from_pitch + c);
      const Four out[2] = {PYINVOLUTION_SHUFFLE(rows01, rows23, 0, 2, 4, 6),
                           PYINVOLUTION_SHUFFLE(rows01, rows23, 1, 3, 5, 7)};
      for (int i = 0; i < 2; ++i) std::memcpy(to + (c + i) * to_pitch, &out[i], sizeof(Four));
    }
  for (; c < columns; ++c)
    for (int i = 0; i < Rows; ++i) to[c * to_pitch + i] = from[i * from_pitch + c];
}

// `rows` rows of `columns` floats, transposed: to[column][row]. Rows are `from_pitch` apart, columns `to_pitch`.
inline void transpose(const float* from, int64_t from_pitch, int64_t rows, int64_t columns, float* to,
                      int64_t to_pitch) {
  for (; rows >= 4; rows -= 4, from += 4 * from_pitch, to += 4)
    transpose_rows<4>(from, from_pitch, columns, to, to_pitch);
  switch (rows) {
    case 3: return transpose_rows<3>(from, from_pitch, columns, to, to_pitch);
    case 2: return transpose_rows<2>(from, from_pitch, columns, to, to_pitch);
    case 1: return transpose_rows<1>(from, from_pitch, columns, to, to_pitch);
    default: break;
  }
}

}  // namespace
}  // namespace pyinvolution::cpu
