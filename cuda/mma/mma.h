// The `mma` variant of the plan table: half and bfloat16 with 16 channels a group, on tensor cores.
#pragma once

#include "pyinvolution/problem.h"

namespace pyinvolution::cuda {

const char* mma_refusal(const Problem&, Pass);
void mma_run(const Problem&, Pass, const Buffers&, const Execution&);

}  // namespace pyinvolution::cuda
