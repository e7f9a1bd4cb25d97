#pragma once

#include <torch/csrc/stable/tensor.h>

#include "pyinvolution/dispatch.h"

namespace pyinvolution::ops {

// The current stream of a tensor on a CUDA device.
void* current_stream(const torch::stable::Tensor& where);

// Runs a variant where `where` lives: on torch's thread pool, or on the current stream of its CUDA device. The
// arguments have been checked, and the output has elements.
void launch(const torch::stable::Tensor& where, const Variant&, const Problem&, Pass, const Buffers&);
// The same with the variant that `choose` takes, after a measurement where there is to be one (autotune.h). `result` is
// what the pass computes; its place in `buffers` is filled in.
void compute(const torch::stable::Tensor& where, const Problem&, Pass, Buffers buffers,
             const torch::stable::Tensor& result);
// Allocates what the variant needs in buffers.scratch.
void launch(const torch::stable::Tensor& where, const SpanVariant&, const SpanProblem&, SpanOp, const SpanBuffers&);

// Torch's thread pool.
Execution cpu_execution();

}  // namespace pyinvolution::ops
