// The inner loops of the forward passes of `channels` and `fused`, and of whole layers, in bfloat16 by dot products of
// pairs. The tasks and their steps are those of tiling.h; a pair is two tap rows, two reduced channels or two channels:
//
//   X  [block][row][column][16]     (row, row + dilation) of X: a pair of tap rows is a vector of X
//   W  [pair of tap rows][tap column][pixel], rounded to bfloat16 after a sum in float32
//   R  [vector of pixels][pair of reduced channels][lane]; in a layer rounded after its sum, too
//
// The last one of an odd number of tap rows is a pair with zeros: zeros in W, and of X only the low halves, since
// beyond the window X may be infinite. S, and A of a layer, are pairs where they lie, and an odd number of columns is
// copied with a zero.
//
// For 7 x 7 taps 14 columns take, per pair of tap rows, 98 dot products, 98 pairs of W that are operands in memory and
// 20 vectors of X: 59 loads of two a cycle for 49 cycles of dot products.
#include <cstdint>
#include <cstring>

#include "cpu/channels/packing_pairs.h"
#include "cpu/channels/strip.h"
#include "cpu/channels/tiling.h"
#include "cpu/simd/dtype.h"
#include "cpu/simd/pairs.h"
#include "cpu/simd/pairs_gemm.h"

namespace pyinvolution::cpu {
namespace {

// How many neighbouring pixels `apply_pairs` works on: enough sums to hide the latency of a dot product. Of half as many
// it takes two rows at once.
constexpr int max_pair_columns = 14;

// What `apply_pairs` is told besides addresses.
struct ApplyPairsParams {
  int64_t pair_rows;  // pairs of tap rows
  bool single_row;    // and one tap row more
  int64_t kernel_w;
  int64_t tap_row, tap_column;  // steps in packed X: to the next pair of tap rows, tap column,
  int64_t row, column;          // output row, output column
  const float* scale;           // nullptr: none
  const float* shift;
  bool relu;
};

// Where results go: to `narrow`, or if that is nullptr to `wide`.
struct PixelResults {
  BFloat16* narrow;
  float* wide;
  int64_t row, column;  // steps to the next one
  PixelResults at(int64_t r, int64_t c) const {
    const int64_t step = r * row + c * column;
    return {narrow == nullptr ? nullptr : narrow + step, wide == nullptr ? nullptr : wide + step, row, column};
  }
  PixelResults every(int64_t columns) const { return {narrow, wide, row, columns * column}; }
};

// The sums of a block, with the epilogue.
template <int Rows, int Columns, int Lanes>
[[gnu::always_inline]] inline void store_pair_sums(const ApplyPairsParams& params,
                                                   PairSums<Lanes> (&sum)[Rows][Columns], const PixelResults& y) {
#pragma GCC unroll 2
  for (int r = 0; r < Rows; ++r) {
    if (params.scale != nullptr) {
      const auto scale = PairSums<Lanes>::load(params.scale), shift = PairSums<Lanes>::load(params.shift);
#pragma GCC unroll 16
      for (int c = 0; c < Columns; ++c) sum[r][c].value = sum[r][c].value * scale.value + shift.value;
    }
    if (params.relu) {
#pragma GCC unroll 16
      for (int c = 0; c < Columns; ++c) sum[r][c].relu();
    }
    if (y.narrow != nullptr) {
#pragma GCC unroll 16
      for (int c = 0; c < Columns; ++c) sum[r][c].round_to(y.narrow + r * y.row + c * y.column);
    } else {
#pragma GCC unroll 16
      for (int c = 0; c < Columns; ++c) sum[r][c].store(y.wide + r * y.row + c * y.column);
    }
  }
}

// A block of Lanes channels at Rows x Columns neighbouring pixels; rows of W are w_row apart. Stride and Width, where
// not 0, are those of a window without dilation.
//
// Besides its products a row of taps takes a load of each vector of X, which are more loads than there are products to
// hide them. So the weights of the first columns are loaded four at a time and spread by shuffles.
template <int Rows, int Columns, int Stride, int Width, int Lanes>
void apply_pairs_block(const ApplyPairsParams& params, const Pair* x, const Pair* w, int64_t w_row,
                       const PixelResults& y) {
  constexpr int spread_columns = Columns < 4 ? 0 : Stride == 2 && Columns >= 8 ? 8 : 4;
  PairSums<Lanes> sum[Rows][Columns];
#pragma GCC unroll 2
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < Columns; ++c) sum[r][c] = PairSums<Lanes>::splat(0);
  const auto tap_row = [&](auto load) __attribute__((always_inline)) {
    if constexpr (Width > 0) {
      Pairs<Lanes> fours[Rows][Width][spread_columns / 4 + 1];
#pragma GCC unroll 64
      for (int q = 0; q < Stride * (Columns - 1) + Width; ++q)
#pragma GCC unroll 2
        for (int r = 0; r < Rows; ++r) {
          const Pairs<Lanes> at = load(x + r * params.row + q * block_channels);
#pragma GCC unroll 16
          for (int c = 0; c < Columns; ++c) {
            const int j = q - Stride * c;
            if (j < 0 || j >= Width) continue;
            const Pair* weight = w + r * w_row + j * tile_pixels + c;
            if (c < spread_columns) {
              if (c % 4 == 0) fours[r][j][c / 4] = Pairs<Lanes>::load_fours(weight);
              sum[r][c].add_dot(at, fours[r][j][c / 4].spread(c % 4));
            } else {
              sum[r][c].add_dot(at, *weight);
            }
          }
        }
    } else {
      for (int64_t j = 0; j < params.kernel_w; ++j)
#pragma GCC unroll 2
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
          for (int c = 0; c < Columns; ++c)
            sum[r][c].add_dot(load(x + r * params.row + j * params.tap_column + c * params.column),
                              w[r * w_row + j * tile_pixels + c]);
    }
  };
  const int64_t width = Width > 0 ? Width : params.kernel_w;
  for (int64_t i = 0; i < params.pair_rows; ++i, x += params.tap_row, w += width * tile_pixels)
    tap_row([](const Pair* from) __attribute__((always_inline)) { return Pairs<Lanes>::load(from); });
  if (params.single_row)
    tap_row([](const Pair* from) __attribute__((always_inline)) { return Pairs<Lanes>::load_low(from); });

  store_pair_sums(params, sum, y);
}

// Some columns of some rows of a tile, whose rows of W are w_row apart.
template <int Stride, int Width, int Lanes>
void apply_pairs(const ApplyPairsParams& params, const Pair* x, const Pair* w, int64_t rows, int64_t columns,
                 int64_t w_row, const PixelResults& y) {
  const int64_t count = ceil_div(columns, max_pair_columns);
  for (int64_t b = 0; b < count; ++b) {
    const int64_t first = columns * b / count;
    with_count<max_pair_columns>(columns * (b + 1) / count - first, [&](auto n) {
      constexpr int block = decltype(n)::value;
      int64_t r = 0;
      const auto apply = [&](auto together) {
        apply_pairs_block<decltype(together)::value, block, Stride, Width, Lanes>(
            params, x + r * params.row + first * params.column, w + r * w_row + first, w_row, y.at(r, first));
        r += decltype(together)::value;
      };
      if constexpr (2 * block <= max_pair_columns)
        while (r + 2 <= rows) apply(Count<2>{});
      while (r < rows) apply(Count<1>{});
    });
  }
}

// A block of Lanes channels at Columns pixels that share a window, `step` apart in a tile of W. A vector of X is loaded
// once for all of them. Few pixels have two sums each, which do not wait for each other.
template <int Columns, int Lanes>
void apply_pairs_shared_block(const ApplyPairsParams& params, const Pair* x, const Pair* w, int64_t step,
                              const PixelResults& y) {
  constexpr int chains = Columns <= 7 ? 2 : 1;
  PairSums<Lanes> sums[chains][1][Columns];
#pragma GCC unroll 2
  for (int k = 0; k < chains; ++k)
#pragma GCC unroll 16
    for (int c = 0; c < Columns; ++c) sums[k][0][c] = PairSums<Lanes>::splat(0);
  const auto tap_row = [&](auto load) __attribute__((always_inline)) {
    const Pair* from = x;
    const auto add = [&](PairSums<Lanes>(&to)[1][Columns]) __attribute__((always_inline)) {
      const Pairs<Lanes> at = load(from);
#pragma GCC unroll 16
      for (int c = 0; c < Columns; ++c) to[0][c].add_dot(at, w[c * step]);
      from += params.tap_column, w += tile_pixels;
    };
    int64_t j = 0;
    for (; j + chains <= params.kernel_w; j += chains)
#pragma GCC unroll 2
      for (int k = 0; k < chains; ++k) add(sums[k]);
    for (; j < params.kernel_w; ++j) add(sums[0]);
  };
  for (int64_t i = 0; i < params.pair_rows; ++i, x += params.tap_row)
    tap_row([](const Pair* from) __attribute__((always_inline)) { return Pairs<Lanes>::load(from); });
  if (params.single_row)
    tap_row([](const Pair* from) __attribute__((always_inline)) { return Pairs<Lanes>::load_low(from); });
  if constexpr (chains == 2)
#pragma GCC unroll 16
    for (int c = 0; c < Columns; ++c) sums[0][0][c].value += sums[1][0][c].value;
  store_pair_sums(params, sums[0], y);
}

// `columns` pixels of a row that share a window.
template <int Lanes>
void apply_pairs_shared(const ApplyPairsParams& params, const Pair* x, const Pair* w, int64_t step, int64_t columns,
                        const PixelResults& y) {
  const int64_t count = ceil_div(columns, max_pair_columns);
  for (int64_t b = 0; b < count; ++b) {
    const int64_t first = columns * b / count;
    with_count<max_pair_columns>(columns * (b + 1) / count - first, [&](auto n) {
      apply_pairs_shared_block<decltype(n)::value, Lanes>(params, x, w + first * step, step, y.at(0, first));
    });
  }
}

using ApplyPairs = void (*)(const ApplyPairsParams&, const Pair* x, const Pair* w, int64_t rows, int64_t columns,
                            int64_t w_row, const PixelResults& y);

template <int Lanes>
ApplyPairs apply_pairs_for(const Problem& p) {
  if (p.dilation_w != 1) return apply_pairs<0, 0, Lanes>;
  if (p.stride_w == 1) {
    switch (p.kernel_w) {
      case 3: return apply_pairs<1, 3, Lanes>;
      case 5: return apply_pairs<1, 5, Lanes>;
      case 7: return apply_pairs<1, 7, Lanes>;
      default: break;
    }
  } else if (p.stride_w == 2) {
    switch (p.kernel_w) {
      case 3: return apply_pairs<2, 3, Lanes>;
      case 5: return apply_pairs<2, 5, Lanes>;
      case 7: return apply_pairs<2, 7, Lanes>;
      default: break;
    }
  }
  return apply_pairs<0, 0, Lanes>;
}

// --- a task ----------------------------------------------------------------------------------------------------------

struct PairsRun : StripTask<BFloat16, PairsRun> {
  const ApplyPairs apply, apply_half;  // of 16 channels, and of up to 8
  const ApplyPairsParams window;
  const BFloat16* rows = nullptr;  // of S, [tap][r]
  int64_t pitch = 0;

  PairsRun(const ChannelsTiling& channels, int64_t n_and_strip, int64_t chunk, void* scratch)
      : StripTask(channels, n_and_strip, chunk, scratch),
        apply(apply_pairs_for<16>(p)),
        apply_half(apply_pairs_for<8>(p)),
        window{p.kernel_h / 2,
               p.kernel_h % 2 != 0,
               p.kernel_w,
               2 * p.dilation_h / tiling.packed_step * tiling.packed_columns * block_channels,
               p.dilation_w * block_channels,
               p.stride_h / tiling.packed_step * tiling.packed_columns * block_channels,
               p.stride_w * block_channels,
               nullptr,
               nullptr,
               span.relu} {}

  Pair* pairs_at(int64_t offset) const { return reinterpret_cast<Pair*>(memory + offset); }
  BFloat16* elements_at(int64_t offset) const { return reinterpret_cast<BFloat16*>(memory + offset); }
  const BFloat16* image() const { return static_cast<const BFloat16*>(tiling.buffers.x) + n * p.x_stride[0]; }

  // Rows [from_row, to_row) of the strip of X at which a pair of tap rows begins, a block of channels of group g.
  void pack_input(int64_t g, int64_t block, int64_t from_row, int64_t to_row) const {
    const int64_t row_pairs = tiling.packed_columns * block_channels;
    const BFloat16* channels = image() + first_channel(g, block) * p.x_stride[1];
    const int64_t first = min(p.padding_w, tiling.packed_columns);
    const int64_t last = first + min(p.in_w, tiling.packed_columns - first);
    const auto row_of = [&](int64_t h) {
      return h < 0 || h >= p.in_h || first == last ? nullptr : channels + h * p.x_stride[2];
    };
    const int64_t start = round_up(from_row, tiling.packed_step);
    Pair* to = pairs_at(block * block_floats()) + start / tiling.packed_step * row_pairs;
    for (int64_t r = start; r < to_row; r += tiling.packed_step, to += row_pairs) {
      const int64_t h = x_begin + r;
      const TwoRows from(row_of(h), row_of(h + p.dilation_h));
      // Other groups leave the zeros as they are.
      if (g == first_group) {
        const int64_t inside = from.mask == 0 ? 0 : last - first;
        std::memset(to, 0, size_t(first * block_channels) * sizeof(Pair));
        std::memset(to + (first + inside) * block_channels, 0,
                    size_t((tiling.packed_columns - first - inside) * block_channels) * sizeof(Pair));
      }
      if (from.mask == 0) continue;
      load_pixel_pairs(from, channels_of(block), last - first, p.x_stride[1], p.x_stride[3],
                       to + first * block_channels, pairs_at(tiling.staging_at));
    }
  }

  // The pixels of a tile from the rows of packed X of a block.
  void apply_rows(ApplyPairsParams& params, const Tile& tile, const Pair* packed, bool half,
                  const PixelResults& y) const {
    const int64_t row_pairs = tiling.packed_columns * block_channels;
    const ApplyPairs apply_run = half ? apply_half : apply;
    const Pair* w = pairs_at(tiling.weights_at);
    const auto x_row = [&](int64_t r) {
      return packed + (row_axis.first(tile.row + r) - x_begin) / tiling.packed_step * row_pairs;
    };
    if (p.border == Border::zeros)
      return apply_run(params, x_row(0) + tile.column * params.column, w, tile.rows, tile.columns, tile.columns, y);
    // Two rows at a time, however far apart their windows are.
    for (int64_t r = 0; r < tile.rows; r += 2) {
      const int64_t rows = min(2, tile.rows - r);
      params.row = rows == 2 ? x_row(r + 1) - x_row(r) : 0;
      for_each_run(tile, [&](const WindowRun& run) {
        const int64_t column = run.column - tile.column;
        const Pair *from = x_row(r) + run.first * block_channels, *weights = w + r * tile.columns + column;
        const PixelResults to = y.at(r, column);
        if (run.slope == 0) {
          for (int64_t i = 0; i < rows; ++i) {
            const PixelResults pixels = to.at(i, 0).every(run.step);
            const auto shared = half ? apply_pairs_shared<8> : apply_pairs_shared<16>;
            shared(params, from + i * params.row, weights + i * tile.columns, run.step, run.count, pixels);
          }
          return;
        }
        ApplyPairsParams other = params;
        other.column = run.slope * block_channels;
        ApplyPairs apply_any = half ? apply_pairs<0, 0, 8> : apply_pairs<0, 0, 16>;
        if (run.slope == p.stride_w) apply_any = apply_run;
        apply_any(other, from, weights, rows, run.count, tile.columns, to);
      });
    }
  }

  void apply_tile(const Tile& tile, int64_t g, int64_t block) const {
    const int64_t channels = channels_of(block), first = first_channel(g, block);
    const Epilogue epilogue = span.epilogue ? epilogue_of(first, channels) : Epilogue{};
    ApplyPairsParams params = window;
    if (span.epilogue) params.scale = epilogue.scale, params.shift = epilogue.shift;
    const bool half = channels <= block_channels / 2;
    const bool in_place = p.y_stride[1] == 1 && channels == (half ? block_channels / 2 : block_channels);
    float* result = memory + tiling.result_at;
    BFloat16* y = static_cast<BFloat16*>(tiling.buffers.y) + n * p.y_stride[0] + first * p.y_stride[1] +
                  tile.row * p.y_stride[2] + tile.column * p.y_stride[3];
    const PixelResults results = in_place
                                     ? PixelResults{y, result, p.y_stride[2], p.y_stride[3]}
                                     : PixelResults{nullptr, result, tile.columns * block_channels, block_channels};
    apply_rows(params, tile, pairs_at(block * block_floats()), half, results);
    for (int64_t r = 0; r < tile.rows && !in_place; ++r)
      store_pixels(result + r * results.row, channels, tile.columns, y + r * p.y_stride[2], p.y_stride[1],
                   p.y_stride[3], memory + tiling.staging_at);
  }

  void pack_reduced(const Tile& tile, float* to) const {
    const BFloat16* from = static_cast<const BFloat16*>(tiling.buffers.reduced) + n * span.reduced_stride[0] +
                           tile.row * span.reduced_stride[2] + tile.column * span.reduced_stride[3];
    pack_channel_pairs(from, span.reduced_stride, span.reduced, tile.rows, tile.columns, reinterpret_cast<Pair*>(to));
    copy_last_pixels(tile, reinterpret_cast<Pair*>(to), 0, ceil_div(span.reduced, 2));
  }

  // How many pixels of a tile are computed on their own.
  int64_t last_pixels(const Tile& tile) const {
    const int64_t tail = tile.pixels() % pair_lanes;
    return tail <= tiling.last_pixels ? tail : 0;
  }
  // [pixel][pair] after the vectors of R at a tile.
  Pair* last_pixels_of(Pair* reduced) const {
    return reduced + tiling.vectors * pair_lanes * ceil_div(span.reduced, 2);
  }
  void copy_last_pixels(const Tile& tile, Pair* reduced, int64_t first, int64_t last) const {
    const int64_t depth = ceil_div(span.reduced, 2), count = last_pixels(tile);
    const Pair* vector = reduced + tile.pixels() / pair_lanes * pair_lanes * depth;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = first; k < last; ++k) last_pixels_of(reduced)[i * depth + k] = vector[k * pair_lanes + i];
  }

  void start_group(int64_t g) {
    rows = rows_in_pairs(span_row<BFloat16>(span, tiling.buffers, g * p.taps()), span.span_stride[0],
                         span.span_stride[1], p.taps(), span.reduced, elements_at(tiling.span_at), &pitch);
  }

  void compute_weights(const Tile& tile, const float* reduced) const {
    const int64_t depth = ceil_div(span.reduced, 2);
    const float* bias = memory + tiling.bias_at;
    Pair* pairs = reinterpret_cast<Pair*>(const_cast<float*>(reduced));
    const PairColumns columns{pairs, depth * pair_lanes};
    const int64_t last = last_pixels(tile), whole = tile.pixels() - last;
    Pair* to = pairs_at(tiling.weights_at);
    for (int64_t i = 0; i < p.kernel_h; i += 2, to += p.kernel_w * tile_pixels) {
      const int64_t first = i * p.kernel_w, partner = i + 1 < p.kernel_h ? p.kernel_w : 0;
      const PairRows taps{rows + first * pitch, pitch, 1, partner, bias + first};
      multiply_pairs(taps, p.kernel_w, columns, whole, depth, {to, tile_pixels, pair_lanes, false});
      for (int64_t v = 0; v < last; ++v)
        multiply_pairs_column(taps, p.kernel_w, last_pixels_of(pairs) + v * depth, depth,
                              {to + whole + v, tile_pixels, pair_lanes, false});
    }
  }

  void load_weights(const Tile& tile, int64_t g) const {
    load_weight_pairs(weights_of<BFloat16>(p, tiling.w, n, g, tile.row, tile.column), p, tile.rows, tile.columns,
                      pairs_at(tiling.weights_at), pairs_at(tiling.staging_at));
  }

  // Means of X over the cells of a tile as [pixel][c].
  void pool_rounded(const Tile& tile, BFloat16* to) const {
    if (p.x_stride[1] != 1 || p.channels < pair_lanes) {
      pool(tile, memory + tiling.pooled_at);
      return store_run(memory + tiling.pooled_at, tile.pixels() * p.channels, to);
    }
    for (int64_t r = 0; r < tile.rows; ++r)
      for (int64_t v = 0; v < tile.columns; ++v, to += p.channels) {
        const int64_t h = (tile.row + r) * p.stride_h, high = min(p.stride_h, p.in_h - h);
        const int64_t q = (tile.column + v) * p.stride_w, wide = min(p.stride_w, p.in_w - q);
        const BFloat16* cell = image() + h * p.x_stride[2] + q * p.x_stride[3];
        const float share = 1 / float(high * wide);
        for (int64_t c = 0; c < p.channels; c += pair_lanes) {
          const int64_t at = min(c, p.channels - pair_lanes);  // the last vector overlaps the one before it
          auto sums = PairSums<16>::splat(0);
          for (int64_t i = 0; i < high; ++i)
            for (int64_t j = 0; j < wide; ++j)
              sums.value += PairSums<16>::widen(cell + i * p.x_stride[2] + j * p.x_stride[3] + at).value;
          sums.value *= share;
          sums.round_to(to + at);
        }
      }
  }

  // A slice of R at a tile: the product of rows of A and the pixels of X or, with a stride, of its means, rounded.
  void reduce(const Tile& tile, int64_t slice, float* to) const {
    const int64_t first = slice * tiling.slice_vectors * tiling.lanes;
    const int64_t count = min(tiling.slice_vectors * tiling.lanes, span.reduced - first);
    const int64_t depth = ceil_div(p.channels, 2);
    const BFloat16* bias = static_cast<const BFloat16*>(tiling.buffers.reduce_bias);
    float* start = memory + tiling.dense_at;
    for (int64_t r = 0; r < count; ++r) start[r] = bias == nullptr ? 0.0f : load(bias[first + r]);
    int64_t row = 0;
    const BFloat16* a = rows_in_pairs(
        static_cast<const BFloat16*>(tiling.buffers.reduce) + first * span.reduce_stride[0], span.reduce_stride[0],
        span.reduce_stride[1], count, p.channels, elements_at(tiling.reduce_at), &row);

    Pair* pixels = pairs_at(tiling.pooled_at);
    if (p.stride_h == 1 && p.stride_w == 1) {
      pack_channel_pairs(image() + tile.row * p.x_stride[2] + tile.column * p.x_stride[3], p.x_stride, p.channels,
                         tile.rows, tile.columns, pixels);
    } else {
      BFloat16* means = elements_at(tiling.dense_at + tiling.slice_vectors * tiling.lanes);
      pool_rounded(tile, means);
      const int64_t stride[4] = {0, 1, tile.columns * p.channels, p.channels};
      pack_channel_pairs(means, stride, p.channels, tile.rows, tile.columns, pixels);
    }
    const PairColumns columns{pixels, depth * pair_lanes};
    const PairResults results{reinterpret_cast<Pair*>(to) + first / 2 * pair_lanes, pair_lanes,
                              ceil_div(span.reduced, 2) * pair_lanes, true};
    multiply_pairs({a, row, 2, 1, start}, count / 2, columns, tile.pixels(), depth, results);
    if (count % 2 != 0)
      multiply_pairs({a + (count - 1) * row, row, 1, 0, start + count - 1}, 1, columns, tile.pixels(), depth,
                     {results.at + count / 2 * pair_lanes, pair_lanes, results.vector, true});
    copy_last_pixels(tile, reinterpret_cast<Pair*>(to), first / 2, first / 2 + ceil_div(count, 2));
  }
};

}  // namespace
}  // namespace pyinvolution::cpu
