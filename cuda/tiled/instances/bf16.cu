#include "launch.cuh"

namespace pyinvolution::cuda::tiled {

void run_bf16(const Problem& problem, Pass pass, const Buffers& buffers, const Execution& execution) {
  run<BFloat16>(problem, pass, buffers, execution);
}

}  // namespace pyinvolution::cuda::tiled
