// Launches of the gradients of `fused` for one storage type.
#pragma once

#include <algorithm>

#include "backward.cuh"
#include "launch.cuh"

namespace pyinvolution::cuda::fused {

inline int parts_of(int64_t reduced) { return int((reduced + 63) / 64); }

// A run of tiles for each block that the GPU can hold at once, two on a multiprocessor.
template <class C>
Partial partial_of(const SpanProblem& p) {
  const Problem& q = p.involution;
  Partial partial{};
  partial.parts = parts_of(p.reduced);
  partial.tiles = int(q.batch * ((q.out_h + C::Rows - 1) / C::Rows) * ((q.out_w + 7) / 8));
  partial.stripes = std::max(1, std::min(partial.tiles, 2 * multiprocessors() / partial.parts));
  partial.stripe = p.span_rows() * (p.reduced + 1);
  return partial;
}

// Floats of the stripes' sums, rounded up so that what follows is aligned.
inline int64_t span_floats(const Partial& partial) { return (partial.stripes * partial.stripe + 3) / 4 * 4; }

template <int S, class T>
void run_grad_input(const SpanProblem& p, const SpanBuffers& buffers, const Execution& execution) {
  using C = WalkConfig<S>;
  const Problem& i = p.involution;
  const Span span = span_of<T>(p, buffers);
  Walk q{};
  q.groups = int(i.groups), q.chunks = (q.groups + chunk_groups - 1) / chunk_groups;
  q.height = int(i.in_h), q.width = int(i.in_w), q.out_height = int(i.out_h), q.out_width = int(i.out_w);
  q.padding_h = int(i.padding_h), q.padding_w = int(i.padding_w);
  q.y = view<T>(i.y_stride, buffers.y, 0), q.x = view<T>(p.grad_x_stride, buffers.grad_x, 0);
  // The last rows of G are read again for each segment: only as many as fill the GPU.
  constexpr int columns = 8 * C::strips, least_rows = 16;
  q.columns = (q.width + columns - 1) / columns;
  const int64_t blocks = i.batch * q.chunks * q.columns, wanted = 4 * multiprocessors();
  q.segments = int(std::max<int64_t>(1, std::min<int64_t>(q.height / least_rows, wanted / blocks)));
  q.rows = (q.height + q.segments - 1) / q.segments;
  q.segments = (q.height + q.rows - 1) / q.rows;
  const auto go = [&](auto held) {
    launch<Walk, Span, const T*, const T*, const T*, const T*, T*>(
        "fused grad_input", grad_input<C, held.value, T>, Grid{blocks * q.segments, C::threads, C::bytes(span.reduced)},
        execution, q, span, static_cast<T*>(buffers.y), static_cast<T*>(buffers.reduced), static_cast<T*>(buffers.span),
        static_cast<T*>(buffers.bias), static_cast<T*>(buffers.grad_x));
  };
  if (span.reduced == 16) return go(std::true_type{});
  go(std::false_type{});
}

template <class C, class T>
void run_grad_span(const SpanProblem& p, const SpanBuffers& buffers, const Execution& execution) {
  const Geometry q = geometry<C, T>(p.involution, Pass::grad_weight, {buffers.x, nullptr, buffers.y});
  Partial partial = partial_of<C>(p);
  partial.span = static_cast<float*>(buffers.scratch);
  partial.reduced = partial.span + span_floats(partial);
  partial.grad_n = p.grad_reduced_stride[0];
  partial.grad_h = int(p.grad_reduced_stride[2]), partial.grad_w = int(p.grad_reduced_stride[3]);
  partial.grad_vector = view<T>(p.grad_reduced_stride, buffers.grad_reduced, 0).vector;
  const Grid grid{int64_t{partial.stripes} * partial.parts, C::threads, C::bytes};
  launch<Geometry, Span, Partial, const T*, const T*, const T*, const T*, T*>(
      "fused grad_span", grad_span<C, T>, grid, execution, q, span_of<T>(p, buffers), partial,
      static_cast<T*>(buffers.x), static_cast<T*>(buffers.reduced), static_cast<T*>(buffers.span),
      static_cast<T*>(buffers.y), static_cast<T*>(buffers.grad_reduced));
  if (buffers.grad_span == nullptr && buffers.grad_bias == nullptr) return;
  const Grid sums{(partial.stripe + sum_columns - 1) / sum_columns, sum_columns * sum_rows,
                  sum_columns * sum_rows * int(sizeof(float))};
  launch<Partial, int64_t, T*, T*>("fused grad_span, its sums", sum_partials<T>, sums, execution, partial,
                                   p.span_rows() * p.reduced, static_cast<T*>(buffers.grad_span),
                                   static_cast<T*>(buffers.grad_bias));
}

template <int S, class T>
void run_backward(const SpanProblem& p, const SpanBuffers& buffers, const Execution& execution) {
  if (buffers.grad_x != nullptr) run_grad_input<S, T>(p, buffers, execution);
  if (buffers.grad_reduced == nullptr && buffers.grad_span == nullptr && buffers.grad_bias == nullptr) return;
  if (p.reduced == 16) return run_grad_span<SpanConfig<S, 1>, T>(p, buffers, execution);
  if (p.reduced == 32) return run_grad_span<SpanConfig<S, 2>, T>(p, buffers, execution);
  run_grad_span<SpanConfig<S, 4>, T>(p, buffers, execution);
}

template <class T>
void backward(const SpanProblem& p, const SpanBuffers& buffers, const Execution& execution) {
  if (p.involution.stride_h == 2) return run_backward<2, T>(p, buffers, execution);
  run_backward<1, T>(p, buffers, execution);
}

}  // namespace pyinvolution::cuda::fused
