#include "../launch.cuh"

namespace pyinvolution::cuda::fused {

template void run_layer<DType::f16>(const SpanProblem&, const SpanBuffers&, const Execution&);

}  // namespace pyinvolution::cuda::fused
