// The CPU variants of the dispatch tables.
#pragma once

#include "pyinvolution/dispatch.h"

namespace pyinvolution::cpu {

// Loops as in the equation: every problem.
Refusal scalar_refusal(const Problem&, Pass);
void scalar_run(const Problem&, Pass, const Buffers&, const Execution&);

// Vectors along the output columns: every problem.
Refusal columns_refusal(const Problem&, Pass);
void columns_run(const Problem&, Pass, const Buffers&, const Execution&);

// Vectors along the channels of a group, weights from memory.
Refusal channels_refusal(const Problem&, Pass);
void channels_run(const Problem&, Pass, const Buffers&, const Execution&);

// The same with weights computed tile by tile.
Refusal fused_refusal(const SpanProblem&, SpanOp);
void fused_run(const SpanProblem&, SpanOp, const SpanBuffers&, const Execution&);

// A thread's scratch memory of at least `bytes`, aligned to 64 bytes; the next call of the same thread reuses it.
// `task` is what tasks use, `call` what lives as long as an operator's call.
enum class Scratch { task, call };
void* scratch(int64_t bytes, Scratch = Scratch::task);

}  // namespace pyinvolution::cpu
