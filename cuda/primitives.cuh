// Everything in which a kernel on the GPU differs from the same source in the host emulator of the tests
// (tests/cpp/cuda_emulator): shared memory and the instructions that CUDA C++ has no word for. Kernels hold no PTX.
#pragma once

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace pyinvolution::cuda {

using Half = __half;
using BFloat16 = __nv_bfloat16;

__device__ __forceinline__ float load(float value) { return value; }
__device__ __forceinline__ double load(double value) { return value; }
__device__ __forceinline__ float load(Half value) { return __half2float(value); }
__device__ __forceinline__ float load(BFloat16 value) { return __bfloat162float(value); }

// To nearest even.
__device__ __forceinline__ void store(float value, float* to) { *to = value; }
__device__ __forceinline__ void store(double value, double* to) { *to = value; }
__device__ __forceinline__ void store(float value, Half* to) { *to = __float2half_rn(value); }
__device__ __forceinline__ void store(float value, BFloat16* to) { *to = __float2bfloat16_rn(value); }

}  // namespace pyinvolution::cuda

#else
#include "emulator.h"
#endif
