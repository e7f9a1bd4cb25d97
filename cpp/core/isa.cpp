#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace pyinvolution {
namespace {

constexpr Isa all[] = {Isa::baseline, Isa::avx2, Isa::avx512};

bool runs_here(Isa isa) {
  switch (isa) {
    case Isa::baseline: return true;
#if PYINVOLUTION_X86_VECTORS
    // The builtins ask cpuid and, for the registers that the operating system must save, xgetbv.
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::avx512:
      return runs_here(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
    default: return false;
#endif
  }
  return false;
}

Isa parse(const std::string& name) {
  std::string names;
  for (const Isa isa : all) {
    if (name == to_string(isa)) {
      if (runs_here(isa)) return isa;
      throw std::invalid_argument("instruction set " + name +
                                  " was not built or does not run on this processor, which has " +
                                  to_string(detected_isa()));
    }
    names += std::string(names.empty() ? "" : ", ") + to_string(isa);
  }
  throw std::invalid_argument("unknown instruction set \"" + name + "\", expected one of " + names);
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa = [] {
    const char* name = std::getenv("PYINVOLUTION_ISA");
    return name != nullptr && *name != 0 ? parse(name) : detected_isa();
  }();
  return isa;
}

}  // namespace

const char* to_string(Isa isa) {
  switch (isa) {
    case Isa::baseline: return "baseline";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
  }
  return "unknown";
}

Isa detected_isa() {
  static const Isa best = [] {
    Isa found = Isa::baseline;
    for (const Isa isa : all)
      if (runs_here(isa)) found = isa;
    return found;
  }();
  return best;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa isa : all)
    if (runs_here(isa)) names.emplace_back(to_string(isa));
  return names;
}

Isa current_isa() { return current().load(std::memory_order_relaxed); }

void override_isa(const std::string& name) { current() = name.empty() ? detected_isa() : parse(name); }

}  // namespace pyinvolution
