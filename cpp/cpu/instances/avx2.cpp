// AVX2, FMA and F16C: 16 registers of 32 bytes.
#define KERNELS avx2_kernels
#define VECTOR_BYTES 32
#define APPLY_COLUMNS 5
#define MULTIPLY_ROWS 6
#define MULTIPLY_SINGLE_ROWS 12
#include "cpu/instances/kernels.inl"
