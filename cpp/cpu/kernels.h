// The loops of every strategy, compiled for one instruction set: one table for each, which instances/ defines.
#pragma once

#include <cstdint>

#include "core/isa.h"

namespace pyinvolution::cpu {

enum class BatchNormStep;
struct BatchNormTiling;
struct ColumnsTiling;
struct ChannelsTiling;
struct BackwardTiling;
struct PairProduct;
enum class GenerationStep;
struct GenerationTiling;

struct CpuKernels {
  int64_t vector_bytes;
  bool bfloat16_pairs;  // `channels` computes in bfloat16 by dot products of pairs
  void (*columns)(const ColumnsTiling&, int64_t task, void* scratch);
  // With `reduce` a task of the first round.
  void (*channels)(const ChannelsTiling&, bool reduce, int64_t task, void* scratch);
  // With `finish` a task of the second round.
  void (*backward)(const BackwardTiling&, bool finish, int64_t task, void* scratch);
  void (*batch_norm)(const BatchNormTiling&, BatchNormStep, int64_t task);
  void (*generation)(const GenerationTiling&, GenerationStep, int64_t task, void* scratch);
  // Products of pairs of bfloat16; nullptr: none.
  void (*pair_product)(const PairProduct&);
};

#define PYINVOLUTION_KERNELS(name, runs_here) extern const CpuKernels name##_kernels;
PYINVOLUTION_ISAS(PYINVOLUTION_KERNELS)
#undef PYINVOLUTION_KERNELS

// Those of `current_isa`.
const CpuKernels& current_kernels();

}  // namespace pyinvolution::cpu
