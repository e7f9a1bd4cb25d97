#include "operations.h"

#include <tbb/blocked_range.h>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <algorithm>

#include "openvino/core/type/bfloat16.hpp"
#include "openvino/core/type/float16.hpp"

namespace pyinvolution::openvino {
namespace {

DType dtype_of(const ov::element::Type& type) {
  switch (ov::element::Type_t(type)) {
    case ov::element::f32: return DType::f32;
    case ov::element::f64: return DType::f64;
    case ov::element::f16: return DType::f16;
    case ov::element::bf16: return DType::bf16;
    default: OPENVINO_THROW("input is ", type, ", expected f32, f64, f16 or bf16");
  }
}

// The threads of OpenVINO's CPU plugin: those of the arena that the calling thread is in.
void parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* state) {
  tbb::parallel_for(tbb::blocked_range<int64_t>(begin, end, size_t(grain)),
                    [&](const auto& range) { body(range.begin(), range.end(), state); });
}

Execution execution() { return {parallel_for, tbb::this_task_arena::max_concurrency(), nullptr}; }

// scale or shift in the type that sums are kept in.
template <class To>
void convert(const ov::Tensor& from, std::vector<To>& to) {
  const size_t size = from.get_size();
  switch (ov::element::Type_t(from.get_element_type())) {
    case ov::element::f32: return to.assign(from.data<const float>(), from.data<const float>() + size);
    case ov::element::f64: return to.assign(from.data<const double>(), from.data<const double>() + size);
    case ov::element::f16: return to.assign(from.data<const ov::float16>(), from.data<const ov::float16>() + size);
    case ov::element::bf16: return to.assign(from.data<const ov::bfloat16>(), from.data<const ov::bfloat16>() + size);
    default: OPENVINO_THROW("scale or shift is ", from.get_element_type(), ", expected a floating-point type");
  }
}

// As an address that the core takes; the tensor is not written.
void* address(const ov::Tensor& tensor) { return const_cast<void*>(tensor.data()); }

std::array<int64_t, 4> input_sizes(const ov::Tensor& input) {
  const ov::Shape& shape = input.get_shape();
  return {int64_t(shape[0]), int64_t(shape[3]), int64_t(shape[1]), int64_t(shape[2])};
}

void run_span(const SpanProblem& problem, SpanOp op, SpanBuffers buffers, const ov::Tensor* scale,
              const ov::Tensor* shift) {
  const DType dtype = problem.involution.dtype;
  std::vector<float> floats[2];
  std::vector<double> doubles[2];
  if (scale != nullptr) {
    void** const places[] = {&buffers.scale, &buffers.shift};
    const ov::Tensor* const given[] = {scale, shift};
    for (int i : {0, 1}) {
      OPENVINO_ASSERT(int64_t(given[i]->get_size()) == problem.involution.channels, "scale and shift have ",
                      given[i]->get_size(), " elements, expected ", problem.involution.channels);
      if (dtype == DType::f64) {
        convert(*given[i], doubles[i]);
        *places[i] = doubles[i].data();
      } else {
        convert(*given[i], floats[i]);
        *places[i] = floats[i].data();
      }
    }
  }
  if (route(problem, op) == (op == SpanOp::layer ? Route::layer : Route::span))
    run(problem, op, buffers, execution());
  else  // a very wide image, for example
    run_by_pixel(problem, op, buffers, execution());
}

}  // namespace

int Operation::place(const std::string& name) const {
  const auto& names = attributes_.inputs;
  const auto found = std::find(names.begin(), names.end(), name);
  return found == names.end() ? -1 : int(found - names.begin());
}

WindowParams Operation::window() const {
  const auto pair = [](const std::vector<int64_t>& values) { return std::array<int64_t, 2>{values[0], values[1]}; };
  return {pair(attributes_.kernel_size), pair(attributes_.stride), pair(attributes_.padding),
          pair(attributes_.dilation)};
}

bool Operation::visit_attributes(ov::AttributeVisitor& visitor) {
  visitor.on_attribute("kernel_size", attributes_.kernel_size);
  visitor.on_attribute("stride", attributes_.stride);
  visitor.on_attribute("padding", attributes_.padding);
  visitor.on_attribute("dilation", attributes_.dilation);
  visitor.on_attribute("relu", attributes_.relu);
  visitor.on_attribute("inputs", attributes_.inputs);
  return true;
}

void Operation::validate_and_infer_types() {
  const auto& a = attributes_;
  const std::pair<const char*, const std::vector<int64_t>*> pairs[] = {
      {"kernel_size", &a.kernel_size}, {"stride", &a.stride}, {"padding", &a.padding}, {"dilation", &a.dilation}};
  for (const auto& [name, values] : pairs) {
    NODE_VALIDATION_CHECK(this, values->size() == 2, name, " has ", values->size(), " values, expected 2");
    const int64_t least = values == &a.padding ? 0 : 1;
    for (int64_t value : *values)
      NODE_VALIDATION_CHECK(this, value >= least, name, " is ", value, ", expected at least ", least);
  }
  NODE_VALIDATION_CHECK(this, get_input_size() == a.inputs.size(), "there are ", get_input_size(),
                        " inputs, expected the ", a.inputs.size(), " that the attribute names");
  NODE_VALIDATION_CHECK(this, place("input") == 0, "the first input is ", a.inputs.empty() ? "missing" : a.inputs[0],
                        ", expected input");
  NODE_VALIDATION_CHECK(this, (place("scale") < 0) == (place("shift") < 0),
                        "one of scale and shift is missing, expected both or none");
  const ov::PartialShape& input = get_input_partial_shape(0);
  NODE_VALIDATION_CHECK(this, input.rank().compatible(4), "input has shape ", input, ", expected (N, H, W, C)");
  ov::PartialShape output = ov::PartialShape::dynamic(4);
  if (input.rank().is_static()) {
    output[0] = input[0];
    output[3] = input[3];
    for (int axis : {0, 1}) output[1 + axis] = pixels(axis);
  }
  set_output_type(0, get_input_element_type(0), output);
}

bool Operation::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
  for (size_t i = 0; i < inputs.size(); ++i) {
    const std::string& name = attributes_.inputs[i];
    OPENVINO_ASSERT(name == "scale" || name == "shift" || inputs[i].get_element_type() == inputs[0].get_element_type(),
                    name, " is ", inputs[i].get_element_type(), ", expected ", inputs[0].get_element_type(),
                    " as the input is");
  }
  compute(outputs[0], inputs);
  return true;
}

// --- involution2d -----------------------------------------------------------------------------------------------------

ov::Dimension Involution2d::pixels(int axis) const {
  const ov::PartialShape& weight = get_input_partial_shape(1);
  if (weight.rank().is_dynamic()) return ov::Dimension::dynamic();
  NODE_VALIDATION_CHECK(this, weight.size() == 4 || weight.size() == 6, "weight has shape ", weight,
                        ", expected (N, G, Kh, Kw, Ho, Wo) or (N, Ho, Wo, G Kh Kw)");
  return weight[(weight.size() == 6 ? 4 : 1) + axis];
}

void Involution2d::compute(ov::Tensor& output, const ov::TensorVector& inputs) const {
  const ov::Shape& weight = inputs[1].get_shape();
  const auto [n, c, h, w] = input_sizes(inputs[0]);
  const bool planar = weight.size() == 6;
  const int64_t taps = attributes_.kernel_size[0] * attributes_.kernel_size[1];
  const int64_t groups = planar ? int64_t(weight[1]) : int64_t(weight[3]) / taps;
  Problem problem =
      make_problem(dtype_of(inputs[0].get_element_type()), Device::cpu, {n, c, h, w}, groups, window(), Layout::nhwc);
  if (planar) {
    const Problem dense = make_problem(problem.dtype, Device::cpu, {n, c, h, w}, groups, window(), Layout::nchw);
    std::copy(std::begin(dense.w_stride), std::end(dense.w_stride), problem.w_stride);
  }
  const ov::Shape expected =
      planar ? ov::Shape{size_t(n),
                         size_t(groups),
                         size_t(problem.kernel_h),
                         size_t(problem.kernel_w),
                         size_t(problem.out_h),
                         size_t(problem.out_w)}
             : ov::Shape{size_t(n), size_t(problem.out_h), size_t(problem.out_w), size_t(groups * taps)};
  OPENVINO_ASSERT(weight == expected, "weight has shape ", weight, ", expected ", expected);
  output.set_shape({size_t(n), size_t(problem.out_h), size_t(problem.out_w), size_t(c)});
  run(problem, Pass::forward, {address(inputs[0]), address(inputs[1]), output.data()}, execution());
}

// --- span_involution2d and involution_layer2d -------------------------------------------------------------------------

namespace {

// Groups from the rows of span_weight.
int64_t groups_of(const ov::Tensor& span_weight, const WindowParams& window, int64_t reduced) {
  const ov::Shape& shape = span_weight.get_shape();
  const int64_t taps = window.kernel[0] * window.kernel[1];
  OPENVINO_ASSERT(shape.size() >= 2 && int64_t(shape[0]) % taps == 0 && int64_t(shape[1]) == reduced,
                  "span_weight has shape ", shape, ", expected (G x ", taps, ", ", reduced, ", 1, 1)");
  return int64_t(shape[0]) / taps;
}

}  // namespace

ov::Dimension SpanInvolution2d::pixels(int axis) const {
  const ov::PartialShape& reduced = get_input_partial_shape(1);
  NODE_VALIDATION_CHECK(this, reduced.rank().compatible(4), "reduced has shape ", reduced, ", expected (N, Ho, Wo, R)");
  return reduced.rank().is_static() ? reduced[1 + axis] : ov::Dimension::dynamic();
}

void SpanInvolution2d::compute(ov::Tensor& output, const ov::TensorVector& inputs) const {
  const auto given = [&](const char* name) { return place(name) < 0 ? nullptr : &inputs[place(name)]; };
  const auto buffer = [&](const char* name) { return given(name) == nullptr ? nullptr : address(*given(name)); };
  const auto [n, c, h, w] = input_sizes(inputs[0]);
  const int64_t r = int64_t(inputs[1].get_shape()[3]);
  const int64_t groups = groups_of(*given("span_weight"), window(), r);
  const SpanProblem problem =
      make_span_problem(dtype_of(inputs[0].get_element_type()), Device::cpu, {n, c, h, w}, groups, r, window(),
                        Layout::nhwc, given("scale") != nullptr, attributes_.relu);
  const Problem& p = problem.involution;
  const ov::Shape expected{size_t(n), size_t(p.out_h), size_t(p.out_w), size_t(r)};
  OPENVINO_ASSERT(inputs[1].get_shape() == expected, "reduced has shape ", inputs[1].get_shape(), ", expected ",
                  expected);
  output.set_shape({size_t(n), size_t(p.out_h), size_t(p.out_w), size_t(c)});
  SpanBuffers buffers{};
  buffers.x = address(inputs[0]), buffers.reduced = address(inputs[1]), buffers.y = output.data();
  buffers.span = buffer("span_weight"), buffers.bias = buffer("span_bias");
  run_span(problem, SpanOp::forward, buffers, given("scale"), given("shift"));
}

ov::Dimension InvolutionLayer2d::pixels(int axis) const {
  const ov::Dimension& size = get_input_partial_shape(0)[1 + axis];
  const auto cells = [&](int64_t pixels) {
    return pixels < 0 ? pixels : layer_output_size(pixels, attributes_.stride[axis]);
  };
  return {cells(size.get_min_length()), cells(size.get_max_length())};
}

void InvolutionLayer2d::compute(ov::Tensor& output, const ov::TensorVector& inputs) const {
  const auto given = [&](const char* name) { return place(name) < 0 ? nullptr : &inputs[place(name)]; };
  const auto buffer = [&](const char* name) { return given(name) == nullptr ? nullptr : address(*given(name)); };
  const auto [n, c, h, w] = input_sizes(inputs[0]);
  const ov::Shape& reduce = given("reduce_weight")->get_shape();
  OPENVINO_ASSERT(reduce.size() >= 2 && int64_t(reduce[1]) == c, "reduce_weight has shape ", reduce, ", expected (R, ",
                  c, ", 1, 1)");
  const int64_t r = int64_t(reduce[0]);
  const int64_t groups = groups_of(*given("span_weight"), window(), r);
  const SpanProblem problem =
      make_layer_problem(dtype_of(inputs[0].get_element_type()), Device::cpu, {n, c, h, w}, groups, r, window(),
                         Layout::nhwc, given("scale") != nullptr, attributes_.relu);
  const Problem& p = problem.involution;
  output.set_shape({size_t(n), size_t(p.out_h), size_t(p.out_w), size_t(c)});
  SpanBuffers buffers{};
  buffers.x = address(inputs[0]), buffers.y = output.data();
  buffers.reduce = buffer("reduce_weight"), buffers.reduce_bias = buffer("reduce_bias");
  buffers.span = buffer("span_weight"), buffers.bias = buffer("span_bias");
  run_span(problem, SpanOp::layer, buffers, given("scale"), given("shift"));
}

}  // namespace pyinvolution::openvino
