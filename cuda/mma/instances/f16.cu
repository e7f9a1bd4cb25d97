#include "launch.cuh"

namespace pyinvolution::cuda::mma {

void run_f16(const Problem& problem, Pass pass, const Buffers& buffers, const Execution& execution) {
  run<Half>(problem, pass, buffers, execution);
}

}  // namespace pyinvolution::cuda::mma
