// Classifies an image with a model that `pyinvolution export MODEL --format aoti` compiled, or with an ONNX file; no
// Python in the process.
//   infer MODEL.pt2 IMAGE [--size 224] [--top 5] [--labels FILE] [--cuda]
//   infer MODEL.onnx IMAGE [--size 224] [--top 5] [--labels FILE] [--kernels libpyinvolution_ort.so]
// LABELS has the name of a class in each line. Prints class, probability and name, most probable first.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "image.h"
#include "onnx.h"

namespace {

struct Options {
  std::string model, image, labels, kernels;
  int64_t size = 224, top = 5;
  bool cuda = false;
};

bool is_onnx(const std::string& model) { return model.size() > 5 && model.compare(model.size() - 5, 5, ".onnx") == 0; }

Options parse(int arguments, char** argument) {
  Options options;
  std::vector<std::string> files;
  for (int i = 1; i < arguments; ++i) {
    const std::string name = argument[i];
    const auto value = [&] {
      if (++i == arguments) throw std::invalid_argument(name + " needs a value");
      return std::string(argument[i]);
    };
    if (name == "--size")
      options.size = std::stol(value());
    else if (name == "--top")
      options.top = std::stol(value());
    else if (name == "--labels")
      options.labels = value();
    else if (name == "--kernels")
      options.kernels = value();
    else if (name == "--cuda")
      options.cuda = true;
    else
      files.push_back(name);
  }
  if (files.size() != 2 || options.size < 1 || options.top < 1)
    throw std::invalid_argument(
        "usage: infer MODEL.pt2 IMAGE [--size N] [--top N] [--labels FILE] [--cuda]\n"
        "       infer MODEL.onnx IMAGE [--size N] [--top N] [--labels FILE] [--kernels libpyinvolution_ort.so]");
  options.model = files[0], options.image = files[1];
  if (options.cuda && is_onnx(options.model)) throw std::invalid_argument("--cuda is for a model of --format aoti");
  if (!options.kernels.empty() && !is_onnx(options.model))
    throw std::invalid_argument("--kernels is for an ONNX file, got " + options.model);
  return options;
}

// As in evaluation on ImageNet: the shorter edge to size / 0.875, the middle of size x size, normalised by mean and
// standard deviation of ImageNet's pixels.
torch::Tensor preprocess(const Image& image, int64_t size) {
  torch::Tensor x =
      torch::from_blob(const_cast<uint8_t*>(image.pixels.data()), {1, image.height, image.width, 3}, torch::kUInt8);
  x = x.permute({0, 3, 1, 2}).to(torch::kFloat);
  const int64_t edge = size * 8 / 7, shorter = std::min(image.height, image.width);
  const int64_t height = edge * image.height / shorter, width = edge * image.width / shorter;
  x = at::_upsample_bilinear2d_aa(x, {height, width}, /*align_corners=*/false).round().clamp(0, 255) / 255;
  const auto start = [&](int64_t whole) { return int64_t(std::nearbyint(double(whole - size) / 2)); };
  x = x.narrow(2, start(height), size).narrow(3, start(width), size);
  const torch::Tensor mean = torch::tensor({0.485, 0.456, 0.406}, torch::kFloat).view({3, 1, 1});
  const torch::Tensor deviation = torch::tensor({0.229, 0.224, 0.225}, torch::kFloat).view({3, 1, 1});
  return ((x - mean) / deviation).contiguous();
}

torch::Tensor logits_of(const Options& options, torch::Tensor input) {
  if (is_onnx(options.model)) {
    const std::vector<float> logits = run_onnx(options.model, options.kernels, input.data_ptr<float>(),
                                               {input.size(0), input.size(1), input.size(2), input.size(3)});
    return torch::tensor(logits).view({input.size(0), -1});
  }
  if (options.cuda) input = input.to(torch::kCUDA);
  torch::inductor::AOTIModelPackageLoader model(options.model);
  return model.run({input}).at(0);
}

void run(const Options& options) {
  const torch::InferenceMode inference;
  const torch::Tensor logits = logits_of(options, preprocess(read_image(options.image), options.size));

  const auto [probability, index] = logits.softmax(1)[0].cpu().topk(std::min(options.top, logits.size(1)));
  std::vector<std::string> names;
  std::ifstream labels(options.labels);
  for (std::string line; std::getline(labels, line);) names.push_back(line);
  for (int64_t i = 0; i < index.size(0); ++i) {
    const int64_t best = index[i].item<int64_t>();
    std::printf("%ld %.6f%s%s\n", long(best), probability[i].item<double>(), names.empty() ? "" : " ",
                size_t(best) < names.size() ? names[size_t(best)].c_str() : "");
  }
}

}  // namespace

int main(int arguments, char** argument) {
  try {
    run(parse(arguments, argument));
    return 0;
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "infer: error: %s\n", error.what());
    return 1;
  }
}
