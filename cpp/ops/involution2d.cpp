#include "involution2d.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "arguments.h"
#include "execution.h"
#include "pyinvolution/plan.h"

namespace pyinvolution::ops {
namespace {

constexpr const char* op = "involution2d";

Problem problem_of(const Tensor& input, const Tensor& weight, const std::vector<int64_t>& stride,
                   const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  check(op, input.dim() == 4, "input has shape ", text(input.sizes()), ", expected 4 dimensions (N, C, H, W)");
  check(op, weight.dim() == 6, "weight has shape ", text(weight.sizes()),
        ", expected 6 dimensions (N, G, Kh, Kw, Ho, Wo)");
  Problem p = geometry_of(op, input, stride, padding, dilation);
  check_alike(op, "weight", weight, input);
  check(op, weight.size(0) == p.batch, "weight has batch size ", weight.size(0), ", expected input's, ", p.batch);
  set_kernel(op, "weight", p, weight.size(1), weight.size(2), weight.size(3));
  check_pixels(op, "weight", p, weight.size(4), weight.size(5));
  return p;
}

void set_strides(Problem& p, const Tensor& x, const Tensor& w, const Tensor& y) {
  std::copy_n(x.strides().data(), 4, p.x_stride);
  std::copy_n(w.strides().data(), 6, p.w_stride);
  std::copy_n(y.strides().data(), 4, p.y_stride);
}

}  // namespace

Tensor involution2d(const Tensor& input, const Tensor& weight, const std::vector<int64_t>& stride,
                    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  Problem problem = problem_of(input, weight, stride, padding, dilation);
  const std::vector<int64_t> shape{problem.batch, problem.channels, problem.out_h, problem.out_w};
  const Tensor output = torch::stable::empty(shape, input.scalar_type(), std::nullopt, input.device(), std::nullopt,
                                             memory_format_of(input));
  set_strides(problem, input, weight, output);
  run_on(input, problem, Pass::forward, {address(input), address(weight), output.mutable_data_ptr()});
  return output;
}

std::tuple<Tensor, Tensor> involution2d_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                                 const std::vector<int64_t>& stride,
                                                 const std::vector<int64_t>& padding,
                                                 const std::vector<int64_t>& dilation,
                                                 const std::vector<bool>& output_mask) {
  Problem problem = problem_of(input, weight, stride, padding, dilation);
  check_shape(op, "grad_output", grad_output, {problem.batch, problem.channels, problem.out_h, problem.out_w});
  check_alike(op, "grad_output", grad_output, input);
  check(op, output_mask.size() == 2, "output_mask has ", output_mask.size(), " values, expected 2");

  const auto none = [&] { return torch::stable::new_empty(input, std::vector<int64_t>{0}); };
  const Tensor grad_input = output_mask[0] ? torch::stable::empty_like(input) : none();
  const Tensor grad_weight = output_mask[1] ? torch::stable::empty_like(weight) : none();
  if (output_mask[0]) {
    set_strides(problem, grad_input, weight, grad_output);
    run_on(input, problem, Pass::grad_input, {grad_input.mutable_data_ptr(), address(weight), address(grad_output)});
  }
  if (output_mask[1]) {
    set_strides(problem, input, grad_weight, grad_output);
    run_on(input, problem, Pass::grad_weight, {address(input), grad_weight.mutable_data_ptr(), address(grad_output)});
  }
  return {grad_input, grad_weight};
}

}  // namespace pyinvolution::ops
