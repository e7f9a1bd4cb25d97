#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace pyinvolution::ops {

using torch::stable::Tensor;

// max(0, batch_norm(input) + residual) by the batch's own statistics, on a CPU. input and residual (N, C, H, W) are
// float32, float16 or bfloat16, dense, contiguous or channels_last, and alike; weight, bias and statistics are float32,
// (C). Running statistics move towards the batch's by `momentum`, the variance by the unbiased one. Returns the
// output, the mean and 1 / sqrt(var + eps). Throws std::runtime_error that names the argument, its value and what was
// expected.
std::tuple<Tensor, Tensor, Tensor> batch_norm_relu(const Tensor& input, const std::optional<Tensor>& residual,
                                                   const Tensor& weight, const Tensor& bias,
                                                   const std::optional<Tensor>& running_mean,
                                                   const std::optional<Tensor>& running_var, double momentum,
                                                   double eps);

// The same output from statistics, to the same bits.
Tensor batch_norm_relu_again(const Tensor& input, const std::optional<Tensor>& residual, const Tensor& weight,
                             const Tensor& bias, const Tensor& mean, const Tensor& invstd);

// The gradients of input, residual, weight and bias. With a residual, `output` is given; else that of the residual has no
// elements.
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_relu_backward(const Tensor& grad_output, const Tensor& input,
                                                                    const std::optional<Tensor>& output,
                                                                    const Tensor& weight, const Tensor& bias,
                                                                    const Tensor& mean, const Tensor& invstd);

}  // namespace pyinvolution::ops
