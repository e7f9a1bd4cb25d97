#include "../variants.h"
#include "launch.cuh"

namespace pyinvolution::cuda {
namespace {

using namespace fused;

using Strided = Config<K, 2, 4, 8, 4>;

template <class C, class T>
void run(const SpanProblem& p, const SpanBuffers& buffers, const Execution& execution) {
  const Geometry q = geometry<C, T>(p.involution, Pass::forward, {buffers.x, nullptr, buffers.y});
  const Span span = span_of<T>(p, buffers);
  const Grid grid{p.involution.batch * q.chunks * q.tiles_h * q.tiles_w, C::threads, Shared<C>::bytes(span.reduced)};
  launch<Geometry, Span, const T*, const T*, const T*, const T*, const float*, const float*, T*>(
      "fused forward", forward<C, T>, grid, execution, q, span, static_cast<T*>(buffers.x),
      static_cast<T*>(buffers.reduced), static_cast<T*>(buffers.span), static_cast<T*>(buffers.bias),
      static_cast<float*>(buffers.scale), static_cast<float*>(buffers.shift), static_cast<T*>(buffers.y));
}

template <class T>
void run_type(const SpanProblem& p, const SpanBuffers& buffers, const Execution& execution) {
  if (p.involution.stride_h == 2) return run<Strided, T>(p, buffers, execution);
  if (p.involution.out_w > 8 && Shared<Wide<K>>::bytes(int(p.reduced)) <= max_shared_bytes)
    return run<Wide<K>, T>(p, buffers, execution);
  run<Narrow<K, 1>, T>(p, buffers, execution);
}

}  // namespace

Refusal fused_refusal(const SpanProblem& span, SpanOp pass) {
  const Problem& p = span.involution;
  if (pass == SpanOp::layer) return needs("reduced channels that are computed before");
  if (p.dtype != DType::f16 && p.dtype != DType::bf16) return needs("float16 or bfloat16", to_string(p.dtype));
  if (p.kernel_h != K || p.kernel_w != K) return needs("a 7 x 7 kernel", p.kernel_h, p.kernel_w);
  if (p.dilation_h != 1 || p.dilation_w != 1) return needs("a dilation of 1", p.dilation_h, p.dilation_w);
  if (p.stride_h != p.stride_w || p.stride_h > 2)
    return needs("a stride of 1 or 2, equal in both directions", p.stride_h, p.stride_w);
  if (p.group_channels() != group_channels) return needs("16 channels per group", p.group_channels());
  if (span.reduced % 16 != 0 || span.reduced < 16 || span.reduced > 128)
    return needs("16 to 128 reduced channels, a multiple of 16", span.reduced);
  if (p.x_stride[1] != 1) return needs("an input with a channel stride of 1 (channels_last)", p.x_stride[1]);
  if (p.y_stride[1] != 1) return needs("an output with a channel stride of 1 (channels_last)", p.y_stride[1]);
  if (span.reduced_stride[1] != 1)
    return needs("reduced with a channel stride of 1 (channels_last)", span.reduced_stride[1]);
  const auto dense = [](const int64_t (&stride)[4]) { return stride[1] == 1 || stride[1] == 0; };
  if (pass == SpanOp::backward && (!dense(span.grad_x_stride) || !dense(span.grad_reduced_stride)))
    return needs("gradients with a channel stride of 1 (channels_last)");
  if (span.span_stride[1] != 1) return needs("a span weight with dense rows");
  if (p.in_h < 1 || p.in_w < 1 || p.out_h < 1 || p.out_w < 1) return needs("an input and an output with pixels");
  // By estimate: the weights of these stay in the L2 cache, and making them here reads S for every 64 pixels.
  if (span.reduced > 64 && p.out_h * p.out_w <= 64)
    return needs(
        "at most 64 reduced channels where the output has at most 64 pixels (a separate span convolution is estimated "
        "to be faster)",
        span.reduced);
  const int shared_bytes =
      p.stride_h == 2 ? Shared<Strided>::bytes(int(span.reduced)) : Shared<Narrow<K, 1>>::bytes(int(span.reduced));
  if (shared_bytes > max_shared_bytes) return needs("tiles of at most 101376 bytes of shared memory", shared_bytes);

  // As in `mma`.
  Problem image = p;
  image.batch = 1;
  std::fill_n(image.w_stride, 6, 0);
  for (int64_t* size : {&image.in_h, &image.in_w, &image.out_h, &image.out_w})
    *size += 32 + 2 * std::max(p.padding_h, p.padding_w);
  constexpr int64_t limit = int64_t{1} << 30;
  const int64_t reduced[] = {1, span.reduced, image.out_h, image.out_w}, rows[] = {span.span_rows(), span.reduced};
  const int64_t input[] = {1, p.channels, image.in_h, image.in_w};
  if (!within(image, limit) || reach(reduced, span.reduced_stride) >= limit || reach(rows, span.span_stride) >= limit ||
      reach(input, span.grad_x_stride) >= limit || reach(reduced, span.grad_reduced_stride) >= limit)
    return needs("an image whose offsets fit in 32 bits");
  if (p.batch * p.groups * (p.out_h / 4 + 1) * (p.out_w / 8 + 1) >= limit) return needs("fewer than 2^30 tiles");
  return {};
}

int64_t fused_scratch(const SpanProblem& problem, SpanOp pass) {
  return pass == SpanOp::backward ? backward_scratch(problem) : 0;
}

void fused_run(const SpanProblem& problem, SpanOp pass, const SpanBuffers& buffers, const Execution& execution) {
  if (problem.involution.batch == 0) return;
  const bool half = problem.involution.dtype == DType::f16;
  if (pass == SpanOp::backward) return (half ? backward_f16 : backward_bf16)(problem, buffers, execution);
  if (half) return run_type<Half>(problem, buffers, execution);
  run_type<BFloat16>(problem, buffers, execution);
}

}  // namespace pyinvolution::cuda
