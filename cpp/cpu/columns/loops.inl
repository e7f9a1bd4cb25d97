// The inner loops of the `columns` variant; see tiling.h. Compiled for each instruction set by instances/kernels.inl.
#include <cstdint>
#include <cstring>

#include "cpu/arithmetic.h"
#include "cpu/columns/tiling.h"
#include "cpu/simd/dtype.h"
#include "cpu/simd/vector.h"

namespace pyinvolution::cpu {
namespace {

// [channels][columns] of one row into packed rows `pitch` apart. `from` is null for a row outside the tensor.
template <class T, class A>
void pack_row(const ColumnsTiling& tiling, const T* from, int64_t channel_stride, int64_t column_stride,
              int64_t channels, int64_t columns, A* to) {
  const int64_t pitch = tiling.width;
  if (from == nullptr) {
    std::memset(to, 0, size_t(channels * pitch) * sizeof(A));
    return;
  }
  for (int64_t s = 0; s < tiling.segment_count; ++s) {
    const Segment& segment = tiling.segments[s];
    int64_t begin = segment.first < 0 ? (-segment.first + segment.step - 1) / segment.step : 0;
    int64_t end = segment.first < columns ? (columns - segment.first + segment.step - 1) / segment.step : 0;
    begin = begin < segment.count ? begin : segment.count;
    end = end < segment.count ? end : segment.count;
    if (end < begin) end = begin;
    A* row = to + segment.at;
    for (int64_t c = 0; c < channels; ++c) {
      std::memset(row + c * pitch, 0, size_t(begin) * sizeof(A));
      std::memset(row + c * pitch + end, 0, size_t(segment.count - end) * sizeof(A));
    }
    const T* source = from + segment.first * column_stride;
    const int64_t step = segment.step * column_stride;
    if (step == 1) {
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t i = begin; i < end; ++i) row[c * pitch + i] = load(source[c * channel_stride + i]);
    } else if (channel_stride == 1) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t c = 0; c < channels; ++c) row[c * pitch + i] = load(source[i * step + c]);
    } else {
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t i = begin; i < end; ++i) row[c * pitch + i] = load(source[c * channel_stride + i * step]);
    }
  }
}

// [channels][columns] of results, `pitch` apart, into a row of a tensor.
template <class T, class A>
void unpack_row(const A* from, int64_t pitch, int64_t channels, int64_t columns, T* to, int64_t channel_stride,
                int64_t column_stride) {
  if (channel_stride == 1) {
    for (int64_t i = 0; i < columns; ++i)
      for (int64_t c = 0; c < channels; ++c) store(from[c * pitch + i], &to[i * column_stride + c]);
  } else if (column_stride == 1) {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < columns; ++i) store(from[c * pitch + i], &to[c * channel_stride + i]);
  } else {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < columns; ++i) store(from[c * pitch + i], &to[c * channel_stride + i * column_stride]);
  }
}

// `Channels` accumulators at one vector of columns: acc[c] += w * shifted[c].
template <int Channels, class A>
struct Accumulators {
  Vector<A> sum[Channels];

  void clear() {
    for (int c = 0; c < Channels; ++c) sum[c] = Vector<A>::zero();
  }
  void add(const Vector<A>& weight, const A* shifted, int64_t pitch) {
#pragma GCC unroll 8
    for (int c = 0; c < Channels; ++c) sum[c].add_product(weight, Vector<A>::load(shifted + c * pitch));
  }
  void store(A* to, int64_t pitch) const {
    for (int c = 0; c < Channels; ++c) sum[c].store(to + c * pitch);
  }
};

template <class T>
struct ColumnsRun {
  using A = Accumulator<T>;
  using V = Vector<A>;

  const ColumnsTiling& tiling;
  const Problem& p;
  int64_t n, g, begin, end;  // rows of the strip: of Y, or of X for grad_input
  A* packed;                 // [packed_rows][chunk][width]
  A* others;

  ColumnsRun(const ColumnsTiling& columns, int64_t task, void* scratch) : tiling(columns), p(columns.problem) {
    const int64_t rows = tiling.pass == Pass::grad_input ? p.in_h : p.out_h;
    begin = task % tiling.strips * tiling.height;
    end = begin + tiling.height < rows ? begin + tiling.height : rows;
    g = task / tiling.strips % p.groups;
    n = task / tiling.strips / p.groups;
    packed = static_cast<A*>(scratch);
    others = packed + tiling.packed_rows * tiling.chunk * tiling.width;
  }

  T* x_row(int64_t c, int64_t h) const {
    return static_cast<T*>(tiling.buffers.x) + n * p.x_stride[0] + c * p.x_stride[1] + h * p.x_stride[2];
  }
  T* y_row(int64_t c, int64_t h) const {
    return static_cast<T*>(tiling.buffers.y) + n * p.y_stride[0] + c * p.y_stride[1] + h * p.y_stride[2];
  }
  T* w_row(int64_t i, int64_t j, int64_t h) const {
    return static_cast<T*>(tiling.buffers.w) + n * p.w_stride[0] + g * p.w_stride[1] + i * p.w_stride[2] +
           j * p.w_stride[3] + h * p.w_stride[4];
  }
  int64_t pack_rows_apart() const { return tiling.chunk * tiling.width; }

  // Rows of X that output rows begin .. end read.
  void pack_input(int64_t first_channel, int64_t channels) const {
    const int64_t first = begin * p.stride_h - p.padding_h;
    const auto pack = [&](int64_t slot, int64_t h) {
      const T* from = h >= 0 && h < p.in_h ? x_row(first_channel, h) : nullptr;
      pack_row(tiling, from, p.x_stride[1], p.x_stride[3], channels, p.in_w, packed + slot * pack_rows_apart());
    };
    if (tiling.share_rows) {
      const int64_t rows = (end - begin - 1) * p.stride_h + p.dilation_h * (p.kernel_h - 1) + 1;
      for (int64_t r = 0; r < rows; ++r) pack(r, first + r);
    } else {
      for (int64_t r = 0; r < end - begin; ++r)
        for (int64_t i = 0; i < p.kernel_h; ++i) pack(r * p.kernel_h + i, first + r * p.stride_h + i * p.dilation_h);
    }
  }
  const A* packed_input(int64_t row, int64_t i) const {
    const int64_t r = row - begin;
    return packed + (tiling.share_rows ? r * p.stride_h + i * p.dilation_h : r * p.kernel_h + i) * pack_rows_apart();
  }

  // The weights of row h for tap row i into [taps][padded], column v of tap j at position v + shift(j).
  template <class Shift>
  void pack_weight(int64_t i, int64_t h, const Shift& shift, A* to) const {
    const T* from = w_row(i, 0, h);
    const int64_t tap = p.w_stride[3], column = p.w_stride[5];
    for (int64_t j = 0; j < p.kernel_w; ++j) {
      const int64_t s = shift(j);
      const int64_t first = s < 0 ? -s : 0;
      int64_t last = tiling.padded - s < p.out_w ? tiling.padded - s : p.out_w;
      if (last < first) last = first;
      A* row = to + j * tiling.padded;
      if (first == last) {
        std::memset(row, 0, size_t(tiling.padded) * sizeof(A));
        continue;
      }
      std::memset(row, 0, size_t(first + s) * sizeof(A));
      std::memset(row + last + s, 0, size_t(tiling.padded - last - s) * sizeof(A));
      const T* source = from + j * tap;
      if (column == 1) {
        for (int64_t v = first; v < last; ++v) row[v + s] = load(source[v]);
      } else if (tap != 1) {
        for (int64_t v = first; v < last; ++v) row[v + s] = load(source[v * column]);
      }
    }
    if (column != 1 && tap == 1) {
      for (int64_t v = 0; v < p.out_w; ++v)
        for (int64_t j = 0; j < p.kernel_w; ++j) {
          const int64_t at = v + shift(j);
          if (at >= 0 && at < tiling.padded) to[j * tiling.padded + at] = load(from[v * column + j]);
        }
    }
  }

  // --- forward

  template <int Channels>
  void forward_block(const A* weights, int64_t tap_row, int64_t tap_column, int64_t row, int64_t channel,
                     int64_t column, A* result) const {
    const int64_t left = p.out_w - column;
    const bool partial = tiling.direct_weight && left < V::lanes;
    Accumulators<Channels, A> accumulators;
    accumulators.clear();
    for (int64_t i = 0; i < p.kernel_h; ++i) {
      const A* shifted = packed_input(row, i) + channel * tiling.width + column;
      const A* w = weights + i * tap_row + column;
      if (partial) {
        for (int64_t j = 0; j < p.kernel_w; ++j)
          accumulators.add(V::load_first(w + j * tap_column, left), shifted + tiling.tap_offset[j], tiling.width);
      } else {
        for (int64_t j = 0; j < p.kernel_w; ++j)
          accumulators.add(V::load(w + j * tap_column), shifted + tiling.tap_offset[j], tiling.width);
      }
    }
    accumulators.store(result + channel * tiling.padded + column, tiling.padded);
  }

  void forward() const {
    A* result = others;
    A* weights = result + tiling.chunk * tiling.padded;
    const int64_t group = p.group_channels();
    for (int64_t first = 0; first < group; first += tiling.chunk) {
      const int64_t channels = tiling.chunk < group - first ? tiling.chunk : group - first;
      pack_input(g * group + first, channels);
      for (int64_t row = begin; row < end; ++row) {
        const A* w = weights;
        int64_t tap_row = p.kernel_w * tiling.padded, tap_column = tiling.padded;
        if (tiling.direct_weight) {
          w = reinterpret_cast<const A*>(w_row(0, 0, row));
          tap_row = p.w_stride[2];
          tap_column = p.w_stride[3];
        } else {
          for (int64_t i = 0; i < p.kernel_h; ++i)
            pack_weight(i, row, [](int64_t) { return int64_t{0}; }, weights + i * tap_row);
        }
        for (int64_t v = 0; v < tiling.columns; v += V::lanes) {
          int64_t c = 0;
          for (; c + 8 <= channels; c += 8) forward_block<8>(w, tap_row, tap_column, row, c, v, result);
          for (; c + 4 <= channels; c += 4) forward_block<4>(w, tap_row, tap_column, row, c, v, result);
          for (; c < channels; ++c) forward_block<1>(w, tap_row, tap_column, row, c, v, result);
        }
        unpack_row(result, tiling.padded, channels, p.out_w, y_row(g * group + first, row), p.y_stride[1],
                   p.y_stride[3]);
      }
    }
  }

  // --- grad_weight

  template <int Taps>
  void grad_weight_block(const A* grad, const A* shifted, const int64_t* offsets, int64_t channels, int64_t column,
                         A* sums) const {
    V sum[Taps];
    for (int t = 0; t < Taps; ++t) sum[t] = V::load(sums + t * tiling.padded + column);
    for (int64_t c = 0; c < channels; ++c) {
      const V gy = V::load(grad + c * tiling.padded + column);
      const A* x = shifted + c * tiling.width + column;
#pragma GCC unroll 7
      for (int t = 0; t < Taps; ++t) sum[t].add_product(gy, V::load(x + offsets[t]));
    }
    for (int t = 0; t < Taps; ++t) sum[t].store(sums + t * tiling.padded + column);
  }

  void grad_weight_row(const A* grad, int64_t row, int64_t i, int64_t channels, A* sums) const {
    const A* shifted = packed_input(row, i);
    for (int64_t v = 0; v < tiling.columns; v += V::lanes) {
      const int64_t* offsets = tiling.tap_offset;
      int64_t j = 0;
      const auto block = [&](auto taps) {
        constexpr int count = decltype(taps)::value;
        for (; j + count <= p.kernel_w; j += count)
          grad_weight_block<count>(grad, shifted, offsets + j, channels, v, sums + j * tiling.padded);
      };
      block(Count<7>{});
      block(Count<5>{});
      block(Count<3>{});
      block(Count<1>{});
    }
  }

  void grad_weight() const {
    A* grad = others;
    A* sums = grad + tiling.chunk * tiling.padded;  // [row][taps][padded]
    const int64_t group = p.group_channels();
    std::memset(sums, 0, size_t((end - begin) * p.taps() * tiling.padded) * sizeof(A));
    for (int64_t first = 0; first < group; first += tiling.chunk) {
      const int64_t channels = tiling.chunk < group - first ? tiling.chunk : group - first;
      pack_input(g * group + first, channels);
      for (int64_t row = begin; row < end; ++row) {
        pack_gradient(y_row(g * group + first, row), channels, grad);
        for (int64_t i = 0; i < p.kernel_h; ++i)
          grad_weight_row(grad, row, i, channels, sums + ((row - begin) * p.kernel_h + i) * p.kernel_w * tiling.padded);
      }
    }
    for (int64_t row = begin; row < end; ++row)
      for (int64_t i = 0; i < p.kernel_h; ++i)
        unpack_row(sums + ((row - begin) * p.kernel_h + i) * p.kernel_w * tiling.padded, tiling.padded, p.kernel_w,
                   p.out_w, w_row(i, 0, row), p.w_stride[3], p.w_stride[5]);
  }

  // A row of grad_output, unshifted, into [channels][padded].
  void pack_gradient(const T* from, int64_t channels, A* to) const {
    const int64_t channel = p.y_stride[1], column = p.y_stride[3];
    for (int64_t c = 0; c < channels; ++c)
      std::memset(to + c * tiling.padded + p.out_w, 0, size_t(tiling.padded - p.out_w) * sizeof(A));
    if (column == 1) {
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t v = 0; v < p.out_w; ++v) to[c * tiling.padded + v] = load(from[c * channel + v]);
    } else {
      for (int64_t v = 0; v < p.out_w; ++v)
        for (int64_t c = 0; c < channels; ++c) to[c * tiling.padded + v] = load(from[c * channel + v * column]);
    }
  }

  // --- grad_input

  // The output row whose tap row i reads input row `row`, or -1.
  int64_t reader(int64_t row, int64_t i) const {
    return cpu::reader(row, i, p.stride_h, p.padding_h, p.dilation_h, p.out_h);
  }
  // The first output row that any tap row of the strip can read.
  int64_t first_reader() const {
    const int64_t shifted = begin + p.padding_h - p.dilation_h * (p.kernel_h - 1);
    return shifted <= 0 ? 0 : (shifted + p.stride_h - 1) / p.stride_h;
  }

  void pack_gradients(int64_t first_channel, int64_t channels) const {
    const auto pack = [&](int64_t slot, int64_t h) {
      pack_row(tiling, y_row(first_channel, h), p.y_stride[1], p.y_stride[3], channels, p.out_w,
               packed + slot * pack_rows_apart());
    };
    if (tiling.share_rows) {
      const int64_t first = first_reader();
      int64_t last = (end - 1 + p.padding_h) / p.stride_h;
      if (last > p.out_h - 1) last = p.out_h - 1;
      for (int64_t h = first; h <= last; ++h) pack(h - first, h);
    } else {
      for (int64_t row = begin; row < end; ++row)
        for (int64_t i = 0; i < p.kernel_h; ++i) {
          const int64_t h = reader(row, i);
          if (h >= 0) pack((row - begin) * p.kernel_h + i, h);
        }
    }
  }
  const A* packed_gradient(int64_t row, int64_t i, int64_t h) const {
    return packed + (tiling.share_rows ? h - first_reader() : (row - begin) * p.kernel_h + i) * pack_rows_apart();
  }

  template <int Channels>
  void grad_input_block(const A* weights, int64_t row, int64_t channel, int64_t position, int64_t f, A* result) const {
    Accumulators<Channels, A> accumulators;
    accumulators.clear();
    for (int64_t i = 0; i < p.kernel_h; ++i) {
      const int64_t h = reader(row, i);
      if (h < 0) continue;
      const A* shifted = packed_gradient(row, i, h) + channel * tiling.width + position;
      const A* w = weights + i * p.kernel_w * tiling.padded + position;
      for (int64_t t = tiling.phase_begin[f]; t < tiling.phase_begin[f + 1]; ++t) {
        const int64_t j = tiling.phase_taps[t];
        accumulators.add(V::load(w + j * tiling.padded), shifted + tiling.tap_offset[j], tiling.width);
      }
    }
    A block[Channels * V::lanes];
    accumulators.store(block, V::lanes);
    // Position m of this phase is column s * m + phase - padding, which may lie outside the input at either end.
    const int64_t column = (tiling.first_m + position) * p.stride_w + tiling.phases[f] - p.padding_w;
    for (int64_t l = 0; l < V::lanes; ++l) {
      const int64_t at = column + l * p.stride_w;
      if (at < 0 || at >= p.in_w || position + l >= tiling.columns) continue;
      for (int c = 0; c < Channels; ++c) result[(channel + c) * p.in_w + at] = block[c * V::lanes + l];
    }
  }

  void grad_input() const {
    A* result = others;
    A* weights = result + tiling.chunk * p.in_w;
    const int64_t group = p.group_channels();
    const auto shift = [&](int64_t j) { return p.dilation_w * j / p.stride_w - tiling.first_m; };
    for (int64_t first = 0; first < group; first += tiling.chunk) {
      const int64_t channels = tiling.chunk < group - first ? tiling.chunk : group - first;
      pack_gradients(g * group + first, channels);
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t i = 0; i < p.kernel_h; ++i) {
          const int64_t h = reader(row, i);
          if (h >= 0) pack_weight(i, h, shift, weights + i * p.kernel_w * tiling.padded);
        }
        for (int64_t f = 0; f < tiling.phase_count; ++f)
          for (int64_t m = 0; m < tiling.columns; m += V::lanes) {
            int64_t c = 0;
            for (; c + 8 <= channels; c += 8) grad_input_block<8>(weights, row, c, m, f, result);
            for (; c + 4 <= channels; c += 4) grad_input_block<4>(weights, row, c, m, f, result);
            for (; c < channels; ++c) grad_input_block<1>(weights, row, c, m, f, result);
          }
        unpack_row(result, p.in_w, channels, p.in_w, x_row(g * group + first, row), p.x_stride[1], p.x_stride[3]);
      }
    }
  }

  void run() const {
    switch (tiling.pass) {
      case Pass::forward: return forward();
      case Pass::grad_input: return grad_input();
      case Pass::grad_weight: return grad_weight();
    }
  }
};

void columns_task(const ColumnsTiling& tiling, int64_t task, void* scratch) {
  dispatch(tiling.problem.dtype, [&](auto element) { ColumnsRun<decltype(element)>(tiling, task, scratch).run(); });
}

}  // namespace

}  // namespace pyinvolution::cpu
