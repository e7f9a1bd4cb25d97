// AVX512-BF16: dot products of pairs of bfloat16. Only what computes with them is compiled here; the rest is the code of
// avx512, to the last bit.
#include "cpu/kernels.h"

namespace pyinvolution::cpu {
namespace {

void columns_task(const ColumnsTiling& tiling, int64_t task, void* scratch) {
  avx512_kernels.columns(tiling, task, scratch);
}

void channels_task(const ChannelsTiling& tiling, bool reduce, int64_t task, void* scratch) {
  avx512_kernels.channels(tiling, reduce, task, scratch);
}

void backward_task(const BackwardTiling& tiling, bool finish, int64_t task, void* scratch) {
  avx512_kernels.backward(tiling, finish, task, scratch);
}

}  // namespace

constexpr CpuKernels avx512_bf16_kernels = {64, columns_task, channels_task, backward_task};

}  // namespace pyinvolution::cpu
