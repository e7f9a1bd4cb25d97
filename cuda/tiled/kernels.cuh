// Involution with square kernels of K x K taps, stride S and dilation 1, one tile of one group per block.
//
//   forward       Y[n,c,p]   = sum over taps k of W[n,g(c),k,p] * X[n,c, S*p + k - padding]
//   grad_input    X[n,c,q]   = sum over taps k of W[n,g(c),k,p] * Y[n,c,p],  p = (q + padding - k) / S where whole
//   grad_weight   W[n,g,k,p] = sum over c of group g of Y[n,c,p] * X[n,c, S*p + k - padding]
//
// X is N,C,H,W; W is N,G,K,K,Ho,Wo; Y is N,C,Ho,Wo (in gradients, grad_output). The gradient of the input is the same
// sum as the forward with the taps reversed, once each weight lies with the pixel of X that it leads to: only the
// loading of W differs. With S = 2 it is four such sums, each with a quarter of the pixels and of the taps.
//
// A block brings into shared memory, as float: the pixels of X below its tile of Rows x Columns pixels of Y, with their
// halo and zeros outside the image ([chunk of 4 channels][row][position]), and the K*K weights of each pixel
// ([row][tap][column]). Every weight and output crosses the memory bus once, an x 1 to 3 times, mostly from L2
// (neighbouring tiles share halos, and blocks of neighbouring groups run together, which share the sectors of W).
//
// Float X with dense channels goes by cp.async in pieces of 16 bytes, everything else but dense columns of W through
// registers. Dense taps of a pixel are loaded in the 16-byte pieces in which they lie in memory, of which the first and the
// last one have some of the neighbours' weights too, and are stored tap by tap: shared memory has the pixels of a tap next
// to each other, memory the taps of a pixel. Dense columns come by cp.async of 16 bytes where rows are aligned to that, else
// of 4. In the gradient of the input, a weight is stored with the pixel that it leads to, which for most weights of a piece
// is another one, half of them outside the tile; so there the taps of a kernel row come one by one.
//
// apply (forward and grad_input): a thread owns PixelRows x Pixels pixels x 4 channels. It reads a row of X as 16-byte
// vectors into registers, uses each for up to K taps of PixelRows kernel rows, and reads the weights of a tap for all pixels
// of a row at once, for 4 channels (its neighbours broadcast).
// grad_weight: a thread owns Pixels pixels x the K taps of a kernel row and walks over the channels, 4 at a time.
//
// Limits, forward, float, K=7, 16 channels a group, a tile of 8 x 16 on one SM, counted and not measured: memory 41.5 KB,
// 2230 clocks at the H200's copy rate; 7623 warp instructions of PTX, of which 3136 FMA, 1906 clocks; shared memory 2188
// clocks, of which X 1024, W 784 and the writes of both 380. With twice as many pixels a thread would read from shared
// memory 1424 instead of 1808, but the multiprocessor would have 10 warps instead of 20. In half and bfloat16, whose bytes
// are half, shared memory is the limit.
#pragma once

#include "config.cuh"

namespace pyinvolution::cuda::tiled {

// How the channels and pixels of an image lie in memory, in elements.
struct View {
  int64_t n;
  int c, h, w;
  bool vectors;  // four channels are 4 * sizeof(T) aligned bytes
};

// The same for the weights of a group and its pixels.
struct WeightView {
  int64_t n;
  int g, kh, kw, h, w;
  bool taps_inner;  // the taps of a pixel are consecutive, else the columns are
  bool vectors;  // every aligned piece of 16 bytes with a tap is in the tensor; else, four columns can be read at once
};

struct KernelParams {
  int group_channels, groups, kernel;
  int x_height, x_width;  // of the image that has a halo
  int y_height, y_width;  // of the image that is tiled
  int w_height, w_width;  // of the weights' pixels
  int padding_h, padding_w;
  int tiles_h, tiles_w;
  Division by_groups, by_tiles_h, by_tiles_w;
  Division by_chunks;  // of 4 channels
  View x, y;
  WeightView w;
};

// The work of a block. Blocks that run at the same time differ first in the group, then in the column of tiles.
struct Tile {
  int64_t n;
  int group, row, column;
  int part;  // of a strided gradient: the parities of its pixels
};

template <class C, int Classes>
__device__ __forceinline__ Tile tile_of_block(const KernelParams& q) {
  Tile tile{};
  uint32_t block = blockIdx.x;
  if constexpr (Classes > 1) tile.part = int(block % Classes), block /= Classes;
  tile.group = q.by_groups.split(block);
  tile.column = q.by_tiles_w.split(block) * C::Columns;
  tile.row = q.by_tiles_h.split(block) * C::Rows;
  tile.n = block;
  return tile;
}

__device__ __forceinline__ bool inside(int h, int w, int height, int width) {
  return h >= 0 && h < height && w >= 0 && w < width;
}

template <int N, class T>
struct alignas(N * sizeof(T)) Vector {
  T v[N];
};

// Elements in 16 bytes.
template <class T>
constexpr int piece = 16 / int(sizeof(T));

// One of the loads of a thread, with offsets in elements. A load that is not valid reads the first element and brings
// zero, so that loads need no branch.
struct Move {
  bool exists, valid;
  int to, from;
};

// Brings V neighbours each into shared memory as float: moves `at(0)` to `at(N - 1)`. Float is copied in the background.
// The other types pass through registers, and a thread waits once for N moves.
template <int N, int V, class T, class At>
__device__ __forceinline__ void bring(float* shared, const T* memory, const At& at) {
  if constexpr (sizeof(T) == sizeof(float)) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Move move = at(i);
      if (move.exists) copy_async<V * sizeof(T)>(shared + move.to, memory + move.from, move.valid);
    }
  } else {
    Vector<V, T> values[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Move move = at(i);
      values[i] = *reinterpret_cast<const Vector<V, T>*>(memory + (move.exists ? move.from : 0));
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Move move = at(i);
      Vector<V, float> floats;
#pragma unroll
      for (int j = 0; j < V; ++j) floats.v[j] = move.valid ? load(values[i].v[j]) : 0.0f;
      if (move.exists) *reinterpret_cast<Vector<V, float>*>(shared + move.to) = floats;
    }
  }
}

// Waits until what all threads have brought is there.
template <class T>
__device__ __forceinline__ void wait_for_tile() {
  if constexpr (sizeof(T) == sizeof(float)) {
    commit_copies();
    wait_for_copies<0>();
  }
  __syncthreads();
}

// Rows x Columns pixels of an image from (first_row, first_column) on, the channels of one group, zeros outside, as
// [chunk of 4 channels][row][position]. A position of padding follows each Every positions. A thread has a column and
// every `row_lanes`-th row.
template <int Rows, int Columns, int Every, int Pitch, int Plane, class T>
__device__ __forceinline__ void bring_image(float* shared, const T* image, const View& view, const KernelParams& q,
                                            int height, int width, int first_row, int first_column) {
  // Consecutive threads take what is consecutive in memory: channels, or columns.
  uint32_t position = threadIdx.x;
  int lanes = int(blockDim.x), first_chunk = 0, end_chunk = q.group_channels / 4;
  if (view.c == 1) {
    lanes = int(q.by_chunks.quotient(uint32_t(lanes)));
    first_chunk = q.by_chunks.split(position), end_chunk = first_chunk + 1;
  }
  // Without padding, threads that write to shared memory at the same time have columns 4 positions apart: the bits of a
  // column are reversed.
  constexpr bool reversed = Every >= Columns;
  constexpr int columns = reversed ? (Columns + 7) / 8 * 8 : Columns;
  const int column_lanes = min(columns, lanes), row_lanes = max(1, lanes / columns);
  const int own_column = int(position) % columns, own_row = int(position) / columns;
  if (int(position) >= lanes || own_row >= row_lanes) return;
  const int64_t from_step = int64_t(row_lanes) * view.h;
  const int to_step = row_lanes * Pitch * 4;
#pragma unroll 1
  for (int chunk = first_chunk; chunk < end_chunk; ++chunk) {
#pragma unroll 1
    for (int place = own_column; place < columns; place += column_lanes) {
      const int column = reversed ? (place & ~5) | (place & 1) << 2 | (place >> 2 & 1) : place;
      if (column >= Columns) continue;
      const int w = first_column + column;
      const bool column_exists = unsigned(w) < unsigned(width);
      int row = own_row;
      const T* from = image + (int64_t(first_row + row) * view.h + int64_t(w) * view.w + 4 * chunk * view.c);
      float* to = shared + 4 * (chunk * Plane + row * Pitch + column + column / Every);
      const auto exists = [&](int at) { return column_exists && unsigned(first_row + at) < unsigned(height); };
      if (sizeof(T) == sizeof(float) && view.vectors) {
#pragma unroll 4
        for (; row < Rows; row += row_lanes, from += from_step, to += to_step)
          copy_async<4 * sizeof(T)>(to, from, exists(row));
        continue;
      }
      const auto through_registers = [&](auto count, auto vectors) {
        constexpr int batch = count.value;
#pragma unroll 1
        for (; row < Rows; row += batch * row_lanes) {
          Vector<4, T> fours[batch];
#pragma unroll
          for (int i = 0; i < batch; ++i, from += from_step) {
            const int at = row + i * row_lanes;
            const T* const four = at < Rows && exists(at) ? from : image;
            if (vectors.value) {
              fours[i] = *reinterpret_cast<const Vector<4, T>*>(four);
            } else {
#pragma unroll
              for (int c = 0; c < 4; ++c) fours[i].v[c] = four[c * view.c];
            }
          }
#pragma unroll
          for (int i = 0; i < batch; ++i, to += to_step) {
            const int at = row + i * row_lanes;
            Vector<4, float> floats;
#pragma unroll
            for (int c = 0; c < 4; ++c) floats.v[c] = exists(at) ? load(fours[i].v[c]) : 0.0f;
            if (at < Rows) *reinterpret_cast<Vector<4, float>*>(to) = floats;
          }
        }
      };
      if (view.vectors) {
        through_registers(std::integral_constant<int, 4>{}, std::true_type{});
      } else {
        through_registers(std::integral_constant<int, 2>{}, std::false_type{});
      }
    }
  }
}

// The weights of the tile's pixels, whose taps are consecutive. 16 pixels and two pieces of the taps of each are a warp's
// turn. A piece of 16 bytes may begin before a pixel's first tap and end after its last one; if such a piece can be outside
// of the tensor, it begins with the first tap and is read tap by tap. The taps of the second piece are stored in another
// order, which puts them into other banks.
template <class C, class T>
__device__ __forceinline__ void bring_pieces(float* shared, const T* w, const KernelParams& q, const Tile& tile) {
  constexpr int elements = piece<T>, pieces = (C::taps + 2 * elements - 2) / elements, pairs = (pieces + 1) / 2;
  constexpr int turns = C::pixels / 16, at_once = 2, other = 16 / C::Columns;
  static_assert(16 % C::Columns == 0 && C::taps % elements == 1, "each pixel has a tap in its last piece");
  const int warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32, odd = int(threadIdx.x) / 16 % 2;
#pragma unroll 1
  for (int first_turn = warp; first_turn < turns; first_turn += at_once * warps) {
    Vector<elements, T> values[at_once][pairs];
    int before[at_once];
    bool exists[at_once];
#pragma unroll
    for (int i = 0; i < at_once; ++i) {
      const int turn = first_turn + i * warps, pixel = turn * 16 + int(threadIdx.x) % 16;
      const int h = tile.row + pixel / C::Columns, v = tile.column + pixel % C::Columns;
      exists[i] = turn < turns && h < q.w_height && v < q.w_width;
      if (!exists[i]) continue;
      const T* const first = w + (h * q.w.h + v * q.w.w);
      before[i] = q.w.vectors ? int((reinterpret_cast<uintptr_t>(first) & 15) / sizeof(T)) : 0;
      const T* const from = first - before[i] + odd * elements;
#pragma unroll
      for (int pair = 0; pair < pairs; ++pair) {
        if (2 * pair + 1 == pieces && odd) continue;
        if (q.w.vectors) {
          values[i][pair] = *reinterpret_cast<const Vector<elements, T>*>(from + 2 * pair * elements);
        } else {
#pragma unroll
          for (int e = 0; e < elements; ++e)
            if ((2 * pair + odd) * elements + e < C::taps) values[i][pair].v[e] = from[2 * pair * elements + e];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < at_once; ++i) {
      if (!exists[i]) continue;
      const int pixel = (first_turn + i * warps) * 16 + int(threadIdx.x) % 16, first_tap = odd * elements - before[i];
      float* const to = shared + (pixel / C::Columns * C::w_row + pixel % C::Columns + first_tap * C::Columns);
      const int change = odd * other;
#pragma unroll
      for (int pair = 0; pair < pairs; ++pair) {
        if (2 * pair + 1 == pieces && odd) continue;
#pragma unroll
        for (int e = 0; e < elements; ++e) {
          const T value = odd ? values[i][pair].v[e ^ other] : values[i][pair].v[e];
          const int place = 2 * pair * elements + e, tap = first_tap + place + (e & other ? -change : change);
          if ((pair == 0 || pair == pairs - 1) && unsigned(tap) >= unsigned(C::taps)) continue;
          (to + (e & other ? -change : change) * C::Columns)[place * C::Columns] = load(value);
        }
      }
    }
  }
}

// Calls `body` with V neighbouring pixels, their row and first column, and a kernel row, until all have had their turn.
// Consecutive threads have consecutive columns.
template <class C, int V, class Body>
__device__ __forceinline__ void for_each_column(const Body& body) {
  constexpr int places = C::pixels / V;
  const int threads = int(blockDim.x), parts = max(1, threads / places), part = int(threadIdx.x) / places;
  if (threads >= places && part >= parts) return;
#pragma unroll 1
  for (int place = int(threadIdx.x) % places; place < places; place += threads) {
    const int row = place * V / C::Columns, column = place * V % C::Columns;
#pragma unroll 1
    for (int kh = part; kh < C::K; kh += parts) body(row, column, kh);
  }
}

// The weights of the tile's pixels, whose columns are consecutive, V at a time.
template <class C, int V, class T>
__device__ __forceinline__ void bring_columns(float* shared, const T* w, const KernelParams& q, const Tile& tile) {
  for_each_column<C, V>([&](int row, int column, int kh) {
    const int h = tile.row + row, v = tile.column + column;
    const bool exists = h < q.w_height && v < q.w_width;
    const int from = exists ? kh * q.w.kh + h * q.w.h + v * q.w.w : 0;
    const int to = row * C::w_row + kh * C::K * C::Columns + column;
    bring<C::K, V>(shared, w, [&](int kw) -> Move { return {exists, true, to + kw * C::Columns, from + kw * q.w.kw}; });
  });
}

template <class C, class T>
__device__ __forceinline__ void bring_weights(float* shared, const T* w, const KernelParams& q, const Tile& tile) {
  if (q.w.taps_inner) return bring_pieces<C>(shared, w, q, tile);
  if (q.w.vectors) return bring_columns<C, 4>(shared, w, q, tile);
  bring_columns<C, 1>(shared, w, q, tile);
}

// The part of an input gradient that a block works on. With stride 2 a pixel q of X gets something from tap k only
// where q + padding - k is even. So the pixels fall into four classes by the parities of q + padding, and each class is
// a gradient with stride 1: its pixels are every second one from `first` on, its taps every second one from `parity`
// on, and pixel i of the class and tap t of its own meet at pixel i + shift - t of Y.
struct Class {
  int parity, first, shift, pixels;
};
template <int Stride>
__device__ __forceinline__ Class class_of(int parity, int padding, int pixels) {
  if constexpr (Stride == 1) {
    return {0, 0, padding, pixels};
  } else {
    const int first = (parity + padding) % Stride;
    return {parity, first, (first + padding - parity) / Stride, (pixels - first + Stride - 1) / Stride};
  }
}

// The weights that lead to the tile's pixels of X, taps reversed, zero where Y has no pixel. K is the number of taps of
// a class in one direction; where a class has one less, the last one stays unset.
template <class C, int Stride, class T>
__device__ __forceinline__ void bring_weights_to(float* shared, const T* w, const KernelParams& q, const Tile& tile,
                                                 const Class& rows, const Class& columns) {
  constexpr int K = C::K, halo = K - 1;
  const int first_row = tile.row + rows.shift, first_column = tile.column + columns.shift;
  const int threads = int(blockDim.x), thread = int(threadIdx.x);
  if (!q.w.taps_inner) {
    for_each_column<C, 1>([&](int row, int column, int own_kh) {
      const int h = first_row + row - own_kh, kh = own_kh * Stride + rows.parity;
      const bool row_exists = Stride == 1 || kh < q.kernel, row_valid = unsigned(h) < unsigned(q.w_height);
      const int from = row_valid ? kh * q.w.kh + h * q.w.h : 0;
      const int to = row * C::w_row + (C::taps - 1 - own_kh * K) * C::Columns;
      bring<K, 1>(shared, w, [&](int own_kw) -> Move {
        const int v = first_column + column - own_kw, kw = own_kw * Stride + columns.parity;
        const bool valid = row_valid && unsigned(v) < unsigned(q.w_width);
        return {row_exists && (Stride == 1 || kw < q.kernel), valid,
                to - own_kw * C::Columns + C::gradient_column(column, own_kw),
                valid ? from + kw * q.w.kw + v * q.w.w : 0};
      });
    });
    return;
  }
  // A row of the tile gets a kernel row of a row of Y, whose pixels have K neighbouring taps each. The lanes of a warp have
  // some of these taps, the same ones for all rows.
  constexpr int candidates = (C::Columns + halo) * K, moves = (candidates + 31) / 32;
  constexpr int at_once = sizeof(T) == sizeof(float) ? 1 : 2;
  int to[moves], from[moves];
  bool exists[moves], valid[moves];
#pragma unroll
  for (int i = 0; i < moves; ++i) {
    const int index = i * 32 + thread % 32, pixel = index / K, own_kw = index % K;
    const int column = pixel - halo + own_kw, v = first_column - halo + pixel, kw = own_kw * Stride + columns.parity;
    exists[i] = index < candidates && unsigned(column) < unsigned(C::Columns) && (Stride == 1 || kw < q.kernel);
    valid[i] = unsigned(v) < unsigned(q.w_width);
    to[i] = kept(C::gradient_column(column, own_kw) - own_kw * C::Columns),
    from[i] = kept(valid[i] ? v * q.w.w + kw : 0);
  }
#pragma unroll 1
  for (int first = thread / 32; first < C::Rows * K; first += at_once * (threads / 32)) {
    // Of the last pair of rows there may be one.
    bool rows_exist[at_once], rows_valid[at_once];
    int rows_to[at_once], rows_from[at_once];
#pragma unroll
    for (int i = 0; i < at_once; ++i) {
      const int pair = first + i * (threads / 32), row = pair / K, own_kh = pair % K;
      const int h = first_row + row - own_kh, kh = own_kh * Stride + rows.parity;
      rows_exist[i] = pair < C::Rows * K && (Stride == 1 || kh < q.kernel);
      rows_valid[i] = unsigned(h) < unsigned(q.w_height);
      rows_to[i] = row * C::w_row + (C::taps - 1 - own_kh * K) * C::Columns;
      rows_from[i] = rows_valid[i] ? h * q.w.h + kh * q.w.kh : 0;
    }
    bring<at_once * moves, 1>(shared, w, [&](int i) -> Move {
      const int r = i / moves, m = i % moves;
      return {rows_exist[r] && exists[m], rows_valid[r] && valid[m], rows_to[r] + to[m], rows_from[r] + from[m]};
    });
  }
}

// The run of a thread. Of 8 neighbouring threads, those with other runs have them 4 positions of X apart, or a row.
template <class C>
__device__ __forceinline__ int run_of(int index) {
  static_assert(C::Pixels * C::S == 2 || C::Pixels * C::S == 4, "runs begin 2 or 4 positions apart");
  return C::Pixels * C::S == 4 ? index : (index & ~3) | (index & 1) << 1 | (index >> 1 & 1);
}

// GradientStride is 0 for the forward; else this is the gradient of the input of an involution with that stride, and C
// describes the sum over one class.
template <class C, int GradientStride, class T>
__global__ void __launch_bounds__(256, 2)
    apply(KernelParams q, const T* __restrict__ x, const T* __restrict__ w, T* __restrict__ y) {
  constexpr int K = C::K, S = C::S;
  static_assert(GradientStride == 0 || S == 1, "a gradient gathers pixel by pixel");
  // The weights are the second, because places of taps are counted from up to 7 before a pixel's first one.
  const int channels = q.group_channels;
  float* image = reinterpret_cast<float*>(shared_memory());
  float* weights = image + C::x_plane * channels;
  const Tile tile = tile_of_block<C, GradientStride == 2 ? 4 : 1>(q);
  const int first_channel = tile.group * channels;

  const T* group_weights = w + (tile.n * q.w.n + int64_t(tile.group) * q.w.g);
  T* out = y + (tile.n * q.y.n + int64_t(first_channel) * q.y.c);
  int padding_h = q.padding_h, padding_w = q.padding_w;
  bool short_rows = false, short_columns = false;
  if constexpr (GradientStride == 0) {
    bring_weights<C>(weights, group_weights, q, tile);
  } else {
    const Class rows = class_of<GradientStride>(tile.part / 2, q.padding_h, q.y_height);
    const Class columns = class_of<GradientStride>(tile.part % 2, q.padding_w, q.y_width);
    if (tile.row >= rows.pixels || tile.column >= columns.pixels) return;
    bring_weights_to<C, GradientStride>(weights, group_weights, q, tile, rows, columns);
    padding_h = K - 1 - rows.shift, padding_w = K - 1 - columns.shift;
    short_rows = (K - 1) * GradientStride + rows.parity >= q.kernel;
    short_columns = (K - 1) * GradientStride + columns.parity >= q.kernel;
    out += rows.first * q.y.h + columns.first * q.y.w;
    q.y_height = rows.pixels, q.y_width = columns.pixels;
    q.y.h *= GradientStride, q.y.w *= GradientStride;
  }
  bring_image<C::x_rows, C::x_columns, C::x_columns, C::x_columns, C::x_plane>(
      image, x + (tile.n * q.x.n + int64_t(first_channel) * q.x.c), q.x, q, q.x_height, q.x_width,
      tile.row * S - padding_h, tile.column * S - padding_w);
  wait_for_tile<T>();

  const int thread = int(threadIdx.x);
  uint32_t pixels = uint32_t(thread);
  const int chunk = q.by_chunks.split(pixels), run = run_of<C>(int(pixels) % C::runs);
  const int row = int(pixels) / C::runs * C::PixelRows, column = run * C::Pixels;

  float sums[C::PixelRows][C::Pixels][4] = {};
  const float* positions = image + 4 * (chunk * C::x_plane + row * S * C::x_columns + column * S);
  const float* kernels = weights + row * C::w_row + column;
  const int exchange = GradientStride > 0 ? kept(C::gradient_column(column, 2) - column) : 0;
#pragma unroll 1
  for (int x_row = 0; x_row < (C::PixelRows - 1) * S + K; ++x_row) {
    Vector<4, float> window[C::window];
#pragma unroll
    for (int i = 0; i < C::window; ++i)
      window[i] = *reinterpret_cast<const Vector<4, float>*>(positions + 4 * (x_row * C::x_columns + i));
#pragma unroll
    for (int r = 0; r < C::PixelRows; ++r) {
      const int kh = x_row - r * S;
      if (kh < 0 || kh >= K) continue;
      // With reversed taps, the one that a class lacks is the first. A weight of zero would turn an Inf into a NaN.
      if (GradientStride > 1 && short_rows && kh == 0) continue;
      const float* taps = kernels + (r * C::w_row + kh * K * C::Columns);
#pragma unroll
      for (int kw = 0; kw < K; ++kw) {
        if (GradientStride > 1 && kw == 0 && short_columns) continue;
        const bool exchanged = GradientStride > 0 && C::gradient_column(0, K - 1 - kw) > 0;
        const auto own =
            *reinterpret_cast<const Vector<C::Pixels, float>*>(taps + kw * C::Columns + (exchanged ? exchange : 0));
#pragma unroll
        for (int p = 0; p < C::Pixels; ++p) {
#pragma unroll
          for (int c = 0; c < 4; ++c) sums[r][p][c] += own.v[p] * window[p * S + kw].v[c];
        }
      }
    }
  }

  if (q.y.c == 1) {
#pragma unroll
    for (int r = 0; r < C::PixelRows; ++r) {
#pragma unroll
      for (int p = 0; p < C::Pixels; ++p) {
        const int h = tile.row + row + r, v = tile.column + column + p;
        if (h >= q.y_height || v >= q.y_width) continue;
        T* to = out + (h * q.y.h + v * q.y.w + 4 * chunk);
        Vector<4, T> four;
#pragma unroll
        for (int c = 0; c < 4; ++c) store(sums[r][p][c], &four.v[c]);
        if (q.y.vectors) {
          *reinterpret_cast<Vector<4, T>*>(to) = four;
        } else {
#pragma unroll
          for (int c = 0; c < 4; ++c) to[c] = four.v[c];
        }
      }
    }
    return;
  }
  // Through shared memory, [channel][pixel], so that consecutive threads write consecutive columns.
  __syncthreads();
  const int threads = int(blockDim.x);
#pragma unroll
  for (int r = 0; r < C::PixelRows; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      Vector<C::Pixels, float> run_of_pixels;
#pragma unroll
      for (int p = 0; p < C::Pixels; ++p) run_of_pixels.v[p] = sums[r][p][c];
      float* to = image + ((4 * chunk + c) * C::pixels + chunk * 4 + (row + r) * C::Columns + column);
      *reinterpret_cast<Vector<C::Pixels, float>*>(to) = run_of_pixels;
    }
  }
  __syncthreads();
  for (int pixel = thread; pixel < C::pixels; pixel += threads) {
    const int h = tile.row + pixel / C::Columns, v = tile.column + pixel % C::Columns;
    if (h >= q.y_height || v >= q.y_width) continue;
    T* to = out + (h * q.y.h + v * q.y.w);
    for (int c = 0; c < channels; ++c) store(image[c * C::pixels + c / 4 * 4 + pixel], &to[c * q.y.c]);
  }
}

template <class C, class T>
__global__ void __launch_bounds__(C::gradient_threads, 672 / C::gradient_threads)
    grad_weight(KernelParams q, const T* __restrict__ x, T* __restrict__ w, const T* __restrict__ y) {
  constexpr int K = C::K, S = C::S;
  float* image = reinterpret_cast<float*>(shared_memory());
  const int channels = q.group_channels;
  float* gradient = image + C::gradient_x_plane * channels;
  const Tile tile = tile_of_block<C, 1>(q);
  const int first_channel = tile.group * channels;

  bring_image<C::x_rows, C::x_columns, C::every, C::gradient_x_pitch, C::gradient_x_plane>(
      image, x + (tile.n * q.x.n + int64_t(first_channel) * q.x.c), q.x, q, q.x_height, q.x_width,
      tile.row * S - q.padding_h, tile.column * S - q.padding_w);
  bring_image<C::Rows, C::Columns, C::Pixels, C::gradient_y_pitch, C::gradient_y_plane>(
      gradient, y + (tile.n * q.y.n + int64_t(first_channel) * q.y.c), q.y, q, q.y_height, q.y_width, tile.row,
      tile.column);
  wait_for_tile<T>();

  const int thread = int(threadIdx.x);
  const int run = thread % C::runs, row = thread / C::runs % C::Rows, kh = thread / C::runs / C::Rows;
  const float* positions = image + 4 * ((row * S + kh) * C::gradient_x_pitch + run * (C::every + 1));
  const float* gradients = gradient + 4 * (row * C::gradient_y_pitch + run * (C::Pixels + 1));

  float sums[C::Pixels][K] = {};
#pragma unroll 1
  for (int i = 0; i < channels; i += 4) {
    Vector<4, float> window[C::window];
#pragma unroll
    for (int j = 0; j < C::window; ++j)
      window[j] = *reinterpret_cast<const Vector<4, float>*>(positions + 4 * (j + j / C::every));
#pragma unroll
    for (int p = 0; p < C::Pixels; ++p) {
      const auto four = *reinterpret_cast<const Vector<4, float>*>(gradients + 4 * p);
#pragma unroll
      for (int kw = 0; kw < K; ++kw) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[p][kw] += four.v[c] * window[p * S + kw].v[c];
      }
    }
    positions += 4 * C::gradient_x_plane, gradients += 4 * C::gradient_y_plane;
  }

  // Through shared memory, [pixel][tap], where the image was.
  __syncthreads();
  float* weights = image;
#pragma unroll
  for (int p = 0; p < C::Pixels; ++p) {
#pragma unroll
    for (int kw = 0; kw < K; ++kw)
      weights[row * C::gradient_row + (run * C::Pixels + p) * C::gradient_pixel + kh * K + kw] = sums[p][kw];
  }
  __syncthreads();
  T* out = w + (tile.n * q.w.n + int64_t(tile.group) * q.w.g);
  if (q.w.taps_inner) {
    // A warp writes the taps of four pixels one after the other, or half of it does.
    constexpr int lanes = C::taps <= 16 ? 16 : 32, run_pixels = 4;
    const int lane = thread % lanes;
#pragma unroll 1
    for (int pixel = thread / lanes * run_pixels; pixel < C::pixels; pixel += int(blockDim.x) / lanes * run_pixels) {
      const int to_row = pixel / C::Columns, to_column = pixel % C::Columns;
      const int h = tile.row + to_row, v = tile.column + to_column;
      if (h >= q.w_height) break;
      const float* from = weights + (to_row * C::gradient_row + to_column * C::gradient_pixel + lane);
      T* to = out + (h * q.w.h + v * q.w.w + lane);
#pragma unroll
      for (int p = 0; p < run_pixels; ++p, to += q.w.w) {
        if (v + p >= q.w_width) break;
#pragma unroll
        for (int tap = 0; tap < C::taps; tap += lanes)
          if (tap + lane < C::taps) store(from[p * C::gradient_pixel + tap], &to[tap]);
      }
    }
    return;
  }
  for_each_column<C, 1>([&](int to_row, int to_column, int to_kh) {
    const int h = tile.row + to_row, v = tile.column + to_column;
    if (h >= q.w_height || v >= q.w_width) return;
    const float* from = weights + (to_row * C::gradient_row + to_column * C::gradient_pixel + to_kh * K);
    T* to = out + (to_kh * q.w.kh + h * q.w.h + v * q.w.w);
#pragma unroll
    for (int kw = 0; kw < K; ++kw) store(from[kw], &to[kw * q.w.kw]);
  });
}

}  // namespace pyinvolution::cuda::tiled
