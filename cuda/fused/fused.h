// The `fused` variant of the plan table for span_involution2d, forward and backward: the weights stay on the SM.
#pragma once

#include "pyinvolution/problem.h"

namespace pyinvolution::cuda {

const char* fused_refusal(const SpanProblem&, SpanPass);
int64_t fused_scratch(const SpanProblem&, SpanPass);
void fused_run(const SpanProblem&, SpanPass, const SpanBuffers&, const Execution&);

}  // namespace pyinvolution::cuda
