#include "cpu/tasks.h"

#include <cstddef>
#include <new>

#include "cpu/arithmetic.h"

namespace pyinvolution::cpu {

// Of scratch memory: a line of cache. operator new has aligned memory on Windows too, std::aligned_alloc does not.
constexpr std::align_val_t alignment{64};

void* scratch(int64_t bytes, Scratch use) {
  struct Block {
    void* memory = nullptr;
    int64_t size = 0;
    void release() {
      operator delete(memory, alignment);
      memory = nullptr;
      size = 0;
    }
    ~Block() { release(); }
  };
  thread_local Block blocks[2];
  Block& block = blocks[int(use)];
  if (block.size < bytes) {
    block.release();
    const int64_t rounded = round_up(bytes, 4096);
    block.memory = operator new(size_t(rounded), alignment);
    block.size = rounded;
  }
  return block.memory;
}

}  // namespace pyinvolution::cpu
