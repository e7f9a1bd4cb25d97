#include "onnx.h"

#ifndef WITH_ONNXRUNTIME

#include <stdexcept>

std::vector<float> run_onnx(const std::string& model, const std::string&, float*, const std::array<int64_t, 4>&) {
  throw std::runtime_error("this program was built without ONNX Runtime, expected a model of --format aoti, got " +
                           model);
}

#else

#include <onnxruntime_cxx_api.h>

std::vector<float> run_onnx(const std::string& model, const std::string& kernels, float* pixels,
                            const std::array<int64_t, 4>& shape) {
  const Ort::Env env;
  Ort::SessionOptions options;
  if (!kernels.empty()) options.RegisterCustomOpsLibrary(kernels.c_str());
  Ort::Session session(env, model.c_str(), options);

  size_t elements = 1;
  for (const int64_t size : shape) elements *= size_t(size);
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const Ort::Value image = Ort::Value::CreateTensor<float>(memory, pixels, elements, shape.data(), shape.size());
  const char* const inputs[] = {"input"};
  const char* const outputs[] = {"output"};
  const auto results = session.Run(Ort::RunOptions{nullptr}, inputs, &image, 1, outputs, 1);
  const float* logits = results[0].GetTensorData<float>();
  return {logits, logits + results[0].GetTensorTypeAndShapeInfo().GetElementCount()};
}

#endif
