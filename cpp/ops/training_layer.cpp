#include "training_layer.h"

#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "batch_norm.h"
#include "cpu/generation/generation.h"
#include "runtime.h"
#include "span_involution2d.h"

namespace pyinvolution::ops {
namespace {

using torch::headeronly::ScalarType;

constexpr const char* op = "training_layer2d";

Tensor converted(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

// Its elements in the order of its sizes.
Tensor dense(const Tensor& tensor, ScalarType dtype) { return torch::stable::contiguous(converted(tensor, dtype)); }

void check_channels_last(const char* name, const Tensor& tensor) {
  const int64_t c = tensor.size(1), h = tensor.size(2), w = tensor.size(3);
  const int64_t expected[4] = {c * h * w, 1, c * w, c};
  for (int64_t d = 0; d < 4; ++d)
    PYINVOLUTION_CHECK(op, tensor.size(d) <= 1 || tensor.stride(d) == expected[d], name, " has strides ",
                       text(tensor.strides()), ", expected those of a dense tensor in channels_last");
}

void check_parameter(const char* name, const Tensor& tensor, const Tensor& input) {
  PYINVOLUTION_CHECK(op, tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == input.scalar_type(), name,
                     " has dtype ", torch::headeronly::toString(tensor.scalar_type()),
                     ", expected Float or input's dtype ", torch::headeronly::toString(input.scalar_type()));
}

// The layer's parameters in input's dtype, and its shape.
struct Layer {
  Tensor reduce, span;
  std::optional<Tensor> bias;
  SpanProblem problem;
  cpu::GenerationShape shape;

  Layer(const Tensor& input, const Tensor& reduce_weight, const Tensor& span_weight,
        const std::optional<Tensor>& span_bias, const std::optional<double>& least_length, const Sizes& kernel_size,
        const Sizes& stride, const Sizes& padding, const Sizes& dilation)
      : reduce(dense(reduce_weight, input.scalar_type())), span(converted(span_weight, input.scalar_type())) {
    if (span_bias) bias = converted(*span_bias, input.scalar_type());
    problem = layer_problem(input, reduce, std::nullopt, span, bias, kernel_size, stride, padding, dilation);
    PYINVOLUTION_CHECK(op, input.is_cpu(), "input is on another device, expected a CPU");
    const Problem& p = problem.involution;
    PYINVOLUTION_CHECK(op, p.dtype != DType::f64, "input has dtype Double, expected float32, float16 or bfloat16");
    check_channels_last("input", input);
    check_parameter("reduce_weight", reduce_weight, input), check_parameter("span_weight", span_weight, input);
    if (span_bias) check_parameter("span_bias", *span_bias, input);
    PYINVOLUTION_CHECK(op, !least_length || *least_length > 0, "least_length is ", *least_length,
                       ", expected more than 0");
    shape = {p.dtype, p.batch, p.channels, problem.reduced, p.groups,  p.in_h,
             p.in_w,  p.out_h, p.out_w,    p.stride_h,      p.stride_w};
  }
};

// What the lengths of kernels are computed from: the span's parameters as they are.
struct Lengths {
  Tensor span;
  std::optional<Tensor> bias;
  std::vector<float> gram;
  float least;
  int64_t taps;

  Lengths(const Layer& layer, const Tensor& span_weight, const std::optional<Tensor>& span_bias, double least_length)
      : span(dense(span_weight, ScalarType::Float)),
        least(float(least_length * least_length)),
        taps(layer.problem.involution.taps()) {
    if (span_bias) bias = dense(*span_bias, ScalarType::Float);
    gram = cpu::span_gram(layer.shape, taps, weights(), biases());
  }
  const float* weights() const { return static_cast<const float*>(address(span)); }
  const float* biases() const { return bias ? static_cast<const float*>(address(*bias)) : nullptr; }
};

Tensor new_image(const Tensor& input, int64_t channels, const Problem& p) {
  const int64_t sizes[] = {p.batch, channels, p.out_h, p.out_w};
  return torch::stable::empty({sizes, 4}, input.scalar_type(), std::nullopt, input.device(), std::nullopt,
                              MemoryFormat::ChannelsLast);
}

float* floats_of(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> training_layer2d(
    const Tensor& input, const Tensor& reduce_weight, const Tensor& norm_weight, const Tensor& norm_bias,
    const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var,
    const std::optional<Tensor>& batches, std::optional<double> momentum, double eps, const Tensor& span_weight,
    const std::optional<Tensor>& span_bias, std::optional<double> least_length, const Sizes& kernel_size,
    const Sizes& stride, const Sizes& padding, const Sizes& dilation) {
  const Layer layer(input, reduce_weight, span_weight, span_bias, least_length, kernel_size, stride, padding, dilation);
  const Tensor z = new_image(input, layer.shape.reduced, layer.problem.involution);
  cpu::reduce(layer.shape, address(input), address(layer.reduce), z.mutable_data_ptr(), cpu_execution());
  const auto [r, mean, invstd] =
      batch_norm(z, std::nullopt, norm_weight, norm_bias, running_mean, running_var, batches, momentum, eps, true);
  const Tensor y = span_involution2d(input, r, layer.span, layer.bias, std::nullopt, std::nullopt, false, kernel_size,
                                     stride, padding, dilation);
  if (least_length) {
    const Lengths lengths(layer, span_weight, span_bias, *least_length);
    cpu::divide_by_lengths(layer.shape, lengths.gram, lengths.least, address(r), y.mutable_data_ptr(), cpu_execution());
  }
  return {y, z, mean, invstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> training_layer2d_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& reduce_weight, const Tensor& norm_weight,
    const Tensor& norm_bias, const Tensor& span_weight, const std::optional<Tensor>& span_bias, const Tensor& z,
    const Tensor& mean, const Tensor& invstd, const std::optional<Tensor>& output, std::optional<double> least_length,
    const Sizes& kernel_size, const Sizes& stride, const Sizes& padding, const Sizes& dilation) {
  const Layer layer(input, reduce_weight, span_weight, span_bias, least_length, kernel_size, stride, padding, dilation);
  const Problem& p = layer.problem.involution;
  check_shape(op, "grad_output", grad_output, {p.batch, p.channels, p.out_h, p.out_w});
  check_device(op, "grad_output", grad_output, input);
  check_shape(op, "z", z, {p.batch, layer.shape.reduced, p.out_h, p.out_w});
  check_alike(op, "z", z, input);
  check_channels_last("z", z);
  PYINVOLUTION_CHECK(op, output.has_value() == least_length.has_value(), output ? "least_length" : "output",
                     " is None, expected it with ", output ? "output" : "least_length");
  const Tensor r = batch_norm_output(z, std::nullopt, norm_weight, norm_bias, mean, invstd, true);
  Tensor gradient = converted(grad_output, input.scalar_type());
  std::optional<Lengths> lengths;
  std::vector<float> grad_squares;
  if (least_length) {
    check_shape(op, "output", *output, {p.batch, p.channels, p.out_h, p.out_w});
    check_alike(op, "output", *output, input);
    check_channels_last("output", *output);
    const Tensor gy = torch::stable::contiguous(gradient, MemoryFormat::ChannelsLast);
    lengths.emplace(layer, span_weight, span_bias, *least_length);
    gradient = torch::stable::empty_like(*output);
    grad_squares = cpu::undivided_gradient(layer.shape, lengths->gram, lengths->least, address(r), address(*output),
                                           address(gy), gradient.mutable_data_ptr(), cpu_execution());
  }
  auto [grad_input, grad_r, grad_span, grad_bias] =
      span_involution2d_backward(gradient, input, r, layer.span, layer.bias, kernel_size, stride, padding, dilation,
                                 {true, true, true, span_bias.has_value()});
  if (lengths) {
    grad_span = converted(grad_span, ScalarType::Float);
    if (span_bias) grad_bias = converted(grad_bias, ScalarType::Float);
    cpu::length_gradients(layer.shape, lengths->gram, address(r), grad_squares, grad_r.mutable_data_ptr(),
                          lengths->taps, lengths->weights(), lengths->biases(), floats_of(grad_span),
                          span_bias ? floats_of(grad_bias) : nullptr, cpu_execution());
  }
  const auto [grad_z, none, grad_norm_weight, grad_norm_bias] =
      batch_norm_backward(grad_r, z, std::nullopt, norm_weight, norm_bias, mean, invstd, true);
  const auto sizes = reduce_weight.sizes();
  const Tensor grad_reduce =
      torch::stable::new_empty(reduce_weight, Sizes(sizes.begin(), sizes.end()), ScalarType::Float);
  cpu::reduce_gradients(layer.shape, address(input), address(layer.reduce), address(grad_z),
                        grad_input.mutable_data_ptr(), floats_of(grad_reduce), cpu_execution());
  return {grad_input,
          converted(grad_reduce, reduce_weight.scalar_type()),
          grad_norm_weight,
          grad_norm_bias,
          converted(grad_span, span_weight.scalar_type()),
          span_bias ? converted(grad_bias, span_bias->scalar_type()) : grad_bias};
}

}  // namespace pyinvolution::ops
