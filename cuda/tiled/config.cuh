// The sizes of `tiled`'s tiles, and what it takes.
#pragma once

#include "../division.cuh"
#include "../launch.cuh"

namespace pyinvolution::cuda::tiled {

constexpr bool takes(DType dtype) { return dtype != DType::f64; }

inline bool taps_are_inner(const Problem& p) { return p.w_stride[3] == 1 && p.w_stride[2] == p.kernel_w; }

template <int K_, int S_, int Rows_, int Columns_, int PixelRows_, int Pixels_>
struct Config {
  static constexpr int K = K_, S = S_, Rows = Rows_, Columns = Columns_, PixelRows = PixelRows_, Pixels = Pixels_;
  static constexpr int taps = K * K;
  static constexpr int pixels = Rows * Columns;
  static constexpr int runs = Columns / Pixels;  // in a row of the tile; a thread has one run of pixels
  static constexpr int window = (Pixels - 1) * S + K;

  // A thread's reads of X start Pixels*S positions after its neighbour's; one position of padding after as many puts
  // them into different banks.
  static constexpr int x_rows = (Rows - 1) * S + K, x_columns = (Columns - 1) * S + K;
  static constexpr int x_every = Pixels * S;
  static constexpr int x_pitch = x_columns + (x_columns - 1) / x_every;
  static constexpr int y_pitch = Columns + (Columns - 1) / Pixels;

  // An odd number of floats per pixel puts the pixels of a row into different banks; one more per row does so for rows.
  static constexpr int w_pixel = taps | 1;
  static constexpr int w_pitch = Columns * w_pixel + 1;
  static constexpr int w_floats = (Rows * w_pitch + 3) / 4 * 4;
};

// Tiles are wide where the image is, for a smaller halo.
template <int K>
using Wide = Config<K, 1, 8, 16, 2, 4>;
template <int K, int S>
using Narrow = Config<K, S, 8, 8, 1, 4>;
template <int K>
using WideGradient = Config<K, 1, 8, 16, 1, 4>;
template <int K, int S>
using NarrowGradient = Config<K, S, 8, 8, 1, 2>;

// Launches the kernels for one dtype; instances/ has one file for each, so that they compile at the same time.
template <DType dtype>
void run(const Problem&, Pass, const Buffers&, const Execution&);

}  // namespace pyinvolution::cuda::tiled
