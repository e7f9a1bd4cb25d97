// Stores that go past the caches: a line that is written whole is then not read from memory before.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd/dtype.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace pyinvolution::cpu {
namespace {

// 64 bytes to an aligned address.
inline void stream_line(const void* from, void* to) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX__)
  for (int i = 0; i < 2; ++i)
    _mm256_stream_si256(static_cast<__m256i*>(to) + i, _mm256_loadu_si256(static_cast<const __m256i*>(from) + i));
#elif defined(__SSE2__)
  for (int i = 0; i < 4; ++i)
    _mm_stream_si128(static_cast<__m128i*>(to) + i, _mm_loadu_si128(static_cast<const __m128i*>(from) + i));
#else
  std::memcpy(to, from, 64);
#endif
}

// Before another thread may read what was streamed.
inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// `count` neighbours, converted to the storage type.
template <class T, class A>
void stream_run(const A* from, int64_t count, T* to) {
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t beside = int64_t(reinterpret_cast<uintptr_t>(to) % 64 / sizeof(T));
  int64_t i = 0;
  for (; i < count && (beside + i) % line != 0; ++i) store(from[i], &to[i]);
  for (; i + line <= count; i += line) {
    if constexpr (sizeof(T) == sizeof(A)) {
      stream_line(from + i, to + i);
    } else {
      T converted[line];
      for (int64_t l = 0; l < line; ++l) store(from[i + l], &converted[l]);
      stream_line(converted, to + i);
    }
  }
  for (; i < count; ++i) store(from[i], &to[i]);
}

}  // namespace
}  // namespace pyinvolution::cpu
