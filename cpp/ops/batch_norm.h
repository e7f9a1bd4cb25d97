#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace pyinvolution::ops {

using torch::stable::Tensor;

// max(0, batch_norm(input) + residual) by the batch's own statistics, on a CPU; without `relu` the sum itself. input and
// residual (N, C, H, W) are float32, float16 or bfloat16, dense, contiguous or channels_last, and alike; weight, bias and
// statistics are float32, (C). `batches`, an int64, is increased by one. Running statistics move towards the batch's, the
// variance towards the unbiased one: by `momentum`, without one by 1 / batches, and without either not at all. Returns
// the output, the mean and 1 / sqrt(var + eps). Throws std::runtime_error that names the argument, its value and what
// was expected.
std::tuple<Tensor, Tensor, Tensor> batch_norm(const Tensor& input, const std::optional<Tensor>& residual,
                                              const Tensor& weight, const Tensor& bias,
                                              const std::optional<Tensor>& running_mean,
                                              const std::optional<Tensor>& running_var,
                                              const std::optional<Tensor>& batches, std::optional<double> momentum,
                                              double eps, bool relu);

// The same in two: the statistics, and the output from them, to the same bits.
std::tuple<Tensor, Tensor> batch_norm_statistics(const Tensor& input, const std::optional<Tensor>& running_mean,
                                                 const std::optional<Tensor>& running_var,
                                                 const std::optional<Tensor>& batches, std::optional<double> momentum,
                                                 double eps);
Tensor batch_norm_output(const Tensor& input, const std::optional<Tensor>& residual, const Tensor& weight,
                         const Tensor& bias, const Tensor& mean, const Tensor& invstd, bool relu);

// The gradients of input, residual, weight and bias. With a residual, `output` is given; else that of the residual has no
// elements. grad_output may be of another dtype and in another order; it is copied then.
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad_output, const Tensor& input,
                                                               const std::optional<Tensor>& output,
                                                               const Tensor& weight, const Tensor& bias,
                                                               const Tensor& mean, const Tensor& invstd, bool relu);

}  // namespace pyinvolution::ops
