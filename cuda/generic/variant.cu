#include "../variants.h"
#include "config.cuh"

namespace pyinvolution::cuda {

Refusal generic_refusal(const Problem&, Pass) { return {}; }

void generic_run(const Problem& problem, Pass pass, const Buffers& buffers, const Execution& execution) {
  with_dtype(problem.dtype, [&](auto dtype) { generic::run<dtype.value>(problem, pass, buffers, execution); });
}

}  // namespace pyinvolution::cuda
