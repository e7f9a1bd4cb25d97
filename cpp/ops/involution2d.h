#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

namespace pyinvolution::ops {

using torch::stable::Tensor;

// input N,C,H,W and weight N,G,Kh,Kw,Ho,Wo of one floating-point dtype and device -> N,C,Ho,Wo in input's memory
// format. Throws std::runtime_error that names the argument, its value and what was expected.
Tensor involution2d(const Tensor& input, const Tensor& weight, const std::vector<int64_t>& stride,
                    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation);

// (grad_input, grad_weight), each with its tensor's strides where those are dense; a tensor of no elements where
// output_mask is false.
std::tuple<Tensor, Tensor> involution2d_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                                 const std::vector<int64_t>& stride,
                                                 const std::vector<int64_t>& padding,
                                                 const std::vector<int64_t>& dilation,
                                                 const std::vector<bool>& output_mask);

}  // namespace pyinvolution::ops
