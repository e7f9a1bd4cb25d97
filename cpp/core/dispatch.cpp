#include "pyinvolution/dispatch.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>

#include "cpu/variants.h"
#include "pyinvolution/involution.h"
#ifndef PYINVOLUTION_NO_CUDA
#include "cuda/variants.h"
#endif

namespace pyinvolution {
namespace {

// A row whose code was not built says why. The build defines PYINVOLUTION_NO_CUDA, a sentence.
#ifdef PYINVOLUTION_NO_CUDA
template <class P, class Op>
Refusal no_cuda(const P&, Op) {
  return needs("a build with CUDA code (" PYINVOLUTION_NO_CUDA ")");
}
template <class P, class Op, class B>
void not_built(const P&, Op, const B&, const Execution&) {
  throw std::runtime_error("this build has no CUDA code: " PYINVOLUTION_NO_CUDA);
}
#define CUDA_VARIANT(name) {#name, Device::cuda, no_cuda, not_built}
#define CUDA_VARIANT_WITH_SCRATCH(name) CUDA_VARIANT(name)
#define CUDA_VARIANT_FOR_SOME(name) CUDA_VARIANT(name)
#else
#define CUDA_VARIANT(name) {#name, Device::cuda, cuda::name##_refusal, cuda::name##_run}
#define CUDA_VARIANT_WITH_SCRATCH(name) \
  {#name, Device::cuda, cuda::name##_refusal, cuda::name##_run, cuda::name##_scratch}
#define CUDA_VARIANT_FOR_SOME(name) \
  {#name, Device::cuda, cuda::name##_refusal, cuda::name##_run, nullptr, cuda::name##_slower}
#endif
#define CPU_VARIANT(name) {#name, Device::cpu, cpu::name##_refusal, cpu::name##_run}

Refusal never(const SpanProblem&, SpanOp) { return {}; }
#define COMPOSED(device) {"composed", device, never, nullptr}

// Best first. Each device ends in a variant that runs every problem.
constexpr Variant table[] = {
    CUDA_VARIANT(mma),               //
    CUDA_VARIANT_FOR_SOME(sliding),  //
    CUDA_VARIANT(tiled),             //
    CUDA_VARIANT(generic),           //
    CPU_VARIANT(channels),           //
    CPU_VARIANT(columns),            //
    CPU_VARIANT(scalar),             //
};

constexpr SpanVariant span_table[] = {
    CUDA_VARIANT_WITH_SCRATCH(fused),  //
    COMPOSED(Device::cuda),            //
    CPU_VARIANT(fused),                //
    COMPOSED(Device::cpu),             //
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

template <class V, size_t Size, class P, class Op>
std::vector<Verdict> verdicts_of(const V (&variants)[Size], const Bound<V> Forced::* bound, const P& problem, Op op) {
  const V* chosen = forced_on(device_of(problem), bound);
  std::vector<Verdict> verdicts;
  for (const V& variant : variants) {
    if (variant.device != device_of(problem)) continue;
    Refusal refusal = variant.refusal(problem, op);
    if (!refusal && chosen != &variant && variant.slower != nullptr) refusal = variant.slower(problem, op);
    if (chosen == nullptr && !refusal) chosen = &variant;
    verdicts.push_back({variant.name, refusal.text(), chosen == &variant && !refusal});
  }
  return verdicts;
}

// "; mma: requires ..., got ...; ..."
std::string refusals(const std::vector<Verdict>& verdicts) {
  std::string text;
  for (const Verdict& verdict : verdicts)
    if (!verdict.refusal.empty()) text += std::string("; ") + verdict.variant + ": " + verdict.refusal;
  return text;
}

template <class V, size_t Size, class P, class Op>
const V& choose_from(const V (&variants)[Size], const Bound<V> Forced::* bound, const P& problem, Op op) {
  const Device device = device_of(problem);
  if (const V* variant = forced_on(device, bound)) {
    if (const Refusal refusal = variant->refusal(problem, op))
      throw std::invalid_argument("the forced variant " + qualified(*variant) + " cannot run this " + to_string(op) +
                                  ": it " + refusal.text());
    return *variant;
  }
  for (const V& variant : variants)
    if (variant.device == device && !variant.refusal(problem, op) &&
        (variant.slower == nullptr || !variant.slower(problem, op)))
      return variant;
  throw std::invalid_argument(std::string("no ") + to_string(device) + " variant can run this " + to_string(op) +
                              refusals(verdicts_of(variants, bound, problem, op)));
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
const SpanVariant& choose(const SpanProblem& problem, SpanOp op) {
  return choose_from(span_table, &Forced::span, problem, op);
}

Route route(const SpanProblem& problem, SpanOp op, bool differentiable) {
  const Problem& p = problem.involution;
  // Without an output there is no W to compute.
  if (p.batch * p.channels * p.out_h * p.out_w == 0) return Route::span;
  if (op == SpanOp::layer && !choose(problem, SpanOp::layer).composed()) return Route::layer;
  const auto has_kernel = [&](SpanOp each) { return !choose(problem, each).composed(); };
  return has_kernel(SpanOp::forward) && (!differentiable || has_kernel(SpanOp::backward)) ? Route::span
                                                                                          : Route::unfused;
}

void run(const Problem& problem, Pass pass, const Buffers& buffers, const Execution& execution) {
  if (outputs(problem, pass) == 0) return;
  validate(problem, buffers);
  choose(problem, pass).run(problem, pass, buffers, execution);
}

int64_t scratch_bytes(const SpanProblem& span, SpanOp op) {
  const SpanVariant& variant = choose(span, op);
  return variant.scratch == nullptr ? 0 : variant.scratch(span, op);
}

void run(const SpanProblem& span, SpanOp op, const SpanBuffers& buffers, const Execution& execution) {
  const Problem& p = span.involution;
  if (p.batch * p.channels * p.out_h * p.out_w == 0) return;
  validate(span, op, buffers);
  const SpanVariant& variant = choose(span, op);
  if (variant.composed())
    throw std::invalid_argument(std::string("no ") + to_string(p.device) + " kernel runs this span involution " +
                                to_string(op) + refusals(explain(span, op)));
  const int64_t scratch = variant.scratch == nullptr ? 0 : variant.scratch(span, op);
  if (buffers.scratch == nullptr && scratch > 0)
    throw std::invalid_argument("scratch is null, expected the address of " + std::to_string(scratch) + " bytes");
  variant.run(span, op, buffers, execution);
}

std::vector<Verdict> explain(const Problem& problem, Pass pass) {
  return verdicts_of(table, &Forced::involution, problem, pass);
}
std::vector<Verdict> explain(const SpanProblem& problem, SpanOp op) {
  return verdicts_of(span_table, &Forced::span, problem, op);
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

const char* cuda_build() {
#ifdef PYINVOLUTION_NO_CUDA
  return "none: " PYINVOLUTION_NO_CUDA;
#else
  return cuda::build();
#endif
}

std::string Refusal::text() const {
  if (requirement == nullptr) return "";
  std::string text = std::string("requires ") + requirement;
  if (got != nullptr) text += std::string(", got ") + got;
  if (count > 0) text += ", got " + std::to_string(values[0]);
  if (count > 1) text += " x " + std::to_string(values[1]);
  return text;
}

const char* to_string(DType dtype) {
  switch (dtype) {
#define NAME(name, text, storage, sum, scalar_type) \
  case DType::name: return text;
    PYINVOLUTION_DTYPES(NAME)
#undef NAME
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

const char* to_string(Route route) {
  switch (route) {
    case Route::layer: return "layer";
    case Route::span: return "span";
    case Route::unfused: return "unfused";
  }
  return "unknown";
}

const char* to_string(SpanOp op) {
  switch (op) {
    case SpanOp::forward: return "forward";
    case SpanOp::backward: return "backward";
    case SpanOp::layer: return "layer";
  }
  return "unknown";
}

}  // namespace pyinvolution
