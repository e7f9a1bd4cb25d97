#include "runtime.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <stdexcept>

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
    execution.stream = current_cuda_stream(index);
    body(execution);
  }
}

}  // namespace

Execution cpu_execution() {
  Execution execution;
  execution.parallel_for = parallel_for;
  execution.threads = int(torch::stable::get_num_threads());
  return execution;
}

void launch(const torch::stable::Tensor& where, const Variant& variant, const Problem& problem, Pass pass,
            const Buffers& buffers) {
  execute(where, problem.device, [&](const Execution& execution) { variant.run(problem, pass, buffers, execution); });
}

void launch(const torch::stable::Tensor& where, const SpanVariant& variant, const SpanProblem& problem, SpanOp op,
            const SpanBuffers& buffers) {
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
