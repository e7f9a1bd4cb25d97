#include "conversion.h"

#include <algorithm>
#include <map>
#include <memory>
#include <string>

#include "openvino/core/op_extension.hpp"
#include "openvino/frontend/onnx/extension/conversion.hpp"
#include "openvino/op/add.hpp"
#include "openvino/op/avg_pool.hpp"
#include "openvino/op/constant.hpp"
#include "openvino/op/convert.hpp"
#include "openvino/op/convolution.hpp"
#include "openvino/op/multiply.hpp"
#include "openvino/op/pad.hpp"
#include "openvino/op/relu.hpp"
#include "openvino/op/reshape.hpp"
#include "openvino/op/transpose.hpp"
#include "operations.h"

namespace pyinvolution::openvino {
namespace {

using Output = ov::Output<ov::Node>;
using Inputs = std::map<std::string, Output>;
using Names = std::vector<std::string>;

Output transposed(const Output& image, const std::vector<int64_t>& order) {
  return std::make_shared<ov::op::v1::Transpose>(
      image, ov::op::v0::Constant::create(ov::element::i64, ov::Shape{order.size()}, order));
}
Output to_nhwc(const Output& image) { return transposed(image, {0, 2, 3, 1}); }
Output to_nchw(const Output& image) { return transposed(image, {0, 3, 1, 2}); }

Output converted(const Output& from, const ov::element::Type& type) {
  if (from.get_element_type() == type) return from;
  return std::make_shared<ov::op::v0::Convert>(from, type);
}

// A vector for each channel of an image.
Output per_channel(const Output& vector, const ov::element::Type& type) {
  const auto shape = ov::op::v0::Constant::create(ov::element::i64, ov::Shape{4}, {1, -1, 1, 1});
  return std::make_shared<ov::op::v1::Reshape>(converted(vector, type), shape, false);
}

Output convolved(const Output& image, const Output& weight, const Output* bias) {
  const Output result = std::make_shared<ov::op::v1::Convolution>(
      image, weight, ov::Strides{1, 1}, ov::CoordinateDiff{0, 0}, ov::CoordinateDiff{0, 0}, ov::Strides{1, 1});
  if (bias == nullptr) return result;
  return std::make_shared<ov::op::v1::Add>(result, per_channel(*bias, result.get_element_type()));
}

// A node of ONNX with images N,C,H,W becomes an operation with channels-last ones between transposes. The CPU plugin's
// convolutions are channels-last, so that these transposes move nothing.
class Converter {
 public:
  Converter(const ov::frontend::NodeContext& context, const Names& names, bool bfloat16) : names_(names) {
    attributes_.kernel_size = context.get_attribute<std::vector<int64_t>>("kernel_size");
    attributes_.stride = context.get_attribute<std::vector<int64_t>>("stride");
    attributes_.padding = context.get_attribute<std::vector<int64_t>>("padding");
    attributes_.dilation = context.get_attribute<std::vector<int64_t>>("dilation");
    attributes_.relu = context.get_attribute<int64_t>("relu", 0) != 0;
    for (size_t i = 0; i < names.size() && i < context.get_input_size(); ++i) {
      const Output input = context.get_input(int(i));
      // What the frontend passes for an input that is absent.
      if (std::string(input.get_node()->get_type_info().name) != "NullNode") inputs_[names[i]] = input;
    }
    type_ = inputs_.at("input").get_element_type();
    compute_type_ = bfloat16 && type_ == ov::element::f32 ? ov::element::Type(ov::element::bf16) : type_;
  }

  ov::OutputVector involution() { return {to_nchw_in_type(operation<Involution2d>(inputs_, {"input"}))}; }

  ov::OutputVector span() { return {span(inputs_)}; }

  ov::OutputVector layer() {
    if (fuses(SpanOp::layer)) return {to_nchw_in_type(operation<InvolutionLayer2d>(inputs_, {"input"}))};
    const auto& stride = attributes_.stride;
    Inputs inputs = inputs_;
    Output cells = inputs.at("input");
    if (stride[0] > 1 || stride[1] > 1) {
      const ov::Shape window{size_t(stride[0]), size_t(stride[1])};
      cells = std::make_shared<ov::op::v1::AvgPool>(cells, ov::Strides{window[0], window[1]}, ov::Shape{0, 0},
                                                    ov::Shape{0, 0}, window, true, ov::op::RoundingType::CEIL);
    }
    inputs["reduced"] =
        std::make_shared<ov::op::v0::Relu>(convolved(cells, inputs.at("reduce_weight"), find(inputs, "reduce_bias")));
    // The window of the last cell needs as many zeros as make it whole, which may be more than there are at the top.
    std::vector<int64_t> begin{0, 0, 0, 0}, end{0, 0, 0, 0};
    for (int i : {0, 1}) {
      begin[2 + i] = attributes_.padding[i];
      end[2 + i] = attributes_.dilation[i] * (attributes_.kernel_size[i] - 1) - attributes_.padding[i];
    }
    if (begin != end) {
      const auto constant = [](const auto& values) {
        return ov::op::v0::Constant::create(ov::element::i64, ov::Shape{4}, values);
      };
      inputs["input"] = std::make_shared<ov::op::v12::Pad>(inputs["input"], constant(begin), constant(end),
                                                           ov::op::PadMode::CONSTANT);
      attributes_.padding = {0, 0};
    }
    return {span(inputs)};
  }

 private:
  static const Output* find(const Inputs& inputs, const std::string& name) {
    const auto found = inputs.find(name);
    return found == inputs.end() ? nullptr : &found->second;
  }

  // Whether the core has a kernel for what is known before there is an image. Otherwise the engine's convolutions
  // compute what an involution's weight is generated from.
  bool fuses(SpanOp op) const {
    const ov::PartialShape& span = inputs_.at("span_weight").get_partial_shape();
    const ov::PartialShape& input = inputs_.at("input").get_partial_shape();
    if (span.is_dynamic() || input.rank().is_dynamic() || input[1].is_dynamic()) return true;
    const auto pair = [](const std::vector<int64_t>& values) { return std::array<int64_t, 2>{values[0], values[1]}; };
    const WindowParams window{pair(attributes_.kernel_size), pair(attributes_.stride), pair(attributes_.padding),
                              pair(attributes_.dilation)};
    const int64_t taps = window.kernel[0] * window.kernel[1];
    std::array<int64_t, 4> image{1, input[1].get_length(), 0, 0};
    for (int i : {0, 1}) image[2 + i] = 8 * window.stride[i] + window.dilation[i] * window.kernel[i];
    const DType dtype = compute_type_ == ov::element::f64    ? DType::f64
                        : compute_type_ == ov::element::f16  ? DType::f16
                        : compute_type_ == ov::element::bf16 ? DType::bf16
                                                             : DType::f32;
    const auto make = op == SpanOp::layer ? make_layer_problem : make_span_problem;
    const SpanProblem problem = make(dtype, Device::cpu, image, span[0].get_length() / taps, span[1].get_length(),
                                     window, Layout::nhwc, find(inputs_, "scale") != nullptr, attributes_.relu);
    return route(problem, op) == (op == SpanOp::layer ? Route::layer : Route::span);
  }

  Output span(const Inputs& inputs) const {
    Inputs given;
    for (const char* name : {"input", "reduced", "span_weight", "span_bias", "scale", "shift"})
      if (const Output* found = find(inputs, name)) given[name] = *found;
    if (fuses(SpanOp::forward)) return to_nchw_in_type(operation<SpanInvolution2d>(given, {"input", "reduced"}));
    const Inputs tensors{{"input", given.at("input")},
                         {"weight", convolved(given.at("reduced"), given.at("span_weight"), find(given, "span_bias"))}};
    Output result = to_nchw_in_type(operation<Involution2d>(tensors, {"input", "weight"}));
    if (find(given, "scale")) {
      result = std::make_shared<ov::op::v1::Multiply>(result, per_channel(given.at("scale"), type_));
      result = std::make_shared<ov::op::v1::Add>(result, per_channel(given.at("shift"), type_));
    }
    if (attributes_.relu) result = std::make_shared<ov::op::v0::Relu>(result);
    return result;
  }

  // The operation on these inputs, of which `images` become channels-last.
  template <class Op>
  Output operation(const Inputs& inputs, const Names& images) const {
    ov::OutputVector outputs;
    Operation::Attributes attributes = attributes_;
    attributes.inputs.clear();
    for (const char* name :
         {"input", "weight", "reduced", "reduce_weight", "reduce_bias", "span_weight", "span_bias", "scale", "shift"}) {
      const Output* found = find(inputs, name);
      if (found == nullptr) continue;
      Output input = *found;
      if (std::string(name) != "scale" && std::string(name) != "shift") input = converted(input, compute_type_);
      if (std::find(images.begin(), images.end(), name) != images.end()) input = to_nhwc(input);
      attributes.inputs.push_back(name);
      outputs.push_back(input);
    }
    return std::make_shared<Op>(outputs, attributes);
  }

  Output to_nchw_in_type(const Output& image) const { return converted(to_nchw(image), type_); }

  Names names_;
  Operation::Attributes attributes_;
  Inputs inputs_;
  ov::element::Type type_, compute_type_;
};

}  // namespace

std::vector<ov::Extension::Ptr> extensions(bool bfloat16) {
  struct Function {
    const char* name;
    Names inputs;
    ov::OutputVector (Converter::*convert)();
  };
  const Function functions[] = {
      {"involution2d", {"input", "weight"}, &Converter::involution},
      {"span_involution2d",
       {"input", "reduced", "span_weight", "span_bias", "scale", "shift"},
       static_cast<ov::OutputVector (Converter::*)()>(&Converter::span)},
      {"involution_layer2d",
       {"input", "reduce_weight", "reduce_bias", "span_weight", "span_bias", "scale", "shift"},
       &Converter::layer},
  };
  std::vector<ov::Extension::Ptr> all{std::make_shared<ov::OpExtension<Involution2d>>(),
                                      std::make_shared<ov::OpExtension<SpanInvolution2d>>(),
                                      std::make_shared<ov::OpExtension<InvolutionLayer2d>>()};
  // A file has a function for each configuration, under the names involution2d, involution2d_2, involution2d_3 and so on.
  constexpr int names = 32;
  for (const Function& function : functions)
    for (int i = 1; i <= names; ++i) {
      const std::string name = function.name + (i == 1 ? "" : "_" + std::to_string(i));
      all.push_back(std::make_shared<ov::frontend::onnx::ConversionExtension>(
          name, "pyinvolution", [=](const ov::frontend::NodeContext& context) {
            return (Converter(context, function.inputs, bfloat16).*function.convert)();
          }));
    }
  return all;
}

}  // namespace pyinvolution::openvino
