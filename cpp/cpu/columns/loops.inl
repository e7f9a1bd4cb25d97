// The inner loops of the `columns` variant; see tiling.h. Compiled for each instruction set by instances/kernels.inl.
#include <cstdint>
#include <cstring>

#include "cpu/arithmetic.h"
#include "cpu/columns/tiling.h"
#include "cpu/simd/dtype.h"
#include "cpu/simd/prefetch.h"
#include "cpu/simd/stream.h"
#include "cpu/simd/vector.h"

namespace pyinvolution::cpu {
namespace {

// So many elements before they are needed, W is asked for.
constexpr int64_t prefetch_bytes = 1024;
constexpr int64_t max_prefetched_planes = 32 * 1024;

// Zeros in a few places; a call of memset takes longer.
template <class A>
void clear_few(A* to, int64_t count) {
  constexpr int64_t lanes = Vector<A>::lanes;
  if (count >= lanes) {
    for (int64_t i = 0; i < count; i += lanes) Vector<A>::zero().store(to + (i + lanes <= count ? i : count - lanes));
  } else {
    for (int64_t i = 0; i < count; ++i) {
      to[i] = 0;
      __asm__ volatile("" ::: "memory");  // GCC would call memset
    }
  }
}

// Neighbours into the arithmetic type.
template <class T, class A>
void load_run(const T* from, int64_t count, A* to) {
  constexpr int64_t lanes = Vector<A>::lanes;
  if (count >= lanes) {
    for (int64_t i = 0; i < count; i += lanes) {
      const int64_t at = i + lanes <= count ? i : count - lanes;
      Vector<A>::load(from + at).store(to + at);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = load(from[i]);
  }
}

// to[c][i] = from[i][c] in the arithmetic type, where channels (or taps) are neighbours. `few` holds a vector of rows.
template <class T, class A>
void transpose_in(const T* from, int64_t from_pitch, int64_t rows, int64_t columns, A* to, int64_t to_pitch, A* few) {
  if constexpr (is_float<T>) {
    transpose(from, from_pitch, rows, columns, to, to_pitch);
  } else if constexpr (sizeof(T) == 2) {
    constexpr int64_t most = Vector<A>::lanes;
    const int64_t pitch = round_up(columns, 4);
    for (int64_t i = 0; i < rows; i += most) {
      const int64_t count = min(most, rows - i);
      for (int64_t r = 0; r < count; ++r) load_run(from + (i + r) * from_pitch, columns, few + r * pitch);
      transpose(few, pitch, count, columns, to + i, to_pitch);
    }
  } else {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < columns; ++c) to[c * to_pitch + i] = load(from[i * from_pitch + c]);
  }
}

// [channels][columns] of results, `pitch` apart, into a row of a tensor.
template <class T, class A>
void unpack_row(const A* from, int64_t pitch, int64_t channels, int64_t columns, T* to, int64_t channel_stride,
                int64_t column_stride) {
  if (column_stride == 1) {
    for (int64_t c = 0; c < channels; ++c) {
      if constexpr (is_float<T>) {
        copy(from + c * pitch, columns, to + c * channel_stride);
      } else {
        for (int64_t i = 0; i < columns; ++i) store(from[c * pitch + i], &to[c * channel_stride + i]);
      }
    }
  } else if (channel_stride == 1 && is_float<T>) {
    if constexpr (is_float<T>) transpose(from, pitch, channels, columns, to, column_stride);
  } else {
    for (int64_t i = 0; i < columns; ++i)
      for (int64_t c = 0; c < channels; ++c) store(from[c * pitch + i], &to[c * channel_stride + i * column_stride]);
  }
}

// A tap of a row, from position 0: its weights, of which there are those of positions [begin, end), and the shifted
// operand.
template <class W, class A>
struct Tap {
  const W* w;
  const A* shifted;
  int64_t begin, end;
};

// The taps that add to the same row.
template <class W, class A>
struct TapList {
  Tap<W, A>* taps;
  int64_t count;
  int64_t low, high;  // from low to high all taps have weights

  void clear() { count = 0, low = 0, high = INT64_MAX; }
  void add(const W* w, const A* shifted, int64_t begin, int64_t end) {
    taps[count++] = {w - begin, shifted, begin, end};
    low = begin > low ? begin : low;
    high = end < high ? end : high;
  }
  // The same taps of another row.
  void move(int64_t w, int64_t shifted, int64_t end) {
    for (int64_t t = 0; t < count; ++t) taps[t].w += w, taps[t].shifted += shifted, taps[t].end += end;
    high += end;
  }
};

// Where to fetch the weights that follow: `distance` ahead up to position `split`, then `beyond`.
struct Ahead {
  int64_t distance, split, beyond;
};

// `Channels` rows of sums: sums[c][m] (+)= sum over taps of w[m] * shifted[c][m].
template <int Channels, bool Fetch, class W, class A>
void add_taps(const TapList<W, A>& list, int64_t shifted_channel, int64_t columns, bool accumulate, A* sums,
              int64_t sum_channel, const Ahead& ahead) {
  using V = Vector<A>;
  constexpr int64_t vectors_of_line = 64 / (V::lanes * sizeof(W)) > 0 ? 64 / (V::lanes * sizeof(W)) : 1;
  for (int64_t m = 0; m < columns; m += V::lanes) {
    V sum[Channels];
    for (int c = 0; c < Channels; ++c) sum[c] = accumulate ? V::load(sums + c * sum_channel + m) : V::zero();
    const auto add = [&](const V& weight, const A* shifted) {
#pragma GCC unroll 8
      for (int c = 0; c < Channels; ++c) sum[c].add_product(weight, V::load(shifted + c * shifted_channel));
    };
    const Tap<W, A>* tap = list.taps;
    const Tap<W, A>* const last = tap + list.count;
    if (Fetch && m / V::lanes % vectors_of_line == 0) {
      const int64_t next = m + (m < ahead.split ? ahead.distance : ahead.beyond);
      for (; tap != last; ++tap) __builtin_prefetch(tap->w + next);
      tap = list.taps;
    }
    if (m >= list.low && m + V::lanes <= list.high) {
      for (; tap != last; ++tap) add(V::load(tap->w + m), tap->shifted + m);
    } else {
      for (; tap != last; ++tap) add(V::load_range(tap->w, m, tap->begin, tap->end), tap->shifted + m);
    }
    for (int c = 0; c < Channels; ++c) sum[c].store(sums + c * sum_channel + m);
  }
}

// The same for any number of channels.
template <class W, class A>
void add_taps(const TapList<W, A>& list, int64_t shifted_channel, int64_t channels, int64_t columns, bool accumulate,
              A* sums, int64_t sum_channel, const Ahead* ahead) {
  if (list.count == 0) return;
  int64_t c = 0, moved = 0;
  TapList<W, A> from = list;
  const auto block = [&](auto number) {
    constexpr int count = decltype(number)::value;
    while (c + count <= channels) {
      A* to = sums + c * sum_channel;
      if (ahead != nullptr && c == 0)
        add_taps<count, true>(from, shifted_channel, columns, accumulate, to, sum_channel, *ahead);
      else
        add_taps<count, false>(from, shifted_channel, columns, accumulate, to, sum_channel, {});
      c += count;
      if (c == channels) break;
      from.move(0, count * shifted_channel, 0);
      moved += count * shifted_channel;
    }
  };
  block(Count<8>{});
  block(Count<4>{});
  block(Count<3>{});
  block(Count<2>{});
  block(Count<1>{});
  if (moved != 0) from.move(0, -moved, 0);
}

// gw[t][p] (+)= sum over channels of gy[c][p] * shifted[t][c][p].
template <int Taps, class A>
void multiply_gradient(const A* grad, int64_t grad_channel, const A* const* shifted, int64_t shifted_channel,
                       int64_t channels, int64_t columns, bool accumulate, A* to, int64_t to_tap) {
  using V = Vector<A>;
  for (int64_t v = 0; v < columns; v += V::lanes) {
    V sum[Taps];
    for (int t = 0; t < Taps; ++t) sum[t] = accumulate ? V::load(to + t * to_tap + v) : V::zero();
    for (int64_t c = 0; c < channels; ++c) {
      const V gy = V::load(grad + c * grad_channel + v);
#pragma GCC unroll 9
      for (int t = 0; t < Taps; ++t) sum[t].add_product(gy, V::load(shifted[t] + c * shifted_channel + v));
    }
    for (int t = 0; t < Taps; ++t) sum[t].store(to + t * to_tap + v);
  }
}

template <class T>
struct ColumnsRun {
  using A = Accumulator<T>;
  using V = Vector<A>;
  static constexpr int64_t prefetch_distance = prefetch_bytes / sizeof(T);

  const ColumnsTiling& tiling;
  const Problem& p;
  const Axis<int64_t> row_axis;
  const bool shift;
  int64_t n, first_group, groups, begin, end;  // rows of the strip: of Y, or of X for grad_input
  int64_t group;                               // channels of one
  int64_t x_begin, x_end;                      // rows of X, or of padding, that a strip of Y reads
  A* packed;
  A* sums;     // of Y or grad_input; or grad_output
  A* weights;  // of a row, or of a block or strip of grad_weight
  A* staging;
  A* row_memory;  // [channels] rows of X before they shift, or of grad_input whose phases are joined
  void* list_memory;

  ColumnsRun(const ColumnsTiling& columns, int64_t task, void* scratch)
      : tiling(columns), p(columns.problem), row_axis(rows_of(p)), shift(p.border == Border::shift) {
    const int64_t rows = tiling.pass == Pass::grad_input ? p.in_h : p.out_h;
    begin = task % tiling.strips * tiling.height;
    end = min(begin + tiling.height, rows);
    first_group = task / tiling.strips % tiling.group_chunks * tiling.task_groups;
    groups = min(tiling.task_groups, p.groups - first_group);
    n = task / tiling.strips / tiling.group_chunks;
    group = p.group_channels();
    char* memory = static_cast<char*>(scratch);
    packed = reinterpret_cast<A*>(memory);
    sums = reinterpret_cast<A*>(memory + tiling.sums_at);
    weights = reinterpret_cast<A*>(memory + tiling.weights_at);
    staging = reinterpret_cast<A*>(memory + tiling.staging_at);
    row_memory = reinterpret_cast<A*>(memory + tiling.row_at);
    list_memory = memory + tiling.list_at;
    if (tiling.pass == Pass::grad_input) return;
    x_begin = row_axis.first(begin);
    int64_t last = row_axis.first(end - 1);
    for (int64_t row = begin; shift && row < end; ++row) {
      x_begin = min(x_begin, row_axis.first(row));
      last = max(last, row_axis.first(row));
    }
    x_end = last + p.dilation_h * (p.kernel_h - 1) + 1;
  }

  T* x_row(int64_t c, int64_t h) const {
    return static_cast<T*>(tiling.buffers.x) + n * p.x_stride[0] + c * p.x_stride[1] + h * p.x_stride[2];
  }
  T* y_row(int64_t c, int64_t h) const {
    return static_cast<T*>(tiling.buffers.y) + n * p.y_stride[0] + c * p.y_stride[1] + h * p.y_stride[2];
  }
  int64_t tap_at(int64_t i, int64_t j) const { return i * p.w_stride[2] + j * p.w_stride[3]; }
  T* w_row(int64_t g, int64_t i, int64_t j, int64_t h) const {
    return static_cast<T*>(tiling.buffers.w) + n * p.w_stride[0] + g * p.w_stride[1] + tap_at(i, j) + h * p.w_stride[4];
  }

  // Calls body(first channel, channels) for each chunk of the task's channels, at least once.
  template <class Body>
  void for_each_chunk(const Body& body) const {
    const int64_t channels = groups * group;
    int64_t first = 0;
    do {
      body(first_group * group + first, min(tiling.chunk, channels - first));
    } while ((first += tiling.chunk) < channels);
  }
  // A flat strip is one row.
  int64_t step() const { return tiling.flat ? tiling.height : 1; }
  int64_t columns() const { return tiling.flat ? (end - begin) * p.out_w : tiling.columns; }

  // --- packing

  // [channels][columns] of one row. `from` is null for a row outside the tensor, of which nothing is read from `last` on.
  // The last vector of a run of neighbours may be written past its end: what is packed next lies behind it.
  void pack_row(const T* from, const T* last, int64_t channel_stride, int64_t column_stride, int64_t channels,
                int64_t columns, A* to) const {
    const int64_t pitch = tiling.packed_channel;
    if (tiling.vector_count > 0) return pack_shifted(from, channel_stride, column_stride, channels, columns, to);
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t s = 0; s < tiling.segment_count; ++s) {
        const Segment& segment = tiling.segments[s];
        A* row = to + c * pitch + segment.at;
        if (from == nullptr) {
          clear_over(row, segment.count);
        } else if (segment.step * column_stride == 1) {
          const int64_t begin = segment.first < 0 ? min(-segment.first, segment.count) : 0;
          const int64_t end = min(columns - segment.first, segment.count);
          clear_over(row, begin);
          const T* source = from + c * channel_stride + segment.first;
          int64_t i = begin;
          for (; i < end && source + i + V::lanes <= last; i += V::lanes) V::load(source + i).store(row + i);
          for (; i < end; i += V::lanes) V::load_range(source, i, begin, end).store(row + i);
          const int64_t after = end > begin ? end : begin;
          clear_over(row + after, segment.count - after);
        } else {
          pack_apart(segment, from, channel_stride, column_stride, channels, columns, c, to + segment.at);
        }
      }
  }
  // The same where the border shifts: the columns of each tap, whose vectors are made of those of the row.
  void pack_shifted(const T* from, int64_t channel_stride, int64_t column_stride, int64_t channels, int64_t columns,
                    A* to) const {
    const int64_t pitch = columns + V::lanes;
    if (column_stride != 1 && channel_stride == 1 && channels > 1) {
      transpose_in(from, column_stride, columns, channels, row_memory, pitch, staging);
    } else {
      for (int64_t c = 0; c < channels; ++c)
        if (column_stride == 1)
          load_run(from + c * channel_stride, columns, row_memory + c * pitch);
        else
          for (int64_t v = 0; v < columns; ++v)
            row_memory[c * pitch + v] = load(from[c * channel_stride + v * column_stride]);
    }
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t v = 0; v < tiling.vector_count; ++v) {
        const ShiftedVector& vector = tiling.vectors[v];
        const A* source = row_memory + c * pitch + vector.at;
        A* target = to + c * tiling.packed_channel + v * V::lanes;
        const auto pack = [&](const auto& load_at) {
          for (int64_t j = 0; j < p.kernel_w; ++j)
            load_at(source + j * p.dilation_w).store(target + tiling.tap_offset[j]);
        };
        switch (vector.kind) {
          case ShiftedVector::neighbours: pack([](const A* at) { return V::load(at); }); break;
          case ShiftedVector::permuted: {
            const auto order = V::order(vector.lane);
            pack([&](const A* at) { return V::load(at).permuted(order); });
            break;
          }
          case ShiftedVector::joined:
            pack([&](const A* at) {
              V joined = V::load_range(at, 0, 0, vector.split);
              joined.value =
                  joined.value + V::load_range(at + (vector.after - vector.at), 0, vector.split, V::lanes).value;
              return joined;
            });
            break;
          case ShiftedVector::scattered:
            pack([&](const A* at) {
              A lanes[V::lanes];
              for (int64_t i = 0; i < V::lanes; ++i) lanes[i] = at[vector.lane[i]];
              return V::load(lanes);
            });
            break;
        }
      }
  }
  // Zeros, also past the end.
  static void clear_over(A* to, int64_t count) {
    for (int64_t i = 0; i < count; i += V::lanes) V::zero().store(to + i);
  }
  // Channel c of a segment whose elements are not neighbours. Where channels are, the first call packs all of them.
  void pack_apart(const Segment& segment, const T* from, int64_t channel_stride, int64_t column_stride,
                  int64_t channels, int64_t columns, int64_t c, A* to) const {
    const int64_t pitch = tiling.packed_channel, step = segment.step * column_stride;
    int64_t begin = segment.first < 0 ? ceil_div(-segment.first, segment.step) : 0;
    int64_t end = segment.first < columns ? ceil_div(columns - segment.first, segment.step) : 0;
    begin = min(begin, segment.count);
    end = min(end, segment.count);
    if (end < begin) end = begin;
    clear_few(to + c * pitch, begin);
    clear_few(to + c * pitch + end, segment.count - end);
    if (begin == end) return;
    const T* source = from + segment.first * column_stride + begin * step;
    if (channel_stride != 1 || channels == 1) {
      A* row = to + c * pitch + begin;
      if constexpr (is_float<T>)
        if (step == 2) return copy_even(source + c * channel_stride, end - begin, row);
      for (int64_t i = 0; i < end - begin; ++i) row[i] = load(source[c * channel_stride + i * step]);
    } else if (c == 0) {
      transpose_in(source, step, end - begin, channels, to + begin, pitch, staging);
    }
  }
  // Behind the last element of X or Y.
  template <class Stride>
  const T* end_of(void* tensor, const Stride& stride, int64_t h, int64_t w) const {
    return static_cast<const T*>(tensor) + (p.batch - 1) * stride[0] + (p.channels - 1) * stride[1] +
           (h - 1) * stride[2] + (w - 1) * stride[3] + 1;
  }

  // Where a packed row is.
  A* packed_slot(int64_t slot) const {
    if (!tiling.flat) return packed + slot * tiling.packed_row;
    return packed + slot % p.stride_h * tiling.packed_phase + slot / p.stride_h * p.out_w;
  }

  // Rows of X that output rows begin .. end read.
  void pack_input(int64_t first_channel, int64_t channels) const {
    const T* const last = end_of(tiling.buffers.x, p.x_stride, p.in_h, p.in_w);
    const auto pack = [&](int64_t slot, int64_t h) {
      const T* from = h >= 0 && h < p.in_h ? x_row(first_channel, h) : nullptr;
      pack_row(from, last, p.x_stride[1], p.x_stride[3], channels, p.in_w, packed_slot(slot));
    };
    if (tiling.share_rows) {
      for (int64_t h = x_begin; h < x_end; ++h) pack(h - x_begin, h);
    } else {
      for (int64_t r = 0; r < end - begin; ++r) {
        const int64_t first = row_axis.first(begin + r);
        for (int64_t i = 0; i < p.kernel_h; ++i) pack(r * p.kernel_h + i, first + i * p.dilation_h);
      }
    }
  }
  // Where the first tap row of an output row is.
  int64_t first_slot(int64_t row) const {
    return tiling.share_rows ? row_axis.first(row) - x_begin : (row - begin) * p.kernel_h;
  }
  const A* packed_input(int64_t slot, int64_t i, int64_t j) const {
    return packed_slot(slot + (tiling.share_rows ? i * p.dilation_h : i)) + tiling.tap_offset[j];
  }

  // The output row whose tap row i reads input row `row`, or -1.
  int64_t reader(int64_t row, int64_t i) const {
    return cpu::reader(row, i, p.stride_h, p.padding_h, p.dilation_h, p.out_h);
  }
  // Calls body(h) for each output row whose tap row i reads row `row`, where the border shifts.
  template <class Body>
  void for_each_reader(int64_t row, int64_t i, const Body& body) const {
    const Positions<int64_t> positions = tiling.readers[row * p.kernel_h + i];
    for (int64_t at = positions.begin; at < positions.end; at += positions.step) {
      const Positions<int64_t> outputs = row_axis.outputs_at(at);
      for (int64_t h = outputs.begin; h < outputs.end; ++h) body(h);
    }
  }

  // The first output row that any tap row of the strip can read, and of a flat strip also rows above the image.
  int64_t first_reader() const {
    // A window that shifts has its pixel inside.
    const int64_t shifted = begin + p.padding_h - p.dilation_h * (p.kernel_h - 1);
    if (tiling.flat) return shifted;
    return shifted <= 0 ? 0 : (shifted + p.stride_h - 1) / p.stride_h;
  }
  int64_t last_reader() const {
    const int64_t last = (end - 1 + (shift ? p.dilation_h * (p.kernel_h - 1) : p.padding_h)) / p.stride_h;
    return tiling.flat || last < p.out_h ? last : p.out_h - 1;
  }

  // Rows of grad_output that input rows begin .. end are read by.
  void pack_gradients(int64_t first_channel, int64_t channels) const {
    const T* const last = end_of(tiling.buffers.y, p.y_stride, p.out_h, p.out_w);
    const auto pack = [&](int64_t slot, int64_t h) {
      const T* from = h >= 0 && h < p.out_h ? y_row(first_channel, h) : nullptr;
      pack_row(from, last, p.y_stride[1], p.y_stride[3], channels, p.out_w, packed_slot(slot));
    };
    if (tiling.share_rows) {
      const int64_t first = first_reader(), count = last_reader() - first + 1;
      for (int64_t slot = 0; slot < count; ++slot) pack(slot, first + slot);
    } else {
      for (int64_t row = begin; row < end; ++row)
        for (int64_t i = 0; i < p.kernel_h; ++i) {
          const int64_t h = reader(row, i);
          if (h >= 0) pack((row - begin) * p.kernel_h + i, h);
        }
    }
  }
  const A* packed_gradient(int64_t row, int64_t i, int64_t h, int64_t j) const {
    return packed_slot(tiling.share_rows ? h - first_reader() : (row - begin) * p.kernel_h + i) + tiling.tap_offset[j];
  }

  // The rows of grad_output of the strip, unshifted, to `sums`.
  void pack_unshifted(int64_t first_channel, int64_t channels) const {
    const int64_t channel = p.y_stride[1], column = p.y_stride[3];
    for_each_row_of_y([&](int64_t row, int64_t columns) {
      const T* from = y_row(first_channel, row);
      A* to = sums_of(row);
      if (column != 1 && channel == 1 && channels > 1) {
        transpose_in(from, column, columns, channels, to, tiling.sum_channel, staging);
        return;
      }
      for (int64_t c = 0; c < channels; ++c)
        if (column == 1)
          load_run(from + c * channel, columns, to + c * tiling.sum_channel);
        else
          for (int64_t v = 0; v < columns; ++v) to[c * tiling.sum_channel + v] = load(from[c * channel + v * column]);
    });
  }
  // Calls body(row, columns) for the rows of Y; for a flat strip once, where its rows follow each other.
  template <class Body>
  void for_each_row_of_y(const Body& body) const {
    if (tiling.flat && p.y_stride[2] == p.out_w * p.y_stride[3]) return body(begin, (end - begin) * p.out_w);
    for (int64_t row = begin; row < end; ++row) body(row, p.out_w);
  }
  A* sums_of(int64_t row, int64_t phase = 0) const {
    return sums + (row - begin) * tiling.sum_rows + phase * tiling.sum_phase;
  }

  // All taps of a row and group of W into `weights`, [tap][column].
  void pack_weights(int64_t g, int64_t h) const {
    const T* from = w_row(g, 0, 0, h);
    const int64_t column = p.w_stride[5];
    if (p.w_stride[3] == 1 || p.kernel_w == 1) {
      const int64_t rows = p.w_stride[2] == p.kernel_w || p.kernel_h == 1 ? 1 : p.kernel_h, taps = p.taps() / rows;
      for (int64_t i = 0; i < rows; ++i)
        transpose_in(from + i * p.w_stride[2], column, p.out_w, taps, weights + i * taps * tiling.weight_tap,
                     tiling.weight_tap, staging);
      return;
    }
    for (int64_t t = 0; t < p.taps(); ++t) {
      const T* tap = from + tap_at(t / p.kernel_w, t % p.kernel_w);
      for (int64_t v = 0; v < p.out_w; ++v) weights[t * tiling.weight_tap + v] = load(tap[v * column]);
    }
  }
  // A part of what the next task packs, on its way to the cache: planes of small images are too short for a processor to
  // notice that they follow each other. Larger ones it follows.
  void prefetch_planes(int64_t part, int64_t parts) const {
    if (tiling.strips > 1) return;
    const int64_t first = (first_group + groups) * group;
    const auto prefetch = [&](const T* from, const int64_t (&stride)[4], int64_t pixels) {
      const int64_t count = group * pixels;
      if (stride[3] != 1 || stride[1] != pixels || count * int64_t(sizeof(T)) > max_prefetched_planes) return;
      prefetch_runs(from + count * part / parts, 1, 0, count * (part + 1) / parts - count * part / parts);
    };
    if (tiling.pass != Pass::grad_input) prefetch(x_row(first, 0), p.x_stride, p.in_h * p.in_w);
    if (tiling.pass != Pass::forward) prefetch(y_row(first, 0), p.y_stride, p.out_h * p.out_w);
  }
  // The next row and group of W on their way to the cache.
  void prefetch_weights(int64_t g, int64_t h) const {
    if (g < first_group + groups && p.w_stride[3] == 1)
      prefetch_runs(w_row(g, 0, 0, h), p.out_w, p.w_stride[5], p.taps());
  }

  // --- forward and grad_input: sums over taps

  // Adds the tap (i, j) of a row to the list, if it reads or is read by the row. `place` is what a tap row of the list
  // is added to.
  template <class W>
  void add_forward(TapList<W, A>& list, const W* w, int64_t slot, int64_t i, int64_t j, int64_t row) const {
    // What vectors read past the row is another row, and is not used.
    list.add(w, packed_input(slot, i, j), 0, rows_follow() ? (p.out_h - row) * p.out_w : p.out_w);
  }
  // Whether the rows of a tap of W are a run of memory.
  bool rows_follow() const { return tiling.in_place && p.w_stride[4] == p.out_w; }
  template <class W>
  void add_gather(TapList<W, A>& list, const W* w, int64_t i, int64_t j, int64_t row, int64_t h) const {
    if (shift) return list.add(w, packed_gradient(row, i, h, j), 0, p.out_w);
    const int64_t first = p.dilation_w * j / p.stride_w - tiling.first_m;
    list.add(w, packed_gradient(row, i, h, j), first, first + p.out_w);
  }

  // A strip in place: block by block.
  void sum_in_place(int64_t first_channel, int64_t channels) const {
    const bool gather = tiling.pass == Pass::grad_input;
    const int64_t g = first_channel / group;
    TapList<T, A> list{static_cast<Tap<T, A>*>(list_memory), 0, 0, 0};
    for (int64_t b = 0; b < tiling.block_count; ++b) {
      const TapBlock& block = tiling.blocks[b];
      const TapIndex first = tiling.taps[block.begin];
      prefetch_planes(b, tiling.block_count);
      // Where the next block, or the next task, begins.
      int64_t next = 0;
      if (b + 1 < tiling.block_count) {
        const TapIndex after = tiling.taps[tiling.blocks[b + 1].begin];
        next = tap_at(after.i, after.j) - tap_at(first.i, first.j);
      } else if (tiling.strips == 1) {
        next = p.w_stride[1] - tap_at(first.i, first.j);
      }
      const int64_t run = (end - begin) * p.w_stride[4];
      int64_t slot = 0;
      for (int64_t row = begin; row < end; row += step()) {
        if (!gather && row > begin) {
          const int64_t next_slot = first_slot(row);
          list.move(p.w_stride[4], (next_slot - slot) * tiling.packed_row, rows_follow() ? -p.out_w : 0);
          slot = next_slot;
        } else {
          list.clear();
          if (!gather) slot = first_slot(row);
        }
        for (int64_t t = block.begin; t < block.end && (gather || row == begin); ++t) {
          const auto [i, j] = tiling.taps[t];
          if (!gather) {
            add_forward(list, static_cast<const T*>(w_row(g, i, j, row)), slot, i, j, row);
          } else if (shift) {
            for_each_reader(row, i, [&, i = i, j = j](int64_t h) {
              add_gather(list, static_cast<const T*>(w_row(g, i, j, h)), i, j, row, h);
            });
          } else if (tiling.flat) {
            // Position 0 is the first pixel of the strip.
            const int64_t at = (i * p.dilation_h - p.padding_h - begin) * p.out_w;
            const A* shifted = packed + (begin - i * p.dilation_h + p.padding_h - first_reader()) * p.out_w;
            list.add(w_row(g, i, j, 0), shifted, at, at + p.out_h * p.out_w);
          } else if (const int64_t h = reader(row, i); h >= 0) {
            add_gather(list, static_cast<const T*>(w_row(g, i, j, h)), i, j, row, h);
          }
        }
        const int64_t done = (row - begin) * p.w_stride[4], left = run - done;
        const Ahead ahead{prefetch_distance, left - prefetch_distance, next + prefetch_distance - run};
        add_taps(list, tiling.packed_channel, channels, columns(), gather || b > 0, sums_of(row, block.phase),
                 tiling.sum_channel, tiling.cached ? nullptr : &ahead);
      }
    }
  }

  void forward() const {
    for_each_chunk([&](int64_t first, int64_t channels) {
      pack_input(first, channels);
      if (tiling.in_place) sum_in_place(first, channels);
      for_each_row_of_y([&](int64_t row, int64_t columns) {
        if (!tiling.in_place) forward_by_pixel(first, channels, row);
        unpack_row(sums_of(row), tiling.sum_channel, channels, columns, y_row(first, row), p.y_stride[1],
                   p.y_stride[3]);
      });
    });
  }

  void forward_by_pixel(int64_t first_channel, int64_t channels, int64_t row) const {
    TapList<A, A> list{static_cast<Tap<A, A>*>(list_memory), 0, 0, 0};
    const int64_t width = min(group, channels), slot = first_slot(row);
    for (int64_t c = 0; c < channels; c += width) {
      const int64_t g = (first_channel + c) / group;
      pack_weights(g, row);
      prefetch_weights(g + 1, row);
      list.clear();
      for (int64_t t = 0; t < p.taps(); ++t) {
        const int64_t i = t / p.kernel_w, j = t % p.kernel_w;
        add_forward(list, static_cast<const A*>(weights + t * tiling.weight_tap), slot, i, j, row);
        list.taps[t].shifted += c * tiling.packed_channel;
      }
      add_taps(list, tiling.packed_channel, width, tiling.columns, false, sums_of(row) + c * tiling.sum_channel,
               tiling.sum_channel, nullptr);
    }
  }

  void grad_input() const {
    for_each_chunk([&](int64_t first, int64_t channels) {
      pack_gradients(first, channels);
      std::memset(
          sums, 0,
          size_t(tiling.flat ? tiling.phase_count * tiling.sum_phase : (end - begin) * tiling.sum_rows) * sizeof(A));
      if (tiling.in_place) {
        sum_in_place(first, channels);
      } else {
        for (int64_t h = first_reader(); h <= last_reader(); ++h) grad_input_by_pixel(first, channels, h);
      }
      for (int64_t row = begin; row < end; ++row) {
        const bool joined = p.stride_w == 1 && !tiling.by_column;
        const int64_t pitch = shift ? p.in_w + V::lanes : p.in_w;
        for (int64_t c = 0; c < channels && !joined; ++c) join_phases(row, c, row_memory + c * pitch);
        unpack_row(joined ? sums_of(row) : row_memory, joined ? tiling.sum_channel : pitch, channels, p.in_w,
                   x_row(first, row), p.x_stride[1], p.x_stride[3]);
      }
    });
  }

  // What output row h adds to the strip.
  void grad_input_by_pixel(int64_t first_channel, int64_t channels, int64_t h) const {
    TapList<A, A> list{static_cast<Tap<A, A>*>(list_memory), 0, 0, 0};
    const int64_t width = min(group, channels), first = row_axis.first(h);
    for (int64_t c = 0; c < channels; c += width) {
      const int64_t g = (first_channel + c) / group;
      pack_weights(g, h);
      prefetch_weights(g + 1, h);
      for (int64_t f = 0; f < tiling.phase_count; ++f)
        for (int64_t t = tiling.phase_begin[f]; t < tiling.phase_begin[f + 1];) {
          const int64_t i = tiling.taps[t].i, row = first + i * p.dilation_h;
          list.clear();
          for (; t < tiling.phase_begin[f + 1] && tiling.taps[t].i == i; ++t) {
            if (row < begin || row >= end) continue;
            const int64_t j = tiling.taps[t].j;
            add_gather(list, static_cast<const A*>(weights + (i * p.kernel_w + j) * tiling.weight_tap), i, j, row, h);
            list.taps[list.count - 1].shifted += c * tiling.packed_channel;
          }
          if (list.count > 0)
            add_taps(list, tiling.packed_channel, width, tiling.columns, true, sums_of(row, f) + c * tiling.sum_channel,
                     tiling.sum_channel, nullptr);
        }
    }
  }

  // A row of grad_input from the sums of its phases.
  void join_phases(int64_t row, int64_t c, A* to) const {
    const A* from = sums_of(row) + c * tiling.sum_channel;
    if (shift) return join_shifted(from, to);
    if (tiling.flat && p.stride_w == 1) {  // a phase is a tap column j: position v is column v + d j - padding
      for (int64_t q = 0; q < p.in_w; q += V::lanes) {
        V sum = V::zero();
        for (int64_t j = 0; j < p.kernel_w; ++j) {
          const int64_t at = q + p.padding_w - j * p.dilation_w;
          const A* phase = from + j * tiling.sum_phase;
          sum.value +=
              (at >= 0 && at + V::lanes <= p.out_w ? V::load(phase + at) : V::load_range(phase, at, 0, p.out_w)).value;
        }
        sum.store(to + q);
      }
      return;
    }
    if (tiling.flat) clear_few(to, p.in_w);
    for (int64_t f = 0; f < tiling.phase_count; ++f, from += tiling.sum_phase) {
      const int64_t first =
          tiling.flat ? f * p.dilation_w - p.padding_w : tiling.first_m * p.stride_w + tiling.phases[f] - p.padding_w;
      const int64_t low = first < 0 ? ceil_div(-first, p.stride_w) : 0;
      const int64_t high =
          min(tiling.flat ? p.out_w : tiling.columns, first < p.in_w ? ceil_div(p.in_w - first, p.stride_w) : 0);
      if (tiling.flat) {
        for (int64_t v = low; v < high; ++v) to[v * p.stride_w + first] += from[v];
      } else {
        for (int64_t m = low; m < high; ++m) to[m * p.stride_w + first] = from[m];
      }
    }
  }

  // The same where the border shifts. Runs that are added to the same columns are added to each other first. `to` has room
  // for a vector past the row.
  void join_shifted(const A* from, A* to) const {
    for (int64_t q = 0; q < p.in_w + V::lanes; q += V::lanes)
      V::zero().store(to + (q + V::lanes <= p.in_w + V::lanes ? q : p.in_w));
    const WindowRun* const end = tiling.runs + tiling.run_count;
    for (int64_t j = 0; j < p.kernel_w; ++j, from += tiling.sum_phase, to += p.dilation_w)
      for (const WindowRun* run = tiling.runs; run != end;) {
        if (run->slope == 0) {
          A sum = 0;
          for (int64_t i = 0; i < run->count; ++i) sum += from[run->column + i];
          to[run->first] += sum;
          ++run;
          continue;
        }
        if (run->slope != 1) {
          for (int64_t i = 0; i < run->count; ++i) to[run->first + i * run->slope] += from[run->column + i];
          ++run;
          continue;
        }
        const WindowRun* last = run + 1;
        for (; last != end && last->first == run->first && last->slope == 1 && last->count <= run->count;) ++last;
        for (int64_t m = 0; m < run->count; m += V::lanes) {
          V sum = V::zero();
          for (const WindowRun* other = run; other != last; ++other)
            sum.value = sum.value + V::load_range(from + other->column, m, 0, other->count).value;
          A* at = to + run->first + m;
          sum.value = sum.value + V::load(at).value;
          sum.store(at);
        }
        run = last;
      }
  }

  // --- grad_weight: sums over channels

  // A block's taps of a row (of a flat strip, all rows).
  void grad_weight_block(const TapBlock& block, int64_t c, int64_t channels, int64_t row, bool accumulate,
                         A* to) const {
    const A* shifted[max_block_taps];
    const int64_t slot = first_slot(row);
    for (int64_t t = block.begin; t < block.end; ++t)
      shifted[t - block.begin] = packed_input(slot, tiling.taps[t].i, tiling.taps[t].j) + c * tiling.packed_channel;
    const A* grad = sums_of(row) + c * tiling.sum_channel;
    switch (block.end - block.begin) {
#define PYINVOLUTION_CASE(taps)                                                                                   \
  case taps:                                                                                                      \
    return multiply_gradient<taps>(grad, tiling.sum_channel, shifted, tiling.packed_channel, channels, columns(), \
                                   accumulate, to, tiling.weight_tap);
      PYINVOLUTION_CASE(1)
      PYINVOLUTION_CASE(2)
      PYINVOLUTION_CASE(3)
      PYINVOLUTION_CASE(4)
      PYINVOLUTION_CASE(5)
      PYINVOLUTION_CASE(6)
      PYINVOLUTION_CASE(7)
      PYINVOLUTION_CASE(8)
      PYINVOLUTION_CASE(9)
#undef PYINVOLUTION_CASE
    }
  }

  // Neighbours of grad_weight from scratch memory.
  void store_run(const A* from, int64_t count, T* to) const {
    if (tiling.past_cache)
      stream_run(from, count, to);
    else
      unpack_row(from, 0, 1, count, to, 0, 1);
  }

  // A tap of the strip from `from`, whose rows are weight_row apart.
  void store_tap(const A* from, int64_t g, const TapIndex& tap) const {
    if (p.w_stride[5] != 1) {
      for (int64_t row = begin; row < end; ++row)
        unpack_row(from + (row - begin) * tiling.weight_row, 0, 1, p.out_w, w_row(g, tap.i, tap.j, row), 0,
                   p.w_stride[5]);
    } else if (tiling.weight_row == p.out_w && p.w_stride[4] == p.out_w) {
      store_run(from, (end - begin) * p.out_w, w_row(g, tap.i, tap.j, begin));
    } else {
      for (int64_t row = begin; row < end; ++row)
        store_run(from + (row - begin) * tiling.weight_row, p.out_w, w_row(g, tap.i, tap.j, row));
    }
  }

  void grad_weight() const {
    const bool several = groups * group > tiling.chunk;  // chunks of channels, of one group
    for_each_chunk([&](int64_t first, int64_t channels) {
      const bool accumulate = first > first_group * group, last = first + channels == (first_group + groups) * group;
      pack_input(first, channels);
      pack_unshifted(first, channels);
      if (!tiling.in_place && !several) {
        for (int64_t row = begin; row < end; ++row) grad_weight_by_pixel(row);
        return;
      }
      for (int64_t b = 0; b < tiling.block_count; ++b) {
        const TapBlock& block = tiling.blocks[b];
        A* to = weights + (several ? block.begin * tiling.weight_tap : 0);
        prefetch_planes(b, tiling.block_count);
        for (int64_t row = begin; row < end; row += step())
          grad_weight_block(block, 0, channels, row, accumulate, to + (row - begin) * tiling.weight_row);
        for (int64_t t = block.begin; last && t < block.end; ++t)
          store_tap(to + (t - block.begin) * tiling.weight_tap, first_group, tiling.taps[t]);
      }
    });
    if (tiling.past_cache) stream_fence();
  }

  // All taps of a row, group by group.
  void grad_weight_by_pixel(int64_t row) const {
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t b = 0; b < tiling.block_count; ++b)
        grad_weight_block(tiling.blocks[b], g * group, group, row, false,
                          weights + tiling.blocks[b].begin * tiling.weight_tap);
      const int64_t rows = p.w_stride[2] == p.kernel_w && p.w_stride[3] == 1 ? 1 : p.kernel_h, taps = p.taps() / rows;
      for (int64_t i = 0; i < rows; ++i)
        unpack_row(weights + i * taps * tiling.weight_tap, tiling.weight_tap, taps, p.out_w,
                   w_row(first_group + g, i, 0, row), p.w_stride[3], p.w_stride[5]);
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
