// Tiles of 16-bit images and weights in shared memory, on their way from and to global memory: what `mma` and `fused`
// share. Groups have 16 channels; a block works on a chunk of up to 4 groups. A tile lies in shared memory as it is
// stored in global memory and crosses in pieces of 4 to 16 bytes, in the background on the way in.
#pragma once

#include <algorithm>
#include <type_traits>

#include "division.cuh"
#include "launch.cuh"

namespace pyinvolution::cuda {

constexpr int group_channels = 16;
constexpr int chunk_groups = 4;
constexpr int chunk_channels = chunk_groups * group_channels;

// A tile of Rows x Columns pixels of Y. Each of the block's Warps works on one group.
template <int K_, int S_, int Rows_, int Columns_, int Warps_>
struct TileConfig {
  static constexpr int K = K_, S = S_, Rows = Rows_, Columns = Columns_, Warps = Warps_;
  static constexpr int taps = K * K, threads = 32 * Warps;
  static constexpr int strips = Columns / 8;
  static constexpr int fragments = S + 1;  // of 8 positions each, below a strip
  static constexpr int x_rows = (Rows - 1) * S + K, x_columns = S * Columns + 8;
  static constexpr int w_rows = Rows, w_columns = Columns;
  // How many positions a strip's fragments can start before its first tap.
  static constexpr int max_shift = 8 * fragments - 7 * S - K;
  static int first_column(int padding) { return -padding; }
};

// Tiles are wide where the image is, for a smaller halo. All fit into the 99 KB of shared memory that a block can have
// on every GPU since compute capability 8.0.
template <int K>
using WideTile = TileConfig<K, 1, 8, 16, 16>;
template <int K, int S>
using NarrowTile = TileConfig<K, S, 8, 8, 8>;
constexpr int max_shared_bytes = 99 * 1024;

// Pixels in shared memory, offsets in bytes. With channels inside, a position has 128 bytes, whose 16-byte pieces are
// permuted so that those of 8 neighbours are in different banks. Otherwise a channel has an odd number of pieces, which
// has the same effect.
template <int Rows_, int Columns_, bool ChannelsInner>
struct Image {
  static constexpr int Rows = Rows_, Columns = Columns_;
  static constexpr bool channels_inner = ChannelsInner;
  static constexpr int pitch = ChannelsInner ? 2 * chunk_channels : (Rows * Columns / 8 | 1) * 16;
  static constexpr int bytes = ChannelsInner ? Rows * Columns * pitch : chunk_channels * pitch;

  static __device__ __forceinline__ int at(int row, int column, int channel) {
    if constexpr (ChannelsInner) {
      return (row * Columns + column) * pitch + ((channel / 8) ^ (column & 7)) * 16 + channel % 8 * 2;
    } else {
      return channel * pitch + (row * Columns + column) * 2;
    }
  }
};

// The weights of a tile in shared memory, [pixel][tap] or [tap][pixel], where the taps are those of all groups of the
// chunk. The pitches put 8 pixels or 8 taps in different banks.
template <class C, bool TapsInner>
struct Weights {
  static constexpr bool taps_inner = TapsInner;
  static constexpr int pixels = C::w_rows * C::w_columns, all_taps = chunk_groups * C::taps;
  static constexpr int pitch = TapsInner ? ((all_taps / 2 + 3) / 8 * 8 + 4) * 4 : pixels * 2 + 16;
  static constexpr int bytes = (TapsInner ? pixels : all_taps) * pitch;

  static __device__ __forceinline__ int at(int row, int column, int tap) {
    const int pixel = row * C::w_columns + column;
    return TapsInner ? pixel * pitch + tap * 2 : tap * pitch + pixel * 2;
  }
};

// How the channels and pixels of an image lie in memory, in elements.
struct View {
  int64_t n;
  int c, h, w;
  bool channels_inner;
  int vector;  // elements that can be moved at once: 8 or 1 with channels inside, else 4, 2 or 1
};

// The same for weights, whose taps and groups are evenly spaced.
struct WeightView {
  int64_t n;
  int tap, h, w;
  int vector;  // 4, 2 or 1; 8: pieces of 16 bytes, see first_tap_in_piece
};

struct KernelParams {
  int groups, chunks;
  int x_height, x_width;  // of the image that has a halo
  int y_height, y_width;  // of the image that is tiled
  int w_height, w_width;  // of the weights' pixels
  int padding_h, padding_w;
  int shift;  // positions that come before the first tap, so that x can be moved in vectors
  int tiles_h, tiles_w;
  Division by_chunks, by_tiles_h, by_tiles_w;
  int stages;  // of the gradient of the input
  View x, y;
  WeightView w;
};

// The work of a block. Blocks that run at the same time differ first in the chunk of groups, then in the column of
// tiles.
struct Tile {
  int64_t n;
  int first_group, groups, row, column;
};

template <class C>
__device__ __forceinline__ Tile tile_of_block(const KernelParams& q) {
  Tile tile;
  uint32_t block = blockIdx.x;
  tile.first_group = q.by_chunks.split(block) * chunk_groups;
  tile.groups = min(chunk_groups, q.groups - tile.first_group);
  tile.column = q.by_tiles_w.split(block) * C::Columns;
  tile.row = q.by_tiles_h.split(block) * C::Rows;
  tile.n = block;
  return tile;
}

template <int V, class T>
struct alignas(V * sizeof(T)) Vector {
  T v[V];
};

// The vectors that one thread moves, each `step` elements after the one before. Only those from `begin` to `end` are in
// the tensor; the others are zeros. A line of vectors of several elements is in the tensor as a whole or not at all.
struct Line {
  int offset, step, count, begin, end;
};

template <int V, class T>
__device__ __forceinline__ void bring_line(char* shared, int shared_step, const T* memory, const Line& line) {
  if constexpr (V > 1) {
    const T* from = memory + line.offset;  // aligned, also where nothing is read
#pragma unroll 4
    for (int i = 0; i < line.count; ++i, from += line.step)
      copy_async<V * sizeof(T)>(shared + i * shared_step, from, line.end > 0);
  } else {
    constexpr int batch = 8;
    T zero;
    store(0.0f, &zero);
#pragma unroll 1
    for (int first = 0; first < line.count; first += batch) {
      T values[batch];
#pragma unroll
      for (int j = 0; j < batch; ++j) {
        const int i = first + j;
        values[j] = memory[i >= line.begin && i < line.end ? line.offset + i * line.step : 0];
      }
#pragma unroll
      for (int j = 0; j < batch; ++j) {
        const int i = first + j;
        if (i < line.count)
          *reinterpret_cast<T*>(shared + i * shared_step) = i >= line.begin && i < line.end ? values[j] : zero;
      }
    }
  }
}

// Which of a tile's first `count` rows are in the tensor: those from `begin` to `end`.
struct Rows {
  int count, begin, end;

  static __device__ __forceinline__ Rows of(int first_row, int count, int height) {
    const int begin = min(max(0, -first_row), count);
    return {count, begin, max(begin, min(count, height - first_row))};
  }
};

// Brings V elements of one column in each of at most Most rows, or zeros where a row or the column is not `inside`.
// `first` is the place of the first row, also where that is not in the tensor. The rows are the same for all threads.
// There are Most rows or at least Step fewer: then the last Step are left out.
template <int V, int Most, int Step, int SharedStep, class T>
__device__ __forceinline__ void bring_column(char* shared, const T* first, int step, const Rows& rows, bool inside) {
  constexpr int bytes = V * sizeof(T);
  static_assert(Most < 32, "a bit for each row");
  if (Most > 2 && rows.end - rows.begin == Most) {
#pragma unroll
    for (int i = 0; i < Most; ++i) copy_async<bytes>(shared + i * SharedStep, first + i * step, inside);
    return;
  }
  const uint32_t rows_inside = inside ? (1u << rows.end) - (1u << rows.begin) : 0;
#pragma unroll
  for (int i = 0; i < Most; ++i) {
    if (i == Most - Step && rows.count <= i) return;
    copy_async<bytes>(shared + i * SharedStep, first + i * step, (rows_inside & (1u << i)) != 0);
  }
}

template <int V, class T>
__device__ __forceinline__ void put_line(const char* shared, int shared_step, T* memory, const Line& line) {
#pragma unroll 4
  for (int i = line.begin; i < line.end; ++i)
    *reinterpret_cast<Vector<V, T>*>(memory + (line.offset + i * line.step)) =
        *reinterpret_cast<const Vector<V, T>*>(shared + i * shared_step);
}

// Calls `body` for everything that this thread moves of `rows` rows of an image that begins at (first_row,
// first_column): with the offset and the step in shared memory, and the line in global memory.
template <class I, int V, int Warps, class Body>
__device__ __forceinline__ void for_each_line(const View& view, int channels, int height, int width, int first_row,
                                              int first_column, int rows, const Body& body) {
  const unsigned thread = threadIdx.x;
  if constexpr (I::channels_inner) {
    constexpr int units = chunk_channels / V;
    const int channel = int(thread % units) * V;
    if (channel >= channels) return;
    const Rows in = Rows::of(first_row, rows, height);
    for (int column = int(thread / units); column < I::Columns; column += 32 * Warps / units) {
      const int v = first_column + column;
      body(I::at(0, column, channel), I::Columns * I::pitch,
           Line{first_row * view.h + v * view.w + channel, view.h, rows, in.begin,
                v >= 0 && v < width ? in.end : in.begin});
    }
  } else {
    constexpr int units = I::Columns / V;
    const int first = int(thread / 32), count = (channels - first + Warps - 1) / Warps;
    for (int i = int(thread % 32); i < rows * units; i += 32) {
      const int row = i / units, column = i % units * V, h = first_row + row, v = first_column + column;
      const bool inside = h >= 0 && h < height && v >= 0 && v < width;
      body(I::at(row, column, first), Warps * I::pitch,
           Line{h * view.h + v + first * view.c, Warps * view.c, count, 0, inside ? count : 0});
    }
  }
}

// The same for `rows` rows of the weights of `groups` groups, whose pixels begin at (first_row, first_column).
template <class C, class W, int V, class Body>
__device__ __forceinline__ void for_each_line(const KernelParams& q, int groups, int first_row, int first_column,
                                              int rows, const Body& body) {
  const unsigned thread = threadIdx.x;
  const int taps = groups * C::taps;
  const WeightView& view = q.w;
  if constexpr (W::taps_inner) {
    const Rows in = Rows::of(first_row, rows, q.w_height);
    for (int tap = int(thread % 32) * V; tap < taps; tap += 32 * V) {
      for (int column = int(thread / 32); column < C::w_columns; column += C::Warps) {
        const int v = first_column + column;
        body(W::at(0, column, tap), C::w_columns * W::pitch,
             Line{first_row * view.h + v * view.w + tap, view.h, rows, in.begin,
                  v >= 0 && v < q.w_width ? in.end : in.begin});
      }
    }
  } else {
    constexpr int units = C::w_columns / V, step = C::threads / (C::w_rows * units);
    const int row = int(thread / units % C::w_rows), column = int(thread % units) * V;
    const int first = int(thread / (units * C::w_rows));
    if (first >= step) return;
    const int h = first_row + row, v = first_column + column, count = (taps - first + step - 1) / step;
    const bool inside = h >= 0 && h < q.w_height && v >= 0 && v < q.w_width;
    body(W::at(row, column, first), step * W::pitch,
         Line{first * view.tap + h * view.h + v, step * view.tap, count, 0, inside ? count : 0});
  }
}

template <bool ChannelsInner, class Body>
__device__ __forceinline__ void with_vector(int vector, const Body& body) {
  if constexpr (ChannelsInner) {
    if (vector == 8) return body(std::integral_constant<int, 8>{});
  } else {
    if (vector == 4) return body(std::integral_constant<int, 4>{});
    if (vector == 2) return body(std::integral_constant<int, 2>{});
  }
  body(std::integral_constant<int, 1>{});
}

// Brings the first `rows` rows, which are all or at least Step fewer, and at least the first `columns` columns.
template <class I, int Warps, int Step = I::Rows, class T>
__device__ __forceinline__ void bring_image(char* shared, const T* image, const View& view, int channels, int height,
                                            int width, int first_row, int first_column, int rows = I::Rows,
                                            int columns = I::Columns) {
  if constexpr (I::channels_inner) {
    if (view.vector == 8) {
      constexpr int units = chunk_channels / 8, step = 32 * Warps / units;
      static_assert(step >= I::Columns, "a column for each thread");
      const int channel = int(threadIdx.x % units) * 8, column = int(threadIdx.x / units), v = first_column + column;
      if (channel >= channels || column >= columns) return;
      return bring_column<8, I::Rows, Step, I::Columns * I::pitch>(
          shared + I::at(0, column, channel), image + (first_row * view.h + v * view.w + channel), view.h,
          Rows::of(first_row, rows, height), v >= 0 && v < width);
    }
  }
  const auto bring = [&](auto v) {
    for_each_line<I, v.value, Warps>(
        view, channels, height, width, first_row, first_column, rows,
        [&](int to, int step, const Line& line) { bring_line<v.value>(shared + to, step, image, line); });
  };
  if constexpr (I::channels_inner) {
    bring(std::integral_constant<int, 1>{});
  } else {
    with_vector<false>(view.vector, bring);
  }
}

template <class I, int Warps, class T>
__device__ __forceinline__ void put_image(const char* shared, T* image, const View& view, int channels, int height,
                                          int width, int first_row, int first_column) {
  if constexpr (I::channels_inner) {
    if (view.vector == 8) {
      constexpr int units = chunk_channels / 8;
      static_assert(32 * Warps / units >= I::Columns, "a column for each thread");
      const int channel = int(threadIdx.x % units) * 8, column = int(threadIdx.x / units);
      if (column >= min(I::Columns, width - first_column) || channel >= channels) return;
      const char* from = shared + I::at(0, column, channel);
      T* to = image + (first_row * view.h + (first_column + column) * view.w + channel);
      const int rows = height - first_row;
#pragma unroll
      for (int i = 0; i < I::Rows; ++i) {
        if (i < rows)
          *reinterpret_cast<Vector<8, T>*>(to + i * view.h) =
              *reinterpret_cast<const Vector<8, T>*>(from + i * (I::Columns * I::pitch));
      }
      return;
    }
  }
  const auto put = [&](auto v) {
    for_each_line<I, v.value, Warps>(
        view, channels, height, width, first_row, first_column, I::Rows,
        [&](int from, int step, const Line& line) { put_line<v.value>(shared + from, step, image, line); });
  };
  if constexpr (I::channels_inner) {
    put(std::integral_constant<int, 1>{});
  } else {
    with_vector<false>(view.vector, put);
  }
}

// Where the taps of a pixel of this column begin in shared memory, in bytes, beyond the pixel's own place. Whole pieces
// of 16 bytes are moved (q.w.vector is 8), and a pixel may begin in the middle of one. `w` begins at the weights of the
// chunk.
template <class T>
__device__ __forceinline__ int first_tap_in_piece(const KernelParams& q, const T* w, int column) {
  const uint32_t within = q.w.vector == 8 ? 15 : 0;
  return int((uint32_t(reinterpret_cast<uintptr_t>(w)) + uint32_t(column * q.w.w) * uint32_t(sizeof(T))) & within);
}

// The same for weights with taps inside, V at a time.
template <class C, class W, int V, int Step, class T>
__device__ __forceinline__ void bring_taps(char* shared, const T* w, const KernelParams& q, int groups, int first_row,
                                           int first_column, int rows, int columns) {
  // Pieces of 16 bytes may reach into what is beside the pixel's taps, in the same tensor.
  constexpr int pieces = V == 8 ? (W::all_taps + 4 + 7) / 8 : W::all_taps / V;
  static_assert(V != 8 || pieces * 16 <= W::pitch, "a piece would reach the next pixel");
  // Neighbouring threads have neighbouring pieces. If the block has enough of them, each has the pieces of one column.
  constexpr int part = pieces > 16 ? 32 : pieces > 8 ? 16 : 8;
  constexpr int lanes = C::w_columns * pieces <= C::threads ? pieces : part, step = C::threads / lanes;
  const int own_column = int(threadIdx.x / lanes);
#pragma unroll
  for (int first_piece = 0; first_piece < pieces; first_piece += lanes) {
    const int tap = (first_piece + int(threadIdx.x % lanes)) * V;
    if (tap >= (V == 8 ? pieces * V : groups * C::taps)) return;
#pragma unroll
    for (int first = 0; first < C::w_columns; first += step) {
      const int column = first + own_column, v = first_column + column;
      if (first + step > C::w_columns && column >= columns) return;
      const int before = V == 8 ? first_tap_in_piece(q, w, v) / int(sizeof(T)) : 0;
      bring_column<V, C::w_rows, Step, C::w_columns * W::pitch>(
          shared + W::at(0, column, tap), w + (first_row * q.w.h + v * q.w.w + tap - before), q.w.h,
          Rows::of(first_row, rows, q.w_height), v >= 0 && v < q.w_width);
    }
  }
}

// The same for all weights.
template <class C, class W, int Step = C::w_rows, class T>
__device__ __forceinline__ void bring_weights(char* shared, const T* w, const KernelParams& q, int groups,
                                              int first_row, int first_column, int rows = C::w_rows,
                                              int columns = C::w_columns) {
  const auto bring = [&](auto v) {
    if constexpr (W::taps_inner && v.value > 1) {
      bring_taps<C, W, v.value, Step>(shared, w, q, groups, first_row, first_column, rows, columns);
    } else {
      for_each_line<C, W, v.value>(q, groups, first_row, first_column, rows, [&](int to, int step, const Line& line) {
        bring_line<v.value>(shared + to, step, w, line);
      });
    }
  };
  if constexpr (W::taps_inner) {
    if (q.w.vector == 8) return bring(std::integral_constant<int, 8>{});
  }
  with_vector<false>(q.w.vector, bring);
}

__device__ __forceinline__ void wait_for_tile() {
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
}

__device__ __forceinline__ uint32_t bits_at(const char* shared) { return *reinterpret_cast<const uint16_t*>(shared); }

// Writes the sums of the warps that have some, [row][16 channels x 8 pixels], through shared memory that all have
// finished reading.
template <class C, class I, class T>
__device__ __forceinline__ void put_sums(char* shared, const float (&sums)[4][4], T* out, const KernelParams& q,
                                         const Tile& tile, int group, int strip, int row, bool works) {
  const int lane = int(threadIdx.x % 32), line = lane / 4, place = lane % 4 * 2;
  __syncthreads();
  if (works) {
    const int at = I::channels_inner ? I::at(row, strip * 8 + line, group * group_channels) + place * 2
                                     : I::at(row, strip * 8 + place, group * group_channels + line);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // With channels inside, the next piece of 16 bytes; see Image.
      char* to = shared + (I::channels_inner ? at ^ half * 16 : at + half * 8 * I::pitch);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const uint32_t bits = pack<T>(sums[r][2 * half], sums[r][2 * half + 1]);
        *reinterpret_cast<uint32_t*>(to + r * I::Columns * (I::channels_inner ? I::pitch : 2)) =
            I::channels_inner ? transpose_matrix(bits) : bits;
      }
    }
  }
  __syncthreads();
  put_image<I, C::Warps>(shared, out, q.y, tile.groups * group_channels, q.y_height, q.y_width, tile.row, tile.column);
}

// --- on the host: how the tensors of a problem can be moved

inline bool taps_are_inner(const Problem& p) {
  return p.w_stride[3] == 1 && p.w_stride[2] == p.kernel_w && (p.groups == 1 || p.w_stride[1] == p.taps());
}
inline bool columns_are_inner(const Problem& p) {
  return p.w_stride[5] == 1 && p.w_stride[2] == p.kernel_w * p.w_stride[3] &&
         (p.groups == 1 || p.w_stride[1] == p.taps() * p.w_stride[3]);
}
// In kernels for one pixel both are inner; then the channels of the image decide.
inline bool uses_inner_taps(const Problem& p, Pass pass) {
  return taps_are_inner(p) && (pass == Pass::grad_input ? p.y_stride : p.x_stride)[1] == 1;
}

// One image of a problem, enlarged by what tiles that begin or end outside it read there.
inline Problem image_with_margin(const Problem& p) {
  Problem image = p;
  image.batch = 1;
  for (int64_t* size : {&image.in_h, &image.in_w, &image.out_h, &image.out_w})
    *size += 32 + 2 * std::max(p.padding_h, p.padding_w);
  return image;
}

template <class T>
View view(const int64_t (&strides)[4], const void* data, int64_t width) {
  View view{strides[0], int(strides[1]), int(strides[2]), int(strides[3]), strides[1] == 1, 1};
  if (view.channels_inner) {
    view.vector = vector_of<T>(8, data, {strides[0], strides[2], strides[3]}) == 8 ? 8 : 1;
  } else {
    view.vector = vector_of<T>(4, data, {strides[0], strides[1], strides[2], width});
  }
  return view;
}

template <class T>
WeightView weight_view(const Problem& p, Pass pass, const void* data) {
  const int64_t tap = p.w_stride[3];
  WeightView view{p.w_stride[0], int(tap), int(p.w_stride[4]), int(p.w_stride[5]), 1};
  if (!uses_inner_taps(p, pass)) {
    view.vector = vector_of<T>(4, data, {view.n, view.tap, view.h, p.out_w});
    return view;
  }
  view.vector = vector_of<T>(4, data, {view.n, view.h, view.w, p.groups % chunk_groups * p.taps()});
  // Where the last pixel ends a piece, no piece reaches beyond the tensor.
  const int64_t sizes[] = {p.batch, p.groups, p.kernel_h, p.kernel_w, p.out_h, p.out_w};
  if (pass != Pass::grad_weight && view.vector == 4 && p.groups % chunk_groups == 0 && view.h % 8 == 0 &&
      vector_of<T>(8, data, {}) == 8 && (reach(sizes, p.w_stride) + 1) % 8 == 0)
    view.vector = 8;
  return view;
}

inline void set_tiles(KernelParams& q, int64_t tiles_h, int64_t tiles_w) {
  q.tiles_h = int(tiles_h), q.tiles_w = int(tiles_w);
  q.by_chunks = Division(q.chunks), q.by_tiles_h = Division(tiles_h), q.by_tiles_w = Division(tiles_w);
}

template <class C, class T>
KernelParams kernel_params(const Problem& p, Pass pass, const Buffers& buffers) {
  KernelParams q;
  set_images(q, p, pass, view<T>(p.x_stride, buffers.x, p.in_w), view<T>(p.y_stride, buffers.y, p.out_w));
  q.chunks = (q.groups + chunk_groups - 1) / chunk_groups;
  q.w = weight_view<T>(p, pass, buffers.w);
  // A tensor with columns inside and a halo begins in its tile where it can be moved in vectors, if need be in smaller
  // ones.
  const bool x_columns = !q.x.channels_inner, w_columns = pass == Pass::grad_input && !uses_inner_taps(p, pass);
  int vector = std::max(x_columns ? q.x.vector : 1, w_columns ? q.w.vector : 1);
  const auto shift = [&] { return C::first_column(q.padding_w) & (vector - 1); };
  while (shift() > C::max_shift) vector /= 2;
  q.shift = shift();
  if (x_columns) q.x.vector = std::min(q.x.vector, vector);
  if (w_columns) q.w.vector = std::min(q.w.vector, vector);
  q.stages = 0;
  set_tiles(q, (q.y_height + C::Rows - 1) / C::Rows, (q.y_width + C::Columns - 1) / C::Columns);
  return q;
}

}  // namespace pyinvolution::cuda
