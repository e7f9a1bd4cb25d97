#include "mma.h"

#include <algorithm>

#include "launch.cuh"

namespace pyinvolution::cuda {

const char* mma_refusal(const Problem& p, Pass pass) {
  if (p.dtype != DType::f16 && p.dtype != DType::bf16) return "it multiplies half and bfloat16";
  if (const char* refusal = usual_refusal(p)) return refusal;
  if (p.groups < 1 || p.group_channels() != mma::group_channels) return "it has 16 channels a group";
  if (!mma::taps_are_inner(p) && !mma::columns_are_inner(p))
    return "neither taps nor columns of the weight are dense, or its groups and taps are not evenly spaced";
  if ((pass == Pass::grad_input ? p.y_stride : p.x_stride)[1] != 1 && !mma::columns_are_inner(p))
    return "the taps of the weight are dense, and the channels of what they apply to are not";

  // Offsets within an image are 32-bit, also those in the halo and in parts of tiles beyond the image, as is the number
  // of blocks.
  Problem image = p;
  image.batch = 1;
  for (int64_t* size : {&image.in_h, &image.in_w, &image.out_h, &image.out_w})
    *size += 32 + 2 * std::max(p.padding_h, p.padding_w);
  constexpr int64_t limit = int64_t{1} << 30;
  if (!within(image, limit)) return "an image, its kernels or their strides are too large for 32-bit offsets";
  if (p.batch * p.groups * ((p.in_h + 2 * p.padding_h) / 4 + 1) * ((p.in_w + 2 * p.padding_w) / 8 + 1) >= limit)
    return "it has too many tiles for one grid";
  return nullptr;
}

void mma_run(const Problem& problem, Pass pass, const Buffers& buffers, const Execution& execution) {
  if (problem.batch == 0) return;
  if (problem.dtype == DType::f16) return mma::run_f16(problem, pass, buffers, execution);
  mma::run_bf16(problem, pass, buffers, execution);
}

}  // namespace pyinvolution::cuda
