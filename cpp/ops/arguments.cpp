#include "arguments.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <sstream>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "call.h"
#include "pyinvolution/axis.h"

namespace pyinvolution::ops {
namespace {

using torch::headeronly::ScalarType;

constexpr const char* involution_op = "involution2d";
constexpr const char* span_op = "span_involution2d";
constexpr const char* layer_op = "involution_layer2d";
constexpr const char* correlation_op = "local_correlation2d";

DType dtype_of(const char* op, const char* name, const Tensor& input) {
  switch (input.scalar_type()) {
#define RETURN(name, text, storage, sum, scalar) \
  case ScalarType::scalar: return DType::name;
    PYINVOLUTION_DTYPES(RETURN)
#undef RETURN
    default: break;
  }
  fail(op, name, " has dtype ", torch::headeronly::toString(input.scalar_type()),
       ", expected float32, float64, float16 or bfloat16");
}

std::string device_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "another device, index ") + std::to_string(tensor.get_device_index());
}

void check_pair(const char* op, const char* name, const Sizes& pair, int64_t min) {
  PYINVOLUTION_CHECK(op, pair.size() == 2, name, " has ", pair.size(), " values, expected 2");
  for (const int64_t value : pair)
    PYINVOLUTION_CHECK(op, value >= min && value <= std::numeric_limits<int32_t>::max(), name, " is ", text(pair),
                       ", expected values of at least ", min, " and below 2^31");
}

constexpr const char* axes[] = {"height", "width"};

// What the input, an argument called `name`, and the window's arguments say: the problem without its kernel and output.
Problem window_of(const char* op, const char* name, const Tensor& input, const Sizes& stride, const Sizes& padding,
                  const Sizes& dilation, int64_t border = 0, const Sizes& upsample = {1, 1}) {
  PYINVOLUTION_CHECK(op, input.dim() == 4, name, " has shape ", text(input.sizes()),
                     ", expected 4 dimensions (N, C, H, W)");
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  check_pair(op, "dilation", dilation, 1);
  check_pair(op, "upsample", upsample, 1);
  PYINVOLUTION_CHECK(op, border == 0 || border == 1, "border is ", border, ", expected 0 (zeros) or 1 (shift)");
  for (size_t i : {0, 1}) {
    PYINVOLUTION_CHECK(op, stride[i] == 1 || upsample[i] == 1, "stride is ", stride[i], " and upsample is ",
                       upsample[i], " for the ", axes[i], ", expected 1 for one of the two");
    PYINVOLUTION_CHECK(op, border == 0 || padding[i] == 0, "padding is ", padding[i], " for the ", axes[i],
                       ", expected 0 with a border that shifts");
  }
  Problem p{};
  p.dtype = dtype_of(op, name, input);
  p.device = input.is_cuda() ? Device::cuda : Device::cpu;
  p.batch = input.size(0), p.channels = input.size(1), p.in_h = input.size(2), p.in_w = input.size(3);
  p.stride_h = stride[0], p.stride_w = stride[1];
  p.padding_h = padding[0], p.padding_w = padding[1];
  p.dilation_h = dilation[0], p.dilation_w = dilation[1];
  p.border = Border(border), p.upsample_h = upsample[0], p.upsample_w = upsample[1];
  std::copy_n(input.strides().data(), 4, p.x_stride);
  return p;
}

// The kernel, and the size of the output for the input `name`.
void set_window(const char* op, const char* name, Problem& p, int64_t groups, int64_t kernel_h, int64_t kernel_w) {
  const int64_t sizes[] = {p.in_h, p.in_w}, kernel[] = {kernel_h, kernel_w}, dilation[] = {p.dilation_h, p.dilation_w};
  for (size_t i : {0, 1})
    PYINVOLUTION_CHECK(op, p.border == Border::zeros || sizes[i] == 0 || kernel[i] * dilation[i] <= sizes[i], name,
                       " has a ", axes[i], " of ", sizes[i], ", expected at least ", kernel[i] * dilation[i],
                       ", kernel ", kernel[i], " times dilation ", dilation[i], ", with a border that shifts");
  p.groups = groups, p.kernel_h = kernel_h, p.kernel_w = kernel_w;
  p.out_h = output_size(p.in_h, kernel_h, p.stride_h, p.padding_h, p.dilation_h, p.border, p.upsample_h);
  p.out_w = output_size(p.in_w, kernel_w, p.stride_w, p.padding_w, p.dilation_w, p.border, p.upsample_w);
}

// The same for a kernel that the argument `holder` gives.
void set_kernel(const char* op, const char* holder, Problem& p, int64_t groups, int64_t kernel_h, int64_t kernel_w) {
  PYINVOLUTION_CHECK(op, groups >= 1 && p.channels % groups == 0, holder, " has ", groups,
                     " groups, expected a divisor of input's ", p.channels, " channels");
  constexpr int64_t max = std::numeric_limits<int32_t>::max();
  PYINVOLUTION_CHECK(op, kernel_h >= 1 && kernel_w >= 1 && kernel_h <= max && kernel_w <= max, holder,
                     " has a kernel of ", kernel_h, " x ", kernel_w, " taps, expected at least 1 x 1");
  set_window(op, "input", p, groups, kernel_h, kernel_w);
}

// The strides of a dense tensor (N, C, H, W) in a memory format.
void set_dense(int64_t (&strides)[4], int64_t channels, int64_t height, int64_t width, MemoryFormat format) {
  const bool last = format == MemoryFormat::ChannelsLast;
  channels = std::max<int64_t>(channels, 1), height = std::max<int64_t>(height, 1), width = std::max<int64_t>(width, 1);
  strides[0] = channels * height * width;
  strides[1] = last ? 1 : height * width;
  strides[2] = last ? channels * width : width;
  strides[3] = last ? channels : 1;
}

void set_output(const Tensor& input, Problem& p) {
  set_dense(p.y_stride, p.channels, p.out_h, p.out_w, memory_format_of(input));
}

// "for an input of 9 x 11, a kernel of ...", to complete an error.
std::string window_text(const char* name, const Problem& p) {
  const auto pair = [](int64_t one, int64_t two) { return text(Sizes{one, two}); };
  std::ostringstream out;
  out << " for " << name << " of " << p.in_h << " x " << p.in_w << ", a kernel of " << p.kernel_h << " x " << p.kernel_w
      << ", stride " << pair(p.stride_h, p.stride_w) << ", padding " << pair(p.padding_h, p.padding_w)
      << " and dilation " << pair(p.dilation_h, p.dilation_w);
  if (!is_plain(p)) out << ", border " << to_string(p.border) << ", upsample " << pair(p.upsample_h, p.upsample_w);
  if (p.out_h == 0 || p.out_w == 0) out << ": the kernel is larger than the padded input";
  return out.str();
}

void check_pixels(const char* op, const char* holder, const Problem& p, int64_t out_h, int64_t out_w) {
  PYINVOLUTION_CHECK(op, out_h == p.out_h && out_w == p.out_w, holder, " has kernels for ", out_h, " x ", out_w,
                     " output pixels, expected ", p.out_h, " x ", p.out_w, window_text("an input", p));
}

// The weight of a 1x1 convolution, with or without its last two dimensions, of `columns` input channels.
bool is_pointwise(const Tensor& weight, int64_t columns) {
  return (weight.dim() == 2 || (weight.dim() == 4 && weight.size(2) == 1 && weight.size(3) == 1)) &&
         weight.size(1) == columns;
}

// What does not depend on where R comes from; `holder` names what has `reduced` channels.
SpanProblem span_of(const char* op, const Tensor& input, int64_t reduced, const char* holder, const Tensor& span_weight,
                    const std::optional<Tensor>& span_bias, const Sizes& kernel_size, const Sizes& stride,
                    const Sizes& padding, const Sizes& dilation) {
  SpanProblem span{};
  Problem& p = span.involution;
  p = window_of(op, "input", input, stride, padding, dilation);
  check_pair(op, "kernel_size", kernel_size, 1);
  check_alike(op, "span_weight", span_weight, input);
  span.reduced = reduced;
  PYINVOLUTION_CHECK(op, is_pointwise(span_weight, reduced), "span_weight has shape ", text(span_weight.sizes()),
                     ", expected (G * Kh * Kw, R) or (G * Kh * Kw, R, 1, 1) with R = ", reduced, ", ", holder);
  const int64_t rows = span_weight.size(0), taps = kernel_size[0] * kernel_size[1];
  PYINVOLUTION_CHECK(op, rows % taps == 0, "span_weight has ", rows, " rows, expected a multiple of the ", taps,
                     " taps of kernel_size ", text(kernel_size));
  set_kernel(op, "span_weight", p, rows / taps, kernel_size[0], kernel_size[1]);
  if (span_bias) {
    check_alike(op, "span_bias", *span_bias, input);
    check_shape(op, "span_bias", *span_bias, {rows});
  }
  std::copy_n(span_weight.strides().data(), 2, span.span_stride);
  std::copy_n(p.x_stride, 4, span.grad_x_stride);
  return span;
}

}  // namespace

void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype, const char* what) {
  PYINVOLUTION_CHECK(op, tensor.scalar_type() == dtype, name, " has dtype ",
                     torch::headeronly::toString(tensor.scalar_type()), ", expected ", what,
                     torch::headeronly::toString(dtype));
}

void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& input) {
  PYINVOLUTION_CHECK(op, tensor.device() == input.device(), name, " is on ", device_of(tensor),
                     ", expected input's device ", device_of(input));
}

void check_alike(const char* op, const char* name, const Tensor& tensor, const Tensor& input) {
  check_dtype(op, name, tensor, input.scalar_type(), "input's dtype ");
  check_device(op, name, tensor, input);
}

void check_shape(const char* op, const char* name, const Tensor& tensor, const Sizes& shape) {
  const auto sizes = tensor.sizes();
  PYINVOLUTION_CHECK(op, sizes.size() == shape.size() && std::equal(shape.begin(), shape.end(), sizes.begin()), name,
                     " has shape ", text(sizes), ", expected ", text(shape));
}

Problem involution_problem(const Tensor& input, const Tensor& weight, const Sizes& stride, const Sizes& padding,
                           const Sizes& dilation, int64_t border, const Sizes& upsample) {
  const char* const op = involution_op;
  Problem p = window_of(op, "input", input, stride, padding, dilation, border, upsample);
  PYINVOLUTION_CHECK(op, weight.dim() == 6, "weight has shape ", text(weight.sizes()),
                     ", expected 6 dimensions (N, G, Kh, Kw, Ho, Wo)");
  check_alike(op, "weight", weight, input);
  PYINVOLUTION_CHECK(op, weight.size(0) == p.batch, "weight has batch size ", weight.size(0), ", expected input's, ",
                     p.batch);
  set_kernel(op, "weight", p, weight.size(1), weight.size(2), weight.size(3));
  check_pixels(op, "weight", p, weight.size(4), weight.size(5));
  std::copy_n(weight.strides().data(), 6, p.w_stride);
  set_output(input, p);
  return p;
}

Problem correlation_problem(const Tensor& query, const Tensor& key, const Sizes& kernel_size, const Sizes& stride,
                            const Sizes& padding, const Sizes& dilation, int64_t groups, int64_t border,
                            const Sizes& upsample) {
  const char* const op = correlation_op;
  check_pair(op, "kernel_size", kernel_size, 1);
  Problem p = window_of(op, "key", key, stride, padding, dilation, border, upsample);
  check_dtype(op, "query", query, key.scalar_type(), "key's dtype ");
  PYINVOLUTION_CHECK(op, query.device() == key.device(), "query is on ", device_of(query), ", expected key's device ",
                     device_of(key));
  PYINVOLUTION_CHECK(op, groups >= 1 && p.channels % groups == 0, "groups is ", groups,
                     ", expected a divisor of key's ", p.channels, " channels");
  set_window(op, "key", p, groups, kernel_size[0], kernel_size[1]);
  const Sizes shape{p.batch, p.channels, p.out_h, p.out_w};
  const auto sizes = query.sizes();
  PYINVOLUTION_CHECK(op, sizes.size() == 4 && std::equal(shape.begin(), shape.end(), sizes.begin()), "query has shape ",
                     text(sizes), ", expected ", text(shape), window_text("a key", p));
  std::copy_n(query.strides().data(), 4, p.y_stride);
  return p;
}

SpanProblem span_problem(const Tensor& input, const Tensor& reduced, const Tensor& span_weight,
                         const std::optional<Tensor>& span_bias, const Sizes& kernel_size, const Sizes& stride,
                         const Sizes& padding, const Sizes& dilation) {
  const char* const op = span_op;
  PYINVOLUTION_CHECK(op, input.dim() == 4, "input has shape ", text(input.sizes()),
                     ", expected 4 dimensions (N, C, H, W)");
  PYINVOLUTION_CHECK(op, reduced.dim() == 4, "reduced has shape ", text(reduced.sizes()),
                     ", expected 4 dimensions (N, R, Ho, Wo)");
  check_alike(op, "reduced", reduced, input);
  PYINVOLUTION_CHECK(op, reduced.size(0) == input.size(0), "reduced has batch size ", reduced.size(0),
                     ", expected input's, ", input.size(0));
  SpanProblem span = span_of(op, input, reduced.size(1), "reduced's channels", span_weight, span_bias, kernel_size,
                             stride, padding, dilation);
  check_pixels(op, "reduced", span.involution, reduced.size(2), reduced.size(3));
  std::copy_n(reduced.strides().data(), 4, span.reduced_stride);
  std::copy_n(span.reduced_stride, 4, span.grad_reduced_stride);
  set_output(input, span.involution);
  return span;
}

SpanProblem layer_problem(const Tensor& input, const Tensor& reduce_weight, const std::optional<Tensor>& reduce_bias,
                          const Tensor& span_weight, const std::optional<Tensor>& span_bias, const Sizes& kernel_size,
                          const Sizes& stride, const Sizes& padding, const Sizes& dilation) {
  const char* const op = layer_op;
  PYINVOLUTION_CHECK(op, input.dim() == 4, "input has shape ", text(input.sizes()),
                     ", expected 4 dimensions (N, C, H, W)");
  check_alike(op, "reduce_weight", reduce_weight, input);
  PYINVOLUTION_CHECK(op, is_pointwise(reduce_weight, input.size(1)), "reduce_weight has shape ",
                     text(reduce_weight.sizes()), ", expected (R, C) or (R, C, 1, 1) with C = ", input.size(1),
                     ", input's channels");
  const int64_t reduced = reduce_weight.size(0);
  if (reduce_bias) {
    check_alike(op, "reduce_bias", *reduce_bias, input);
    check_shape(op, "reduce_bias", *reduce_bias, {reduced});
  }
  SpanProblem span = span_of(op, input, reduced, "reduce_weight's rows", span_weight, span_bias, kernel_size, stride,
                             padding, dilation);
  Problem& p = span.involution;
  p.out_h = layer_output_size(p.in_h, p.stride_h), p.out_w = layer_output_size(p.in_w, p.stride_w);
  std::copy_n(reduce_weight.strides().data(), 2, span.reduce_stride);
  set_dense(span.reduced_stride, reduced, p.out_h, p.out_w, memory_format_of(input));
  set_output(input, p);
  return span;
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

namespace {

// What malloc maps anew at each call and unmaps when it is freed: glibc never keeps pieces of more than 32 MB.
constexpr int64_t always_mapped_bytes = 32 << 20;
constexpr uintptr_t huge_page = 2 << 20;

// Asks for large pages for a new tensor, all of which is about to be written. Writing the first byte of a page of 4 KB
// for the first time takes a page fault, which took 3 to 4 times as long as computing what is in it. Nothing else
// shares these pages, and where the system grants none, nothing changes.
void prefer_huge_pages(const Tensor& tensor) {
#ifdef MADV_HUGEPAGE
  const ScalarType type = tensor.scalar_type();
  const int64_t bytes = tensor.numel() * (type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2);
  if (!tensor.is_cpu() || bytes <= always_mapped_bytes) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t begin = (address + huge_page - 1) / huge_page * huge_page;
  const uintptr_t end = (address + uintptr_t(bytes)) / huge_page * huge_page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)tensor;
#endif
}

}  // namespace

Tensor new_like(const Tensor& tensor) {
  const Tensor result = torch::stable::empty_like(tensor);
  prefer_huge_pages(result);
  return result;
}

Tensor new_output(const Tensor& input, Problem& p) {
  const int64_t shape[] = {p.batch, p.channels, p.out_h, p.out_w};
  const Tensor output = torch::stable::empty({shape, 4}, input.scalar_type(), std::nullopt, input.device(),
                                             std::nullopt, memory_format_of(input));
  prefer_huge_pages(output);
  std::copy_n(output.strides().data(), 4, p.y_stride);
  return output;
}

Tensor new_weight(const Tensor& key, Problem& p) {
  const bool last = memory_format_of(key) == MemoryFormat::ChannelsLast;
  const Sizes shape = last ? Sizes{p.batch, p.out_h, p.out_w, p.groups, p.kernel_h, p.kernel_w}
                           : Sizes{p.batch, p.groups, p.kernel_h, p.kernel_w, p.out_h, p.out_w};
  Tensor weight = torch::stable::new_empty(key, shape);
  prefer_huge_pages(weight);
  if (last) weight = call("aten::permute", "", weight, Sizes{0, 3, 4, 5, 1, 2});
  std::copy_n(weight.strides().data(), 6, p.w_stride);
  return weight;
}

void* address(const Tensor& tensor) { return const_cast<void*>(tensor.const_data_ptr()); }

}  // namespace pyinvolution::ops
