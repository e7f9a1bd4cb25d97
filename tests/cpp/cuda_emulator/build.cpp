// In place of cuda/build.cu.
#include "cuda/variants.h"

const char* pyinvolution::cuda::build() { return "emulated"; }
