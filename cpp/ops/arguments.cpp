#include "arguments.h"

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <limits>

namespace pyinvolution::ops {
namespace {

using torch::headeronly::ScalarType;

// floor((size + 2 padding - dilation (kernel - 1) - 1) / stride) + 1, and 0 where the kernel does not fit.
int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t room = size + 2 * padding - dilation * (kernel - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

std::string device_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "another device, index ") + std::to_string(tensor.get_device_index());
}

}  // namespace

DType dtype_of(const char* op, const Tensor& input) {
  switch (input.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    default: break;
  }
  check(op, false, "input has dtype ", torch::headeronly::toString(input.scalar_type()),
        ", expected float32, float64, float16 or bfloat16");
  return DType::f32;
}

void check_pair(const char* op, const char* name, const std::vector<int64_t>& pair, int64_t least) {
  check(op, pair.size() == 2, name, " has ", pair.size(), " values, expected 2");
  for (const int64_t value : pair)
    check(op, value >= least && value <= std::numeric_limits<int32_t>::max(), name, " is ", text(pair),
          ", expected values of at least ", least, " and below 2^31");
}

void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype, const char* what) {
  check(op, tensor.scalar_type() == dtype, name, " has dtype ", torch::headeronly::toString(tensor.scalar_type()),
        ", expected ", what, torch::headeronly::toString(dtype));
}

void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& input) {
  check(op, device_of(tensor) == device_of(input), name, " is on ", device_of(tensor), ", expected input's device ",
        device_of(input));
}

void check_alike(const char* op, const char* name, const Tensor& tensor, const Tensor& input) {
  check_dtype(op, name, tensor, input.scalar_type(), "input's dtype ");
  check_device(op, name, tensor, input);
}

void check_shape(const char* op, const char* name, const Tensor& tensor, const std::vector<int64_t>& shape) {
  const auto sizes = tensor.sizes();
  check(op, sizes.size() == shape.size() && std::equal(shape.begin(), shape.end(), sizes.begin()), name, " has shape ",
        text(sizes), ", expected ", text(shape));
}

Problem geometry_of(const char* op, const Tensor& input, const std::vector<int64_t>& stride,
                    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  check(op, input.dim() == 4, "input has shape ", text(input.sizes()), ", expected 4 dimensions (N, C, H, W)");
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  check_pair(op, "dilation", dilation, 1);
  Problem p{};
  p.dtype = dtype_of(op, input);
  p.device = input.is_cuda() ? Device::cuda : Device::cpu;
  p.batch = input.size(0), p.channels = input.size(1), p.in_h = input.size(2), p.in_w = input.size(3);
  p.stride_h = stride[0], p.stride_w = stride[1];
  p.padding_h = padding[0], p.padding_w = padding[1];
  p.dilation_h = dilation[0], p.dilation_w = dilation[1];
  return p;
}

void set_kernel(const char* op, const char* holder, Problem& p, int64_t groups, int64_t kernel_h, int64_t kernel_w) {
  check(op, groups >= 1 && p.channels % groups == 0, holder, " has ", groups, " groups, expected a divisor of input's ",
        p.channels, " channels");
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  check(op, kernel_h >= 1 && kernel_w >= 1 && kernel_h <= most && kernel_w <= most, holder, " has a kernel of ",
        kernel_h, " x ", kernel_w, " taps, expected at least 1 x 1");
  p.groups = groups, p.kernel_h = kernel_h, p.kernel_w = kernel_w;
  p.out_h = output_size(p.in_h, kernel_h, p.stride_h, p.padding_h, p.dilation_h);
  p.out_w = output_size(p.in_w, kernel_w, p.stride_w, p.padding_w, p.dilation_w);
}

void check_pixels(const char* op, const char* holder, const Problem& p, int64_t out_h, int64_t out_w) {
  const auto pair = [](int64_t one, int64_t two) { return text(std::vector<int64_t>{one, two}); };
  check(op, out_h == p.out_h && out_w == p.out_w, holder, " has kernels for ", out_h, " x ", out_w,
        " output pixels, expected ", p.out_h, " x ", p.out_w, " for an input of ", p.in_h, " x ", p.in_w,
        ", a kernel of ", p.kernel_h, " x ", p.kernel_w, ", stride ", pair(p.stride_h, p.stride_w), ", padding ",
        pair(p.padding_h, p.padding_w), " and dilation ", pair(p.dilation_h, p.dilation_w),
        p.out_h > 0 && p.out_w > 0 ? "" : ": the kernel is larger than the padded input");
}

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

}  // namespace pyinvolution::ops
