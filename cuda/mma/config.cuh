// The sizes of `mma`'s tiles, and what it takes.
#pragma once

#include "../band.cuh"

namespace pyinvolution::cuda::mma {

constexpr bool takes(DType dtype) { return dtype == DType::f16 || dtype == DType::bf16; }

// Tiles of the gradient of the weights with stride 2.
template <int K>
using StridedTile = TileConfig<K, 2, 4, 8, 8>;

// Blocks that keep a GPU busy; where there are fewer, the gradient of the input has more and shorter stripes.
constexpr int64_t enough_blocks = 512;
constexpr int min_stages = 4;

// The gradient of the input: a block walks down a stripe of Columns pixels of Y, Rows rows at a time. Two rows share
// the moves of the sums; with stride 2 there are registers for only one.
template <int K_, int Stride_, int Columns_>
struct WalkConfig {
  static constexpr int K = K_, Stride = Stride_, Columns = Columns_, Rows = 2 / Stride;
  static constexpr int S = 1, fragments = 2;  // of the band
  static constexpr int taps = K * K, slots = (K + Stride - 1) / Stride;
  static constexpr int strips = Columns / 8, Warps = chunk_groups * strips, threads = 32 * Warps;
  static constexpr int x_columns = Columns + 8, w_rows = Rows, w_columns = x_columns;
  static constexpr int max_shift = 9 - slots;
  // Rows of X that a stage's rows of Y add to, and how many of them are complete then.
  static constexpr int open_rows = (Rows - 1) * Stride + K, done_rows = Rows * Stride;
  // Stages before a stripe begins, whose rows of Y add to its first rows.
  static constexpr int early = ((K - 1) / Stride + Rows - 1) / Rows;
  // How far Y's first row and column that matter are from those of X, in pixels of Y.
  static __host__ __device__ int first_row(int padding) { return padding / Stride; }
  static __host__ __device__ int first_column(int padding) { return (padding + Stride - 1) / Stride - (slots - 1); }
};

// Launches the kernels for one dtype; instances/ has one file for each, so that they compile at the same time.
template <DType dtype>
void run(const Problem&, Pass, const Buffers&, const Execution&);

}  // namespace pyinvolution::cuda::mma
