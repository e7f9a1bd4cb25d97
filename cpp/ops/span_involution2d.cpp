#include "span_involution2d.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>

#include "arguments.h"
#include "autotune.h"
#include "call.h"
#include "involution2d.h"
#include "runtime.h"

namespace pyinvolution::ops {
namespace {

using torch::headeronly::ScalarType;

constexpr const char* op = "span_involution2d";
constexpr const char* layer_op = "involution_layer2d";

void check_epilogue(const char* op, const Tensor& input, const std::optional<Tensor>& scale,
                    const std::optional<Tensor>& shift) {
  PYINVOLUTION_CHECK(op, scale.has_value() == shift.has_value(), scale ? "shift" : "scale",
                     " is None, expected it with ", scale ? "scale" : "shift");
  if (!scale) return;
  const ScalarType dtype = input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  for (const auto& [name, tensor] : {std::pair{"scale", &*scale}, std::pair{"shift", &*shift}}) {
    check_shape(op, name, *tensor, {input.size(1)});
    check_dtype(op, name, *tensor, dtype, "");
    check_device(op, name, *tensor, input);
  }
}

// W by torch's convolution, (N, G, Kh, Kw, Ho, Wo).
Tensor compose_weight(const Tensor& reduced, const Tensor& span_weight, const std::optional<Tensor>& span_bias,
                      const Problem& p) {
  const Tensor weight = torch::stable::view(span_weight, {span_weight.size(0), span_weight.size(1), 1, 1});
  const Tensor w =
      call("aten::conv2d", "", reduced, weight, span_bias, Sizes{1, 1}, Sizes{0, 0}, Sizes{1, 1}, int64_t{1});
  return torch::stable::view(w, {p.batch, p.groups, p.kernel_h, p.kernel_w, p.out_h, p.out_w});
}

// The epilogue by torch's operators.
Tensor finish(Tensor y, const Tensor& input, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
              bool relu) {
  if (scale) {
    const Sizes column{input.size(1), 1, 1};
    // An addition takes a Scalar, which has no stable form.
    y = call("aten::mul", "Tensor", y, torch::stable::view(*scale, column));
    y = torch::stable::subtract(y, call("aten::neg", "", torch::stable::view(*shift, column)));
  }
  if (relu) y = call("aten::relu", "", y);
  return torch::stable::to(y, input.scalar_type());
}

struct Gradients {
  Tensor input, reduced, span_weight, span_bias;
};

void compose_backward(const Gradients& gradients, const Tensor& grad_output, const Tensor& input, const Tensor& reduced,
                      const Tensor& span_weight, const std::optional<Tensor>& span_bias, const Problem& p,
                      const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                      const std::vector<bool>& output_mask) {
  const bool span = output_mask[1] || output_mask[2] || output_mask[3];
  const Tensor weight = compose_weight(reduced, span_weight, span_bias, p);
  const auto [grad_input, grad_weight] =
      involution2d_backward(grad_output, input, weight, stride, padding, dilation, {output_mask[0], span});
  const auto assign = [](Tensor to, const Tensor& from) { torch::stable::copy_(to, from); };
  if (output_mask[0]) assign(gradients.input, grad_input);
  if (!span) return;
  const std::array<bool, 3> mask{output_mask[1], output_mask[2], output_mask[3]};
  const Sizes rows{span_weight.size(0)};
  std::array<StableIValue, 11> stack{
      torch::stable::detail::from(torch::stable::view(grad_weight, {p.batch, p.groups * p.taps(), p.out_h, p.out_w})),
      torch::stable::detail::from(reduced),
      torch::stable::detail::from(torch::stable::view(span_weight, {rows[0], span_weight.size(1), 1, 1})),
      torch::stable::detail::from(std::optional<Sizes>(rows)),
      torch::stable::detail::from(Sizes{1, 1}),
      torch::stable::detail::from(Sizes{0, 0}),
      torch::stable::detail::from(Sizes{1, 1}),
      torch::stable::detail::from(false),
      torch::stable::detail::from(Sizes{0, 0}),
      torch::stable::detail::from(int64_t{1}),
      torch::stable::detail::from(torch::headeronly::HeaderOnlyArrayRef<bool>(mask.data(), mask.size()))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  // All three come back, undefined where they are not wanted.
  const std::array<Tensor, 3> grads{torch::stable::detail::to<Tensor>(stack[0]),
                                    torch::stable::detail::to<Tensor>(stack[1]),
                                    torch::stable::detail::to<Tensor>(stack[2])};
  if (mask[0]) assign(gradients.reduced, grads[0]);
  if (mask[1]) assign(torch::stable::view(gradients.span_weight, {rows[0], span_weight.size(1), 1, 1}), grads[1]);
  if (mask[2]) assign(gradients.span_bias, grads[2]);
}

// Where R comes from: a tensor, or a reduction of the input.
struct Reduction {
  std::optional<Tensor> reduced;
  std::optional<Tensor> weight, bias;
};

// max(0, A mean(X) + a) by torch's operators.
Tensor reduce(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Problem& p) {
  Tensor pooled = input;
  if (p.stride_h != 1 || p.stride_w != 1)
    pooled = call("aten::avg_pool2d", "", input, Sizes{p.stride_h, p.stride_w}, Sizes{p.stride_h, p.stride_w},
                  Sizes{0, 0}, true, true, std::optional<int64_t>());
  const Tensor filter = torch::stable::view(torch::stable::contiguous(weight), {weight.size(0), weight.size(1), 1, 1});
  const Tensor reduced =
      call("aten::conv2d", "", pooled, filter, bias, Sizes{1, 1}, Sizes{0, 0}, Sizes{1, 1}, int64_t{1});
  return call("aten::relu", "", reduced);
}

// What the operators `forward` and `layer` are given besides the problem.
struct Arguments {
  const Tensor& input;
  Reduction reduction;
  const Tensor& span_weight;
  const std::optional<Tensor>&span_bias, &scale, &shift;
  bool relu;
};

// Y by a kernel that computes W too.
Tensor run_kernel(const SpanVariant& variant, const SpanProblem& span, SpanOp op, const Arguments& given,
                  const Tensor& output) {
  std::vector<Tensor> kept;
  const auto dense = [&](const std::optional<Tensor>& tensor) -> void* {
    if (!tensor) return nullptr;
    if (tensor->is_contiguous()) return address(*tensor);
    kept.push_back(torch::stable::contiguous(*tensor));
    return address(kept.back());
  };
  SpanBuffers buffers{};
  buffers.x = address(given.input), buffers.span = address(given.span_weight), buffers.y = output.mutable_data_ptr();
  if (op == SpanOp::layer) {
    buffers.reduce = address(*given.reduction.weight), buffers.reduce_bias = dense(given.reduction.bias);
  } else {
    buffers.reduced = address(*given.reduction.reduced);
  }
  buffers.bias = dense(given.span_bias), buffers.scale = dense(given.scale), buffers.shift = dense(given.shift);
  launch(given.input, variant, span, op, buffers);
  return output;
}

// Y by a convolution that computes W, an involution and torch's operators.
Tensor run_unfused(const SpanProblem& span, const Arguments& given, const Tensor& output) {
  Problem p = span.involution;
  const Tensor weight = compose_weight(*given.reduction.reduced, given.span_weight, given.span_bias, p);
  std::copy_n(weight.strides().data(), 6, p.w_stride);
  compute(given.input, p, Pass::forward, {address(given.input), address(weight), nullptr}, output);
  return finish(output, given.input, given.scale, given.shift, given.relu);
}

Tensor apply(const SpanProblem&, SpanOp, const Arguments&, const Tensor& output);

// A layer whose R is computed before.
Tensor run_reduced(SpanProblem span, Arguments given, const Tensor& output) {
  given.reduction.reduced = reduce(given.input, *given.reduction.weight, given.reduction.bias, span.involution);
  std::copy_n(given.reduction.reduced->strides().data(), 4, span.reduced_stride);
  return apply(span, SpanOp::forward, given, output);
}

Tensor apply(const SpanProblem& span, SpanOp op, const Arguments& given, const Tensor& output) {
  const auto run = [&](const SpanVariant& variant, const Tensor& to) {
    if (!variant.composed()) return run_kernel(variant, span, op, given, to);
    return op == SpanOp::layer ? run_reduced(span, given, to) : run_unfused(span, given, to);
  };
  const Problem& p = span.involution;
  tune(given.input, p.device, span, op, images_to_check(p), [&](const SpanVariant& variant, int64_t checked) {
    return std::vector<Tensor>{first_images(run(variant, trial_result(output, checked)), checked)};
  });
  return run(choose(span, op), output);
}

Tensor apply(SpanProblem span, SpanOp op, const Arguments& given) {
  span.epilogue = given.scale.has_value();
  span.relu = given.relu;
  const Tensor output = new_output(given.input, span.involution);
  return output.numel() == 0 ? output : apply(span, op, given, output);
}

}  // namespace

Tensor span_involution2d(const Tensor& input, const Tensor& reduced, const Tensor& span_weight,
                         const std::optional<Tensor>& span_bias, const std::optional<Tensor>& scale,
                         const std::optional<Tensor>& shift, bool relu, const Sizes& kernel_size, const Sizes& stride,
                         const Sizes& padding, const Sizes& dilation) {
  const SpanProblem span = span_problem(input, reduced, span_weight, span_bias, kernel_size, stride, padding, dilation);
  check_epilogue(op, input, scale, shift);
  return apply(span, SpanOp::forward,
               {input, {reduced, std::nullopt, std::nullopt}, span_weight, span_bias, scale, shift, relu});
}

Tensor involution_layer2d(const Tensor& input, const Tensor& reduce_weight, const std::optional<Tensor>& reduce_bias,
                          const Tensor& span_weight, const std::optional<Tensor>& span_bias,
                          const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, bool relu,
                          const Sizes& kernel_size, const Sizes& stride, const Sizes& padding, const Sizes& dilation) {
  const SpanProblem span =
      layer_problem(input, reduce_weight, reduce_bias, span_weight, span_bias, kernel_size, stride, padding, dilation);
  check_epilogue(layer_op, input, scale, shift);
  return apply(span, SpanOp::layer,
               {input, {std::nullopt, reduce_weight, reduce_bias}, span_weight, span_bias, scale, shift, relu});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> span_involution2d_backward(const Tensor& grad_output, const Tensor& input,
                                                                      const Tensor& reduced, const Tensor& span_weight,
                                                                      const std::optional<Tensor>& span_bias,
                                                                      const Sizes& kernel_size, const Sizes& stride,
                                                                      const Sizes& padding, const Sizes& dilation,
                                                                      const std::vector<bool>& output_mask) {
  SpanProblem span = span_problem(input, reduced, span_weight, span_bias, kernel_size, stride, padding, dilation);
  Problem& p = span.involution;
  check_shape(op, "grad_output", grad_output, {p.batch, p.channels, p.out_h, p.out_w});
  check_alike(op, "grad_output", grad_output, input);
  PYINVOLUTION_CHECK(op, output_mask.size() == 4, "output_mask has ", output_mask.size(), " values, expected 4");

  const auto like = [&](bool wanted, const Tensor& tensor) {
    return wanted ? new_like(tensor) : torch::stable::new_empty(input, Sizes{0});
  };
  const Gradients gradients{
      like(output_mask[0], input), like(output_mask[1], reduced),
      output_mask[2]
          ? torch::stable::new_empty(span_weight, Sizes(span_weight.sizes().begin(), span_weight.sizes().end()))
          : like(false, input),
      output_mask[3] ? torch::stable::new_empty(input, Sizes{span_weight.size(0)}) : like(false, input)};
  const auto done = [&] {
    return std::tuple{gradients.input, gradients.reduced, gradients.span_weight, gradients.span_bias};
  };
  if (grad_output.numel() == 0) {
    for (Tensor gradient : {gradients.input, gradients.reduced, gradients.span_weight, gradients.span_bias})
      torch::stable::zero_(gradient);
    return done();
  }
  // CUDA's kernels for channels_last want all images so, and autograd may bring anything, expanded scalars for one.
  const bool convert = p.device == Device::cuda && memory_format_of(input) == MemoryFormat::ChannelsLast &&
                       memory_format_of(grad_output) != MemoryFormat::ChannelsLast;
  const Tensor gradient = convert ? torch::stable::contiguous(grad_output, MemoryFormat::ChannelsLast) : grad_output;
  std::copy_n(gradient.strides().data(), 4, p.y_stride);
  if (output_mask[0]) std::copy_n(gradients.input.strides().data(), 4, span.grad_x_stride);
  if (output_mask[1]) std::copy_n(gradients.reduced.strides().data(), 4, span.grad_reduced_stride);
  const std::optional<Tensor> bias =
      span_bias ? std::optional<Tensor>(torch::stable::contiguous(*span_bias)) : std::nullopt;
  const auto run = [&](const SpanVariant& variant, const Gradients& to) {
    if (variant.composed())
      return compose_backward(to, gradient, input, reduced, span_weight, span_bias, p, stride, padding, dilation,
                              output_mask);
    const auto wanted = [&](int index, const Tensor& tensor) {
      return output_mask[size_t(index)] ? tensor.mutable_data_ptr() : nullptr;
    };
    SpanBuffers buffers{};
    buffers.x = address(input), buffers.reduced = address(reduced), buffers.span = address(span_weight);
    buffers.bias = bias ? address(*bias) : nullptr;
    buffers.y = address(gradient);
    buffers.grad_x = wanted(0, to.input), buffers.grad_reduced = wanted(1, to.reduced);
    buffers.grad_span = wanted(2, to.span_weight), buffers.grad_bias = wanted(3, to.span_bias);
    launch(input, variant, span, SpanOp::backward, buffers);
  };
  tune(input, p.device, span, SpanOp::backward, images_to_check(p), [&](const SpanVariant& variant, int64_t checked) {
    const auto trial = [&](const Tensor& tensor) { return trial_result(tensor, checked); };
    const Gradients to{trial(gradients.input), trial(gradients.reduced), trial(gradients.span_weight),
                       trial(gradients.span_bias)};
    run(variant, to);
    std::vector<Tensor> results;
    for (const Tensor& result : {to.input, to.reduced})
      if (result.numel() > 0) results.push_back(first_images(result, checked));
    for (const Tensor& result : {to.span_weight, to.span_bias})
      if (result.numel() > 0) results.push_back(result);
    return results;
  });
  run(choose(span, SpanOp::backward), gradients);
  return done();
}

}  // namespace pyinvolution::ops
