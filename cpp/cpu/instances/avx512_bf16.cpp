// AVX512-BF16: dot products of pairs of bfloat16. What does not compute with them is the code of avx512.
#define KERNELS avx512_bf16_kernels
#define OTHER_KERNELS avx512_kernels
#define VECTOR_BYTES 64
#define MULTIPLY_ROWS 14
#define MULTIPLY_SINGLE_ROWS 16
#include "cpu/instances/pairs.inl"
