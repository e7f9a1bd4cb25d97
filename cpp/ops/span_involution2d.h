#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace pyinvolution::ops {

using torch::stable::Tensor;

// involution2d(input, W) with W = span_weight reduced + span_bias: input N,C,H,W; reduced N,R,Ho,Wo; span_weight
// (G Kh Kw, R) or (G Kh Kw, R, 1, 1); span_bias (G Kh Kw). Then max(0, scale y + shift) as far as given: scale and
// shift are (C), both or none, float32 (float64 for float64). Throws std::runtime_error that names the argument, its
// value and what was expected.
Tensor span_involution2d(const Tensor& input, const Tensor& reduced, const Tensor& span_weight,
                         const std::optional<Tensor>& span_bias, const std::optional<Tensor>& scale,
                         const std::optional<Tensor>& shift, bool relu, const std::vector<int64_t>& kernel_size,
                         const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                         const std::vector<int64_t>& dilation);

// The same with reduced = max(0, reduce_weight m + reduce_bias), where m are the means of input over cells of the
// stride (the last ones over what there is): reduce_weight (R, C) or (R, C, 1, 1), reduce_bias (R). The output has a
// pixel for each cell; beyond its padding on the left and top, input is zero as far as the window needs. For inference:
// it has no gradient.
Tensor involution_layer2d(const Tensor& input, const Tensor& reduce_weight, const std::optional<Tensor>& reduce_bias,
                          const Tensor& span_weight, const std::optional<Tensor>& span_bias,
                          const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, bool relu,
                          const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                          const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation);

// The gradients of input, reduced, span_weight and span_bias (of the result without scale, shift and ReLU); a tensor of
// no elements where output_mask is false.
std::tuple<Tensor, Tensor, Tensor, Tensor> span_involution2d_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& reduced, const Tensor& span_weight,
    const std::optional<Tensor>& span_bias, const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, const std::vector<bool>& output_mask);

}  // namespace pyinvolution::ops
