#include <algorithm>

#include "cpu/channels/tiling.h"
#include "cpu/kernels.h"
#include "cpu/tasks.h"
#include "cpu/variants.h"

namespace pyinvolution::cpu {
namespace {

// If packing one output row takes more than this, it no longer fits in L2 and the strategy stops paying off.
constexpr int64_t max_row_bytes = 4 * 1024 * 1024;

// A block of channels holds one group, so that smaller groups leave most of it unused: with W at hand other strategies are
// as fast there. Where W has to be computed, not writing it outweighs this.
constexpr int64_t min_group_channels = 8;

Refusal common_refusal(const Problem& p) {
  if (p.upsample_h != 1 || p.upsample_w != 1) return needs("an upsampling of 1", p.upsample_h, p.upsample_w);
  if (p.dtype == DType::f64)
    return needs("float32, float16 or bfloat16 (it accumulates in float32)", to_string(p.dtype));
  if (p.taps() > 1024) return needs("at most 1024 taps", p.kernel_h, p.kernel_w);
  if (strip_input_bytes(p, 1) > max_row_bytes)
    return needs("an input of which one output row reads at most 4 MB (bytes)", int64_t(strip_input_bytes(p, 1)));
  return {};
}

Refusal backward_refusal(const SpanProblem& problem) {
  const double bytes = backward_bytes(problem, 1);
  return bytes > max_backward_bytes ? needs("at most 64 MB for an output row (bytes)", int64_t(bytes)) : Refusal{};
}

void run_forward(const SpanProblem& problem, const SpanBuffers& buffers, const void* w, const Execution& execution) {
  const Problem& p = problem.involution;
  const double taps = double(p.batch) * double(p.taps()) * double(p.out_h * p.out_w);
  const double work = taps * double(p.channels + p.groups * problem.reduced);
  const Execution where = execution_for(work, execution);
  const CpuKernels& kernels = current_kernels();
  const bool pairs = kernels.bfloat16_pairs && p.dtype == DType::bf16;
  WindowTables tables;
  ChannelsTiling tiling = make_channels_tiling(problem, buffers, w, kernels.vector_bytes, pairs, where.threads, tables);
  if (tiling.shared_bytes > 0) tiling.shared = static_cast<float*>(scratch(tiling.shared_bytes, Scratch::call));
  const auto task = [&](bool reduce) {
    return [&tiling, &kernels, reduce](int64_t index) {
      kernels.channels(tiling, reduce, index, scratch(tiling.scratch_bytes));
    };
  };
  const int64_t reducing = tiling.shared == nullptr ? 0 : p.batch * tiling.strips * tiling.tiles * tiling.slices;
  for_each_task(where, reducing, task(true), p.batch * tiling.strips * tiling.chunks, task(false));
}

void run_backward(const SpanProblem& problem, const SpanBuffers& buffers, const void* w, void* grad_w,
                  const Execution& execution) {
  const Problem& p = problem.involution;
  const CpuKernels& kernels = current_kernels();
  BackwardTables tables;
  BackwardTiling tiling = make_backward_tiling(problem, buffers, w, grad_w, kernels, execution.threads, tables);
  tiling.shared = static_cast<float*>(scratch(tiling.shared_bytes, Scratch::call));
  const auto round = [&](bool finish, int64_t tasks) {
    for_each_task(execution, tasks,
                  [&](int64_t index) { kernels.backward(tiling, finish, index, scratch(tiling.scratch_bytes)); });
  };
  round(false, tiling.parts * tiling.chunks);
  if (problem.reduced > 0) round(true, p.groups + (tiling.chunks > 1 && buffers.grad_reduced != nullptr ? p.batch : 0));
}

}  // namespace

Refusal channels_refusal(const Problem& p, Pass pass) {
  if (const Refusal reason = common_refusal(p)) return reason;
  if (p.group_channels() < min_group_channels) return needs("at least 8 channels per group", p.group_channels());
  if (pass == Pass::forward) return {};
  if (p.border == Border::shift && p.stride_w != 1)
    return needs("a horizontal stride of 1 where the border shifts", p.stride_w);
  if (p.out_h == 0 || p.out_w == 0) return needs("an output with pixels", p.out_h, p.out_w);
  SpanProblem span{};
  span.involution = p;
  return backward_refusal(span);
}

void channels_run(const Problem& problem, Pass pass, const Buffers& buffers, const Execution& execution) {
  SpanProblem span{};
  span.involution = problem;
  std::copy_n(problem.x_stride, 4, span.grad_x_stride);
  SpanBuffers all{};
  all.y = buffers.y;
  switch (pass) {
    case Pass::forward: all.x = buffers.x; return run_forward(span, all, buffers.w, execution);
    case Pass::grad_input: all.grad_x = buffers.x; return run_backward(span, all, buffers.w, nullptr, execution);
    case Pass::grad_weight: all.x = buffers.x; return run_backward(span, all, nullptr, buffers.w, execution);
  }
}

Refusal fused_refusal(const SpanProblem& problem, SpanOp op) {
  if (const Refusal reason = window_refusal(problem.involution)) return reason;
  if (const Refusal reason = common_refusal(problem.involution)) return reason;
  if (problem.reduced < 1) return needs("at least 1 reduced channel", problem.reduced);
  if (problem.reduced > 4096) return needs("at most 4096 reduced channels", problem.reduced);
  if (op == SpanOp::layer && problem.involution.channels > 8192)
    return needs("at most 8192 channels", problem.involution.channels);
  return op == SpanOp::backward ? backward_refusal(problem) : Refusal{};
}

void fused_run(const SpanProblem& problem, SpanOp op, const SpanBuffers& buffers, const Execution& execution) {
  if (op != SpanOp::backward) return run_forward(problem, buffers, nullptr, execution);
  run_backward(problem, buffers, nullptr, nullptr, execution);
}

}  // namespace pyinvolution::cpu
