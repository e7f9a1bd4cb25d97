// The generation of kernels in a training step, in channels_last; tiling.h has the equations.
#pragma once

#include <vector>

#include "pyinvolution/dispatch.h"

namespace pyinvolution::cpu {

// All images are dense in channels_last, in one dtype: float32, float16 or bfloat16.
struct GenerationShape {
  DType dtype;
  int64_t batch, channels, reduced, groups;
  int64_t in_h, in_w, out_h, out_w, stride_h, stride_w;
};

// z (batch, R, out_h, out_w) from x (batch, C, in_h, in_w) and A (R, C), which is dense.
void reduce(const GenerationShape&, const void* x, const void* a, void* z, const Execution&);

// Adds the gradient of x to gx; gA (R, C) in float.
void reduce_gradients(const GenerationShape&, const void* x, const void* a, const void* gz, void* gx, float* grad_a,
                      const Execution&);

// M of each group, (G, R + 1, R + 1), from S (G * taps, R) and b (G * taps), or none, in float.
std::vector<float> span_gram(const GenerationShape&, int64_t taps, const float* s, const float* b);

// y /= the lengths of the kernels that r makes, at least the square root of `least`.
void divide_by_lengths(const GenerationShape&, const std::vector<float>& gram, float least, const void* r, void* y,
                       const Execution&);

// The gradients of what has been divided, u, and of squared lengths, h, as length_gradients reads them.
std::vector<float> undivided_gradient(const GenerationShape&, const std::vector<float>& gram, float least,
                                      const void* r, const void* y, const void* gy, void* u, const Execution&);

// Adds the gradient of r to gr, of S to gS and of b to gb, which may be null.
void length_gradients(const GenerationShape&, const std::vector<float>& gram, const void* r,
                      const std::vector<float>& grad_squares, void* gr, int64_t taps, const float* s, const float* b,
                      float* grad_s, float* grad_b, const Execution&);

}  // namespace pyinvolution::cpu
