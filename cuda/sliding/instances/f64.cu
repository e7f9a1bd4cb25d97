#include "../launch.cuh"

namespace pyinvolution::cuda::sliding {

template void run<DType::f64>(const Problem&, Pass, const Buffers&, const Execution&);

}  // namespace pyinvolution::cuda::sliding
