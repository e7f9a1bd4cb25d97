// The loops over pairs of bfloat16 with the instruction set of the including file, which defines
//
//   KERNELS        the name of the table
//   OTHER_KERNELS  that of the table whose loops do everything else
//   VECTOR_BYTES   of a vector of the latter
//   MULTIPLY_ROWS, MULTIPLY_SINGLE_ROWS   as for kernels.inl
//
// What kernels.inl says of names and their linkage holds here, too.
#include "cpu/batch_norm/loops.inl"
#include "cpu/channels/forward_pairs.inl"
// (backward_pairs.inl uses what is in forward_pairs.inl)
#include "cpu/channels/backward_pairs.inl"
#include "cpu/generation/loops.inl"
#include "cpu/kernels.h"
#include "cpu/simd/pairs_sums.h"

namespace pyinvolution::cpu {
namespace {

void columns_task(const ColumnsTiling& tiling, int64_t task, void* scratch) {
  OTHER_KERNELS.columns(tiling, task, scratch);
}
void channels_task(const ChannelsTiling& tiling, bool reduce, int64_t task, void* scratch) {
  if (tiling.pairs)
    run_strip_task<PairsRun>(tiling, reduce, task, scratch);
  else
    OTHER_KERNELS.channels(tiling, reduce, task, scratch);
}
void backward_task(const BackwardTiling& tiling, bool finish, int64_t task, void* scratch) {
  if (tiling.pairs)
    run_backward_task<BackwardPairsRun>(tiling, finish, task, scratch);
  else
    OTHER_KERNELS.backward(tiling, finish, task, scratch);
}

void batch_norm_task(const BatchNormTiling& tiling, BatchNormStep step, int64_t task) {
  // With the instruction that rounds.
  if (tiling.dtype == DType::bf16) return batch_norm<BFloat16>(tiling, step, task);
  OTHER_KERNELS.batch_norm(tiling, step, task);
}

void generation_task(const GenerationTiling& tiling, GenerationStep step, int64_t task, void* scratch) {
  // The same.
  if (tiling.dtype == DType::bf16) return generation<BFloat16>(tiling, step, task, scratch);
  OTHER_KERNELS.generation(tiling, step, task, scratch);
}

}  // namespace

constexpr CpuKernels KERNELS = {
    VECTOR_BYTES, true, columns_task, channels_task, backward_task, batch_norm_task, generation_task, pair_product};

}  // namespace pyinvolution::cpu
