// Launching a kernel, on a GPU or in the emulator, and choosing its template arguments from a Problem.
#pragma once

#include <cstdint>
#include <limits>

#include "primitives.cuh"
#include "pyinvolution/problem.h"

#ifdef __CUDACC__
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "build.h"
#endif

namespace pyinvolution::cuda {

struct Grid {
  int64_t blocks;
  int threads;
  int shared_bytes;
};

#ifdef __CUDACC__

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next launch does not report it again
  std::string text = std::string(what) + ": " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice) text += std::string(" (this build has ") + cuda_build() + ")";
  throw std::runtime_error(text);
}

// `what` names the kernel in errors. A kernel that fails while it runs is reported by a later call, as always in CUDA.
template <class... Parameters>
void launch(const char* what, void (*kernel)(Parameters...), const Grid& grid, const Execution& execution,
            Parameters... arguments) {
  constexpr int always_allowed = 48 * 1024;
  const void* function = reinterpret_cast<const void*>(kernel);
  if (grid.shared_bytes > always_allowed)
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes), what);
  void* addresses[] = {&arguments...};
  check(cudaLaunchKernel(function, dim3(unsigned(grid.blocks)), dim3(unsigned(grid.threads)), addresses,
                         size_t(grid.shared_bytes), static_cast<cudaStream_t>(execution.stream)),
        what);
}

// Of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "the current device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "the number of multiprocessors");
  return count;
}

#else

// Few, so that small cases give a block more than one piece of work.
inline int multiprocessors() { return 2; }

template <class... Parameters>
void launch(const char* what, void (*kernel)(Parameters...), const Grid& grid, const Execution&,
            Parameters... arguments) {
  emulator::launch(what, grid.blocks, grid.threads, grid.shared_bytes, [=] { kernel(arguments...); });
}

#endif

// Sums are kept in this type.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

// Calls `body` with a value of the storage type.
template <class Body>
void dispatch(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: return body(float{});
    case DType::f64: return body(double{});
    case DType::f16: return body(Half{});
    case DType::bf16: return body(BFloat16{});
  }
}

// The distance of the last element from the first one.
template <int Rank>
int64_t reach(const int64_t (&sizes)[Rank], const int64_t (&strides)[Rank]) {
  int64_t last = 0;
  for (int d = 0; d < Rank; ++d) last += sizes[d] > 0 ? (sizes[d] - 1) * strides[d] : 0;
  return last;
}

// Whether every element's offset and number, and every coordinate with its padding, is below `limit`.
inline bool within(const Problem& p, int64_t limit) {
  const int64_t x[] = {p.batch, p.channels, p.in_h, p.in_w};
  const int64_t w[] = {p.batch, p.groups, p.kernel_h, p.kernel_w, p.out_h, p.out_w};
  const int64_t y[] = {p.batch, p.channels, p.out_h, p.out_w};
  const auto count = [limit](const int64_t* sizes, int rank) {
    int64_t product = 1;
    for (int d = 0; d < rank && product < limit; ++d) product *= sizes[d] > 0 ? sizes[d] : 1;
    return product;
  };
  const int64_t rows = p.in_h + 2 * p.padding_h + p.dilation_h * p.kernel_h + p.stride_h;
  const int64_t columns = p.in_w + 2 * p.padding_w + p.dilation_w * p.kernel_w + p.stride_w;
  return reach(x, p.x_stride) < limit && reach(w, p.w_stride) < limit && reach(y, p.y_stride) < limit &&
         count(x, 4) < limit && count(w, 6) < limit && count(y, 4) < limit && rows < limit && columns < limit;
}

}  // namespace pyinvolution::cuda
