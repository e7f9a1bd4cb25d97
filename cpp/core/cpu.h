// The CPU variants of the plan table.
#pragma once

#include "pyinvolution/problem.h"

namespace pyinvolution::cpu {

// Loops as in the equation: every problem.
const char* scalar_refusal(const Problem&, Pass);
void scalar_run(const Problem&, Pass, const Buffers&, const Execution&);

// Vectors along the output columns: every problem.
const char* columns_refusal(const Problem&, Pass);
void columns_run(const Problem&, Pass, const Buffers&, const Execution&);

// A thread's scratch memory of at least `bytes`, aligned to 64 bytes; the next call of the same thread reuses it.
void* scratch(int64_t bytes);

}  // namespace pyinvolution::cpu
