// What the launches of `fused` forward and backward share.
#pragma once

#include "../mma/launch.cuh"
#include "fused.cuh"

namespace pyinvolution::cuda::fused {

inline bool rows_are_aligned(const SpanProblem& p, const void* data) {
  return p.span_stride[0] % 8 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

template <class T>
Span span_of(const SpanProblem& p, const SpanBuffers& buffers) {
  Span span{};
  span.reduced = int(p.reduced);
  span.reduced_n = p.reduced_stride[0];
  span.reduced_h = int(p.reduced_stride[2]), span.reduced_w = int(p.reduced_stride[3]);
  span.row = int(p.span_stride[0]);
  span.reduced_vector = view<T>(p.reduced_stride, buffers.reduced, 0).vector;
  span.row_vector = rows_are_aligned(p, buffers.span) ? 8 : 1;
  span.epilogue = p.epilogue, span.relu = p.relu;
  return span;
}

// The gradients of one storage type, each in its own file, so that they compile at the same time.
int64_t backward_scratch(const SpanProblem&);
void backward_f16(const SpanProblem&, const SpanBuffers&, const Execution&);
void backward_bf16(const SpanProblem&, const SpanBuffers&, const Execution&);

}  // namespace pyinvolution::cuda::fused
