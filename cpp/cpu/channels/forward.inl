// The inner loops of the forward passes of `channels` and `fused`, and of whole layers; see tiling.h. Compiled for each
// instruction set by instances/kernels.inl.
#include <cstdint>
#include <cstring>

#include "cpu/channels/packing.h"
#include "cpu/channels/tiling.h"
#include "cpu/simd/dtype.h"
#include "cpu/simd/gemm.h"
#include "cpu/simd/prefetch.h"

namespace pyinvolution::cpu {
namespace {

constexpr int block_vectors = block_channels / V::lanes;

// How many neighbouring pixels `apply` works on: its registers hold max_columns x block_vectors accumulators,
// block_vectors of x and one weight. The instance file says how many.
constexpr int max_columns = APPLY_COLUMNS;

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

// A block of channels at Columns neighbouring pixels. Not inlined: GCC then keeps some of the sums in memory. Stride is that of a window without dilation, or 0: any window; and
// Width its width, or 0.
template <int Columns, int Stride, int Width>
[[gnu::noinline]] void apply_block(const ApplyParams& params, const float* x, const float* w, float* y, int64_t pixel) {
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

using Apply = void (*)(const ApplyParams&, const float* x, const float* w, int64_t columns, float* y, int64_t pixel);

Apply apply_for(const Problem& p) {
  if (p.dilation_w != 1) return apply<0, 0>;
  if (p.stride_w == 1) {
    switch (p.kernel_w) {
      case 3: return apply<1, 3>;
      case 5: return apply<1, 5>;
      case 7: return apply<1, 7>;
      default: return apply<1, 0>;
    }
  } else if (p.stride_w == 2) {
    switch (p.kernel_w) {
      case 3: return apply<2, 3>;
      case 5: return apply<2, 5>;
      case 7: return apply<2, 7>;
      default: return apply<2, 0>;
    }
  }
  return apply<0, 0>;
}

// --- a task ----------------------------------------------------------------------------------------------------------

// Consecutive pixels of some rows of the strip: pixel i is at row + i / columns, column + i % columns.
struct Tile {
  int64_t row, rows, column, columns;
  int64_t pixels() const { return rows * columns; }
};

template <class T>
struct ChannelsRun {
  const ChannelsTiling& tiling;
  const SpanProblem& span;
  const Problem& p;
  int64_t n, begin, end;        // rows of the strip
  int64_t first_group, groups;  // of the chunk, up to `groups`
  float* memory;

  ChannelsRun(const ChannelsTiling& channels, int64_t n_and_strip, int64_t chunk, void* scratch)
      : tiling(channels), span(channels.problem), p(channels.problem.involution), memory(static_cast<float*>(scratch)) {
    begin = n_and_strip % tiling.strips * tiling.height;
    end = min(begin + tiling.height, p.out_h);
    n = n_and_strip / tiling.strips;
    first_group = p.groups * chunk / tiling.chunks;
    groups = p.groups * (chunk + 1) / tiling.chunks;
  }

  template <class Body>
  void for_each_tile(const Body& body) const {
    int64_t index = 0;
    for (int64_t row = begin; row < end; row += tiling.tile_rows)
      for (int64_t column = 0; column < p.out_w; column += tiling.tile_columns)
        body(Tile{row, min(tiling.tile_rows, end - row), column, min(tiling.tile_columns, p.out_w - column)}, index++);
  }

  int64_t block_floats() const { return tiling.packed_rows * tiling.packed_columns * block_channels; }
  int64_t channels_of(int64_t block) const { return min(block_channels, p.group_channels() - block * block_channels); }

  // The rows of X that the strip reads, a block of channels of group g.
  void pack_input(int64_t g, int64_t block, float* to) const {
    const int64_t channels = channels_of(block), row_floats = tiling.packed_columns * block_channels;
    const int64_t channel = p.x_stride[1], column = p.x_stride[3];
    const T* image = static_cast<const T*>(tiling.buffers.x) + n * p.x_stride[0] +
                     (g * p.group_channels() + block * block_channels) * channel;
    const int64_t first = min(p.padding_w, tiling.packed_columns);
    const int64_t last = first + min(p.in_w, tiling.packed_columns - first);
    const int64_t rows = (end - begin - 1) * p.stride_h + p.dilation_h * (p.kernel_h - 1) + 1;
    for (int64_t r = 0; r < rows; ++r, to += row_floats) {
      const int64_t h = begin * p.stride_h - p.padding_h + r;
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

  void apply_tile(const Tile& tile, int64_t g, int64_t block, const Apply apply, ApplyParams params) const {
    const int64_t channels = channels_of(block), first = g * p.group_channels() + block * block_channels;
    float epilogue[2 * block_channels] = {};
    if (span.epilogue) {
      for (int64_t c = 0; c < channels; ++c) {
        epilogue[c] = static_cast<const float*>(tiling.buffers.scale)[first + c];
        epilogue[block_channels + c] = static_cast<const float*>(tiling.buffers.shift)[first + c];
      }
      params.scale = epilogue;
      params.shift = epilogue + block_channels;
    }
    const float* packed = memory + block * block_floats();
    const float* weights = memory + tiling.weights_at;
    float* result = memory + tiling.result_at;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t row = tile.row + r;
      const float* x =
          packed + ((row - begin) * p.stride_h * tiling.packed_columns + tile.column * p.stride_w) * block_channels;
      T* y = static_cast<T*>(tiling.buffers.y) + n * p.y_stride[0] + first * p.y_stride[1] + row * p.y_stride[2] +
             tile.column * p.y_stride[3];
      const float* w = weights + r * tile.columns;
      if constexpr (is_float<T>) {
        if (p.y_stride[1] == 1 && channels == block_channels) {
          apply(params, x, w, tile.columns, y, p.y_stride[3]);
          continue;
        }
      }
      apply(params, x, w, tile.columns, result, block_channels);
      store_pixels(result, channels, tile.columns, y, p.y_stride[1], p.y_stride[3], memory + tiling.staging_at);
    }
  }

  // --- the reduction of a layer

  // Means of X over the cells of a tile as [pixel][c].
  void pool(const Tile& tile, float* to) const {
    const int64_t channel = p.x_stride[1], column = p.x_stride[3];
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t h = (tile.row + r) * p.stride_h, high = min(p.stride_h, p.in_h - h);
      const T* row = static_cast<const T*>(tiling.buffers.x) + n * p.x_stride[0] + h * p.x_stride[2];
      if (channel != 1 && column == 1 && p.stride_h == 1 && p.stride_w == 1) {
        transpose_into(row + tile.column, channel, p.channels, column, tile.columns, to, p.channels,
                       memory + tiling.staging_at);
        to += tile.columns * p.channels;
        continue;
      }
      for (int64_t v = 0; v < tile.columns; ++v, to += p.channels) {
        const int64_t q = (tile.column + v) * p.stride_w, wide = min(p.stride_w, p.in_w - q);
        const T* from = row + q * column;
        if (channel == 1) {
          for (int64_t c = 0; c < p.channels; ++c) to[c] = load(from[c]);
          for (int64_t i = 1; i < high * wide; ++i) {
            const T* other = from + i / wide * p.x_stride[2] + i % wide * column;
            for (int64_t c = 0; c < p.channels; ++c) to[c] += load(other[c]);
          }
        } else {
          for (int64_t c = 0; c < p.channels; ++c, from += channel) {
            float sum = 0;
            for (int64_t i = 0; i < high; ++i)
              for (int64_t j = 0; j < wide; ++j) sum += load(from[i * p.x_stride[2] + j * column]);
            to[c] = sum;
          }
        }
        if (high * wide > 1)
          for (int64_t c = 0; c < p.channels; ++c) to[c] /= float(high * wide);
      }
    }
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

  int64_t tile_index(int64_t index) const { return (n * tiling.strips + begin / tiling.height) * tiling.tiles + index; }

  void reduce_shared(int64_t wanted, int64_t slice) const {
    for_each_tile([&](const Tile& tile, int64_t index) {
      if (index == wanted) reduce(tile, slice, tiling.shared + tile_index(index) * tiling.tile_floats);
    });
  }

  void forward() const {
    const bool fused = span.reduced > 0;
    const float* reduced = memory + tiling.reduced_at;
    if (tiling.shared != nullptr) {
      reduced = tiling.shared + tile_index(0) * tiling.tile_floats;
    } else if (fused) {
      for_each_tile([&](const Tile& tile, int64_t index) {
        float* to = memory + tiling.reduced_at + index * tiling.tile_floats;
        if (tiling.layer) {
          for (int64_t slice = 0; slice < tiling.slices; ++slice) reduce(tile, slice, to);
          return;
        }
        const T* from = static_cast<const T*>(tiling.buffers.reduced) + n * span.reduced_stride[0] +
                        tile.row * span.reduced_stride[2] + tile.column * span.reduced_stride[3];
        pack_pixels(from, span.reduced_stride, span.reduced, tile.rows, tile.columns, to, memory + tiling.staging_at);
      });
    }
    const Apply apply = apply_for(p);
    const ApplyParams params{p.kernel_h,
                             p.kernel_w,
                             p.dilation_h * tiling.packed_columns * block_channels,
                             p.dilation_w * block_channels,
                             p.stride_w * block_channels,
                             nullptr,
                             nullptr,
                             span.relu};
    for (int64_t g = first_group; g < groups; ++g) {
      for (int64_t block = 0; block < tiling.blocks; ++block) pack_input(g, block, memory + block * block_floats());
      int64_t pitch = 0;
      const float* rows = nullptr;
      if (fused) {
        rows = span_rows<T>(span, tiling.buffers, g, memory + tiling.span_at, &pitch);
        load_bias<T>(span, tiling.buffers, g, memory + tiling.bias_at);
        // The parameters of a network do not stay in the cache from one inference to the next.
        if (g + 1 < groups && span.span_stride[1] == 1)
          prefetch_runs(span_row<T>(span, tiling.buffers, (g + 1) * p.taps()), p.taps(), span.span_stride[0],
                        span.reduced);
      }
      for_each_tile([&](const Tile& tile, int64_t index) {
        float* weights = memory + tiling.weights_at;
        if (fused)
          multiply(
              {rows, pitch, 1}, p.taps(), {reduced + index * tiling.tile_floats, V::lanes * span.reduced, V::lanes},
              (tile.pixels() + V::lanes - 1) / V::lanes, span.reduced, memory + tiling.bias_at, weights, tile_pixels);
        else
          load_weights(weights_of<T>(p, tiling.w, n, g, tile.row, tile.column), p, tile.rows, tile.columns, weights,
                       memory + tiling.staging_at);
        for (int64_t block = 0; block < tiling.blocks; ++block) apply_tile(tile, g, block, apply, params);
      });
    }
  }
};

template <class T>
void run_channels_task(const ChannelsTiling& tiling, bool reduce, int64_t task, void* scratch) {
  const int64_t units = reduce ? tiling.tiles * tiling.slices : tiling.chunks;
  const ChannelsRun<T> run(tiling, task / units, reduce ? 0 : task % units, scratch);
  if (reduce)
    run.reduce_shared(task % units / tiling.slices, task % tiling.slices);
  else
    run.forward();
}

void channels_task(const ChannelsTiling& tiling, bool reduce, int64_t task, void* scratch) {
  dispatch(tiling.problem.involution.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (is_float<Accumulator<T>>) run_channels_task<T>(tiling, reduce, task, scratch);
  });
}

}  // namespace
}  // namespace pyinvolution::cpu
