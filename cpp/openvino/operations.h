// The involutions as operations of OpenVINO, which the core computes on the CPU. Images are channels-last: OpenVINO's
// convolutions are so on a CPU, and so are the core's fastest kernels. docs/onnx.md has the equations.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "openvino/op/op.hpp"
#include "pyinvolution/involution.h"

namespace pyinvolution::openvino {

// What all three have in common. T is float32, float64, float16 or bfloat16: the type of every input but scale and
// shift, which are of any floating-point type, and of the output.
class Operation : public ov::op::Op {
 public:
  struct Attributes {
    std::vector<int64_t> kernel_size{1, 1}, stride{1, 1}, padding{0, 0}, dilation{1, 1};
    bool relu = false;
    // Names of the inputs that there are, in their order.
    std::vector<std::string> inputs;
  };

  Operation() = default;
  Operation(const ov::OutputVector& inputs, const Attributes& attributes) : Op(inputs), attributes_(attributes) {}

  void validate_and_infer_types() override;
  bool visit_attributes(ov::AttributeVisitor& visitor) override;
  bool has_evaluate() const override { return true; }
  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;

 protected:
  // The place of an input in the list, or -1.
  int place(const std::string& name) const;
  WindowParams window() const;
  // Output pixels along an axis of the image, 0 or 1.
  virtual ov::Dimension pixels(int axis) const = 0;
  virtual void compute(ov::Tensor& output, const ov::TensorVector& inputs) const = 0;

  Attributes attributes_;
};

// input T (N, H, W, C); weight T (N, G, Kh, Kw, Ho, Wo) or, channels-last, (N, Ho, Wo, G Kh Kw) -> T (N, Ho, Wo, C)
class Involution2d : public Operation {
 public:
  OPENVINO_OP("involution2d", "pyinvolution");
  using Operation::Operation;
  Involution2d(const ov::OutputVector& inputs, const Attributes& attributes) : Operation(inputs, attributes) {
    constructor_validate_and_infer_types();
  }
  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<Involution2d>(inputs, attributes_);
  }

 private:
  ov::Dimension pixels(int axis) const override;
  void compute(ov::Tensor& output, const ov::TensorVector& inputs) const override;
};

// input T (N, H, W, C); reduced T (N, Ho, Wo, R); span_weight T (G Kh Kw, R, 1, 1); span_bias? T (G Kh Kw);
// scale? (C); shift? (C) -> T (N, Ho, Wo, C)
class SpanInvolution2d : public Operation {
 public:
  OPENVINO_OP("span_involution2d", "pyinvolution");
  using Operation::Operation;
  SpanInvolution2d(const ov::OutputVector& inputs, const Attributes& attributes) : Operation(inputs, attributes) {
    constructor_validate_and_infer_types();
  }
  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<SpanInvolution2d>(inputs, attributes_);
  }

 private:
  ov::Dimension pixels(int axis) const override;
  void compute(ov::Tensor& output, const ov::TensorVector& inputs) const override;
};

// input T (N, H, W, C); reduce_weight T (R, C, 1, 1); reduce_bias? T (R); span_weight T (G Kh Kw, R, 1, 1);
// span_bias? T (G Kh Kw); scale? (C); shift? (C) -> T (N, ceil(H / stride), ceil(W / stride), C)
class InvolutionLayer2d : public Operation {
 public:
  OPENVINO_OP("involution_layer2d", "pyinvolution");
  using Operation::Operation;
  InvolutionLayer2d(const ov::OutputVector& inputs, const Attributes& attributes) : Operation(inputs, attributes) {
    constructor_validate_and_infer_types();
  }
  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<InvolutionLayer2d>(inputs, attributes_);
  }

 private:
  ov::Dimension pixels(int axis) const override;
  void compute(ov::Tensor& output, const ov::TensorVector& inputs) const override;
};

}  // namespace pyinvolution::openvino
