#include "cpu/kernels.h"

namespace pyinvolution::cpu {

const CpuKernels& current_kernels() {
  switch (current_isa()) {
#define PYINVOLUTION_CASE(name, runs_here) \
  case Isa::name: return name##_kernels;
    PYINVOLUTION_ISAS(PYINVOLUTION_CASE)
#undef PYINVOLUTION_CASE
  }
  return baseline_kernels;
}

}  // namespace pyinvolution::cpu
