// The CPU variants of the dispatch tables.
#pragma once

#include "pyinvolution/dispatch.h"

namespace pyinvolution::cpu {

// Loops as in the equation: every problem.
Refusal scalar_refusal(const Problem&, Pass);
void scalar_run(const Problem&, Pass, const Buffers&, const Execution&);

// Vectors along the output columns: every problem without upsampling, which is computed in phases.
Refusal columns_refusal(const Problem&, Pass);
void columns_run(const Problem&, Pass, const Buffers&, const Execution&);

// Vectors along the channels of a group, weights from memory.
Refusal channels_refusal(const Problem&, Pass);
void channels_run(const Problem&, Pass, const Buffers&, const Execution&);

// The same with weights computed tile by tile.
Refusal fused_refusal(const SpanProblem&, SpanOp);
void fused_run(const SpanProblem&, SpanOp, const SpanBuffers&, const Execution&);

}  // namespace pyinvolution::cpu
