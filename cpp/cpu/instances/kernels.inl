// Every loop of the CPU variants with the instruction set of the including file, which defines
//
//   KERNELS               the name of the table
//   VECTOR_BYTES          of a vector
//   APPLY_COLUMNS         accumulators that the registers hold, for the micro-kernels in channels/forward.inl and
//   MULTIPLY_ROWS         simd/gemm.h
//   MULTIPLY_SINGLE_ROWS
//
// The table is the only name with external linkage. Everything else is in anonymous namespaces, and no inline function
// or template of another header is used unless it is always inlined: a copy compiled for a newer processor must not
// become the one that the linker keeps for all. tests/test_library.py checks this.
#include "cpu/batch_norm/loops.inl"
#include "cpu/channels/forward.inl"
// (backward.inl uses the block sizes of forward.inl)
#include "cpu/channels/backward.inl"
#include "cpu/columns/loops.inl"
// (generation/loops.inl uses the vectors of batch_norm/loops.inl)
#include "cpu/generation/loops.inl"
#include "cpu/kernels.h"

namespace pyinvolution::cpu {
namespace {

void batch_norm_task(const BatchNormTiling& t, BatchNormStep step, int64_t task) {
  switch (t.dtype) {
    case DType::f32: return batch_norm<float>(t, step, task);
    case DType::f16: return batch_norm<Half>(t, step, task);
    case DType::bf16: return batch_norm<BFloat16>(t, step, task);
    default: break;
  }
}

void generation_task(const GenerationTiling& t, GenerationStep step, int64_t task, void* scratch) {
  switch (t.dtype) {
    case DType::f32: return generation<float>(t, step, task, scratch);
    case DType::f16: return generation<Half>(t, step, task, scratch);
    case DType::bf16: return generation<BFloat16>(t, step, task, scratch);
    default: break;
  }
}

}  // namespace

constexpr CpuKernels KERNELS = {VECTOR_BYTES,  false,           columns_task,    channels_task,
                                backward_task, batch_norm_task, generation_task, nullptr};

}  // namespace pyinvolution::cpu
