// Batch norm of a training step with the addition and the ReLU that follow it, in one pass over memory each way:
//
//   mean[c], var[c]  = over the M = N H W elements of channel c
//   z = (x - mean) * invstd * weight + bias (+ residual),      invstd = 1 / sqrt(var + eps)
//   y = max(0, z), or z without a ReLU
//
//   g = gy where y > 0, else 0; gy without a ReLU              the gradient of the residual
//   db = sum g,   dw = invstd * sum g (x - mean)
//   gx = invstd * weight * (g - db / M - (x - mean) * invstd * dw / M)
//
// Without a residual, z is computed again from x instead of being read. Elements that are moved for each of x: 3 forward (x twice,
// y) and 5 backward (gy and x twice, gx); with a residual 4 and 7. Separate passes for norm, addition and ReLU move 9 and 8.
//
// x is [batch][channels][pixels] (NCHW) or [pixels][channels] with the pixels of all images (channels_last). There, if channels
// are few, `fold` neighbouring pixels count as one of `fold` times as many channels, so that vectors are full; their sums are added.
// A task is a run of pixels of all channels, or in NCHW an image's part of the channels; its size depends on the shape only, and the
// tasks' sums are added in their order, so that a result has the same bits with any number of threads. A task sums blocks of
// `block_pixels` pixels that fit into the first levels of cache: the squares are those of differences from the block's mean, and
// blocks are merged by the formula of Chan, Golub and LeVeque (1979).
#pragma once

#include <cstdint>

#include "pyinvolution/problem.h"

namespace pyinvolution::cpu {

struct BatchNormTiling {
  DType dtype;
  bool channels_last, relu;
  int64_t batch, channels, pixels;
  int64_t fold;  // pixels that are counted as one

  int64_t tasks;          // of sums
  int64_t task_pixels;    // channels_last: of a task, the last one has fewer
  int64_t block_pixels;   // of a block
  int64_t task_channels;  // NCHW: of a task

  const void *x, *residual, *gy, *y;
  void *out, *grad_residual;
  const float *mean, *scale, *shift;  // z = (x - mean) * scale + shift
  const float *linear, *constant;     // gx = scale * g + (x - mean) * linear + constant
  float* partial;                     // [2][tasks][channels], in NCHW [2][batch][channels]
};

// What a task does: the mean and the sum of squared differences of its elements; y; the sums of g and of g (x - mean), with
// a residual also its gradient; gx.
enum class BatchNormStep { moments, output, sums, gradient };

}  // namespace pyinvolution::cpu
