// The sizes of `generic`'s grid and what its kernels are told.
#pragma once

#include "../launch.cuh"
#include "pyinvolution/axis.h"

namespace pyinvolution::cuda::generic {

// With more elements than threads, a thread goes on in steps of the whole grid; a 32-bit index must allow one step past
// the last element.
constexpr int threads = 256;
constexpr int64_t max_blocks = 1 << 16;
constexpr int64_t limit_32bit = std::numeric_limits<int32_t>::max() - max_blocks * threads;

// Index is int32_t where every offset and number fits, else int64_t.
template <class Index>
struct KernelParams {
  Index count;       // elements of the tensor that is written
  bool dense_inner;  // its channels (of W: taps) are closer together in memory than its columns
  Index channels, groups, group_channels;
  Index in_h, in_w, out_h, out_w;
  Index kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  Index x_stride[4], w_stride[6], y_stride[4];

  __device__ __forceinline__ Index first_row(Index p) const { return p * stride_h - padding_h; }
  __device__ __forceinline__ Index first_column(Index p) const { return p * stride_w - padding_w; }
};

// The same for every border and upsampling. A type of its own, so that the kernels for the usual windows cost no more.
template <class Index>
struct RuleParams : KernelParams<Index> {
  Axis<Index> rows, columns;

  __device__ __forceinline__ Index first_row(Index p) const { return rows.first(p); }
  __device__ __forceinline__ Index first_column(Index p) const { return columns.first(p); }
};

// Launches the kernels for one dtype; instances/ has one file for each, so that they compile at the same time.
template <DType dtype>
void run(const Problem&, Pass, const Buffers&, const Execution&);

}  // namespace pyinvolution::cuda::generic
