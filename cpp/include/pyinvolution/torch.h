// Involution for libtorch: functions with autograd and autocast, and the layer, compiled against the libtorch of
// whoever includes this (2.10 or newer, no matter which one the library was built with). CMake:
// find_package(pyinvolution), target pyinvolution::pyinvolution. The library registers the operators
// torch.ops.pyinvolution.* when it is loaded; models exported from Python need it too, and nothing else of this header.
//
//   auto y = pyinvolution::involution2d(x, kernels, {}, /*stride=*/1, /*padding=*/3);
//   pyinvolution::nn::Involution2d layer(pyinvolution::nn::Involution2dOptions(64).stride(2));
#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/torch.h>

#include <array>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "pyinvolution/involution.h"

namespace pyinvolution {

// An int or {vertical, horizontal}.
using IntPair = torch::ExpandingArray<2>;

namespace detail {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using Ints = at::IntArrayRef;
using Bias = std::optional<Tensor>;

// stride, padding, dilation and upsampling, two of each, and the border; for a span involution its kernel size, stride,
// padding and dilation.
using Window = std::vector<int64_t>;

inline Window window_of(std::initializer_list<IntPair> pairs) {
  Window window;
  for (const IntPair& pair : pairs) window.insert(window.end(), pair->begin(), pair->end());
  return window;
}

inline Window window_of(std::initializer_list<IntPair> pairs, Border border) {
  Window window = window_of(pairs);
  window.push_back(int64_t(border));
  return window;
}

inline Ints pair_of(const Window& window, size_t index) { return Ints(window).slice(2 * index, 2); }

template <class Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// The operators, below autograd (the Functions here are theirs) and autocast (done by then).
struct BelowAutograd {
  at::AutoDispatchBelowADInplaceOrView autograd;
  c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};
};

inline Tensor involution2d(const Tensor& input, const Tensor& weight, const Window& window) {
  static const auto op = find_operator<Tensor(const Tensor&, const Tensor&, Ints, Ints, Ints, int64_t, Ints)>(
      "pyinvolution::involution2d");
  const BelowAutograd guard;
  return op.call(input, weight, pair_of(window, 0), pair_of(window, 1), pair_of(window, 2), window[8],
                 pair_of(window, 3));
}

inline std::tuple<Tensor, Tensor> involution2d_backward(const Tensor& grad_output, const Tensor& input,
                                                        const Tensor& weight, const Window& window,
                                                        std::array<bool, 2> needed) {
  static const auto op = find_operator<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, Ints,
                                                                  Ints, Ints, std::array<bool, 2>, int64_t, Ints)>(
      "pyinvolution::involution2d_backward");
  const BelowAutograd guard;
  return op.call(grad_output, input, weight, pair_of(window, 0), pair_of(window, 1), pair_of(window, 2), needed,
                 window[8], pair_of(window, 3));
}

inline Tensor local_correlation2d(const Tensor& query, const Tensor& key, Ints kernel_size, int64_t groups,
                                  const Window& window) {
  static const auto op =
      find_operator<Tensor(const Tensor&, const Tensor&, Ints, Ints, Ints, Ints, int64_t, int64_t, Ints)>(
          "pyinvolution::local_correlation2d");
  const BelowAutograd guard;
  return op.call(query, key, kernel_size, pair_of(window, 0), pair_of(window, 1), pair_of(window, 2), groups, window[8],
                 pair_of(window, 3));
}

inline Tensor span_involution2d(const Tensor& input, const Tensor& reduced, const Tensor& span_weight,
                                const Bias& span_bias, const Window& window) {
  static const auto op =
      find_operator<Tensor(const Tensor&, const Tensor&, const Tensor&, const Bias&, const Bias&, const Bias&, bool,
                           Ints, Ints, Ints, Ints)>("pyinvolution::span_involution2d");
  const BelowAutograd guard;
  return op.call(input, reduced, span_weight, span_bias, std::nullopt, std::nullopt, false, pair_of(window, 0),
                 pair_of(window, 1), pair_of(window, 2), pair_of(window, 3));
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> span_involution2d_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& reduced, const Tensor& span_weight,
    const Bias& span_bias, const Window& window, std::array<bool, 4> needed) {
  static const auto op = find_operator<std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Bias&, Ints, Ints, Ints, Ints,
      std::array<bool, 4>)>("pyinvolution::span_involution2d_backward");
  const BelowAutograd guard;
  return op.call(grad_output, input, reduced, span_weight, span_bias, pair_of(window, 0), pair_of(window, 1),
                 pair_of(window, 2), pair_of(window, 3), needed);
}

template <class... Tensors>
bool any_requires_grad(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (tensors.requires_grad() || ...);
}

Tensor involve(const Tensor& input, const Tensor& weight, const Window& window);

// Both gradients as functions of grad_output, X and W, which they are linear in: the second derivative.
struct InvolutionBackward : Function<InvolutionBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& input,
                               const Tensor& weight, const Window& window, bool input_needed, bool weight_needed) {
    ctx->save_for_backward({grad_output, input, weight});
    ctx->saved_data["window"] = window;
    ctx->saved_data["computed"] = std::vector<int64_t>{input_needed, weight_needed};
    auto [grad_input, grad_weight] =
        involution2d_backward(grad_output, input, weight, window, {input_needed, weight_needed});
    return {grad_input, grad_weight};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    // inv(x, w) is bilinear: <u, grad_input> = <gy, inv(u, w)> and <v, grad_weight> = <gy, inv(x, v)>, so that the
    // gradients of each are an involution and a backward pass of it again.
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &grad_output = saved[0], &input = saved[1], &weight = saved[2];
    const Window window = ctx->saved_data["window"].toIntVector();
    const Window computed = ctx->saved_data["computed"].toIntVector();
    variable_list results(6);
    const auto add = [&](size_t place, const Tensor& grad) {
      results[place] = results[place].defined() ? results[place] + grad : grad;
    };
    const auto differentiate = [&](const Tensor& x, const Tensor& w, size_t other) {
      if (ctx->needs_input_grad(0)) add(0, involve(x, w, window));
      if (!ctx->needs_input_grad(other)) return;
      add(other, InvolutionBackward::apply(grad_output, x, w, window, other == 1, other == 2)[other - 1]);
    };
    if (computed[0]) differentiate(grads[0], weight, 2);
    if (computed[1]) differentiate(input, grads[1], 1);
    return results;
  }
};

struct Involution : Function<Involution> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight, const Window& window) {
    ctx->save_for_backward({input, weight});
    ctx->saved_data["window"] = window;
    return involution2d(input, weight, window);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Window window = ctx->saved_data["window"].toIntVector();
    const bool input_needed = ctx->needs_input_grad(0), weight_needed = ctx->needs_input_grad(1);
    Tensor grad_input, grad_weight;
    if (at::GradMode::is_enabled()) {
      const variable_list both =
          InvolutionBackward::apply(grads[0], saved[0], saved[1], window, input_needed, weight_needed);
      grad_input = both[0], grad_weight = both[1];
    } else {
      std::tie(grad_input, grad_weight) =
          involution2d_backward(grads[0], saved[0], saved[1], window, {input_needed, weight_needed});
    }
    return {input_needed ? grad_input : Tensor(), weight_needed ? grad_weight : Tensor(), Tensor()};
  }
};

// The operator alone where no gradient is wanted.
inline Tensor involve(const Tensor& input, const Tensor& weight, const Window& window) {
  return any_requires_grad(input, weight) ? Involution::apply(input, weight, window)
                                          : involution2d(input, weight, window);
}

// The sums of products of each pixel with its window, whose gradients are an involution and a backward pass of it.
struct LocalCorrelation : Function<LocalCorrelation> {
  static Tensor forward(AutogradContext* ctx, const Tensor& query, const Tensor& key, const Window& kernel_size,
                        int64_t groups, const Window& window) {
    ctx->save_for_backward({query, key});
    ctx->saved_data["window"] = window;
    return local_correlation2d(query, key, kernel_size, groups, window);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Window window = ctx->saved_data["window"].toIntVector();
    variable_list results(5);
    if (ctx->needs_input_grad(0)) results[0] = involve(saved[1], grads[0], window);
    if (ctx->needs_input_grad(1)) {
      if (at::GradMode::is_enabled())
        results[1] = InvolutionBackward::apply(saved[0], saved[1], grads[0], window, true, false)[0];
      else
        results[1] = std::get<0>(involution2d_backward(saved[0], saved[1], grads[0], window, {true, false}));
    }
    return results;
  }
};

// The window of the involution that a span involution is made of.
inline Window plain_window(const Window& span_window) {
  Window window(span_window.begin() + 2, span_window.end());
  window.insert(window.end(), {1, 1, int64_t(Border::zeros)});
  return window;
}

// The weights of a span involution, (N, G, Kh, Kw, Ho, Wo): its span as the 1x1 convolution that it is.
inline Tensor span(const Tensor& reduced, const Tensor& span_weight, const Bias& span_bias, Ints kernel_size) {
  const Tensor weight = torch::conv2d(reduced, span_weight.reshape({span_weight.size(0), span_weight.size(1), 1, 1}),
                                      span_bias.value_or(Tensor()));
  return weight.unflatten(1, {-1, kernel_size[0], kernel_size[1]});
}

// Y from X, R and the span's parameters, with all gradients; W is not saved.
struct SpanInvolution : Function<SpanInvolution> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& reduced, const Tensor& span_weight,
                        const Bias& span_bias, const Window& window) {
    ctx->save_for_backward({input, reduced, span_weight, span_bias.value_or(Tensor())});
    ctx->saved_data["window"] = window;
    return span_involution2d(input, reduced, span_weight, span_bias, window);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &reduced = saved[1], &span_weight = saved[2];
    const Bias span_bias = saved[3].defined() ? Bias(saved[3]) : std::nullopt;
    const Window window = ctx->saved_data["window"].toIntVector();
    std::array<bool, 4> needed{};
    for (size_t i = 0; i < 4; ++i) needed[i] = saved[i].defined() && ctx->needs_input_grad(i);
    variable_list results(5);
    if (at::GradMode::is_enabled()) {
      // In operators that autograd can differentiate again.
      const Tensor weight = span(reduced, span_weight, span_bias, pair_of(window, 0));
      const bool span_needed = needed[1] || needed[2] || needed[3];
      const variable_list both =
          InvolutionBackward::apply(grads[0], input, weight, plain_window(window), needed[0], span_needed);
      if (needed[0]) results[0] = both[0];
      if (!span_needed) return results;
      const Tensor grad = both[1].flatten(1, 3).flatten(2);
      if (needed[1]) results[1] = torch::einsum("kr,nkp->nrp", {span_weight.flatten(1), grad}).reshape_as(reduced);
      if (needed[2]) results[2] = torch::einsum("nkp,nrp->kr", {grad, reduced.flatten(2)}).reshape_as(span_weight);
      if (needed[3]) results[3] = grad.sum(Ints({0, 2}));  // {0, 2} alone could be a null pointer and a length
      return results;
    }
    const auto [grad_input, grad_reduced, grad_weight, grad_bias] =
        span_involution2d_backward(grads[0], input, reduced, span_weight, span_bias, window, needed);
    const std::array<Tensor, 4> all{grad_input, grad_reduced, grad_weight, grad_bias};
    for (size_t i = 0; i < 4; ++i)
      if (needed[i]) results[i] = all[i];
    return results;
  }
};

inline bool autocasts(const Tensor& input) {
  return (input.is_cpu() || input.is_cuda()) && at::autocast::is_autocast_enabled(input.device().type());
}

// As autocast does for a convolution: to its dtype on its device, all floating dtypes but float64.
inline Tensor autocast(const Tensor& tensor, const Tensor& input) {
  if (!tensor.defined() || !autocasts(input)) return tensor;
  const at::DeviceType device = input.device().type();
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
}

inline Bias autocast(const Bias& tensor, const Tensor& input) {
  return tensor && tensor->defined() ? Bias(autocast(*tensor, input)) : std::nullopt;
}

// Whether a kernel computes W inside the involution, forward and backward (`route` in dispatch.h).
inline bool fuses_span(const Tensor& input, const Tensor& reduced, const Tensor& span_weight, const Window& window) {
  static const auto op = find_operator<bool(const Tensor&, const Tensor&, const Tensor&, Ints, Ints, Ints, Ints, bool)>(
      "pyinvolution::fuses_span");
  const BelowAutograd guard;
  return op.call(input, reduced, span_weight, pair_of(window, 0), pair_of(window, 1), pair_of(window, 2),
                 pair_of(window, 3), /*differentiable=*/true);
}

// W, (N, G, Kh, Kw, Ho, Wo), by the 1x1 convolution that it is.
inline Tensor span(const Tensor& reduced, const Tensor& span_weight, const Bias& span_bias, const Window& window) {
  const Tensor filter = span_weight.reshape({span_weight.size(0), span_weight.size(1), 1, 1});
  return torch::conv2d(reduced, filter, span_bias.value_or(Tensor())).unflatten(1, {-1, window[0], window[1]});
}

}  // namespace detail

// Applies to each pixel the kernel that `weight` holds for it, and adds `bias`. `input` is (N, C, H, W) or (C, H, W),
// float32, float64, float16 or bfloat16; `weight` (N, G, Kh, Kw, Ho, Wo), or without N; `bias` (C). Returns
// (N, C, Ho, Wo) or (C, Ho, Wo) in input's memory format, differentiable twice and more. Under autocast, tensors take
// its dtype. Throws c10::Error or std::runtime_error that names the argument, its value and what was expected.
//
// `border`: what a window does that reaches beyond the input, read zeros or move inside by multiples of the dilation
// (Border::shift, neighbourhood attention's; the padding must be 0 then). `upsample`: kernels, and outputs, for each
// position of the input; above 1 only with a stride of 1.
inline torch::Tensor involution2d(torch::Tensor input, torch::Tensor weight,
                                  const std::optional<torch::Tensor>& bias = std::nullopt, IntPair stride = 1,
                                  IntPair padding = 0, IntPair dilation = 1, Border border = Border::zeros,
                                  IntPair upsample = 1) {
  const bool unbatched = input.dim() == 3 && weight.dim() == 5;
  if (unbatched) input = input.unsqueeze(0), weight = weight.unsqueeze(0);
  weight = detail::autocast(weight, input);
  const detail::Bias column = detail::autocast(bias, input);
  input = detail::autocast(input, input);
  torch::Tensor output =
      detail::involve(input, weight, detail::window_of({stride, padding, dilation, upsample}, border));
  if (column) {
    TORCH_CHECK(column->dim() == 1 && column->size(0) == input.size(1), "involution2d: bias has shape ",
                column->sizes(), ", expected (", input.size(1), "), one for each channel");
    TORCH_CHECK(column->scalar_type() == input.scalar_type(), "involution2d: bias has dtype ", column->scalar_type(),
                ", expected input's dtype ", input.scalar_type());
    output = output + column->view({-1, 1, 1});
  }
  return unbatched ? output.squeeze(0) : output;
}

// The scores of each pixel of `query` with the pixels in its window of `key`, summed over the channels of a group:
// `query` is (N, C, Ho, Wo) or (C, Ho, Wo), `key` (N, C, H, W) or (C, H, W). Returns (N, groups, Kh, Kw, Ho, Wo), or
// without N; its softmax over the taps is a weight for `involution2d`. The rest as there.
inline torch::Tensor local_correlation2d(torch::Tensor query, torch::Tensor key, IntPair kernel_size,
                                         IntPair stride = 1, IntPair padding = 0, IntPair dilation = 1,
                                         int64_t groups = 1, Border border = Border::zeros, IntPair upsample = 1) {
  const bool unbatched = query.dim() == 3 && key.dim() == 3;
  if (unbatched) query = query.unsqueeze(0), key = key.unsqueeze(0);
  query = detail::autocast(query, key), key = detail::autocast(key, key);
  const detail::Window window = detail::window_of({stride, padding, dilation, upsample}, border);
  const detail::Window kernel(kernel_size->begin(), kernel_size->end());
  const torch::Tensor output = detail::any_requires_grad(query, key)
                                   ? detail::LocalCorrelation::apply(query, key, kernel, groups, window)
                                   : detail::local_correlation2d(query, key, kernel, groups, window);
  return unbatched ? output.squeeze(0) : output;
}

// involution2d(input, span(reduced)) in one operator: `reduced` is (N, R, Ho, Wo), `span_weight` (G Kh Kw, R) or
// (G Kh Kw, R, 1, 1), `span_bias` (G Kh Kw). Where the device has a fused kernel, W is never in memory, neither forward
// nor backward; elsewhere it is, and is kept for the backward pass.
inline torch::Tensor span_involution2d(torch::Tensor input, torch::Tensor reduced, torch::Tensor span_weight,
                                       const std::optional<torch::Tensor>& span_bias = std::nullopt,
                                       IntPair kernel_size = 7, IntPair stride = 1, IntPair padding = 0,
                                       IntPair dilation = 1) {
  const bool unbatched = input.dim() == 3 && reduced.dim() == 3;
  if (unbatched) input = input.unsqueeze(0), reduced = reduced.unsqueeze(0);
  reduced = detail::autocast(reduced, input), span_weight = detail::autocast(span_weight, input);
  const detail::Bias bias = detail::autocast(span_bias, input);
  input = detail::autocast(input, input);
  const detail::Window window = detail::window_of({kernel_size, stride, padding, dilation});
  torch::Tensor output;
  if (!detail::any_requires_grad(input, reduced, span_weight) && !(bias && detail::any_requires_grad(*bias))) {
    output = detail::span_involution2d(input, reduced, span_weight, bias, window);
  } else if (detail::fuses_span(input, reduced, span_weight, window)) {
    output = detail::SpanInvolution::apply(input, reduced, span_weight, bias, window);
  } else {
    // W is kept for the backward pass.
    output =
        involution2d(input, detail::span(reduced, span_weight, bias, window), std::nullopt, stride, padding, dilation);
  }
  return unbatched ? output.squeeze(0) : output;
}

namespace detail {

// Calls visit(name, tensor) for every parameter and buffer.
template <class Visit>
void for_each_entry(const torch::nn::Module& module, const Visit& visit) {
  for (auto& item : module.named_parameters()) visit(item.key(), item.value());
  for (auto& item : module.named_buffers()) visit(item.key(), item.value());
}

}  // namespace detail

// Loads parameters and buffers that Python saved by torch.save(dict(module.state_dict()), path), or save_state_dict
// did. The names and shapes have to be those of the module; throws c10::Error that names the first that is not.
inline void load_state_dict(torch::nn::Module& module, const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "load_state_dict: there is no file ", path);
  std::map<std::string, torch::Tensor> state;
  try {
    const torch::IValue saved =
        torch::pickle_load({std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()});
    if (saved.isTuple()) {
      for (const torch::IValue& entry : saved.toTupleRef().elements())
        state.emplace(entry.toTupleRef().elements().at(0).toStringRef(),
                      entry.toTupleRef().elements().at(1).toTensor());
    } else {
      for (const auto& entry : saved.toGenericDict())
        state.emplace(entry.key().toStringRef(), entry.value().toTensor());
    }
  } catch (const std::exception&) {
    TORCH_CHECK(false, "load_state_dict: ", path, " is damaged, or not of torch.save(dict(module.state_dict()), path)");
  }
  const torch::NoGradGuard no_grad;
  detail::for_each_entry(module, [&](const std::string& name, torch::Tensor tensor) {
    const auto found = state.find(name);
    TORCH_CHECK(found != state.end(), "load_state_dict: ", path, " has no ", name);
    TORCH_CHECK(found->second.sizes() == tensor.sizes(), "load_state_dict: ", name, " has shape ",
                found->second.sizes(), " in ", path, ", expected ", tensor.sizes());
    tensor.copy_(found->second);
    state.erase(found);
  });
  TORCH_CHECK(state.empty(), "load_state_dict: ", path, " has ", state.begin()->first, ", which the module has not");
}

// Saves parameters and buffers for Python's module.load_state_dict(dict(torch.load(path))).
inline void save_state_dict(const torch::nn::Module& module, const std::string& path) {
  std::vector<torch::IValue> entries;
  detail::for_each_entry(module, [&](const std::string& name, const torch::Tensor& tensor) {
    entries.emplace_back(c10::ivalue::Tuple::create({name, tensor.detach()}));
  });
  // Dicts of C++ need more than torch.load allows by default.
  const std::vector<char> bytes = torch::pickle_save(c10::ivalue::Tuple::create(std::move(entries)));
  std::ofstream file(path, std::ios::binary);
  TORCH_CHECK(file.write(bytes.data(), std::streamsize(bytes.size())).flush(), "save_state_dict: cannot write ", path);
}

namespace nn {

// Of Involution2d; pyinvolution.Involution2d in Python explains them.
struct Involution2dOptions {
  Involution2dOptions(int64_t channels, IntPair kernel_size = 7) : channels_(channels), kernel_size_(kernel_size) {}
  TORCH_ARG(int64_t, channels);
  TORCH_ARG(IntPair, kernel_size);
  TORCH_ARG(IntPair, stride) = 1;
  TORCH_ARG(IntPair, dilation) = 1;
  TORCH_ARG(int64_t, group_channels) = 16;
  TORCH_ARG(int64_t, reduction) = 4;
  // nullopt: like channels; any other number makes a 1x1 convolution follow the involution.
  TORCH_ARG(std::optional<int64_t>, out_channels) = std::nullopt;
  TORCH_ARG(bool, bias) = false;
  // The reduced channels -> the layer after reduce.conv. Empty: none, and reduce.conv has a bias.
  TORCH_ARG(std::function<torch::nn::AnyModule(int64_t)>, norm_layer) = [](int64_t channels) {
    return torch::nn::AnyModule(torch::nn::BatchNorm2d(channels));
  };
  TORCH_ARG(std::function<torch::nn::AnyModule()>, activation) = [] { return torch::nn::AnyModule(torch::nn::ReLU()); };
  // false: the kernels always lie in memory; otherwise only where the library has no kernel that computes them inside
  // the involution.
  TORCH_ARG(std::optional<bool>, fused) = std::nullopt;
};

// Involution with kernels generated from the input: the Python module, with its parameter names (reduce.conv.weight,
// reduce.norm.*, span.*, project.*, bias), initialisation and numerics. (N, C, H, W) or (C, H, W) ->
// (N, out_channels, ceil(H / stride), ceil(W / stride)) or the same without N.
class Involution2dImpl : public torch::nn::Cloneable<Involution2dImpl> {
 public:
  explicit Involution2dImpl(int64_t channels, IntPair kernel_size = 7)
      : Involution2dImpl(Involution2dOptions(channels, kernel_size)) {}
  explicit Involution2dImpl(Involution2dOptions options_) : options(std::move(options_)) { reset(); }

  void reset() override {
    const int64_t channels = options.channels();
    const auto positive = [](const char* name, int64_t value) {
      TORCH_CHECK_VALUE(value >= 1, "Involution2d: ", name, " is ", value, ", expected at least 1");
    };
    positive("channels", channels), positive("group_channels", options.group_channels());
    positive("reduction", options.reduction()), positive("out_channels", options.out_channels().value_or(1));
    for (size_t i : {0, 1}) {
      positive("kernel_size", (*options.kernel_size())[i]), positive("stride", (*options.stride())[i]);
      positive("dilation", (*options.dilation())[i]);
    }
    TORCH_CHECK_VALUE(channels % options.group_channels() == 0, "Involution2d: group_channels is ",
                      options.group_channels(), ", expected a divisor of channels = ", channels);
    TORCH_CHECK_VALUE(options.reduction() <= channels, "Involution2d: reduction is ", options.reduction(),
                      ", expected at most channels = ", channels);
    const auto conv1x1 = [](int64_t in, int64_t out, bool bias) {
      return torch::nn::Conv2d(torch::nn::Conv2dOptions(in, out, 1).bias(bias));
    };
    const int64_t reduced = channels / options.reduction(), out_channels = options.out_channels().value_or(channels);
    const auto [kh, kw] = *options.kernel_size();
    reduce = torch::nn::Sequential();
    reduce->push_back("conv", conv1x1(channels, reduced, !options.norm_layer()));
    if (options.norm_layer()) reduce->push_back("norm", options.norm_layer()(reduced));
    reduce->push_back("act", options.activation()());
    register_module("reduce", reduce);
    span = register_module("span", conv1x1(reduced, channels / options.group_channels() * kh * kw, true));
    if (out_channels != channels) {
      project = register_module("project", conv1x1(channels, out_channels, options.bias()));
    } else if (options.bias()) {
      bias = register_parameter("bias", torch::empty(channels));
    }
    reset_parameters();
  }

  // As the authors do: Kaiming normal over the fan out for the convolutions, and zero for every bias.
  void reset_parameters() {
    const torch::NoGradGuard no_grad;
    for (const auto& module : modules(/*include_self=*/false)) {
      if (const auto* conv = module->as<torch::nn::Conv2d>()) {
        torch::nn::init::kaiming_normal_(conv->weight, 0, torch::kFanOut, torch::kReLU);
        if (conv->bias.defined()) torch::nn::init::zeros_(conv->bias);
      }
    }
    if (bias.defined()) torch::nn::init::zeros_(bias);
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "pyinvolution::nn::Involution2d(" << options.channels() << ", "
           << options.out_channels().value_or(options.channels()) << ", kernel_size=" << options.kernel_size()
           << ", stride=" << options.stride() << ")";
  }

  torch::Tensor forward(const torch::Tensor& input) {
    TORCH_CHECK_VALUE((input.dim() == 3 || input.dim() == 4) && input.size(-3) == options.channels(),
                      "Involution2d: input has shape ", input.sizes(), ", expected (N, ", options.channels(),
                      ", H, W) or (", options.channels(), ", H, W)");
    torch::Tensor x = input.dim() == 4 ? input : input.unsqueeze(0);
    const auto [kh, kw] = *options.kernel_size();
    const auto [sh, sw] = *options.stride();
    const auto [dh, dw] = *options.dilation();
    const bool cells = sh != 1 || sw != 1;
    const torch::Tensor reduced =
        reduce->forward(cells ? torch::avg_pool2d(x, {sh, sw}, {sh, sw}, /*padding=*/0, /*ceil_mode=*/true) : x);
    // An even window takes its extra row or column from the bottom or right.
    const int64_t halo_h = dh * (kh - 1), halo_w = dw * (kw - 1);
    if (halo_h % 2 != 0 || halo_w % 2 != 0) x = torch::constant_pad_nd(x, {0, halo_w % 2, 0, halo_h % 2});
    const IntPair padding({halo_h / 2, halo_w / 2});
    torch::Tensor output;
    if (options.fused().value_or(true)) {
      output = span_involution2d(x, reduced, span->weight, span->bias, options.kernel_size(), options.stride(), padding,
                                 options.dilation());
      if (bias.defined()) output = output + bias.view({-1, 1, 1});
    } else {
      const torch::Tensor kernels = span->forward(reduced).unflatten(1, {-1, kh, kw});
      output = involution2d(x, kernels, bias.defined() ? std::optional(bias) : std::nullopt, options.stride(), padding,
                            options.dilation());
    }
    if (project) output = project->forward(output);
    return input.dim() == 4 ? output : output.squeeze(0);
  }

  Involution2dOptions options;
  torch::nn::Sequential reduce{nullptr};
  torch::nn::Conv2d span{nullptr}, project{nullptr};
  torch::Tensor bias;
};
TORCH_MODULE(Involution2d);

}  // namespace nn
}  // namespace pyinvolution
