// app IN OUT: computes on the tensors that Python saved in IN, and writes the results to OUT under Python's names.
#include <pyinvolution/torch.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace {

using torch::Tensor;
using Inputs = c10::Dict<c10::IValue, c10::IValue>;
using Results = std::map<std::string, Tensor>;

void require(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(std::string("not so: ") + what);
}

// The result, both gradients, and those of the gradients' squares: autograd twice.
void differentiate(const std::string& name, const Tensor& output, const std::vector<Tensor>& leaves, Results& results) {
  results.emplace(name, output.detach());
  const auto first = torch::autograd::grad({output.square().sum()}, leaves, {}, std::nullopt, /*create_graph=*/true);
  // Without a graph of the gradients the operators compute them, with one autograd does.
  const auto alone = torch::autograd::grad({output.square().sum()}, leaves, {}, /*retain_graph=*/true);
  for (size_t i = 0; i < alone.size(); ++i)
    require(torch::allclose(alone[i], first[i]), "both ways to a gradient agree");
  Tensor sum = torch::zeros({}, output.options());
  for (size_t i = 0; i < first.size(); ++i) {
    results.emplace(name + "/grad" + std::to_string(i), first[i].detach());
    sum = sum + first[i].square().sum();
  }
  const auto second = torch::autograd::grad({sum}, leaves);
  for (size_t i = 0; i < second.size(); ++i) results.emplace(name + "/grad_grad" + std::to_string(i), second[i]);
}

void functions(const Inputs& in, Results& results) {
  const auto leaf = [&](const char* name) { return in.at(name).toTensor().detach().requires_grad_(true); };
  const Tensor x = leaf("x"), w = leaf("w"), bias = leaf("bias"), reduced = leaf("reduced"), span = leaf("span"),
               span_bias = leaf("span_bias");
  differentiate("involution", pyinvolution::involution2d(x, w, bias, {2, 1}, {1, 1}), {x, w, bias}, results);
  differentiate("span", pyinvolution::span_involution2d(x, reduced, span, span_bias, 3, {2, 1}, 1),
                {x, reduced, span, span_bias}, results);
  differentiate("span_without_bias", pyinvolution::span_involution2d(x, reduced, span, {}, 3, {2, 1}, 1),
                {x, reduced, span}, results);
  // Windows that the border shifts, and two by three outputs for each position.
  const Tensor shifted = leaf("shifted"), enlarged = leaf("enlarged"), query = leaf("query"), large = leaf("large");
  using pyinvolution::Border;
  differentiate("shifted", pyinvolution::involution2d(x, shifted, bias, 1, 0, {2, 1}, Border::shift),
                {x, shifted, bias}, results);
  differentiate("enlarged", pyinvolution::involution2d(x, enlarged, {}, 1, 1, 1, Border::zeros, {2, 3}), {x, enlarged},
                results);
  differentiate("scores", pyinvolution::local_correlation2d(query, x, 3, 1, 0, {2, 1}, 2, Border::shift), {query, x},
                results);
  differentiate("large_scores",
                pyinvolution::local_correlation2d(large, x, {3, 2}, 1, {1, 0}, 1, 4, Border::zeros, {2, 3}), {large, x},
                results);
  results.emplace("unbatched_scores",
                  pyinvolution::local_correlation2d(query[0], x[0], 3, 1, 0, 1, 2, Border::shift).detach());
  results.emplace("unbatched", pyinvolution::involution2d(x[0], w[0], {}, {2, 1}, 1).detach());
  {
    const Tensor grad_input =
        torch::autograd::grad({pyinvolution::involution2d(x, w.detach(), {}, {2, 1}, 1).sum()}, {x})[0];
    results.emplace("only_input", grad_input);
  }
  at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const Tensor half = pyinvolution::involution2d(x.to(torch::kFloat), w.to(torch::kFloat), {}, {2, 1}, 1);
  at::autocast::set_autocast_enabled(at::kCPU, false);
  require(half.scalar_type() == torch::kBFloat16, "autocast reaches the operator");

  for (const auto& refuse : std::vector<std::function<void()>>{
           [&] { pyinvolution::involution2d(x, w); }, [&] { pyinvolution::involution2d(x, w, bias[0], {2, 1}, 1); },
           [&] { pyinvolution::nn::Involution2d(7); },
           [&] { pyinvolution::involution2d(x, shifted, {}, 1, 1, 1, Border::shift); },
           [&] { pyinvolution::local_correlation2d(query, x, 3, 1, 0, 3, 2, Border::shift); },
           [&] { pyinvolution::involution2d(x, enlarged, {}, 2, 1, 1, Border::zeros, 2); },
           [&] {
             pyinvolution::nn::Involution2d layer(16);
             layer(x);
           }}) {
    bool refused = false;
    try {
      refuse();
    } catch (const std::exception&) {
      refused = true;
    }
    require(refused, "wrong arguments are refused");
  }
}

// What docs/cpp.md shows, as it stands there.
void documented_functions(Tensor x, const Tensor& kernels, Results& results) {
#include "documented0.cpp"
  results.emplace("documented", y);
  for (const Tensor& parameter : layer->parameters())
    require(parameter.grad().defined(), "the layer was differentiated");
}

void documented_pointers(const Tensor& image, const Tensor& kernels, Results& results) {
  const int64_t n = image.size(0), c = image.size(1), h = image.size(2), w = image.size(3), groups = kernels.size(1);
  const Tensor pixels = image.permute({0, 2, 3, 1}).contiguous(), output = torch::zeros_like(pixels),
               weights = kernels.permute({0, 4, 5, 1, 2, 3}).contiguous();
  void *const x = pixels.data_ptr(), *const weight = weights.data_ptr(), *const y = output.data_ptr();
#include "documented1.cpp"
  results.emplace("documented/raw", output);
}

// In the order of LAYERS in test_consumer.py.
std::vector<pyinvolution::nn::Involution2d> layers() {
  using pyinvolution::nn::Involution2d, pyinvolution::nn::Involution2dOptions;
  return {
      Involution2d(32),
      Involution2d(Involution2dOptions(32, 3).stride(2).bias(true).reduction(2)),
      Involution2d(
          Involution2dOptions(32, {4, 2}).stride({1, 3}).dilation(2).group_channels(8).out_channels(8).bias(true)),
      Involution2d(
          Involution2dOptions(16, 5).norm_layer({}).activation([] { return torch::nn::AnyModule(torch::nn::GELU()); })),
      Involution2d(Involution2dOptions(32, 7).fused(false)),
      Involution2d(Involution2dOptions(32, 7).fused(true)),
  };
}

void modules(const std::string& folder, const Inputs& in, Results& results) {
  int64_t number = 0;
  for (auto& layer : layers()) {
    const std::string name = "layer" + std::to_string(number++);
    pyinvolution::load_state_dict(*layer, folder + "/" + name + ".pt");
    pyinvolution::save_state_dict(*layer, folder + "/" + name + ".saved.pt");
    pyinvolution::load_state_dict(*layer, folder + "/" + name + ".saved.pt");
    const Tensor image = in.at(name).toTensor().detach().requires_grad_(true);
    const Tensor output = layer(image);
    output.square().mean().backward();
    results.emplace(name + "/train", output.detach());
    results.emplace(name + "/grad", image.grad());
    for (const auto& item : layer->named_parameters())
      results.emplace(name + "/grad/" + item.key(), item.value().grad());
    for (const auto& item : layer->named_buffers()) results.emplace(name + "/after/" + item.key(), item.value());
    layer->eval();
    const torch::NoGradGuard no_grad;
    results.emplace(name + "/eval", layer(image[0]));
    results.emplace(name + "/clone",
                    std::dynamic_pointer_cast<pyinvolution::nn::Involution2dImpl>(layer->clone())->forward(image));
  }
}

}  // namespace

int main(int, char** argument) {
  try {
    const std::string in = argument[1];
    std::ifstream file(in, std::ios::binary);
    const auto inputs =
        torch::pickle_load({std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()}).toGenericDict();
    Results results;
    functions(inputs, results);
    const Tensor image = inputs.at("image").toTensor(), kernels = inputs.at("kernels").toTensor();
    documented_functions(image, kernels, results);
    documented_pointers(image, kernels, results);
    modules(in.substr(0, in.rfind('/')), inputs, results);
    std::vector<c10::IValue> pairs;
    for (const auto& [name, value] : results) pairs.emplace_back(c10::ivalue::Tuple::create({name, value}));
    const std::vector<char> bytes = torch::pickle_save(c10::ivalue::Tuple::create(std::move(pairs)));
    std::ofstream(argument[2], std::ios::binary).write(bytes.data(), std::streamsize(bytes.size()));
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "app: %s\n", error.what());
    return 1;
  }
}
