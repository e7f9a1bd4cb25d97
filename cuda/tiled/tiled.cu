#include "tiled.h"

#include "launch.cuh"

namespace pyinvolution::cuda {

const char* tiled_refusal(const Problem& p, Pass) {
  if (p.dtype == DType::f64) return "it sums in float, and the problem is in double";
  if (const char* refusal = usual_refusal(p)) return refusal;
  if (p.groups < 1 || p.group_channels() % 8 != 0 || p.group_channels() < 8 || p.group_channels() > 32)
    return "it has 8, 16, 24 or 32 channels a group";
  if (!tiled::taps_are_inner(p) && p.w_stride[5] != 1) return "neither taps nor columns of the weight are dense";

  // Offsets within an image are 32-bit, as is the number of blocks.
  Problem image = p;
  image.batch = 1;
  constexpr int64_t limit = int64_t{1} << 30;
  if (!within(image, limit)) return "an image, its kernels or their strides are too large for 32-bit offsets";
  if (p.batch * p.groups * ((p.in_h + 2 * p.padding_h) / 8 + 1) * ((p.in_w + 2 * p.padding_w) / 8 + 1) >= limit)
    return "it has too many tiles for one grid";
  return nullptr;
}

void tiled_run(const Problem& problem, Pass pass, const Buffers& buffers, const Execution& execution) {
  if (problem.batch == 0) return;
  switch (problem.dtype) {
    case DType::f32: return tiled::run_f32(problem, pass, buffers, execution);
    case DType::f16: return tiled::run_f16(problem, pass, buffers, execution);
    case DType::bf16: return tiled::run_bf16(problem, pass, buffers, execution);
    case DType::f64: return;  // refused
  }
}

}  // namespace pyinvolution::cuda
