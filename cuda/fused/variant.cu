#include <algorithm>

#include "../variants.h"
#include "config.cuh"

namespace pyinvolution::cuda {

Refusal fused_refusal(const SpanProblem& span, SpanOp op) {
  using namespace fused;
  const Problem& p = span.involution;
  if (!takes(p.dtype)) return needs("float16 or bfloat16", to_string(p.dtype));
  if (p.kernel_h != K || p.kernel_w != K) return needs("a 7 x 7 kernel", p.kernel_h, p.kernel_w);
  if (p.dilation_h != 1 || p.dilation_w != 1) return needs("a dilation of 1", p.dilation_h, p.dilation_w);
  if (p.stride_h != p.stride_w || p.stride_h > 2)
    return needs("a stride of 1 or 2, equal in both directions", p.stride_h, p.stride_w);
  if (p.group_channels() != group_channels) return needs("16 channels per group", p.group_channels());
  const bool layer = op == SpanOp::layer;
  if (layer) {
    if (p.stride_h != 1) return needs("a stride of 1 in a whole layer", p.stride_h, p.stride_w);
    if (p.channels > chunk_channels) return needs("at most 64 channels in a whole layer", p.channels);
    if (p.padding_h > layer_padding || p.padding_w > layer_padding)
      return needs("a padding of at most 4 in a whole layer", p.padding_h, p.padding_w);
    if (span.reduce_stride[1] != 1)
      return needs("a reduce weight with dense rows (stride of its channels)", span.reduce_stride[1]);
  }
  if (span.reduced % 16 != 0 || span.reduced < 16 || span.reduced > 128)
    return needs("16 to 128 reduced channels, a multiple of 16", span.reduced);
  if (p.x_stride[1] != 1) return needs("an input with a channel stride of 1 (channels_last)", p.x_stride[1]);
  if (p.y_stride[1] != 1) return needs("an output with a channel stride of 1 (channels_last)", p.y_stride[1]);
  if (!layer && span.reduced_stride[1] != 1)
    return needs("reduced with a channel stride of 1 (channels_last)", span.reduced_stride[1]);
  const auto dense = [](const int64_t (&stride)[4]) { return stride[1] == 1 || stride[1] == 0; };
  if (op == SpanOp::backward && (!dense(span.grad_x_stride) || !dense(span.grad_reduced_stride)))
    return needs("gradients of the input and of reduced with a channel stride of 1 (channels_last)",
                 span.grad_x_stride[1], span.grad_reduced_stride[1]);
  if (span.span_stride[1] != 1)
    return needs("a span weight with dense rows (stride of its reduced channels)", span.span_stride[1]);
  if (const Refusal refusal = pixels_refusal(p)) return refusal;
  // An estimate: the weights of so few pixels stay in the L2 cache, and computing them here reads S for every 64
  // pixels.
  if (span.reduced > 64 && p.out_h * p.out_w <= 64)
    return needs(
        "at most 64 reduced channels where the output has at most 64 pixels (a separate span convolution is estimated "
        "to be faster)",
        span.reduced);
  const auto bytes_of = [&](bool aligned) {
    const auto bytes = [&](auto config, auto) { return config.bytes(int(span.reduced), layer); };
    return layer ? with_stripe_config<true>(span, aligned, bytes) : with_stripe_config<false>(span, aligned, bytes);
  };
  const int shared_bytes = std::max(bytes_of(true), bytes_of(false));
  if (shared_bytes > max_shared_bytes) return needs("at most 101376 bytes of shared memory", shared_bytes);

  Problem image = image_with_margin(p);
  std::fill_n(image.w_stride, 6, 0);
  const int64_t reduced[] = {1, span.reduced, image.out_h, image.out_w}, rows[] = {span.span_rows(), span.reduced};
  const int64_t input[] = {1, p.channels, image.in_h, image.in_w}, reduce[] = {span.reduced, p.channels};
  if (!within(image, tile_limit) || reach(rows, span.span_stride) >= tile_limit ||
      (layer ? reach(reduce, span.reduce_stride) : reach(reduced, span.reduced_stride)) >= tile_limit ||
      reach(input, span.grad_x_stride) >= tile_limit || reach(reduced, span.grad_reduced_stride) >= tile_limit)
    return needs("an image whose offsets fit in 32 bits (height and width)", p.in_h, p.in_w);
  return tiles_refusal(p.batch * p.groups * (p.out_h / 2 + 1) * (p.out_w / 8 + 1));
}

// By counting, in bfloat16; not measured. With S so large, the partial sums of its gradient take more bytes than W does,
// unless they are sums over many pixels.
Refusal fused_slower(const SpanProblem& span, SpanOp op) {
  const Problem& p = span.involution;
  if (op != SpanOp::backward || span.reduced < 64) return {};
  const int64_t pixels = p.batch * p.out_h * p.out_w;
  if (span.reduced > 64 || p.stride_h != 1)
    return needs("fewer than 64 reduced channels for gradients (the composed ones are estimated to be faster)",
                 span.reduced);
  if (pixels < 20000)
    return needs(
        "at least 20000 pixels of all outputs for gradients with 64 reduced channels (the composed ones are estimated "
        "to be faster with fewer)",
        pixels);
  return {};
}

int64_t fused_scratch(const SpanProblem& p, SpanOp op) {
  using namespace fused;
  if (op != SpanOp::backward) return 0;
  const auto floats = [&](auto config) {
    using C = decltype(config);
    const Partial partial = partial_of<C>(p);
    return span_floats(partial) + bias_floats(partial) + reduced_floats<C>(partial, p);
  };
  return (p.involution.stride_h == 2 ? floats(SpanConfig<2, 1>{}) : floats(SpanConfig<1, 1>{})) *
         int64_t{sizeof(float)};
}

void fused_run(const SpanProblem& problem, SpanOp op, const SpanBuffers& buffers, const Execution& execution) {
  if (problem.involution.batch == 0) return;
  with_dtype(problem.involution.dtype, [&](auto dtype) {
    if constexpr (fused::takes(dtype.value)) {
      if (op == SpanOp::backward) return fused::run_backward<dtype.value>(problem, buffers, execution);
      if (op == SpanOp::layer) return fused::run_layer<dtype.value>(problem, buffers, execution);
      fused::run_forward<dtype.value>(problem, buffers, execution);
    }
  });
}

}  // namespace pyinvolution::cuda
