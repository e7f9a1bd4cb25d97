// The involutions as custom operators of ONNX Runtime, in the domain "pyinvolution": docs/onnx.md is their contract.
// Every error becomes a status of ONNX Runtime; no exception leaves this file.
#include <algorithm>
#include <array>
#include <atomic>
#include <climits>
#include <exception>
#include <iterator>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "abi.h"
#include "pyinvolution/involution.h"

namespace pyinvolution::ort {
namespace {

// --- errors -----------------------------------------------------------------------------------------------------------

void check(const Api& api, Status* status) {
  if (status == nullptr) return;
  const std::string message = GetErrorMessage(api, status);
  ReleaseStatus(api, status);
  throw std::runtime_error(message);
}

// What `body` throws, as a status.
template <class Body>
Status* guarded(const Api& api, const Body& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const std::invalid_argument& error) {
    return CreateStatus(api, ErrorCode::invalid_argument, error.what());
  } catch (const std::exception& error) {
    return CreateStatus(api, ErrorCode::fail, error.what());
  } catch (...) {
    return CreateStatus(api, ErrorCode::fail, "unknown error");
  }
}

using Shape = std::vector<int64_t>;

std::string text(const Shape& shape) {
  std::ostringstream out;
  out << '(';
  for (size_t i = 0; i < shape.size(); ++i) out << (i == 0 ? "" : ", ") << shape[i];
  out << ')';
  return out.str();
}

// --- threads ----------------------------------------------------------------------------------------------------------

// How many threads a session computes with, which ONNX Runtime does not say: those that were seen in the first parallel
// regions, in which the work is cut for as many as the machine has.
class Threads {
 public:
  int count() const {
    return regions_.load(std::memory_order_relaxed) < regions_to_learn ? most_ : std::max(seen_.load(), 1);
  }

  // The calling thread computes.
  void arrive() {
    static thread_local char self;
    for (int i = 0; i < most_; ++i) {
      char* known = threads_[size_t(i)].load(std::memory_order_relaxed);
      if (known == nullptr && threads_[size_t(i)].compare_exchange_strong(known, &self)) {
        ++seen_;
        return;
      }
      if (known == &self) return;
    }
  }

  void finish_region() { regions_.fetch_add(1, std::memory_order_relaxed); }

 private:
  static constexpr int regions_to_learn = 8, capacity = 256;

  const int most_ = std::clamp(int(std::thread::hardware_concurrency()), 1, capacity);
  std::array<std::atomic<char*>, capacity> threads_{};
  std::atomic<int> seen_{0}, regions_{0};
};

// A call of a kernel, for `parallel_for`, which has no argument for it. Nothing that runs inside it starts another call.
struct Call {
  const Api& api;
  KernelContext* context;
  Threads& threads;
};
thread_local Call* current_call = nullptr;

void parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* state) {
  struct Region {
    int64_t begin, end, grain;
    ParallelBody body;
    void* state;
    Threads& threads;
    std::once_flag failed;
    std::exception_ptr error;
  };
  const Call& call = *current_call;
  if (end <= begin) return;
  Region region{begin, end, std::max<int64_t>(grain, 1), body, state, call.threads, {}, nullptr};
  const auto part = [](void* data, size_t i) {
    Region& region = *static_cast<Region*>(data);
    try {
      region.threads.arrive();
      const int64_t from = region.begin + int64_t(i) * region.grain;
      region.body(from, std::min(from + region.grain, region.end), region.state);
    } catch (...) {
      std::call_once(region.failed, [&] { region.error = std::current_exception(); });
    }
  };
  const int64_t parts = (end - begin - 1) / region.grain + 1;
  check(call.api, KernelContext_ParallelFor(call.api, call.context, part, size_t(parts), 0, &region));
  call.threads.finish_region();
  if (region.error) std::rethrow_exception(region.error);
}

// --- operators --------------------------------------------------------------------------------------------------------

struct Input {
  const char* name;
  Presence presence;
  bool of_sums = false;  // in the type that sums are kept in
};
constexpr auto required = Presence::required, optional = Presence::optional;
constexpr Input involution_inputs[] = {{"input", required}, {"weight", required}};
constexpr Input span_inputs[] = {{"input", required},     {"reduced", required},     {"span_weight", required},
                                 {"span_bias", optional}, {"scale", optional, true}, {"shift", optional, true}};
constexpr Input layer_inputs[] = {{"input", required},       {"reduce_weight", required}, {"reduce_bias", optional},
                                  {"span_weight", required}, {"span_bias", optional},     {"scale", optional, true},
                                  {"shift", optional, true}};

enum class Kind { involution, span, layer };

struct Operator {
  const char* name;
  Kind kind;
  const Input* inputs;
  size_t input_count;
};
constexpr Operator operators[] = {
    {"involution2d", Kind::involution, involution_inputs, std::size(involution_inputs)},
    {"span_involution2d", Kind::span, span_inputs, std::size(span_inputs)},
    {"involution_layer2d", Kind::layer, layer_inputs, std::size(layer_inputs)},
};

// A tensor that a call is given; `data` is nullptr where it is absent or empty.
struct Tensor {
  const char* name;
  bool given = false;
  Shape shape;
  void* data = nullptr;
};

[[noreturn]] void fail(const Tensor& tensor, const std::string& expected) {
  throw std::invalid_argument(std::string(tensor.name) + " has shape " + text(tensor.shape) + ", expected " + expected);
}

void expect(const Tensor& tensor, const Shape& shape) {
  if (tensor.given && tensor.shape != shape) fail(tensor, text(shape));
}

// The weight of a 1x1 convolution, with or without its last two dimensions.
void expect_pointwise(const Tensor& weight, int64_t columns, const char* shape) {
  const Shape& s = weight.shape;
  const bool flat = s.size() == 2 || (s.size() == 4 && s[2] == 1 && s[3] == 1);
  if (!flat || s[1] != columns) fail(weight, shape + std::to_string(columns));
}

class Kernel {
 public:
  Kernel(const Api& api, const KernelInfo* info, const Operator& op, DType dtype) : api_(api), op_(op), dtype_(dtype) {
    window_ = {pair(info, "kernel_size"), pair(info, "stride"), pair(info, "padding"), pair(info, "dilation")};
    if (op.kind == Kind::involution) return;
    int64_t relu = 0;
    check(api_, KernelInfoGetAttribute_int64(api_, info, "relu", &relu));
    relu_ = relu != 0;
  }

  Status* guarded_compute(KernelContext* context) noexcept {
    return guarded(api_, [&] {
      try {
        compute(context);
      } catch (const std::invalid_argument& error) {
        throw std::invalid_argument(std::string(op_.name) + ": " + error.what());
      }
    });
  }

 private:
  void compute(KernelContext* context) {
    Call call{api_, context, threads_};
    current_call = &call;
    const Execution execution{parallel_for, threads_.count(), nullptr};
    const std::vector<Tensor> tensors = inputs(context);
    const Tensor& input = tensors[0];
    if (input.shape.size() != 4) fail(input, "4 dimensions (N, C, H, W)");
    const std::array<int64_t, 4> sizes{input.shape[0], input.shape[1], input.shape[2], input.shape[3]};
    switch (op_.kind) {
      case Kind::involution: return involution(context, tensors, sizes, execution);
      case Kind::span: return span(context, tensors, sizes, execution);
      case Kind::layer: return layer(context, tensors, sizes, execution);
    }
  }

  std::array<int64_t, 2> pair(const KernelInfo* info, const char* name) const {
    size_t count = 0;
    check(api_, KernelInfoGetAttributeArray_int64(api_, info, name, nullptr, &count));
    if (count != 2)
      throw std::invalid_argument(std::string(name) + " has " + std::to_string(count) + " values, expected 2");
    std::array<int64_t, 2> values{};
    check(api_, KernelInfoGetAttributeArray_int64(api_, info, name, values.data(), &count));
    return values;
  }

  std::vector<Tensor> inputs(KernelContext* context) const {
    std::vector<Tensor> tensors(op_.input_count);
    size_t count = 0;
    check(api_, KernelContext_GetInputCount(api_, context, &count));
    for (size_t i = 0; i < op_.input_count; ++i) {
      Tensor& tensor = tensors[i];
      tensor.name = op_.inputs[i].name;
      const Value* value = nullptr;
      if (i < count) check(api_, KernelContext_GetInput(api_, context, i, &value));
      if (value == nullptr) continue;
      tensor.given = true;
      TensorTypeAndShapeInfo* made = nullptr;
      check(api_, GetTensorTypeAndShape(api_, value, &made));
      const auto release = [this](TensorTypeAndShapeInfo* info) { ReleaseTensorTypeAndShapeInfo(api_, info); };
      const std::unique_ptr<TensorTypeAndShapeInfo, decltype(release)> info(made, release);
      size_t dimensions = 0;
      check(api_, GetDimensionsCount(api_, info.get(), &dimensions));
      tensor.shape.resize(dimensions);
      check(api_, GetDimensions(api_, info.get(), tensor.shape.data(), dimensions));
      check(api_, GetTensorMutableData(api_, const_cast<Value*>(value), &tensor.data));
    }
    return tensors;
  }

  void* output(KernelContext* context, const Problem& p) const {
    const int64_t shape[] = {p.batch, p.channels, p.out_h, p.out_w};
    Value* value = nullptr;
    check(api_, KernelContext_GetOutput(api_, context, 0, shape, std::size(shape), &value));
    void* data = nullptr;
    check(api_, GetTensorMutableData(api_, value, &data));
    return data;
  }

  void involution(KernelContext* context, const std::vector<Tensor>& tensors, const std::array<int64_t, 4>& sizes,
                  const Execution& execution) const {
    const Tensor& weight = tensors[1];
    if (weight.shape.size() != 6) fail(weight, "6 dimensions (N, G, Kh, Kw, Ho, Wo)");
    const Problem p = make_problem(dtype_, Device::cpu, sizes, weight.shape[1], window_);
    expect(weight, {p.batch, p.groups, p.kernel_h, p.kernel_w, p.out_h, p.out_w});
    run(p, Pass::forward, {tensors[0].data, weight.data, output(context, p)}, execution);
  }

  // The number of groups, of the rows of span_weight.
  int64_t groups(const Tensor& span_weight, int64_t reduced) const {
    expect_pointwise(span_weight, reduced, "(G * Kh * Kw, R, 1, 1) with R = ");
    const int64_t rows = span_weight.shape[0], taps = window_.kernel[0] * window_.kernel[1];
    if (taps < 1 || rows % taps != 0)
      throw std::invalid_argument("span_weight has " + std::to_string(rows) + " rows, expected a multiple of the " +
                                  std::to_string(taps) + " taps of kernel_size");
    return rows / taps;
  }

  // From `first` on: span_weight, span_bias, scale and shift.
  void finish(KernelContext* context, const SpanProblem& problem, SpanOp op, SpanBuffers buffers,
              const std::vector<Tensor>& tensors, size_t first, const Execution& execution) const {
    const Tensor &span_bias = tensors[first + 1], &scale = tensors[first + 2], &shift = tensors[first + 3];
    const Problem& p = problem.involution;
    expect(span_bias, {problem.span_rows()});
    expect(scale, {p.channels});
    expect(shift, {p.channels});
    if (scale.given != shift.given)
      throw std::invalid_argument(std::string(scale.given ? "shift" : "scale") + " is absent, expected it with " +
                                  (scale.given ? "scale" : "shift"));
    buffers.x = tensors[0].data, buffers.span = tensors[first].data, buffers.bias = span_bias.data;
    buffers.scale = scale.data, buffers.shift = shift.data, buffers.y = output(context, p);
    if (p.batch * p.channels * p.out_h * p.out_w == 0) return;
    if (route(problem, op) == (op == SpanOp::layer ? Route::layer : Route::span)) {
      run(problem, op, buffers, execution);
    } else {
      run_by_pixel(problem, op, buffers, execution);
    }
  }

  void span(KernelContext* context, const std::vector<Tensor>& tensors, const std::array<int64_t, 4>& sizes,
            const Execution& execution) const {
    const Tensor& reduced = tensors[1];
    if (reduced.shape.size() != 4) fail(reduced, "4 dimensions (N, R, Ho, Wo)");
    const int64_t r = reduced.shape[1];
    const SpanProblem problem = make_span_problem(dtype_, Device::cpu, sizes, groups(tensors[2], r), r, window_,
                                                  Layout::nchw, tensors[4].given, relu_);
    const Problem& p = problem.involution;
    expect(reduced, {p.batch, r, p.out_h, p.out_w});
    SpanBuffers buffers{};
    buffers.reduced = reduced.data;
    finish(context, problem, SpanOp::forward, buffers, tensors, 2, execution);
  }

  void layer(KernelContext* context, const std::vector<Tensor>& tensors, const std::array<int64_t, 4>& sizes,
             const Execution& execution) const {
    const Tensor &reduce_weight = tensors[1], &reduce_bias = tensors[2];
    expect_pointwise(reduce_weight, sizes[1], "(R, C, 1, 1) with C = ");
    const int64_t r = reduce_weight.shape[0];
    expect(reduce_bias, {r});
    const SpanProblem problem = make_layer_problem(dtype_, Device::cpu, sizes, groups(tensors[3], r), r, window_,
                                                   Layout::nchw, tensors[5].given, relu_);
    SpanBuffers buffers{};
    buffers.reduce = reduce_weight.data, buffers.reduce_bias = reduce_bias.data;
    finish(context, problem, SpanOp::layer, buffers, tensors, 3, execution);
  }

  const Api& api_;
  const Operator& op_;
  const DType dtype_;
  WindowParams window_;
  bool relu_ = false;
  Threads threads_;
};

// --- registration -----------------------------------------------------------------------------------------------------

// An operator for one dtype, under one of its names: ONNX Runtime joins those of a name.
struct TypedOperator : CustomOp {
  const Operator* op;
  std::string name;
  DType dtype;
};

const TypedOperator& typed(const CustomOp* op) { return *static_cast<const TypedOperator*>(op); }

ElementType element_type(DType dtype, bool of_sums) {
  switch (dtype) {
    case DType::f64: return ElementType::f64;
    case DType::f32: return ElementType::f32;
    case DType::f16: return of_sums ? ElementType::f32 : ElementType::f16;
    case DType::bf16: return of_sums ? ElementType::f32 : ElementType::bf16;
  }
  return ElementType::undefined;
}

TypedOperator make_operator(const Operator& op, const std::string& name, DType dtype) {
  TypedOperator result{};
  result.op = &op;
  result.name = name;
  result.dtype = dtype;
  result.version = api_version;
  result.GetName = [](const CustomOp* self) { return typed(self).name.c_str(); };
  result.GetExecutionProviderType = [](const CustomOp*) -> const char* { return "CPUExecutionProvider"; };
  result.GetInputTypeCount = [](const CustomOp* self) { return typed(self).op->input_count; };
  result.GetInputType = [](const CustomOp* self, size_t i) {
    return element_type(typed(self).dtype, typed(self).op->inputs[i].of_sums);
  };
  result.GetInputCharacteristic = [](const CustomOp* self, size_t i) { return typed(self).op->inputs[i].presence; };
  result.GetInputMemoryType = [](const CustomOp*, size_t) { return MemoryType::standard; };
  result.GetOutputTypeCount = [](const CustomOp*) { return size_t{1}; };
  result.GetOutputType = [](const CustomOp* self, size_t) { return element_type(typed(self).dtype, false); };
  result.GetOutputCharacteristic = [](const CustomOp*, size_t) { return Presence::required; };
  result.GetStartVersion = [](const CustomOp*) { return 1; };
  result.GetEndVersion = [](const CustomOp*) { return INT_MAX; };
  result.CreateKernelV2 = [](const CustomOp* self, const Api* api, const KernelInfo* info, void** kernel) {
    return guarded(*api, [&] { *kernel = new Kernel(*api, info, *typed(self).op, typed(self).dtype); });
  };
  result.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  result.KernelComputeV2 = [](void* kernel, KernelContext* context) {
    return static_cast<Kernel*>(kernel)->guarded_compute(context);
  };
  return result;
}

// A file has a function for each configuration in which it calls an operator: name, name_2 and so on. A kernel reads the
// configuration from the attributes (CONFIGURATIONS in pyinvolution/_onnx_functions.py).
constexpr int names = 32;
constexpr DType dtypes[] = {DType::f32, DType::f64, DType::f16, DType::bf16};

// The domain, made once for each copy of ONNX Runtime in the process, whose sessions it has to outlive.
CustomOpDomain* domain_of(const Api& api) {
  static const std::vector<TypedOperator> all = [] {
    std::vector<TypedOperator> made;
    for (const Operator& op : operators)
      for (int number = 1; number <= names; ++number) {
        std::string name = op.name;
        if (number > 1) name.append("_").append(std::to_string(number));
        for (const DType dtype : dtypes) made.push_back(make_operator(op, name, dtype));
      }
    return made;
  }();
  static std::mutex mutex;
  static std::vector<std::pair<const Api*, CustomOpDomain*>> domains;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& [of, domain] : domains)
    if (of == &api) return domain;
  CustomOpDomain* made = nullptr;
  check(api, CreateCustomOpDomain(api, "pyinvolution", &made));
  const auto release = [&](CustomOpDomain* domain) { ReleaseCustomOpDomain(api, domain); };
  std::unique_ptr<CustomOpDomain, decltype(release)> domain(made, release);
  for (const TypedOperator& op : all) check(api, CustomOpDomain_Add(api, domain.get(), &op));
  domains.emplace_back(&api, domain.get());
  return domain.release();
}

}  // namespace
}  // namespace pyinvolution::ort

// What SessionOptions.register_custom_ops_library (Python) and RegisterCustomOpsLibrary (C, C++) call.
extern "C" PYINVOLUTION_API pyinvolution::ort::Status* RegisterCustomOps(
    pyinvolution::ort::SessionOptions* options, const pyinvolution::ort::ApiBase* base) noexcept {
  using namespace pyinvolution::ort;
  const Api* api = base->GetApi(api_version);
  if (api == nullptr) {
    const std::string message = std::string("pyinvolution: ONNX Runtime is ") + base->GetVersionString() +
                                ", expected 1." + std::to_string(api_version) + " or newer";
    return CreateStatus(*base->GetApi(1), ErrorCode::fail, message.c_str());
  }
  return guarded(*api, [&] { check(*api, AddCustomOpDomain(*api, options, domain_of(*api))); });
}
