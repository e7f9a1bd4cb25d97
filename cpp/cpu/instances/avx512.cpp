// AVX-512 F, BW, DQ and VL: 32 registers of 64 bytes.
#define KERNELS avx512_kernels
#define VECTOR_BYTES 64
#define APPLY_COLUMNS 14
#define MULTIPLY_ROWS 14
#define MULTIPLY_SINGLE_ROWS 16
#include "cpu/instances/kernels.inl"
