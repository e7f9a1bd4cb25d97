// The CUDA variants of the plan table in a build without CUDA code: each refuses with the reason.
// The build defines PYINVOLUTION_NO_CUDA_REASON, a sentence.
#include <stdexcept>

#include "../../cuda/build.h"
#include "../../cuda/fused/fused.h"
#include "../../cuda/generic/generic.h"
#include "../../cuda/mma/mma.h"
#include "../../cuda/tiled/tiled.h"

#ifndef PYINVOLUTION_NO_CUDA_REASON
#define PYINVOLUTION_NO_CUDA_REASON "no nvcc was found when it was built"
#endif

namespace pyinvolution::cuda {
namespace {

constexpr const char* refusal = "this build has no CUDA code: " PYINVOLUTION_NO_CUDA_REASON;

}  // namespace

const char* cuda_build() { return "none: " PYINVOLUTION_NO_CUDA_REASON; }

const char* generic_refusal(const Problem&, Pass) { return refusal; }
void generic_run(const Problem&, Pass, const Buffers&, const Execution&) { throw std::runtime_error(refusal); }

const char* tiled_refusal(const Problem&, Pass) { return refusal; }
void tiled_run(const Problem&, Pass, const Buffers&, const Execution&) { throw std::runtime_error(refusal); }

const char* mma_refusal(const Problem&, Pass) { return refusal; }
void mma_run(const Problem&, Pass, const Buffers&, const Execution&) { throw std::runtime_error(refusal); }

const char* fused_refusal(const SpanProblem&, SpanPass) { return refusal; }
int64_t fused_scratch(const SpanProblem&, SpanPass) { throw std::runtime_error(refusal); }
void fused_run(const SpanProblem&, SpanPass, const SpanBuffers&, const Execution&) {
  throw std::runtime_error(refusal);
}

}  // namespace pyinvolution::cuda
