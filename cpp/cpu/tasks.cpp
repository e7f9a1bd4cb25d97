#include "cpu/tasks.h"

#include <cstdlib>
#include <new>

#include "cpu/arithmetic.h"

namespace pyinvolution::cpu {

void* scratch(int64_t bytes, Scratch use) {
  struct Block {
    void* memory = nullptr;
    int64_t size = 0;
    ~Block() { std::free(memory); }
  };
  thread_local Block blocks[2];
  Block& block = blocks[int(use)];
  if (block.size < bytes) {
    std::free(block.memory);
    block.size = 0;
    const int64_t rounded = round_up(bytes, 4096);
    block.memory = std::aligned_alloc(64, rounded);
    if (block.memory == nullptr) throw std::bad_alloc();
    block.size = rounded;
  }
  return block.memory;
}

}  // namespace pyinvolution::cpu
