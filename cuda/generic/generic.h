// The `generic` variant of the plan table: every size, stride and dtype, on every GPU that the build has code for.
#pragma once

#include "pyinvolution/problem.h"

namespace pyinvolution::cuda {

const char* generic_refusal(const Problem&, Pass);
void generic_run(const Problem&, Pass, const Buffers&, const Execution&);

}  // namespace pyinvolution::cuda
