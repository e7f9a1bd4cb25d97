// Launches of `generic` for one dtype.
#pragma once

#include <algorithm>

#include "kernels.cuh"

namespace pyinvolution::cuda::generic {

template <class Index>
KernelParams<Index> kernel_params(const Problem& p, Pass pass) {
  KernelParams<Index> q;
  switch (pass) {
    case Pass::forward:
      q.count = Index(p.batch * p.channels * p.out_h * p.out_w);
      q.dense_inner = p.y_stride[1] < p.y_stride[3];
      break;
    case Pass::grad_input:
      q.count = Index(p.batch * p.channels * p.in_h * p.in_w);
      q.dense_inner = p.x_stride[1] < p.x_stride[3];
      break;
    case Pass::grad_weight:
      q.count = Index(p.batch * p.groups * p.taps() * p.out_h * p.out_w);
      q.dense_inner = p.w_stride[3] < p.w_stride[5];
      break;
  }
  q.channels = Index(p.channels), q.groups = Index(p.groups);
  q.group_channels = p.groups > 0 ? Index(p.group_channels()) : 0;
  q.in_h = Index(p.in_h), q.in_w = Index(p.in_w), q.out_h = Index(p.out_h), q.out_w = Index(p.out_w);
  q.kernel_h = Index(p.kernel_h), q.kernel_w = Index(p.kernel_w);
  q.stride_h = Index(p.stride_h), q.stride_w = Index(p.stride_w);
  q.padding_h = Index(p.padding_h), q.padding_w = Index(p.padding_w);
  q.dilation_h = Index(p.dilation_h), q.dilation_w = Index(p.dilation_w);
  for (int d = 0; d < 4; ++d) q.x_stride[d] = Index(p.x_stride[d]), q.y_stride[d] = Index(p.y_stride[d]);
  for (int d = 0; d < 6; ++d) q.w_stride[d] = Index(p.w_stride[d]);
  return q;
}

template <class T, class Index, template <class> class Params>
void launch_pass(const Params<Index>& q, void (*grad_input)(Params<Index>, T*, const T*, const T*), Pass pass,
                 const Buffers& buffers, const Execution& execution) {
  if (q.count == 0) return;
  const int64_t blocks = std::min<int64_t>((int64_t(q.count) + threads - 1) / threads, max_blocks);
  const Grid grid{blocks, threads, 0};
  T* x = static_cast<T*>(buffers.x);
  T* w = static_cast<T*>(buffers.w);
  T* y = static_cast<T*>(buffers.y);
  switch (pass) {
    case Pass::forward:
      return launch<Params<Index>, const T*, const T*, T*>("generic forward", forward<T, Index, Params>, grid,
                                                           execution, q, x, w, y);
    case Pass::grad_input:
      return launch<Params<Index>, T*, const T*, const T*>("generic grad_input", grad_input, grid, execution, q, x, w,
                                                           y);
    case Pass::grad_weight:
      return launch<Params<Index>, const T*, T*, const T*>("generic grad_weight", grad_weight<T, Index, Params>, grid,
                                                           execution, q, x, w, y);
  }
}

template <class T, class Index>
void run_with_index(const Problem& problem, Pass pass, const Buffers& buffers, const Execution& execution) {
  const KernelParams<Index> q = kernel_params<Index>(problem, pass);
  if (is_plain(problem)) return launch_pass<T>(q, grad_input<T, Index>, pass, buffers, execution);
  RuleParams<Index> by_rule{q, rows_of<Index>(problem), columns_of<Index>(problem)};
  launch_pass<T>(by_rule, grad_input_by_rule<T, Index>, pass, buffers, execution);
}

template <DType dtype>
void run(const Problem& problem, Pass pass, const Buffers& buffers, const Execution& execution) {
  using T = Storage<dtype>;
  if (within(problem, limit_32bit)) {
    run_with_index<T, int32_t>(problem, pass, buffers, execution);
  } else {
    run_with_index<T, int64_t>(problem, pass, buffers, execution);
  }
}

}  // namespace pyinvolution::cuda::generic
