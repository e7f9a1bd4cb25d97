// Batch norm, addition and ReLU of a training step; tiling.h has the equations.
#pragma once

#include "pyinvolution/dispatch.h"

namespace pyinvolution::cpu {

// x, residual, gy, y and what is computed from them are (batch, channels, pixels) in one dtype, float32, float16 or
// bfloat16, dense as NCHW or channels_last; parameters and statistics are floats, one for each channel.
struct BatchNormShape {
  DType dtype;
  bool channels_last;
  int64_t batch, channels, pixels;
};

// mean and invstd = 1 / sqrt(var + eps). `unbiased` receives the sum of squared differences over M - 1 if it is not null.
void batch_norm_statistics(const BatchNormShape&, const void* x, double eps, float* mean, float* invstd,
                           float* unbiased, const Execution&);

// y from the statistics.
struct BatchNormForward {
  const void *x, *residual;
  const float *weight, *bias, *mean, *invstd;
  bool relu;
  void* y;
};
void batch_norm_output(const BatchNormShape&, const BatchNormForward&, const Execution&);

// gx, the gradient of the residual if there is one (then y is read), dw and db.
struct BatchNormBackward {
  const void *gy, *x, *y;
  const float *weight, *bias, *mean, *invstd;
  bool relu;
  void *gx, *grad_residual;
  float *grad_weight, *grad_bias;
};
void batch_norm_backward(const BatchNormShape&, const BatchNormBackward&, const Execution&);

}  // namespace pyinvolution::cpu
