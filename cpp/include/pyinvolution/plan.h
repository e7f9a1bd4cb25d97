// The choice of a kernel: an ordered table of variants for each operator, best first. A variant supports a problem or
// says why not.
#pragma once

#include <string>
#include <vector>

#include "pyinvolution/export.h"
#include "pyinvolution/problem.h"

namespace pyinvolution {

template <class Problem, class Pass, class Buffers>
struct VariantOf {
  const char* name;  // unique for an operator and a device
  Device device;
  // nullptr: can run; else the reason why not, a sentence without the variant's name.
  const char* (*refusal)(const Problem&, Pass);
  // Throws std::runtime_error when the device reports an error. Never called for an empty output. nullptr: the operator
  // itself composes the result of others.
  void (*run)(const Problem&, Pass, const Buffers&, const Execution&);
  // Bytes of the device's memory that `run` needs besides the tensors; on the device that runs it. nullptr: none.
  int64_t (*scratch)(const Problem&, Pass) = nullptr;
};
using Variant = VariantOf<Problem, Pass, Buffers>;
using SpanVariant = VariantOf<SpanProblem, SpanPass, SpanBuffers>;

// The first variant of the operator's table that supports the problem, or the forced one. Throws std::invalid_argument
// with every refusal where none can run, or where the forced one refuses.
PYINVOLUTION_API const Variant& choose(const Problem&, Pass);
PYINVOLUTION_API const SpanVariant& choose(const SpanProblem&, SpanPass);

// Chooses and runs. Does nothing for an empty output; sums over nothing are zero. Throws std::invalid_argument for
// sizes that do not fit each other and for null pointers.
PYINVOLUTION_API void run(const Problem&, Pass, const Buffers&, const Execution&);

struct Verdict {
  const char* variant;
  const char* refusal;  // nullptr where it can run
  bool chosen;
};

// Every variant of the problem's device in the order of the table, with its verdict.
PYINVOLUTION_API std::vector<Verdict> explain(const Problem&, Pass);
PYINVOLUTION_API std::vector<Verdict> explain(const SpanProblem&, SpanPass);

// Names every variant of an operator in the order of its table, as device/name. Throws std::invalid_argument for an
// unknown operator.
PYINVOLUTION_API std::vector<std::string> variants(const std::string& op = "involution2d");

// Makes `choose` take the named variant for every problem of its operator; names of several operators are separated by
// commas, "" ends that. PYINVOLUTION_VARIANT sets the initial value. Throws std::invalid_argument for an unknown name.
PYINVOLUTION_API void force_variant(const std::string& names);
PYINVOLUTION_API std::string forced_variant();

PYINVOLUTION_API const char* to_string(DType);
PYINVOLUTION_API const char* to_string(Device);
PYINVOLUTION_API const char* to_string(Pass);
PYINVOLUTION_API const char* to_string(SpanPass);

}  // namespace pyinvolution
