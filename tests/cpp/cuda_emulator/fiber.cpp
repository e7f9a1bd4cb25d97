#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATOR_ASAN 1
#endif
#endif

#ifdef EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_UCONTEXT 1
#endif
#ifdef EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

namespace emulator {
namespace {

constexpr size_t stack_bytes = 256 * 1024;
size_t page_bytes() { return size_t(sysconf(_SC_PAGESIZE)); }

// The stack of the scheduler, which AddressSanitizer wants to know when a fiber goes back to it.
#ifdef EMULATOR_ASAN
const void* scheduler_bottom = nullptr;
size_t scheduler_bytes = 0;
#endif

void before_switch([[maybe_unused]] void** save, [[maybe_unused]] const void* bottom, [[maybe_unused]] size_t bytes) {
#ifdef EMULATOR_ASAN
  __sanitizer_start_switch_fiber(save, bottom, bytes);
#endif
}
void arrived_in_scheduler([[maybe_unused]] void* saved) {
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(saved, nullptr, nullptr);
#endif
}
void arrived_in_fiber([[maybe_unused]] void* saved) {
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(saved, &scheduler_bottom, &scheduler_bytes);
#endif
}

void (*entry_body)() = nullptr;

#if defined(__has_attribute) && __has_attribute(no_sanitize_address)
__attribute__((no_sanitize_address))
#endif
void enter_body() {
  arrived_in_fiber(nullptr);
  entry_body();
  std::abort();  // bodies end in `finish`
}

#ifdef EMULATOR_UCONTEXT
ucontext_t scheduler_context;
#else
void* scheduler_context = nullptr;
#endif

}  // namespace

#ifndef EMULATOR_UCONTEXT
extern "C" void pyinvolution_emulator_switch(void** from, void* to);
// Saves what the calling convention keeps, changes the stack, restores it. Floating-point modes are nobody's business
// here.
asm(R"(
.text
.globl pyinvolution_emulator_switch
.hidden pyinvolution_emulator_switch
.type pyinvolution_emulator_switch, @function
pyinvolution_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pyinvolution_emulator_switch, .-pyinvolution_emulator_switch
)");
#endif

Fiber::~Fiber() {
  if (stack_ != nullptr) munmap(stack_ - page_bytes(), stack_bytes + page_bytes());
#ifdef EMULATOR_UCONTEXT
  delete static_cast<ucontext_t*>(context_);
#endif
}

void Fiber::start(void (*body)()) {
  if (stack_ == nullptr) {
    void* memory = mmap(nullptr, stack_bytes + page_bytes(), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, page_bytes(), PROT_NONE);
    stack_ = static_cast<char*>(memory) + page_bytes();
  }
#ifdef EMULATOR_ASAN
  // A kernel that failed never returned from its frames. Most of them lie near the top.
  __asan_unpoison_memory_region(stack_ + stack_bytes - 16 * 1024, 16 * 1024);
#endif
  entry_body = body;
  fake_stack_ = nullptr;
#ifdef EMULATOR_UCONTEXT
  if (context_ == nullptr) context_ = new ucontext_t;
  ucontext_t& context = *static_cast<ucontext_t*>(context_);
  getcontext(&context);
  context.uc_stack.ss_sp = stack_;
  context.uc_stack.ss_size = stack_bytes;
  context.uc_link = nullptr;
  makecontext(&context, enter_body, 0);
#else
  // Six registers, the address to return to, and a zero so that the stack is aligned as after a call.
  void** top = reinterpret_cast<void**>(stack_ + stack_bytes) - 2;
  *top = reinterpret_cast<void*>(enter_body);
  top[1] = nullptr;
  for (int i = 1; i <= 6; ++i) top[-i] = nullptr;
  context_ = top - 6;
#endif
}

void Fiber::enter() {
  void* saved = nullptr;
  before_switch(&saved, stack_, stack_bytes);
#ifdef EMULATOR_UCONTEXT
  swapcontext(&scheduler_context, static_cast<ucontext_t*>(context_));
#else
  pyinvolution_emulator_switch(&scheduler_context, context_);
#endif
  arrived_in_scheduler(saved);
}

void Fiber::switch_back(bool for_good) {
#ifdef EMULATOR_ASAN
  before_switch(for_good ? nullptr : &fake_stack_, scheduler_bottom, scheduler_bytes);
#else
  (void)for_good;
#endif
#ifdef EMULATOR_UCONTEXT
  swapcontext(static_cast<ucontext_t*>(context_), &scheduler_context);
#else
  pyinvolution_emulator_switch(&context_, scheduler_context);
#endif
}

void Fiber::leave() {
  switch_back(false);
  arrived_in_fiber(fake_stack_);
}

void Fiber::finish() {
  switch_back(true);
  std::abort();
}

}  // namespace emulator
