// Everything in which a kernel on the GPU differs from the same source in the host emulator of the tests
// (tests/cpp/cuda_emulator): shared memory, and the instructions that CUDA C++ has no name for. Kernels contain no PTX.
#pragma once

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace pyinvolution::cuda {

using Half = __half;
using BFloat16 = __nv_bfloat16;

__device__ __forceinline__ float load(float value) { return value; }
__device__ __forceinline__ double load(double value) { return value; }
__device__ __forceinline__ float load(Half value) { return __half2float(value); }
__device__ __forceinline__ float load(BFloat16 value) { return __bfloat162float(value); }

// Rounds to nearest, ties to even.
__device__ __forceinline__ void store(float value, float* to) { *to = value; }
__device__ __forceinline__ void store(double value, double* to) { *to = value; }
__device__ __forceinline__ void store(float value, Half* to) { *to = __float2half_rn(value); }
__device__ __forceinline__ void store(float value, BFloat16* to) { *to = __float2bfloat16_rn(value); }

// Two numbers, rounded like that, in the halves of a register.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, Half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  }
  return bits;
}

// The block's dynamic shared memory, of which there is one.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

// The same number, unknown to the compiler: values that depend on it are computed again where a loop uses them, instead
// of being kept in registers.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Whether the compiler finds registers for much that a kernel keeps: for older GPUs it would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool keeps_many_registers = false;
#else
constexpr bool keeps_many_registers = true;
#endif

// The thread's number in the block, read again: it takes no register in between.
__device__ __forceinline__ unsigned thread_again() {
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// The same value, unknown to the compiler: what is derived from it outside a loop is kept in registers, instead of
// being computed again in the loop.
__device__ __forceinline__ int kept(int value) { return opaque(value); }
__device__ __forceinline__ float kept(float value) {
  asm volatile("" : "+f"(value));
  return value;
}
template <class T>
__device__ __forceinline__ T* kept(T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies Bytes (4, 8 or 16, and aligned to that) to shared memory in the background, or zeros where not `valid`.
template <int Bytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid = true) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "what cp.async can copy");
  const int bytes = valid ? Bytes : 0;
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(Bytes),
                 "r"(bytes)
                 : "memory");
  }
}
// Ends a group of copies of this thread.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the newest GroupsLeft groups of this thread are still running.
template <int GroupsLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GroupsLeft) : "memory");
}

// Four 8x8 matrices of 16-bit elements (ldmatrix.x4): lane i gives the address of row i%8 of matrix i/8, 16 bytes, and
// gets elements 2*(i%4) and 2*(i%4)+1 of row i/4 of each; transposed: of column i/4. Or two (ldmatrix.x2), from the
// addresses of lanes 0 to 15.
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(registers[0]), "=r"(registers[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&registers)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(registers[0]), "=r"(registers[1])
               : "r"(shared_address(row))
               : "memory");
}
// An 8x8 matrix in the registers of a warp, laid out as above, transposed.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t value) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(value));
  return result;
}

// d = a * b + c for T (Half or BFloat16) with sums in float: d is 16 x 8, a is 16 x depth, b is depth x 8, depth 16 or
// 8. With row = lane/4 and pair = 2*(lane%4), a lane holds d[row][pair, pair+1], d[row+8][pair, pair+1];
// a[row][pair..], a[row+8][pair..] and the same 8 columns on; b[pair..][row] and the same 8 rows on. Volatile, or the
// compiler could move one into a branch that a part of the warp takes.
#define PYINVOLUTION_MMA(shape, type, a, b, c) \
  "mma.sync.aligned." shape ".row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, " a ", " b ", " c ";"
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                         const float (&c)[4]) {
  if constexpr (std::is_same_v<T, Half>) {
    asm volatile(PYINVOLUTION_MMA("m16n8k16", "f16", "{%4, %5, %6, %7}", "{%8, %9}", "{%10, %11, %12, %13}")
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
                   "f"(c[3]));
  } else {
    asm volatile(PYINVOLUTION_MMA("m16n8k16", "bf16", "{%4, %5, %6, %7}", "{%8, %9}", "{%10, %11, %12, %13}")
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
                   "f"(c[3]));
  }
}
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1],
                                         const float (&c)[4]) {
  if constexpr (std::is_same_v<T, Half>) {
    asm volatile(PYINVOLUTION_MMA("m16n8k8", "f16", "{%4, %5}", "{%6}", "{%7, %8, %9, %10}")
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b[0]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  } else {
    asm volatile(PYINVOLUTION_MMA("m16n8k8", "bf16", "{%4, %5}", "{%6}", "{%7, %8, %9, %10}")
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b[0]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  }
}
#undef PYINVOLUTION_MMA
// The same with d for c.
template <class T, int A, int B>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[A], const uint32_t (&b)[B]) {
  multiply<T>(d, a, b, d);
}

}  // namespace pyinvolution::cuda

#else
#include "emulator.h"
#endif
