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

  ChannelsRun(const Channels& channels, int64_t task, void* scratch)
      : plan(channels), span(channels.problem), p(channels.problem.involution), memory(static_cast<float*>(scratch)) {
    const int64_t chunk = task % plan.chunks;
    begin = task / plan.chunks % plan.strips * plan.height;
    end = least(begin + plan.height, p.out_h);
    n = task / plan.chunks / plan.strips;
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

  // W of group g at the pixels of a tile, from memory, as [tap][pixel].
  void load_weights(int64_t g, const Tile& tile, float* to) const {
    const T* from = static_cast<const T*>(plan.w) + n * p.w_stride[0] + g * p.w_stride[1] + tile.row * p.w_stride[4] +
                    tile.column * p.w_stride[5];
    const int64_t pixel = p.w_stride[5];
    const bool one_run = tile.rows == 1 || p.w_stride[4] == tile.columns * pixel;
    const int64_t runs = one_run ? 1 : tile.rows, run = tile.pixels() / runs;
    const bool taps_together = p.w_stride[3] == 1 && p.w_stride[2] == p.kernel_w;
    for (int64_t r = 0; r < runs; ++r) {
      const T* source = from + r * p.w_stride[4];
      float* target = to + r * run;
      if (pixel != 1 && taps_together) {
        exchange(source, pixel, run, 1, p.taps(), target, tile_pixels, memory + plan.staging_at);
      } else {
        for (int64_t i = 0; i < p.kernel_h; ++i)
          for (int64_t j = 0; j < p.kernel_w; ++j, target += tile_pixels) {
            const T* tap = source + i * p.w_stride[2] + j * p.w_stride[3];
            if (pixel == 1) {
              for (int64_t v = 0; v < run; ++v) target[v] = load(tap[v]);
            } else {
              for (int64_t v = 0; v < run; ++v) target[v] = load(tap[v * pixel]);
            }
          }
      }
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

  void forward() const {
    const bool fused = span.reduced > 0;
    const int64_t tile_floats = plan.vectors * V::lanes * span.reduced;
    if (fused)
      for_each_tile([&](const Tile& tile, int64_t index) {
        const T* from = static_cast<const T*>(plan.buffers.reduced) + n * span.reduced_stride[0] +
                        tile.row * span.reduced_stride[2] + tile.column * span.reduced_stride[3];
        pack_pixels(from, span.reduced_stride, span.reduced, tile.rows, tile.columns,
                    memory + plan.reduced_at + index * tile_floats, memory + plan.staging_at);
      });
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
      }
      for_each_tile([&](const Tile& tile, int64_t index) {
        float* weights = memory + plan.weights_at;
        if (fused)
          multiply({rows, pitch, 1}, p.taps(),
                   {memory + plan.reduced_at + index * tile_floats, V::lanes * span.reduced, V::lanes},
                   (tile.pixels() + V::lanes - 1) / V::lanes, span.reduced, memory + plan.bias_at, weights,
                   tile_pixels);
        else
          load_weights(g, tile, weights);
        for (int64_t block = 0; block < plan.blocks; ++block) apply_tile(tile, g, block, apply, window);
      });
    }
  }
};

}  // namespace

void CHANNELS_TASK(const Channels& plan, int64_t task, void* scratch) {
  switch (plan.problem.involution.dtype) {
    case DType::f32: return ChannelsRun<float>(plan, task, scratch).forward();
    case DType::f16: return ChannelsRun<Half>(plan, task, scratch).forward();
    case DType::bf16: return ChannelsRun<BFloat16>(plan, task, scratch).forward();
    case DType::f64: return;
  }
}

}  // namespace pyinvolution::cpu
