#include "pyinvolution/dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cpu/variants.h"
#include "phases.h"
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

template <class V>
std::string qualified(const V& variant) {
  return std::string(to_string(variant.device)) + "/" + variant.name;
}

template <class V>
constexpr const auto& rows() {
  if constexpr (std::is_same_v<V, Variant>) {
    return table;
  } else {
    return span_table;
  }
}

template <class Body>
void for_each_row(const Body& body) {
  for (const Variant& variant : table) body(variant);
  for (const SpanVariant& variant : span_table) body(variant);
}

// Calls `found` with each row that `names` names: "mma", "cuda/mma", or several of them with commas between.
template <class Found>
void parse(const std::string& names, const Found& found) {
  std::istringstream list(names);
  for (std::string name; std::getline(list, name, ',');) {
    name.erase(0, name.find_first_not_of(' '));
    name.erase(name.find_last_not_of(' ') + 1);
    bool known = false;
    std::string all;
    for_each_row([&](const auto& variant) {
      all += (all.empty() ? "" : ", ") + qualified(variant);
      if (name != variant.name && name != qualified(variant)) return;
      known = true;
      found(variant);
    });
    if (!known) throw std::invalid_argument("unknown variant \"" + name + "\", expected one of " + all);
  }
}

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

// --- what is forced: for each operator and device a variant or nullptr -----------------------------------------------

template <class V>
struct Bound {
  const V* on[2] = {nullptr, nullptr};
  void bind(const V& variant) { on[int(variant.device)] = &variant; }
};

struct BothBound : Bound<Variant>, Bound<SpanVariant> {
  using Bound<Variant>::bind;
  using Bound<SpanVariant>::bind;
};

struct Forced {
  std::mutex mutex;
  std::string names;
  BothBound bound;

  Forced() { set(variable("PYINVOLUTION_VARIANT")); }

  void set(const std::string& wanted) {
    BothBound found;
    parse(wanted, [&](const auto& variant) { found.bind(variant); });
    const std::lock_guard<std::mutex> lock(mutex);
    names = wanted;
    bound = found;
  }
};

Forced& forced() {
  static Forced state;
  return state;
}

template <class V>
const V* forced_on(Device device) {
  Forced& state = forced();
  const std::lock_guard<std::mutex> lock(state.mutex);
  return static_cast<const Bound<V>&>(state.bound).on[int(device)];
}

// --- what is disabled: a bit for each row -----------------------------------------------------------------------------

uint64_t bit(const Variant& variant) { return uint64_t{1} << (&variant - std::begin(table)); }
uint64_t bit(const SpanVariant& variant) {
  return uint64_t{1} << (std::size(table) + size_t(&variant - std::begin(span_table)));
}

uint64_t bits_of(const std::string& names) {
  uint64_t bits = 0;
  parse(names, [&](const auto& variant) { bits |= bit(variant); });
  return bits;
}

std::atomic<uint64_t>& disabled() {
  static std::atomic<uint64_t> bits = [] {
    try {
      return bits_of(variable("PYINVOLUTION_DISABLE"));
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(std::string("PYINVOLUTION_DISABLE: ") + error.what());
    }
  }();
  return bits;
}

template <class V>
bool is_disabled(const V& variant) {
  return (disabled().load(std::memory_order_relaxed) & bit(variant)) != 0;
}

Refusal inability(const SpanVariant& variant, const SpanProblem& span, SpanOp op) { return variant.refusal(span, op); }
Refusal inability(const Variant& variant, const Problem& problem, Pass pass) {
  const Refusal refusal = variant.refusal(problem, pass);
  return refusal && has_phases(problem, pass) ? variant.refusal(phase_of(problem, pass), pass) : refusal;
}

template <class V, class P, class Op>
Refusal refusal_of(const V& variant, const P& problem, Op op) {
  if (is_disabled(variant)) return needs("that PYINVOLUTION_DISABLE does not name it");
  return inability(variant, problem, op);
}

Refusal slowness(const SpanVariant& variant, const SpanProblem& span, SpanOp op) { return variant.slower(span, op); }
Refusal slowness(const Variant& variant, const Problem& problem, Pass pass) {
  return variant.slower(has_phases(problem, pass) ? phase_of(problem, pass) : problem, pass);
}

// Why a variant is not the one by itself: it cannot run the problem, or a later one is faster.
template <class V, class P, class Op>
Refusal passed_over(const V& variant, const P& problem, Op op) {
  const Refusal refusal = refusal_of(variant, problem, op);
  return !refusal && variant.slower != nullptr ? slowness(variant, problem, op) : refusal;
}

// --- what was measured to be the fastest: a variant for a problem and an operation ----------------------------------

// Everything that decides which kernels can run and how fast they are. An epilogue is left out: it changes neither.
using Key = std::vector<int64_t>;

template <size_t Rank>
void append(Key& key, const int64_t (&sizes)[Rank], const int64_t (&strides)[Rank]) {
  // The stride of a dimension with one element is arbitrary.
  for (size_t d = 0; d < Rank; ++d) key.push_back(sizes[d] > 1 ? strides[d] : 0);
}

Key sizes_of(const Problem& p, int op) {
  return {op,          int(p.dtype), int(p.device), p.batch,      p.channels,    p.groups,     p.in_h,
          p.in_w,      p.out_h,      p.out_w,       p.kernel_h,   p.kernel_w,    p.stride_h,   p.stride_w,
          p.padding_h, p.padding_w,  p.dilation_h,  p.dilation_w, int(p.border), p.upsample_h, p.upsample_w};
}

void append_images(Key& key, const Problem& p) {
  append(key, {p.batch, p.channels, p.in_h, p.in_w}, p.x_stride);
  append(key, {p.batch, p.channels, p.out_h, p.out_w}, p.y_stride);
}

Key key_of(const Problem& p, Pass pass) {
  Key key = sizes_of(p, int(pass));
  append_images(key, p);
  append(key, {p.batch, p.groups, p.kernel_h, p.kernel_w, p.out_h, p.out_w}, p.w_stride);
  return key;
}

Key key_of(const SpanProblem& span, SpanOp op) {
  const Problem& p = span.involution;
  Key key = sizes_of(p, int(op));
  key.push_back(span.reduced);
  append_images(key, p);
  append(key, {span.span_rows(), span.reduced}, span.span_stride);
  if (op == SpanOp::layer) {
    append(key, {span.reduced, p.channels}, span.reduce_stride);
  } else {
    append(key, {p.batch, span.reduced, p.out_h, p.out_w}, span.reduced_stride);
  }
  return key;
}

template <class V>
struct Kept {
  std::shared_mutex mutex;
  std::map<Key, const V*> choices;
};

template <class V>
Kept<V>& kept() {
  static Kept<V> state;
  return state;
}

std::atomic<bool>& autotuning() {
  static std::atomic<bool> on = [] {
    const std::string value = variable("PYINVOLUTION_AUTOTUNE");
    if (!value.empty() && value != "0" && value != "1")
      throw std::invalid_argument("PYINVOLUTION_AUTOTUNE is \"" + value + "\", expected 0 or 1");
    return value == "1";
  }();
  return on;
}

template <class V, class P, class Op>
const V* kept_for(const P& problem, Op op) {
  if (!autotunes()) return nullptr;
  Kept<V>& state = kept<V>();
  const std::shared_lock<std::shared_mutex> lock(state.mutex);
  const auto found = state.choices.find(key_of(problem, op));
  // What is kept was measured with other addresses, and may be disabled by now.
  return found == state.choices.end() || refusal_of(*found->second, problem, op) ? nullptr : found->second;
}

template <class V>
constexpr const char* operator_name = std::is_same_v<V, Variant> ? "involution2d" : "span_involution2d";

// "involution2d forward float32 cpu: 0 0 0 1 64 ..."; only what is behind the colon is read again.
template <class V, class P, class Op>
std::string text_of(const P& problem, const Problem& p, Op op) {
  std::ostringstream text;
  text << operator_name<V> << " " << to_string(op) << " " << to_string(p.dtype) << " " << to_string(p.device) << ":";
  for (const int64_t value : key_of(problem, op)) text << " " << value;
  return text.str();
}

template <class V>
bool keep_in(const std::string& problem, const std::string& name) {
  const std::string prefix = operator_name<V> + std::string(" ");
  const size_t colon = problem.find(':');
  if (problem.rfind(prefix, 0) != 0 || colon == std::string::npos) return false;
  std::istringstream numbers(problem.substr(colon + 1));
  const Key key{std::istream_iterator<int64_t>(numbers), std::istream_iterator<int64_t>()};
  constexpr size_t device = 2;
  if (!numbers.eof() || key.size() <= device) return false;
  for (const V& variant : rows<V>()) {
    if (variant.name != name || int64_t(variant.device) != key[device]) continue;
    Kept<V>& state = kept<V>();
    const std::lock_guard<std::shared_mutex> lock(state.mutex);
    const auto [choice, added] = state.choices.emplace(key, &variant);
    if (!added && is_disabled(*choice->second)) choice->second = &variant;
    return true;
  }
  return false;
}

template <class V>
void forget() {
  Kept<V>& state = kept<V>();
  const std::lock_guard<std::shared_mutex> lock(state.mutex);
  state.choices.clear();
}

// --- the choice -------------------------------------------------------------------------------------------------------

Device device_of(const Problem& problem) { return problem.device; }
Device device_of(const SpanProblem& problem) { return problem.involution.device; }

template <class V, class P, class Op>
std::vector<Verdict> verdicts_of(const P& problem, Op op) {
  const V* chosen = forced_on<V>(device_of(problem));
  const V* measured = chosen == nullptr ? kept_for<V>(problem, op) : nullptr;
  if (measured != nullptr) chosen = measured;
  std::vector<Verdict> verdicts;
  for (const V& variant : rows<V>()) {
    if (variant.device != device_of(problem)) continue;
    const Refusal refusal = &variant == chosen ? refusal_of(variant, problem, op) : passed_over(variant, problem, op);
    if (chosen == nullptr && !refusal) chosen = &variant;
    verdicts.push_back({variant.name, refusal.text(), chosen == &variant && !refusal, &variant == measured});
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

template <class V, class P, class Op>
const V& choose_from(const P& problem, Op op) {
  const Device device = device_of(problem);
  if (const V* variant = forced_on<V>(device)) {
    if (const Refusal refusal = refusal_of(*variant, problem, op))
      throw std::invalid_argument("the forced variant " + qualified(*variant) + " cannot run this " + to_string(op) +
                                  ": it " + refusal.text());
    return *variant;
  }
  if (const V* variant = kept_for<V>(problem, op)) return *variant;
  for (const V& variant : rows<V>())
    if (variant.device == device && !passed_over(variant, problem, op)) return variant;
  throw std::invalid_argument(std::string("no ") + to_string(device) + " variant can run this " + to_string(op) +
                              refusals(verdicts_of<V>(problem, op)));
}

template <class V, class P, class Op>
std::vector<const V*> candidates_of(const P& problem, Op op) {
  const Device device = device_of(problem);
  std::vector<const V*> able;
  if (forced_on<V>(device) != nullptr || kept_for<V>(problem, op) != nullptr) return able;
  for (const V& variant : rows<V>())
    if (variant.device == device && !refusal_of(variant, problem, op)) able.push_back(&variant);
  return able;
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

const Variant& choose(const Problem& problem, Pass pass) { return choose_from<Variant>(problem, pass); }
const SpanVariant& choose(const SpanProblem& problem, SpanOp op) { return choose_from<SpanVariant>(problem, op); }

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
  run(choose(problem, pass), problem, pass, buffers, execution);
}

void run(const Variant& variant, const Problem& problem, Pass pass, const Buffers& buffers,
         const Execution& execution) {
  if (has_phases(problem, pass) && variant.refusal(problem, pass))
    return run_phases(variant.run, problem, pass, buffers, execution);
  variant.run(problem, pass, buffers, execution);
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

std::vector<Verdict> explain(const Problem& problem, Pass pass) { return verdicts_of<Variant>(problem, pass); }
std::vector<Verdict> explain(const SpanProblem& problem, SpanOp op) { return verdicts_of<SpanVariant>(problem, op); }

std::vector<std::string> variants(const std::string& op) {
  std::vector<std::string> names;
  const auto add = [&](const auto& variants) {
    for (const auto& variant : variants) names.push_back(qualified(variant));
  };
  if (op == operator_name<Variant>)
    add(table);
  else if (op == operator_name<SpanVariant>)
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

void disable_variants(const std::string& names) { disabled() = bits_of(names); }

std::string disabled_variants() {
  std::ostringstream names;
  for_each_row([&](const auto& variant) {
    if (is_disabled(variant)) names << (names.tellp() > 0 ? "," : "") << qualified(variant);
  });
  return names.str();
}

void autotune(bool on) { autotuning() = on; }
bool autotunes() { return autotuning().load(std::memory_order_relaxed); }

std::vector<const Variant*> candidates(const Problem& problem, Pass pass) {
  return candidates_of<Variant>(problem, pass);
}
std::vector<const SpanVariant*> candidates(const SpanProblem& problem, SpanOp op) {
  return candidates_of<SpanVariant>(problem, op);
}

std::string describe(const Problem& problem, Pass pass) { return text_of<Variant>(problem, problem, pass); }
std::string describe(const SpanProblem& problem, SpanOp op) {
  return text_of<SpanVariant>(problem, problem.involution, op);
}

bool keep_choice(const std::string& problem, const std::string& variant) {
  return keep_in<Variant>(problem, variant) || keep_in<SpanVariant>(problem, variant);
}

void forget_choices() {
  forget<Variant>();
  forget<SpanVariant>();
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

const char* to_string(Border border) {
  switch (border) {
    case Border::zeros: return "zeros";
    case Border::shift: return "shift";
  }
  return "unknown";
}

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
