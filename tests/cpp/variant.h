// What the tests of a CUDA variant in the emulator have in common.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "cuda_emulator/emulator.h"
#include "oracle.h"

namespace {

struct CudaVariant {
  Refusal (*refusal)(const Problem&, Pass);
  void (*run)(const Problem&, Pass, const Buffers&, const Execution&);
};

// The bytes of the result, which is right.
inline std::vector<char> run_and_check(const CudaVariant& variant, const Trial& trial, const Strides& strides,
                                       uint64_t seed = 1) {
  Setting setting(trial, Device::cuda, seed, strides);
  const std::string refusal = variant.refusal(setting.problem, trial.pass).text();
  if (!CHECK(refusal.empty(), trial.text() + ": refused, " + refusal)) return {};
  const std::string error =
      checks::message_of([&] { variant.run(setting.problem, trial.pass, setting.buffers(), {}); });
  if (CHECK(error.empty(), trial.text() + ": " + error)) setting.check();
  return setting.written().bytes();
}

// Every schedule gives the same bits, matrices are loaded without bank conflicts, and a synchronisation that is removed
// is missed by some schedule.
inline void check_schedules(const CudaVariant& variant, const Trial& trial, const Strides& strides) {
  emulator::options() = {};
  emulator::forget_statistics();
  const std::vector<char> right = run_and_check(variant, trial, strides);
  const int64_t conflicts = emulator::statistics().bank_conflicts;
  CHECK(conflicts == 0, trial.text() + ": matrix loads have " + std::to_string(conflicts) + " bank conflicts");
  for (const emulator::Schedule schedule : emulator::schedules) {
    emulator::options() = {schedule, 3, -1};
    CHECK(run_and_check(variant, trial, strides) == right,
          trial.text() + ": other bits in the schedule " + emulator::to_string(schedule));
  }
  const auto sites = emulator::sync_sites();
  for (size_t dropped = 0; dropped < sites.size(); ++dropped) {
    bool caught = false;
    for (const emulator::Schedule schedule : emulator::schedules) {
      emulator::options() = {schedule, 3, int(dropped)};
      Setting setting(trial, Device::cuda, 1, strides);
      variant.run(setting.problem, trial.pass, setting.buffers(), {});
      caught = setting.written().bytes() != right;
      if (caught) break;
    }
    CHECK(caught, trial.text() + ": nobody missed the synchronisation at " + sites[dropped].text());
  }
  emulator::options() = {};
}

inline void check_refused(const CudaVariant& variant, const Case& shape, DType dtype, Layout layout, Pass pass,
                          const char* part) {
  const Problem problem = problem_of(shape, dtype, Device::cuda, strides_of(shape, layout, pass));
  const std::string refusal = variant.refusal(problem, pass).text();
  CHECK(refusal.find(part) != std::string::npos,
        std::string("expected a refusal with \"") + part + "\", got " + refusal);
}

// What variants for square kernels and dense rows refuse. `good` is what they take, `groups` a number they do not.
inline void check_usual_refusals(const CudaVariant& variant, const Case& good, DType dtype, int64_t groups) {
  const auto refused = [&](const std::function<void(Case&)>& change, const char* part, Pass pass = Pass::forward,
                           Layout layout = Layout::contiguous) {
    Case shape = good;
    change(shape);
    check_refused(variant, shape, dtype, layout, pass, part);
  };
  refused([](Case&) {}, "dense", Pass::forward, Layout::gapped);
  refused([](Case& k) { k.kw += 2; }, "got 3 x 5");
  refused([](Case& k) { k.kh = k.kw = 2; }, "7 x 7 kernel, got 2 x 2");
  refused([](Case& k) { k.dh = 2; }, "dilation");
  refused([](Case& k) { k.sh = k.sw = 3; }, "stride of 1 or 2");
  refused([&](Case& k) { k.g = groups; }, "channels per group, got");
  refused([](Case& k) { k.h = 2, k.ph = 0; }, "with pixels", Pass::grad_input);
  refused([](Case& k) { k.h = k.w = 40000; }, "32 bits");
}

}  // namespace
