// The generation of kernels in a training step: what stands before the span involution and, with kernels of length one,
// after it. Everything is in channels_last, with the pixels of all images in a row.
//
//   cell[p, c] = mean of x over the stride_h x stride_w pixels of output pixel p, over fewer at the bottom and right
//   z[p, r]    = sum over c of A[r, c] cell[p, c]                                             reduce
//   gA[r, c]   = sum over p of gz[p, r] cell[p, c]                                            reduce_gradients
//   gx[q, c]  += 1 / |cell of q| sum over r of A[r, c] gz[p of q, r]
//
// With r' = (r, 1) and the symmetric matrix M[g] = (S b)^T (S b) of the rows of S and b that make the kernels of group g:
//
//   q[p, g] = r'^T M[g] r' = |S r + b|^2,   f = 1 / sqrt(max(q, least))
//   y[p, c] = f[p, g(c)] y0[p, c]                                                             scale
//   u[p, c] = f[p, g(c)] gy[p, c]                                                             scale_gradient
//   h[p, g] = -1/2 f^2 sum over c in g of gy[p, c] y[p, c], and 0 where q < least             (the gradient of q)
//   gr[p]  += 2 sum over g of h[p, g] M[g] r'                                                 length_gradients
//   gM[g]   = sum over p of h[p, g] r' r'^T
//
// A task is a run of output pixels, `generation_pixels` of which are in cache as floats at a time; sums and products are those of
// simd/gemm.h. How many tasks there are depends on the shape only, and their sums are added in their order, so that a
// result has the same bits with any number of threads.
//
// Elements that are moved: of x and z once forward; of x, gx (read and written) and gz once backward; with lengths y0, y and r
// forward, and gy, y, u, r twice and gr (read and written) backward. Few channels make this wait for memory.
#pragma once

#include <cstdint>

#include "pyinvolution/problem.h"

namespace pyinvolution::cpu {

struct GenerationTiling {
  DType dtype;
  int64_t channels, reduced, groups;
  int64_t in_h, in_w, out_h, out_w, stride_h, stride_w;
  int64_t pixels;  // of the output, of all images

  int64_t tasks, task_pixels;
  int64_t lanes;                             // of a vector
  int64_t channel_columns, reduced_columns;  // channels and R, rounded up to whole vectors

  const void *x, *gz, *r, *gy, *y;
  void *z, *gx, *scaled, *gr;
  const float* reduce_by_channel;  // [C][reduced_columns], A
  const float* reduce_rows;        // [R][channel_columns], A
  const float* gram;               // [G][R + 1][R + 1], M
  float least;
  const int32_t* group_of;  // [channel_columns], of a channel
  float* grad_squares;      // [tile of generation_pixels][G][pixel], h; 0 past the last pixel
  float* partial;           // [tasks][R][channel_columns] of gA, or of gM, [tasks][gram_partial]
  // A task's gM: [G][R + 1][reduced_columns] without the last column, and [G], the last element of each.
  int64_t gram_partial;
};

enum class GenerationStep { reduce, reduce_gradients, scale, scale_gradient, length_gradients };

constexpr int64_t generation_pixels = 64;

}  // namespace pyinvolution::cpu
