// The CPU variants with every instruction set of this machine: each pass, dtype and layout, odd shapes, special values,
// and the span involution against the composition in double.
#include "../../cpp/core/cpu.h"

#include "../../cpp/core/isa.h"

#include "span_oracle.h"

namespace {

struct Named {
  const char* name;
  decltype(&cpu::columns_refusal) refusal;
  decltype(&cpu::columns_run) run;
};
constexpr Named variants_here[] = {
    {"channels", cpu::channels_refusal, cpu::channels_run},
    {"columns", cpu::columns_refusal, cpu::columns_run},
    {"scalar", cpu::scalar_refusal, cpu::scalar_run},
};

int run_and_check(const Trial& trial, const Named& variant, uint64_t seed = 1) {
  Setting setting(trial, Device::cpu, seed);
  if (variant.refusal(setting.problem, trial.pass) != nullptr || setting.written().count() == 0) return 0;
  variant.run(setting.problem, trial.pass, setting.buffers(), seed % 2 == 0 ? two_threads : Execution{});
  setting.check();
  return 1;
}

// Shapes of 8 and more channels a group, whose rows fit tiles in every way.
std::vector<Case> wide_cases() {
  return {{1, 32, 2, 9, 11, 7, 7, 1, 1, 3, 3},  {1, 32, 2, 10, 9, 7, 7, 2, 2, 3, 3},
          {2, 16, 1, 7, 9, 3, 3, 1, 1, 1, 1},   {1, 16, 1, 13, 6, 5, 5, 2, 1, 2, 2},
          {1, 24, 2, 6, 5, 2, 4, 1, 1, 0, 1},   {1, 40, 1, 9, 9, 3, 3, 1, 2, 2, 3, 2, 3},
          {1, 16, 1, 3, 130, 1, 3, 1, 1, 0, 1}, {1, 16, 1, 3, 260, 3, 7, 1, 2, 1, 3},
          {1, 8, 1, 4, 4, 9, 9, 1, 1, 4, 4},    {1, 16, 1, 3, 3, 3, 3, 7, 9, 30, 30, 25, 25},
          {1, 9, 1, 5, 230, 3, 3, 1, 1, 1, 1},  {2, 33, 3, 14, 14, 5, 5, 1, 1, 2, 2}};
}

void involution() {
  for (const Named& variant : variants_here) {
    int ran = 0;
    std::vector<Case> cases = basic_cases();
    for (const Case& shape : wide_cases()) cases.push_back(shape);
    for (const Case& shape : random_cases(40, 7)) cases.push_back(shape);
    uint64_t seed = 0;
    for (const Case& shape : cases)
      for (const Pass pass : passes) {
        ++seed;
        ran += run_and_check({shape, layouts[seed % 4], dtypes[seed / 4 % 4], pass}, variant, seed);
        ran += run_and_check({shape, layouts[(seed + 1) % 4], DType::f32, pass}, variant, seed);
      }
    for (const Case& shape : wide_cases())
      for (const Layout layout : layouts)
        for (const DType dtype : dtypes) ran += run_and_check({shape, layout, dtype, Pass::forward}, variant, ++seed);
    for (const Case& shape : {Case{1, 16, 2, 8, 9, 3, 3, 1, 1, 1, 1}, Case{1, 16, 1, 9, 9, 5, 5, 2, 2, 2, 2}})
      for (const Layout layout : {Layout::contiguous, Layout::channels_last})
        for (const Pass pass : passes)
          for (seed = 1; seed <= 4; ++seed)
            ran += run_and_check({shape, layout, DType::f32, pass, Values::special}, variant, seed);
    CHECK(ran > 0, std::string(variant.name) + " ran nothing");
  }
}

// --- span ------------------------------------------------------------------------------------------------------------

void span_involution() {
  int index = 0;
  for (const Case& shape : wide_cases())
    for (const Layout layout : layouts)
      for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
        ++index;
        span_case(shape, 1 + index % 19, dtype, layout, index % 2 == 0, index % 3 == 0 ? two_threads : Execution{});
      }
}

}  // namespace

int main() {
  for (const std::string& isa : available_isas()) {
    override_isa(isa);
    involution();
    span_involution();
    std::printf("%s: %d checks so far\n", isa.c_str(), checks::passed + checks::failed);
  }
  return checks::report("cpu");
}
