#include "runtime.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "autotune.h"

namespace pyinvolution::ops {
namespace {

void parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* state) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) { body(from, to, state); });
}

// libtorch_cuda is looked up rather than linked, so that one binary serves torch builds with and without CUDA.
void* current_cuda_stream(int32_t device) {
  using GetStream = int32_t (*)(int32_t, void**);
  static const GetStream get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr
                              : reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  void* stream = nullptr;
  if (get_stream == nullptr || get_stream(device, &stream) != 0)
    throw std::runtime_error("involution2d: cannot ask libtorch_cuda.so for the current stream");
  return stream;
}

// Calls body(Execution).
template <class Body>
void execute(const torch::stable::Tensor& where, Device device, const Body& body) {
  if (device == Device::cpu) {
    body(cpu_execution());
  } else {
    Execution execution;
    const int32_t index = where.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(index);
    execution.stream = current_stream(where);
    body(execution);
  }
}

// Whether the tests want this variant to be wrong (PYINVOLUTION_TEST_FAULT=device/name), to see that it is noticed.
bool faulty(Device device, const char* name) {
  static const char* const wanted = std::getenv("PYINVOLUTION_TEST_FAULT");
  return wanted != nullptr && std::string(to_string(device)) + "/" + name == wanted;
}

// Every window one column away from where it belongs, with a border of zeros.
Problem shifted(Problem problem) {
  ++problem.padding_w;
  problem.border = Border::zeros;
  return problem;
}

}  // namespace

void* current_stream(const torch::stable::Tensor& where) { return current_cuda_stream(where.get_device_index()); }

void compute(const torch::stable::Tensor& where, const Problem& problem, Pass pass, Buffers buffers,
             const torch::stable::Tensor& result) {
  void*& place = pass == Pass::forward ? buffers.y : pass == Pass::grad_input ? buffers.x : buffers.w;
  tune(where, problem.device, problem, pass, images_to_check(problem), [&](const Variant& variant, int64_t checked) {
    const torch::stable::Tensor trial = trial_result(result, checked);
    place = trial.mutable_data_ptr();
    Problem part = problem;
    if (checked > 0) part.batch = checked;
    launch(where, variant, part, pass, buffers);
    return std::vector<torch::stable::Tensor>{first_images(trial, checked)};
  });
  place = result.mutable_data_ptr();
  launch(where, choose(problem, pass), problem, pass, buffers);
}

Execution cpu_execution() {
  Execution execution;
  execution.parallel_for = parallel_for;
  execution.threads = int(torch::stable::get_num_threads());
  return execution;
}

void launch(const torch::stable::Tensor& where, const Variant& variant, const Problem& problem, Pass pass,
            const Buffers& buffers) {
  if (faulty(variant.device, variant.name)) [[unlikely]]
    return execute(where, problem.device,
                   [&](const Execution& execution) { run(variant, shifted(problem), pass, buffers, execution); });
  execute(where, problem.device, [&](const Execution& execution) { run(variant, problem, pass, buffers, execution); });
}

void launch(const torch::stable::Tensor& where, const SpanVariant& variant, const SpanProblem& span, SpanOp op,
            const SpanBuffers& buffers) {
  SpanProblem problem = span;
  if (faulty(variant.device, variant.name)) [[unlikely]]
    problem.involution = shifted(span.involution);
  execute(where, problem.involution.device, [&](const Execution& execution) {
    const int64_t bytes = variant.scratch != nullptr ? variant.scratch(problem, op) : 0;
    if (bytes == 0) return variant.run(problem, op, buffers, execution);
    // The caching allocator gives it to nobody else on this stream before the kernels are done.
    const torch::stable::Tensor scratch = torch::stable::new_empty(where, {bytes}, torch::headeronly::ScalarType::Byte);
    SpanBuffers all = buffers;
    all.scratch = scratch.mutable_data_ptr();
    variant.run(problem, op, all, execution);
  });
}

}  // namespace pyinvolution::ops
