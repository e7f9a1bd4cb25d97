#include "../variants.h"
#include "config.cuh"

namespace pyinvolution::cuda {

Refusal mma_refusal(const Problem& p, Pass pass) {
  if (!mma::takes(p.dtype)) return needs("float16 or bfloat16", to_string(p.dtype));
  if (const Refusal refusal = common_refusal(p)) return refusal;
  if (p.group_channels() != group_channels) return needs("16 channels per group", p.group_channels());
  if (!taps_are_inner(p) && !columns_are_inner(p))
    return needs(
        "a weight with dense taps or dense columns, and groups and taps at equal distances (strides of taps and "
        "columns)",
        p.w_stride[3], p.w_stride[5]);
  const int64_t channel_stride = (pass == Pass::grad_input ? p.y_stride : p.x_stride)[1];
  if (channel_stride != 1 && !columns_are_inner(p))
    return needs("a channel stride of 1 where the taps of the weight are dense", channel_stride);
  if (!within(image_with_margin(p), tile_limit))
    return needs("an image whose offsets fit in 32 bits (height and width)", p.in_h, p.in_w);
  return tiles_refusal(p.batch * p.groups * ((p.in_h + 2 * p.padding_h) / 4 + 1) *
                       ((p.in_w + 2 * p.padding_w) / 8 + 1));
}

void mma_run(const Problem& problem, Pass pass, const Buffers& buffers, const Execution& execution) {
  if (problem.batch == 0) return;
  with_dtype(problem.dtype, [&](auto dtype) {
    if constexpr (mma::takes(dtype.value)) mma::run<dtype.value>(problem, pass, buffers, execution);
  });
}

}  // namespace pyinvolution::cuda
