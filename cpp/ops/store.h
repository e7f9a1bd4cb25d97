// Where choices by measurement (pyinvolution/dispatch.h, `autotune`) are kept beyond the process. No torch types.
#pragma once

#include <functional>
#include <string>

#include "pyinvolution/export.h"
#include "pyinvolution/problem.h"

namespace pyinvolution::ops {

struct Store {
  // Asked once about each device ("cpu" or "cuda"), calls keep_choice for what is known. False: nothing is to be measured
  // on it.
  std::function<bool(const std::string& device)> recall;
  // After each: the problem as `describe` has it, the fastest variant, and what each took, "channels 12.5 us, ...".
  std::function<void(const std::string& device, const std::string& problem, const std::string& variant,
                     const std::string& times)>
      remember;
};

// Replaces the store and asks it again for each device. Empty functions: nothing is kept beyond the process.
PYINVOLUTION_API void set_store(Store);

// Asks the store about the device, unless it has been asked or `autotunes` is off.
PYINVOLUTION_API void recall(Device);

// While a thread pauses, its calls measure nothing.
PYINVOLUTION_API void pause_autotune(bool paused);

}  // namespace pyinvolution::ops
