#include "cpu_columns.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#include "cpu/variants.h"
#include "isa.h"
#include "parallel.h"

namespace pyinvolution::cpu {
namespace {

// Half of a typical L2 cache, so that a strip's packed rows stay there while each is read once for every tap row.
constexpr int64_t strip_bytes = 256 * 1024;
constexpr int64_t tasks_per_thread = 4;
constexpr int64_t most_chunk = 16;
// Below this many multiply-adds, waking the other threads takes longer than they save.
constexpr int64_t least_parallel = 1 << 18;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Columns s * i + d * j, i = 0 .. padded: shared by the taps of a phase, or a run for each tap where dilation tears
// them apart.
void plan_strided_row(Columns& plan) {
  const Problem& p = plan.problem;
  const int64_t reach = p.dilation_w * (p.kernel_w - 1) / p.stride_w;
  std::vector<int64_t> slot_phase;
  std::vector<int64_t> slot(p.kernel_w);
  for (int64_t j = 0; j < p.kernel_w; ++j) {
    const int64_t phase = p.dilation_w * j % p.stride_w;
    const auto found = std::find(slot_phase.begin(), slot_phase.end(), phase);
    slot[j] = found - slot_phase.begin();
    if (found == slot_phase.end()) slot_phase.push_back(phase);
  }
  const int64_t phases = int64_t(slot_phase.size());
  const int64_t shared = plan.padded + reach;
  plan.tap_offset.resize(p.kernel_w);
  if (phases * shared <= p.kernel_w * plan.padded) {
    for (int64_t s = 0; s < phases; ++s)
      plan.segments.push_back({s * shared, slot_phase[s] - p.padding_w, shared, p.stride_w});
    for (int64_t j = 0; j < p.kernel_w; ++j) plan.tap_offset[j] = slot[j] * shared + p.dilation_w * j / p.stride_w;
    plan.width = phases * shared;
  } else {
    for (int64_t j = 0; j < p.kernel_w; ++j) {
      plan.segments.push_back({j * plan.padded, p.dilation_w * j - p.padding_w, plan.padded, p.stride_w});
      plan.tap_offset[j] = j * plan.padded;
    }
    plan.width = p.kernel_w * plan.padded;
  }
}

// Output columns m - (d * j) / s for m = first_m ...; see Columns::phases.
void plan_gathered_row(Columns& plan) {
  const Problem& p = plan.problem;
  const auto shift = [&](int64_t j) { return p.dilation_w * j / p.stride_w; };
  const int64_t reach = shift(p.kernel_w - 1);
  const int64_t shared = plan.padded + reach;
  plan.tap_offset.resize(p.kernel_w);
  if (shared <= p.kernel_w * plan.padded) {
    plan.segments.push_back({0, plan.first_m - reach, shared, 1});
    for (int64_t j = 0; j < p.kernel_w; ++j) plan.tap_offset[j] = reach - shift(j);
    plan.width = shared;
  } else {
    for (int64_t j = 0; j < p.kernel_w; ++j) {
      plan.segments.push_back({j * plan.padded, plan.first_m - shift(j), plan.padded, 1});
      plan.tap_offset[j] = j * plan.padded;
    }
    plan.width = p.kernel_w * plan.padded;
  }
  const int64_t count = std::min(p.stride_w, p.in_w);
  plan.phase_begin.push_back(0);
  for (int64_t f = 0; f < count; ++f) {
    plan.phases.push_back((p.padding_w + f) % p.stride_w);
    for (int64_t j = 0; j < p.kernel_w; ++j)
      if (p.dilation_w * j % p.stride_w == plan.phases.back()) plan.phase_taps.push_back(j);
    plan.phase_begin.push_back(int64_t(plan.phase_taps.size()));
  }
}

// How many packed rows a strip of `height` needs when neighbours share them.
int64_t shared_rows(const Columns& plan, int64_t height) {
  const Problem& p = plan.problem;
  const int64_t reach = p.dilation_h * (p.kernel_h - 1);
  if (plan.pass == Pass::grad_input) return std::min((height - 1 + reach) / p.stride_h + 1, p.out_h);
  return (height - 1) * p.stride_h + reach + 1;
}

}  // namespace

Columns plan_columns(const Problem& p, Pass pass, const Buffers& buffers, int64_t vector_bytes, int threads) {
  Columns plan{};
  plan.problem = p;
  plan.pass = pass;
  plan.buffers = buffers;
  const int64_t bytes = p.dtype == DType::f64 ? 8 : 4;
  const int64_t lanes = vector_bytes / bytes;
  const bool gather = pass == Pass::grad_input;

  plan.chunk = std::min(p.group_channels(), most_chunk);
  plan.first_m = p.padding_w / p.stride_w;
  plan.columns = gather ? (p.padding_w + p.in_w - 1) / p.stride_w - plan.first_m + 1 : p.out_w;
  plan.padded = round_up(plan.columns, lanes);
  if (gather) {
    plan_gathered_row(plan);
  } else {
    plan_strided_row(plan);
  }
  plan.direct_weight = pass == Pass::forward && (p.dtype == DType::f32 || p.dtype == DType::f64) && p.w_stride[5] == 1;

  const int64_t rows = gather ? p.in_h : p.out_h;
  const auto rows_for = [&](int64_t height) { return std::min(shared_rows(plan, height), height * p.kernel_h); };
  // Values of scratch memory besides the packed rows: a row (forward, grad_input) or a strip (grad_weight) of results,
  // weights of a row.
  const auto others_for = [&](int64_t height) {
    const int64_t weights = p.taps() * plan.padded;
    switch (pass) {
      case Pass::forward: return plan.chunk * plan.padded + (plan.direct_weight ? 0 : weights);
      case Pass::grad_input: return plan.chunk * p.in_w + weights;
      case Pass::grad_weight: return plan.chunk * plan.padded + height * weights;
    }
    return int64_t{0};
  };
  const auto bytes_for = [&](int64_t height) {
    return (rows_for(height) * plan.chunk * plan.width + others_for(height)) * bytes;
  };

  const int64_t wanted = ceil_div(tasks_per_thread * threads, p.batch * p.groups);
  const int64_t most = std::max<int64_t>(1, rows / std::max<int64_t>(1, std::min(wanted, rows)));
  plan.height = 1;
  while (plan.height < most && bytes_for(plan.height + 1) <= strip_bytes) ++plan.height;
  plan.strips = ceil_div(rows, plan.height);
  plan.share_rows = shared_rows(plan, plan.height) <= plan.height * p.kernel_h;
  plan.packed_rows = rows_for(plan.height);
  plan.scratch_bytes = bytes_for(plan.height) + 64;
  return plan;
}

Refusal columns_refusal(const Problem&, Pass) { return {}; }

void columns_run(const Problem& problem, Pass pass, const Buffers& buffers, const Execution& execution) {
  ColumnsTask task = columns_task_baseline;
  int64_t vector_bytes = 16;
#if PYINVOLUTION_X86_VECTORS
  if (current_isa() == Isa::avx2) task = columns_task_avx2, vector_bytes = 32;
  if (current_isa() == Isa::avx512) task = columns_task_avx512, vector_bytes = 64;
#endif
  const double work = double(problem.batch * problem.channels * problem.taps()) * double(problem.out_h * problem.out_w);
  const Execution where = work < least_parallel ? Execution{} : execution;
  const Columns plan = plan_columns(problem, pass, buffers, vector_bytes, where.threads);
  for_each_task(where, problem.batch * problem.groups * plan.strips,
                [&](int64_t index) { task(plan, index, scratch(plan.scratch_bytes)); });
}

void* scratch(int64_t bytes, Scratch use) {
  struct Block {
    void* memory = nullptr;
    int64_t size = 0;
    ~Block() { std::free(memory); }
  };
  thread_local Block blocks[2];
  Block& block = blocks[int(use)];
  if (block.size < bytes) {
    std::free(block.memory);
    block.size = 0;
    const int64_t rounded = round_up(bytes, 4096);
    block.memory = std::aligned_alloc(64, rounded);
    if (block.memory == nullptr) throw std::bad_alloc();
    block.size = rounded;
  }
  return block.memory;
}

}  // namespace pyinvolution::cpu
