#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace pyinvolution::ops {

using torch::stable::Tensor;

// A whole layer of a training step, on a CPU:
//
//   z = reduce_weight m,   r = max(0, batch_norm(z)),   y = span_involution2d(input, r, span_weight, span_bias)
//
// with m the means of input over cells of the stride as for involution_layer2d, and batch_norm as the operator of that
// name has it. With `least_length`, each pixel's y is divided by the length of its kernel, or by this if that is shorter.
//
// input (N, C, H, W) is float32, float16 or bfloat16 and dense in channels_last; reduce_weight (R, C) or (R, C, 1, 1),
// span_weight and span_bias are float32 or of input's dtype, to which they are rounded, but for the lengths; the
// norm's tensors are float32, (R). Returns y, z, the mean and 1 / sqrt(var + eps). Throws std::runtime_error that names the
// argument, its value and what was expected.
std::tuple<Tensor, Tensor, Tensor, Tensor> training_layer2d(
    const Tensor& input, const Tensor& reduce_weight, const Tensor& norm_weight, const Tensor& norm_bias,
    const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var,
    const std::optional<Tensor>& batches, std::optional<double> momentum, double eps, const Tensor& span_weight,
    const std::optional<Tensor>& span_bias, std::optional<double> least_length, const std::vector<int64_t>& kernel_size,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation);

// The gradients of input, reduce_weight, norm_weight, norm_bias, span_weight and span_bias, each of its tensor's dtype;
// without a span_bias the last one has no elements. `output` is y and given with `least_length` only. grad_output may be of
// another dtype and in another order; it is copied then.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> training_layer2d_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& reduce_weight, const Tensor& norm_weight,
    const Tensor& norm_bias, const Tensor& span_weight, const std::optional<Tensor>& span_bias, const Tensor& z,
    const Tensor& mean, const Tensor& invstd, const std::optional<Tensor>& output, std::optional<double> least_length,
    const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation);

}  // namespace pyinvolution::ops
