#include "../variants.h"
#include "config.cuh"

namespace pyinvolution::cuda {

Refusal tiled_refusal(const Problem& p, Pass) {
  if (!tiled::takes(p.dtype))
    return needs("float32, float16 or bfloat16 (it accumulates in float32)", to_string(p.dtype));
  if (const Refusal refusal = common_refusal(p)) return refusal;
  if (p.group_channels() % 8 != 0 || p.group_channels() < 8 || p.group_channels() > 32)
    return needs("8, 16, 24 or 32 channels per group", p.group_channels());
  if (!tiled::taps_are_inner(p) && p.w_stride[5] != 1)
    return needs("a weight with dense taps or dense columns (strides of taps and columns)", p.w_stride[3],
                 p.w_stride[5]);
  Problem image = p;
  image.batch = 1;
  if (!within(image, tile_limit))
    return needs("an image whose offsets fit in 32 bits (height and width)", p.in_h, p.in_w);
  return tiles_refusal(p.batch * p.groups * ((p.in_h + 2 * p.padding_h) / 8 + 1) *
                       ((p.in_w + 2 * p.padding_w) / 8 + 1));
}

void tiled_run(const Problem& problem, Pass pass, const Buffers& buffers, const Execution& execution) {
  if (problem.batch == 0) return;
  with_dtype(problem.dtype, [&](auto dtype) {
    if constexpr (tiled::takes(dtype.value)) tiled::run<dtype.value>(problem, pass, buffers, execution);
  });
}

}  // namespace pyinvolution::cuda
