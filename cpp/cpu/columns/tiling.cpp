#include "cpu/columns/tiling.h"

#include <algorithm>

#include "cpu/arithmetic.h"
#include "cpu/tasks.h"

namespace pyinvolution::cpu {
namespace {

// Half of a typical L2 cache, so that a strip's packed rows stay there while each is read once for every tap row.
constexpr int64_t strip_bytes = 256 * 1024;
constexpr int64_t max_chunk = 16;

// A packed row has columns s * i + d * j, i = 0 .. padded: the taps of a phase share a run, or each tap has its own
// where dilation moves them far apart.
void set_strided_row(ColumnsTiling& tiling, ColumnsTables& tables) {
  const Problem& p = tiling.problem;
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
  const int64_t shared = tiling.padded + reach;
  tables.tap_offset.resize(p.kernel_w);
  if (phases * shared <= p.kernel_w * tiling.padded) {
    for (int64_t s = 0; s < phases; ++s)
      tables.segments.push_back({s * shared, slot_phase[s] - p.padding_w, shared, p.stride_w});
    for (int64_t j = 0; j < p.kernel_w; ++j) tables.tap_offset[j] = slot[j] * shared + p.dilation_w * j / p.stride_w;
    tiling.width = phases * shared;
  } else {
    for (int64_t j = 0; j < p.kernel_w; ++j) {
      tables.segments.push_back({j * tiling.padded, p.dilation_w * j - p.padding_w, tiling.padded, p.stride_w});
      tables.tap_offset[j] = j * tiling.padded;
    }
    tiling.width = p.kernel_w * tiling.padded;
  }
}

// A packed row has output columns m - (d * j) / s for m = first_m ...; see ColumnsTiling::phases.
void set_gathered_row(ColumnsTiling& tiling, ColumnsTables& tables) {
  const Problem& p = tiling.problem;
  const auto shift = [&](int64_t j) { return p.dilation_w * j / p.stride_w; };
  const int64_t reach = shift(p.kernel_w - 1);
  const int64_t shared = tiling.padded + reach;
  tables.tap_offset.resize(p.kernel_w);
  if (shared <= p.kernel_w * tiling.padded) {
    tables.segments.push_back({0, tiling.first_m - reach, shared, 1});
    for (int64_t j = 0; j < p.kernel_w; ++j) tables.tap_offset[j] = reach - shift(j);
    tiling.width = shared;
  } else {
    for (int64_t j = 0; j < p.kernel_w; ++j) {
      tables.segments.push_back({j * tiling.padded, tiling.first_m - shift(j), tiling.padded, 1});
      tables.tap_offset[j] = j * tiling.padded;
    }
    tiling.width = p.kernel_w * tiling.padded;
  }
  const int64_t count = std::min(p.stride_w, p.in_w);
  tables.phase_begin.push_back(0);
  for (int64_t f = 0; f < count; ++f) {
    tables.phases.push_back((p.padding_w + f) % p.stride_w);
    for (int64_t j = 0; j < p.kernel_w; ++j)
      if (p.dilation_w * j % p.stride_w == tables.phases.back()) tables.phase_taps.push_back(j);
    tables.phase_begin.push_back(int64_t(tables.phase_taps.size()));
  }
}

// How many packed rows a strip of `height` needs when neighbours share them.
int64_t shared_rows(const ColumnsTiling& tiling, int64_t height) {
  const Problem& p = tiling.problem;
  const int64_t reach = p.dilation_h * (p.kernel_h - 1);
  if (tiling.pass == Pass::grad_input) return std::min((height - 1 + reach) / p.stride_h + 1, p.out_h);
  return (height - 1) * p.stride_h + reach + 1;
}

}  // namespace

ColumnsTiling make_columns_tiling(const Problem& p, Pass pass, const Buffers& buffers, int64_t vector_bytes,
                                  int threads, ColumnsTables& tables) {
  ColumnsTiling tiling{};
  tiling.problem = p;
  tiling.pass = pass;
  tiling.buffers = buffers;
  const int64_t bytes = p.dtype == DType::f64 ? 8 : 4;
  const int64_t lanes = vector_bytes / bytes;
  const bool gather = pass == Pass::grad_input;

  tiling.chunk = std::min(p.group_channels(), max_chunk);
  tiling.first_m = p.padding_w / p.stride_w;
  tiling.columns = gather ? (p.padding_w + p.in_w - 1) / p.stride_w - tiling.first_m + 1 : p.out_w;
  tiling.padded = round_up(tiling.columns, lanes);
  if (gather) {
    set_gathered_row(tiling, tables);
  } else {
    set_strided_row(tiling, tables);
  }
  tiling.segments = tables.segments.data(), tiling.segment_count = int64_t(tables.segments.size());
  tiling.tap_offset = tables.tap_offset.data();
  tiling.phases = tables.phases.data(), tiling.phase_count = int64_t(tables.phases.size());
  tiling.phase_begin = tables.phase_begin.data(), tiling.phase_taps = tables.phase_taps.data();
  tiling.direct_weight =
      pass == Pass::forward && (p.dtype == DType::f32 || p.dtype == DType::f64) && p.w_stride[5] == 1;

  const int64_t rows = gather ? p.in_h : p.out_h;
  const auto rows_for = [&](int64_t height) { return std::min(shared_rows(tiling, height), height * p.kernel_h); };
  // Scratch memory besides the packed rows, in values: a row (forward, grad_input) or a strip (grad_weight) of results,
  // and the weights of a row.
  const auto others_for = [&](int64_t height) {
    const int64_t weights = p.taps() * tiling.padded;
    switch (pass) {
      case Pass::forward: return tiling.chunk * tiling.padded + (tiling.direct_weight ? 0 : weights);
      case Pass::grad_input: return tiling.chunk * p.in_w + weights;
      case Pass::grad_weight: return tiling.chunk * tiling.padded + height * weights;
    }
    return int64_t{0};
  };
  const auto bytes_for = [&](int64_t height) {
    return (rows_for(height) * tiling.chunk * tiling.width + others_for(height)) * bytes;
  };

  const int64_t wanted = ceil_div(tasks_per_thread * threads, p.batch * p.groups);
  const int64_t max_height = std::max<int64_t>(1, rows / std::max<int64_t>(1, std::min(wanted, rows)));
  tiling.height = 1;
  while (tiling.height < max_height && bytes_for(tiling.height + 1) <= strip_bytes) ++tiling.height;
  tiling.strips = ceil_div(rows, tiling.height);
  tiling.share_rows = shared_rows(tiling, tiling.height) <= tiling.height * p.kernel_h;
  tiling.packed_rows = rows_for(tiling.height);
  tiling.scratch_bytes = bytes_for(tiling.height) + 64;
  return tiling;
}

}  // namespace pyinvolution::cpu
