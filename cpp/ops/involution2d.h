#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

namespace pyinvolution::ops {

using torch::stable::Tensor;

// input N,C,H,W and weight N,G,Kh,Kw,Ho,Wo of one floating-point dtype and device -> N,C,Ho,Wo in input's memory
// format. Throws std::runtime_error that names the argument, its value and what was expected.
// `border` is the number of a Border (pyinvolution/problem.h).
Tensor involution2d(const Tensor& input, const Tensor& weight, const std::vector<int64_t>& stride,
                    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t border = 0,
                    const std::vector<int64_t>& upsample = {1, 1});

// (grad_input, grad_weight), each with its tensor's strides where those are dense; a tensor of no elements where
// output_mask is false.
std::tuple<Tensor, Tensor> involution2d_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                                 const std::vector<int64_t>& stride,
                                                 const std::vector<int64_t>& padding,
                                                 const std::vector<int64_t>& dilation,
                                                 const std::vector<bool>& output_mask, int64_t border = 0,
                                                 const std::vector<int64_t>& upsample = {1, 1});

// query N,C,Ho,Wo and key N,C,H,W of one dtype and device -> N,G,Kh,Kw,Ho,Wo: the sums over the channels of a group of
// query's pixel times each pixel in its window of key. It is the gradient of the weight of an involution.
Tensor local_correlation2d(const Tensor& query, const Tensor& key, const std::vector<int64_t>& kernel_size,
                           const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                           const std::vector<int64_t>& dilation, int64_t groups, int64_t border,
                           const std::vector<int64_t>& upsample);

}  // namespace pyinvolution::ops
