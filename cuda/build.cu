#include "variants.h"

#define PYINVOLUTION_TEXT(x) #x
#define PYINVOLUTION_EXPANDED(x) PYINVOLUTION_TEXT(x)

namespace pyinvolution::cuda {

const char* build() {
  return "CUDA " PYINVOLUTION_EXPANDED(__CUDACC_VER_MAJOR__) "." PYINVOLUTION_EXPANDED(
      __CUDACC_VER_MINOR__) ", architectures " PYINVOLUTION_ARCHITECTURE_NAMES ", PTX " PYINVOLUTION_PTX_NAMES;
}

}  // namespace pyinvolution::cuda
