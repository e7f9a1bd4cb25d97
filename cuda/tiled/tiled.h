// The `tiled` variant of the plan table: kernels of 3, 5 or 7 in float, half and bfloat16, from tiles in shared memory.
#pragma once

#include "pyinvolution/problem.h"

namespace pyinvolution::cuda {

const char* tiled_refusal(const Problem&, Pass);
void tiled_run(const Problem&, Pass, const Buffers&, const Execution&);

}  // namespace pyinvolution::cuda
