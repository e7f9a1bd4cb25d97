// What CUDA code this build holds.
#pragma once

#include "pyinvolution/export.h"

namespace pyinvolution::cuda {

// "CUDA 13.0, architectures 80 86 89 90", or "none: " and the reason.
PYINVOLUTION_API const char* cuda_build();

}  // namespace pyinvolution::cuda
