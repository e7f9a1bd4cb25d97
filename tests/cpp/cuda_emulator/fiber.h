// Stacks that the one thread of the emulator jumps between: a few instructions on x86-64, ucontext elsewhere.
#pragma once

#include <cstddef>

namespace emulator {

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  ~Fiber();

  // Makes the next `enter` call `body`, which leaves for good by `finish`.
  void start(void (*body)());
  // From the scheduler into the fiber, until it calls `leave` or `finish`.
  void enter();
  // From the fiber back into the scheduler.
  void leave();
  [[noreturn]] void finish();

 private:
  void switch_back(bool for_good);

  char* stack_ = nullptr;
  void* context_ = nullptr;
  void* fake_stack_ = nullptr;
};

}  // namespace emulator
