// Checks of an operator's tensors, and the plain data that they become. Each throws std::runtime_error that names the
// operator, the argument, its value and what was expected.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "pyinvolution/problem.h"

namespace pyinvolution::ops {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;

template <class... Parts>
void check(const char* op, bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class List>
std::string text(const List& list) {
  std::ostringstream out;
  out << '(';
  for (size_t i = 0; i < list.size(); ++i) out << (i == 0 ? "" : ", ") << list[i];
  out << ')';
  return out.str();
}

DType dtype_of(const char* op, const Tensor& input);
void check_pair(const char* op, const char* name, const std::vector<int64_t>& pair, int64_t least);
void check_dtype(const char* op, const char* name, const Tensor&, torch::headeronly::ScalarType, const char* what);
void check_device(const char* op, const char* name, const Tensor&, const Tensor& input);
void check_alike(const char* op, const char* name, const Tensor&, const Tensor& input);
void check_shape(const char* op, const char* name, const Tensor&, const std::vector<int64_t>& shape);

// The problem without its kernel and output.
Problem geometry_of(const char* op, const Tensor& input, const std::vector<int64_t>& stride,
                    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation);
// Its kernel, given by the argument `holder`, and the size of its output; then the check that `holder` has that size.
void set_kernel(const char* op, const char* holder, Problem&, int64_t groups, int64_t kernel_h, int64_t kernel_w);
void check_pixels(const char* op, const char* holder, const Problem&, int64_t out_h, int64_t out_w);

// torch's rule for what an operator's output takes over from its input (c10::is_channels_last_strides_2d): strides
// ascend in the order C, W, H, N, and where a single channel or pixel leaves that open it is contiguous.
MemoryFormat memory_format_of(const Tensor& input);

void* address(const Tensor&);

}  // namespace pyinvolution::ops
