// The choice of a kernel: one ordered table of variants, best first. A variant supports a problem or says why not.
#pragma once

#include <string>
#include <vector>

#include "pyinvolution/export.h"
#include "pyinvolution/problem.h"

namespace pyinvolution {

struct Variant {
  const char* name;  // unique for a device
  Device device;
  // nullptr: can run; else the reason why not, a sentence without the variant's name.
  const char* (*refusal)(const Problem&, Pass);
  // Throws std::runtime_error when the device reports an error. Never called for an empty output.
  void (*run)(const Problem&, Pass, const Buffers&, const Execution&);
};

// The first variant of the table that supports the problem, or the forced one. Throws std::invalid_argument with every
// refusal where none can run, or where the forced one refuses or does not exist.
PYINVOLUTION_API const Variant& choose(const Problem&, Pass);

// Chooses and runs. Does nothing for an empty output; sums over nothing are zero.
PYINVOLUTION_API void run(const Problem&, Pass, const Buffers&, const Execution&);

struct Verdict {
  const Variant* variant;
  const char* refusal;  // nullptr where it can run
  bool chosen;
};

// Every variant of the problem's device in the order of the table, with its verdict.
PYINVOLUTION_API std::vector<Verdict> explain(const Problem&, Pass);

// Names every variant in the order of the table, as device/name.
PYINVOLUTION_API std::vector<std::string> variants();

// Makes `choose` take the named variant for every problem; "" ends that. PYINVOLUTION_VARIANT sets the initial value.
// Throws std::invalid_argument for a name that no device has.
PYINVOLUTION_API void force_variant(const std::string& name);
PYINVOLUTION_API std::string forced_variant();

PYINVOLUTION_API const char* to_string(DType);
PYINVOLUTION_API const char* to_string(Device);
PYINVOLUTION_API const char* to_string(Pass);

}  // namespace pyinvolution
