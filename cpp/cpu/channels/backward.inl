// The inner loops of the backward passes of `fused` and `channels`; see tiling.h. Included after forward.inl by
// instances/kernels.inl.
#include <cstdint>
#include <cstring>

#include "cpu/channels/backward_strip.h"
#include "cpu/channels/packing.h"
#include "cpu/channels/packing_products.h"
#include "cpu/channels/tiling.h"
#include "cpu/simd/dtype.h"
#include "cpu/simd/gemm.h"

namespace pyinvolution::cpu {
namespace {

// How many taps of a row of `width` serve the columns of a phase.
constexpr int64_t phase_taps(int64_t width, int64_t stride, int64_t phase) {
  return (width - phase + stride - 1) / stride;
}

// grad_X at Columns neighbouring columns q = Stride m + Phase - padding of a row, from a row of taps:
//
//   gx[m] += sum over t of  w[Phase + Stride t][m - t] * gy[m - t]
//
// w and gy are zero where m - t is outside the row. This is a row of a forward pass with its taps in reverse.
template <int Columns, int Stride, int Width, int Phase>
PYINVOLUTION_APART void gather_block(int64_t width, const float* w, const float* gy, float* gx) {
  constexpr int tap = 1 - Stride * tile_pixels;
  const int64_t taps = phase_taps(width, Stride, Phase);
  V sum[Columns][block_vectors];
#pragma GCC unroll 16
  for (int c = 0; c < Columns; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < block_vectors; ++v) sum[c][v] = V::load(gx + c * Stride * block_channels + v * V::lanes);
  w += Phase * tile_pixels - (taps - 1) * tap;
  gy -= (taps - 1) * block_channels;
  if constexpr (Width > 0)
    add_row<Columns, 1, phase_taps(Width, Stride, Phase), tap>(sum, gy, w);
  else
    add_long_row<Columns, 1, tap>(sum, taps, gy, w);
#pragma GCC unroll 16
  for (int c = 0; c < Columns; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < block_vectors; ++v) sum[c][v].store(gx + c * Stride * block_channels + v * V::lanes);
}

// All columns of a phase that the pixels [0, pixels) of a tile reach, of which the first is column `first` of the
// output. gx is the row of X; w and gy are at the tile's first pixel.
template <int Stride, int Width, int Phase>
void gather_phase(const Problem& p, const float* w, const float* gy, int64_t first, int64_t pixels, float* gx) {
  const int64_t width = Width > 0 ? Width : p.kernel_w, taps = phase_taps(width, Stride, Phase);
  if (taps > 0) {
    // m from the first pixel to the last one at its last tap, as far as the column is inside.
    int64_t begin = first, end = first + pixels - 1 + taps;
    const int64_t left = (p.padding_w - Phase + Stride - 1) / Stride;
    const int64_t right = (p.in_w + p.padding_w - Phase + Stride - 1) / Stride;
    if (begin < left) begin = left;
    if (end > right) end = right;
    if (begin >= end) return;
    const int64_t columns = end - begin, count = (columns + max_columns - 1) / max_columns;
    for (int64_t b = 0; b < count; ++b) {
      const int64_t m = begin + columns * b / count;
      with_count<max_columns>(begin + columns * (b + 1) / count - m, [&](auto n) {
        gather_block<decltype(n)::value, Stride, Width, Phase>(
            width, w + (m - first), gy + (m - first) * block_channels,
            gx + (Stride * m + Phase - p.padding_w) * block_channels);
      });
    }
  }
}

template <int Stride, int Width>
void gather(const Problem& p, const float* w, const float* gy, int64_t first, int64_t pixels, float* gx) {
  gather_phase<Stride, Width, 0>(p, w, gy, first, pixels, gx);
  if constexpr (Stride > 1) gather_phase<Stride, Width, 1>(p, w, gy, first, pixels, gx);
}

// Any window: one tap at a time.
template <>
void gather<0, 0>(const Problem& p, const float* w, const float* gy, int64_t first, int64_t pixels, float* gx) {
  for (int64_t i = 0; i < pixels; ++i)
    for (int64_t j = 0; j < p.kernel_w; ++j) {
      const int64_t q = (first + i) * p.stride_w + j * p.dilation_w - p.padding_w;
      if (q < 0 || q >= p.in_w) continue;
      const float weight = w[j * tile_pixels + i];
      for (int v = 0; v < block_vectors; ++v) {
        float* to = gx + q * block_channels + v * V::lanes;
        V sum = V::load(to);
        sum.add_product(V::load(gy + i * block_channels + v * V::lanes), weight);
        sum.store(to);
      }
    }
}

using Gather = void (*)(const Problem&, const float* w, const float* gy, int64_t first, int64_t pixels, float* gx);

Gather gather_for(const Problem& p) {
  if (p.dilation_w != 1 || p.padding_w >= (1 << 20)) return gather<0, 0>;
  const bool reaches = phase_taps(p.kernel_w, p.stride_w, 0) <= backward_margin + 1;
  if (p.stride_w == 1) {
    switch (p.kernel_w) {
      case 3: return gather<1, 3>;
      case 5: return gather<1, 5>;
      case 7: return gather<1, 7>;
      default: return reaches ? gather<1, 0> : gather<0, 0>;
    }
  } else if (p.stride_w == 2) {
    switch (p.kernel_w) {
      case 3: return gather<2, 3>;
      case 5: return gather<2, 5>;
      case 7: return gather<2, 7>;
      default: return reaches ? gather<2, 0> : gather<0, 0>;
    }
  }
  return gather<0, 0>;
}

// grad_X of Taps neighbouring taps of a row of a window that several pixels share, `step` apart: gx[t] += sum over the
// pixels of w[t] * gy. The columns of X are `tap` apart.
template <int Taps>
PYINVOLUTION_APART void gather_shared_block(const float* w, const float* gy, int64_t pixels, int64_t step, float* gx,
                                            int64_t tap) {
  V sum[Taps][block_vectors];
#pragma GCC unroll 16
  for (int t = 0; t < Taps; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < block_vectors; ++v) sum[t][v] = V::load(gx + t * tap + v * V::lanes);
  for (int64_t i = 0; i < pixels; ++i, w += step, gy += step * block_channels) {
    V at[block_vectors];
#pragma GCC unroll 4
    for (int v = 0; v < block_vectors; ++v) at[v] = V::load(gy + v * V::lanes);
#pragma GCC unroll 16
    for (int t = 0; t < Taps; ++t) add_product(sum[t], at, w + t * tile_pixels);
  }
#pragma GCC unroll 16
  for (int t = 0; t < Taps; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < block_vectors; ++v) sum[t][v].store(gx + t * tap + v * V::lanes);
}

// The same for all taps. w and gy are at the first pixel of the run, and for_each_row calls body(w, gx) for each tap row
// whose row of X is wanted: where its weights are, and that row.
template <class Rows>
void gather_shared(const Problem& p, const float* w, const float* gy, const WindowRun& run, const Rows& for_each_row) {
  const int64_t tap = p.dilation_w * block_channels;
  const int64_t count = p.kernel_w <= max_columns ? 1 : ceil_div(p.kernel_w, max_columns);
  for (int64_t b = 0; b < count; ++b) {
    const int64_t first = p.kernel_w * b / count;
    with_count<max_columns>(p.kernel_w * (b + 1) / count - first, [&](auto n) {
      for_each_row(w + first * tile_pixels, [&](const float* from, float* gx) {
        gather_shared_block<decltype(n)::value>(from, gy, run.count, run.step,
                                                gx + run.first * block_channels + first * tap, tap);
      });
    });
  }
}

// grad_X of Pixels neighbouring pixels whose windows slide by a column, from Taps neighbouring taps of a row: gx[i + t]
// += w[t][i] * gy[i]. Other than gather_block it needs no zeros around the pixels.
template <int Pixels, int Taps>
PYINVOLUTION_APART void scatter_block(const float* w, const float* gy, float* gx) {
  constexpr int columns = Pixels + Taps - 1;
  V sum[columns][block_vectors];
#pragma GCC unroll 32
  for (int q = 0; q < columns; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < block_vectors; ++v) sum[q][v] = V::load(gx + q * block_channels + v * V::lanes);
  constexpr int spread = Pixels >= spread_columns ? spread_columns : 0;
  V fours[Taps];
#pragma GCC unroll 8
  for (int t = 0; t < Taps; ++t) fours[t] = spread > 0 ? V::load_fours(w + t * tile_pixels) : V::zero();
#pragma GCC unroll 16
  for (int i = 0; i < Pixels; ++i) {
    V at[block_vectors];
#pragma GCC unroll 4
    for (int v = 0; v < block_vectors; ++v) at[v] = V::load(gy + i * block_channels + v * V::lanes);
#pragma GCC unroll 8
    for (int t = 0; t < Taps; ++t) {
      if (i < spread)
        sum[i + t][0].add_product(at[0], fours[t].spread(i));
      else
        add_product(sum[i + t], at, w + t * tile_pixels + i);
    }
  }
#pragma GCC unroll 32
  for (int q = 0; q < columns; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < block_vectors; ++v) sum[q][v].store(gx + q * block_channels + v * V::lanes);
}

// As many sums as there are registers for: 20 with AVX-512, whose blocks are a vector wide.
constexpr int scatter_columns = block_vectors == 1 ? max_columns + 6 : max_columns;

// The same for Taps of a row's taps at all pixels of a run.
template <int Taps, class Rows>
void scatter_taps(const float* w, const float* gy, int64_t pixels, int64_t column, const Rows& for_each_row) {
  constexpr int most = scatter_columns - Taps + 1;
  const int64_t count = pixels <= most ? 1 : ceil_div(pixels, most);
  for (int64_t b = 0; b < count; ++b) {
    const int64_t first = pixels * b / count;
    with_count<most>(pixels * (b + 1) / count - first, [&](auto n) {
      for_each_row(w + first, [&](const float* from, float* gx) {
        scatter_block<decltype(n)::value, Taps>(from, gy + first * block_channels,
                                                gx + (column + first) * block_channels);
      });
    });
  }
}
template <class Rows>
void scatter(int64_t taps, const float* w, const float* gy, const WindowRun& run, const Rows& for_each_row) {
  int64_t column = run.first;
  const auto add = [&](auto n) {
    constexpr int count = decltype(n)::value;
    if constexpr (count <= scatter_columns)
      for (; taps >= count; taps -= count, w += count * tile_pixels, column += count)
        scatter_taps<count>(w, gy, run.count, column, for_each_row);
  };
  if constexpr (block_vectors == 1) add(Count<7>{}), add(Count<5>{});
  add(Count<3>{}), add(Count<1>{});
}

// How many taps of a row the kernels of grad_W work on. Odd: a part of a longer row has one fewer.
constexpr int max_taps = 7;

// grad_W of Taps neighbouring taps at a vector of pixels: to[t] += sum over channels c of gy[c] * x[c][offset[t]].
template <int Taps>
PYINVOLUTION_APART void grad_weight_block(const float* gy, int64_t gy_channel, const float* x, int64_t x_channel,
                                          const int64_t* offset, int64_t channels, bool add, float* to) {
  V sum[Taps];
#pragma GCC unroll 8
  for (int t = 0; t < Taps; ++t) sum[t] = add ? V::load(to + t * gradient_pitch) : V::zero();
  for (int64_t c = 0; c < channels; ++c) {
    const V grad = V::load(gy + c * gy_channel);
#pragma GCC unroll 8
    for (int t = 0; t < Taps; ++t) sum[t].add_product(grad, V::load(x + c * x_channel + offset[t]));
  }
#pragma GCC unroll 8
  for (int t = 0; t < Taps; ++t) sum[t].store(to + t * gradient_pitch);
}

// The same for Rows rows of Width taps without dilation at Vectors vectors of pixels. x is aligned: the taps of a phase
// read vectors that are shifted by a column each, which are made of two in registers: loads across cache lines would take
// longer than the multiply-adds.
template <int Vectors, int Rows, int Stride, int Width>
PYINVOLUTION_APART void grad_weight_rows(const float* gy, const float* x, int64_t x_row, int64_t x_channel,
                                         int64_t x_phase, int64_t channels, bool add, float* to) {
  V sum[Rows][Width][Vectors];
#pragma GCC unroll 3
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Width; ++j)
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v)
        sum[i][j][v] = add ? V::load(to + (i * Width + j) * gradient_pitch + v * V::lanes) : V::zero();
  for (int64_t c = 0; c < channels; ++c, gy += backward_columns, x += x_channel) {
    V grad[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) grad[v] = V::load(gy + v * V::lanes);
#pragma GCC unroll 3
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
      for (int phase = 0; phase < Stride && phase < Width; ++phase) {
        const float* from = x + i * x_row + phase * x_phase;
        V at[Vectors + 1];
#pragma GCC unroll 3
        for (int v = 0; v <= Vectors; ++v) at[v] = V::load(from + v * V::lanes);
#pragma GCC unroll 8
        for (int shift = 0; Stride * shift + phase < Width; ++shift)
#pragma GCC unroll 2
          for (int v = 0; v < Vectors; ++v)
            sum[i][Stride * shift + phase][v].add_product(grad[v],
                                                          shift == 0 ? at[v] : V::shifted(at[v], at[v + 1], shift));
      }
  }
#pragma GCC unroll 3
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Width; ++j)
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) sum[i][j][v].store(to + (i * Width + j) * gradient_pitch + v * V::lanes);
}

// grad_weight_block for Rows rows of Taps taps where windows shift: x is at the vector's first column, `vector` says
// where its lanes are.
template <ShiftedVector::Kind Kind, int Rows, int Taps>
PYINVOLUTION_APART void grad_weight_shifted(const ShiftedVector& vector, const float* gy, const float* x, int64_t x_row,
                                            int64_t x_channel, const int64_t* offset, int64_t channels, int64_t row,
                                            bool add, float* to) {
  const auto order = V::order(vector.lane);
  V sum[Rows][Taps];
#pragma GCC unroll 3
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int t = 0; t < Taps; ++t) sum[i][t] = add ? V::load(to + i * row + t * gradient_pitch) : V::zero();
  for (int64_t c = 0; c < channels; ++c, x += x_channel) {
    const V grad = V::load(gy + c * backward_columns);
#pragma GCC unroll 3
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
      for (int t = 0; t < Taps; ++t) {
        const float* from = x + i * x_row + offset[t];
        V at;
        if constexpr (Kind == ShiftedVector::neighbours) {
          at = V::load(from);
        } else if constexpr (Kind == ShiftedVector::permuted) {
          at = V::load(from).permuted(order);
        } else {
          at = V::load_range(from, 0, 0, vector.split);
          at.value = at.value + V::load_range(from + (vector.after - vector.at), 0, vector.split, V::lanes).value;
        }
        sum[i][t].add_product(grad, at);
      }
  }
#pragma GCC unroll 3
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int t = 0; t < Taps; ++t) sum[i][t].store(to + i * row + t * gradient_pitch);
}

// The same for taps without dilation whose lanes change places: all of them are in two vectors of x, each of which is
// loaded once.
template <int Rows, int Taps>
PYINVOLUTION_APART void grad_weight_permuted(const ShiftedVector& vector, const float* gy, const float* x,
                                             int64_t x_row, int64_t x_channel, int64_t channels, int64_t row, bool add,
                                             float* to) {
  typename V::Order order[Taps];
#pragma GCC unroll 8
  for (int t = 0; t < Taps; ++t) order[t] = V::order(vector.lane, t);
  V sum[Rows][Taps];
#pragma GCC unroll 3
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int t = 0; t < Taps; ++t) sum[i][t] = add ? V::load(to + i * row + t * gradient_pitch) : V::zero();
  for (int64_t c = 0; c < channels; ++c, x += x_channel) {
    const V grad = V::load(gy + c * backward_columns);
#pragma GCC unroll 3
    for (int i = 0; i < Rows; ++i) {
      const V low = V::load(x + i * x_row), high = V::load(x + i * x_row + V::lanes);
#pragma GCC unroll 8
      for (int t = 0; t < Taps; ++t) sum[i][t].add_product(grad, V::permuted(low, high, order[t]));
    }
  }
#pragma GCC unroll 3
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int t = 0; t < Taps; ++t) sum[i][t].store(to + i * row + t * gradient_pitch);
}

float total(const float* from, int64_t count) {
  V sum = V::zero();
  int64_t i = 0;
  for (; i + V::lanes <= count; i += V::lanes) sum.value += V::load(from + i).value;
  if (i < count) sum.value += V::load_range(from, i, i, count).value;
  float all = 0;
  for (int64_t lane = 0; lane < V::lanes; ++lane) all += sum.value[lane];
  return all;
}

template <class T>
struct BackwardRun : BackwardTask<T, BackwardRun<T>> {
  using Task = BackwardTask<T, BackwardRun<T>>;
  using Task::bias, Task::channels_of, Task::first_channel, Task::first_row, Task::for_each_tile, Task::gr,
      Task::last_row, Task::memory, Task::p, Task::part, Task::row_axis, Task::span, Task::staging, Task::store_reduced,
      Task::tiling, Task::want_weights, Task::want_x;
  const Gather gather_row;
  float *x, *gx, *panels, *pixels, *span_memory, *w, *dense, *gw, *gy, *gy_across;
  MatrixA rows_of_span{nullptr, 0, 1};

  BackwardRun(const BackwardTiling& backward, int64_t task, void* scratch)
      : Task(backward, task, scratch), gather_row(gather_for(p)) {
    const auto at = [&](int64_t offset) { return memory + offset; };
    x = at(tiling.x_at), gx = at(tiling.grad_x_at), panels = at(tiling.panels_at);
    pixels = at(tiling.pixels_at), span_memory = at(tiling.span_at);
    w = at(tiling.weights_at), dense = at(tiling.dense_at);
    gw = at(tiling.grad_weights_at), gy = at(tiling.grad_y_at), gy_across = at(tiling.grad_y_across_at);
  }

  // Whether products are those of pairs.
  bool in_pairs() const { return is_bfloat16<T> && tiling.pair_product != nullptr; }
  uint32_t* pairs_at(int64_t offset) const { return reinterpret_cast<uint32_t*>(memory + offset); }

  // Whether a row's last tile has fewer columns than the one before it.
  bool narrows() const { return p.out_w > backward_columns; }

  // --- packing

  int64_t x_row_floats() const { return block_channels * tiling.x_channel; }
  float* x_block(int64_t block) const { return x + block * tiling.x_rows * x_row_floats(); }
  float* gx_block(int64_t block) const { return gx + block * tiling.grad_x_rows * p.in_w * block_channels; }

  // X of a block for a strip as [row][channel][phase][column / stride], between columns that stay zero.
  void pack_input(int64_t n, int64_t g, int64_t block, const BackwardStrip& strip) const {
    const int64_t channels = channels_of(block);
    const T* image =
        static_cast<const T*>(tiling.buffers.x) + n * p.x_stride[0] + first_channel(g, block) * p.x_stride[1];
    float* to = x_block(block);
    for (int64_t h = strip.x_begin; h < strip.x_end; ++h, to += x_row_floats()) {
      if (h < 0 || h >= p.in_h) {
        if (tiling.height < p.out_h) std::memset(to, 0, size_t(x_row_floats()) * sizeof(float));
        continue;
      }
      for (int64_t phase = 0; phase < p.stride_w; ++phase) {
        // Padded columns phase + stride * m hold column phase + stride * m - padding.
        const int64_t left = p.padding_w <= phase ? 0 : (p.padding_w - phase + p.stride_w - 1) / p.stride_w;
        const int64_t inside = p.in_w + p.padding_w - phase;
        const int64_t right = min(tiling.x_phase, inside <= 0 ? 0 : (inside + p.stride_w - 1) / p.stride_w);
        if (left >= right) continue;
        const T* from = image + h * p.x_stride[2] + (left * p.stride_w + phase - p.padding_w) * p.x_stride[3];
        transpose_into(from, p.stride_w * p.x_stride[3], right - left, p.x_stride[1], channels,
                       to + phase * tiling.x_phase + left, tiling.x_channel, staging);
      }
    }
  }

  // R of a tile, the index-th of the strip, from a column on.
  float* panel(int64_t index, int64_t column) const {
    return panels + (index * tiling.tile_pitch + column) * span.reduced;
  }
  float* pixel_rows(const BackwardStrip& strip, int64_t row, int64_t column) const {
    return pixels + ((row - strip.begin) * p.out_w + column) * tiling.reduced_padded;
  }

  uint32_t* pixel_pairs(const BackwardStrip& strip, int64_t row, int64_t column) const {
    return pairs_at(tiling.pixels_at) + tiling.place(row - strip.begin, column) / 2 * tiling.reduced_padded;
  }

  // R of a strip: for each tile [vector][r][lane], and [pixel][r]; of pairs the same with pairs of r, and of pixels.
  void pack_reduced(int64_t n, const BackwardStrip& strip) const {
    const T* image = static_cast<const T*>(tiling.buffers.reduced) + n * span.reduced_stride[0];
    for_each_tile(strip, [&](int64_t first, int64_t rows, int64_t index) {
      for (int64_t column = 0; column < p.out_w; column += backward_columns) {
        const int64_t columns = rows > 1 ? p.out_w : min(backward_columns, p.out_w - column);
        const T* from = image + first * span.reduced_stride[2] + column * span.reduced_stride[3];
        const bool own = first >= strip.begin && first < strip.end;
        if constexpr (is_bfloat16<T>) {
          if (in_pairs()) {
            if (want_x)
              pack_reduced_pairs(from, span.reduced_stride, span.reduced, rows, columns,
                                 reinterpret_cast<uint32_t*>(panel(index, column)));
            if (tiling.buffers.grad_span != nullptr && own)
              pack_pixel_pairs(from, span.reduced_stride, span.reduced, rows, columns,
                               pixel_pairs(strip, first, column), tiling.reduced_padded);
            continue;
          }
        }
        if (want_x) pack_pixels(from, span.reduced_stride, span.reduced, rows, columns, panel(index, column), staging);
        if (tiling.buffers.grad_span == nullptr || !own) continue;
        for (int64_t row = first; row < first + rows; ++row, from += span.reduced_stride[2]) {
          float* to = pixel_rows(strip, row, column);
          std::memset(to, 0, size_t(columns * tiling.reduced_padded) * sizeof(float));
          transpose_into(from, span.reduced_stride[1], span.reduced, span.reduced_stride[3], columns, to,
                         tiling.reduced_padded, staging);
        }
      }
    });
  }

  // grad_Y of a block at a tile as [pixel][16] with zeros on either side, and as [channel][pixel].
  void pack_gradient(int64_t n, int64_t g, int64_t block, int64_t row, int64_t column, int64_t columns) const {
    const T* from = static_cast<const T*>(tiling.buffers.y) + n * p.y_stride[0] +
                    first_channel(g, block) * p.y_stride[1] + row * p.y_stride[2] + column * p.y_stride[3];
    float* inner = gy + backward_margin * block_channels;
    load_pixels(from, channels_of(block), columns, p.y_stride[1], p.y_stride[3], inner, staging);
    if (narrows()) clear(inner + columns * block_channels, backward_margin * block_channels / V::lanes);
    if (want_weights) transpose(inner, block_channels, columns, block_channels, gy_across, backward_columns);
  }

  // --- the products of a tile

  // grad_W at some columns of a row of the output whose first tap row reads row `row` of packed X; gy is [channel][pixel].
  void grad_weights(int64_t block, int64_t row, int64_t column, int64_t columns, const float* gy, float* to) const {
    if constexpr (V::shifts) {
      if (p.dilation_w == 1 && p.stride_w == 1) return grad_weights<1>(block, row, column, columns, gy, to);
      if (p.dilation_w == 1 && p.stride_w == 2) return grad_weights<2>(block, row, column, columns, gy, to);
    }
    const int64_t channels = channels_of(block), parts = (p.kernel_w + max_taps - 1) / max_taps;
    for (int64_t i = 0; i < p.kernel_h; ++i, to += p.kernel_w * gradient_pitch) {
      const float* from = x_block(block) + (row + i * p.dilation_h) * x_row_floats() + column;
      for (int64_t v = 0; v < columns; v += V::lanes)
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t j = p.kernel_w * part / parts;
          with_count<max_taps>(p.kernel_w * (part + 1) / parts - j, [&](auto n) {
            grad_weight_block<decltype(n)::value>(gy + v, backward_columns, from + v, tiling.x_channel,
                                                  tiling.tap_offset + j, channels, block > 0,
                                                  to + j * gradient_pitch + v);
          });
        }
    }
  }

  template <int Stride>
  void grad_weights(int64_t block, int64_t row, int64_t column, int64_t columns, const float* gy, float* to) const {
    const int64_t channels = channels_of(block), x_row = p.dilation_h * x_row_floats();
    const float* from = x_block(block) + row * x_row_floats() + column;
    for (int64_t i = 0; i < p.kernel_h;) {
      const int64_t rows = p.kernel_w == 3 && i + 3 <= p.kernel_h ? 3 : 1;
      // The parts of a row start with a tap of phase 0.
      for (int64_t j = 0; j < p.kernel_w;) {
        const int64_t taps = p.kernel_w - j <= max_taps ? p.kernel_w - j : max_taps - 1;
        const float* x_taps = from + i * x_row + j / Stride;
        float* to_taps = to + (i * p.kernel_w + j) * gradient_pitch;
        int64_t v = 0;
        const auto vectors = [&](auto wide, auto high, auto n) {
          constexpr int m = decltype(wide)::value;
          for (; v + (m - 1) * V::lanes < columns; v += m * V::lanes)
            grad_weight_rows<m, decltype(high)::value, Stride, decltype(n)::value>(
                gy + v, x_taps + v, x_row, tiling.x_channel, tiling.x_phase, channels, block > 0, to_taps + v);
        };
        if (rows == 3) {
          vectors(Count<2>{}, Count<3>{}, Count<3>{});
          vectors(Count<1>{}, Count<3>{}, Count<3>{});
        } else {
          with_count<max_taps>(taps, [&](auto n) {
            vectors(Count<2>{}, Count<1>{}, n);
            vectors(Count<1>{}, Count<1>{}, n);
          });
        }
        j += taps;
      }
      i += rows;
    }
  }

  // The same where windows shift.
  void grad_weights_shifted(int64_t block, int64_t row, int64_t column, int64_t columns, float* to) const {
    for (int64_t v = 0; v < columns;) {
      const ShiftedVector* vector = tiling.vectors + (column + v) / V::lanes;
      const auto slides = [&](int64_t at) {
        return vector->kind == ShiftedVector::neighbours && vector->at + p.padding_w == column + at;
      };
      int64_t end = v;
      for (; end < columns && slides(end); end += V::lanes) ++vector;
      if (end > v) {
        grad_weights(block, row, column + v, min(end, columns) - v, gy_across + v, to + v);
        v = end;
        continue;
      }
      with_kind(vector->kind, [&](auto kind) {
        grad_weights_shifted<ShiftedVector::Kind(decltype(kind)::value)>(*vector, block, row, gy_across + v, to + v);
      });
      v += V::lanes;
    }
  }
  template <class Body>
  static void with_kind(ShiftedVector::Kind kind, const Body& body) {
    if (kind == ShiftedVector::neighbours) return body(Count<ShiftedVector::neighbours>{});
    if (kind == ShiftedVector::permuted) return body(Count<ShiftedVector::permuted>{});
    body(Count<ShiftedVector::joined>{});
  }
  template <ShiftedVector::Kind Kind>
  void grad_weights_shifted(const ShiftedVector& vector, int64_t block, int64_t row, const float* gy, float* to) const {
    const int64_t channels = channels_of(block), x_row = p.dilation_h * x_row_floats();
    const float* from = x_block(block) + row * x_row_floats() + vector.at + p.padding_w;
    const int64_t parts = ceil_div(p.kernel_w, max_taps), row_taps = p.kernel_w * gradient_pitch;
    for (int64_t i = 0; i < p.kernel_h;) {
      // With AVX-512 there are registers for the sums of two rows.
      const bool three = p.kernel_w == 3 && i + 3 <= p.kernel_h, two = V::shifts && !three && i + 2 <= p.kernel_h;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t j = p.kernel_w * part / parts;
        const auto block_of = [&](auto rows, auto n) {
          constexpr int high = decltype(rows)::value, taps = decltype(n)::value;
          float* to_taps = to + (i * p.kernel_w + j) * gradient_pitch;
          if constexpr (V::shifts && Kind == ShiftedVector::permuted) {
            if (p.dilation_w == 1)
              return grad_weight_permuted<high, taps>(vector, gy, from + i * x_row + j, x_row, tiling.x_channel,
                                                      channels, row_taps, block > 0, to_taps);
          }
          grad_weight_shifted<Kind, high, taps>(vector, gy, from + i * x_row, x_row, tiling.x_channel,
                                                tiling.tap_offset + j, channels, row_taps, block > 0, to_taps);
        };
        if (three)
          block_of(Count<3>{}, Count<3>{});
        else
          with_count<max_taps>(p.kernel_w * (part + 1) / parts - j, [&](auto n) {
            if constexpr (V::shifts)
              if (two) return block_of(Count<2>{}, n);
            block_of(Count<1>{}, n);
          });
      }
      i += three ? 3 : two ? 2 : 1;
    }
  }

  // The weights of a row out of those of a tile, with zeros after them.
  void copy_weights(const float* from, int64_t columns, float* to) const {
    for (int64_t v = 0; v < columns + backward_margin; v += V::lanes) {
      const int64_t count = columns - v < 0 ? 0 : min(columns - v, V::lanes), taps = p.taps();
      if (count == V::lanes)
        for (int64_t k = 0; k < taps; ++k) V::load(from + k * tile_pixels + v).store(to + k * tile_pixels + v);
      else
        for (int64_t k = 0; k < taps; ++k)
          V::load_range(from + k * tile_pixels + v, 0, 0, count).store(to + k * tile_pixels + v);
    }
  }

  // grad_X of a row of the output where windows shift, of a tile's columns from `column` on. The row's first tap row reads
  // row `first` of X.
  void gather_shifted(const BackwardStrip& strip, int64_t block, int64_t first, int64_t column,
                      const float* weights) const {
    const float* inner = gy + backward_margin * block_channels;
    const int64_t* const ends = tiling.tile_runs + column / backward_columns;
    const auto for_each_row = [&](const float* from, const auto& body) {
      for (int64_t i = 0; i < p.kernel_h; ++i, from += p.kernel_w * tile_pixels) {
        const int64_t h = first + i * p.dilation_h;
        if (h >= strip.in_begin && h < strip.in_end)
          body(from, gx_block(block) + (h - strip.in_begin) * p.in_w * block_channels);
      }
    };
    for (const WindowRun* run = tiling.runs + ends[0]; run != tiling.runs + ends[1]; ++run) {
      const float* w = weights + run->column - column;
      const float* grad = inner + (run->column - column) * block_channels;
      if (run->slope == 0)
        gather_shared(p, w, grad, *run, for_each_row);
      else if (p.dilation_w == 1)
        scatter(p.kernel_w, w, grad, *run, for_each_row);
      else
        for_each_row(w,
                     [&](const float* from, float* to) { gather<0, 0>(p, from, grad, run->column, run->count, to); });
    }
  }

  // W of a tile of `count` pixels.
  void multiply_weights(int64_t index, int64_t column, int64_t count, const MatrixA& s, float* to) const {
    const float* reduced = panel(index, column);
    if (in_pairs()) {
      const int64_t depth = ceil_div(span.reduced, 2);
      tiling.pair_product({pairs_at(tiling.span_at), depth, 1, p.taps(), reinterpret_cast<const uint32_t*>(reduced),
                           depth * product_lanes, product_lanes, ceil_div(count, product_lanes), depth, bias, to,
                           tile_pixels});
      return;
    }
    multiply(s, p.taps(), {reduced, V::lanes * span.reduced, V::lanes}, ceil_div(count, V::lanes), span.reduced, bias,
             to, tile_pixels);
  }

  // grad_R += S^T grad_W and grad_S += grad_W R^T of a tile of `count` pixels, which begins at a row of the strip.
  void multiply_gradients(int64_t g, int64_t row, int64_t column, int64_t count, const float* reduced,
                          const uint32_t* reduced_pairs, const MatrixA& s) const {
    const int64_t taps = p.taps(), pitch = tiling.reduced_padded;
    float* to_reduced = gr + tiling.place(row, column);
    float* to_span = tiling.span_part(part) + g * taps * pitch;
    if (in_pairs()) {
      const uint32_t *rounded = pairs_at(tiling.rounded_at), *across = pairs_at(tiling.rounded_across_at);
      round_weight_pairs(gw, gradient_pitch, taps, count, pairs_at(tiling.rounded_at),
                         pairs_at(tiling.rounded_across_at), tile_pixels / 2);
      if (tiling.buffers.grad_reduced != nullptr)
        tiling.pair_product({pairs_at(tiling.span_across_at), 1, span.reduced, span.reduced, across, product_lanes,
                             tile_pixels, ceil_div(count, product_lanes), ceil_div(taps, 2), nullptr, to_reduced,
                             tiling.plane});
      if (tiling.buffers.grad_span != nullptr)
        tiling.pair_product({rounded, tile_pixels / 2, 1, taps, reduced_pairs, product_lanes, pitch,
                             pitch / product_lanes, ceil_div(count, 2), nullptr, to_span, pitch});
      return;
    }
    if (tiling.buffers.grad_reduced != nullptr)
      multiply({s.at, s.depth, s.row}, span.reduced, {gw, V::lanes, gradient_pitch}, ceil_div(count, V::lanes), taps,
               nullptr, to_reduced, tiling.plane);
    if (tiling.buffers.grad_span != nullptr)
      multiply({gw, gradient_pitch, 1}, taps, {reduced, V::lanes, pitch}, pitch / V::lanes, count, nullptr, to_span,
               pitch);
  }

  // Some columns of a tile of rows, or all of them.
  void tile(int64_t n, int64_t g, int64_t first, int64_t rows, int64_t index, int64_t column,
            const BackwardStrip& strip) const {
    const bool own = first >= strip.begin && first < strip.end;
    const int64_t columns = min(backward_columns, p.out_w - column), taps = p.taps(), count = rows * columns;
    float* weights = w + tiling.margin;
    if (want_x && tiling.w == nullptr) multiply_weights(index, column, count, rows_of_span, rows > 1 ? dense : weights);
    for (int64_t row = first; row < first + rows; ++row) {
      const int64_t pixel = (row - first) * columns, x_first = row_axis.first(row);
      if (want_x) {
        if (tiling.w != nullptr)
          load_weights(weights_of<T>(p, tiling.w, n, g, row, column), p, 1, columns, weights, staging);
        if (rows > 1) {
          copy_weights(dense + pixel, columns, weights);
        } else if (tiling.w == nullptr || narrows()) {
          // Products have whole vectors: what they wrote past the columns must be zero.
          for (int64_t k = 0; k < taps; ++k)
            clear(weights + k * tile_pixels + columns, (backward_margin + V::lanes - 1) / V::lanes);
        }
      }
      for (int64_t block = 0; block < tiling.blocks; ++block) {
        pack_gradient(n, g, block, row, column, columns);
        if (want_x && p.border == Border::shift)
          gather_shifted(strip, block, x_first, column, weights);
        else if (want_x)
          for (int64_t i = 0; i < p.kernel_h; ++i) {
            const int64_t h = x_first + i * p.dilation_h;
            if (h >= strip.in_begin && h < strip.in_end)
              gather_row(p, weights + i * p.kernel_w * tile_pixels, gy + backward_margin * block_channels, column,
                         columns, gx_block(block) + (h - strip.in_begin) * p.in_w * block_channels);
          }
        // What a row writes past its end is that of the next one, which comes later.
        if (!want_weights || !own) continue;
        const int64_t x_row = x_first - strip.x_begin;
        if (p.border == Border::shift)
          grad_weights_shifted(block, x_row, column, columns, gw + pixel);
        else
          grad_weights(block, x_row, column, columns, gy_across, gw + pixel);
      }
    }
    if (!own) return;
    if (tiling.grad_w != nullptr) store_weights(gw, p, columns, weights_of<T>(p, tiling.grad_w, n, g, first, column));
    if (tiling.buffers.grad_bias != nullptr) {
      float* to = tiling.bias_part(part) + g * taps;
      for (int64_t k = 0; k < taps; ++k) {
        to[k] += total(gw + k * gradient_pitch, count);
      }
    }
    if (tiling.buffers.grad_reduced != nullptr || tiling.buffers.grad_span != nullptr)
      multiply_gradients(g, first - strip.begin, column, count, pixel_rows(strip, first, column),
                         pixel_pairs(strip, first, column), rows_of_span);
  }

  // --- the steps of a task

  void start() const {
    // The zeros around images and tiles are written once; tasks leave them alone.
    if (want_weights) std::memset(x, 0, size_t(tiling.blocks * tiling.x_rows * x_row_floats()) * sizeof(float));
    clear(w, (p.taps() + 1) * tile_pixels / V::lanes);
    clear(gy, (backward_columns + 2 * backward_margin) * block_channels / V::lanes);
    clear(gy_across, block_channels * backward_columns / V::lanes);
  }

  void start_group(int64_t n, int64_t g, const BackwardStrip& strip) {
    const int64_t in_rows = strip.in_end - strip.in_begin;
    for (int64_t block = 0; block < tiling.blocks; ++block) {
      if (want_x) std::memset(gx_block(block), 0, size_t(in_rows * p.in_w * block_channels) * sizeof(float));
      if (want_weights) pack_input(n, g, block, strip);
    }
    if (span.reduced == 0) return;
    if constexpr (is_bfloat16<T>) {
      if (in_pairs())
        return pack_span_pairs(span_row<T>(span, tiling.buffers, g * p.taps()), span.span_stride[0],
                               span.span_stride[1], p.taps(), span.reduced, pairs_at(tiling.span_at),
                               pairs_at(tiling.span_across_at));
    }
    rows_of_span.at = span_rows<T>(span, tiling.buffers, g, span_memory, &rows_of_span.row);
  }

  // The next group, by as many of its rows as these are of the strip's.
  void prefetch(const typename Task::Group& group, const typename Task::Group* next, int64_t row, int64_t rows) const {
    if (next == nullptr) return;
    const int64_t first = first_row(*group.strip), of = last_row(*group.strip) - first;
    const BackwardStrip& strip = *next->strip;
    const auto share = [&](int64_t begin, int64_t end, int64_t i) { return begin + (end - begin) * (i - first) / of; };
    const auto input = [&](const void* at, const int64_t (&stride)[4]) {
      this->prefetch_input(*next, at, stride, share(strip.in_begin, strip.in_end, row),
                           share(strip.in_begin, strip.in_end, row + rows));
    };
    if (want_weights) input(tiling.buffers.x, p.x_stride);
    if (want_x) input(tiling.buffers.grad_x, span.grad_x_stride);
    this->prefetch_output(*next, share(first_row(strip), last_row(strip), row),
                          share(first_row(strip), last_row(strip), row + rows));
  }

  void tile(int64_t n, int64_t g, int64_t row, int64_t rows, int64_t index, const BackwardStrip& strip) const {
    for (int64_t column = 0; column < p.out_w; column += backward_columns) tile(n, g, row, rows, index, column, strip);
  }

  void finish_group(int64_t n, int64_t g, const BackwardStrip& strip) const {
    if (!want_x) return;
    for (int64_t block = 0; block < tiling.blocks; ++block)
      for (int64_t h = strip.in_begin; h < strip.in_end; ++h)
        store_pixels(gx_block(block) + (h - strip.in_begin) * p.in_w * block_channels, channels_of(block), p.in_w,
                     static_cast<T*>(tiling.buffers.grad_x) + n * span.grad_x_stride[0] +
                         first_channel(g, block) * span.grad_x_stride[1] + h * span.grad_x_stride[2],
                     span.grad_x_stride[1], span.grad_x_stride[3], staging);
  }

  void finish_task() const {}

  // grad_R at a row of the output.
  void store_reduced_row(const float* from, int64_t apart, T* to, int64_t channel, int64_t pixel) const {
    if (pixel == 1) {
      for (int64_t r = 0; r < span.reduced; ++r) store_run(from + r * apart, p.out_w, to + r * channel);
      return;
    }
    if constexpr (is_float<T>) {
      if (channel == 1) return transpose(from, apart, span.reduced, p.out_w, to, pixel);
    }
    for (int64_t v = 0; v < p.out_w; ++v)
      for (int64_t r = 0; r < span.reduced; ++r) store(from[r * apart + v], &to[r * channel + v * pixel]);
  }
};

void backward_task(const BackwardTiling& tiling, bool finish, int64_t task, void* scratch) {
  dispatch(tiling.problem.involution.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (is_float<Accumulator<T>>) run_backward_task<BackwardRun<T>>(tiling, finish, task, scratch);
  });
}

}  // namespace
}  // namespace pyinvolution::cpu
