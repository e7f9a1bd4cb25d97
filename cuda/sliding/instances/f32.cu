#include "../launch.cuh"

namespace pyinvolution::cuda::sliding {

template void run<DType::f32>(const Problem&, Pass, const Buffers&, const Execution&);

}  // namespace pyinvolution::cuda::sliding
