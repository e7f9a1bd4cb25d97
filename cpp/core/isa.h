// Which of the compiled instruction sets the CPU variants use.
#pragma once

#include <string>
#include <vector>

#include "pyinvolution/export.h"

namespace pyinvolution {

// The instruction sets of this architecture in ascending order, with the test for the running processor (the builtins
// ask cpuid and, for the registers that the operating system must save, xgetbv). `baseline` is what the compiler
// targets without flags (SSE2 on x86-64, NEON on Arm). Each has a file in cpp/cpu/instances and a line in
// sources.cmake.
//
// The tests add a row, a model of AVX512-BF16 for any processor. It is the first one, so that only its name chooses it.
#if defined(PYINVOLUTION_EMULATED_BF16_ISA)
#define PYINVOLUTION_TEST_ISAS(_) _(emulated_bf16, true)
#else
#define PYINVOLUTION_TEST_ISAS(_)
#endif
#if defined(__x86_64__)
#define PYINVOLUTION_HAS_AVX2 (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())
#define PYINVOLUTION_HAS_AVX512                                                                        \
  (PYINVOLUTION_HAS_AVX2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && \
   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
#define PYINVOLUTION_HAS_AVX512_BF16 (PYINVOLUTION_HAS_AVX512 && __builtin_cpu_supports("avx512bf16"))
#define PYINVOLUTION_ISAS(_)         \
  PYINVOLUTION_TEST_ISAS(_)          \
  _(baseline, true)                  \
  _(avx2, PYINVOLUTION_HAS_AVX2)     \
  _(avx512, PYINVOLUTION_HAS_AVX512) \
  _(avx512_bf16, PYINVOLUTION_HAS_AVX512_BF16)
#else
#define PYINVOLUTION_ISAS(_) \
  PYINVOLUTION_TEST_ISAS(_)  \
  _(baseline, true)
#endif

enum class Isa : int {
#define PYINVOLUTION_ISA(name, runs_here) name,
  PYINVOLUTION_ISAS(PYINVOLUTION_ISA)
#undef PYINVOLUTION_ISA
};

PYINVOLUTION_API const char* to_string(Isa);

// The best one that this processor and operating system can run.
PYINVOLUTION_API Isa detected_isa();
PYINVOLUTION_API std::vector<std::string> available_isas();

// The detected one, or the one that PYINVOLUTION_ISA or `override_isa` names.
PYINVOLUTION_API Isa current_isa();

// "" returns to the detected one. Throws std::invalid_argument for an unknown name or one that cannot run here.
PYINVOLUTION_API void override_isa(const std::string& name);

}  // namespace pyinvolution
