#pragma once

#include <torch/csrc/stable/tensor.h>

#include "pyinvolution/dispatch.h"

namespace pyinvolution::ops {

// Runs a variant where `where` lives: on torch's thread pool, or on the current stream of its CUDA device. The
// arguments have been checked, and the output has elements.
void launch(const torch::stable::Tensor& where, const Variant&, const Problem&, Pass, const Buffers&);
// Allocates what the variant needs in buffers.scratch.
void launch(const torch::stable::Tensor& where, const SpanVariant&, const SpanProblem&, SpanOp, const SpanBuffers&);

// Torch's thread pool.
Execution cpu_execution();

}  // namespace pyinvolution::ops
