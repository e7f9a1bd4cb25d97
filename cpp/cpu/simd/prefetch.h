// Asks for memory before it is needed.
#pragma once

#include <cstdint>

namespace pyinvolution::cpu {
namespace {

// Fetches `runs` runs of `count` elements, `apart` from each other, into the second level of cache.
template <class T>
void prefetch_runs(const T* from, int64_t runs, int64_t apart, int64_t count) {
  constexpr uintptr_t line = 64;
  if (runs > 1 && uintptr_t(apart) * sizeof(T) < line) {  // they share lines
    count += (runs - 1) * apart;
    runs = 1;
  }
  for (int64_t i = 0; i < runs; ++i, from += apart) {
    const uintptr_t end = reinterpret_cast<uintptr_t>(from + count);
    for (uintptr_t at = reinterpret_cast<uintptr_t>(from) / line * line; at < end; at += line)
      __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 2);
  }
  __asm__ volatile("");  // GCC drops calls of functions that only prefetch
}

// The same for channels x pixels of a row, where channels or pixels are neighbours.
template <class T>
void prefetch_pixels(const T* from, int64_t channel, int64_t channels, int64_t pixel, int64_t pixels) {
  if (channel == 1)
    prefetch_runs(from, pixels, pixel, channels);
  else if (pixel == 1)
    prefetch_runs(from, channels, channel, pixels);
}

}  // namespace
}  // namespace pyinvolution::cpu
