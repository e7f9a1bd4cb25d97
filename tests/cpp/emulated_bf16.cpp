// The loops of avx512_bf16 with a scalar model of its instructions, for any processor.
#define PYINVOLUTION_EMULATED_BF16
#define KERNELS emulated_bf16_kernels
#define OTHER_KERNELS baseline_kernels
#define VECTOR_BYTES 16
#define MULTIPLY_ROWS 5
#define MULTIPLY_SINGLE_ROWS 10
#include "cpu/instances/pairs.inl"
