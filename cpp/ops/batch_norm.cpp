#include "batch_norm.h"

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "arguments.h"
#include "cpu/batch_norm/batch_norm.h"
#include "runtime.h"

namespace pyinvolution::ops {
namespace {

using torch::headeronly::ScalarType;

constexpr const char* op = "batch_norm";

bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < 4; ++d)
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

cpu::BatchNormShape shape_of(const Tensor& input) {
  PYINVOLUTION_CHECK(op, input.dim() == 4, "input has shape ", text(input.sizes()),
                     ", expected 4 dimensions (N, C, H, W)");
  PYINVOLUTION_CHECK(op, input.is_cpu(), "input is on another device, expected a CPU");
  cpu::BatchNormShape shape{};
  switch (input.scalar_type()) {
    case ScalarType::Float: shape.dtype = DType::f32; break;
    case ScalarType::Half: shape.dtype = DType::f16; break;
    case ScalarType::BFloat16: shape.dtype = DType::bf16; break;
    default:
      fail(op, "input has dtype ", torch::headeronly::toString(input.scalar_type()),
           ", expected float32, float16 or bfloat16");
  }
  shape.batch = input.size(0), shape.channels = input.size(1), shape.pixels = input.size(2) * input.size(3);
  PYINVOLUTION_CHECK(op, shape.batch * shape.pixels > 1 && shape.channels > 0, "input has shape ", text(input.sizes()),
                     ", expected more than 1 value per channel");
  const int64_t c = shape.channels, h = input.size(2), w = input.size(3);
  const auto is_dense = [&](int64_t channel, int64_t row, int64_t column) {
    const int64_t expected[4] = {c * h * w, channel, row, column};
    for (int64_t d = 0; d < 4; ++d)
      if (input.size(d) > 1 && input.stride(d) != expected[d]) return false;
    return true;
  };
  shape.channels_last = is_dense(1, c * w, c);
  PYINVOLUTION_CHECK(op, shape.channels_last || is_dense(h * w, w, 1), "input has strides ", text(input.strides()),
                     ", expected those of a dense tensor, contiguous or channels_last");
  return shape;
}

void check_like_input(const char* name, const Tensor& tensor, const Tensor& input) {
  check_shape(op, name, tensor, {input.size(0), input.size(1), input.size(2), input.size(3)});
  check_alike(op, name, tensor, input);
  PYINVOLUTION_CHECK(op, same_strides(tensor, input), name, " has strides ", text(tensor.strides()),
                     ", expected those of input, ", text(input.strides()));
}

const float* channel_values(const char* name, const Tensor& tensor, const Tensor& input) {
  check_shape(op, name, tensor, {input.size(1)});
  check_dtype(op, name, tensor, ScalarType::Float, "");
  check_device(op, name, tensor, input);
  PYINVOLUTION_CHECK(op, input.size(1) == 1 || tensor.stride(0) == 1, name, " has stride ", tensor.stride(0),
                     ", expected 1");
  return static_cast<const float*>(address(tensor));
}

float* data_of(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

Tensor new_vector(const Tensor& input) { return torch::stable::new_empty(input, {input.size(1)}, ScalarType::Float); }

void move_towards(const float* found, double momentum, int64_t channels, float* values) {
  for (int64_t c = 0; c < channels; ++c) values[c] = float((1.0 - momentum) * values[c] + momentum * found[c]);
}

}  // namespace

std::tuple<Tensor, Tensor> batch_norm_statistics(const Tensor& input, const std::optional<Tensor>& running_mean,
                                                 const std::optional<Tensor>& running_var,
                                                 const std::optional<Tensor>& batches, std::optional<double> momentum,
                                                 double eps) {
  const cpu::BatchNormShape shape = shape_of(input);
  if (running_mean) channel_values("running_mean", *running_mean, input);
  if (running_var) channel_values("running_var", *running_var, input);
  if (batches) {
    check_shape(op, "batches", *batches, {});
    check_dtype(op, "batches", *batches, ScalarType::Long, "");
    check_device(op, "batches", *batches, input);
  }
  const Tensor mean = new_vector(input), invstd = new_vector(input);
  std::vector<float> unbiased(running_var ? shape.channels : 0);
  cpu::batch_norm_statistics(shape, address(input), eps, data_of(mean), data_of(invstd),
                             running_var ? unbiased.data() : nullptr, cpu_execution());
  double step = momentum.value_or(0.0);
  if (batches) {
    const int64_t count = ++*static_cast<int64_t*>(batches->mutable_data_ptr());
    if (!momentum) step = 1.0 / double(count);
  }
  if (running_mean) move_towards(data_of(mean), step, shape.channels, data_of(*running_mean));
  if (running_var) move_towards(unbiased.data(), step, shape.channels, data_of(*running_var));
  return {mean, invstd};
}

Tensor batch_norm_output(const Tensor& input, const std::optional<Tensor>& residual, const Tensor& weight,
                         const Tensor& bias, const Tensor& mean, const Tensor& invstd, bool relu) {
  const cpu::BatchNormShape shape = shape_of(input);
  if (residual) check_like_input("residual", *residual, input);
  cpu::BatchNormForward forward{};
  forward.x = address(input), forward.residual = residual ? address(*residual) : nullptr, forward.relu = relu;
  forward.weight = channel_values("weight", weight, input), forward.bias = channel_values("bias", bias, input);
  forward.mean = channel_values("mean", mean, input), forward.invstd = channel_values("invstd", invstd, input);
  const Tensor output = torch::stable::empty_like(input);
  forward.y = output.mutable_data_ptr();
  cpu::batch_norm_output(shape, forward, cpu_execution());
  return output;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm(const Tensor& input, const std::optional<Tensor>& residual,
                                              const Tensor& weight, const Tensor& bias,
                                              const std::optional<Tensor>& running_mean,
                                              const std::optional<Tensor>& running_var,
                                              const std::optional<Tensor>& batches, std::optional<double> momentum,
                                              double eps, bool relu) {
  // All arguments are checked before a buffer changes.
  shape_of(input);
  if (residual) check_like_input("residual", *residual, input);
  channel_values("weight", weight, input), channel_values("bias", bias, input);
  const auto [mean, invstd] = batch_norm_statistics(input, running_mean, running_var, batches, momentum, eps);
  return {batch_norm_output(input, residual, weight, bias, mean, invstd, relu), mean, invstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad_output, const Tensor& input,
                                                               const std::optional<Tensor>& output,
                                                               const Tensor& weight, const Tensor& bias,
                                                               const Tensor& mean, const Tensor& invstd, bool relu) {
  const cpu::BatchNormShape shape = shape_of(input);
  check_shape(op, "grad_output", grad_output, {input.size(0), input.size(1), input.size(2), input.size(3)});
  check_device(op, "grad_output", grad_output, input);
  Tensor gy = grad_output;
  if (gy.scalar_type() != input.scalar_type() || !same_strides(gy, input)) {
    gy = torch::stable::empty_like(input);
    torch::stable::copy_(gy, grad_output);
  }
  if (output) check_like_input("output", *output, input);
  cpu::BatchNormBackward backward{};
  backward.gy = address(gy), backward.x = address(input), backward.y = output ? address(*output) : nullptr,
  backward.relu = relu;
  backward.weight = channel_values("weight", weight, input), backward.bias = channel_values("bias", bias, input);
  backward.mean = channel_values("mean", mean, input), backward.invstd = channel_values("invstd", invstd, input);
  const Tensor grad_input = torch::stable::empty_like(input);
  const Tensor grad_residual =
      output ? torch::stable::empty_like(input) : torch::stable::new_empty(input, std::vector<int64_t>{0});
  const Tensor grad_weight = new_vector(input), grad_bias = new_vector(input);
  backward.gx = grad_input.mutable_data_ptr();
  backward.grad_residual = output ? grad_residual.mutable_data_ptr() : nullptr;
  backward.grad_weight = data_of(grad_weight), backward.grad_bias = data_of(grad_bias);
  cpu::batch_norm_backward(shape, backward, cpu_execution());
  return {grad_input, grad_residual, grad_weight, grad_bias};
}

}  // namespace pyinvolution::ops
