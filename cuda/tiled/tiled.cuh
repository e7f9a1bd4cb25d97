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
// halo and zeros outside the image ([row][position][channel]), and the K*K weights of each pixel ([pixel][tap]). Every
// weight and output crosses the memory bus once, an x 1 to 3 times, mostly from L2 (neighbouring tiles share halos,
// and blocks of neighbouring groups run together, which share the sectors of W). Float goes by cp.async, so that the
// whole tile is under way at once.
//
// apply (forward and grad_input): a thread owns PixelRows x Pixels pixels x 4 channels. It reads a row of X as 16-byte
// vectors into registers, uses each for up to K taps of PixelRows kernel rows, and reads each weight once for 4
// channels (its neighbours broadcast).
// grad_weight: a thread owns Pixels pixels x the K taps of a kernel row and walks over the channels, 4 at a time.
//
// Limits, forward, float, K=7, 16 channels a group, a tile of 8 x 16 on one SM, by counting: memory 41.5 KB, 2230
// clocks at the H200's copy rate; issue 784 clocks of FMA and about 600 of others; shared memory 1424 + 400. So memory
// is the limit in float; in half and bfloat16, whose bytes are half, shared memory is.
#pragma once

#include "../launch.cuh"

namespace pyinvolution::cuda::tiled {

template <int K_, int S_, int Rows_, int Columns_, int PixelRows_, int Pixels_>
struct Config {
  static constexpr int K = K_, S = S_, Rows = Rows_, Columns = Columns_, PixelRows = PixelRows_, Pixels = Pixels_;
  static constexpr int taps = K * K;
  static constexpr int pixels = Rows * Columns;
  static constexpr int runs = Columns / Pixels;  // of pixels of one thread, in a row of the tile
  static constexpr int window = (Pixels - 1) * S + K;

  // A thread's reads of X start Pixels*S positions after its neighbour's; one position of padding after as many puts
  // them into different banks.
  static constexpr int x_rows = (Rows - 1) * S + K, x_columns = (Columns - 1) * S + K;
  static constexpr int x_every = Pixels * S;
  static constexpr int x_pitch = x_columns + (x_columns - 1) / x_every;
  static constexpr int y_pitch = Columns + (Columns - 1) / Pixels;

  // An odd number of floats a pixel keeps the pixels of a row in different banks; one more a row, the rows.
  static constexpr int w_pixel = taps | 1;
  static constexpr int w_pitch = Columns * w_pixel + 1;
  static constexpr int w_floats = (Rows * w_pitch + 3) / 4 * 4;
};

// How the channels and pixels of an image lie in memory, in elements.
struct View {
  int64_t n;
  int c, h, w;
  bool vectors;  // four channels are 4 * sizeof(T) aligned bytes
};

// The same of the weights, of a group and its pixels.
struct WeightView {
  int64_t n;
  int g, kh, kw, h, w;
  bool taps_inner;  // the taps of a pixel are consecutive, else the columns are
};

struct Geometry {
  int group_channels, groups, kernel;
  int x_height, x_width;  // of the image that has a halo
  int y_height, y_width;  // of the image that is tiled
  int w_height, w_width;  // of the weights' pixels
  int padding_h, padding_w;
  int tiles_h, tiles_w;
  View x, y;
  WeightView w;
};

// Where a block is: groups are next to each other in time, then columns of tiles.
struct Tile {
  int64_t n;
  int group, row, column;
  int part;  // of a strided gradient: the parities of its pixels
};

template <class C, int Classes>
__device__ __forceinline__ Tile tile_of_block(const Geometry& q) {
  Tile tile{};
  unsigned block = blockIdx.x;
  if constexpr (Classes > 1) tile.part = int(block % Classes), block /= Classes;
  tile.group = int(block % unsigned(q.groups)), block /= unsigned(q.groups);
  tile.column = int(block % unsigned(q.tiles_w)) * C::Columns, block /= unsigned(q.tiles_w);
  tile.row = int(block % unsigned(q.tiles_h)) * C::Rows;
  tile.n = block / unsigned(q.tiles_h);
  return tile;
}

__device__ __forceinline__ bool inside(int h, int w, int height, int width) {
  return h >= 0 && h < height && w >= 0 && w < width;
}

struct alignas(16) Float4 {
  float v[4];
};
template <class T>
struct alignas(4 * sizeof(T)) Vector4 {
  T v[4];
};

// Brings one element into shared memory as float, or a zero.
__device__ __forceinline__ void bring(float* to, const float* from, bool valid) { copy_async<4>(to, from, valid); }
template <class T>
__device__ __forceinline__ void bring(float* to, const T* from, bool valid) {
  *to = valid ? load(*from) : 0.0f;
}

// Brings four channels.
template <class T>
__device__ __forceinline__ void bring4(float* to, const T* from, int step, bool vectors, bool valid) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (vectors) {
      copy_async<16>(to, from, valid);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) copy_async<4>(to + i, from + i * step, valid);
    }
  } else {
    Float4 four{};
    if (valid) {
      if (vectors) {
        const Vector4<T> elements = *reinterpret_cast<const Vector4<T>*>(from);
#pragma unroll
        for (int i = 0; i < 4; ++i) four.v[i] = load(elements.v[i]);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) four.v[i] = load(from[i * step]);
      }
    }
    *reinterpret_cast<Float4*>(to) = four;
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

// Rows x Columns pixels of an image from (first_row, first_column) on, the channels of one group, zeros outside. A
// position of padding follows each Every ones.
template <int Rows, int Columns, int Every, int Pitch, class T>
__device__ __forceinline__ void bring_image(float* shared, const T* image, const View& view, int channels, int height,
                                            int width, int first_row, int first_column) {
  // Consecutive threads take what is consecutive in memory: channels, or pixels.
  const int chunks = channels / 4, threads = int(blockDim.x), thread = int(threadIdx.x);
  const bool channels_inner = view.c == 1;
  const int step = channels_inner ? threads / chunks : threads;
  const int first = channels_inner ? thread / chunks : thread;
  const int first_chunk = channels_inner ? thread % chunks : 0;
  const int end_chunk = channels_inner ? first_chunk + 1 : chunks;
  if (first >= step) return;
  for (int chunk = first_chunk; chunk < end_chunk; ++chunk) {
#pragma unroll 4
    for (int position = first; position < Rows * Columns; position += step) {
      const int row = position / Columns, column = position % Columns;
      const int h = first_row + row, w = first_column + column;
      const bool valid = inside(h, w, height, width);
      const int offset = valid ? h * view.h + w * view.w + 4 * chunk * view.c : 0;
      bring4(shared + (row * Pitch + column + column / Every) * channels + 4 * chunk, image + offset, view.c,
             view.vectors, valid);
    }
  }
}

// Calls `each(pixel, row, column, tap, kh, kw)` for every pixel of Rows x Columns and every tap, consecutive threads on
// what is consecutive in memory.
template <int K, int Rows, int Columns, class Each>
__device__ __forceinline__ void for_each_weight(bool taps_inner, const Each& each) {
  constexpr int taps = K * K, slots = taps <= 16 ? 16 : 32;
  const int threads = int(blockDim.x), thread = int(threadIdx.x);
  if (taps_inner) {
    const int slot = thread % slots;
    for (int pixel = thread / slots; pixel < Rows * Columns; pixel += threads / slots) {
      const int row = pixel / Columns, column = pixel % Columns;
#pragma unroll
      for (int first = 0; first < taps; first += slots) {
        const int tap = first + slot;
        if (tap < taps) each(row, column, tap, tap / K, tap % K);
      }
    }
  } else {
    for (int pixel = thread; pixel < Rows * Columns; pixel += threads) {
      const int row = pixel / Columns, column = pixel % Columns;
#pragma unroll 1
      for (int kh = 0; kh < K; ++kh) {
#pragma unroll
        for (int kw = 0; kw < K; ++kw) each(row, column, kh * K + kw, kh, kw);
      }
    }
  }
}

// The weights of the tile's pixels.
template <class C, class T>
__device__ __forceinline__ void bring_weights(float* shared, const T* w, const Geometry& q, const Tile& tile) {
  for_each_weight<C::K, C::Rows, C::Columns>(q.w.taps_inner, [&](int row, int column, int tap, int kh, int kw) {
    const int h = tile.row + row, v = tile.column + column;
    if (h < q.w_height && v < q.w_width)
      bring(shared + row * C::w_pitch + column * C::w_pixel + tap,
            w + (kh * q.w.kh + kw * q.w.kw + h * q.w.h + v * q.w.w), true);
  });
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
__device__ __forceinline__ void bring_weights_to(float* shared, const T* w, const Geometry& q, const Tile& tile,
                                                 const Class& rows, const Class& columns) {
  constexpr int K = C::K, halo = K - 1;
  const auto one = [&](int row, int column, int h, int v, int tap, int th, int tw) {
    const int kh = th * Stride + rows.parity, kw = tw * Stride + columns.parity;
    if (Stride > 1 && (kh >= q.kernel || kw >= q.kernel)) return;
    const bool valid = inside(h, v, q.w_height, q.w_width);
    const int offset = valid ? kh * q.w.kh + kw * q.w.kw + h * q.w.h + v * q.w.w : 0;
    bring(shared + row * C::w_pitch + column * C::w_pixel + C::taps - 1 - tap, w + offset, valid);
  };
  const int first_row = tile.row + rows.shift, first_column = tile.column + columns.shift;
  if (q.w.taps_inner) {
    // By output pixels, whose taps are consecutive in memory and go to as many pixels of the tile.
    for_each_weight<K, C::Rows + halo, C::Columns + halo>(true, [&](int row, int column, int tap, int th, int tw) {
      const int to_row = row - halo + th, to_column = column - halo + tw;
      if (inside(to_row, to_column, C::Rows, C::Columns))
        one(to_row, to_column, first_row - halo + row, first_column - halo + column, tap, th, tw);
    });
  } else {
    for_each_weight<K, C::Rows, C::Columns>(false, [&](int row, int column, int tap, int th, int tw) {
      one(row, column, first_row + row - th, first_column + column - tw, tap, th, tw);
    });
  }
}

// GradientStride is 0 for the forward; else this is the gradient of the input of an involution with that stride, and C
// describes the sum over one class.
template <class C, int GradientStride, class T>
__global__ void __launch_bounds__(256, 1)
    apply(Geometry q, const T* __restrict__ x, const T* __restrict__ w, T* __restrict__ y) {
  constexpr int K = C::K, S = C::S;
  static_assert(GradientStride == 0 || S == 1, "a gradient gathers pixel by pixel");
  float* weights = reinterpret_cast<float*>(shared_memory());
  float* image = weights + C::w_floats;
  const int channels = q.group_channels, chunks = channels / 4;
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
  bring_image<C::x_rows, C::x_columns, C::x_every, C::x_pitch>(
      image, x + (tile.n * q.x.n + int64_t(first_channel) * q.x.c), q.x, channels, q.x_height, q.x_width,
      tile.row * S - padding_h, tile.column * S - padding_w);
  wait_for_tile<T>();

  const int thread = int(threadIdx.x);
  const int chunk = thread % chunks, run = thread / chunks % C::runs;
  const int row = thread / chunks / C::runs * C::PixelRows, column = run * C::Pixels;

  float sums[C::PixelRows][C::Pixels][4] = {};
  const float* positions = image + (row * S * C::x_pitch + run * (C::x_every + 1)) * channels + 4 * chunk;
  const float* kernels = weights + row * C::w_pitch + column * C::w_pixel;
#pragma unroll 1
  for (int x_row = 0; x_row < (C::PixelRows - 1) * S + K; ++x_row) {
    Float4 window[C::window];
#pragma unroll
    for (int i = 0; i < C::window; ++i)
      window[i] = *reinterpret_cast<const Float4*>(positions + (x_row * C::x_pitch + i + i / C::x_every) * channels);
#pragma unroll
    for (int r = 0; r < C::PixelRows; ++r) {
      const int kh = x_row - r * S;
      if (kh < 0 || kh >= K) continue;
      // Reversed, the tap that a class lacks is the first one. A weight of zero would not do: it makes NaN of Inf.
      if (GradientStride > 1 && short_rows && kh == 0) continue;
      const float* taps = kernels + r * C::w_pitch + kh * K;
#pragma unroll
      for (int kw = 0; kw < K; ++kw) {
        if (GradientStride > 1 && kw == 0 && short_columns) continue;
#pragma unroll
        for (int p = 0; p < C::Pixels; ++p) {
          const float weight = taps[p * C::w_pixel + kw];
#pragma unroll
          for (int c = 0; c < 4; ++c) sums[r][p][c] += weight * window[p * S + kw].v[c];
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
        Vector4<T> four;
#pragma unroll
        for (int c = 0; c < 4; ++c) store(sums[r][p][c], &four.v[c]);
        if (q.y.vectors) {
          *reinterpret_cast<Vector4<T>*>(to) = four;
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
      float* to = image + (4 * chunk + c) * C::pixels + chunk * 8 + (row + r) * C::Columns + column;
#pragma unroll
      for (int p = 0; p < C::Pixels; ++p) to[p] = sums[r][p][c];
    }
  }
  __syncthreads();
  for (int pixel = thread; pixel < C::pixels; pixel += threads) {
    const int h = tile.row + pixel / C::Columns, v = tile.column + pixel % C::Columns;
    if (h >= q.y_height || v >= q.y_width) continue;
    T* to = out + (h * q.y.h + v * q.y.w);
    for (int c = 0; c < channels; ++c) store(image[c * C::pixels + c / 4 * 8 + pixel], &to[c * q.y.c]);
  }
}

template <class C, class T>
__global__ void __launch_bounds__(256, 1)
    grad_weight(Geometry q, const T* __restrict__ x, T* __restrict__ w, const T* __restrict__ y) {
  constexpr int K = C::K, S = C::S;
  float* image = reinterpret_cast<float*>(shared_memory());
  const int channels = q.group_channels, chunks = channels / 4;
  float* gradient = image + C::x_rows * C::x_pitch * channels;
  const Tile tile = tile_of_block<C, 1>(q);
  const int first_channel = tile.group * channels;

  bring_image<C::x_rows, C::x_columns, C::x_every, C::x_pitch>(
      image, x + (tile.n * q.x.n + int64_t(first_channel) * q.x.c), q.x, channels, q.x_height, q.x_width,
      tile.row * S - q.padding_h, tile.column * S - q.padding_w);
  bring_image<C::Rows, C::Columns, C::Pixels, C::y_pitch>(gradient,
                                                          y + (tile.n * q.y.n + int64_t(first_channel) * q.y.c), q.y,
                                                          channels, q.y_height, q.y_width, tile.row, tile.column);
  wait_for_tile<T>();

  const int thread = int(threadIdx.x);
  const int run = thread % C::runs, row = thread / C::runs % C::Rows, kh = thread / C::runs / C::Rows;
  const float* positions = image + ((row * S + kh) * C::x_pitch + run * (C::x_every + 1)) * channels;
  const float* gradients = gradient + (row * C::y_pitch + run * (C::Pixels + 1)) * channels;

  float sums[C::Pixels][K] = {};
  // Neighbours start at different channels, which are in different banks.
  int chunk = (run / 2 + row % 2 * 2) % chunks;
#pragma unroll 1
  for (int i = 0; i < chunks; ++i) {
    Float4 window[C::window];
#pragma unroll
    for (int j = 0; j < C::window; ++j)
      window[j] = *reinterpret_cast<const Float4*>(positions + (j + j / C::x_every) * channels + 4 * chunk);
#pragma unroll
    for (int p = 0; p < C::Pixels; ++p) {
      const Float4 four = *reinterpret_cast<const Float4*>(gradients + p * channels + 4 * chunk);
#pragma unroll
      for (int kw = 0; kw < K; ++kw) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[p][kw] += four.v[c] * window[p * S + kw].v[c];
      }
    }
    chunk = chunk + 1 < chunks ? chunk + 1 : 0;
  }

  // Through shared memory, [pixel][tap], where the image was.
  __syncthreads();
  float* weights = image;
#pragma unroll
  for (int p = 0; p < C::Pixels; ++p) {
#pragma unroll
    for (int kw = 0; kw < K; ++kw)
      weights[row * C::w_pitch + (run * C::Pixels + p) * C::w_pixel + kh * K + kw] = sums[p][kw];
  }
  __syncthreads();
  T* out = w + (tile.n * q.w.n + int64_t(tile.group) * q.w.g);
  for_each_weight<K, C::Rows, C::Columns>(q.w.taps_inner, [&](int r, int column, int tap, int tap_h, int tap_w) {
    const int h = tile.row + r, v = tile.column + column;
    if (h < q.w_height && v < q.w_width)
      store(weights[r * C::w_pitch + column * C::w_pixel + tap],
            &out[tap_h * q.w.kh + tap_w * q.w.kw + h * q.w.h + v * q.w.w]);
  });
}

}  // namespace pyinvolution::cuda::tiled
