#pragma once

#include <vector>

#include "openvino/core/extension.hpp"

namespace pyinvolution::openvino {

// The operations, and the conversion of the functions of ONNX's domain pyinvolution (docs/onnx.md) into them.
// `bfloat16`: float32 involutions compute in bfloat16, as OpenVINO's convolutions do where its precision hint says so.
std::vector<ov::Extension::Ptr> extensions(bool bfloat16);

}  // namespace pyinvolution::openvino
