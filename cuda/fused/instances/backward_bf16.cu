#include "backward_launch.cuh"

namespace pyinvolution::cuda::fused {

void backward_bf16(const SpanProblem& p, const SpanBuffers& buffers, const Execution& execution) {
  backward<BFloat16>(p, buffers, execution);
}

}  // namespace pyinvolution::cuda::fused
