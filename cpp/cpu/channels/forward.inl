// The inner loops of the `channels` and `fused` variants; see cpu_channels.h. The including file sets VECTOR_BYTES, its
// own compiler flags, and the name of the one function with external linkage, CHANNELS_TASK. All else stays in the
// anonymous namespace, and no template of the standard library is used.
#include <cstdint>
#include <cstring>

#include "cpu_channels.h"
#include "cpu_pieces.h"
#include "storage.h"

namespace pyinvolution::cpu {
namespace {

// What `apply` needs besides addresses.
struct Window {
  int64_t kernel_h, kernel_w;
  int64_t tap_row, tap_column, column;  // floats of packed X from a tap row, tap column, output column to the next
  const float* scale;                   // nullptr: none
  const float* shift;
  bool relu;
};

// A block of channels at Columns neighbouring pixels. Stride and Width, where not 0, are those of a window without
// dilation.
template <int Columns, int Stride, int Width>
void apply_block(const Window& window, const float* x, const float* w, float* y, int64_t pixel) {
  V sum[Columns][block_vectors];
#pragma GCC unroll 8
  for (int c = 0; c < Columns; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < block_vectors; ++v) sum[c][v] = V::zero();
  const int64_t width = Width > 0 ? Width : window.kernel_w;
  for (int64_t i = 0; i < window.kernel_h; ++i) {
    if constexpr (Width > 0) {
#pragma GCC unroll 32
      for (int q = 0; q < Stride * (Columns - 1) + Width; ++q) {
        V at[block_vectors];
#pragma GCC unroll 4
        for (int v = 0; v < block_vectors; ++v) at[v] = V::load(x + q * block_channels + v * V::lanes);
#pragma GCC unroll 8
        for (int c = 0; c < Columns; ++c) {
          const int j = q - Stride * c;
          if (j < 0 || j >= Width) continue;
          const float weight = w[j * tile_pixels + c];
#pragma GCC unroll 4
          for (int v = 0; v < block_vectors; ++v) sum[c][v].add_product(at[v], weight);
        }
      }
    } else {
      for (int64_t j = 0; j < width; ++j)
#pragma GCC unroll 8
        for (int c = 0; c < Columns; ++c) {
          const float* at = x + j * window.tap_column + c * window.column;
          const float weight = w[j * tile_pixels + c];
#pragma GCC unroll 4
          for (int v = 0; v < block_vectors; ++v) sum[c][v].add_product(V::load(at + v * V::lanes), weight);
        }
    }
    x += window.tap_row;
    w += width * tile_pixels;
  }
  if (window.scale != nullptr) {
    for (int v = 0; v < block_vectors; ++v) {
      const V scale = V::load(window.scale + v * V::lanes), shift = V::load(window.shift + v * V::lanes);
#pragma GCC unroll 8
      for (int c = 0; c < Columns; ++c) sum[c][v].value = sum[c][v].value * scale.value + shift.value;
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < Columns; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < block_vectors; ++v) {
      // A NaN stays one.
      if (window.relu) sum[c][v].value = sum[c][v].value < 0 ? typename V::Lanes{} : sum[c][v].value;
      sum[c][v].store(y + c * pixel + v * V::lanes);
    }
}

// `columns` neighbouring pixels of a row.
template <int Stride, int Width>
void apply(const Window& window, const float* x, const float* w, int64_t columns, float* y, int64_t pixel) {
  const int64_t count = (columns + most_columns - 1) / most_columns;
  for (int64_t b = 0; b < count; ++b) {
    const int64_t first = columns * b / count;
    with_count<most_columns>(columns * (b + 1) / count - first, [&](auto n) {
      apply_block<decltype(n)::value, Stride, Width>(window, x + first * window.column, w + first, y + first * pixel,
                                                     pixel);
    });
  }
}

using Apply = void (*)(const Window&, const float* x, const float* w, int64_t columns, float* y, int64_t pixel);

Apply apply_for(const Problem& p) {
  if (p.dilation_w != 1) return apply<0, 0>;
  if (p.stride_w == 1) {
    switch (p.kernel_w) {
      case 3: return apply<1, 3>;
      case 5: return apply<1, 5>;
      case 7: return apply<1, 7>;
      default: break;
    }
  } else if (p.stride_w == 2) {
    switch (p.kernel_w) {
      case 3: return apply<2, 3>;
      case 5: return apply<2, 5>;
      case 7: return apply<2, 7>;
      default: break;
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
  const Channels& plan;
  const SpanProblem& span;
  const Problem& p;
  int64_t n, begin, end;        // rows of the strip
  int64_t first_group, groups;  // of the chunk, up to `groups`
  float* memory;

  ChannelsRun(const Channels& channels, int64_t n_and_strip, int64_t chunk, void* scratch)
      : plan(channels), span(channels.problem), p(channels.problem.involution), memory(static_cast<float*>(scratch)) {
    begin = n_and_strip % plan.strips * plan.height;
    end = least(begin + plan.height, p.out_h);
    n = n_and_strip / plan.strips;
    first_group = p.groups * chunk / plan.chunks;
    groups = p.groups * (chunk + 1) / plan.chunks;
  }

  template <class Body>
  void for_each_tile(const Body& body) const {
    int64_t index = 0;
    for (int64_t row = begin; row < end; row += plan.tile_rows)
      for (int64_t column = 0; column < p.out_w; column += plan.tile_columns)
        body(Tile{row, least(plan.tile_rows, end - row), column, least(plan.tile_columns, p.out_w - column)}, index++);
  }

  int64_t block_floats() const { return plan.packed_rows * plan.packed_columns * block_channels; }
  int64_t channels_of(int64_t block) const {
    return least(block_channels, p.group_channels() - block * block_channels);
  }

  // The rows of X that the strip reads, a block of channels of group g.
  void pack_input(int64_t g, int64_t block, float* to) const {
    const int64_t channels = channels_of(block), row_floats = plan.packed_columns * block_channels;
    const int64_t channel = p.x_stride[1], column = p.x_stride[3];
    const T* image = static_cast<const T*>(plan.buffers.x) + n * p.x_stride[0] +
                     (g * p.group_channels() + block * block_channels) * channel;
    const int64_t first = least(p.padding_w, plan.packed_columns);
    const int64_t last = first + least(p.in_w, plan.packed_columns - first);
    const int64_t rows = (end - begin - 1) * p.stride_h + p.dilation_h * (p.kernel_h - 1) + 1;
    for (int64_t r = 0; r < rows; ++r, to += row_floats) {
      const int64_t h = begin * p.stride_h - p.padding_h + r;
      if (h < 0 || h >= p.in_h || first == last) {
        std::memset(to, 0, size_t(row_floats) * sizeof(float));
        continue;
      }
      std::memset(to, 0, size_t(first * block_channels) * sizeof(float));
      std::memset(to + last * block_channels, 0, size_t((plan.packed_columns - last) * block_channels) * sizeof(float));
      const T* from = image + h * p.x_stride[2];
      load_pixels(from, channels, last - first, channel, column, to + first * block_channels, memory + plan.staging_at);
    }
  }

  void apply_tile(const Tile& tile, int64_t g, int64_t block, const Apply apply, Window window) const {
    const int64_t channels = channels_of(block), first = g * p.group_channels() + block * block_channels;
    float epilogue[2 * block_channels] = {};
    if (span.epilogue) {
      for (int64_t c = 0; c < channels; ++c) {
        epilogue[c] = static_cast<const float*>(plan.buffers.scale)[first + c];
        epilogue[block_channels + c] = static_cast<const float*>(plan.buffers.shift)[first + c];
      }
      window.scale = epilogue;
      window.shift = epilogue + block_channels;
    }
    const float* packed = memory + block * block_floats();
    const float* weights = memory + plan.weights_at;
    float* result = memory + plan.result_at;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t row = tile.row + r;
      const float* x =
          packed + ((row - begin) * p.stride_h * plan.packed_columns + tile.column * p.stride_w) * block_channels;
      T* y = static_cast<T*>(plan.buffers.y) + n * p.y_stride[0] + first * p.y_stride[1] + row * p.y_stride[2] +
             tile.column * p.y_stride[3];
      const float* w = weights + r * tile.columns;
      if constexpr (Same<T>::as_float) {
        if (p.y_stride[1] == 1 && channels == block_channels) {
          apply(window, x, w, tile.columns, y, p.y_stride[3]);
          continue;
        }
      }
      apply(window, x, w, tile.columns, result, block_channels);
      store_pixels(result, channels, tile.columns, y, p.y_stride[1], p.y_stride[3], memory + plan.staging_at);
    }
  }

  // --- the reduction of a layer

  // Means of X over the cells of a tile as [pixel][c].
  void pool(const Tile& tile, float* to) const {
    const int64_t channel = p.x_stride[1], column = p.x_stride[3];
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t h = (tile.row + r) * p.stride_h, high = least(p.stride_h, p.in_h - h);
      const T* row = static_cast<const T*>(plan.buffers.x) + n * p.x_stride[0] + h * p.x_stride[2];
      if (channel != 1 && column == 1 && p.stride_h == 1 && p.stride_w == 1) {
        exchange(row + tile.column, channel, p.channels, column, tile.columns, to, p.channels,
                 memory + plan.staging_at);
        to += tile.columns * p.channels;
        continue;
      }
      for (int64_t v = 0; v < tile.columns; ++v, to += p.channels) {
        const int64_t q = (tile.column + v) * p.stride_w, wide = least(p.stride_w, p.in_w - q);
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

  // A slice of R at a tile, as pack_pixels has it. A product's rows are pixels, broadcast from where they lie, its
  // vectors run along r.
  void reduce(const Tile& tile, int64_t slice, float* to) const {
    const int64_t first = slice * plan.slice_vectors * V::lanes;
    const int64_t count = least(plan.slice_vectors * V::lanes, span.reduced - first);
    const int64_t vectors = (count + V::lanes - 1) / V::lanes, pitch = vectors * V::lanes, pixels = tile.pixels();
    float* weights = memory + plan.reduce_at;
    if (count < pitch) std::memset(weights, 0, size_t(p.channels * pitch) * sizeof(float));
    exchange(static_cast<const T*>(plan.buffers.reduce) + first * span.reduce_stride[0], span.reduce_stride[0], count,
             span.reduce_stride[1], p.channels, weights, pitch, memory + plan.staging_at);

    Left left{memory + plan.pooled_at, p.channels, 1};
    bool in_place = false;
    if constexpr (Same<T>::as_float) {
      in_place = p.stride_h == 1 && p.stride_w == 1 && p.x_stride[1] == 1 &&
                 (tile.rows == 1 || p.x_stride[2] == tile.columns * p.x_stride[3]);
      if (in_place)
        left = {static_cast<const float*>(plan.buffers.x) + n * p.x_stride[0] + tile.row * p.x_stride[2] +
                    tile.column * p.x_stride[3],
                p.x_stride[3], 1};
    }
    if (!in_place) pool(tile, memory + plan.pooled_at);
    float* dense = memory + plan.dense_at;
    const float zeros[tile_pixels] = {};
    multiply(left, pixels, {weights, V::lanes, pitch}, vectors, p.channels, zeros, dense, pitch);

    const T* bias = static_cast<const T*>(plan.buffers.reduce_bias);
    for (int64_t at = 0; at < pixels; at += V::lanes) {
      float* vector = to + (at * span.reduced + first * V::lanes);
      // The last lanes of a tile are as good as any: what they give is never stored.
      transpose(dense + at * pitch, pitch, V::lanes, count, vector, V::lanes);
      for (int64_t r = 0; r < count; ++r) {
        V sum = V::load(vector + r * V::lanes);
        sum.value = sum.value + (bias == nullptr ? 0.0f : load(bias[first + r]));
        sum.value = sum.value < 0 ? typename V::Lanes{} : sum.value;
        sum.store(vector + r * V::lanes);
      }
    }
  }

  int64_t tile_index(int64_t index) const { return (n * plan.strips + begin / plan.height) * plan.tiles + index; }

  void reduce_shared(int64_t wanted, int64_t slice) const {
    for_each_tile([&](const Tile& tile, int64_t index) {
      if (index == wanted) reduce(tile, slice, plan.shared + tile_index(index) * plan.tile_floats());
    });
  }

  void forward() const {
    const bool fused = span.reduced > 0;
    const float* reduced = memory + plan.reduced_at;
    if (plan.shared != nullptr) {
      reduced = plan.shared + tile_index(0) * plan.tile_floats();
    } else if (fused) {
      for_each_tile([&](const Tile& tile, int64_t index) {
        float* to = memory + plan.reduced_at + index * plan.tile_floats();
        if (plan.layer) {
          for (int64_t slice = 0; slice < plan.slices; ++slice) reduce(tile, slice, to);
          return;
        }
        const T* from = static_cast<const T*>(plan.buffers.reduced) + n * span.reduced_stride[0] +
                        tile.row * span.reduced_stride[2] + tile.column * span.reduced_stride[3];
        pack_pixels(from, span.reduced_stride, span.reduced, tile.rows, tile.columns, to, memory + plan.staging_at);
      });
    }
    const Apply apply = apply_for(p);
    const Window window{p.kernel_h,
                        p.kernel_w,
                        p.dilation_h * plan.packed_columns * block_channels,
                        p.dilation_w * block_channels,
                        p.stride_w * block_channels,
                        nullptr,
                        nullptr,
                        span.relu};
    for (int64_t g = first_group; g < groups; ++g) {
      for (int64_t block = 0; block < plan.blocks; ++block) pack_input(g, block, memory + block * block_floats());
      int64_t pitch = 0;
      const float* rows = nullptr;
      if (fused) {
        rows = span_rows<T>(span, plan.buffers, g, memory + plan.span_at, &pitch);
        load_bias<T>(span, plan.buffers, g, memory + plan.bias_at);
        // The parameters of a network do not stay in the cache from one inference to the next.
        if (g + 1 < groups && span.span_stride[1] == 1)
          prefetch_runs(span_row<T>(span, plan.buffers, (g + 1) * p.taps()), p.taps(), span.span_stride[0],
                        span.reduced);
      }
      for_each_tile([&](const Tile& tile, int64_t index) {
        float* weights = memory + plan.weights_at;
        if (fused)
          multiply(
              {rows, pitch, 1}, p.taps(), {reduced + index * plan.tile_floats(), V::lanes * span.reduced, V::lanes},
              (tile.pixels() + V::lanes - 1) / V::lanes, span.reduced, memory + plan.bias_at, weights, tile_pixels);
        else
          load_weights(weights_of<T>(p, plan.w, n, g, tile.row, tile.column), p, tile.rows, tile.columns, weights,
                       memory + plan.staging_at);
        for (int64_t block = 0; block < plan.blocks; ++block) apply_tile(tile, g, block, apply, window);
      });
    }
  }
};

template <class T>
void channels_task(const Channels& plan, bool reduce, int64_t task, void* scratch) {
  const int64_t units = reduce ? plan.tiles * plan.slices : plan.chunks;
  const ChannelsRun<T> run(plan, task / units, reduce ? 0 : task % units, scratch);
  if (reduce)
    run.reduce_shared(task % units / plan.slices, task % plan.slices);
  else
    run.forward();
}

}  // namespace

void CHANNELS_TASK(const Channels& plan, bool reduce, int64_t task, void* scratch) {
  switch (plan.problem.involution.dtype) {
    case DType::f32: return channels_task<float>(plan, reduce, task, scratch);
    case DType::f16: return channels_task<Half>(plan, reduce, task, scratch);
    case DType::bf16: return channels_task<BFloat16>(plan, reduce, task, scratch);
    case DType::f64: return;
  }
}

}  // namespace pyinvolution::cpu
