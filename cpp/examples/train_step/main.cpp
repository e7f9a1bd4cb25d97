// Trains a small network with involution by SGD.
//   train_step            on made-up data
//   train_step IN OUT     from what Python saved in IN, torch.save({"images": ..., "labels": ..., "lr": ..., "steps":
//   ...,
//                         **state_dict}); writes the trained state to OUT, for torch.load
#include <pyinvolution/torch.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace {

struct NetImpl : torch::nn::Module {
  explicit NetImpl(int64_t classes) {
    stem = register_module("stem", torch::nn::Conv2d(torch::nn::Conv2dOptions(3, 32, 3).stride(2).padding(1)));
    first = register_module("first", pyinvolution::nn::Involution2d(32));
    norm = register_module("norm", torch::nn::BatchNorm2d(32));
    using pyinvolution::nn::Involution2dOptions;
    second = register_module(
        "second", pyinvolution::nn::Involution2d(Involution2dOptions(32, 5).stride(2).out_channels(64).bias(true)));
    head = register_module("head", torch::nn::Linear(64, classes));
  }

  torch::Tensor forward(const torch::Tensor& images) {
    const torch::Tensor x = torch::relu(norm(first(stem(images))));
    return head(torch::relu(second(x)).mean({2, 3}));
  }

  torch::nn::Conv2d stem{nullptr};
  pyinvolution::nn::Involution2d first{nullptr}, second{nullptr};
  torch::nn::BatchNorm2d norm{nullptr};
  torch::nn::Linear head{nullptr};
};
TORCH_MODULE(Net);

using State = c10::Dict<std::string, torch::Tensor>;

std::vector<char> read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "there is no file ", path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// Parameters and buffers by their names, as in Python's state_dict.
torch::OrderedDict<std::string, torch::Tensor> state_of(const Net& net) {
  auto state = net->named_parameters();
  state.update(net->named_buffers());
  return state;
}

void run(int arguments, char** argument) {
  torch::manual_seed(0);
  torch::Tensor images = torch::randn({8, 3, 32, 32}), labels = torch::randint(10, {8});
  double lr = 0.05;
  int64_t steps = 5;
  Net net(10);
  if (arguments == 3) {
    const auto saved = torch::pickle_load(read(argument[1])).toGenericDict();
    images = saved.at("images").toTensor(), labels = saved.at("labels").toTensor();
    lr = saved.at("lr").toDouble(), steps = saved.at("steps").toInt();
    const torch::NoGradGuard no_grad;
    for (auto& item : state_of(net)) item.value().copy_(saved.at(item.key()).toTensor());
  }

  torch::optim::SGD optimizer(net->parameters(), torch::optim::SGDOptions(lr).momentum(0.9));
  for (int64_t step = 0; step < steps; ++step) {
    optimizer.zero_grad();
    const torch::Tensor loss = torch::cross_entropy_loss(net(images), labels);
    loss.backward();
    optimizer.step();
    std::printf("step %ld loss %.6f\n", long(step), loss.item<double>());
  }

  if (arguments != 3) return;
  net->eval();
  State trained;
  for (const auto& item : state_of(net)) trained.insert(item.key(), item.value().detach());
  {
    const torch::NoGradGuard no_grad;
    trained.insert("logits", net(images));
  }
  const std::vector<char> bytes = torch::pickle_save(trained);
  std::ofstream(argument[2], std::ios::binary).write(bytes.data(), std::streamsize(bytes.size()));
}

}  // namespace

int main(int arguments, char** argument) {
  if (arguments != 1 && arguments != 3) {
    std::fprintf(stderr, "usage: train_step [IN OUT]\n");
    return 2;
  }
  try {
    run(arguments, argument);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "train_step: error: %s\n", error.what());
    return 1;
  }
}
