#include "fused.h"

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

const char* fused_refusal(const SpanProblem& span, SpanPass pass) {
  const Problem& p = span.involution;
  if (pass == SpanPass::layer) return "it takes reduced from a convolution";
  if (p.dtype != DType::f16 && p.dtype != DType::bf16) return "it multiplies half and bfloat16";
  if (p.kernel_h != K || p.kernel_w != K) return "it has kernels of 7 x 7";
  if (p.dilation_h != 1 || p.dilation_w != 1) return "it has no dilation";
  if (p.stride_h != p.stride_w || p.stride_h > 2) return "it has strides of 1 and 2, the same in both directions";
  if (p.groups < 1 || p.group_channels() != group_channels) return "it has 16 channels a group";
  if (span.reduced % 16 != 0 || span.reduced < 16 || span.reduced > 128)
    return "it has 16 to 128 reduced channels, a multiple of 16";
  if (p.x_stride[1] != 1 || p.y_stride[1] != 1) return "the channels of the input or the output are not dense";
  if (span.reduced_stride[1] != 1) return "the reduced channels are not dense";
  const auto dense = [](const int64_t (&stride)[4]) { return stride[1] == 1 || stride[1] == 0; };
  if (pass == SpanPass::backward && (!dense(span.grad_x_stride) || !dense(span.grad_reduced_stride)))
    return "the channels of a gradient are not dense";
  if (span.span_stride[1] != 1) return "the reduced channels of the span weight are not dense";
  if (p.in_h < 1 || p.in_w < 1 || p.out_h < 1 || p.out_w < 1) return "the input or the output has no pixels";
  // By estimate: the weights of these stay in the L2 cache, and making them here reads S for every 64 pixels.
  if (span.reduced > 64 && p.out_h * p.out_w <= 64)
    return "so many reduced channels for so few pixels: a convolution makes the weights faster";
  const int shared_bytes =
      p.stride_h == 2 ? Shared<Strided>::bytes(int(span.reduced)) : Shared<Narrow<K, 1>>::bytes(int(span.reduced));
  if (shared_bytes > max_shared_bytes) return "its tiles do not fit into shared memory";

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
    return "an image, its reduced channels or their strides are too large for 32-bit offsets";
  if (p.batch * p.groups * (p.out_h / 4 + 1) * (p.out_w / 8 + 1) >= limit) return "it has too many tiles for one grid";
  return nullptr;
}

int64_t fused_scratch(const SpanProblem& problem, SpanPass pass) {
  return pass == SpanPass::backward ? backward_scratch(problem) : 0;
}

void fused_run(const SpanProblem& problem, SpanPass pass, const SpanBuffers& buffers, const Execution& execution) {
  if (problem.involution.batch == 0) return;
  const bool half = problem.involution.dtype == DType::f16;
  if (pass == SpanPass::backward) return (half ? backward_f16 : backward_bf16)(problem, buffers, execution);
  if (half) return run_type<Half>(problem, buffers, execution);
  run_type<BFloat16>(problem, buffers, execution);
}

}  // namespace pyinvolution::cuda
