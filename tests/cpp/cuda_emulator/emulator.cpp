#include "emulator.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>

#include "fiber.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#endif

namespace emulator {
namespace {

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool valid;
  Site site;
};

struct Thread {
  Fiber fiber;
  std::vector<std::vector<Copy>> copy_groups;  // committed, oldest first
  std::vector<Copy> copies;                    // not yet committed
  const char* waits_in = nullptr;
  Site waits_at{"", 0};
};

// A warp operation that some of its lanes have reached.
struct Meeting {
  const char* operation;
  Site site;
  uint32_t mask, arrived;
  void* arguments[32];
};

struct Warp {
  uint32_t present = 0, runnable = 0, finished = 0;
  std::vector<Meeting> meetings;
};

struct Arena {
  char *memory, *end;
  Arena() {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    const size_t bytes = (max_shared_bytes + page - 1) / page * page;
    void* mapped = mmap(nullptr, bytes + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    memory = static_cast<char*>(mapped) + page;
    end = memory + bytes;
    mprotect(mapped, page, PROT_NONE);
    mprotect(end, page, PROT_NONE);
  }
};

struct Block {
  std::vector<std::unique_ptr<Thread>> pool;  // stacks are kept between launches
  int threads = 0, finished = 0, current = -1;
  Warp warps[max_threads / 32];
  int warp_order[max_threads / 32];
  int warp_count = 0;

  int waiting = 0, votes = 0, result = 0;
  Site barrier{"", 0};

  char* shared = nullptr;
  int shared_bytes = 0;
  const std::function<void()>* kernel = nullptr;
  std::string error;
  std::mt19937_64 random;

  Thread& thread() { return *pool[size_t(current)]; }
  Warp& warp() { return warps[current / 32]; }
  uint32_t bit() const { return 1u << (current % 32); }
};

Block& block() {
  static Block state;
  return state;
}

std::vector<Site>& sites() {
  static std::vector<Site> seen;
  return seen;
}

std::string name_of_thread(int thread) {
  return "block " + std::to_string(blockIdx.x) + " thread " + std::to_string(thread);
}

void shuffle_warps() {
  Block& b = block();
  std::shuffle(b.warp_order, b.warp_order + b.warp_count, b.random);
}

void wait(const char* operation, Site site) {
  Block& b = block();
  Thread& self = b.thread();
  self.waits_in = operation;
  self.waits_at = site;
  self.fiber.leave();
}

int lowest_bit(uint32_t mask) { return __builtin_ctz(mask); }
int highest_bit(uint32_t mask) { return 31 - __builtin_clz(mask); }

// The next thread to run, or -1.
int choose() {
  Block& b = block();
  switch (options().schedule) {
    case Schedule::ascending:
      for (int w = 0; w < b.warp_count; ++w)
        if (b.warps[w].runnable != 0) return w * 32 + lowest_bit(b.warps[w].runnable);
      return -1;
    case Schedule::descending:
      for (int w = b.warp_count - 1; w >= 0; --w)
        if (b.warps[w].runnable != 0) return w * 32 + highest_bit(b.warps[w].runnable);
      return -1;
    case Schedule::random: {
      const int first = int(b.random() % uint64_t(b.warp_count));
      for (int i = 0; i < b.warp_count; ++i) {
        const int w = (first + i) % b.warp_count;
        uint32_t mask = b.warps[w].runnable;
        if (mask == 0) continue;
        for (auto skip = b.random() % uint64_t(__builtin_popcount(mask)); skip > 0; --skip) mask &= mask - 1;
        return w * 32 + lowest_bit(mask);
      }
      return -1;
    }
    case Schedule::random_warps:
      for (int i = 0; i < b.warp_count; ++i) {
        const Warp& warp = b.warps[b.warp_order[i]];
        if (warp.runnable != 0) return b.warp_order[i] * 32 + lowest_bit(warp.runnable);
      }
      return -1;
  }
  return -1;
}

void thread_main() {
  Block& b = block();
  try {
    (*b.kernel)();
  } catch (const std::exception& exception) {
    if (b.error.empty()) b.error = name_of_thread(b.current) + ": " + exception.what();
  }
  Thread& self = b.thread();
  const auto complain = [&](const std::string& message) {
    if (b.error.empty()) b.error = name_of_thread(b.current) + ": " + message;
  };
  const bool under_way =
      std::any_of(self.copy_groups.begin(), self.copy_groups.end(), [](const auto& group) { return !group.empty(); });
  if (!self.copies.empty() || under_way) complain("left with asynchronous copies that it did not wait for");
  if (b.waiting > 0) complain("left while others wait at __syncthreads " + b.barrier.text());
  for (const Meeting& meeting : b.warp().meetings)
    if (meeting.mask & b.bit())
      complain("left while others wait for it in " + std::string(meeting.operation) + " " + meeting.site.text());
  b.warp().runnable &= ~b.bit();
  b.warp().finished |= b.bit();
  ++b.finished;
  self.fiber.finish();
}

std::string deadlock() {
  Block& b = block();
  std::string text = "deadlock:";
  int named = 0;
  for (int t = 0; t < b.threads && named < 4; ++t) {
    if (b.warps[t / 32].finished >> (t % 32) & 1) continue;
    const Thread& thread = *b.pool[size_t(t)];
    const bool same = t > 0 && thread.waits_at == b.pool[size_t(t) - 1]->waits_at && named > 0;
    if (same) continue;
    text += " thread " + std::to_string(t) + " waits in " + (thread.waits_in ? thread.waits_in : "nothing") + " " +
            thread.waits_at.text() + ";";
    ++named;
  }
  return text;
}

void run_block(int threads) {
  Block& b = block();
  b.threads = threads;
  b.finished = 0;
  b.waiting = b.votes = 0;
  b.warp_count = (threads + 31) / 32;
  for (int w = 0; w < b.warp_count; ++w) {
    const int lanes = std::min(32, threads - 32 * w);
    b.warps[w].present = b.warps[w].runnable = lanes == 32 ? ~0u : (1u << lanes) - 1;
    b.warps[w].finished = 0;
    b.warps[w].meetings.clear();
    b.warp_order[w] = w;
  }
  shuffle_warps();
  std::memset(b.shared, 0xff, size_t(b.shared_bytes));
  for (int t = 0; t < threads; ++t) {
    if (b.pool.size() <= size_t(t)) b.pool.push_back(std::make_unique<Thread>());
    Thread& thread = *b.pool[size_t(t)];
    thread.copies.clear();
    thread.copy_groups.clear();
    thread.waits_in = nullptr;
    thread.fiber.start(thread_main);
  }
  ++statistics().blocks;
  while (b.finished < threads && b.error.empty()) {
    b.current = choose();
    if (b.current < 0) {
      b.error = "block " + std::to_string(blockIdx.x) + ": " + deadlock();
      break;
    }
    threadIdx = {unsigned(b.current), 0, 0};
    ++statistics().switches;
    b.thread().fiber.enter();
  }
}

template <class Argument>
Argument& as(void* argument) {
  return *static_cast<Argument*>(argument);
}

bool in_shared(const void* address, int bytes) {
  const Block& b = block();
  const char* at = static_cast<const char*>(address);
  return at >= b.shared && at + bytes <= b.shared + b.shared_bytes;
}

std::string hex(const void* address) {
  char text[32];
  std::snprintf(text, sizeof text, "%p", address);
  return text;
}

void arrive(const Copy& copy) {
  if (copy.valid) {
    std::memcpy(copy.to, copy.from, size_t(copy.bytes));
  } else {
    std::memset(copy.to, 0, size_t(copy.bytes));
  }
}

}  // namespace

const char* to_string(Schedule schedule) {
  switch (schedule) {
    case Schedule::ascending: return "ascending";
    case Schedule::descending: return "descending";
    case Schedule::random: return "random";
    case Schedule::random_warps: return "random warps";
  }
  return "unknown";
}

std::string Site::text() const {
  const char* name = std::strrchr(file, '/');
  return std::string("(") + (name ? name + 1 : file) + ":" + std::to_string(line) + ")";
}

Options& options() {
  static Options state;
  return state;
}

Statistics& statistics() {
  static Statistics state;
  return state;
}

const std::vector<Site>& sync_sites() { return sites(); }

void forget_statistics() {
  statistics() = {};
  sites().clear();
}

void launch(const char* what, int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel) {
  const auto refuse = [what](const std::string& text) { throw std::runtime_error(std::string(what) + ": " + text); };
  if (blocks < 1 || blocks > INT32_MAX) refuse("invalid grid of " + std::to_string(blocks) + " blocks");
  if (threads < 1 || threads > max_threads) refuse("invalid block of " + std::to_string(threads) + " threads");
  if (shared_bytes < 0 || shared_bytes > max_shared_bytes)
    refuse("invalid shared memory of " + std::to_string(shared_bytes) + " bytes");

  static Arena arena;
  Block& b = block();
  constexpr int alignment = 1024;
  ASAN_UNPOISON_MEMORY_REGION(arena.memory, arena.end - arena.memory);
  b.shared = arena.end - (shared_bytes + alignment - 1) / alignment * alignment;
  b.shared_bytes = shared_bytes;
  ASAN_POISON_MEMORY_REGION(arena.memory, b.shared - arena.memory);
  ASAN_POISON_MEMORY_REGION(b.shared + shared_bytes, arena.end - b.shared - shared_bytes);
  b.kernel = &kernel;
  b.error.clear();
  b.random.seed(options().seed);
  blockDim = {unsigned(threads), 1, 1};
  gridDim = {unsigned(blocks), 1, 1};

  std::vector<unsigned> order(static_cast<size_t>(blocks));
  for (size_t i = 0; i < order.size(); ++i) order[i] = unsigned(i);
  if (options().schedule == Schedule::descending) std::reverse(order.begin(), order.end());
  if (options().schedule == Schedule::random || options().schedule == Schedule::random_warps)
    std::shuffle(order.begin(), order.end(), b.random);
  for (const unsigned index : order) {
    blockIdx = {index, 0, 0};
    run_block(threads);
    if (!b.error.empty()) refuse(b.error);
  }
}

void fail(const std::string& message, Site site) { throw std::runtime_error(message + " " + site.text()); }

char* shared_memory() { return block().shared; }
int lane() { return block().current % 32; }

bool is_dropped(Site site) {
  auto& seen = sites();
  const auto found = std::find(seen.begin(), seen.end(), site);
  const int index = int(found - seen.begin());
  if (found == seen.end()) seen.push_back(site);
  return index == options().dropped_sync;
}

int sync_threads(bool value, Site site) {
  Block& b = block();
  if (b.finished > 0) fail("__syncthreads after a thread of the block has left", site);
  if (b.waiting == 0) {
    b.barrier = site;
    b.votes = 0;
  } else if (!(b.barrier == site)) {
    fail("__syncthreads while others wait at another one " + b.barrier.text(), site);
  }
  b.votes += value;
  if (++b.waiting == b.threads) {
    b.waiting = 0;
    b.result = b.votes;
    for (int w = 0; w < b.warp_count; ++w) b.warps[w].runnable = b.warps[w].present;
    shuffle_warps();
    // Go back to the scheduler, or the last one to arrive would always be the first one to go on.
    wait("__syncthreads", site);
  } else {
    b.warp().runnable &= ~b.bit();
    wait("__syncthreads", site);
  }
  return b.result;
}

void rendezvous(const char* operation, uint32_t mask, void* argument, Combine combine, Site site) {
  Block& b = block();
  Warp& warp = b.warp();
  if ((mask & b.bit()) == 0) fail(std::string(operation) + " by a lane that its mask does not name", site);
  if (mask & ~warp.present) fail(std::string(operation) + " with lanes in its mask that the block does not have", site);
  if (mask & warp.finished) fail(std::string(operation) + " with lanes in its mask that have left", site);
  auto meeting =
      std::find_if(warp.meetings.begin(), warp.meetings.end(), [=](const Meeting& m) { return m.mask == mask; });
  if (meeting == warp.meetings.end()) {
    warp.meetings.push_back({operation, site, mask, 0, {}});
    meeting = warp.meetings.end() - 1;
  } else if (std::strcmp(meeting->operation, operation) != 0 || !(meeting->site == site)) {
    fail(std::string(operation) + " while lanes of the warp wait in " + meeting->operation + " " + meeting->site.text(),
         site);
  }
  meeting->arrived |= b.bit();
  meeting->arguments[lane()] = argument;
  if (meeting->arrived == mask) {
    if (combine != nullptr) combine(meeting->arguments, mask, site);
    warp.meetings.erase(meeting);
    warp.runnable |= mask;
  } else {
    warp.runnable &= ~b.bit();
  }
  wait(operation, site);
}

void shuffle(const char* operation, uint32_t mask, Shuffle& exchange, Site site) {
  rendezvous(
      operation, mask, &exchange,
      [](void* const(&arguments)[32], uint32_t lanes, Site at) {
        for (int i = 0; i < 32; ++i) {
          if ((lanes >> i & 1) == 0) continue;
          Shuffle& mine = as<Shuffle>(arguments[i]);
          if ((lanes >> mine.source & 1) == 0) fail("shuffle from a lane that the mask does not name", at);
          mine.result = as<Shuffle>(arguments[mine.source]).value;
        }
      },
      site);
}

uint32_t ballot(const char* operation, uint32_t mask, bool value, Site site) {
  Shuffle vote{value, 0, 0};
  rendezvous(
      operation, mask, &vote,
      [](void* const(&arguments)[32], uint32_t lanes, Site) {
        uint32_t result = 0;
        for (int i = 0; i < 32; ++i)
          if (lanes >> i & 1 && as<Shuffle>(arguments[i]).value) result |= 1u << i;
        for (int i = 0; i < 32; ++i)
          if (lanes >> i & 1) as<Shuffle>(arguments[i]).result = result;
      },
      site);
  return uint32_t(vote.result);
}

void copy_async(void* shared, const void* global, int bytes, bool valid, Site site) {
  if (bytes != 4 && bytes != 8 && bytes != 16)
    fail("an asynchronous copy of " + std::to_string(bytes) + " bytes", site);
  if (!in_shared(shared, bytes)) fail("an asynchronous copy to " + hex(shared) + ", not in shared memory", site);
  if (reinterpret_cast<uintptr_t>(shared) % size_t(bytes) || reinterpret_cast<uintptr_t>(global) % size_t(bytes))
    fail("a misaligned asynchronous copy", site);
  const Copy copy{shared, global, bytes, valid, site};
  arrive(copy);  // reads the source here, where the sanitizer can name the kernel's line
  std::memset(shared, 0xff, size_t(bytes));
  block().thread().copies.push_back(copy);
}

void commit_copies() {
  Thread& self = block().thread();
  self.copy_groups.push_back(std::move(self.copies));
  self.copies.clear();
}

void wait_for_copies(int groups_left) {
  Thread& self = block().thread();
  while (int(self.copy_groups.size()) > groups_left) {
    for (const Copy& copy : self.copy_groups.front()) arrive(copy);
    self.copy_groups.erase(self.copy_groups.begin());
  }
}

namespace {

struct MatrixLoad {
  uint16_t row[8];  // read when its own lane arrives: later another lane may have overwritten it
  uintptr_t address;
  uint32_t* registers;
  int matrices;
  bool transposed;
};

void distribute(void* const (&arguments)[32], uint32_t, Site) {
  const int matrices = as<MatrixLoad>(arguments[0]).matrices;
  const bool transposed = as<MatrixLoad>(arguments[0]).transposed;
  for (int m = 0; m < matrices; ++m) {
    int rows_in_bank[8] = {};
    for (int r = 0; r < 8; ++r) {
      const uintptr_t address = as<MatrixLoad>(arguments[8 * m + r]).address;
      bool repeated = false;
      for (int earlier = 0; earlier < r; ++earlier)
        repeated |= as<MatrixLoad>(arguments[8 * m + earlier]).address == address;
      if (!repeated) ++rows_in_bank[address / 16 % 8];
    }
    statistics().bank_conflicts += std::max(1, *std::max_element(rows_in_bank, rows_in_bank + 8)) - 1;
    ++statistics().matrix_loads;
    for (int l = 0; l < 32; ++l) {
      uint32_t pair = 0;
      for (int e = 0; e < 2; ++e) {
        const int along = l / 4, across = 2 * (l % 4) + e;
        const MatrixLoad& source = as<MatrixLoad>(arguments[8 * m + (transposed ? across : along)]);
        pair |= uint32_t{source.row[transposed ? along : across]} << 16 * e;
      }
      as<MatrixLoad>(arguments[l]).registers[m] = pair;
    }
  }
}

}  // namespace

void load_matrices(uint32_t* registers, int matrices, bool transposed, const void* row, Site site) {
  MatrixLoad load{{}, reinterpret_cast<uintptr_t>(row), registers, matrices, transposed};
  if (lane() < 8 * matrices) {
    if (!in_shared(row, 16)) fail("ldmatrix of a row at " + hex(row) + ", not in shared memory", site);
    if (load.address % 16) fail("ldmatrix of a misaligned row", site);
    std::memcpy(load.row, row, 16);
  }
  rendezvous("ldmatrix", ~0u, &load, distribute, site);
}

uint32_t transpose_matrix(uint32_t value, Site site) {
  Shuffle exchange{value, 0, 0};
  rendezvous(
      "movmatrix", ~0u, &exchange,
      [](void* const(&arguments)[32], uint32_t, Site) {
        const auto element = [&](int row, int column) {
          return uint32_t(as<Shuffle>(arguments[4 * row + column / 2]).value >> 16 * (column % 2) & 0xffff);
        };
        for (int l = 0; l < 32; ++l) {
          const int row = l / 4, column = 2 * (l % 4);
          as<Shuffle>(arguments[l]).result = element(column, row) | element(column + 1, row) << 16;
        }
      },
      site);
  return uint32_t(exchange.result);
}

void multiply(Mma& operands, Site site) {
  const auto combine = [](void* const(&arguments)[32], uint32_t, Site) {
    const int depth = as<Mma>(arguments[0]).depth;
    const auto half = [&](uint32_t pair, int element) {
      return as<Mma>(arguments[0]).value(uint16_t(pair >> 16 * element));
    };
    float a[16][16], b[16][8];
    for (int l = 0; l < 32; ++l) {
      const Mma& lane = as<Mma>(arguments[l]);
      const int row = l / 4, pair = 2 * (l % 4);
      for (int e = 0; e < 2; ++e)
        for (int k = 0; k < depth; k += 8) {
          a[row][k + pair + e] = half(lane.a[k / 4], e);
          a[row + 8][k + pair + e] = half(lane.a[k / 4 + 1], e);
          b[k + pair + e][row] = half(lane.b[k / 8], e);
        }
    }
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + (i / 2) * 8, column = 2 * (l % 4) + i % 2;
        float sum = as<Mma>(arguments[l]).d[i];
        for (int k = 0; k < depth; ++k) sum += a[row][k] * b[k][column];
        as<Mma>(arguments[l]).d[i] = sum;
      }
  };
  rendezvous(operands.depth == 16 ? "mma.m16n8k16" : "mma.m16n8k8", ~0u, &operands, combine, site);
}

}  // namespace emulator
