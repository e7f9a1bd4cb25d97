#include "pyinvolution/involution.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#ifndef PYINVOLUTION_VERSION
#define PYINVOLUTION_VERSION "unknown"
#endif

namespace pyinvolution {
namespace {

void expect(bool holds, const char* name, int64_t value, const char* expected) {
  if (!holds)
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + ", expected " + expected);
}

// Where a tensor has elements, it has an address.
void expect_memory(const char* name, const void* address, int64_t elements) {
  if (elements > 0 && address == nullptr)
    throw std::invalid_argument(std::string(name) + " is null, expected the address of " + std::to_string(elements) +
                                " elements");
}

// What makes the size of the output computable.
void validate_window(const Problem& p) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  expect(std::string(to_string(p.dtype)) != "unknown", "dtype", int64_t(p.dtype), "f32, f64, f16 or bf16");
  expect(p.device == Device::cpu || p.device == Device::cuda, "device", int64_t(p.device), "cpu or cuda");
  expect(p.batch >= 0, "batch", p.batch, "at least 0");
  for (const auto& [name, value] : {std::pair{"in_h", p.in_h}, {"in_w", p.in_w}})
    expect(value >= 0 && value < int64_t{1} << 62, name, value, "at least 0 and below 2^62");
  for (const auto& [name, value] : {std::pair{"kernel_h", p.kernel_h},
                                    {"kernel_w", p.kernel_w},
                                    {"stride_h", p.stride_h},
                                    {"stride_w", p.stride_w},
                                    {"dilation_h", p.dilation_h},
                                    {"dilation_w", p.dilation_w}})
    expect(value >= 1 && value <= most, name, value, "at least 1 and below 2^31");
  for (const auto& [name, value] : {std::pair{"padding_h", p.padding_h}, {"padding_w", p.padding_w}})
    expect(value >= 0 && value <= most, name, value, "at least 0 and below 2^31");
  for (const auto& [name, value] : {std::pair{"upsample_h", p.upsample_h}, {"upsample_w", p.upsample_w}})
    expect(value >= 1 && value <= most, name, value, "at least 1 and below 2^31");
  if (p.upsample_h > 1) expect(p.stride_h == 1, "stride_h", p.stride_h, "1 where upsample_h is above 1");
  if (p.upsample_w > 1) expect(p.stride_w == 1, "stride_w", p.stride_w, "1 where upsample_w is above 1");
  expect(p.border == Border::zeros || p.border == Border::shift, "border", int64_t(p.border), "zeros or shift");
  if (p.border == Border::shift) {
    for (const auto& [name, value] : {std::pair{"padding_h", p.padding_h}, {"padding_w", p.padding_w}})
      expect(value == 0, name, value, "0 with a border that shifts");
    const auto room = [](int64_t size, int64_t kernel, int64_t dilation) {
      return size == 0 || kernel * dilation <= size;  // without pixels there is no window
    };
    expect(room(p.in_h, p.kernel_h, p.dilation_h), "in_h", p.in_h,
           "at least kernel_h * dilation_h with a border that shifts");
    expect(room(p.in_w, p.kernel_w, p.dilation_w), "in_w", p.in_w,
           "at least kernel_w * dilation_w with a border that shifts");
  }
  expect(p.channels >= 0, "channels", p.channels, "at least 0");
  if (p.groups < 1 || p.channels % p.groups != 0)
    expect(false, "groups", p.groups, ("a divisor of channels, " + std::to_string(p.channels)).c_str());
}

int64_t output_rows(const Problem& p) {
  return output_size(p.in_h, p.kernel_h, p.stride_h, p.padding_h, p.dilation_h, p.border, p.upsample_h);
}
int64_t output_columns(const Problem& p) {
  return output_size(p.in_w, p.kernel_w, p.stride_w, p.padding_w, p.dilation_w, p.border, p.upsample_w);
}

void expect_sizes(const Problem& p, int64_t out_h, int64_t out_w) {
  if (p.out_h != out_h) expect(false, "out_h", p.out_h, std::to_string(out_h).c_str());
  if (p.out_w != out_w) expect(false, "out_w", p.out_w, std::to_string(out_w).c_str());
}

// Kernels of a span involution exist for windows with a border of zeros and without upsampling.
void expect_plain(const Problem& p) {
  expect(p.border == Border::zeros, "border", int64_t(p.border), "zeros for kernels from a span");
  expect(p.upsample_h == 1, "upsample_h", p.upsample_h, "1 for kernels from a span");
  expect(p.upsample_w == 1, "upsample_w", p.upsample_w, "1 for kernels from a span");
}

// Strides of dense tensors: sizes by significance, given as (axis, size), last fastest.
template <size_t Axes>
void dense(int64_t (&strides)[Axes], const std::array<int64_t, Axes>& sizes, const std::array<size_t, Axes>& order) {
  int64_t stride = 1;
  for (size_t i = Axes; i-- > 0;) {
    const int64_t size = std::max<int64_t>(sizes[order[i]], 1);
    strides[order[i]] = stride;
    if (__builtin_mul_overflow(stride, size, &stride))
      throw std::invalid_argument("a size is " + std::to_string(size) +
                                  ", expected tensors of fewer than 2^63 elements altogether");
  }
}

constexpr std::array<size_t, 4> nchw{0, 1, 2, 3}, nhwc{0, 2, 3, 1};

SpanProblem with_span(const Problem& p, int64_t reduced, Layout layout, bool epilogue, bool relu) {
  expect(reduced >= 1, "reduced", reduced, "at least 1");
  expect_plain(p);
  SpanProblem span{};
  span.involution = p, span.reduced = reduced, span.epilogue = epilogue, span.relu = relu;
  dense<4>(span.reduced_stride, {p.batch, reduced, p.out_h, p.out_w}, layout == Layout::nchw ? nchw : nhwc);
  span.span_stride[0] = reduced, span.span_stride[1] = 1;
  span.reduce_stride[0] = p.channels, span.reduce_stride[1] = 1;
  std::copy_n(p.x_stride, 4, span.grad_x_stride);
  std::copy_n(span.reduced_stride, 4, span.grad_reduced_stride);
  return span;
}

}  // namespace

const char* version() { return PYINVOLUTION_VERSION; }

int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, Border border,
                    int64_t upsample) {
  const int64_t room = border == Border::shift ? size - 1 : size + 2 * padding - dilation * (kernel - 1) - 1;
  int64_t outputs = room < 0 ? 0 : room / stride + 1;
  return __builtin_mul_overflow(outputs, upsample, &outputs) ? std::numeric_limits<int64_t>::max() : outputs;
}

int64_t layer_output_size(int64_t size, int64_t stride) { return (size + stride - 1) / stride; }

Problem make_problem(DType dtype, Device device, const std::array<int64_t, 4>& input, int64_t groups,
                     const WindowParams& geometry, Layout layout) {
  expect(layout == Layout::nchw || layout == Layout::nhwc, "layout", int64_t(layout), "nchw or nhwc");
  Problem p{};
  p.dtype = dtype, p.device = device;
  p.batch = input[0], p.channels = input[1], p.in_h = input[2], p.in_w = input[3], p.groups = groups;
  p.kernel_h = geometry.kernel[0], p.kernel_w = geometry.kernel[1];
  p.stride_h = geometry.stride[0], p.stride_w = geometry.stride[1];
  p.padding_h = geometry.padding[0], p.padding_w = geometry.padding[1];
  p.dilation_h = geometry.dilation[0], p.dilation_w = geometry.dilation[1];
  p.border = geometry.border, p.upsample_h = geometry.upsample[0], p.upsample_w = geometry.upsample[1];
  validate_window(p);
  p.out_h = output_rows(p), p.out_w = output_columns(p);
  const auto& order = layout == Layout::nchw ? nchw : nhwc;
  dense<4>(p.x_stride, input, order);
  dense<4>(p.y_stride, {p.batch, p.channels, p.out_h, p.out_w}, order);
  const std::array<size_t, 6> first{0, 1, 2, 3, 4, 5}, last{0, 4, 5, 1, 2, 3};
  dense<6>(p.w_stride, {p.batch, p.groups, p.kernel_h, p.kernel_w, p.out_h, p.out_w},
           layout == Layout::nchw ? first : last);
  return p;
}

SpanProblem make_span_problem(DType dtype, Device device, const std::array<int64_t, 4>& input, int64_t groups,
                              int64_t reduced, const WindowParams& geometry, Layout layout, bool epilogue, bool relu) {
  return with_span(make_problem(dtype, device, input, groups, geometry, layout), reduced, layout, epilogue, relu);
}

SpanProblem make_layer_problem(DType dtype, Device device, const std::array<int64_t, 4>& input, int64_t groups,
                               int64_t reduced, const WindowParams& geometry, Layout layout, bool epilogue, bool relu) {
  Problem p = make_problem(dtype, device, input, groups, geometry, layout);
  p.out_h = layer_output_size(p.in_h, p.stride_h), p.out_w = layer_output_size(p.in_w, p.stride_w);
  dense<4>(p.y_stride, {p.batch, p.channels, p.out_h, p.out_w}, layout == Layout::nchw ? nchw : nhwc);
  return with_span(p, reduced, layout, epilogue, relu);
}

void validate(const Problem& p) {
  validate_window(p);
  expect_sizes(p, output_rows(p), output_columns(p));
}

void validate(const Problem& p, const Buffers& buffers) {
  validate(p);
  expect_memory("x", buffers.x, p.batch * p.channels * p.in_h * p.in_w);
  expect_memory("w", buffers.w, p.batch * p.groups * p.taps() * p.out_h * p.out_w);
  expect_memory("y", buffers.y, p.batch * p.channels * p.out_h * p.out_w);
}

void validate(const SpanProblem& span, SpanOp op) {
  // A layer's window may need more zeros on the right and bottom than its padding, hence its output is of another size.
  const Problem& p = span.involution;
  if (op == SpanOp::layer) {
    validate_window(p);
    expect_sizes(p, layer_output_size(p.in_h, p.stride_h), layer_output_size(p.in_w, p.stride_w));
  } else {
    validate(p);
  }
  expect_plain(p);
  expect(span.reduced >= 1, "reduced", span.reduced, "at least 1");
}

void validate(const SpanProblem& span, SpanOp op, const SpanBuffers& buffers) {
  validate(span, op);
  const Problem& p = span.involution;
  expect_memory("x", buffers.x, p.batch * p.channels * p.in_h * p.in_w);
  expect_memory("y", buffers.y, p.batch * p.channels * p.out_h * p.out_w);
  expect_memory("span", buffers.span, span.span_rows() * span.reduced);
  if (op == SpanOp::layer)
    expect_memory("reduce", buffers.reduce, span.reduced * p.channels);
  else
    expect_memory("reduced", buffers.reduced, p.batch * span.reduced * p.out_h * p.out_w);
}

bool fuses(DType dtype, Device device, int64_t channels, int64_t groups, int64_t reduced, const WindowParams& params) {
  make_problem(dtype, device, {1, channels, 1, 1}, groups, params);  // whether the sizes below can be computed
  std::array<int64_t, 4> input{1, channels, 0, 0};
  for (size_t i : {0, 1}) input[2 + i] = 13 * params.stride[i] + params.dilation[i] * (params.kernel[i] - 1) + 1;
  WindowParams window = params;
  window.padding = {0, 0};
  return route(make_span_problem(dtype, device, input, groups, reduced, window), SpanOp::forward, true) == Route::span;
}

}  // namespace pyinvolution
