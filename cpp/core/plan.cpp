#include "pyinvolution/plan.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>

#include "../../cuda/fused/fused.h"
#include "../../cuda/generic/generic.h"
#include "../../cuda/mma/mma.h"
#include "../../cuda/tiled/tiled.h"
#include "cpu.h"
#include "pyinvolution/involution.h"

namespace pyinvolution {
namespace {

// Best first. Each device ends in a variant that supports every problem.
constexpr Variant table[] = {
    {"mma", Device::cuda, cuda::mma_refusal, cuda::mma_run},
    {"tiled", Device::cuda, cuda::tiled_refusal, cuda::tiled_run},
    {"generic", Device::cuda, cuda::generic_refusal, cuda::generic_run},
    {"channels", Device::cpu, cpu::channels_refusal, cpu::channels_run},
    {"columns", Device::cpu, cpu::columns_refusal, cpu::columns_run},
    {"scalar", Device::cpu, cpu::scalar_refusal, cpu::scalar_run},
};

const char* never(const SpanProblem&, SpanPass) { return nullptr; }

constexpr SpanVariant span_table[] = {
    {"fused", Device::cuda, cuda::fused_refusal, cuda::fused_run, cuda::fused_scratch},
    {"composed", Device::cuda, never, nullptr},
    {"fused", Device::cpu, cpu::fused_refusal, cpu::fused_run},
    {"composed", Device::cpu, never, nullptr},
};

// What is forced in an operator's table: for each device a variant or nullptr.
template <class V>
struct Bound {
  const V* on[2] = {nullptr, nullptr};
};

template <class V>
std::string qualified(const V& variant) {
  return std::string(to_string(variant.device)) + "/" + variant.name;
}

template <class V, size_t Size>
bool bind(const V (&variants)[Size], const std::string& name, Bound<V>& bound, std::string& names) {
  bool found = false;
  for (const V& variant : variants) {
    names += (names.empty() ? "" : ", ") + qualified(variant);
    if (name != variant.name && name != qualified(variant)) continue;
    bound.on[int(variant.device)] = &variant;
    found = true;
  }
  return found;
}

struct Forced {
  std::mutex mutex;
  std::string names;
  Bound<Variant> involution;
  Bound<SpanVariant> span;

  Forced() {
    const char* initial = std::getenv("PYINVOLUTION_VARIANT");
    if (initial != nullptr) set(initial);
  }

  void set(const std::string& wanted) {
    Bound<Variant> involution_found;
    Bound<SpanVariant> span_found;
    for (size_t begin = 0; begin < wanted.size();) {
      const size_t end = std::min(wanted.find(',', begin), wanted.size());
      const std::string name = wanted.substr(begin, end - begin);
      std::string known;
      const bool one = bind(table, name, involution_found, known);
      const bool other = bind(span_table, name, span_found, known);
      if (!one && !other) throw std::invalid_argument("unknown variant \"" + name + "\", expected one of " + known);
      begin = end + 1;
    }
    const std::lock_guard<std::mutex> lock(mutex);
    names = wanted;
    involution = involution_found;
    span = span_found;
  }
};

Forced& forced() {
  static Forced state;
  return state;
}

Device device_of(const Problem& problem) { return problem.device; }
Device device_of(const SpanProblem& problem) { return problem.involution.device; }

template <class V>
const V* forced_on(Device device, const Bound<V> Forced::* bound) {
  Forced& state = forced();
  const std::lock_guard<std::mutex> lock(state.mutex);
  return (state.*bound).on[int(device)];
}

template <class V, size_t Size, class P, class Which>
const V& choose_from(const V (&variants)[Size], const Bound<V> Forced::* bound, const P& problem, Which pass) {
  const Device device = device_of(problem);
  if (const V* variant = forced_on(device, bound)) {
    if (const char* refusal = variant->refusal(problem, pass))
      throw std::invalid_argument("the forced variant " + qualified(*variant) + " cannot run this " + to_string(pass) +
                                  ": " + refusal);
    return *variant;
  }
  std::string refusals;
  for (const V& variant : variants) {
    if (variant.device != device) continue;
    const char* refusal = variant.refusal(problem, pass);
    if (refusal == nullptr) return variant;
    refusals += std::string(refusals.empty() ? "" : "; ") + variant.name + ": " + refusal;
  }
  throw std::invalid_argument(std::string("no ") + to_string(device) + " variant can run this " + to_string(pass) +
                              ": " + refusals);
}

template <class V, size_t Size, class P, class Which>
std::vector<Verdict> verdicts_of(const V (&variants)[Size], const Bound<V> Forced::* bound, const P& problem,
                                 Which pass) {
  const V* chosen = forced_on(device_of(problem), bound);
  std::vector<Verdict> verdicts;
  for (const V& variant : variants) {
    if (variant.device != device_of(problem)) continue;
    const char* refusal = variant.refusal(problem, pass);
    if (chosen == nullptr && refusal == nullptr) chosen = &variant;
    verdicts.push_back({variant.name, refusal, chosen == &variant && refusal == nullptr});
  }
  return verdicts;
}

int64_t outputs(const Problem& p, Pass pass) {
  switch (pass) {
    case Pass::forward: return p.batch * p.channels * p.out_h * p.out_w;
    case Pass::grad_input: return p.batch * p.channels * p.in_h * p.in_w;
    case Pass::grad_weight: return p.batch * p.groups * p.taps() * p.out_h * p.out_w;
  }
  throw std::invalid_argument("pass is " + std::to_string(int(pass)) + ", expected forward, grad_input or grad_weight");
}

}  // namespace

const Variant& choose(const Problem& problem, Pass pass) {
  return choose_from(table, &Forced::involution, problem, pass);
}
const SpanVariant& choose(const SpanProblem& problem, SpanPass pass) {
  return choose_from(span_table, &Forced::span, problem, pass);
}

void run(const Problem& problem, Pass pass, const Buffers& buffers, const Execution& execution) {
  if (outputs(problem, pass) == 0) return;
  validate(problem, buffers);
  choose(problem, pass).run(problem, pass, buffers, execution);
}

std::vector<Verdict> explain(const Problem& problem, Pass pass) {
  return verdicts_of(table, &Forced::involution, problem, pass);
}
std::vector<Verdict> explain(const SpanProblem& problem, SpanPass pass) {
  return verdicts_of(span_table, &Forced::span, problem, pass);
}

std::vector<std::string> variants(const std::string& op) {
  std::vector<std::string> names;
  const auto add = [&](const auto& variants) {
    for (const auto& variant : variants) names.push_back(qualified(variant));
  };
  if (op == "involution2d")
    add(table);
  else if (op == "span_involution2d")
    add(span_table);
  else
    throw std::invalid_argument("unknown operator \"" + op + "\", expected involution2d or span_involution2d");
  return names;
}

void force_variant(const std::string& names) { forced().set(names); }

std::string forced_variant() {
  Forced& state = forced();
  const std::lock_guard<std::mutex> lock(state.mutex);
  return state.names;
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

const char* to_string(SpanPass pass) {
  switch (pass) {
    case SpanPass::forward: return "forward";
    case SpanPass::backward: return "backward";
    case SpanPass::layer: return "layer";
  }
  return "unknown";
}

}  // namespace pyinvolution
