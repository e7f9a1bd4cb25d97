// What the variants' `run` functions share: how work is split into tasks, and the memory of tasks.
#pragma once

#include <cstdint>

#include "core/parallel.h"

namespace pyinvolution::cpu {

// More tasks than threads, so that a thread that is late holds up little.
constexpr int64_t tasks_per_thread = 4;

// Below this many multiply-adds, waking the other threads takes longer than they save: then the calling thread only.
constexpr double min_parallel_work = 1 << 18;
inline Execution execution_for(double multiply_adds, const Execution& execution) {
  return multiply_adds < min_parallel_work ? Execution{} : execution;
}

// A thread's scratch memory of at least `bytes`, aligned to 64 bytes; the next call of the same thread reuses it.
// `task` is what tasks use, `call` what lives as long as an operator's call. Throws std::bad_alloc.
enum class Scratch { task, call };
void* scratch(int64_t bytes, Scratch = Scratch::task);

}  // namespace pyinvolution::cpu
