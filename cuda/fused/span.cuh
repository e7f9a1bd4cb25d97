// What the kernels of `fused` share: bringing rows of S and R to shared memory, computing a single weight, writing
// channels.
#pragma once

#include "config.cuh"

namespace pyinvolution::cuda::fused {

// Rows of `channels` elements into shared memory; `at(i)` is the offset of row i, or negative where there are zeros.
template <int Warps, class T, class At>
__device__ __forceinline__ void bring_rows(char* shared, int pitch, const T* memory, int rows, int channels, int vector,
                                           const At& at) {
  with_vector<true>(vector, [&](auto v) {
    constexpr int V = v.value;
    // Neighbouring threads have neighbouring vectors of as many rows at once as there are threads for.
    const unsigned vectors = unsigned(channels / V), first = threadIdx.x / vectors, step = 32 * Warps / vectors;
    if (first >= step) return;
    const int channel = int(threadIdx.x - first * vectors) * V;
#pragma unroll 2
    for (int i = int(first); i < rows; i += int(step)) {
      const int from = at(i);
      char* to = shared + i * pitch + channel * 2;
      if constexpr (V > 1) {
        copy_async<V * sizeof(T)>(to, memory + (max(from, 0) + channel), from >= 0);
      } else {
        T value;
        store(0.0f, &value);
        if (from >= 0) value = memory[from + channel];
        *reinterpret_cast<T*>(to) = value;
      }
    }
  });
}

// Eight elements into shared memory, at once where `vector` is 8, or zeros where not `valid`.
template <class T>
__device__ __forceinline__ void copy_piece(char* to, const T* from, bool valid, int vector) {
  if (vector == 8) return copy_async<16>(to, from, valid);
#pragma unroll 1
  for (int i = 0; i < 8; ++i) {
    T value;
    store(0.0f, &value);
    if (valid) value = from[i];
    reinterpret_cast<T*>(to)[i] = value;
  }
}

// A single weight, rounded like those of the products.
template <class T>
__device__ __forceinline__ float weight_of(const char* reduced, const char* row, float bias, int channels) {
  float sum = bias;
#pragma unroll 1
  for (int c = 0; c < channels; ++c)
    sum += load(reinterpret_cast<const T*>(reduced)[c]) * load(reinterpret_cast<const T*>(row)[c]);
  T rounded;
  store(sum, &rounded);
  return load(rounded);
}

// Of the 16 channels of a pixel, 4 lanes have 2t and 2t+1 in `low` and the same plus 8 in `high`. The result has four
// neighbours, from 8 (t % 2) + 4 (t / 2) on. `odd`: whether t is.
__device__ __forceinline__ Vector<2, uint32_t> four_channels(uint32_t low, uint32_t high, bool odd) {
  const uint32_t other = __shfl_xor_sync(~0u, odd ? low : high, 1);
  return {{odd ? other : low, odd ? high : other}};
}
__device__ __forceinline__ Vector<2, uint32_t> four_channels(uint32_t low, uint32_t high) {
  return four_channels(low, high, threadIdx.x % 2 == 1);
}

// Writes them.
template <class T>
__device__ __forceinline__ void put_channels(T* pixel, bool valid, int vector, uint32_t low, uint32_t high) {
  const int t = int(threadIdx.x) % 4;
  if (vector == 8) {
    const Vector<2, uint32_t> four = four_channels(low, high);
    if (valid) *reinterpret_cast<Vector<2, uint32_t>*>(pixel + (t % 2 * 8 + t / 2 * 4)) = four;
  } else if (valid) {
    const uint32_t bits[2] = {low, high};
    Vector<2, T> pair;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      memcpy(&pair, &bits[half], sizeof pair);
      pixel[half * 8 + 2 * t] = pair.v[0], pixel[half * 8 + 2 * t + 1] = pair.v[1];
    }
  }
}

}  // namespace pyinvolution::cuda::fused
