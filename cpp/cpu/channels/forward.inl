// The inner loops of the forward passes of `channels` and `fused`, and of whole layers; see tiling.h. Compiled for each
// instruction set by instances/kernels.inl.
#include <cstdint>
#include <cstring>

#include "cpu/channels/packing.h"
#include "cpu/channels/strip.h"
#include "cpu/channels/tiling.h"
#include "cpu/simd/dtype.h"
#include "cpu/simd/gemm.h"

namespace pyinvolution::cpu {
namespace {

constexpr int block_vectors = block_channels / V::lanes;

// How many neighbouring pixels `apply` works on: its registers hold max_columns x block_vectors accumulators,
// block_vectors of x and one weight. The instance file says how many.
constexpr int max_columns = APPLY_COLUMNS;

// A function of its own with AVX-512: where GCC inlines blocks of few columns, it keeps their sums in memory. Elsewhere
// small windows would notice the call.
#if VECTOR_BYTES == 64
#define PYINVOLUTION_APART [[gnu::noinline]]
#else
#define PYINVOLUTION_APART
#endif

// Adds a block of channels times a weight.
[[gnu::always_inline]] inline void add_product(V (&sum)[block_vectors], const V (&at)[block_vectors],
                                               const float* weight) {
  if constexpr (block_vectors == 1) {
    sum[0].add_product_at(at[0], weight);
  } else {
    const float value = *weight;
#pragma GCC unroll 4
    for (int v = 0; v < block_vectors; ++v) sum[v].add_product(at[v], value);
  }
}

// What `apply` is told besides addresses.
struct ApplyParams {
  int64_t kernel_h, kernel_w;
  int64_t tap_row, tap_column, column;  // steps in packed X: to the next tap row, tap column, output column
  const float* scale;                   // nullptr: none
  const float* shift;
  bool relu;
};

// A vector serves the taps of a row, and a weight the vectors of a block. Where there is but one of these, a block of
// Columns x Taps multiply-adds would take Columns + Taps - 1 loads of vectors and as many broadcasts as multiply-adds,
// and wait for them. So the weights of the first columns are loaded four at a time and spread by shuffles.
constexpr int spread_columns = block_vectors == 1 ? 4 : 0;

// Adds the products of a row of Taps taps to a block of channels at Columns neighbouring pixels:
//
//   sum[c] += sum over j of  w[j * tap + c] * x[Stride * c + j]
template <int Columns, int Stride, int Taps, int tap>
[[gnu::always_inline]] inline void add_row(V (&sum)[Columns][block_vectors], const float* x, const float* w) {
  V fours[Taps];
#pragma GCC unroll 64
  for (int q = 0; q < Stride * (Columns - 1) + Taps; ++q) {
    V at[block_vectors];
#pragma GCC unroll 4
    for (int v = 0; v < block_vectors; ++v) at[v] = V::load(x + q * block_channels + v * V::lanes);
#pragma GCC unroll 16
    for (int c = 0; c < Columns; ++c) {
      const int j = q - Stride * c;
      if (j < 0 || j >= Taps) continue;
      const float* weight = w + j * tap + c;
      if constexpr (Columns >= spread_columns && spread_columns > 0) {
        if (c < spread_columns) {
          if (c == 0) fours[j] = V::load_fours(weight);
          sum[c][0].add_product(at[0], fours[j].spread(c));
          continue;
        }
      }
      add_product(sum[c], at, weight);
    }
  }
}

// The same for any number of taps.
template <int Columns, int Stride, int tap>
[[gnu::always_inline]] inline void add_long_row(V (&sum)[Columns][block_vectors], int64_t taps, const float* x,
                                                const float* w) {
  for (; taps >= 3; taps -= 3, x += 3 * block_channels, w += 3 * tap) add_row<Columns, Stride, 3, tap>(sum, x, w);
  for (; taps > 0; --taps, x += block_channels, w += tap) add_row<Columns, Stride, 1, tap>(sum, x, w);
}

// The sums of a block, with the epilogue.
template <int Columns>
[[gnu::always_inline]] inline void store_sums(const ApplyParams& params, V (&sum)[Columns][block_vectors], float* y,
                                              int64_t pixel) {
  if (params.scale != nullptr) {
    for (int v = 0; v < block_vectors; ++v) {
      const V scale = V::load(params.scale + v * V::lanes), shift = V::load(params.shift + v * V::lanes);
#pragma GCC unroll 16
      for (int c = 0; c < Columns; ++c) sum[c][v].value = sum[c][v].value * scale.value + shift.value;
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < Columns; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < block_vectors; ++v) {
      // A NaN stays a NaN.
      if (params.relu) sum[c][v].value = sum[c][v].value < 0 ? typename V::Lanes{} : sum[c][v].value;
      sum[c][v].store(y + c * pixel + v * V::lanes);
    }
}

// A block of channels at Columns neighbouring pixels. Stride is that of a window without dilation, or 0: any window; and
// Width its width, or 0.
template <int Columns, int Stride, int Width>
PYINVOLUTION_APART void apply_block(const ApplyParams& params, const float* x, const float* w, float* y,
                                    int64_t pixel) {
  V sum[Columns][block_vectors];
#pragma GCC unroll 16
  for (int c = 0; c < Columns; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < block_vectors; ++v) sum[c][v] = V::zero();
  const int64_t width = Width > 0 ? Width : params.kernel_w;
  for (int64_t i = 0; i < params.kernel_h; ++i) {
    if constexpr (Width > 0) {
      add_row<Columns, Stride, Width, tile_pixels>(sum, x, w);
    } else if constexpr (Stride > 0) {
      add_long_row<Columns, Stride, tile_pixels>(sum, width, x, w);
    } else {
      for (int64_t j = 0; j < width; ++j)
#pragma GCC unroll 16
        for (int c = 0; c < Columns; ++c) {
          V at[block_vectors];
#pragma GCC unroll 4
          for (int v = 0; v < block_vectors; ++v)
            at[v] = V::load(x + j * params.tap_column + c * params.column + v * V::lanes);
          add_product(sum[c], at, w + j * tile_pixels + c);
        }
    }
    x += params.tap_row;
    w += width * tile_pixels;
  }
  store_sums(params, sum, y, pixel);
}

// `columns` neighbouring pixels of a row.
template <int Stride, int Width>
void apply(const ApplyParams& params, const float* x, const float* w, int64_t columns, float* y, int64_t pixel) {
  const int64_t count = (columns + max_columns - 1) / max_columns;
  for (int64_t b = 0; b < count; ++b) {
    const int64_t first = columns * b / count;
    with_count<max_columns>(columns * (b + 1) / count - first, [&](auto n) {
      apply_block<decltype(n)::value, Stride, Width>(params, x + first * params.column, w + first, y + first * pixel,
                                                     pixel);
    });
  }
}

// A block of channels at Columns pixels that share a window, `step` apart in a tile of W. A vector of x is loaded once
// for all of them. Few pixels have two sums each, which do not wait for each other.
template <int Columns, bool Neighbours>
PYINVOLUTION_APART void apply_shared_block(const ApplyParams& params, const float* x, const float* w, int64_t step,
                                           float* y, int64_t pixel) {
  constexpr int chains = Columns * block_vectors <= 4 ? 2 : 1;
  if constexpr (Neighbours) step = 1;
  V sum[chains][Columns][block_vectors];
#pragma GCC unroll 2
  for (int k = 0; k < chains; ++k)
#pragma GCC unroll 16
    for (int c = 0; c < Columns; ++c)
#pragma GCC unroll 4
      for (int v = 0; v < block_vectors; ++v) sum[k][c][v] = V::zero();
  const auto add = [&](V(&to)[Columns][block_vectors], const float* from, const float* weights)
                       __attribute__((always_inline)) {
                         V at[block_vectors];
#pragma GCC unroll 4
                         for (int v = 0; v < block_vectors; ++v) at[v] = V::load(from + v * V::lanes);
#pragma GCC unroll 16
                         for (int c = 0; c < Columns; ++c) add_product(to[c], at, weights + c * step);
                       };
  for (int64_t i = 0; i < params.kernel_h; ++i, x += params.tap_row) {
    const float* from = x;
    int64_t j = 0;
    for (; j + chains <= params.kernel_w; j += chains)
#pragma GCC unroll 2
      for (int k = 0; k < chains; ++k, from += params.tap_column, w += tile_pixels) add(sum[k], from, w);
    for (; j < params.kernel_w; ++j, from += params.tap_column, w += tile_pixels) add(sum[0], from, w);
  }
  if constexpr (chains == 2)
#pragma GCC unroll 16
    for (int c = 0; c < Columns; ++c)
#pragma GCC unroll 4
      for (int v = 0; v < block_vectors; ++v) sum[0][c][v].value += sum[1][c][v].value;
  store_sums(params, sum[0], y, pixel);
}

// `columns` pixels that share a window.
void apply_shared(const ApplyParams& params, const float* x, const float* w, int64_t step, int64_t columns, float* y,
                  int64_t pixel) {
  const int64_t count = ceil_div(columns, max_columns);
  for (int64_t b = 0; b < count; ++b) {
    const int64_t first = columns * b / count;
    with_count<max_columns>(columns * (b + 1) / count - first, [&](auto n) {
      constexpr int block = decltype(n)::value;
      const auto apply = step == 1 ? apply_shared_block<block, true> : apply_shared_block<block, false>;
      apply(params, x, w + first * step, step, y + first * pixel, pixel);
    });
  }
}

using Apply = void (*)(const ApplyParams&, const float* x, const float* w, int64_t columns, float* y, int64_t pixel);

Apply apply_for(const Problem& p) {
  if (p.dilation_w != 1) return apply<0, 0>;
  if (p.stride_w == 1) {
    switch (p.kernel_w) {
      case 3: return apply<1, 3>;
      case 5: return apply<1, 5>;
      case 7: return apply<1, 7>;
      default:
        if (max_columns > 2) return apply<1, 0>;  // fewer share no x
        break;
    }
  } else if (p.stride_w == 2) {
    switch (p.kernel_w) {
      case 3: return apply<2, 3>;
      case 5: return apply<2, 5>;
      case 7: return apply<2, 7>;
      default:
        if (max_columns > 2) return apply<2, 0>;
        break;
    }
  }
  return apply<0, 0>;
}

// --- a task ----------------------------------------------------------------------------------------------------------

template <class T>
struct ChannelsRun : StripTask<T, ChannelsRun<T>> {
  using Base = StripTask<T, ChannelsRun<T>>;
  using Base::begin, Base::block_floats, Base::channels_of, Base::end, Base::epilogue_of, Base::first_channel,
      Base::memory, Base::n, Base::p, Base::pool, Base::row_axis, Base::span, Base::tiling, Base::x_begin;
  const Apply apply;
  const ApplyParams window;
  const float* rows = nullptr;  // of S, [tap][r]
  int64_t pitch = 0;

  ChannelsRun(const ChannelsTiling& channels, int64_t n_and_strip, int64_t chunk, void* scratch)
      : Base(channels, n_and_strip, chunk, scratch),
        apply(apply_for(p)),
        window{p.kernel_h,
               p.kernel_w,
               p.dilation_h * tiling.packed_columns * block_channels,
               p.dilation_w * block_channels,
               p.stride_w * block_channels,
               nullptr,
               nullptr,
               span.relu} {}

  // Rows [from_row, to_row) of the strip of X, a block of channels of group g.
  void pack_input(int64_t g, int64_t block, int64_t from_row, int64_t to_row) const {
    const int64_t channels = channels_of(block), row_floats = tiling.packed_columns * block_channels;
    float* to = memory + block * block_floats() + from_row * row_floats;
    const int64_t channel = p.x_stride[1], column = p.x_stride[3];
    const T* image = static_cast<const T*>(tiling.buffers.x) + n * p.x_stride[0] + first_channel(g, block) * channel;
    const int64_t first = min(p.padding_w, tiling.packed_columns);
    const int64_t last = first + min(p.in_w, tiling.packed_columns - first);
    for (int64_t r = from_row; r < to_row; ++r, to += row_floats) {
      const int64_t h = x_begin + r;
      if (h < 0 || h >= p.in_h || first == last) {
        std::memset(to, 0, size_t(row_floats) * sizeof(float));
        continue;
      }
      std::memset(to, 0, size_t(first * block_channels) * sizeof(float));
      std::memset(to + last * block_channels, 0,
                  size_t((tiling.packed_columns - last) * block_channels) * sizeof(float));
      const T* from = image + h * p.x_stride[2];
      load_pixels(from, channels, last - first, channel, column, to + first * block_channels,
                  memory + tiling.staging_at);
    }
  }

  // Some columns of a row of the output, `x` being the row of packed X that its first tap row reads, and w and y those
  // of the tile's first column.
  void apply_row(const ApplyParams& params, const Tile& tile, const float* x, const float* w, float* y,
                 int64_t pixel) const {
    if (p.border == Border::zeros)
      return apply(params, x + tile.column * p.stride_w * block_channels, w, tile.columns, y, pixel);
    Base::for_each_run(tile, [&](const WindowRun& run) {
      const int64_t column = run.column - tile.column;
      const float* from = x + run.first * block_channels;
      float* to = y + column * pixel;
      if (run.slope == 0) return apply_shared(params, from, w + column, run.step, run.count, to, run.step * pixel);
      if (run.slope == p.stride_w) return apply(params, from, w + column, run.count, to, pixel);
      ApplyParams other = params;
      other.column = run.slope * block_channels;
      cpu::apply<0, 0>(other, from, w + column, run.count, to, pixel);
    });
  }

  void apply_tile(const Tile& tile, int64_t g, int64_t block) const {
    const int64_t channels = channels_of(block), first = first_channel(g, block);
    const Epilogue epilogue = span.epilogue ? epilogue_of(first, channels) : Epilogue{};
    ApplyParams params = window;
    if (span.epilogue) params.scale = epilogue.scale, params.shift = epilogue.shift;
    const float* packed = memory + block * block_floats();
    const float* weights = memory + tiling.weights_at;
    float* result = memory + tiling.result_at;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t row = tile.row + r;
      const float* x = packed + (row_axis.first(row) - x_begin) * tiling.packed_columns * block_channels;
      T* y = static_cast<T*>(tiling.buffers.y) + n * p.y_stride[0] + first * p.y_stride[1] + row * p.y_stride[2] +
             tile.column * p.y_stride[3];
      const float* w = weights + r * tile.columns;
      if constexpr (is_float<T>) {
        if (p.y_stride[1] == 1 && channels == block_channels) {
          apply_row(params, tile, x, w, y, p.y_stride[3]);
          continue;
        }
      }
      apply_row(params, tile, x, w, result, block_channels);
      store_pixels(result, channels, tile.columns, y, p.y_stride[1], p.y_stride[3], memory + tiling.staging_at);
    }
  }

  void pack_reduced(const Tile& tile, float* to) const {
    const T* from = static_cast<const T*>(tiling.buffers.reduced) + n * span.reduced_stride[0] +
                    tile.row * span.reduced_stride[2] + tile.column * span.reduced_stride[3];
    pack_pixels(from, span.reduced_stride, span.reduced, tile.rows, tile.columns, to, memory + tiling.staging_at);
  }

  void start_group(int64_t g) { rows = span_rows<T>(span, tiling.buffers, g, memory + tiling.span_at, &pitch); }

  void compute_weights(const Tile& tile, const float* reduced) const {
    multiply({rows, pitch, 1}, p.taps(), {reduced, V::lanes * span.reduced, V::lanes},
             (tile.pixels() + V::lanes - 1) / V::lanes, span.reduced, memory + tiling.bias_at,
             memory + tiling.weights_at, tile_pixels);
  }

  void load_weights(const Tile& tile, int64_t g) const {
    cpu::load_weights(weights_of<T>(p, tiling.w, n, g, tile.row, tile.column), p, tile.rows, tile.columns,
                      memory + tiling.weights_at, memory + tiling.staging_at);
  }

  // A slice of R at a tile, in the order of pack_pixels. The rows of the product are pixels, broadcast from where they
  // lie; its vectors run along r.
  void reduce(const Tile& tile, int64_t slice, float* to) const {
    const int64_t first = slice * tiling.slice_vectors * V::lanes;
    const int64_t count = min(tiling.slice_vectors * V::lanes, span.reduced - first);
    const int64_t vectors = (count + V::lanes - 1) / V::lanes, pitch = vectors * V::lanes, pixels = tile.pixels();
    float* weights = memory + tiling.reduce_at;
    if (count < pitch) std::memset(weights, 0, size_t(p.channels * pitch) * sizeof(float));
    transpose_into(static_cast<const T*>(tiling.buffers.reduce) + first * span.reduce_stride[0], span.reduce_stride[0],
                   count, span.reduce_stride[1], p.channels, weights, pitch, memory + tiling.staging_at);

    MatrixA pixels_of_x{memory + tiling.pooled_at, p.channels, 1};
    bool in_place = false;
    if constexpr (is_float<T>) {
      in_place = p.stride_h == 1 && p.stride_w == 1 && p.x_stride[1] == 1 &&
                 (tile.rows == 1 || p.x_stride[2] == tile.columns * p.x_stride[3]);
      if (in_place)
        pixels_of_x = {static_cast<const float*>(tiling.buffers.x) + n * p.x_stride[0] + tile.row * p.x_stride[2] +
                           tile.column * p.x_stride[3],
                       p.x_stride[3], 1};
    }
    if (!in_place) pool(tile, memory + tiling.pooled_at);
    float* dense = memory + tiling.dense_at;
    const float zeros[tile_pixels] = {};
    multiply(pixels_of_x, pixels, {weights, V::lanes, pitch}, vectors, p.channels, zeros, dense, pitch);

    const T* bias = static_cast<const T*>(tiling.buffers.reduce_bias);
    for (int64_t at = 0; at < pixels; at += V::lanes) {
      float* vector = to + (at * span.reduced + first * V::lanes);
      // Lanes past the last pixel hold anything: their results are never stored.
      transpose(dense + at * pitch, pitch, V::lanes, count, vector, V::lanes);
      for (int64_t r = 0; r < count; ++r) {
        V sum = V::load(vector + r * V::lanes);
        sum.value = sum.value + (bias == nullptr ? 0.0f : load(bias[first + r]));
        sum.value = sum.value < 0 ? typename V::Lanes{} : sum.value;
        sum.store(vector + r * V::lanes);
      }
    }
  }
};

void channels_task(const ChannelsTiling& tiling, bool reduce, int64_t task, void* scratch) {
  dispatch(tiling.problem.involution.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (is_float<Accumulator<T>>) run_strip_task<ChannelsRun<T>>(tiling, reduce, task, scratch);
  });
}

}  // namespace
}  // namespace pyinvolution::cpu
