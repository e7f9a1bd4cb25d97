// Involution on tensor cores: half and bfloat16, square kernels of K x K taps, stride S, dilation 1, 16 channels a
// group.
//
//   forward       Y[n,c,p]   = sum over taps k of W[n,g(c),k,p] * X[n,c, S*p + k - padding]
//   grad_input    X[n,c,q]   = sum over taps k of W[n,g(c),k,p] * Y[n,c,p],  p = (q + padding - k) / S where whole
//   grad_weight   W[n,g,k,p] = sum over c of group g of Y[n,c,p] * X[n,c, S*p + k - padding]
//
// X is N,C,H,W; W is N,G,K,K,Ho,Wo; Y is N,C,Ho,Wo (in gradients, grad_output). A block has a tile of Rows x Columns
// pixels of Y and a chunk of up to 4 groups; X below it with its halo and zeros outside the image, W and Y lie in
// shared memory as they are stored, and cross to and from it in 4 to 16 bytes, in the background where they come.
//
// forward: for a strip of 8 pixels and a kernel row,
//     Y[16 channels x 8 pixels] += X[16 channels x 8*(S+1) positions] * band[8*(S+1) positions x 8 pixels]
// where band[i][p] is the weight of pixel p at tap i - S*p, and zero beside the kernel. A lane's place in the operand B
// is a pair of positions of one pixel; the positions of a pixel repeat modulo 8, so a lane has one pair of taps for all
// kernel rows: two 16-bit loads, one PRMT, and a mask for each pair of registers. X goes through ldmatrix and serves 4
// rows of Y. A warp owns one group of one strip of 4 rows: for K = 7, S = 1, 28 HMMA, 10 ldmatrix and 56 loads of
// weights. The zeros of the band make NaN of an Inf beside a pixel's kernel. So where a sum is not finite, the warp
// computes it again tap by tap.
//
// grad_input: grad_input.cuh.
//
// grad_weight: for 2 rows of 8 pixels and a row of X, D[16 pixels x 8*(S+1) positions] = Y * X over the 16 channels,
// from which each lane takes the pair of taps that is its own as above. No product is beside a kernel.
//
// Limits, forward, K = 7, S = 1, 16 channels a group, a tile of 8 x 16 pixels of 4 groups on one SM of an H200, by
// counting: memory 83 KB (x, w, y once), 4500 clocks at the copy rate; shared memory about 2200; issue about 1700; HMMA
// 450 of 16 x 8 x 16. So memory is the limit, where `tiled` is bound by shared memory: it keeps 4 bytes a number and
// issues an FMA for each 32 products, an HMMA makes 2048 (896 of them inside a kernel).
#pragma once

#include <type_traits>

#include "../launch.cuh"

namespace pyinvolution::cuda::mma {

constexpr int group_channels = 16;
constexpr int chunk_groups = 4;
constexpr int chunk_channels = chunk_groups * group_channels;

// Warps: of a block, each has one group.
template <int K_, int S_, int Rows_, int Columns_, int Warps_>
struct Config {
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

// Pixels in shared memory, offsets in bytes. With channels inside, 128 bytes a position, of which the 16-byte pieces
// are exchanged so that 8 neighbours have theirs in different banks; else an odd number of pieces a channel does that.
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

// The same of weights, whose taps and groups are evenly spaced.
struct WeightView {
  int64_t n;
  int tap, h, w;
  int vector;  // 4, 2 or 1
};

struct Geometry {
  int groups, chunks;
  int x_height, x_width;  // of the image that has a halo
  int y_height, y_width;  // of the image that is tiled
  int w_height, w_width;  // of the weights' pixels
  int padding_h, padding_w;
  int shift;  // positions that come before the first tap, so that x can be moved in vectors
  int tiles_h, tiles_w;
  int stages;  // of the gradient of the input
  View x, y;
  WeightView w;
};

// Where a block is: chunks of groups are next to each other in time, then columns of tiles.
struct Tile {
  int64_t n;
  int first_group, groups, row, column;
};

template <class C>
__device__ __forceinline__ Tile tile_of_block(const Geometry& q) {
  Tile tile;
  unsigned block = blockIdx.x;
  tile.first_group = int(block % unsigned(q.chunks)) * chunk_groups, block /= unsigned(q.chunks);
  tile.groups = min(chunk_groups, q.groups - tile.first_group);
  tile.column = int(block % unsigned(q.tiles_w)) * C::Columns, block /= unsigned(q.tiles_w);
  tile.row = int(block % unsigned(q.tiles_h)) * C::Rows;
  tile.n = block / unsigned(q.tiles_h);
  return tile;
}

template <int V, class T>
struct alignas(V * sizeof(T)) Vector {
  T v[V];
};

// Vectors that one thread moves, each `step` elements after the one before. Only those from `begin` to `end` are in the
// tensor; the others are zeros.
struct Line {
  int offset, step, count, begin, end;
};

template <int V, class T>
__device__ __forceinline__ void bring_line(char* shared, int shared_step, const T* memory, const Line& line) {
  if constexpr (V > 1) {
#pragma unroll 4
    for (int i = 0; i < line.count; ++i) {
      const bool valid = i >= line.begin && i < line.end;
      copy_async<V * sizeof(T)>(shared + i * shared_step, memory + (valid ? line.offset + i * line.step : 0), valid);
    }
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

template <int V, class T>
__device__ __forceinline__ void put_line(const char* shared, int shared_step, T* memory, const Line& line) {
#pragma unroll 4
  for (int i = line.begin; i < line.end; ++i)
    *reinterpret_cast<Vector<V, T>*>(memory + (line.offset + i * line.step)) =
        *reinterpret_cast<const Vector<V, T>*>(shared + i * shared_step);
}

// Calls `body` with the offset in shared memory, the step there and the line in memory of all that this thread moves of
// an image from (first_row, first_column) on.
template <class I, int V, int Warps, class Body>
__device__ __forceinline__ void for_each_line(const View& view, int channels, int height, int width, int first_row,
                                              int first_column, const Body& body) {
  const int thread = int(threadIdx.x);
  if constexpr (I::channels_inner) {
    constexpr int units = chunk_channels / V;
    const int channel = thread % units * V;
    if (channel >= channels) return;
    const int begin = max(0, -first_row), end = min(I::Rows, height - first_row);
    for (int column = thread / units; column < I::Columns; column += 32 * Warps / units) {
      const int v = first_column + column;
      const bool inside = v >= 0 && v < width;
      body(I::at(0, column, channel), I::Columns * I::pitch,
           Line{first_row * view.h + v * view.w + channel, view.h, I::Rows, begin, inside ? end : begin});
    }
  } else {
    constexpr int units = I::Columns / V;
    const int first = thread / 32, count = (channels - first + Warps - 1) / Warps;
    for (int i = thread % 32; i < I::Rows * units; i += 32) {
      const int row = i / units, column = i % units * V, h = first_row + row, v = first_column + column;
      const bool inside = h >= 0 && h < height && v >= 0 && v < width;
      body(I::at(row, column, first), Warps * I::pitch,
           Line{h * view.h + v + first * view.c, Warps * view.c, count, 0, inside ? count : 0});
    }
  }
}

// The same of the weights of `groups` groups, whose pixels begin at (first_row, first_column).
template <class C, class W, int V, class Body>
__device__ __forceinline__ void for_each_line(const Geometry& q, int groups, int first_row, int first_column,
                                              const Body& body) {
  const int thread = int(threadIdx.x), taps = groups * C::taps;
  const WeightView& view = q.w;
  if constexpr (W::taps_inner) {
    const int begin = max(0, -first_row), end = min(C::w_rows, q.w_height - first_row);
    for (int tap = thread % 32 * V; tap < taps; tap += 32 * V) {
      for (int column = thread / 32; column < C::w_columns; column += C::Warps) {
        const int v = first_column + column;
        const bool inside = v >= 0 && v < q.w_width;
        body(W::at(0, column, tap), C::w_columns * W::pitch,
             Line{first_row * view.h + v * view.w + tap, view.h, C::w_rows, begin, inside ? end : begin});
      }
    }
  } else {
    constexpr int units = C::w_columns / V, step = C::threads / (C::w_rows * units);
    const int row = thread / units % C::w_rows, column = thread % units * V, first = thread / units / C::w_rows;
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

template <class I, int Warps, class T>
__device__ __forceinline__ void bring_image(char* shared, const T* image, const View& view, int channels, int height,
                                            int width, int first_row, int first_column) {
  with_vector<I::channels_inner>(view.vector, [&](auto v) {
    for_each_line<I, v.value, Warps>(
        view, channels, height, width, first_row, first_column,
        [&](int to, int step, const Line& line) { bring_line<v.value>(shared + to, step, image, line); });
  });
}

template <class I, int Warps, class T>
__device__ __forceinline__ void put_image(const char* shared, T* image, const View& view, int channels, int height,
                                          int width, int first_row, int first_column) {
  with_vector<I::channels_inner>(view.vector, [&](auto v) {
    for_each_line<I, v.value, Warps>(
        view, channels, height, width, first_row, first_column,
        [&](int from, int step, const Line& line) { put_line<v.value>(shared + from, step, image, line); });
  });
}

template <class C, class W, class T>
__device__ __forceinline__ void bring_weights(char* shared, const T* w, const Geometry& q, int groups, int first_row,
                                              int first_column) {
  with_vector<false>(q.w.vector, [&](auto v) {
    for_each_line<C, W, v.value>(q, groups, first_row, first_column, [&](int to, int step, const Line& line) {
      bring_line<v.value>(shared + to, step, w, line);
    });
  });
}

__device__ __forceinline__ void wait_for_tile() {
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
}

// The pair of taps of a kernel row that a lane has in the band, and in which fragment of 8 positions. One of them may
// be beside the kernel.
struct Pair {
  int low, fragment;

  template <class C>
  static __device__ __forceinline__ Pair of_lane(int lane, int shift) {
    const int first = lane % 4 * 2 - C::S * (lane / 4) - shift;  // the tap of the lane's first position
    const int low = ((first + 1) & 7) - 1;
    return {low, (low - first) / 8};
  }
  template <int K>
  __device__ __forceinline__ bool has_low() const {
    return low >= 0 && low < K;
  }
  template <int K>
  __device__ __forceinline__ bool has_high() const {
    return low + 1 < K;
  }
};

// The rows of X below a strip, as fragments [16 channels][8 positions], or transposed.
template <class C, class I>
struct Positions {
  const char* row;

  __device__ __forceinline__ Positions(const char* image, int group, int strip, int first_row, int lane) {
    const int matrix = lane / 8, i = lane % 8;
    row = image +
          (I::channels_inner
               ? I::at(first_row, strip * 8 * C::S + matrix / 2 * 8 + i, group * group_channels + matrix % 2 * 8)
               : I::at(first_row, strip * 8 * C::S + matrix / 2 * 8, group * group_channels + matrix % 2 * 8 + i));
  }
  // Fragment f is in registers 2*f and 2*f + 1, one for 8 channels each.
  template <bool ChannelsFirst>
  __device__ __forceinline__ void load(uint32_t (&first)[4], uint32_t (&last)[2], int x_row) const {
    constexpr int row_bytes = I::Columns * (I::channels_inner ? I::pitch : 2);
    constexpr int two_fragments = 16 * (I::channels_inner ? I::pitch : 2);
    constexpr bool transposed = I::channels_inner == ChannelsFirst;
    if constexpr (transposed) {
      load_matrices_transposed(first, row + x_row * row_bytes);
      if constexpr (C::fragments > 2) load_matrices_transposed(last, row + x_row * row_bytes + two_fragments);
    } else {
      load_matrices(first, row + x_row * row_bytes);
      if constexpr (C::fragments > 2) load_matrices(last, row + x_row * row_bytes + two_fragments);
    }
  }
};

__device__ __forceinline__ uint32_t bits_at(const char* shared) { return *reinterpret_cast<const uint16_t*>(shared); }

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  Vector<2, T> pair;
  store(low, &pair.v[0]);
  store(high, &pair.v[1]);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

// Whether the first sums of all lanes are finite: zero times a finite number is zero, else NaN.
template <int Count = 4, int Rows>
__device__ __forceinline__ bool all_finite(const float (&sums)[Rows][4]) {
  float zero = 0;
#pragma unroll
  for (int r = 0; r < Count; ++r) {
#pragma unroll
    for (int i = 0; i < 4; ++i) zero += sums[r][i] * 0.0f;
  }
  return !__any_sync(~0u, zero != 0.0f);
}

// Writes the sums of all warps, [row][16 channels x 8 pixels], by way of shared memory that they have finished reading.
template <class C, class I, class T>
__device__ __forceinline__ void put_sums(char* shared, const float (&sums)[4][4], T* out, const Geometry& q,
                                         const Tile& tile, int group, int strip, int row) {
  const int lane = int(threadIdx.x) % 32;
  __syncthreads();
  if (group < tile.groups) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int channel = group * group_channels + half * 8;
        uint32_t bits = pack<T>(sums[r][2 * half], sums[r][2 * half + 1]);
        int at;
        if constexpr (I::channels_inner) {
          bits = transpose_matrix(bits);
          at = I::at(row + r, strip * 8 + lane / 4, channel + lane % 4 * 2);
        } else {
          at = I::at(row + r, strip * 8 + lane % 4 * 2, channel + lane / 4);
        }
        *reinterpret_cast<uint32_t*>(shared + at) = bits;
      }
    }
  }
  __syncthreads();
  put_image<I, C::Warps>(shared, out, q.y, tile.groups * group_channels, q.y_height, q.y_width, tile.row, tile.column);
}

template <class C, bool ChannelsInner, bool TapsInner, class T>
__global__ void __launch_bounds__(C::threads, 2)
    apply(Geometry q, const T* __restrict__ x, const T* __restrict__ w, T* __restrict__ y) {
  constexpr int K = C::K, S = C::S, rows = 4;
  using W = Weights<C, TapsInner>;
  using I = Image<C::x_rows, C::x_columns, ChannelsInner>;
  static_assert(C::Warps == chunk_groups * C::strips * (C::Rows / rows),
                "a warp for each group and four rows of a strip");
  char* weights = shared_memory();
  char* image = weights + W::bytes;
  const Tile tile = tile_of_block<C>(q);
  const int channels = tile.groups * group_channels, first_channel = tile.first_group * group_channels;

  bring_image<I, C::Warps>(image, x + (tile.n * q.x.n + int64_t(first_channel) * q.x.c), q.x, channels, q.x_height,
                           q.x_width, tile.row * S - q.padding_h, tile.column * S - q.padding_w - q.shift);
  const T* group_weights = w + (tile.n * q.w.n + int64_t(tile.first_group) * C::taps * q.w.tap);
  bring_weights<C, W>(weights, group_weights, q, tile.groups, tile.row, tile.column);
  wait_for_tile();

  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int group = warp % chunk_groups, strip = warp / chunk_groups % C::strips;
  const int row = warp / chunk_groups / C::strips * rows;
  float sums[rows][4] = {};
  if (group < tile.groups) {
    const Pair pair = Pair::of_lane<C>(lane, q.shift);
    const uint32_t mask = (pair.has_low<K>() ? 0xffffu : 0) | (pair.has_high<K>() ? 0xffff0000u : 0);
    uint32_t masks[C::fragments];
#pragma unroll
    for (int f = 0; f < C::fragments; ++f) masks[f] = pair.fragment == f ? mask : 0;
    const int column = strip * 8 + lane / 4, taps = group * C::taps;
    const char* low = weights + W::at(row, column, taps + min(max(pair.low, 0), K - 1));
    const char* high = weights + W::at(row, column, taps + min(pair.low + 1, K - 1));
    const Positions<C, I> positions(image, group, strip, row * S, lane);
#pragma unroll
    for (int x_row = 0; x_row < (rows - 1) * S + K; ++x_row) {
      uint32_t a[4], a_last[2];
      positions.template load<true>(a, a_last, x_row);
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        const int kh = x_row - r * S;
        if (kh < 0 || kh >= K) continue;
        const int at = W::at(r, 0, kh * K);
        const uint32_t taps_of_row = __byte_perm(bits_at(low + at), bits_at(high + at), 0x5410);
        const uint32_t b[2] = {taps_of_row & masks[0], taps_of_row & masks[1]};
        multiply<T>(sums[r], a, b);
        if constexpr (C::fragments > 2) {
          const uint32_t b_last[1] = {taps_of_row & masks[2]};
          multiply<T>(sums[r], a_last, b_last);
        }
      }
    }

    if (!all_finite(sums)) {
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        float again[4] = {};
#pragma unroll 1
        for (int tap = 0; tap < C::taps; ++tap) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int channel = group * group_channels + lane / 4 + i / 2 * 8, v = strip * 8 + lane % 4 * 2 + i % 2;
            const int x_row = (row + r) * S + tap / K, position = v * S + tap % K + q.shift;
            again[i] += load(*reinterpret_cast<const T*>(weights + W::at(row + r, v, taps + tap))) *
                        load(*reinterpret_cast<const T*>(image + I::at(x_row, position, channel)));
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[r][i] = again[i];
      }
    }
  }

  T* out = y + (tile.n * q.y.n + int64_t(first_channel) * q.y.c);
  if (q.y.channels_inner) {
    put_sums<C, Image<C::Rows, C::Columns, true>>(image, sums, out, q, tile, group, strip, row);
  } else {
    put_sums<C, Image<C::Rows, C::Columns, false>>(image, sums, out, q, tile, group, strip, row);
  }
}

template <class C, bool ChannelsInner, bool TapsInner, class T>
__global__ void __launch_bounds__(C::threads, 2)
    grad_weight(Geometry q, const T* __restrict__ x, T* __restrict__ w, const T* __restrict__ y) {
  constexpr int K = C::K, S = C::S, units = C::strips * (C::Rows / 2);
  using W = Weights<C, TapsInner>;
  using I = Image<C::x_rows, C::x_columns, ChannelsInner>;
  using ChannelsInside = Image<C::Rows, C::Columns, true>;
  using ColumnsInside = Image<C::Rows, C::Columns, false>;
  char* weights = shared_memory();
  char* image = weights + W::bytes;
  char* gradient = image + I::bytes;
  const Tile tile = tile_of_block<C>(q);
  const int channels = tile.groups * group_channels, first_channel = tile.first_group * group_channels;

  bring_image<I, C::Warps>(image, x + (tile.n * q.x.n + int64_t(first_channel) * q.x.c), q.x, channels, q.x_height,
                           q.x_width, tile.row * S - q.padding_h, tile.column * S - q.padding_w - q.shift);
  const T* gradients = y + (tile.n * q.y.n + int64_t(first_channel) * q.y.c);
  if (q.y.channels_inner) {
    bring_image<ChannelsInside, C::Warps>(gradient, gradients, q.y, channels, q.y_height, q.y_width, tile.row,
                                          tile.column);
  } else {
    bring_image<ColumnsInside, C::Warps>(gradient, gradients, q.y, channels, q.y_height, q.y_width, tile.row,
                                         tile.column);
  }
  wait_for_tile();

  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, group = warp % chunk_groups;
  if (group < tile.groups) {
    const Pair pair = Pair::of_lane<C>(lane, q.shift);
    const bool has_low = pair.has_low<K>(), has_high = pair.has_high<K>();
    const int taps = group * C::taps, matrix = lane / 8, i = lane % 8;
#pragma unroll 1
    for (int unit = warp / chunk_groups; unit < units; unit += C::Warps / chunk_groups) {
      const int strip = unit % C::strips, row = unit / C::strips * 2;
      uint32_t a[4];  // [16 pixels][16 channels]
      const int channel = group * group_channels + matrix / 2 * 8;
      if (q.y.channels_inner) {
        load_matrices(a, gradient + ChannelsInside::at(row + matrix % 2, strip * 8 + i, channel));
      } else {
        load_matrices_transposed(a, gradient + ColumnsInside::at(row + matrix % 2, strip * 8, channel + i));
      }
      const Positions<C, I> positions(image, group, strip, row * S, lane);
      char* low = weights + W::at(row, strip * 8 + lane / 4, taps + max(pair.low, 0));
      char* high = weights + W::at(row, strip * 8 + lane / 4, taps + pair.low + 1);
#pragma unroll
      for (int x_row = 0; x_row < S + K; ++x_row) {
        uint32_t b[4], b_last[2];
        positions.template load<false>(b, b_last, x_row);
        float d[C::fragments][4] = {};
        multiply<T>(d[0], a, {b[0], b[1]});
        multiply<T>(d[1], a, {b[2], b[3]});
        if constexpr (C::fragments > 2) multiply<T>(d[2], a, b_last);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int kh = x_row - r * S;
          if (kh < 0 || kh >= K) continue;
          float first = d[0][2 * r], second = d[0][2 * r + 1];
#pragma unroll
          for (int f = 1; f < C::fragments; ++f) {
            if (pair.fragment == f) first = d[f][2 * r], second = d[f][2 * r + 1];
          }
          const int at = W::at(r, 0, kh * K);
          if (has_low) store(first, reinterpret_cast<T*>(low + at));
          if (has_high) store(second, reinterpret_cast<T*>(high + at));
        }
      }
    }
  }
  __syncthreads();
  T* out = w + (tile.n * q.w.n + int64_t(tile.first_group) * C::taps * q.w.tap);
  with_vector<false>(q.w.vector, [&](auto v) {
    for_each_line<C, W, v.value>(q, tile.groups, tile.row, tile.column, [&](int from, int step, const Line& line) {
      put_line<v.value>(weights + from, step, out, line);
    });
  });
}

}  // namespace pyinvolution::cuda::mma
