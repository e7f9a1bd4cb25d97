#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

// What the ONNX file `model` gives for the images `pixels` (N, 3, H, W), by ONNX Runtime. `kernels` is the path of
// libpyinvolution_ort.so, which `python -m pyinvolution.onnxruntime` prints; empty: involutions are standard operations.
// Throws std::runtime_error if the example was built without ONNX Runtime, Ort::Exception as the session does.
std::vector<float> run_onnx(const std::string& model, const std::string& kernels, float* pixels,
                            const std::array<int64_t, 4>& shape);
