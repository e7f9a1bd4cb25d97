// Trains a small network with involution by SGD.
//   train_step                    on made-up data, from random parameters
//   train_step DATA STATE OUT     on the images and labels that Python saved in DATA by torch.save((images, labels),
//   DATA),
//                                 from STATE, torch.save(dict(net.state_dict()), STATE); writes the trained state to
//                                 OUT, for net.load_state_dict(dict(torch.load(OUT)))
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

std::vector<char> read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "there is no file ", path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void run(int arguments, char** argument) {
  torch::manual_seed(0);
  torch::Tensor images = torch::randn({8, 3, 32, 32}), labels = torch::randint(10, {8});
  Net net(10);
  if (arguments == 4) {
    const torch::IValue data = torch::pickle_load(read(argument[1]));
    images = data.toTupleRef().elements()[0].toTensor(), labels = data.toTupleRef().elements()[1].toTensor();
    pyinvolution::load_state_dict(*net, argument[2]);
  }

  torch::optim::SGD optimizer(net->parameters(), torch::optim::SGDOptions(0.05).momentum(0.9));
  for (int step = 0; step < 5; ++step) {
    optimizer.zero_grad();
    const torch::Tensor loss = torch::cross_entropy_loss(net(images), labels);
    loss.backward();
    optimizer.step();
    std::printf("step %d loss %.6f\n", step, loss.item<double>());
  }
  if (arguments == 4) pyinvolution::save_state_dict(*net, argument[3]);
}

}  // namespace

int main(int arguments, char** argument) {
  if (arguments != 1 && arguments != 4) {
    std::fprintf(stderr, "usage: train_step [DATA STATE OUT]\n");
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
