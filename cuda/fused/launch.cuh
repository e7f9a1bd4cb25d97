// Launches of `fused` for one dtype.
#pragma once

#include <algorithm>

#include "forward.cuh"
#include "grad_input.cuh"
#include "grad_input_strided.cuh"
#include "grad_span.cuh"

namespace pyinvolution::cuda::fused {

inline int row_vector(int64_t row, const void* data) {
  return row % 8 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0 ? 8 : 1;
}

template <class T>
Span span_of(const SpanProblem& p, const SpanBuffers& buffers) {
  Span span{};
  span.reduced = int(p.reduced);
  span.reduced_n = p.reduced_stride[0];
  span.reduced_h = int(p.reduced_stride[2]), span.reduced_w = int(p.reduced_stride[3]);
  span.row = int(p.span_stride[0]);
  span.reduced_vector = view<T>(p.reduced_stride, buffers.reduced, 0).vector;
  span.row_vector = row_vector(p.span_stride[0], buffers.span);
  span.reduce_row = int(p.reduce_stride[0]);
  span.reduce_vector = row_vector(p.reduce_stride[0], buffers.reduce);
  span.epilogue = p.epilogue, span.relu = p.relu;
  return span;
}

// --- forward

template <class C, bool Aligned, bool Layer, class T>
void run_stripes(const SpanProblem& p, const SpanBuffers& buffers, const Execution& execution) {
  const Problem& i = p.involution;
  const Span span = span_of<T>(p, buffers);
  StripeParams q{};
  q.groups = int(i.groups), q.chunks = (q.groups + chunk_groups - 1) / chunk_groups;
  q.x_height = int(i.in_h), q.x_width = int(i.in_w), q.y_height = int(i.out_h), q.y_width = int(i.out_w);
  q.padding_h = int(i.padding_h), q.padding_w = int(i.padding_w);
  q.x = view<T>(i.x_stride, buffers.x, 0), q.y = view<T>(i.y_stride, buffers.y, 0);
  q.stripes = (q.y_width + C::Columns - 1) / C::Columns, q.steps = (q.y_height + C::Rows - 1) / C::Rows;
  q.all_steps = int(i.batch * q.stripes * q.steps);
  const char* name = Layer ? "fused layer" : "fused forward";
  const int shared_bytes = C::bytes(span.reduced, Layer);
  const int blocks = resident_blocks(name, forward<C, Aligned, Layer, T>, C::threads, shared_bytes);
  q.runs = std::min(q.all_steps, std::max(1, blocks / q.chunks));
  launch<StripeParams, Span, const T*, const T*, const T*, const T*, const T*, const float*, const float*, T*>(
      name, forward<C, Aligned, Layer, T>, Grid{int64_t{q.runs} * q.chunks, C::threads, shared_bytes}, execution, q,
      span, static_cast<T*>(buffers.x), static_cast<T*>(Layer ? buffers.reduce : buffers.reduced),
      static_cast<T*>(buffers.reduce_bias), static_cast<T*>(buffers.span), static_cast<T*>(buffers.bias),
      static_cast<float*>(buffers.scale), static_cast<float*>(buffers.shift), static_cast<T*>(buffers.y));
}

template <bool Layer, class T>
void run_images(const SpanProblem& p, const SpanBuffers& buffers, const Execution& execution) {
  const Problem& i = p.involution;
  const bool aligned = view<T>(i.x_stride, buffers.x, 0).vector == 8 && view<T>(i.y_stride, buffers.y, 0).vector == 8 &&
                       (Layer || view<T>(p.reduced_stride, buffers.reduced, 0).vector == 8);
  with_stripe_config<Layer>(p, aligned, [&](auto config, auto is_aligned) {
    run_stripes<decltype(config), is_aligned.value, Layer, T>(p, buffers, execution);
  });
}

template <DType dtype>
void run_forward(const SpanProblem& p, const SpanBuffers& buffers, const Execution& execution) {
  run_images<false, Storage<dtype>>(p, buffers, execution);
}

template <DType dtype>
void run_layer(const SpanProblem& p, const SpanBuffers& buffers, const Execution& execution) {
  run_images<true, Storage<dtype>>(p, buffers, execution);
}

// --- backward

template <class T>
WalkParams walk_params(const SpanProblem& p, const SpanBuffers& buffers) {
  const Problem& i = p.involution;
  WalkParams q{};
  q.groups = int(i.groups);
  q.height = int(i.in_h), q.width = int(i.in_w), q.out_height = int(i.out_h), q.out_width = int(i.out_w);
  q.padding_h = int(i.padding_h), q.padding_w = int(i.padding_w);
  q.y = view<T>(i.y_stride, buffers.y, 0), q.x = view<T>(p.grad_x_stride, buffers.grad_x, 0);
  return q;
}

// Divides the work among blocks of `groups` groups and returns how many there are. Each segment reads the last rows of
// G of the one before it again: there are only as many segments as fill the GPU.
inline int64_t divide(WalkParams& q, int64_t batch, int groups, int64_t columns) {
  constexpr int least_rows = 16;
  q.chunks = (q.groups + groups - 1) / groups, q.columns = int(columns);
  const int64_t blocks = batch * q.chunks * columns, wanted = 4 * multiprocessors();
  q.segments = int(std::max<int64_t>(1, std::min<int64_t>(q.height / least_rows, wanted / blocks)));
  q.rows = (q.height + q.segments - 1) / q.segments;
  q.segments = (q.height + q.rows - 1) / q.rows;
  q.by_chunks = Division(q.chunks), q.by_columns = Division(q.columns), q.by_segments = Division(q.segments);
  return blocks * q.segments;
}

template <class T>
void run_grad_input(const SpanProblem& p, const SpanBuffers& buffers, const Execution& execution) {
  const Span span = span_of<T>(p, buffers);
  WalkParams q = walk_params<T>(p, buffers);
  const auto go = [&](const char* what, auto kernel, int64_t blocks, int threads, int shared_bytes) {
    launch<WalkParams, Span, const T*, const T*, const T*, const T*, T*>(
        what, kernel, Grid{blocks, threads, shared_bytes}, execution, q, span, static_cast<T*>(buffers.y),
        static_cast<T*>(buffers.reduced), static_cast<T*>(buffers.span), static_cast<T*>(buffers.bias),
        static_cast<T*>(buffers.grad_x));
  };
  if (p.involution.stride_h == 2) {
    using C = StridedWalk;
    constexpr int columns = 8 * C::strips;
    const int64_t blocks = divide(q, p.involution.batch, chunk_groups, (q.width + columns - 1) / columns);
    return go("fused grad_input", span.reduced == 16 ? grad_input_strided<true, T> : grad_input_strided<false, T>,
              blocks, C::threads, C::bytes(span.reduced));
  }
  q.layout = WalkLayout::of(q.groups, q.out_width, span.reduced);
  const int64_t columns = q.layout.blocks((q.out_width + 7) / 8);
  const int64_t blocks = divide(q, p.involution.batch, q.layout.groups, columns);
  const bool aligned = q.y.vector == 8 && q.x.vector == 8 && span.reduced_vector == 8 && span.row_vector == 8;
  const auto kernel = !aligned             ? grad_input<false, 0, T>
                      : span.reduced == 16 ? grad_input<true, 1, T>
                      : span.reduced == 32 ? grad_input<true, 2, T>
                      : span.reduced == 64 ? grad_input<true, 4, T>
                                           : grad_input<true, 0, T>;
  go("fused grad_input", kernel, blocks, 32 * q.layout.warps(), q.layout.bytes(span.reduced));
}

template <class C, class T>
void run_grad_span(const SpanProblem& p, const SpanBuffers& buffers, const Execution& execution) {
  const KernelParams q = kernel_params<C, T>(p.involution, Pass::grad_weight, {buffers.x, nullptr, buffers.y});
  Partial partial = partial_of<C>(p);
  partial.span = static_cast<float*>(buffers.scratch);
  partial.bias = partial.span + span_floats(partial);
  partial.reduced = partial.bias + bias_floats(partial);
  partial.grad_n = p.grad_reduced_stride[0];
  partial.grad_h = int(p.grad_reduced_stride[2]), partial.grad_w = int(p.grad_reduced_stride[3]);
  partial.grad_vector = view<T>(p.grad_reduced_stride, buffers.grad_reduced, 0).vector;
  const Grid grid{int64_t{partial.stripes} * partial.parts, C::threads, C::bytes};
  const Span span = span_of<T>(p, buffers);
  const bool aligned = q.x.vector == 8 && q.y.vector == 8 && span.reduced_vector == 8 && span.row_vector == 8 &&
                       (buffers.grad_reduced == nullptr || partial.grad_vector == 8);
  launch<KernelParams, Span, Partial, const T*, const T*, const T*, const T*, T*>(
      "fused grad_span", aligned ? grad_span<C, true, T> : grad_span<C, false, T>, grid, execution, q, span, partial,
      static_cast<T*>(buffers.x), static_cast<T*>(buffers.reduced), static_cast<T*>(buffers.span),
      static_cast<T*>(buffers.y), static_cast<T*>(buffers.grad_reduced));
  if (buffers.grad_span == nullptr && buffers.grad_bias == nullptr) return;
  const int64_t elements = partial.span_size + partial.bias_size;
  const Grid sums{(elements + sum_columns - 1) / sum_columns, sum_columns * sum_rows,
                  sum_columns * sum_rows * int(sizeof(float))};
  launch<Partial, T*, T*>("fused grad_span, its sums", sum_partials<T>, sums, execution, partial,
                          static_cast<T*>(buffers.grad_span), static_cast<T*>(buffers.grad_bias));
}

template <int S, class T>
void run_gradients(const SpanProblem& p, const SpanBuffers& buffers, const Execution& execution) {
  if (buffers.grad_x != nullptr) run_grad_input<T>(p, buffers, execution);
  if (buffers.grad_reduced == nullptr && buffers.grad_span == nullptr && buffers.grad_bias == nullptr) return;
  if (p.reduced == 16) return run_grad_span<SpanConfig<S, 1>, T>(p, buffers, execution);
  if (p.reduced == 32) return run_grad_span<SpanConfig<S, 2>, T>(p, buffers, execution);
  run_grad_span<SpanConfig<S, 4>, T>(p, buffers, execution);
}

template <DType dtype>
void run_backward(const SpanProblem& p, const SpanBuffers& buffers, const Execution& execution) {
  if (p.involution.stride_h == 2) return run_gradients<2, Storage<dtype>>(p, buffers, execution);
  run_gradients<1, Storage<dtype>>(p, buffers, execution);
}

}  // namespace pyinvolution::cuda::fused
