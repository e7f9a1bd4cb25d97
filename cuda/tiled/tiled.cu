#include "../variants.h"
#include "launch.cuh"

namespace pyinvolution::cuda {

Refusal tiled_refusal(const Problem& p, Pass) {
  if (p.dtype == DType::f64)
    return needs("float32, float16 or bfloat16 (it accumulates in float32)", to_string(p.dtype));
  if (const Refusal refusal = common_refusal(p)) return refusal;
  if (p.group_channels() % 8 != 0 || p.group_channels() < 8 || p.group_channels() > 32)
    return needs("8, 16, 24 or 32 channels per group", p.group_channels());
  if (!tiled::taps_are_inner(p) && p.w_stride[5] != 1) return needs("a weight with dense taps or dense columns");

  // Offsets within an image are 32-bit, as is the number of blocks.
  Problem image = p;
  image.batch = 1;
  constexpr int64_t limit = int64_t{1} << 30;
  if (!within(image, limit)) return needs("an image whose offsets fit in 32 bits");
  if (p.batch * p.groups * ((p.in_h + 2 * p.padding_h) / 8 + 1) * ((p.in_w + 2 * p.padding_w) / 8 + 1) >= limit)
    return needs("fewer than 2^30 tiles");
  return {};
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
