// The sizes of `tiled`'s tiles, and what it takes.
#pragma once

#include "../division.cuh"
#include "../launch.cuh"

namespace pyinvolution::cuda::tiled {

constexpr bool takes(DType dtype) { return dtype != DType::f64; }

inline bool taps_are_inner(const Problem& p) { return p.w_stride[3] == 1 && p.w_stride[2] == p.kernel_w; }

// The next number that is `rest` modulo 8, and the next one whose product with the stride is 4 modulo 8.
constexpr int plane_of(int positions, int rest) { return (positions + 7 - rest) / 8 * 8 + rest; }
constexpr int pitch_of(int positions, int stride) {
  while (positions * stride % 8 != 4) ++positions;
  return positions;
}

// A thread of `apply` has PixelRows x Pixels pixels x 4 channels, one of `grad_weight` a row of Pixels pixels.
template <int K_, int S_, int Rows_, int Columns_, int PixelRows_, int Pixels_>
struct Config {
  static constexpr int K = K_, S = S_, Rows = Rows_, Columns = Columns_, PixelRows = PixelRows_, Pixels = Pixels_;
  static constexpr int taps = K * K;
  static constexpr int pixels = Rows * Columns;
  static constexpr int runs = Columns / Pixels;  // in a row of the tile; a thread has one run of pixels
  static constexpr int window = (Pixels - 1) * S + K;
  static constexpr int x_rows = (Rows - 1) * S + K, x_columns = (Columns - 1) * S + K;

  // Images in shared memory are [chunk of 4 channels][row][position]. 8 neighbouring threads read vectors of 16 bytes at a
  // time, which are in different banks if their positions differ modulo 8. In `apply` these are up to 8 chunks, whose
  // planes begin one position further, of runs that begin 4 positions apart.
  static constexpr int x_plane = plane_of(x_rows * x_columns, 1);

  // In `grad_weight` they are four runs of two rows: one position of padding after each run, and rows 4 positions apart.
  // Planes begin 2 positions further, for the writes of 4 chunks of two positions.
  static constexpr int padding(int columns, int every) { return (columns - 1) / every; }
  static constexpr int every = Pixels * S;
  static constexpr int gradient_x_pitch = pitch_of(x_columns + padding(x_columns, every), S);
  static constexpr int gradient_y_pitch = pitch_of(Columns + padding(Columns, Pixels), 1);
  static constexpr int gradient_x_plane = plane_of(x_rows * gradient_x_pitch, 2);
  static constexpr int gradient_y_plane = plane_of(Rows * gradient_y_pitch, 2);
  static constexpr int gradient_threads = K * Rows * runs;

  // The weights that `apply` reads are [row][tap][column], so that a run of pixels has those of a tap in one vector.
  static constexpr int w_row = taps * Columns;
  static constexpr int w_floats = Rows * w_row;
  // In the gradient of the input, neighbouring threads bring neighbouring taps, which go to neighbouring columns. Some taps
  // have the halves of a wide row exchanged, so that these are in different banks.
  static __device__ __forceinline__ constexpr int gradient_column(int column, int kw) {
    return Columns == 16 && kw / 2 % 2 == 1 ? column ^ 8 : column;
  }

  // Those that `grad_weight` writes are [pixel][tap]: an odd number of floats per pixel puts the pixels of a row into
  // different banks; one more per row does so for rows.
  static constexpr int gradient_pixel = taps | 1;
  static constexpr int gradient_row = Columns * gradient_pixel + 1;
  static constexpr int gradient_floats = (Rows * gradient_row + 3) / 4 * 4;
};

// Tiles are wide where the image is, for a smaller halo. In `apply` a thread has so few pixels that at least 16 warps are
// on a multiprocessor with tiles of 16 channels or more: shared memory limits the number of tiles.
template <int K>
using Wide = Config<K, 1, 8, 16, 2, 2>;
template <int K, int S>
using Narrow = Config<K, S, 8, 8, 1, S == 1 ? 4 : 2>;
template <int K>
using WideGradient = Config<K, 1, 8, 16, 1, 4>;
template <int K, int S>
using NarrowGradient = Config<K, S, 8, 8, 1, 2>;

// Launches the kernels for one dtype; instances/ has one file for each, so that they compile at the same time.
template <DType dtype>
void run(const Problem&, Pass, const Buffers&, const Execution&);

}  // namespace pyinvolution::cuda::tiled
