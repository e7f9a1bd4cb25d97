// Upsampling by kernels that have none. The outputs (a + u_h p, b + u_w q) are a phase: an involution without upsampling
// of the same input, whose W and Y are views of the whole. Phases write other elements of Y, or of the gradient of W;
// the gradient of X is a sum over phases.
#pragma once

#include "pyinvolution/problem.h"

namespace pyinvolution {

// Whether `run_phases` runs this problem: it has an upsampling, and what its sum needs can be allocated. On a GPU the
// generic kernel takes what has no phases.
bool has_phases(const Problem&, Pass);

// A phase as a problem. A phase of the gradient of X gives a dense one in the type that sums are kept in, computed from
// W and Y in this type, which are dense copies where they had another.
Problem phase_of(const Problem&, Pass);

// Calls `run` for each phase. Allocates memory for grad_input; throws std::bad_alloc.
void run_phases(void (*run)(const Problem&, Pass, const Buffers&, const Execution&), const Problem&, Pass,
                const Buffers&, const Execution&);

}  // namespace pyinvolution
