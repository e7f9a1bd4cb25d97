#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

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

// The same for two rounds in one parallel region: a task of the second round starts when the whole first round is done.
// Threads take the next task in turn, so a task of the second round can only wait for tasks that are already running.
template <class First, class Second>
void for_each_task(const Execution& execution, int64_t first, const First& body, int64_t second, const Second& then) {
  if (first == 0) return for_each_task(execution, second, then);
  std::atomic<int64_t> next{0}, done{0};
  struct Finished {  // also where a task throws
    std::atomic<int64_t>& count;
    ~Finished() { count.fetch_add(1, std::memory_order_release); }
  };
  for_each_task(execution, execution.threads, [&](int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < first + second;) {
      if (task < first) {
        const Finished finished{done};
        body(task);
        continue;
      }
      while (done.load(std::memory_order_acquire) < first) std::this_thread::yield();
      then(task - first);
    }
  });
}

}  // namespace
}  // namespace pyinvolution
