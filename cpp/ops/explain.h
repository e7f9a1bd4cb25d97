#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace pyinvolution::ops {

using torch::stable::Tensor;

// What the dispatch tables say of these arguments: a line for each variant, best first: its name, "chosen" where it is the
// one that runs ("measured" where `autotune` chose it) and its refusal, separated by tabs. `pass` is forward, grad_input or grad_weight.
std::string explain_involution2d(const Tensor& input, const Tensor& weight, const std::vector<int64_t>& stride,
                                 const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                 const std::string& pass, int64_t border, const std::vector<int64_t>& upsample);

// The same for the pass grad_weight that a correlation is.
std::string explain_local_correlation2d(const Tensor& query, const Tensor& key, const std::vector<int64_t>& kernel_size,
                                        const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                        const std::vector<int64_t>& dilation, int64_t groups, int64_t border,
                                        const std::vector<int64_t>& upsample);

// `pass` is forward or backward.
std::string explain_span_involution2d(const Tensor& input, const Tensor& reduced, const Tensor& span_weight,
                                      const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                                      const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                      const std::string& pass);

std::string explain_involution_layer2d(const Tensor& input, const Tensor& reduce_weight, const Tensor& span_weight,
                                       const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                                       const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation);

// Whether a kernel computes W inside the involution (pyinvolution/dispatch.h, `route`), for arguments that will be
// differentiated or not.
bool fuses_span(const Tensor& input, const Tensor& reduced, const Tensor& span_weight,
                const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, bool differentiable);

}  // namespace pyinvolution::ops
