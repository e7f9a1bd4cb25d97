#include <algorithm>

#include "../variants.h"
#include "launch.cuh"

namespace pyinvolution::cuda {

Refusal mma_refusal(const Problem& p, Pass pass) {
  if (p.dtype != DType::f16 && p.dtype != DType::bf16) return needs("float16 or bfloat16", to_string(p.dtype));
  if (const Refusal refusal = common_refusal(p)) return refusal;
  if (p.group_channels() != mma::group_channels) return needs("16 channels per group", p.group_channels());
  if (!mma::taps_are_inner(p) && !mma::columns_are_inner(p))
    return needs("a weight with dense taps or dense columns, and groups and taps at equal distances");
  const int64_t channel_stride = (pass == Pass::grad_input ? p.y_stride : p.x_stride)[1];
  if (channel_stride != 1 && !mma::columns_are_inner(p))
    return needs("a channel stride of 1 where the taps of the weight are dense", channel_stride);

  // Offsets within an image are 32-bit, also those in the halo and in parts of tiles beyond the image, as is the number
  // of blocks.
  Problem image = p;
  image.batch = 1;
  for (int64_t* size : {&image.in_h, &image.in_w, &image.out_h, &image.out_w})
    *size += 32 + 2 * std::max(p.padding_h, p.padding_w);
  constexpr int64_t limit = int64_t{1} << 30;
  if (!within(image, limit)) return needs("an image whose offsets fit in 32 bits");
  if (p.batch * p.groups * ((p.in_h + 2 * p.padding_h) / 4 + 1) * ((p.in_w + 2 * p.padding_w) / 8 + 1) >= limit)
    return needs("fewer than 2^30 tiles");
  return {};
}

void mma_run(const Problem& problem, Pass pass, const Buffers& buffers, const Execution& execution) {
  if (problem.batch == 0) return;
  if (problem.dtype == DType::f16) return mma::run_f16(problem, pass, buffers, execution);
  mma::run_bf16(problem, pass, buffers, execution);
}

}  // namespace pyinvolution::cuda
