// Involution with any kernel, stride, dilation and number of channels in a group.
//
//   forward       Y[n,c,p]   = sum over taps k of W[n,g(c),k,p] * X[n,c, stride*p + dilation*k - padding]
//   grad_input    X[n,c,q]   = sum over (k,p) with stride*p + dilation*k - padding = q of W[n,g(c),k,p] * Y[n,c,p]
//   grad_weight  W[n,g,k,p] = sum over c of group g of Y[n,c,p] * X[n,c, stride*p + dilation*k - padding]
//
// X is N,C,H,W; W is N,G,Kh,Kw,Ho,Wo; Y is N,C,Ho,Wo (in the gradients, grad_output). The gradient of the input is the
// forward's sum over taps in reverse, whose weights lie at the pixel of Y instead of at that of the result; with a
// stride it is one such sum for each remainder of the pixels of X by the stride, with a part of the taps (config.cuh).
//
// A block has a tile of pixels of a few planes; a plane is up to 8 channels of a group of an image. It brings the pixels
// below the tile into shared memory, with their halo and zeros outside the image, as vectors of channels in the type of
// the sums: [plane][row][position][channel]. Small images share a block, so that its threads are busy.
//
// A thread owns a run of 4 pixels in a row and all channels of a plane. For each kernel row it slides over the taps with
// 4 positions in registers: the next tap needs one position more and one less, so that a value of X is read from shared
// memory once for 4 taps, and a weight once for up to 8 channels. Pixels of a run are dilation/gcd(stride, dilation)
// apart, and taps go in steps of stride/gcd, to make this hold for any stride and dilation.
//
// With a stride of 1, the pixels with one remainder by the dilation can be an image of their own, a class, for smaller halos
// (in_classes and class_of in config.cuh): each block has pixels of one class.
//
// Weights with dense columns (or any other strides) are read from global memory into registers, 16 taps and pixels at a
// time, coalesced over the runs of a row. Weights with dense taps, whose pixels are far apart, come through shared
// memory as they are stored, in 16-byte pieces: a few kernel rows of all pixels at a time.
//
// A border that shifts windows changes what is brought into shared memory, and little of the sums (class_of in
// config.cuh): there are always classes, X repeats beyond its borders, and rows of X and taps of W take the places that they
// have in a window that is not moved. In the gradient of the input, a pixel sums over
// those whose windows have it, up to K + K/2 in a row and in a column, and a product without a tap is left out. Weights
// always come through shared memory, and channels in vectors of 4.
//
// Bytes: each weight crosses the memory bus once, and 8 channels share its read from L2; an x is read 1 to 3 times,
// mostly from L2. Limit: with up to 4 channels in a group, the bytes of W; with many, a pixel and channel takes for each
// tap 1 FMA, 1/4 of a 16-byte load of x and 1/8 of a load of a weight.
#pragma once

#include "config.cuh"

namespace pyinvolution::cuda::sliding {

template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Vector {
  T v[V];
};

// The work of a block: units [unit, end_unit) from `chunk` on, a tile that begins at pixel (row, column).
struct Tile {
  int unit, end_unit, chunk, row, column, class_h, class_w;
  // Pixels of the class, and where its weights begin (enter_class).
  int halo_height, halo_width, w_height, w_width, w_offset;
};

__device__ __forceinline__ Tile tile_of_block(const KernelParams& q) {
  // Blocks that run at the same time differ first in what reads the same weights, then in the group, then in the tile.
  const auto [block, parity] = divide(int(blockIdx.x), q.by_classes);
  const auto [class_h, class_w] = divide(parity, q.by_classes_w);
  const auto [units, chunk] = divide(block, q.by_chunk_blocks);
  const auto [tiles, unit] = divide(units, q.by_unit_blocks);
  const auto [rows, column] = divide(tiles, q.by_tiles_w);
  const auto [image, row] = divide(rows, q.by_tiles_h);
  const int first = image * q.image_units;
  return {first + unit * q.units,
          min(first + (unit + 1) * q.units, first + q.image_units),
          chunk * q.unit_chunks,
          row * q.rows,
          column * q.columns,
          class_h,
          class_w,
          0,
          0,
          0,
          0,
          0};
}

// An element of the parameters, whose addresses are constants.
__device__ __forceinline__ Axis axis_of(const Axis (&axes)[max_classes], int index) {
  Axis axis = axes[0];
#pragma unroll
  for (int i = 1; i < max_classes; ++i)
    if (index == i) axis = axes[i];
  return axis;
}

__device__ __forceinline__ bool inside(int h, int w, int height, int width) {
  return h >= 0 && h < height && w >= 0 && w < width;
}

// The number of pixels of a class, where the first one has `pixels` and those from `whole` on have one less.
__device__ __forceinline__ int pixels_of(int number, int whole, int pixels) {
  return pixels - (number >= whole ? 1 : 0);
}

// Makes the tile and its axes those of its class. Returns where its pixels begin in the image that has a halo and in the
// tiled one.
struct Begin {
  int halo, tiled;
};
template <bool ToInput, bool Shifts>
__device__ __forceinline__ Begin enter_class(const KernelParams& q, Tile& tile, Axis& rows, Axis& columns) {
  if (!Shifts && !q.in_classes) {
    tile.halo_height = q.x_area.height, tile.halo_width = q.x_area.width;
    tile.w_height = q.w_height, tile.w_width = q.w_width;
    return {};
  }
  const Classes &of_h = q.classes_h, &of_w = q.classes_w;
  const bool earlier_h = tile.class_h < of_h.first, earlier_w = tile.class_w < of_w.first;
  const int halo_h = tile.class_h - of_h.first + (earlier_h ? of_h.dilation : 0);
  const int halo_w = tile.class_w - of_w.first + (earlier_w ? of_w.dilation : 0);
  rows.pixels = pixels_of(tile.class_h, of_h.whole, rows.pixels), rows.padding += earlier_h;
  columns.pixels = pixels_of(tile.class_w, of_w.whole, columns.pixels), columns.padding += earlier_w;
  tile.halo_height = pixels_of(halo_h, of_h.halo_whole, q.x_area.height);
  tile.halo_width = pixels_of(halo_w, of_w.halo_whole, q.x_area.width);
  tile.w_height = pixels_of(ToInput ? halo_h : tile.class_h, ToInput ? of_h.halo_whole : of_h.whole, q.w_height);
  tile.w_width = pixels_of(ToInput ? halo_w : tile.class_w, ToInput ? of_w.halo_whole : of_w.whole, q.w_width);
  tile.w_offset = (ToInput ? halo_h : tile.class_h) * of_h.weights + (ToInput ? halo_w : tile.class_w) * of_w.weights;
  // A pixel that does not exist is read at the beginning, which for a class without pixels must be that of the tensor.
  const bool has_pixels = tile.halo_height > 0 && tile.halo_width > 0;
  return {has_pixels ? halo_h * of_h.halo + halo_w * of_w.halo : 0,
          tile.class_h * of_h.tiled + tile.class_w * of_w.tiled};
}

// By how many taps a window is moved to the left into an image of `pixels` pixels, with its first tap at `first`.
__device__ __forceinline__ int moved(int first, int taps, int pixels) {
  return first < 0 ? first : max(0, first + taps - pixels);
}
// The same number modulo `period`, if it is less than that outside.
__device__ __forceinline__ int wrapped(int number, int period) {
  return number < 0 ? number + period : number >= period ? number - period : number;
}
// The pixel inside that an image without end has there, if it repeats with `period` beyond its borders.
__device__ __forceinline__ int repeated(int pixel, int period, int pixels) {
  return pixel < 0 ? pixel + period : pixel >= pixels ? pixel - period : pixel;
}

// The pixels of Y, of an axis, whose windows have this pixel of X, and the first pixel of a window: in a class, what
// pyinvolution/axis.h says with a dilation of 1.
struct Readers {
  int begin, end;
};
__device__ __forceinline__ Readers readers_of(int pixel, int taps, int pixels) {
  return {pixel < taps ? 0 : pixel - (taps - 1 - taps / 2), pixel >= pixels - taps ? pixels : pixel + taps / 2 + 1};
}
__device__ __forceinline__ int first_of_window(int pixel, int taps, int pixels) {
  return min(max(pixel - taps / 2, 0), pixels - taps);
}
// The most readers that a pixel of [first, last] has, or a little more.
__device__ __forceinline__ int most_readers(int first, int last, int taps, int pixels) {
  if (first >= taps && last < pixels - taps) return taps;
  return pixels < 2 * taps ? pixels : taps + taps / 2;
}

// Brings vectors of channels of the block's units, from `first_vector` of each on and from pixel (first_row,
// first_column) on. Outside the image there are zeros, or it repeats with the size of the kernel. Shifts: it is a class.
template <int V, bool Repeats, class A, class T>
__device__ __forceinline__ void bring_image(Vector<A, V>* shared, const T* x, const KernelParams& q, const View& view,
                                            const Area& area, const Tile& tile, int height, int width, int first_vector,
                                            int first_row, int first_column) {
  const auto [outer, inner] = divide(int(threadIdx.x), area.by_load);
  const int lane = area.channels_inner ? inner : outer, other = area.channels_inner ? outer : inner;
  const auto [own_row, own_column] = divide(other, area.by_column_lanes);
  if (lane >= area.lanes || own_row >= area.row_lanes) return;
  constexpr int batch = 8 / V;
#pragma unroll 1
  for (int vector = lane; vector < q.units * q.unit_vectors; vector += area.lanes) {
    const auto [unit_index, of_unit] = divide(vector, q.by_unit_vectors);
    const int unit = tile.unit + unit_index;
    const auto [n, g] = divide(unit, q.by_groups);
    const int channel = (first_vector + of_unit) * V, channels = q.group_channels - channel;
    if (unit >= tile.end_unit || channels <= 0) continue;
    const T* from = x + (n * view.n + int64_t(g * q.group_channels + channel) * view.c);
    const bool vectors = view.vectors && channels >= V;
    const T* of_channel[V];
#pragma unroll
    for (int c = 0; c < V; ++c) of_channel[c] = from + (c < channels ? c : 0) * view.c;
#pragma unroll 1
    for (int column = own_column; column < area.columns; column += area.column_lanes) {
      const int w = Repeats ? repeated(first_column + column, q.kernel_w, width) : first_column + column;
      const bool column_exists = w >= 0 && w < width;
      const int row_offset = column_exists ? w * view.w : 0;
      Vector<A, V>* to = shared + (vector * area.plane + column + int(area.by_every.quotient(uint32_t(column))));
#pragma unroll 1
      for (int first = own_row; first < area.rows; first += batch * area.row_lanes) {
        Vector<T, V> values[batch];
#pragma unroll
        for (int i = 0; i < batch; ++i) {
          const int at = first_row + first + i * area.row_lanes, h = Repeats ? repeated(at, q.kernel_h, height) : at;
          const bool exists = column_exists && unsigned(h) < unsigned(height);
          const int pixel = exists ? h * view.h + row_offset : 0;
          if (vectors) {
            values[i] = *reinterpret_cast<const Vector<T, V>*>(from + pixel);
          } else {
#pragma unroll
            for (int c = 0; c < V; ++c) values[i].v[c] = of_channel[c][pixel];
          }
        }
#pragma unroll
        for (int i = 0; i < batch; ++i) {
          const int row = first + i * area.row_lanes, at = first_row + row;
          const int h = Repeats ? repeated(at, q.kernel_h, height) : at;
          const bool exists = column_exists && unsigned(h) < unsigned(height);
          Vector<A, V> all;
#pragma unroll
          for (int c = 0; c < V; ++c) all.v[c] = exists && c < channels ? load(values[i].v[c]) : A(0);
          if (row < area.rows) to[row * area.pitch] = all;
        }
      }
    }
  }
}

__device__ __forceinline__ int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// The low bits of an address, in bytes from a multiple of 16.
template <class T>
__device__ __forceinline__ int offset_of(const T* address) {
  return int(reinterpret_cast<uintptr_t>(address) & 15);
}

// The place in a row of weights in shared memory: pixels of a run are neighbours.
__device__ __forceinline__ int place_in_runs(int column, const KernelParams& q) {
  if (q.spacing == 1) return column;
  const auto [span, of_span] = divide(column, q.by_span);
  const auto [i, first] = divide(of_span, q.by_spacing);
  return (span * q.spacing + first) * run_pixels + i;
}

// Where the border is shifted: the row of W's pixels that a row of the tile needs in a step, and which of its kernel rows.
// In the gradient of the input a step is a pixel that has the row in its window; a row beyond the image stands for none.
struct WeightsRow {
  int pixel, kernel_row;
};
template <bool ToInput>
__device__ __forceinline__ WeightsRow weights_row(const KernelParams& q, int row, int step, int height) {
  if constexpr (!ToInput) return {row, 0};
  if (row >= height) return {height, 0};
  const Readers readers = readers_of(row, q.kernel_h, height);
  const int pixel = readers.begin + step;
  return {pixel < readers.end ? pixel : height, row - first_of_window(pixel, q.kernel_h, height)};
}

// Brings the weights of `kernel_rows` kernel rows from `kernel_row` on, of the tile's pixels, into shared memory:
// [unit][row][tap][pixel]. For the gradient of the input, the pixels are those of the result, to which the weights of
// others lead; a tap's place is that in the sum, and weights that do not exist are zero.
//
// Where taps are inner, 2 or 4 threads bring those of a pixel in 16-byte pieces; the pieces at both ends have some of its
// neighbours' too. Loads have up to 64 bytes in a row, and stores meet in few banks. Else a thread brings a pixel's, tap by
// tap, and its neighbours those of the next pixels.
//
// Where the border is shifted, a tap's place is that in the window that is not moved.
template <bool ToInput, bool Shifts, int Batch, class T>
__device__ __forceinline__ void bring_weights(T* shared, const T* w, const KernelParams& q, const Tile& tile,
                                              const Axis& columns, int first_row, int first_column, int kernel_row,
                                              int kernel_rows) {
  constexpr int elements = 16 / int(sizeof(T));
  const int lanes = 1 << q.w_lane_bits, lane = int(threadIdx.x) & (lanes - 1);
  const int length = kernel_rows * q.kernel_w;
  // Of a shifted border: the pixels of the class. In the gradient of the input, each row has a kernel row of its own.
  const int height = tile.w_height, width = tile.w_width, image_width = tile.halo_width;
#pragma unroll 1
  for (int unit_index = 0; unit_index < min(q.units, tile.end_unit - tile.unit); ++unit_index) {
    const auto [n, g] = divide(tile.unit + unit_index, q.by_groups);
    const int64_t of_unit = n * q.w.n + (g * q.w.g + tile.w_offset + (ToInput && Shifts ? 0 : kernel_row * q.w.kh));
    T* const to_unit = shared + unit_index * q.rows * q.w_row_pitch;
    if (!q.taps_inner) {
      const int pixels = q.rows * q.columns;
#pragma unroll 1
      for (int pixel = int(threadIdx.x); pixel < pixels; pixel += int(blockDim.x)) {
        const auto [row, column] = divide(pixel, q.by_columns);
        if constexpr (Shifts) {
          T* const to_pixel = to_unit + (row * q.w_row_pitch + column);
          const auto [h, own_kernel_row] = weights_row<ToInput>(q, tile.row + row, kernel_row, height);
          const int own = tile.column + column;
          if (h >= height || own >= width) continue;
          const T* from = w + (of_unit + (h * q.w.h + own_kernel_row * q.w.kh));
          if constexpr (ToInput) {
            const Readers readers = readers_of(own, q.kernel_w, width);
            T* to = to_pixel + (readers.begin - own + q.kernel_w - 1) * q.w_pitch;
#pragma unroll 4
            for (int v = readers.begin; v < readers.end; ++v, to += q.w_pitch)
              *to = from[v * q.w.w + (own - first_of_window(v, q.kernel_w, width)) * q.w.kw];
          } else {
            const int first =
                wrapped(moved(own * columns.stride - columns.padding, q.kernel_w, image_width), q.kernel_w);
            from += own * q.w.w + first * q.w.kw;
            T* to = to_pixel;
#pragma unroll 1
            for (int kh = 0; kh < kernel_rows; ++kh, from += q.w.kh) {
              const T* tap = from;
#pragma unroll 4
              for (int place = 0; place < q.kernel_w; ++place, to += q.w_pitch) {
                *to = *tap;
                tap += first + place + 1 == q.kernel_w ? (1 - q.kernel_w) * q.w.kw : q.w.kw;
              }
            }
          }
          continue;
        }
        const int h = first_row + row, first_tap = ToInput ? columns.first_tap : 0;
        int v = first_column + column;
        if (h < 0 || h >= height) continue;
        T* to = to_unit + (row * q.w_row_pitch + place_in_runs(column, q));
#pragma unroll 1
        for (int kh = 0; kh < kernel_rows; ++kh) {
          const T* from = w + (of_unit + (h * q.w.h + v * q.w.w + kh * q.w.kh + first_tap * q.w.kw));
          const int taps = ToInput ? columns.taps : q.kernel_w;
          const int step = ToInput ? columns.tap_step * q.w.kw + columns.dilation * q.w.w : q.w.kw;
#pragma unroll 4
          for (int tap = 0; tap < taps; ++tap) {
            T value;
            store(Accumulator<T>(0), &value);
            if (unsigned(v) < unsigned(width)) value = *from;
            *to = value;
            from += step, to += q.w_pitch;
            if (ToInput) v += columns.dilation;
          }
        }
      }
      continue;
    }
    // Pixels whose pieces are inside the tensor altogether, by their offset from the unit's first weight.
    const int64_t before = of_unit - elements, after = q.w.count - of_unit - length - elements;
    const int first_within = int(before >= 0 ? 0 : -before), last_within = int(min64(after, int64_t(1) << 30));
    const int pixels = q.rows * q.w_columns;
#pragma unroll 1
    for (int pixel = int(threadIdx.x) >> q.w_lane_bits; pixel < pixels; pixel += int(blockDim.x) >> q.w_lane_bits) {
      const auto [row, column] = divide(pixel, q.by_w_columns);
      const int v = (Shifts && ToInput ? max(0, min(first_column, width - q.w_columns)) : first_column) + column;
      int h = first_row + row, own_kernel_row = 0;
      if constexpr (Shifts && ToInput) {
        const WeightsRow own = weights_row<ToInput>(q, tile.row + row, kernel_row, height);
        h = own.pixel, own_kernel_row = own.kernel_row;
      }
      if (h < 0 || h >= height) continue;
      const bool exists = v >= 0 && v < width;
      if ((Shifts || !ToInput) && !exists) continue;
      const int at = exists ? h * q.w.h + v * q.w.w + own_kernel_row * q.w.kh : 0;
      const T* from = w + (of_unit + at);
      const bool within = exists && at >= first_within && at <= last_within;
      T* to = to_unit + (row * q.w_row_pitch + (ToInput ? 0 : place_in_runs(column, q)));
      // The place of tap k of a kernel row is k - `turn`, or K more for the taps before `turn`.
      int turn = 0;
      if constexpr (Shifts && !ToInput) {
        const int to_left = moved(v * columns.stride - columns.padding, q.kernel_w, image_width);
        turn = to_left > 0 ? to_left : to_left + q.kernel_w;
        to -= turn * q.w_pitch;
      }
      // Pieces are numbered from the 16 bytes on in which the first weight is.
      int begin = lane * elements - offset_of(from) / int(sizeof(T));
#pragma unroll 1
      for (; begin < length; begin += lanes * Batch * elements) {
        Vector<T, elements> values[Batch];
#pragma unroll
        for (int i = 0; i < Batch; ++i) {
          const int first = begin + i * lanes * elements;
          if (first >= length) break;
          if (within) {
            values[i] = *reinterpret_cast<const Vector<T, elements>*>(from + first);
          } else {
#pragma unroll
            for (int e = 0; e < elements; ++e) {
              store(Accumulator<T>(0), &values[i].v[e]);
              if (exists && first + e >= 0 && first + e < length) values[i].v[e] = from[first + e];
            }
          }
        }
#pragma unroll
        for (int i = 0; i < Batch; ++i) {
          const int first = begin + i * lanes * elements;
          if (first >= length) break;
          int of_row = first;
          if constexpr (Shifts && !ToInput) of_row = first < 0 ? first : divide(first, q.by_kernel_w).remainder;
#pragma unroll
          for (int e = 0; e < elements; ++e) {
            const int tap = first + e, more = Shifts && !ToInput && of_row < turn ? q.kernel_w : 0;
            if constexpr (Shifts && !ToInput) of_row = of_row + 1 == q.kernel_w ? 0 : of_row + 1;
            if (unsigned(tap) >= unsigned(length)) continue;
            if constexpr (Shifts && ToInput) {
              const int to_column = first_of_window(v, q.kernel_w, width) + tap - tile.column;
              if (unsigned(to_column) < unsigned(q.columns))
                to[(v - first_column - to_column) * q.w_pitch + to_column] = values[i].v[e];
            } else if constexpr (Shifts) {
              to[(tap + more) * q.w_pitch] = values[i].v[e];
            } else if constexpr (ToInput) {
              // With a stride or a dilation of 1 this is linear in the tap.
              if (q.plain) {
                const int place = columns.first_tap - tap, to_column = column - place * columns.dilation;
                if (unsigned(to_column) < unsigned(q.columns)) to[place * q.w_pitch + to_column] = values[i].v[e];
                continue;
              }
              if (tap > columns.first_tap) continue;
              const auto [place, rest] = divide(columns.first_tap - tap, q.by_tap_step);
              const int to_column = column - place * columns.dilation;
              if (rest == 0 && place < columns.taps && unsigned(to_column) < unsigned(q.columns))
                to[place * q.w_pitch + place_in_runs(to_column, q)] = values[i].v[e];
            } else {
              to[tap * q.w_pitch] = values[i].v[e];
            }
          }
        }
      }
    }
  }
}

// Shifts: the border is shifted, and weights are staged.
template <class T, int V, int M, bool ToInput, bool Staged, bool Shifts>
__global__ void __launch_bounds__(max_threads, least_blocks<T, V>)
    apply(KernelParams q, const T* __restrict__ x, const T* __restrict__ w, T* __restrict__ y) {
  using A = Accumulator<T>;
  constexpr int P = run_pixels;
  Vector<A, V>* image = reinterpret_cast<Vector<A, V>*>(shared_memory());
  T* staged = reinterpret_cast<T*>(shared_memory() + q.w_offset);
  Tile tile = tile_of_block(q);
  Axis rows = ToInput && !Shifts ? axis_of(q.h, tile.class_h) : q.h[0];
  Axis columns = ToInput && !Shifts ? axis_of(q.w_axis, tile.class_w) : q.w_axis[0];
  const Begin begin = enter_class<ToInput, Shifts>(q, tile, rows, columns);
  x += begin.halo, y += begin.tiled;
  const int image_height = tile.halo_height, image_width = tile.halo_width;
  if (tile.row >= rows.pixels || tile.column >= columns.pixels) return;
  bring_image<V, Shifts && !ToInput>(image, x, q, q.x, q.x_area, tile, image_height, image_width, tile.chunk * M,
                                     tile.row * rows.stride - rows.padding,
                                     tile.column * columns.stride - columns.padding);
  if constexpr (!Staged) __syncthreads();

  const auto [across, run] = divide(int(threadIdx.x), q.by_runs);
  const auto [plane, row] = divide(across, q.by_rows);
  const auto [unit_index, chunk] = divide(plane, q.by_unit_chunks);
  const auto [span, first_of_span] = divide(run, q.by_spacing);
  const int unit = tile.unit + unit_index;
  const auto [n, g] = divide(unit, q.by_groups);
  const int channel = (tile.chunk + chunk) * (V * M), channels = q.group_channels - channel;
  const int h = tile.row + row, v = tile.column + span * P * q.spacing + first_of_span;
  const bool active = plane < q.planes && unit < tile.end_unit && channels > 0 && h < rows.pixels && v < columns.pixels;

  const int block = q.slides ? q.every + 1 : P * q.step;  // from the positions of a run to those of the next
  const Vector<A, V>* positions = image + (plane * M * q.x_area.plane + row * rows.stride * q.x_area.pitch +
                                           span * block + first_of_span * columns.stride);
  const T* kernels = w + (n * q.w.n + (int64_t(g) * q.w.g + tile.w_offset));
  const T* own = staged + ((unit_index * q.rows + row) * q.w_row_pitch + run * P);
  const int phases = q.slides ? q.phases : columns.taps;
  // From a tap of a phase to the next. In the gradient of the input, the weights' pixel moves along.
  const int tap_step = phases * (columns.tap_step * q.w.kw + (ToInput ? columns.dilation * q.w.w : 0));
  const int from_column = ToInput ? v - columns.padding : v;

  // Where the border is shifted. In the gradient of the input: the taps of the run, and those of each pixel among them.
  const int to_top = Shifts ? moved(h * rows.stride - rows.padding, q.kernel_h, image_height) : 0;
  const Readers row_readers = readers_of(h, q.kernel_h, image_height);
  int first_tap = 0, end_tap = columns.taps, first_taps[P] = {}, tap_counts[P] = {};
  if constexpr (Shifts && ToInput) {
    rows.taps = most_readers(tile.row, min(tile.row + q.rows, rows.pixels) - 1, q.kernel_h, image_height);
    first_tap = columns.taps, end_tap = 0;
#pragma unroll
    for (int i = 0; i < P; ++i) {
      const int pixel = min(v + i, columns.pixels - 1);
      const Readers readers = readers_of(pixel, q.kernel_w, image_width);
      first_taps[i] = readers.begin - (v + i) + columns.padding, tap_counts[i] = readers.end - readers.begin;
      first_tap = min(first_tap, first_taps[i]), end_tap = max(end_tap, first_taps[i] + tap_counts[i]);
    }
    first_tap = max(first_tap, 0) / P * P, end_tap = min(end_tap, columns.taps);
  }

  A sums[M][P][V] = {};
#pragma unroll 1
  for (int kh = 0; kh < rows.taps; ++kh) {
    const int kernel_row = rows.first_tap + kh * rows.tap_step;
    const int from_row = !ToInput ? h : Shifts ? row_readers.begin + kh : h - rows.padding + kh * rows.dilation;
    const int position_row = !Shifts ? kh : ToInput ? from_row - h + rows.padding : wrapped(kh - to_top, q.kernel_h);
    int staged_taps = 0;
    if constexpr (Staged) {
      const int after = ToInput ? 0 : kh % q.w_rows;
      if (after == 0) {
        if (kh > 0) __syncthreads();
        bring_weights<ToInput, Shifts, M == 2 ? 1 : 2>(
            staged, w, q, tile, columns, tile.row + (ToInput ? kh * rows.dilation - rows.padding : 0),
            tile.column - (ToInput ? columns.padding : 0), kernel_row, min(q.w_rows, rows.taps - kh));
        __syncthreads();
      }
      staged_taps = after * q.kernel_w;
    }
    if (!active || (ToInput && !Shifts && (from_row < 0 || from_row >= tile.w_height))) continue;
    if (ToInput && Shifts && from_row >= row_readers.end) continue;
    const Vector<A, V>* row_positions = positions + position_row * rows.dilation * q.x_area.pitch;
#pragma unroll 1
    for (int phase = 0; phase < phases; ++phase) {
      const Vector<A, V>* next = row_positions + (phase * columns.dilation + first_tap / P * (q.every + 1));
      int column = from_column + (ToInput ? phase * columns.dilation : 0);
      const T* kernel = kernels + (from_row * q.w.h + column * q.w.w + kernel_row * q.w.kh +
                                   (columns.first_tap + phase * columns.tap_step) * q.w.kw);
      int staged_tap = staged_taps + phase + first_tap;
      Vector<A, V> window[M][P];
#pragma unroll
      for (int i = 0; i < P; ++i) {
#pragma unroll
        for (int m = 0; m < M; ++m) window[m][i] = next[m * q.x_area.plane + i * q.step];
      }
      // Slides over 4 taps, or over the `left` ones at the end.
      const auto slide = [&](auto all, int left) {
        A weights[P][P];  // of a tap and a pixel
        const int tap = staged_tap;
        if (Staged || (!ToInput && q.w.vectors)) {
#pragma unroll
          for (int u = 0; u < P; ++u) {
            if (!all.value && u >= left) break;
            const auto four = *reinterpret_cast<const Vector<T, P>*>(Staged ? own + staged_tap * q.w_pitch : kernel);
#pragma unroll
            for (int i = 0; i < P; ++i) weights[u][i] = load(four.v[i]);
            kernel += tap_step, staged_tap += phases;
          }
        } else if constexpr (!Staged) {
          const auto bring = [&](auto dense) {
#pragma unroll
            for (int u = 0; u < P; ++u) {
              if (!all.value && u >= left) break;
#pragma unroll
              for (int i = 0; i < P; ++i) {
                const int at = column + i * q.spacing;
                weights[u][i] = unsigned(at) < unsigned(tile.w_width)
                                    ? load(kernel[i * (dense.value ? 1 : q.spacing * q.w.w)])
                                    : A(0);
              }
              kernel += tap_step;
              if (ToInput) column += phases * columns.dilation;
            }
          };
          if (q.w.dense) {
            bring(std::true_type{});
          } else {
            bring(std::false_type{});
          }
        }
        next += q.every + 1;
#pragma unroll
        for (int u = 0; u < P; ++u) {
          if (!all.value && u >= left) break;
#pragma unroll
          for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int i = 0; i < P; ++i) {
              // A weight of zero would turn an Inf into a NaN.
              if (Shifts && ToInput && unsigned(tap + u - first_taps[i]) >= unsigned(tap_counts[i])) continue;
#pragma unroll
              for (int c = 0; c < V; ++c) sums[m][i][c] += weights[u][i] * window[m][(i + u) % P].v[c];
            }
            // After the last tap this is not used; the image in shared memory is followed by that much.
            if (all.value) window[m][u] = next[m * q.x_area.plane + u * q.step];
            if (!all.value && u + 1 < left) window[m][u] = next[m * q.x_area.plane + u * q.step];
          }
        }
      };
      int left = (end_tap - first_tap - phase + phases - 1) / phases;
#pragma unroll 1
      for (; left >= P; left -= P) slide(std::true_type{}, P);
      if (left > 0) slide(std::false_type{}, left);
    }
  }

  if (!active) return;
  T* out = y + (n * q.y.n + int64_t(g * q.group_channels + channel) * q.y.c) +
           ((rows.first + h * rows.every) * q.y.h + (columns.first + v * columns.every) * q.y.w);
  const int step = q.spacing * columns.every * q.y.w;
  if (q.store_vectors) {
#pragma unroll
    for (int c = 0; c < M * V; ++c) {
      if (c >= channels) break;
      Vector<T, P> run_of_pixels;
#pragma unroll
      for (int i = 0; i < P; ++i) store(sums[c / V][i][c % V], &run_of_pixels.v[i]);
      *reinterpret_cast<Vector<T, P>*>(out + c * q.y.c) = run_of_pixels;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < P; ++i) {
    if (v + i * q.spacing >= columns.pixels) break;
#pragma unroll
    for (int m = 0; m < M; ++m) {
      T* to = out + (i * step + m * V * q.y.c);
      Vector<T, V> vector;
#pragma unroll
      for (int c = 0; c < V; ++c) store(sums[m][i][c], &vector.v[c]);
      if (q.y.vectors && channels >= (m + 1) * V) {
        *reinterpret_cast<Vector<T, V>*>(to) = vector;
      } else {
#pragma unroll
        for (int c = 0; c < V; ++c)
          if (m * V + c < channels) to[c * q.y.c] = vector.v[c];
      }
    }
  }
}

template <class T, int V, int Taps, bool Shifts>
__global__ void __launch_bounds__(max_threads, Shifts ? least_blocks<T, V> : 2)
    grad_weight(KernelParams q, const T* __restrict__ x, T* __restrict__ w, const T* __restrict__ y) {
  using A = Accumulator<T>;
  constexpr int P = run_pixels;
  const int vectors = q.units * q.unit_vectors;
  Vector<A, V>* image = reinterpret_cast<Vector<A, V>*>(shared_memory());
  Vector<A, V>* gradient = image + vectors * q.x_area.plane;
  A* staged = reinterpret_cast<A*>(gradient + vectors * q.y_area.plane);
  Tile tile = tile_of_block(q);
  Axis rows = q.h[0], columns = q.w_axis[0];
  const Begin begin = enter_class<false, Shifts>(q, tile, rows, columns);
  x += begin.halo, y += begin.tiled, w += tile.w_offset;
  if (tile.row >= rows.pixels || tile.column >= columns.pixels) return;
  const int first_row = tile.row * rows.stride - rows.padding;
  const int first_column = tile.column * columns.stride - columns.padding;

  const auto [across, run] = divide(int(threadIdx.x), q.by_runs);
  const auto [part, row] = divide(across, q.by_rows);
  const auto [unit_index, slot] = divide(part, q.by_slots);
  const auto [slot_row, slot_part] = divide(slot, q.by_row_slots);
  const auto [first_taps, phase] = divide(slot_part, q.by_phases);
  const auto [span, first_of_span] = divide(run, q.by_spacing);
  const int unit = tile.unit + unit_index;
  const auto [n, g] = divide(unit, q.by_groups);
  const int h = tile.row + row, local = span * P * q.spacing + first_of_span, v = tile.column + local;
  // The taps of the slot: first_tap, first_tap + phases and so on.
  const int first_tap = phase + first_taps * Taps * q.phases;
  const int count = min(Taps, (columns.taps - first_tap + q.phases - 1) / q.phases);
  const bool active =
      unit_index < q.units && unit < tile.end_unit && h < rows.pixels && v < columns.pixels && count > 0;
  const int block = q.slides ? q.every + 1 : P * q.step;  // from the positions of a run to those of the next
  const Vector<A, V>* positions =
      image + (unit_index * q.unit_vectors * q.x_area.plane + row * rows.stride * q.x_area.pitch + span * block +
               first_of_span * columns.stride + phase * columns.dilation + first_taps * (Taps / P) * (q.every + 1));
  const Vector<A, V>* gradients = gradient + (unit_index * q.unit_vectors * q.y_area.plane + row * q.y_area.pitch +
                                              span * (q.y_every + 1) + first_of_span);
  // Where the border is shifted, by how many taps the windows are moved.
  int to_top = 0, to_left[P] = {};
  bool in_place = true;
  if constexpr (Shifts) {
    to_top = moved(h * rows.stride - rows.padding, q.kernel_h, tile.halo_height);
#pragma unroll
    for (int i = 0; i < P; ++i) {
      const int pixel = min(v + i * q.spacing, columns.pixels - 1);
      to_left[i] = moved(pixel * columns.stride - columns.padding, q.kernel_w, tile.halo_width);
      in_place = in_place && to_left[i] == 0;
    }
  }

#pragma unroll 1
  for (int first_kernel_row = 0; first_kernel_row < rows.taps; first_kernel_row += q.w_rows) {
    const int kernel_row = first_kernel_row + slot_row;
    A sums[Taps][P] = {};
#pragma unroll 1
    for (int stage = 0; stage < q.stages; ++stage) {
      if (stage + first_kernel_row == 0 || q.stages > 1) {
        if (stage + first_kernel_row > 0) __syncthreads();
        bring_image<V, Shifts>(image, x, q, q.x, q.x_area, tile, tile.halo_height, tile.halo_width,
                               stage * q.unit_vectors, first_row, first_column);
        bring_image<V, false>(gradient, y, q, q.y, q.y_area, tile, rows.pixels, columns.pixels, stage * q.unit_vectors,
                              tile.row, tile.column);
        __syncthreads();
      }
      if (!active || kernel_row >= rows.taps) continue;
      const int position_row = Shifts ? wrapped(kernel_row - to_top, q.kernel_h) : kernel_row;
      const Vector<A, V>* xs = positions + position_row * rows.dilation * q.x_area.pitch;
      const Vector<A, V>* ys = gradients;
#pragma unroll 1
      for (int vector = min(q.unit_vectors, q.vectors - stage * q.unit_vectors); vector > 0; --vector) {
        Vector<A, V> own[P];
#pragma unroll
        for (int i = 0; i < P; ++i) own[i] = ys[i * q.spacing];
#pragma unroll
        for (int position = 0; position < P + Taps - 1; ++position) {
          if (position < count + P - 1) {
            const Vector<A, V> value = xs[position / P * (q.every + 1) + position % P * q.step];
#pragma unroll
            for (int i = 0; i < P; ++i) {
              const int tap = position - i;
              if (tap < 0 || tap >= Taps) continue;
#pragma unroll
              for (int c = 0; c < V; ++c) sums[tap][i] += own[i].v[c] * value.v[c];
            }
          }
        }
        xs += q.x_area.plane, ys += q.y_area.plane;
      }
    }

    if (!q.taps_inner) {
      if (!active || kernel_row >= rows.taps) continue;
      T* out = w + (n * q.w.n + int64_t(g) * q.w.g) + (kernel_row * q.w.kh + h * q.w.h + v * q.w.w);
#pragma unroll
      for (int t = 0; t < Taps; ++t) {
        if (t >= count) break;
        const int tap = first_tap + t * q.phases;
        T* to = out + tap * q.w.kw;
        if (Shifts && !in_place) {
#pragma unroll
          for (int i = 0; i < P; ++i)
            if (v + i * q.spacing < columns.pixels)
              store(sums[t][i], &out[wrapped(tap + to_left[i], q.kernel_w) * q.w.kw + i * q.spacing * q.w.w]);
        } else if (q.w.vectors) {
          Vector<T, P> all;
#pragma unroll
          for (int i = 0; i < P; ++i) store(sums[t][i], &all.v[i]);
          *reinterpret_cast<Vector<T, P>*>(to) = all;
        } else {
#pragma unroll
          for (int i = 0; i < P; ++i)
            if (v + i * q.spacing < columns.pixels) store(sums[t][i], &to[i * q.spacing * q.w.w]);
        }
      }
      continue;
    }
    // Through shared memory, [pixel][tap], so that consecutive threads write consecutive taps.
    if (first_kernel_row > 0 && q.stages == 1) __syncthreads();
    if (active && kernel_row < rows.taps) {
      A* to = staged + ((unit_index * q.rows + row) * q.w_row_pitch + slot_row * q.kernel_w + first_tap);
#pragma unroll
      for (int i = 0; i < P; ++i) {
        const int at = local + i * q.spacing;
#pragma unroll
        for (int t = 0; t < Taps; ++t)
          if (t < count)
            to[at * q.w_pitch + at / P +
               (Shifts ? wrapped(first_tap + t * q.phases + to_left[i], q.kernel_w) - first_tap : t * q.phases)] =
                sums[t][i];
      }
    }
    __syncthreads();
    // 8 threads write the taps of a pixel.
    constexpr int lanes = 8;
    const int taps = min(q.w_rows, rows.taps - first_kernel_row) * q.kernel_w, pixels = q.rows * q.columns;
#pragma unroll 1
    for (int index = 0; index < min(q.units, tile.end_unit - tile.unit); ++index) {
      const auto [to_n, to_g] = divide(tile.unit + index, q.by_groups);
      T* const to_unit = w + (to_n * q.w.n + (to_g * q.w.g + first_kernel_row * q.w.kh));
      const A* const from_unit = staged + index * q.rows * q.w_row_pitch;
#pragma unroll 1
      for (int pixel = int(threadIdx.x) / lanes; pixel < pixels; pixel += int(blockDim.x) / lanes) {
        const auto [to_row, column] = divide(pixel, q.by_columns);
        const int to_h = tile.row + to_row, to_v = tile.column + column;
        if (to_h >= rows.pixels || to_v >= columns.pixels) continue;
        T* to = to_unit + (to_h * q.w.h + to_v * q.w.w);
        const A* from = from_unit + (to_row * q.w_row_pitch + column * q.w_pitch + column / P);
#pragma unroll 4
        for (int tap = int(threadIdx.x) % lanes; tap < taps; tap += lanes) store(from[tap], &to[tap]);
      }
    }
  }
}

}  // namespace pyinvolution::cuda::sliding
