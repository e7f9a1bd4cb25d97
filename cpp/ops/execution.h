#pragma once

#include <torch/csrc/stable/tensor.h>

#include "pyinvolution/plan.h"

namespace pyinvolution::ops {

// Runs a pass where `where` lives: on torch's thread pool, or on the current stream of its CUDA device.
void run_on(const torch::stable::Tensor& where, const Problem&, Pass, const Buffers&);
void run_on(const torch::stable::Tensor& where, const Variant&, const Problem&, Pass, const Buffers&);
void run_on(const torch::stable::Tensor& where, const SpanVariant&, const SpanProblem&, SpanPass, const SpanBuffers&);

}  // namespace pyinvolution::ops
