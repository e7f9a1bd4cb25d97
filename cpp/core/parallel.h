#pragma once

#include <cstdint>

#include "pyinvolution/problem.h"

namespace pyinvolution {
namespace {

// Runs `body(task)` for each task in [0, tasks), spread over the threads of `execution` in one parallel region.
template <class Body>
void for_each_task(const Execution& execution, int64_t tasks, const Body& body) {
  const auto range = [](int64_t begin, int64_t end, void* state) {
    const Body& each = *static_cast<const Body*>(state);
    for (int64_t task = begin; task < end; ++task) each(task);
  };
  void* state = const_cast<void*>(static_cast<const void*>(&body));
  if (execution.parallel_for == nullptr || execution.threads <= 1) {
    range(0, tasks, state);
  } else {
    execution.parallel_for(0, tasks, 1, range, state);
  }
}

}  // namespace
}  // namespace pyinvolution
