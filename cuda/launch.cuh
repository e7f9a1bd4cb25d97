// Launching a kernel, on a GPU or in the emulator, and choosing its template arguments from a Problem.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "primitives.cuh"
#include "pyinvolution/dispatch.h"

#ifdef __CUDACC__
#include <cuda_runtime_api.h>

#include "errors.cuh"
#endif

namespace pyinvolution::cuda {

struct Grid {
  int64_t blocks;
  int threads;
  int shared_bytes;
};

#ifdef __CUDACC__

inline void allow_shared_memory(const void* kernel, int bytes, const char* what) {
  constexpr int always_allowed = 48 * 1024;
  if (bytes <= always_allowed) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), what);
  // Shared memory and the first level of cache share their memory. Two blocks of 94 KB on a multiprocessor, as
  // cuda/fused wants them, fit only where shared memory gets all that it can.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        what);
}

// `what` names the kernel in errors. A kernel that fails while it runs is reported by a later call, as always in CUDA.
template <class... Parameters>
void launch(const char* what, void (*kernel)(Parameters...), const Grid& grid, const Execution& execution,
            Parameters... arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  allow_shared_memory(function, grid.shared_bytes, what);
  void* addresses[] = {&arguments...};
  check(cudaLaunchKernel(function, dim3(unsigned(grid.blocks)), dim3(unsigned(grid.threads)), addresses,
                         size_t(grid.shared_bytes), static_cast<cudaStream_t>(execution.stream)),
        what);
}

// The number of multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "the current device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "the number of multiprocessors");
  return count;
}

// How many blocks of a kernel the current device runs at once.
template <class... Parameters>
int resident_blocks(const char* what, void (*kernel)(Parameters...), int threads, int shared_bytes) {
  const void* function = reinterpret_cast<const void*>(kernel);
  allow_shared_memory(function, shared_bytes, what);
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, threads, size_t(shared_bytes)), what);
  return std::max(1, blocks) * multiprocessors();
}

#else

// So few that small cases give a block more than one piece of work.
inline int multiprocessors() { return 2; }
template <class... Parameters>
int resident_blocks(const char*, void (*)(Parameters...), int, int) {
  return 2 * multiprocessors();
}

template <class... Parameters>
void launch(const char* what, void (*kernel)(Parameters...), const Grid& grid, const Execution&,
            Parameters... arguments) {
  emulator::launch(what, grid.blocks, grid.threads, grid.shared_bytes, [=] { kernel(arguments...); });
}

#endif

// The storage type of a dtype and the type of its sums.
template <DType>
struct StorageOf;
template <class T>
struct AccumulatorOf;
#define PYINVOLUTION_TYPES(name, text, storage, sum, scalar_type) \
  template <>                                                     \
  struct StorageOf<DType::name> {                                 \
    using type = storage;                                         \
  };                                                              \
  template <>                                                     \
  struct AccumulatorOf<storage> {                                 \
    using type = sum;                                             \
  };
PYINVOLUTION_DTYPES(PYINVOLUTION_TYPES)
#undef PYINVOLUTION_TYPES
template <DType dtype>
using Storage = typename StorageOf<dtype>::type;
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

// Calls `body` with the dtype as an integral_constant.
template <class Body>
void with_dtype(DType dtype, const Body& body) {
  switch (dtype) {
#define PYINVOLUTION_CASE(name, text, storage, sum, scalar_type) \
  case DType::name: return body(std::integral_constant<DType, DType::name>{});
    PYINVOLUTION_DTYPES(PYINVOLUTION_CASE)
#undef PYINVOLUTION_CASE
  }
}

// The same with the size of a square kernel; see `common_refusal`.
template <class Body>
void with_square_kernel(int64_t size, const Body& body) {
  switch (size) {
    case 3: return body(std::integral_constant<int, 3>{});
    case 5: return body(std::integral_constant<int, 5>{});
    case 7: return body(std::integral_constant<int, 7>{});
  }
}

// The distance of the last element from the first one.
template <int Rank>
int64_t reach(const int64_t (&sizes)[Rank], const int64_t (&strides)[Rank]) {
  int64_t last = 0;
  for (int d = 0; d < Rank; ++d) last += sizes[d] > 0 ? (sizes[d] - 1) * strides[d] : 0;
  return last;
}

// How many elements, of `most` and its halves, can be moved at once: they divide all of `sizes`, and `data` is aligned
// to them.
template <class T>
int vector_of(int most, const void* data, std::initializer_list<int64_t> sizes) {
  const auto fits = [&](int vector) {
    return reinterpret_cast<uintptr_t>(data) % (size_t(vector) * sizeof(T)) == 0 &&
           std::all_of(sizes.begin(), sizes.end(), [&](int64_t size) { return size % vector == 0; });
  };
  while (most > 1 && !fits(most)) most /= 2;
  return most;
}

// What kernels in tiles require: an input and an output, and with few exceptions windows as a convolution has them.
inline Refusal image_refusal(const Problem& p) {
  if (p.in_h < 1 || p.in_w < 1) return needs("an input with pixels", p.in_h, p.in_w);
  if (p.out_h < 1 || p.out_w < 1) return needs("an output with pixels", p.out_h, p.out_w);
  return {};
}
inline Refusal pixels_refusal(const Problem& p) {
  const Refusal refusal = window_refusal(p);
  return refusal ? refusal : image_refusal(p);
}

// What kernels for square windows and dense rows require.
inline Refusal common_refusal(const Problem& p) {
  if (p.kernel_h != p.kernel_w || (p.kernel_h != 3 && p.kernel_h != 5 && p.kernel_h != 7))
    return needs("a 3 x 3, 5 x 5 or 7 x 7 kernel", p.kernel_h, p.kernel_w);
  if (p.dilation_h != 1 || p.dilation_w != 1) return needs("a dilation of 1", p.dilation_h, p.dilation_w);
  if (p.stride_h != p.stride_w || p.stride_h > 2)
    return needs("a stride of 1 or 2, equal in both directions", p.stride_h, p.stride_w);
  if (p.x_stride[1] != 1 && p.x_stride[3] != 1)
    return needs("an input with dense channels or dense columns (strides of channels and columns)", p.x_stride[1],
                 p.x_stride[3]);
  if (p.y_stride[1] != 1 && p.y_stride[3] != 1)
    return needs("an output with dense channels or dense columns (strides of channels and columns)", p.y_stride[1],
                 p.y_stride[3]);
  return pixels_refusal(p);
}

// What kernels in tiles are told about the images: q.x is the one with a halo and q.y the tiled one. These are X and Y;
// in the gradient of the input they are Y and X.
template <class KernelParams, class View>
void set_images(KernelParams& q, const Problem& p, Pass pass, const View& x, const View& y) {
  const bool to_input = pass == Pass::grad_input;
  q.x = to_input ? y : x, q.y = to_input ? x : y;
  q.x_height = int(to_input ? p.out_h : p.in_h), q.x_width = int(to_input ? p.out_w : p.in_w);
  q.y_height = int(to_input ? p.in_h : p.out_h), q.y_width = int(to_input ? p.in_w : p.out_w);
  q.w_height = int(p.out_h), q.w_width = int(p.out_w);
  q.padding_h = int(p.padding_h), q.padding_w = int(p.padding_w);
  q.groups = int(p.groups);
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
  const int64_t rows = (p.in_h + 2 * p.padding_h + p.dilation_h * p.kernel_h + p.stride_h) * p.upsample_h;
  const int64_t columns = (p.in_w + 2 * p.padding_w + p.dilation_w * p.kernel_w + p.stride_w) * p.upsample_w;
  return reach(x, p.x_stride) < limit && reach(w, p.w_stride) < limit && reach(y, p.y_stride) < limit &&
         count(x, 4) < limit && count(w, 6) < limit && count(y, 4) < limit && rows < limit && columns < limit;
}

// Kernels in tiles number their blocks and the elements of an image by 32 bits.
constexpr int64_t tile_limit = int64_t{1} << 30;

inline Refusal tiles_refusal(int64_t tiles) {
  return tiles >= tile_limit ? needs("fewer than 2^30 tiles", tiles) : Refusal{};
}

}  // namespace pyinvolution::cuda
