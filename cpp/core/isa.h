// Which of the compiled instruction sets the CPU variants use.
#pragma once

#include <string>
#include <vector>

#include "pyinvolution/export.h"

namespace pyinvolution {

// In ascending order; `baseline` is what the compiler targets without flags (SSE2 on x86-64, NEON on Arm).
enum class Isa : int { baseline, avx2, avx512 };

PYINVOLUTION_API const char* to_string(Isa);

// The best one that was compiled in and that this processor and operating system run.
PYINVOLUTION_API Isa detected_isa();
PYINVOLUTION_API std::vector<std::string> available_isas();

// The detected one, or a lower one by PYINVOLUTION_ISA or `override_isa`.
PYINVOLUTION_API Isa current_isa();

// "" returns to the detected one. Throws std::invalid_argument for an unknown name or one that cannot run here.
PYINVOLUTION_API void override_isa(const std::string& name);

}  // namespace pyinvolution
