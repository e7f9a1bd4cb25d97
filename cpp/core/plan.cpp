#include "pyinvolution/plan.h"

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "../../cuda/generic/generic.h"
#include "../../cuda/mma/mma.h"
#include "../../cuda/tiled/tiled.h"
#include "cpu.h"

namespace pyinvolution {
namespace {

// Best first. Each device ends in a variant that supports every problem.
constexpr Variant table[] = {
    {"mma", Device::cuda, cuda::mma_refusal, cuda::mma_run},
    {"tiled", Device::cuda, cuda::tiled_refusal, cuda::tiled_run},
    {"generic", Device::cuda, cuda::generic_refusal, cuda::generic_run},
    {"columns", Device::cpu, cpu::columns_refusal, cpu::columns_run},
    {"scalar", Device::cpu, cpu::scalar_refusal, cpu::scalar_run},
};

std::string qualified(const Variant& variant) { return std::string(to_string(variant.device)) + "/" + variant.name; }

bool is_named(const Variant& variant, const std::string& name) {
  return name == variant.name || name == qualified(variant);
}

// The variant that a device is bound to, or nullptr.
struct Forced {
  std::mutex mutex;
  std::string name;
  const Variant* on[2] = {nullptr, nullptr};

  Forced() {
    const char* initial = std::getenv("PYINVOLUTION_VARIANT");
    if (initial != nullptr) set(initial);
  }

  void set(const std::string& wanted) {
    const Variant* found[2] = {nullptr, nullptr};
    std::string names;
    for (const Variant& variant : table) {
      if (is_named(variant, wanted)) found[int(variant.device)] = &variant;
      names += (names.empty() ? "" : ", ") + qualified(variant);
    }
    if (!wanted.empty() && found[0] == nullptr && found[1] == nullptr)
      throw std::invalid_argument("unknown variant \"" + wanted + "\", expected one of " + names);
    const std::lock_guard<std::mutex> lock(mutex);
    name = wanted;
    on[0] = found[0];
    on[1] = found[1];
  }
};

Forced& forced() {
  static Forced state;
  return state;
}

const Variant* forced_on(Device device) {
  Forced& state = forced();
  const std::lock_guard<std::mutex> lock(state.mutex);
  return state.on[int(device)];
}

int64_t outputs(const Problem& p, Pass pass) {
  switch (pass) {
    case Pass::forward: return p.batch * p.channels * p.out_h * p.out_w;
    case Pass::grad_input: return p.batch * p.channels * p.in_h * p.in_w;
    case Pass::grad_weight: return p.batch * p.groups * p.taps() * p.out_h * p.out_w;
  }
  return 0;
}

}  // namespace

const Variant& choose(const Problem& problem, Pass pass) {
  if (const Variant* variant = forced_on(problem.device)) {
    if (const char* refusal = variant->refusal(problem, pass))
      throw std::invalid_argument("the forced variant " + qualified(*variant) + " cannot run this " + to_string(pass) +
                                  ": " + refusal);
    return *variant;
  }
  std::string refusals;
  for (const Variant& variant : table) {
    if (variant.device != problem.device) continue;
    const char* refusal = variant.refusal(problem, pass);
    if (refusal == nullptr) return variant;
    refusals += std::string(refusals.empty() ? "" : "; ") + variant.name + ": " + refusal;
  }
  throw std::invalid_argument(std::string("no ") + to_string(problem.device) + " variant can run this " +
                              to_string(pass) + ": " + refusals);
}

void run(const Problem& problem, Pass pass, const Buffers& buffers, const Execution& execution) {
  if (outputs(problem, pass) == 0) return;
  choose(problem, pass).run(problem, pass, buffers, execution);
}

std::vector<Verdict> explain(const Problem& problem, Pass pass) {
  const Variant* chosen = forced_on(problem.device);
  std::vector<Verdict> verdicts;
  for (const Variant& variant : table) {
    if (variant.device != problem.device) continue;
    const char* refusal = variant.refusal(problem, pass);
    if (chosen == nullptr && refusal == nullptr) chosen = &variant;
    verdicts.push_back({&variant, refusal, chosen == &variant && refusal == nullptr});
  }
  return verdicts;
}

std::vector<std::string> variants() {
  std::vector<std::string> names;
  for (const Variant& variant : table) names.push_back(qualified(variant));
  return names;
}

void force_variant(const std::string& name) { forced().set(name); }

std::string forced_variant() {
  Forced& state = forced();
  const std::lock_guard<std::mutex> lock(state.mutex);
  return state.name;
}

const char* to_string(DType dtype) {
  switch (dtype) {
    case DType::f32: return "float32";
    case DType::f64: return "float64";
    case DType::f16: return "float16";
    case DType::bf16: return "bfloat16";
  }
  return "unknown";
}

const char* to_string(Device device) { return device == Device::cuda ? "cuda" : "cpu"; }

const char* to_string(Pass pass) {
  switch (pass) {
    case Pass::forward: return "forward";
    case Pass::grad_input: return "grad_input";
    case Pass::grad_weight: return "grad_weight";
  }
  return "unknown";
}

}  // namespace pyinvolution
