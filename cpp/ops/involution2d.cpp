#include "involution2d.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>

#include "execution.h"
#include "pyinvolution/plan.h"

namespace pyinvolution::ops {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;

template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  message << "involution2d: ";
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

DType dtype_of(const Tensor& input) {
  switch (input.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    default: break;
  }
  check(false, "input has dtype ", torch::headeronly::toString(input.scalar_type()),
        ", expected float32, float64, float16 or bfloat16");
  return DType::f32;
}

void check_pair(const char* name, const std::vector<int64_t>& pair, int64_t least) {
  check(pair.size() == 2, name, " has ", pair.size(), " values, expected 2");
  for (const int64_t value : pair)
    check(value >= least && value <= std::numeric_limits<int32_t>::max(), name, " is ", text(pair),
          ", expected values of at least ", least, " and below 2^31");
}

std::string device_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "another device, index ") + std::to_string(tensor.get_device_index());
}

void check_alike(const char* name, const Tensor& tensor, const Tensor& input) {
  check(tensor.scalar_type() == input.scalar_type(), name, " has dtype ",
        torch::headeronly::toString(tensor.scalar_type()), ", expected input's dtype ",
        torch::headeronly::toString(input.scalar_type()));
  check(device_of(tensor) == device_of(input), name, " is on ", device_of(tensor), ", expected input's device ",
        device_of(input));
}

// floor((size + 2 padding - dilation (kernel - 1) - 1) / stride) + 1, and 0 where the kernel does not fit.
int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t room = size + 2 * padding - dilation * (kernel - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

Problem problem_of(const Tensor& input, const Tensor& weight, const std::vector<int64_t>& stride,
                   const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  check(input.dim() == 4, "input has shape ", text(input.sizes()), ", expected 4 dimensions (N, C, H, W)");
  check(weight.dim() == 6, "weight has shape ", text(weight.sizes()), ", expected 6 dimensions (N, G, Kh, Kw, Ho, Wo)");
  check_pair("stride", stride, 1);
  check_pair("padding", padding, 0);
  check_pair("dilation", dilation, 1);

  Problem p{};
  p.dtype = dtype_of(input);
  check_alike("weight", weight, input);
  p.device = input.is_cuda() ? Device::cuda : Device::cpu;
  p.batch = input.size(0), p.channels = input.size(1), p.in_h = input.size(2), p.in_w = input.size(3);
  p.groups = weight.size(1), p.kernel_h = weight.size(2), p.kernel_w = weight.size(3);
  p.out_h = weight.size(4), p.out_w = weight.size(5);
  p.stride_h = stride[0], p.stride_w = stride[1];
  p.padding_h = padding[0], p.padding_w = padding[1];
  p.dilation_h = dilation[0], p.dilation_w = dilation[1];

  check(weight.size(0) == p.batch, "weight has batch size ", weight.size(0), ", expected input's, ", p.batch);
  check(p.groups >= 1 && p.channels % p.groups == 0, "weight has ", p.groups, " groups, expected a divisor of input's ",
        p.channels, " channels");
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  check(p.kernel_h >= 1 && p.kernel_w >= 1 && p.kernel_h <= most && p.kernel_w <= most, "weight has a kernel of ",
        p.kernel_h, " x ", p.kernel_w, " taps, expected at least 1 x 1");
  const int64_t out_h = output_size(p.in_h, p.kernel_h, p.stride_h, p.padding_h, p.dilation_h);
  const int64_t out_w = output_size(p.in_w, p.kernel_w, p.stride_w, p.padding_w, p.dilation_w);
  check(p.out_h == out_h && p.out_w == out_w, "weight has kernels for ", p.out_h, " x ", p.out_w,
        " output pixels, expected ", out_h, " x ", out_w, " for an input of ", p.in_h, " x ", p.in_w, ", a kernel of ",
        p.kernel_h, " x ", p.kernel_w, ", stride ", text(stride), ", padding ", text(padding), " and dilation ",
        text(dilation), out_h > 0 && out_w > 0 ? "" : ": the kernel is larger than the padded input");
  return p;
}

void set_strides(Problem& p, const Tensor& x, const Tensor& w, const Tensor& y) {
  std::copy_n(x.strides().data(), 4, p.x_stride);
  std::copy_n(w.strides().data(), 6, p.w_stride);
  std::copy_n(y.strides().data(), 4, p.y_stride);
}

// torch's rule for what an operator's output takes over from its input (c10::is_channels_last_strides_2d): strides
// ascend in the order C, W, H, N, and where a single channel or pixel leaves that open it is contiguous.
MemoryFormat memory_format_of(const Tensor& input) {
  const auto sizes = input.sizes();
  const auto strides = input.strides();
  if (strides[1] == 0) return MemoryFormat::Contiguous;
  int64_t least = 0;
  for (const int dim : {1, 3, 2, 0}) {
    if (sizes[dim] == 0 || strides[dim] < least) return MemoryFormat::Contiguous;
    if (dim == 0 && least == strides[1]) return MemoryFormat::Contiguous;
    least = sizes[dim] > 1 ? strides[dim] * sizes[dim] : strides[dim];
  }
  return MemoryFormat::ChannelsLast;
}

void* address(const Tensor& tensor) { return const_cast<void*>(tensor.const_data_ptr()); }

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
  check(grad_output.dim() == 4 && grad_output.size(0) == problem.batch && grad_output.size(1) == problem.channels &&
            grad_output.size(2) == problem.out_h && grad_output.size(3) == problem.out_w,
        "grad_output has shape ", text(grad_output.sizes()), ", expected (", problem.batch, ", ", problem.channels,
        ", ", problem.out_h, ", ", problem.out_w, ")");
  check_alike("grad_output", grad_output, input);
  check(output_mask.size() == 2, "output_mask has ", output_mask.size(), " values, expected 2");

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
