#include "cpu/columns/tiling.h"

#include <algorithm>

#include "cpu/arithmetic.h"
#include "cpu/tasks.h"
#include "pyinvolution/axis.h"

namespace pyinvolution::cpu {
namespace {

// Half of a typical L2 cache, so that a strip's packed rows and sums stay there while W passes by.
constexpr int64_t strip_bytes = 256 * 1024;
// Where the border shifts a row is packed, or summed, for each tap column: lower strips would pack most rows again.
constexpr int64_t shifted_strip_bytes = 768 * 1024;
constexpr int64_t max_chunk = 16;
// Up to these numbers a strip is one long row even if its rows fill vectors well (measured).
constexpr int64_t flat_columns = 128, flat_copies = 8, flat_sums = 32;
// Where W is read by pixel, a task reads at least so many neighbouring bytes of a pixel.
constexpr int64_t pixel_bytes = 1024;
// A larger W does not stay in the caches of a core; a larger grad_weight would push everything else out of the caches, and
// be gone itself before it is read.
constexpr int64_t past_cache_bytes = 8 << 20;

// A packed row has columns s * i + d * j, i = 0 .. padded: the taps of a phase share a run, or each tap has its own
// where dilation moves them far apart. Returns its width.
int64_t set_strided_row(const Problem& p, int64_t padded, ColumnsTables& tables) {
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
  const int64_t shared = padded + reach;
  tables.tap_offset.resize(p.kernel_w);
  if (phases * shared <= p.kernel_w * padded) {
    for (int64_t s = 0; s < phases; ++s)
      tables.segments.push_back({s * shared, slot_phase[s] - p.padding_w, shared, p.stride_w});
    for (int64_t j = 0; j < p.kernel_w; ++j) tables.tap_offset[j] = slot[j] * shared + p.dilation_w * j / p.stride_w;
    return phases * shared;
  }
  for (int64_t j = 0; j < p.kernel_w; ++j) {
    tables.segments.push_back({j * padded, p.dilation_w * j - p.padding_w, padded, p.stride_w});
    tables.tap_offset[j] = j * padded;
  }
  return p.kernel_w * padded;
}

// A packed row has output columns m - (d * j) / s for m = first_m ...; see ColumnsTiling::taps. Returns its width.
int64_t set_gathered_row(const Problem& p, int64_t padded, int64_t first_m, ColumnsTables& tables) {
  const auto shift = [&](int64_t j) { return p.dilation_w * j / p.stride_w; };
  const int64_t reach = shift(p.kernel_w - 1);
  const int64_t shared = padded + reach;
  tables.tap_offset.resize(p.kernel_w);
  if (shared <= p.kernel_w * padded) {
    tables.segments.push_back({0, first_m - reach, shared, 1});
    for (int64_t j = 0; j < p.kernel_w; ++j) tables.tap_offset[j] = reach - shift(j);
    return shared;
  }
  for (int64_t j = 0; j < p.kernel_w; ++j) {
    tables.segments.push_back({j * padded, first_m - shift(j), padded, 1});
    tables.tap_offset[j] = j * padded;
  }
  return p.kernel_w * padded;
}

// A long row for each tap column, or for grad_input, whose gradients are not shifted by columns, only one.
void set_flat_row(const Problem& p, bool gather, int64_t long_row, ColumnsTables& tables) {
  tables.tap_offset.assign(p.kernel_w, 0);
  if (gather) {
    tables.segments.push_back({0, 0, p.out_w, 1});
    return;
  }
  for (int64_t j = 0; j < p.kernel_w; ++j) {
    tables.tap_offset[j] = j * long_row;
    tables.segments.push_back({j * long_row, p.dilation_w * j - p.padding_w, p.out_w, p.stride_w});
  }
}

// Where the border shifts: a row for each tap column, but of gradients, which are not shifted by columns, only one. Returns
// its width.
int64_t set_shifted_row(const Problem& p, bool gather, int64_t padded, int64_t lanes, ColumnsTables& tables) {
  tables.tap_offset.assign(size_t(p.kernel_w), 0);
  if (gather) {
    tables.segments.push_back({0, 0, padded, 1});
    if (!tables.runs.empty()) return padded;
    append_neighbours(columns_of(p), 0, p.out_w, tables.runs);
    for (int64_t row = 0; row < p.in_h; ++row)
      for (int64_t i = 0; i < p.kernel_h; ++i) tables.readers.push_back(rows_of(p).readers(row - i * p.dilation_h));
    return padded;
  }
  for (int64_t j = 0; j < p.kernel_w; ++j) tables.tap_offset[size_t(j)] = j * padded;
  if (tables.vectors.empty()) append_vectors(columns_of(p), lanes, tables.vectors);
  return p.kernel_w * padded;
}

// Blocks of whole tap rows, or where a row has too many taps equal parts of it.
void set_taps(const Problem& p, bool gather, bool by_column, int64_t most, ColumnsTables& tables) {
  if (!gather) {
    tables.phases.push_back(0);
  } else {
    const int64_t count = by_column ? p.kernel_w : std::min(p.stride_w, p.in_w);
    for (int64_t f = 0; f < count; ++f) tables.phases.push_back(by_column ? f : (p.padding_w + f) % p.stride_w);
  }
  tables.phase_begin.push_back(0);
  for (int64_t f = 0; f < int64_t(tables.phases.size()); ++f) {
    const auto belongs = [&](int64_t j) {
      return !gather || (by_column ? j : p.dilation_w * j % p.stride_w) == tables.phases[size_t(f)];
    };
    for (int64_t i = 0; i < p.kernel_h; ++i)
      for (int64_t j = 0; j < p.kernel_w; ++j)
        if (belongs(j)) tables.taps.push_back({i, j});
    const int64_t begin = tables.phase_begin.back(), end = int64_t(tables.taps.size());
    tables.phase_begin.push_back(end);
    const int64_t row = (end - begin) / p.kernel_h;
    if (row == 0) continue;
    const int64_t rows = std::max<int64_t>(1, most / row), parts = ceil_div(row, most);
    for (int64_t at = begin; at < end; at += rows * row) {
      const int64_t count = std::min(rows * row, end - at);
      for (int64_t part = 0; part < parts; ++part)
        tables.blocks.push_back({at + count * part / parts, at + count * (part + 1) / parts, f});
    }
  }
}

// How many packed rows a strip of `height` needs when neighbours share them.
int64_t shared_rows(const Problem& p, bool gather, bool flat, int64_t height) {
  const int64_t reach = p.dilation_h * (p.kernel_h - 1);
  if (p.border == Border::shift) {
    // A window has its pixel inside, and those of neighbours begin less than a dilation apart more than these are.
    if (gather) return std::min((height - 1 + 2 * reach) / p.stride_h + 1, p.out_h);
    return std::min(p.in_h, std::max((height - 1) * p.stride_h, height > 1 ? p.dilation_h - 1 : 0) + reach + 1);
  }
  if (gather && !flat) return std::min((height - 1 + reach) / p.stride_h + 1, p.out_h);
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
  const int64_t stored = p.dtype == DType::f64 ? 8 : p.dtype == DType::f32 ? 4 : 2;
  const int64_t lanes = vector_bytes / bytes;
  const bool gather = pass == Pass::grad_input;
  const int64_t group = p.group_channels(), rows = gather ? p.in_h : p.out_h;

  tiling.in_place = p.w_stride[5] == 1;
  const bool shift = p.border == Border::shift, sliding = gather && !shift;
  tiling.first_m = sliding ? p.padding_w / p.stride_w : 0;
  tiling.columns = sliding ? (p.padding_w + p.in_w - 1) / p.stride_w - tiling.first_m + 1 : p.out_w;
  const int64_t padded = round_up(tiling.columns, lanes);
  const int64_t w_bytes = p.batch * p.groups * p.taps() * p.out_h * p.out_w * stored;
  tiling.past_cache = pass == Pass::grad_weight && tiling.in_place && w_bytes > past_cache_bytes;

  const int64_t pixel_groups = std::max<int64_t>(1, max_chunk / std::max<int64_t>(1, group));
  tiling.task_groups = tiling.in_place || group > max_chunk
                           ? 1
                           : std::min(p.groups, std::max(pixel_groups, ceil_div(pixel_bytes, p.taps() * stored)));
  tiling.group_chunks = ceil_div(p.groups, tiling.task_groups);
  tiling.chunk = std::max<int64_t>(1, group > max_chunk ? max_chunk : group * tiling.task_groups);
  const bool whole_groups = group <= max_chunk;

  // A long row has no idle lanes and one beginning, at the price of copies of X (or of sums) for each tap column.
  // It has every row between those that taps read, so a stride or dilation must not move them far apart.
  const int64_t copies = p.kernel_w * tiling.chunk;
  const int64_t image = p.in_h + p.kernel_h;
  const bool near = p.stride_h <= image && shared_rows(p, gather, true, std::max<int64_t>(1, rows)) <= 4 * image;
  tiling.flat = near && !shift && tiling.in_place && (p.stride_h == 1 || !gather) && p.w_stride[4] == p.out_w &&
                p.out_h * p.out_w > 0 &&
                (5 * p.out_w < 4 * round_up(p.out_w, lanes) ||
                 (p.out_w < flat_columns && copies <= (gather ? flat_sums : flat_copies)));

  // As long as W is in the cache, there is no memory to follow, and fewer blocks load and store fewer sums.
  tiling.cached = w_bytes <= past_cache_bytes && pass != Pass::grad_weight;
  tiling.by_column = gather && (tiling.flat || shift);
  set_taps(p, gather, tiling.by_column, tiling.cached ? p.taps() : max_block_taps, tables);
  tiling.phase_count = int64_t(tables.phases.size());
  int64_t most_taps = 0;
  for (const TapBlock& block : tables.blocks) most_taps = std::max(most_taps, block.end - block.begin);

  // Everything that depends on the height of a strip.
  const auto set_height = [&](int64_t height) {
    tables.segments.clear();
    tiling.height = height;
    const int64_t shared = shared_rows(p, gather, tiling.flat, height);
    tiling.share_rows = tiling.flat || (shift && gather) || shared <= height * p.kernel_h;
    tiling.packed_rows = tiling.share_rows ? shared : height * p.kernel_h;
    int64_t packed;
    if (tiling.flat) {
      tiling.packed_phase = round_up(ceil_div(tiling.packed_rows, p.stride_h) * p.out_w + lanes, lanes);
      const int64_t long_row = p.stride_h * tiling.packed_phase;
      set_flat_row(p, gather, long_row, tables);
      tiling.packed_row = p.out_w;
      tiling.packed_channel = long_row * int64_t(tables.segments.size());
      packed = tiling.chunk * tiling.packed_channel;
      tiling.sum_rows = p.out_w;
      tiling.sum_channel = round_up(height * p.out_w, lanes);
      tiling.sum_phase = tiling.chunk * tiling.sum_channel;
    } else {
      tiling.packed_channel = shift    ? set_shifted_row(p, gather, padded, lanes, tables)
                              : gather ? set_gathered_row(p, padded, tiling.first_m, tables)
                                       : set_strided_row(p, padded, tables);
      tiling.packed_row = tiling.chunk * tiling.packed_channel;
      packed = tiling.packed_rows * tiling.packed_row;
      tiling.sum_channel = padded;
      tiling.sum_phase = tiling.chunk * padded;
      tiling.sum_rows = tiling.phase_count * tiling.sum_phase;
    }
    const int64_t sums = tiling.flat ? tiling.phase_count * tiling.sum_phase : height * tiling.sum_rows;

    int64_t weights = 0;
    if (pass == Pass::grad_weight && !whole_groups) {
      // Chunks of channels add to the gradients of the whole strip.
      tiling.weight_row = tiling.flat ? p.out_w : padded;
      tiling.weight_tap = (tiling.flat ? round_up(height * p.out_w, lanes) : height * padded) + lanes;
      weights = p.taps() * tiling.weight_tap;
    } else if (pass == Pass::grad_weight && tiling.in_place) {
      // Rows follow each other as in W; the end of a row's last vector is overwritten by the next row.
      tiling.weight_row = p.out_w;
      tiling.weight_tap = round_up(height * p.out_w + 2 * lanes, lanes);
      weights = most_taps * tiling.weight_tap;
    } else if (!tiling.in_place) {
      tiling.weight_row = 0;
      tiling.weight_tap = round_up(p.out_w, lanes);
      weights = p.taps() * tiling.weight_tap;
    }
    // A vector of pixels on their way to another order; rows of X before they shift, or of grad_input whose phases are
    // joined.
    const int64_t row = p.in_w + (shift ? lanes : 0);
    const int64_t staging = lanes * round_up(std::max(p.taps(), tiling.chunk), 4);
    tiling.sums_at = round_up((packed + lanes) * bytes, 64);
    tiling.weights_at = tiling.sums_at + round_up((sums + lanes) * bytes, 64);
    tiling.staging_at = tiling.weights_at + round_up((weights + lanes) * bytes, 64);
    tiling.row_at = tiling.staging_at + round_up((staging + lanes) * bytes, 64);
    tiling.list_at = tiling.row_at + round_up((gather || shift ? tiling.chunk * row : 0) * bytes, 64);
    // Where the border shifts, a row of X is read by up to two windows' worth of rows of Y.
    tiling.scratch_bytes = tiling.list_at + 32 * std::max({most_taps, p.taps(), 2 * p.kernel_h});
  };

  const int64_t chunks = p.batch * tiling.group_chunks;
  const int64_t wanted = threads > 1 ? tasks_per_thread * threads : 1;
  const auto even = [&](int64_t strips) { return threads <= 1 || chunks * strips % threads == 0; };
  int64_t strips = std::min(std::max<int64_t>(1, rows), ceil_div(wanted, std::max<int64_t>(1, chunks)));
  // Threads share tasks equally: a few more strips are better than a task that one of them does alone.
  for (int64_t more = strips; chunks * strips < 4 * wanted && more < std::min(rows, strips + threads); ++more)
    if (even(more)) {
      strips = more;
      break;
    }
  const int64_t most = ceil_div(std::max<int64_t>(1, rows), strips);
  int64_t low = 1, high = most;  // the highest strip that fits
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    set_height(middle);
    if (tiling.scratch_bytes <= (shift ? shifted_strip_bytes : strip_bytes))
      low = middle;
    else
      high = middle - 1;
  }
  set_height(ceil_div(std::max<int64_t>(1, rows), ceil_div(std::max<int64_t>(1, rows), low)));
  tiling.strips = ceil_div(rows, tiling.height);

  tiling.segments = tables.segments.data(), tiling.segment_count = int64_t(tables.segments.size());
  tiling.tap_offset = tables.tap_offset.data();
  tiling.vectors = tables.vectors.data(), tiling.vector_count = int64_t(tables.vectors.size());
  tiling.runs = tables.runs.data(), tiling.run_count = int64_t(tables.runs.size());
  tiling.readers = tables.readers.data();
  tiling.taps = tables.taps.data();
  tiling.blocks = tables.blocks.data(), tiling.block_count = int64_t(tables.blocks.size());
  tiling.phases = tables.phases.data(), tiling.phase_begin = tables.phase_begin.data();
  return tiling;
}

}  // namespace pyinvolution::cpu
