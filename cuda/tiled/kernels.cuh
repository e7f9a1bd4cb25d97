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
};

struct KernelParams {
  int group_channels, groups, kernel;
  int x_height, x_width;  // of the image that has a halo
  int y_height, y_width;  // of the image that is tiled
  int w_height, w_width;  // of the weights' pixels
  int padding_h, padding_w;
  int tiles_h, tiles_w;
  Division by_groups, by_tiles_h, by_tiles_w;
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

struct alignas(16) Float4 {
  float v[4];
};
template <class T>
struct alignas(4 * sizeof(T)) Vector4 {
  T v[4];
};

// One of the loads of a thread, with offsets in elements. A load that is not valid reads the first element and brings
// zero, so that loads need no branch.
struct Move {
  bool exists, valid;
  int to, from;
};

// How many moves a thread makes at a time. Float is copied in the background. The other types pass through registers,
// and a thread waits once for a batch instead of once for each.
template <class T>
constexpr int batch = sizeof(T) == sizeof(float) ? 8 : 16;

// Brings elements into shared memory as float: moves `at(0)` to `at(N - 1)`.
template <int N, class T, class At>
__device__ __forceinline__ void bring(float* shared, const T* memory, const At& at) {
  if constexpr (sizeof(T) == sizeof(float)) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Move move = at(i);
      if (move.exists) copy_async<4>(shared + move.to, memory + move.from, move.valid);
    }
  } else {
    float values[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Move move = at(i);
      values[i] = load(memory[move.exists ? move.from : 0]);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Move move = at(i);
      if (move.exists) shared[move.to] = move.valid ? values[i] : 0.0f;
    }
  }
}

// The same with four channels each, `step` apart in memory.
template <int N, class T, class At>
__device__ __forceinline__ void bring_channels(float* shared, const T* memory, int step, bool vectors, const At& at) {
  if constexpr (sizeof(T) == sizeof(float)) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Move move = at(i);
      if (!move.exists) continue;
      if (vectors) {
        copy_async<16>(shared + move.to, memory + move.from, move.valid);
      } else {
#pragma unroll
        for (int c = 0; c < 4; ++c) copy_async<4>(shared + move.to + c, memory + move.from + c * step, move.valid);
      }
    }
  } else {
    Vector4<T> fours[N];
    if (vectors) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const Move move = at(i);
        fours[i] = *reinterpret_cast<const Vector4<T>*>(memory + (move.exists ? move.from : 0));
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const Move move = at(i);
#pragma unroll
        for (int c = 0; c < 4; ++c) fours[i].v[c] = memory[(move.exists ? move.from : 0) + c * step];
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Move move = at(i);
      Float4 four;
#pragma unroll
      for (int c = 0; c < 4; ++c) four.v[c] = move.valid ? load(fours[i].v[c]) : 0.0f;
      if (move.exists) *reinterpret_cast<Float4*>(shared + move.to) = four;
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

// Rows x Columns pixels of an image from (first_row, first_column) on, the channels of one group, zeros outside. A
// position of padding follows each Every positions.
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
  constexpr int at_once = batch<T> / 4;
  for (int chunk = first_chunk; chunk < end_chunk; ++chunk) {
#pragma unroll 1
    for (int start = first; start < Rows * Columns; start += step * at_once) {
      bring_channels<at_once>(shared, image, view.c, view.vectors, [&](int i) -> Move {
        const int position = start + i * step;
        const int row = position / Columns, column = position % Columns;
        const int h = first_row + row, w = first_column + column;
        const bool valid = inside(h, w, height, width);
        return {position < Rows * Columns, valid, (row * Pitch + column + column / Every) * channels + 4 * chunk,
                valid ? h * view.h + w * view.w + 4 * chunk * view.c : 0};
      });
    }
  }
}

// A tap of a pixel of Rows x Columns.
struct Tap {
  bool exists;
  int row, column, tap, kh, kw;
};

// Shares out the K x K taps of Rows x Columns pixels, consecutive threads on what is consecutive in memory. Calls
// `body(N, at)` until all have had their turn, where N is an integral_constant and `at(i)` for i below it a Tap.
template <int K, int Rows, int Columns, int Batch, class Body>
__device__ __forceinline__ void for_each_tap(bool taps_inner, const Body& body) {
  constexpr int taps = K * K, pixels = Rows * Columns;
  const int threads = int(blockDim.x), thread = int(threadIdx.x);
  if (taps_inner) {
    constexpr int slots = taps <= 16 ? 16 : 32, rounds = (taps + slots - 1) / slots, at_once = Batch / rounds;
    const int slot = thread % slots, step = threads / slots;
#pragma unroll 1
    for (int first = thread / slots; first < pixels; first += step * at_once) {
      body(std::integral_constant<int, rounds * at_once>{}, [&](int i) -> Tap {
        const int pixel = first + i / rounds * step, tap = i % rounds * slots + slot;
        return {pixel < pixels && tap < taps, pixel / Columns, pixel % Columns, tap, tap / K, tap % K};
      });
    }
  } else {
#pragma unroll 1
    for (int pixel = thread; pixel < pixels; pixel += threads) {
      const int row = pixel / Columns, column = pixel % Columns;
#pragma unroll
      for (int first = 0; first < taps; first += Batch) {
        body(std::integral_constant<int, Batch>{}, [&](int i) -> Tap {
          const int tap = first + i;
          return {tap < taps, row, column, tap, tap / K, tap % K};
        });
      }
    }
  }
}

// The weights of the tile's pixels.
template <class C, class T>
__device__ __forceinline__ void bring_weights(float* shared, const T* w, const KernelParams& q, const Tile& tile) {
  for_each_tap<C::K, C::Rows, C::Columns, batch<T>>(q.w.taps_inner, [&](auto count, const auto& at) {
    bring<count.value>(shared, w, [&](int i) -> Move {
      const Tap t = at(i);
      const int h = tile.row + t.row, v = tile.column + t.column;
      return {t.exists && h < q.w_height && v < q.w_width, true, t.row * C::w_pitch + t.column * C::w_pixel + t.tap,
              t.kh * q.w.kh + t.kw * q.w.kw + h * q.w.h + v * q.w.w};
    });
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
__device__ __forceinline__ void bring_weights_to(float* shared, const T* w, const KernelParams& q, const Tile& tile,
                                                 const Class& rows, const Class& columns) {
  constexpr int K = C::K, halo = K - 1;
  const int first_row = tile.row + rows.shift, first_column = tile.column + columns.shift;
  // The move of tap t of the pixel (h, v) of Y to the pixel (row, column) of the tile.
  const auto move = [&](bool exists, const Tap& t, int row, int column, int h, int v) -> Move {
    const int kh = t.kh * Stride + rows.parity, kw = t.kw * Stride + columns.parity;
    const bool valid = inside(h, v, q.w_height, q.w_width);
    return {exists && t.exists && (Stride == 1 || (kh < q.kernel && kw < q.kernel)), valid,
            row * C::w_pitch + column * C::w_pixel + C::taps - 1 - t.tap,
            valid ? kh * q.w.kh + kw * q.w.kw + h * q.w.h + v * q.w.w : 0};
  };
  if (q.w.taps_inner) {
    // One output pixel after the other: its taps are consecutive in memory and go to as many pixels of the tile.
    for_each_tap<K, C::Rows + halo, C::Columns + halo, batch<T>>(true, [&](auto count, const auto& at) {
      bring<count.value>(shared, w, [&](int i) -> Move {
        const Tap t = at(i);
        const int row = t.row - halo + t.kh, column = t.column - halo + t.kw;
        return move(inside(row, column, C::Rows, C::Columns), t, row, column, first_row - halo + t.row,
                    first_column - halo + t.column);
      });
    });
  } else {
    for_each_tap<K, C::Rows, C::Columns, batch<T>>(false, [&](auto count, const auto& at) {
      bring<count.value>(shared, w, [&](int i) -> Move {
        const Tap t = at(i);
        return move(true, t, t.row, t.column, first_row + t.row - t.kh, first_column + t.column - t.kw);
      });
    });
  }
}

// GradientStride is 0 for the forward; else this is the gradient of the input of an involution with that stride, and C
// describes the sum over one class.
template <class C, int GradientStride, class T>
__global__ void __launch_bounds__(256, 1)
    apply(KernelParams q, const T* __restrict__ x, const T* __restrict__ w, T* __restrict__ y) {
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
      // With reversed taps, the one that a class lacks is the first. A weight of zero would turn an Inf into a NaN.
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
    grad_weight(KernelParams q, const T* __restrict__ x, T* __restrict__ w, const T* __restrict__ y) {
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
  // Neighbouring threads start at different channels, which are in different banks.
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
  for_each_tap<K, C::Rows, C::Columns, 8>(q.w.taps_inner, [&](auto count, const auto& at) {
#pragma unroll
    for (int i = 0; i < count.value; ++i) {
      const Tap t = at(i);
      const int h = tile.row + t.row, v = tile.column + t.column;
      if (t.exists && h < q.w_height && v < q.w_width)
        store(weights[t.row * C::w_pitch + t.column * C::w_pixel + t.tap],
              &out[t.kh * q.w.kh + t.kw * q.w.kw + h * q.w.h + v * q.w.w]);
    }
  });
}

}  // namespace pyinvolution::cuda::tiled
