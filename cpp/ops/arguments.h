// Checks of an operator's tensors, and the problems that they become. Each throws std::runtime_error that names the
// operator, the argument, its value and what was expected.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "pyinvolution/involution.h"

namespace pyinvolution::ops {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A macro, so that the parts of the message are only computed for a check that fails: they would take as long as the
// rest of a small call.
#define PYINVOLUTION_CHECK(op, holds, ...) \
  do {                                     \
    if (!(holds)) fail(op, __VA_ARGS__);   \
  } while (false)

template <class List>
std::string text(const List& list) {
  std::ostringstream out;
  out << '(';
  for (size_t i = 0; i < list.size(); ++i) out << (i == 0 ? "" : ", ") << list[i];
  out << ')';
  return out.str();
}

void check_dtype(const char* op, const char* name, const Tensor&, torch::headeronly::ScalarType, const char* what);
void check_device(const char* op, const char* name, const Tensor&, const Tensor& input);
// The dtype and device of input.
void check_alike(const char* op, const char* name, const Tensor&, const Tensor& input);
void check_shape(const char* op, const char* name, const Tensor&, const Sizes& shape);

// The problems of the operators (cpp/ops/schema.cpp), with the strides of the tensors that are given and, for the
// output and what `layer_problem` computes, those of dense tensors in input's memory format.
Problem involution_problem(const Tensor& input, const Tensor& weight, const Sizes& stride, const Sizes& padding,
                           const Sizes& dilation, int64_t border, const Sizes& upsample);
// Of the pass grad_weight, with query as grad_output and key as input; w_stride is not set.
Problem correlation_problem(const Tensor& query, const Tensor& key, const Sizes& kernel_size, const Sizes& stride,
                            const Sizes& padding, const Sizes& dilation, int64_t groups, int64_t border,
                            const Sizes& upsample);
SpanProblem span_problem(const Tensor& input, const Tensor& reduced, const Tensor& span_weight,
                         const std::optional<Tensor>& span_bias, const Sizes& kernel_size, const Sizes& stride,
                         const Sizes& padding, const Sizes& dilation);
SpanProblem layer_problem(const Tensor& input, const Tensor& reduce_weight, const std::optional<Tensor>& reduce_bias,
                          const Tensor& span_weight, const std::optional<Tensor>& span_bias, const Sizes& kernel_size,
                          const Sizes& stride, const Sizes& padding, const Sizes& dilation);

// torch's rule for what an operator's output takes over from its input (c10::is_channels_last_strides_2d): strides
// ascend in the order C, W, H, N, and where a single channel or pixel leaves that open it is contiguous.
MemoryFormat memory_format_of(const Tensor& input);

// A new tensor for the result: (N, C, Ho, Wo) in input's dtype, device and memory format. Sets problem.y_stride.
Tensor new_output(const Tensor& input, Problem& problem);

// A new tensor (N, G, Kh, Kw, Ho, Wo) in key's dtype and device; where key is channels_last, with the taps of a pixel
// next to each other, else contiguous. Sets problem.w_stride.
Tensor new_weight(const Tensor& key, Problem& problem);

// An empty tensor of another's shape, dtype, device and memory order.
Tensor new_like(const Tensor&);

void* address(const Tensor&);

}  // namespace pyinvolution::ops
