#include "involution2d.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "arguments.h"
#include "runtime.h"

namespace pyinvolution::ops {

Tensor involution2d(const Tensor& input, const Tensor& weight, const std::vector<int64_t>& stride,
                    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t border,
                    const std::vector<int64_t>& upsample) {
  Problem problem = involution_problem(input, weight, stride, padding, dilation, border, upsample);
  const Tensor output = new_output(input, problem);
  if (output.numel() == 0) return output;
  compute(input, problem, Pass::forward, {address(input), address(weight), nullptr}, output);
  return output;
}

std::tuple<Tensor, Tensor> involution2d_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                                 const std::vector<int64_t>& stride,
                                                 const std::vector<int64_t>& padding,
                                                 const std::vector<int64_t>& dilation,
                                                 const std::vector<bool>& output_mask, int64_t border,
                                                 const std::vector<int64_t>& upsample) {
  const char* const op = "involution2d";
  const Problem problem = involution_problem(input, weight, stride, padding, dilation, border, upsample);
  check_shape(op, "grad_output", grad_output, {problem.batch, problem.channels, problem.out_h, problem.out_w});
  check_alike(op, "grad_output", grad_output, input);
  PYINVOLUTION_CHECK(op, output_mask.size() == 2, "output_mask has ", output_mask.size(), " values, expected 2");

  const auto gradient = [&](Pass pass, const Tensor& tensor) {
    const Tensor result = new_like(tensor);
    if (result.numel() == 0) return result;
    const bool of_input = pass == Pass::grad_input;
    Problem p = problem;
    std::copy_n(result.strides().data(), of_input ? 4 : 6, of_input ? p.x_stride : p.w_stride);
    std::copy_n(grad_output.strides().data(), 4, p.y_stride);
    compute(input, p, pass, {address(input), address(weight), address(grad_output)}, result);
    return result;
  };
  const auto none = [&] { return torch::stable::new_empty(input, std::vector<int64_t>{0}); };
  return {output_mask[0] ? gradient(Pass::grad_input, input) : none(),
          output_mask[1] ? gradient(Pass::grad_weight, weight) : none()};
}

Tensor local_correlation2d(const Tensor& query, const Tensor& key, const std::vector<int64_t>& kernel_size,
                           const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                           const std::vector<int64_t>& dilation, int64_t groups, int64_t border,
                           const std::vector<int64_t>& upsample) {
  Problem problem = correlation_problem(query, key, kernel_size, stride, padding, dilation, groups, border, upsample);
  const Tensor result = new_weight(key, problem);
  if (result.numel() == 0) return result;
  compute(key, problem, Pass::grad_weight, {address(key), nullptr, address(query)}, result);
  return result;
}

}  // namespace pyinvolution::ops
