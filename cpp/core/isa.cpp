#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pyinvolution {
namespace {

#if defined(__x86_64__)
// Clang before 19 does not know this name in __builtin_cpu_supports. It says nothing of the operating system, as AVX2 does.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

struct Row {
  Isa isa;
  const char* name;
  bool (*runs_here)();
};

constexpr Row all[] = {
#define PYINVOLUTION_ROW(name, runs_here) {Isa::name, #name, [] { return bool(runs_here); }},
    PYINVOLUTION_ISAS(PYINVOLUTION_ROW)
#undef PYINVOLUTION_ROW
};

Isa parse(const std::string& name) {
  std::string names;
  for (const Row& row : all) {
    if (name == row.name) {
      if (row.runs_here()) return row.isa;
      throw std::invalid_argument("instruction set " + name + " does not run on this processor, which has " +
                                  to_string(detected_isa()));
    }
    names += std::string(names.empty() ? "" : ", ") + row.name;
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
  for (const Row& row : all)
    if (row.isa == isa) return row.name;
  return "unknown";
}

Isa detected_isa() {
  static const Isa best = [] {
    Isa found = Isa::baseline;
    for (const Row& row : all)
      if (row.runs_here()) found = row.isa;
    return found;
  }();
  return best;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Row& row : all)
    if (row.runs_here()) names.emplace_back(row.name);
  return names;
}

Isa current_isa() { return current().load(std::memory_order_relaxed); }

void override_isa(const std::string& name) { current() = name.empty() ? detected_isa() : parse(name); }

}  // namespace pyinvolution
