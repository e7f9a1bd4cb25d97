// The choice of a kernel: an ordered table of variants for each operator, best first. A variant can run a problem or
// says what it requires instead.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "pyinvolution/export.h"
#include "pyinvolution/problem.h"

namespace pyinvolution {

PYINVOLUTION_API const char* to_string(DType);
PYINVOLUTION_API const char* to_string(Device);
PYINVOLUTION_API const char* to_string(Pass);
PYINVOLUTION_API const char* to_string(Border);

// Why a variant cannot run a problem: what it requires and what the problem has instead. Plain data, since most
// refusals are never read; text() makes the sentence. A Refusal that holds nothing means that the variant can run.
struct Refusal {
  const char* requirement = nullptr;  // completes the sentence "requires ..."
  const char* got = nullptr;          // a value with a name, or ...
  int64_t values[2] = {0, 0};
  int count = 0;  // ... this many numbers

  explicit operator bool() const { return requirement != nullptr; }
  // "requires 16 channels per group, got 8"; empty where the variant can run.
  PYINVOLUTION_API std::string text() const;
};

inline Refusal needs(const char* requirement) { return {requirement, nullptr, {0, 0}, 0}; }
inline Refusal needs(const char* requirement, const char* got) { return {requirement, got, {0, 0}, 0}; }
inline Refusal needs(const char* requirement, int64_t got) { return {requirement, nullptr, {got, 0}, 1}; }
inline Refusal needs(const char* requirement, int64_t one, int64_t two) {
  return {requirement, nullptr, {one, two}, 2};
}

// What a kernel requires whose windows lie where a convolution has them (`is_plain`).
inline Refusal window_refusal(const Problem& p) {
  if (p.border != Border::zeros) return needs("a border of zeros", to_string(p.border));
  if (p.upsample_h != 1 || p.upsample_w != 1) return needs("an upsampling of 1", p.upsample_h, p.upsample_w);
  return {};
}

template <class Problem, class Op, class Buffers>
struct VariantOf {
  const char* name;  // unique for an operator and a device
  Device device;
  Refusal (*refusal)(const Problem&, Op);
  // `run` below calls it. Throws std::runtime_error when the device reports an error. Never called for an empty output. nullptr: not a
  // kernel; the operator composes its result of other operators.
  void (*run)(const Problem&, Op, const Buffers&, const Execution&);
  // Bytes of the device's memory that `run` needs besides the tensors; on the device that runs it. nullptr: none.
  int64_t (*scratch)(const Problem&, Op) = nullptr;
  // Why a later variant is faster although this one can run the problem; a forced variant runs nevertheless. nullptr:
  // none is.
  Refusal (*slower)(const Problem&, Op) = nullptr;

  bool composed() const { return run == nullptr; }
};
using Variant = VariantOf<Problem, Pass, Buffers>;
using SpanVariant = VariantOf<SpanProblem, SpanOp, SpanBuffers>;

// The forced variant; else the one that `keep_choice` knows for the problem; else the first of the operator's table that
// supports it. Throws std::invalid_argument with every refusal where none can run, or where the forced one refuses.
PYINVOLUTION_API const Variant& choose(const Problem&, Pass);
PYINVOLUTION_API const SpanVariant& choose(const SpanProblem&, SpanOp);

// Chooses and runs. Does nothing for an empty output; sums over nothing are zero. Throws std::invalid_argument for
// sizes that do not fit each other and for null pointers.
PYINVOLUTION_API void run(const Problem&, Pass, const Buffers&, const Execution&);
// Runs a variant that can run the problem, which has been validated and has outputs. Where the variant refuses an
// upsampling, it runs once for each phase; the gradient of X then needs memory for two of X in the type of sums, and for
// 16-bit types for one phase of W and Y.
PYINVOLUTION_API void run(const Variant&, const Problem&, Pass, const Buffers&, const Execution&);

// Chooses a kernel and runs it; does nothing for an empty output (whose gradients are zero). Throws
// std::invalid_argument with the reasons where no kernel runs the problem (see `route`): compute W by a convolution and
// run the involution.
PYINVOLUTION_API void run(const SpanProblem&, SpanOp, const SpanBuffers&, const Execution&);

// Bytes of the device's memory, aligned to 16, that `run` needs in buffers.scratch; with CUDA, of the current device.
PYINVOLUTION_API int64_t scratch_bytes(const SpanProblem&, SpanOp);

// How a layer that generates its kernels runs: the one answer for modules, operators and the C++ API.
enum class Route : int32_t {
  layer,    // a kernel computes R, W and Y from X
  span,     // R comes from a convolution; a kernel computes W and Y
  unfused,  // W, too, comes from a convolution and lies in memory; then an involution
};

// The route of `op` (layer or forward) from the real sizes and strides. Only SpanOp::layer can give Route::layer.
// `differentiable`: a backward pass will follow; without a kernel for it, W is better kept than computed twice, and the
// route is `unfused`.
PYINVOLUTION_API Route route(const SpanProblem&, SpanOp, bool differentiable = false);

struct Verdict {
  const char* variant;
  std::string refusal;  // empty where it can run
  bool chosen;
  bool measured = false;  // chosen because it was the fastest when it was measured (`autotune`)
};

// Every variant of the problem's device in the order of the table, with its verdict.
PYINVOLUTION_API std::vector<Verdict> explain(const Problem&, Pass);
PYINVOLUTION_API std::vector<Verdict> explain(const SpanProblem&, SpanOp);

// Names every variant of an operator ("involution2d" or "span_involution2d") in the order of its table, as device/name.
// Throws std::invalid_argument for an unknown operator.
PYINVOLUTION_API std::vector<std::string> variants(const std::string& op = "involution2d");

// Makes `choose` take the named variant for every problem of its operator; names of several operators are separated by
// commas, "" ends that. PYINVOLUTION_VARIANT sets the initial value. Throws std::invalid_argument for an unknown name.
PYINVOLUTION_API void force_variant(const std::string& names);
PYINVOLUTION_API std::string forced_variant();

// Makes the named variants refuse every problem; names are separated by commas, "" ends that. PYINVOLUTION_DISABLE sets
// the initial value. Throws std::invalid_argument for an unknown name.
PYINVOLUTION_API void disable_variants(const std::string& names);
// As device/name, separated by commas.
PYINVOLUTION_API std::string disabled_variants();

// Whether the operators for tensors measure, at the first call of a problem, which variant is the fastest, and `choose`
// takes what was kept. PYINVOLUTION_AUTOTUNE=1 sets the initial value. The functions for raw pointers do not measure, as
// they allocate nothing, but take what is kept.
PYINVOLUTION_API void autotune(bool on);
PYINVOLUTION_API bool autotunes();

// What there is to measure: the variants that can run the problem, best first; empty where one is forced or kept.
PYINVOLUTION_API std::vector<const Variant*> candidates(const Problem&, Pass);
PYINVOLUTION_API std::vector<const SpanVariant*> candidates(const SpanProblem&, SpanOp);

// A problem in text, with its sizes and strides.
PYINVOLUTION_API std::string describe(const Problem&, Pass);
PYINVOLUTION_API std::string describe(const SpanProblem&, SpanOp);
// Keeps the variant for the problem that `describe` has described, unless another is kept that is not disabled; `choose`
// takes it while `autotunes`. False where one of the two is unknown.
PYINVOLUTION_API bool keep_choice(const std::string& problem, const std::string& variant);
PYINVOLUTION_API void forget_choices();

// The CUDA code of the library: "CUDA 12.8, architectures 80 86 89 90, PTX 80 90", or "none: " and the reason.
PYINVOLUTION_API const char* cuda_build();

PYINVOLUTION_API const char* to_string(SpanOp);
PYINVOLUTION_API const char* to_string(Route);

}  // namespace pyinvolution
