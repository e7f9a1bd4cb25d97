// What the compiler targets without flags: SSE2 (16 registers of 16 bytes) or NEON (32 of them).
#define KERNELS baseline_kernels
#define VECTOR_BYTES 16
#if defined(__aarch64__)
#define APPLY_COLUMNS 5
#define MULTIPLY_ROWS 10
#define MULTIPLY_SINGLE_ROWS 16
#else
#define APPLY_COLUMNS 2
#define MULTIPLY_ROWS 5
#define MULTIPLY_SINGLE_ROWS 10
#endif
#include "cpu/instances/kernels.inl"
