#include "backward_launch.cuh"

namespace pyinvolution::cuda::fused {

int64_t backward_scratch(const SpanProblem& p) {
  const Problem& q = p.involution;
  const Partial partial = q.stride_h == 2 ? partial_of<SpanConfig<2, 1>>(p) : partial_of<SpanConfig<1, 1>>(p);
  const int64_t reduced = q.groups > chunk_groups ? q.batch * q.out_h * q.out_w * p.reduced : 0;
  return (span_floats(partial) + reduced) * int64_t{sizeof(float)};
}

void backward_f16(const SpanProblem& p, const SpanBuffers& buffers, const Execution& execution) {
  backward<Half>(p, buffers, execution);
}

}  // namespace pyinvolution::cuda::fused
