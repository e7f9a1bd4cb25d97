#include "cpu/channels/tiling.h"

#include <algorithm>
#include <numeric>

#include "cpu/arithmetic.h"
#include "cpu/simd/pair_product.h"
#include "cpu/tasks.h"
#include "pyinvolution/axis.h"

namespace pyinvolution::cpu {
namespace {

// What a strip keeps of X, and of R: half of a typical L2 cache together.
constexpr int64_t strip_bytes = 128 * 1024;
// A strip of fewer pixels packs more halo than it saves.
constexpr int64_t min_strip_pixels = 224;

// Pixels past the last vector of a tile up to which each is computed on its own, from pairs of bfloat16.
constexpr int64_t max_last_pixels = 1;

// Backward splits the work into parts x chunks. More of them occupy more threads, but each keeps private partial sums:
// their total is capped at half as many floats as W has elements, but not below min_sums and not above max_sums.
constexpr int64_t max_parts = 32;
constexpr int64_t min_sums = 2 << 20, max_sums = 32 << 20;
// A strip should stay in the second level of cache. It computes the weights of its neighbours' rows again, so for the
// sake of the cache no strip has fewer than 16 times the rows of its halo.
constexpr double near_bytes = 1 << 20;
constexpr int64_t min_rows = 16;
// Rows of fewer columns share tiles even if they are whole vectors: the sums of grad_S are loaded for each tile.
constexpr int64_t max_shared_columns = 28;

// Rows of X from the first to the last that `height` rows of Y read. A border that shifts moves windows by multiples of
// the dilation, so that those of a few rows next to it begin anywhere in one dilation.
int64_t packed_rows(const Problem& p, int64_t height) {
  const int64_t reach = p.dilation_h * (p.kernel_h - 1) + 1, apart = (height - 1) * p.stride_h;
  if (p.border == Border::zeros) return apart + reach;
  return std::min(p.in_h, (height > 1 ? std::max(apart, p.dilation_h - 1) : 0) + reach);
}
int64_t sliding_columns(const Problem& p) { return (p.out_w - 1) * p.stride_w + p.dilation_w * (p.kernel_w - 1) + 1; }
int64_t packed_columns(const Problem& p) { return p.border == Border::shift ? p.in_w : sliding_columns(p); }
int64_t blocks_of(const Problem& p) { return ceil_div(p.group_channels(), block_channels); }

// The runs of tiles of `width` columns.
void set_runs(const Problem& p, int64_t width, WindowTables& tables) {
  tables.tile_runs.push_back(0);
  for (int64_t column = 0; column < p.out_w; column += width) {
    append_runs(columns_of(p), column, std::min(column + width, p.out_w), tables.runs);
    tables.tile_runs.push_back(int64_t(tables.runs.size()));
  }
}

}  // namespace

double strip_input_bytes(const Problem& p, int64_t height) {
  return double(blocks_of(p)) * double(packed_rows(p, height)) * double(packed_columns(p)) * (4 * block_channels);
}

ChannelsTiling make_channels_tiling(const SpanProblem& problem, const SpanBuffers& buffers, const void* w,
                                    int64_t vector_bytes, bool pairs, int threads, WindowTables& tables) {
  const Problem& p = problem.involution;
  ChannelsTiling tiling{};
  tiling.problem = problem;
  tiling.buffers = buffers;
  tiling.w = w;
  tiling.pairs = pairs;
  tiling.lanes = pairs ? block_channels : vector_bytes / 4;
  tiling.blocks = blocks_of(p);
  tiling.packed_columns = packed_columns(p);
  tiling.tile_columns = ceil_div(p.out_w, ceil_div(p.out_w, tile_pixels));
  tiling.tile_rows = std::max<int64_t>(1, tile_pixels / p.out_w);

  const int64_t wanted = threads > 1 ? tasks_per_thread * threads : 1;
  const int64_t max_strips = std::max<int64_t>(1, p.out_h * p.out_w / min_strip_pixels);
  int64_t strips = std::min(ceil_div(wanted, p.batch), max_strips);
  tiling.height = ceil_div(p.out_h, strips);
  const int64_t depth = pairs ? ceil_div(problem.reduced, 2) : problem.reduced;
  const auto fits = [&](int64_t height) {
    return strip_input_bytes(p, height) <= strip_bytes && height * p.out_w * depth * 4 <= strip_bytes;
  };
  while (tiling.height > 1 && !fits(tiling.height)) tiling.height = ceil_div(p.out_h, ++strips);
  if (tiling.height > tiling.tile_rows) tiling.height = tiling.height / tiling.tile_rows * tiling.tile_rows;
  tiling.strips = ceil_div(p.out_h, tiling.height);
  tiling.tile_rows = std::min(tiling.tile_rows, tiling.height);
  tiling.chunks = std::min(p.groups, ceil_div(wanted, p.batch * tiling.strips));
  // Tap row i of output row o reads row o * stride + i * dilation; pairs begin at even i.
  const bool evenly = pairs && p.border == Border::zeros;
  tiling.packed_step = evenly ? std::gcd(p.stride_h, p.kernel_h > 2 ? 2 * p.dilation_h : 0) : 1;
  tiling.packed_rows = ceil_div(packed_rows(p, tiling.height), tiling.packed_step);
  tiling.vectors = ceil_div(tiling.tile_rows * tiling.tile_columns, tiling.lanes);
  tiling.tiles = ceil_div(tiling.height, tiling.tile_rows) * ceil_div(p.out_w, tiling.tile_columns);
  tiling.tile_floats = tiling.vectors * tiling.lanes * depth;
  if (p.border == Border::shift) {
    set_runs(p, tiling.tile_columns, tables);
    tiling.runs = tables.runs.data(), tiling.tile_runs = tables.tile_runs.data();
  }
  // Its sum has another order: only where the number of threads does not change the tiles.
  const bool one_strip = p.out_h * p.out_w < 2 * min_strip_pixels;
  if (pairs && one_strip && depth >= 2 * tiling.lanes && depth % tiling.lanes == 0) {
    tiling.last_pixels = max_last_pixels;
    tiling.tile_floats += max_last_pixels * depth;
  }

  tiling.layer = buffers.reduce != nullptr;
  if (tiling.layer) {
    const int64_t reduced_vectors = ceil_div(problem.reduced, tiling.lanes);
    const bool share = tiling.chunks > 1;
    // Each slice pools the tile again.
    const int64_t slices = share ? ceil_div(threads, p.batch * tiling.strips * tiling.tiles) : 1;
    tiling.slice_vectors = ceil_div(reduced_vectors, std::clamp<int64_t>(slices, 1, ceil_div(reduced_vectors, 2)));
    tiling.slices = ceil_div(reduced_vectors, tiling.slice_vectors);
    tiling.shared_bytes = share ? p.batch * tiling.strips * tiling.tiles * tiling.tile_floats * 4 : 0;
  }

  int64_t at = 0;
  const auto take = [&](int64_t floats) {
    const int64_t begin = at;
    at += round_up(floats, 16);
    return begin;
  };
  take(tiling.blocks * tiling.packed_rows * tiling.packed_columns * block_channels);
  tiling.reduced_at = take(tiling.shared_bytes > 0 ? 0 : tiling.tiles * tiling.tile_floats);
  tiling.span_at = take(p.taps() * problem.reduced);
  tiling.bias_at = take(p.taps());
  tiling.weights_at = take(p.taps() * tile_pixels + tiling.lanes);
  tiling.result_at = take(tile_pixels * block_channels);
  if (tiling.layer) {
    const int64_t slice = tiling.slice_vectors * tiling.lanes;
    tiling.reduce_at = take(round_up(p.channels, 2) * slice);
    tiling.pooled_at = take(tile_pixels * round_up(p.channels, 2));
    tiling.dense_at =
        take(pairs ? slice + tile_pixels * p.channels / 2 + tile_pixels : (tile_pixels + tiling.lanes) * slice);
  }
  // Rows on their way from one type or order to another.
  tiling.staging_at =
      take(std::max({tiling.lanes * problem.reduced, tiling.lanes * p.taps(), tile_pixels * block_channels}) +
           2 * block_channels);
  tiling.scratch_bytes = at * 4;
  return tiling;
}

double backward_bytes(const SpanProblem& problem, int64_t height) {
  const Problem& p = problem.involution;
  const double halo = double(p.dilation_h * (p.kernel_h - 1));
  const double x = double(packed_rows(p, height)) * double(sliding_columns(p) + p.stride_w * 32);
  const double grad_x = std::min(double(p.in_h), double(height * p.stride_h) + halo) * double(p.in_w);
  const double rows = 3 * double(height) + 2 * halo / double(p.stride_h);
  return 4 * ((x + grad_x) * double(blocks_of(p) * block_channels) +
              (problem.reduced == 0 ? 0 : rows * double(p.out_w + 16) * double(problem.reduced + 16)));
}

namespace {

std::vector<BackwardStrip> backward_strips(const SpanProblem& problem) {
  const Problem& p = problem.involution;
  const int64_t reach = p.dilation_h * (p.kernel_h - 1);
  int64_t count = 1;
  const auto height = [&](int64_t strips) { return ceil_div(p.out_h, strips); };
  while (backward_bytes(problem, height(count)) > near_bytes &&
         height(count + 1) >= min_rows * std::max<int64_t>(1, reach / p.stride_h))
    ++count;
  while (backward_bytes(problem, height(count)) > max_backward_bytes && height(count) > 1) ++count;
  const int64_t rows = height(count);
  count = ceil_div(p.out_h, rows);

  std::vector<BackwardStrip> strips;
  const Axis<int64_t> axis = rows_of(p);
  const bool shift = p.border == Border::shift;
  // Rows of X are dealt out by the middle tap, of windows that shift by the pixel that they belong to.
  const int64_t middle = shift ? 0 : reach / 2 - p.padding_h;
  const auto first_input = [&](int64_t strip) {
    if (strip == 0) return int64_t{0};
    return strip == count ? p.in_h : std::clamp<int64_t>(strip * rows * p.stride_h + middle, 0, p.in_h);
  };
  for (int64_t i = 0; i < count; ++i) {
    BackwardStrip strip{i * rows, std::min((i + 1) * rows, p.out_h), first_input(i), first_input(i + 1), 0, 0, 0, 0};
    // A window that shifts has its pixel inside, and so reaches no further than to one side or the other.
    const int64_t before = shift ? -reach : p.padding_h - reach, after = shift ? reach : p.padding_h;
    const int64_t first = ceil_div(std::max<int64_t>(0, strip.in_begin + before), p.stride_h);
    strip.first = std::min(strip.begin, first);
    strip.last = std::max(strip.end, std::min(p.out_h, (strip.in_end - 1 + after) / p.stride_h + 1));
    if (shift) {
      while (strip.first < strip.begin && axis.first(strip.first) + reach < strip.in_begin) ++strip.first;
      while (strip.last > strip.end && axis.first(strip.last - 1) >= strip.in_end) --strip.last;
    }
    strip.x_begin = strip.x_end = axis.first(strip.begin);
    for (int64_t row = strip.begin; row < strip.end; ++row) {
      strip.x_begin = std::min(strip.x_begin, axis.first(row));
      strip.x_end = std::max(strip.x_end, axis.first(row) + reach + 1);
    }
    strips.push_back(strip);
  }
  return strips;
}

}  // namespace

namespace {

// Whether vectors of pixels run from one row to the next: where those of a row would leave many lanes empty.
bool is_flat(const Problem& p) { return 5 * p.out_w < 4 * round_up(p.out_w, product_lanes); }

// From a row of packed X to the next one: the columns after a row that a window reads are zeros before the next one.
int64_t flat_row_of(const Problem& p) {
  int64_t row = p.out_w;
  for (int64_t phase = 0; phase < p.stride_w; ++phase)
    row = std::max({row, flat_end(p, phase), flat_reach(p, phase) - flat_begin(p, phase)});
  return is_flat(p) ? row : round_up(row, product_lanes);
}

}  // namespace

bool backward_in_pairs(const SpanProblem& problem, const CpuKernels& kernels) {
  const Problem& p = problem.involution;
  return kernels.bfloat16_pairs && p.dtype == DType::bf16 && p.border == Border::zeros && p.dilation_h == 1 &&
         p.dilation_w == 1 && p.kernel_h <= max_pair_taps && p.kernel_w <= max_pair_taps && p.out_w <= tile_pixels &&
         flat_row_of(p) <= flat_columns;
}

namespace {

// Offsets in the scratch memory of a task.
struct Places {
  int64_t at = 0;
  int64_t take(bool wanted, int64_t floats) {
    const int64_t begin = at;
    at += wanted ? round_up(floats, 16) : 0;
    return begin;
  }
};

void place_pairs(BackwardTiling& tiling, Places& places) {
  const SpanProblem& problem = tiling.problem;
  const Problem& p = problem.involution;
  const SpanBuffers& buffers = tiling.buffers;
  const bool x = buffers.grad_x != nullptr, reduced = buffers.grad_reduced != nullptr;
  const bool span = buffers.grad_span != nullptr;
  const bool any = tiling.grad_w != nullptr || reduced || span || buffers.grad_bias != nullptr;
  const int64_t channel_pairs = ceil_div(p.group_channels(), 2), pair_rows = pairs_of_tap_rows(p) * p.kernel_w;
  int64_t rows = 0;
  for (int64_t i = 0; i < tiling.strip_count; ++i)
    rows = std::max(rows, tiling.strips[i].last - tiling.strips[i].first);
  tiling.flat = is_flat(p);
  tiling.flat_row = flat_row_of(p);
  tiling.x_phase = round_up((ceil_div(tiling.x_rows, p.stride_h) + 1) * tiling.flat_row, 16);
  tiling.x_channel = round_up(tiling.x_phase * p.stride_h * p.stride_w, 16) + 16;
  tiling.kept_rows = tiling.tile_rows + ceil_div(p.kernel_h, p.stride_h) + 1;
  tiling.x_at = places.take(any, channel_pairs * tiling.x_channel + flat_columns);
  tiling.grad_x_at = places.take(x, p.in_w * block_channels);
  tiling.grad_reduced_at = places.take(reduced, problem.reduced * tiling.plane);
  tiling.panels_at = places.take(x, ceil_div(problem.reduced, 2) * (rows / tiling.tile_rows + 3) * tiling.tile_pitch);
  tiling.pixels_at = places.take(span, tiling.plane / 2 * tiling.reduced_padded);
  tiling.span_at = places.take(x, p.taps() * ceil_div(problem.reduced, 2));
  tiling.bias_at = places.take(true, p.taps());
  tiling.weights_at = places.take(x, tiling.kept_rows * pair_rows * weight_row_pitch);
  tiling.dense_at = places.take(x, 2 * pair_rows * tile_pixels + 16);
  tiling.span_across_at = places.take(reduced, ceil_div(p.taps(), 2) * problem.reduced + 16);
  tiling.rounded_at = places.take(any, p.taps() * tile_pixels / 2 + 16);
  tiling.rounded_across_at = places.take(any, ceil_div(p.taps(), 2) * tile_pixels);
  tiling.grad_weights_at = places.take(any, p.taps() * gradient_pitch);
  tiling.grad_y_at = places.take(x, tiling.blocks * tiling.kept_rows * (p.out_w + 2 * weight_margin) * block_channels);
  tiling.grad_y_across_at = places.take(any, channel_pairs * flat_columns);
  tiling.bias_sums_at =
      places.take(buffers.grad_bias != nullptr, ceil_div(p.groups, tiling.chunks) * p.taps() * product_lanes);
  tiling.staging_at = places.take(true, std::max(tile_pixels, pair_rows) * block_channels);
}

}  // namespace

BackwardTiling make_backward_tiling(const SpanProblem& problem, const SpanBuffers& buffers, const void* w, void* grad_w,
                                    const CpuKernels& kernels, int threads, BackwardTables& tables) {
  const Problem& p = problem.involution;
  BackwardTiling tiling{};
  tiling.problem = problem;
  tiling.buffers = buffers;
  tiling.w = w;
  tiling.grad_w = grad_w;
  tiling.pairs = backward_in_pairs(problem, kernels);
  if (p.dtype == DType::bf16 && problem.reduced > 0) tiling.pair_product = kernels.pair_product;
  tiling.lanes = tiling.pair_product != nullptr ? product_lanes : kernels.vector_bytes / 4;
  tiling.blocks = blocks_of(p);
  tiling.reduced_padded = round_up(problem.reduced, tiling.lanes);
  tiling.row_padded = round_up(p.out_w, tiling.lanes);
  tables.strips = backward_strips(problem);
  tiling.strips = tables.strips.data(), tiling.strip_count = int64_t(tables.strips.size());
  int64_t rows = 0;
  for (const BackwardStrip& strip : tables.strips) {
    tiling.height = std::max(tiling.height, strip.end - strip.begin);
    tiling.grad_x_rows = std::max(tiling.grad_x_rows, strip.in_end - strip.in_begin);
    rows = std::max(rows, strip.last - strip.first);
  }
  // Long rows of whole vectors gain nothing, and a tile of one row needs no copy.
  const bool share = problem.reduced > 0 && (p.out_w < max_shared_columns || p.out_w % tiling.lanes != 0);
  tiling.tile_rows = share || tiling.pairs ? std::clamp<int64_t>(tile_pixels / p.out_w, 1, tiling.height) : 1;
  if (tiling.pairs)
    tiling.tile_rows = std::clamp<int64_t>((flat_columns - p.out_w) / flat_row_of(p) + 1, 1, tiling.tile_rows);
  tiling.tile_pitch = round_up(tiling.tile_rows * p.out_w, tiling.lanes);
  tiling.margin = p.out_w + 2 * aligned_margin <= tile_pixels ? aligned_margin : backward_margin;
  tiling.plane = ceil_div(tiling.height, tiling.tile_rows) * tiling.tile_pitch;
  const int64_t units = p.batch * tiling.strip_count;
  const int64_t sums = std::clamp(p.batch * problem.span_rows() * p.out_h * p.out_w / 2, min_sums, max_sums);
  const auto with_sums = [&](int64_t floats) { return std::max<int64_t>(1, sums / std::max<int64_t>(1, floats)); };
  const int64_t part_sums = problem.span_rows() * (tiling.reduced_padded + 1);
  const int64_t chunk_sums = p.batch * problem.reduced * tiling.strip_count * tiling.plane;
  const auto chunks_of = [&](int64_t parts) {
    return std::min({p.groups, ceil_div(max_parts, parts), with_sums(chunk_sums)});
  };
  const int64_t most_parts = std::min({max_parts, units, with_sums(part_sums)});
  // Of the ways to have as many tasks, that with the fewest partial sums.
  const auto all_sums = [&](int64_t parts) {
    return parts * part_sums + (chunks_of(parts) > 1 ? chunks_of(parts) * chunk_sums : 0);
  };
  tiling.parts = most_parts;
  for (int64_t parts = most_parts - 1; parts > 0; --parts)
    if (parts * chunks_of(parts) >= most_parts * chunks_of(most_parts) && all_sums(parts) < all_sums(tiling.parts))
      tiling.parts = parts;
  tiling.chunks = chunks_of(tiling.parts);
  if (problem.reduced == 0) {  // nothing is shared
    tiling.parts = units;
    tiling.chunks = std::min(p.groups, ceil_div(threads > 1 ? tasks_per_thread * threads : 1, units));
  }

  tiling.x_rows = packed_rows(p, tiling.height);
  tiling.x_phase = round_up(tiling.row_padded + p.dilation_w * (p.kernel_w - 1) / p.stride_w + 1, tiling.lanes);
  tiling.x_channel = tiling.x_phase * p.stride_w;
  for (int64_t j = 0; j < p.kernel_w; ++j)
    tables.tap_offset.push_back(p.dilation_w * j % p.stride_w * tiling.x_phase + p.dilation_w * j / p.stride_w);
  tiling.tap_offset = tables.tap_offset.data();
  if (p.border == Border::shift) {
    const int64_t lanes = kernels.vector_bytes / 4;
    set_runs(p, backward_columns, tables);
    append_vectors(columns_of(p), lanes, tables.vectors);
    tiling.runs = tables.runs.data(), tiling.tile_runs = tables.tile_runs.data();
    tiling.vectors = tables.vectors.data();
    tiling.problem.involution.padding_w = p.kernel_w / 2 * p.dilation_w;
  }

  Places places;
  const bool x = buffers.grad_x != nullptr, reduced = buffers.grad_reduced != nullptr;
  const bool span = buffers.grad_span != nullptr;
  const bool any = grad_w != nullptr || reduced || span || buffers.grad_bias != nullptr;
  if (tiling.pairs) {
    place_pairs(tiling, places);
  } else {
    tiling.x_at = places.take(any, tiling.blocks * tiling.x_rows * block_channels * tiling.x_channel);
    tiling.grad_x_at = places.take(x, tiling.blocks * tiling.grad_x_rows * p.in_w * block_channels);
    tiling.grad_reduced_at = places.take(reduced, problem.reduced * tiling.plane);
    // The rows of the strip itself and those of its neighbours are in different tiles.
    tiling.panels_at = places.take(x, problem.reduced * (rows / tiling.tile_rows + 3) * tiling.tile_pitch);
    tiling.pixels_at = places.take(span, std::max(tiling.height * p.out_w, tiling.plane / 2) * tiling.reduced_padded);
    tiling.span_at = places.take(true, p.taps() * problem.reduced);
    tiling.bias_at = places.take(true, p.taps());
    tiling.weights_at = places.take(true, (p.taps() + 1) * tile_pixels);
    tiling.dense_at = places.take(x && tiling.tile_rows > 1, (p.taps() + 1) * tile_pixels);
    if (tiling.pair_product != nullptr) {
      tiling.span_across_at = places.take(any, ceil_div(p.taps(), 2) * problem.reduced);
      tiling.rounded_at = places.take(any, p.taps() * tile_pixels / 2);
      tiling.rounded_across_at = places.take(any, ceil_div(p.taps(), 2) * tile_pixels);
    }
    tiling.grad_weights_at = places.take(true, p.taps() * gradient_pitch);
    tiling.grad_y_at = places.take(true, tile_pixels * block_channels);
    tiling.grad_y_across_at = places.take(true, backward_columns * block_channels);
    tiling.staging_at = places.take(true, tile_pixels * block_channels);
  }
  tiling.scratch_bytes = places.at * 4;
  tiling.shared_bytes = problem.reduced == 0 ? 0 : tiling.parts * problem.span_rows() * (tiling.reduced_padded + 1) * 4;
  if (tiling.chunks > 1 && reduced)
    tiling.shared_bytes += tiling.chunks * p.batch * problem.reduced * tiling.strip_count * tiling.plane * 4;
  return tiling;
}

}  // namespace pyinvolution::cpu
