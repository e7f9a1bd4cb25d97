#include "launch.cuh"

namespace pyinvolution::cuda::tiled {

void run_f32(const Problem& problem, Pass pass, const Buffers& buffers, const Execution& execution) {
  run<float>(problem, pass, buffers, execution);
}

}  // namespace pyinvolution::cuda::tiled
