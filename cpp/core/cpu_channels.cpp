#include "cpu_channels.h"

#include <algorithm>

#include "cpu/variants.h"
#include "isa.h"
#include "parallel.h"

namespace pyinvolution::cpu {
namespace {

// What a strip keeps of X, and of R, in half of a typical L2 cache together.
constexpr int64_t strip_bytes = 128 * 1024;
// Where one output row needs more, the rows that it reads are no longer near.
constexpr int64_t most_bytes = 4 * 1024 * 1024;
constexpr int64_t least_group_channels = 8;
constexpr int64_t tasks_per_thread = 4;
// A strip of fewer pixels packs more halo than it saves.
constexpr int64_t least_strip_pixels = 224;
// Below this many multiply-adds, waking the other threads takes longer than they save.
constexpr int64_t least_parallel = 1 << 18;

// Backward: enough for many threads; each part and each chunk has sums of its own, in all of so many floats: where that
// is not little, at most half of what W would have.
constexpr int64_t most_parts = 32;
constexpr int64_t least_sums = 2 << 20, most_sums = 32 << 20;
// Of a strip: what stays in the second level of cache, and what a thread may need. A strip computes the weights of its
// neighbours' rows again; of 16 rows at most one for the sake of the cache.
constexpr double near_bytes = 1 << 20;
constexpr double most_backward_bytes = 64 << 20;
constexpr int64_t least_rows = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

int64_t packed_rows(const Problem& p, int64_t height) {
  return (height - 1) * p.stride_h + p.dilation_h * (p.kernel_h - 1) + 1;
}
int64_t packed_columns(const Problem& p) { return (p.out_w - 1) * p.stride_w + p.dilation_w * (p.kernel_w - 1) + 1; }
int64_t blocks_of(const Problem& p) { return ceil_div(p.group_channels(), block_channels); }

// Bytes of X that a strip packs for a group.
double strip_input_bytes(const Problem& p, int64_t height) {
  return double(blocks_of(p)) * double(packed_rows(p, height)) * double(packed_columns(p)) * (4 * block_channels);
}

Refusal refusal(const Problem& p) {
  if (p.dtype == DType::f64)
    return needs("float32, float16 or bfloat16 (it accumulates in float32)", to_string(p.dtype));
  if (p.group_channels() < least_group_channels) return needs("at least 8 channels per group", p.group_channels());
  if (p.taps() > 1024) return needs("at most 1024 taps", p.kernel_h, p.kernel_w);
  if (strip_input_bytes(p, 1) > most_bytes)
    return needs("an input of which one output row reads at most 4 MB (bytes)", int64_t(strip_input_bytes(p, 1)));
  return {};
}

struct Vectors {
  ChannelsTask task = channels_task_baseline;
  BackwardTask backward = backward_task_baseline;
  int64_t bytes = 16;
};

Vectors current_vectors() {
#if PYINVOLUTION_X86_VECTORS
  if (current_isa() == Isa::avx2) return {channels_task_avx2, backward_task_avx2, 32};
  if (current_isa() == Isa::avx512) return {channels_task_avx512, backward_task_avx512, 64};
#endif
  return {};
}

void run_forward(const SpanProblem& problem, const SpanBuffers& buffers, const void* w, const Execution& execution) {
  const Problem& p = problem.involution;
  const double taps = double(p.batch) * double(p.taps()) * double(p.out_h * p.out_w);
  const double work = taps * double(p.channels + p.groups * problem.reduced);
  const Execution where = work < least_parallel ? Execution{} : execution;
  const Vectors vectors = current_vectors();
  Channels plan = plan_channels(problem, buffers, w, vectors.bytes, where.threads);
  if (plan.shared_bytes > 0) plan.shared = static_cast<float*>(scratch(plan.shared_bytes, Scratch::call));
  const auto task = [&](bool reduce) {
    return [&plan, &vectors, reduce](int64_t index) { vectors.task(plan, reduce, index, scratch(plan.scratch_bytes)); };
  };
  for_each_task(where, plan.reducing_tasks(), task(true), p.batch * plan.strips * plan.chunks, task(false));
}

}  // namespace

Channels plan_channels(const SpanProblem& problem, const SpanBuffers& buffers, const void* w, int64_t vector_bytes,
                       int threads) {
  const Problem& p = problem.involution;
  Channels plan{};
  plan.problem = problem;
  plan.buffers = buffers;
  plan.w = w;
  plan.lanes = vector_bytes / 4;
  plan.blocks = blocks_of(p);
  plan.packed_columns = packed_columns(p);
  plan.tile_columns = ceil_div(p.out_w, ceil_div(p.out_w, tile_pixels));
  plan.tile_rows = std::max<int64_t>(1, tile_pixels / p.out_w);

  const int64_t wanted = threads > 1 ? tasks_per_thread * threads : 1;
  const int64_t most_strips = std::max<int64_t>(1, p.out_h * p.out_w / least_strip_pixels);
  int64_t strips = std::min(ceil_div(wanted, p.batch), most_strips);
  plan.height = ceil_div(p.out_h, strips);
  const auto fits = [&](int64_t height) {
    return strip_input_bytes(p, height) <= strip_bytes && height * p.out_w * problem.reduced * 4 <= strip_bytes;
  };
  while (plan.height > 1 && !fits(plan.height)) plan.height = ceil_div(p.out_h, ++strips);
  if (plan.height > plan.tile_rows) plan.height = plan.height / plan.tile_rows * plan.tile_rows;
  plan.strips = ceil_div(p.out_h, plan.height);
  plan.tile_rows = std::min(plan.tile_rows, plan.height);
  plan.chunks = std::min(p.groups, ceil_div(wanted, p.batch * plan.strips));
  plan.packed_rows = packed_rows(p, plan.height);
  plan.vectors = ceil_div(plan.tile_rows * plan.tile_columns, plan.lanes);
  plan.tiles = ceil_div(plan.height, plan.tile_rows) * ceil_div(p.out_w, plan.tile_columns);

  plan.layer = buffers.reduce != nullptr;
  if (plan.layer) {
    const int64_t reduced_vectors = ceil_div(problem.reduced, plan.lanes);
    const bool share = plan.chunks > 1;
    // Each slice pools the tile again.
    const int64_t slices = share ? ceil_div(threads, p.batch * plan.strips * plan.tiles) : 1;
    plan.slice_vectors = ceil_div(reduced_vectors, std::clamp<int64_t>(slices, 1, ceil_div(reduced_vectors, 2)));
    plan.slices = ceil_div(reduced_vectors, plan.slice_vectors);
    plan.shared_bytes = share ? p.batch * plan.strips * plan.tiles * plan.tile_floats() * 4 : 0;
  }

  int64_t at = 0;
  const auto take = [&](int64_t floats) {
    const int64_t begin = at;
    at += round_up(floats, 16);
    return begin;
  };
  take(plan.blocks * plan.packed_rows * plan.packed_columns * block_channels);
  plan.reduced_at = take(plan.shared_bytes > 0 ? 0 : plan.tiles * plan.tile_floats());
  plan.span_at = take(p.taps() * problem.reduced);
  plan.bias_at = take(p.taps());
  plan.weights_at = take(p.taps() * tile_pixels + plan.lanes);
  plan.result_at = take(tile_pixels * block_channels);
  if (plan.layer) {
    plan.reduce_at = take(p.channels * plan.slice_vectors * plan.lanes);
    plan.pooled_at = take(tile_pixels * p.channels);
    plan.dense_at = take((tile_pixels + plan.lanes) * plan.slice_vectors * plan.lanes);
  }
  // Rows on their way from one type or order to another.
  plan.staging_at = take(std::max({plan.lanes * problem.reduced, plan.lanes * p.taps(), tile_pixels * block_channels}) +
                         2 * block_channels);
  plan.scratch_bytes = at * 4;
  return plan;
}

namespace {

// Of the scratch memory for a strip of `height` output rows.
double backward_bytes(const SpanProblem& problem, int64_t height) {
  const Problem& p = problem.involution;
  const double halo = double(p.dilation_h * (p.kernel_h - 1));
  const double x = double(packed_rows(p, height)) * double(packed_columns(p) + p.stride_w * 32);
  const double grad_x = std::min(double(p.in_h), double(height * p.stride_h) + halo) * double(p.in_w);
  const double rows = 3 * double(height) + 2 * halo / double(p.stride_h);
  return 4 * ((x + grad_x) * double(blocks_of(p) * block_channels) +
              (problem.reduced == 0 ? 0 : rows * double(p.out_w + 16) * double(problem.reduced + 16)));
}

Refusal backward_refusal(const SpanProblem& problem) {
  const double bytes = backward_bytes(problem, 1);
  return bytes > most_backward_bytes ? needs("at most 64 MB for an output row (bytes)", int64_t(bytes)) : Refusal{};
}

std::vector<BackwardStrip> backward_strips(const SpanProblem& problem) {
  const Problem& p = problem.involution;
  const int64_t reach = p.dilation_h * (p.kernel_h - 1);
  int64_t count = 1;
  const auto height = [&](int64_t strips) { return ceil_div(p.out_h, strips); };
  while (backward_bytes(problem, height(count)) > near_bytes &&
         height(count + 1) >= least_rows * std::max<int64_t>(1, reach / p.stride_h))
    ++count;
  while (backward_bytes(problem, height(count)) > most_backward_bytes && height(count) > 1) ++count;
  const int64_t rows = height(count);
  count = ceil_div(p.out_h, rows);

  std::vector<BackwardStrip> strips;
  // Rows of X are dealt out by the middle tap.
  const auto first_input = [&](int64_t strip) {
    if (strip == 0) return int64_t{0};
    return strip == count ? p.in_h
                          : std::clamp<int64_t>(strip * rows * p.stride_h - p.padding_h + reach / 2, 0, p.in_h);
  };
  for (int64_t i = 0; i < count; ++i) {
    BackwardStrip strip{i * rows, std::min((i + 1) * rows, p.out_h), first_input(i), first_input(i + 1), 0, 0};
    const int64_t first = ceil_div(std::max<int64_t>(0, strip.in_begin + p.padding_h - reach), p.stride_h);
    strip.first = std::min(strip.begin, first);
    strip.last = std::max(strip.end, std::min(p.out_h, (strip.in_end - 1 + p.padding_h) / p.stride_h + 1));
    strips.push_back(strip);
  }
  return strips;
}

}  // namespace

FusedBackward plan_backward(const SpanProblem& problem, const SpanBuffers& buffers, const void* w, void* grad_w,
                            int64_t vector_bytes, int threads) {
  const Problem& p = problem.involution;
  FusedBackward plan{};
  plan.problem = problem;
  plan.buffers = buffers;
  plan.w = w;
  plan.grad_w = grad_w;
  plan.lanes = vector_bytes / 4;
  plan.blocks = blocks_of(p);
  plan.reduced_padded = round_up(problem.reduced, plan.lanes);
  plan.row_padded = round_up(p.out_w, plan.lanes);
  plan.strips = backward_strips(problem);
  for (const BackwardStrip& strip : plan.strips) {
    plan.height = std::max(plan.height, strip.end - strip.begin);
    plan.grad_x_rows = std::max(plan.grad_x_rows, strip.in_end - strip.in_begin);
    plan.rows = std::max(plan.rows, strip.last - strip.first);
  }
  const int64_t units = p.batch * int64_t(plan.strips.size());
  const int64_t sums = std::clamp(p.batch * problem.span_rows() * p.out_h * p.out_w / 2, least_sums, most_sums);
  const auto with_sums = [&](int64_t floats) { return std::max<int64_t>(1, sums / std::max<int64_t>(1, floats)); };
  plan.parts = std::min({most_parts, units, with_sums(problem.span_rows() * (problem.reduced + 1))});
  plan.chunks = std::min(
      {p.groups, ceil_div(most_parts, plan.parts), with_sums(p.batch * problem.reduced * p.out_h * plan.row_padded)});
  if (problem.reduced == 0) {  // nothing is shared
    plan.parts = units;
    plan.chunks = std::min(p.groups, ceil_div(threads > 1 ? tasks_per_thread * threads : 1, units));
  }

  plan.x_rows = packed_rows(p, plan.height);
  plan.x_phase = plan.row_padded + p.dilation_w * (p.kernel_w - 1) / p.stride_w + 1;
  plan.x_channel = plan.x_phase * p.stride_w;
  for (int64_t j = 0; j < p.kernel_w; ++j)
    plan.tap_offset.push_back(p.dilation_w * j % p.stride_w * plan.x_phase + p.dilation_w * j / p.stride_w);

  int64_t at = 0;
  const auto take = [&](bool wanted, int64_t floats) {
    const int64_t begin = at;
    at += wanted ? round_up(floats, 16) : 0;
    return begin;
  };
  const bool x = buffers.grad_x != nullptr, reduced = buffers.grad_reduced != nullptr;
  const bool span = buffers.grad_span != nullptr;
  const bool any = grad_w != nullptr || reduced || span || buffers.grad_bias != nullptr;
  plan.x_at = take(any, plan.blocks * plan.x_rows * block_channels * plan.x_channel);
  plan.grad_x_at = take(x, plan.blocks * plan.grad_x_rows * p.in_w * block_channels);
  plan.grad_reduced_at = take(reduced, problem.reduced * plan.height * plan.row_padded);
  plan.panels_at = take(x, problem.reduced * plan.rows * plan.row_padded);
  plan.pixels_at = take(span, plan.height * p.out_w * plan.reduced_padded);
  plan.span_at = take(true, p.taps() * problem.reduced);
  plan.bias_at = take(true, p.taps());
  plan.weights_at = take(true, (p.taps() + 1) * tile_pixels);
  plan.grad_weights_at = take(true, p.taps() * tile_pixels);
  plan.grad_y_at = take(true, tile_pixels * block_channels);
  plan.grad_y_across_at = take(true, backward_columns * block_channels);
  plan.staging_at = take(true, tile_pixels * block_channels);
  plan.scratch_bytes = at * 4;
  plan.shared_bytes = problem.reduced == 0 ? 0 : plan.parts * problem.span_rows() * (plan.reduced_padded + 1) * 4;
  if (plan.chunks > 1 && reduced)
    plan.shared_bytes += plan.chunks * p.batch * problem.reduced * p.out_h * plan.row_padded * 4;
  return plan;
}

namespace {

void run_backward(const SpanProblem& problem, const SpanBuffers& buffers, const void* w, void* grad_w,
                  const Execution& execution) {
  const Problem& p = problem.involution;
  const Vectors vectors = current_vectors();
  FusedBackward plan = plan_backward(problem, buffers, w, grad_w, vectors.bytes, execution.threads);
  plan.shared = static_cast<float*>(scratch(plan.shared_bytes, Scratch::call));
  const auto round = [&](bool finish, int64_t tasks) {
    for_each_task(execution, tasks,
                  [&](int64_t index) { vectors.backward(plan, finish, index, scratch(plan.scratch_bytes)); });
  };
  round(false, plan.parts * plan.chunks);
  if (problem.reduced > 0) round(true, p.groups + (plan.chunks > 1 && buffers.grad_reduced != nullptr ? p.batch : 0));
}

}  // namespace

Refusal channels_refusal(const Problem& p, Pass pass) {
  if (const Refusal reason = refusal(p)) return reason;
  if (pass == Pass::forward) return {};
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

Refusal fused_refusal(const SpanProblem& problem, SpanOp pass) {
  if (const Refusal reason = refusal(problem.involution)) return reason;
  if (problem.reduced < 1) return needs("at least 1 reduced channel", problem.reduced);
  if (problem.reduced > 4096) return needs("at most 4096 reduced channels", problem.reduced);
  if (pass == SpanOp::layer && problem.involution.channels > 8192)
    return needs("at most 8192 channels", problem.involution.channels);
  return pass == SpanOp::backward ? backward_refusal(problem) : Refusal{};
}

void fused_run(const SpanProblem& problem, SpanOp pass, const SpanBuffers& buffers, const Execution& execution) {
  if (pass != SpanOp::backward) return run_forward(problem, buffers, nullptr, execution);
  run_backward(problem, buffers, nullptr, nullptr, execution);
}

}  // namespace pyinvolution::cpu
