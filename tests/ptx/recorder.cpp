// Runs the library's launch code without a GPU: in the place of the CUDA runtime, whose functions are below, launches are
// handed to a function of the caller (launches.py). The objects with kernels are those that nvcc makes.
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <unordered_map>

#include "../../cuda/variants.h"

using namespace pyinvolution;

namespace {

// The strategies that cuda/variants.h declares; launches.py lists them: STRATEGY(generic) STRATEGY(tiled) ...
struct Strategy {
  const char* name;
  Refusal (*refusal)(const Problem&, Pass);
  void (*run)(const Problem&, Pass, const Buffers&, const Execution&);
};
#define STRATEGY(name) {#name, cuda::name##_refusal, cuda::name##_run},
const Strategy strategies[] = {STRATEGIES};
struct SpanStrategy {
  const char* name;
  Refusal (*refusal)(const SpanProblem&, SpanOp);
  void (*run)(const SpanProblem&, SpanOp, const SpanBuffers&, const Execution&);
  int64_t (*scratch)(const SpanProblem&, SpanOp);
};
#define SPAN_STRATEGY(name) {#name, cuda::name##_refusal, cuda::name##_run, cuda::name##_scratch},
const SpanStrategy span_strategies[] = {SPAN_STRATEGIES};

std::unordered_map<const void*, std::string>& kernels() {
  static std::unordered_map<const void*, std::string> names;
  return names;
}
std::unordered_map<const void*, int>& dynamic_limits() {
  static std::unordered_map<const void*, int> limits;
  return limits;
}
using OnLaunch = void (*)(const char* kernel, int64_t blocks, int threads, int64_t shared_bytes, void** arguments);
// How many blocks a multiprocessor can hold.
using OnOccupancy = int (*)(const char* kernel, int threads, int64_t shared_bytes);
struct Caller {
  int multiprocessors;
  OnLaunch on_launch;
  OnOccupancy on_occupancy;
};
Caller caller;
std::string answer;

template <class T>
const T& named(const char* name, const T* begin, const T* end) {
  const T* found = std::find_if(begin, end, [&](const T& s) { return std::string(s.name) == name; });
  if (found == end)
    throw std::invalid_argument(std::string("strategy is ") + name + ", expected one of cuda/variants.h");
  return *found;
}
std::string refused(const Refusal& refusal) { return std::string("refused: requires ") + refusal.requirement; }

}  // namespace

// What the launch code needs of the rest of the library, for its messages.
namespace pyinvolution {
const char* to_string(DType) { return "a dtype"; }
const char* to_string(Border) { return "a border"; }
namespace cuda {
const char* build() { return "the recorder"; }
}  // namespace cuda
}  // namespace pyinvolution

extern "C" {

// What the caller sees: the same numbers as in `Problem`, one after another (launches.py has their order). Returns ""
// or why nothing was launched.
const char* record(const char* strategy, int pass, const int64_t* numbers, void* const* addresses, const Caller* from) {
  try {
    const auto next = [&] { return *numbers++; };
    Problem p{};
    p.dtype = DType(next()), p.device = Device::cuda;
    for (int64_t* field :
         {&p.batch, &p.channels, &p.groups, &p.in_h, &p.in_w, &p.out_h, &p.out_w, &p.kernel_h, &p.kernel_w, &p.stride_h,
          &p.stride_w, &p.padding_h, &p.padding_w, &p.dilation_h, &p.dilation_w})
      *field = next();
    p.border = Border(next()), p.upsample_h = next(), p.upsample_w = next();
    for (int64_t& stride : p.x_stride) stride = next();
    for (int64_t& stride : p.w_stride) stride = next();
    for (int64_t& stride : p.y_stride) stride = next();
    const Buffers buffers{addresses[0], addresses[1], addresses[2]};
    caller = *from;
    const Strategy& s = named(strategy, std::begin(strategies), std::end(strategies));
    if (const Refusal refusal = s.refusal(p, Pass(pass))) return (answer = refused(refusal)).c_str();
    s.run(p, Pass(pass), buffers, {});
    return "";
  } catch (const std::exception& error) {
    return (answer = error.what()).c_str();
  }
}

// The same for a span involution. With the address of `scratch_bytes` it only says how many bytes of scratch it needs.
const char* record_span(const char* strategy, int op, const int64_t* numbers, void* const* addresses,
                        const Caller* from, int64_t* scratch_bytes) {
  try {
    const auto next = [&] { return *numbers++; };
    SpanProblem span{};
    Problem& p = span.involution;
    p.dtype = DType(next()), p.device = Device::cuda;
    for (int64_t* field :
         {&p.batch, &p.channels, &p.groups, &p.in_h, &p.in_w, &p.out_h, &p.out_w, &p.kernel_h, &p.kernel_w, &p.stride_h,
          &p.stride_w, &p.padding_h, &p.padding_w, &p.dilation_h, &p.dilation_w})
      *field = next();
    for (int64_t& stride : p.x_stride) stride = next();
    for (int64_t& stride : p.y_stride) stride = next();
    span.reduced = next(), span.epilogue = next() != 0, span.relu = next() != 0;
    for (int64_t& stride : span.reduced_stride) stride = next();
    for (int64_t& stride : span.span_stride) stride = next();
    for (int64_t& stride : span.reduce_stride) stride = next();
    for (int64_t& stride : span.grad_x_stride) stride = next();
    for (int64_t& stride : span.grad_reduced_stride) stride = next();
    SpanBuffers b{};
    void* const* address = addresses;
    for (void** field : {&b.x, &b.reduced, &b.reduce, &b.reduce_bias, &b.span, &b.bias, &b.scale, &b.shift, &b.y,
                         &b.grad_x, &b.grad_reduced, &b.grad_span, &b.grad_bias, &b.scratch})
      *field = *address++;
    caller = *from;
    const SpanStrategy& s = named(strategy, std::begin(span_strategies), std::end(span_strategies));
    if (const Refusal refusal = s.refusal(span, SpanOp(op))) return (answer = refused(refusal)).c_str();
    if (scratch_bytes != nullptr) {
      *scratch_bytes = s.scratch != nullptr ? s.scratch(span, SpanOp(op)) : 0;
      return "";
    }
    s.run(span, SpanOp(op), b, {});
    return "";
  } catch (const std::exception& error) {
    return (answer = error.what()).c_str();
  }
}

// --- the CUDA runtime

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  kernels()[host] = name;
}
int __cudaGetKernel(void**, const void*) { return 1; }
int __cudaLaunchKernel() { return 1; }
unsigned __cudaPushCallConfiguration() { return 1; }
int __cudaPopCallConfiguration() { return 1; }

struct Three {
  unsigned x, y, z;
};
int cudaFuncSetAttribute(const void* function, int attribute, int value) {
  if (attribute == 8) dynamic_limits()[function] = value;  // cudaFuncAttributeMaxDynamicSharedMemorySize
  return 0;
}
int cudaLaunchKernel(const void* function, Three grid, Three block, void** arguments, size_t shared_bytes, void*) {
  const int limit = dynamic_limits().count(function) ? dynamic_limits()[function] : 48 * 1024;
  if (kernels().count(function) == 0 || grid.y != 1 || grid.z != 1 || block.y != 1 || block.z != 1 || grid.x == 0 ||
      block.x == 0 || block.x > 1024 || int64_t(shared_bytes) > limit)
    return 9;  // cudaErrorInvalidConfiguration
  caller.on_launch(kernels()[function].c_str(), grid.x, int(block.x), int64_t(shared_bytes), arguments);
  return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads, size_t shared_bytes) {
  *blocks = caller.on_occupancy(kernels().at(function).c_str(), threads, int64_t(shared_bytes));
  return 0;
}
int cudaGetDevice(int* device) { return *device = 0; }
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  if (attribute != 16) return 1;  // cudaDevAttrMultiProcessorCount
  *value = caller.multiprocessors;
  return 0;
}
int cudaDriverGetVersion(int* version) { return *version = 0; }
int cudaRuntimeGetVersion(int* version) { return *version = 0; }
int cudaGetLastError() { return 0; }
const char* cudaGetErrorString(int error) { return error == 9 ? "invalid launch configuration" : "not recorded"; }

}  // extern "C"
