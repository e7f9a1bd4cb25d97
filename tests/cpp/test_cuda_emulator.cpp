// The emulator itself: its primitives compute what the instructions compute, and it catches what a kernel can do wrong.
#include <sys/wait.h>
#include <unistd.h>

#include "../../cuda/division.cuh"
#include "../../cuda/launch.cuh"
#include "check.h"
#include "oracle.h"

namespace {

using namespace pyinvolution::cuda;
using emulator::Schedule;

void launch_test(int blocks, int threads, int shared_bytes, const std::function<void()>& kernel) {
  emulator::launch("test", blocks, threads, shared_bytes, kernel);
}
void expect_error(const char* part, int threads, int shared_bytes, const std::function<void()>& kernel) {
  const std::string message = checks::message_of([&] { launch_test(1, threads, shared_bytes, kernel); });
  CHECK(message.find(part) != std::string::npos, std::string("expected \"") + part + "\", got \"" + message + "\"");
}
// Whether `body` ends the process, as an access to foreign memory must.
bool dies(const std::function<void()>& body) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    if (std::freopen("/dev/null", "w", stderr) == nullptr) _exit(0);
    try {
      body();
    } catch (...) {
    }
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return !(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int element_bits(float value) {
  BFloat16 element;
  pyinvolution::store(value, &element);
  return element.bits;
}

void numbers() {
  // Every finite half and bfloat16 comes back from float, halves between neighbours go to the even one.
  bool exact = true, even = true;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const BFloat16 b{uint16_t(bits)};
    BFloat16 b_back;
    pyinvolution::store(pyinvolution::load(b), &b_back);
    if (std::isfinite(pyinvolution::load(b))) exact &= b_back.bits == b.bits;
    const pyinvolution::Half h{uint16_t(bits)};
    pyinvolution::Half h_back;
    pyinvolution::store(pyinvolution::load(h), &h_back);
    if (std::isfinite(pyinvolution::load(h))) exact &= h_back.bits == h.bits;
    if ((bits & 0x7fff) < 0x7bff) {
      const pyinvolution::Half next{uint16_t(bits + 1)};
      pyinvolution::store((pyinvolution::load(h) + pyinvolution::load(next)) / 2, &h_back);
      even &= h_back.bits == (bits & 1 ? bits + 1 : bits);
    }
  }
  CHECK(exact, "16-bit numbers come back from float");
  CHECK(even, "halfway rounds to even");
}

void indices_and_blocks() {
  std::vector<int> seen(5 * 48, 0);
  for (const Schedule schedule : emulator::schedules) {
    emulator::options().schedule = schedule;
    launch_test(5, 48, 0, [&] { ++seen[blockIdx.x * blockDim.x + threadIdx.x]; });
  }
  emulator::options() = {};
  CHECK(std::count(seen.begin(), seen.end(), 4) == 5 * 48, "each thread of each block runs once a launch");
}

void warp_operations() {
  bool right = true;
  launch_test(1, 64, 0, [&] {
    const int lane = int(threadIdx.x) % 32;
    right &= __shfl_sync(~0u, lane * 3, 7) == 21;
    right &= __shfl_sync(~0u, lane, 1, 8) == lane / 8 * 8 + 1;
    right &= __shfl_xor_sync(~0u, lane, 5) == (lane ^ 5);
    right &= __shfl_down_sync(~0u, float(lane), 4) == float(lane < 28 ? lane + 4 : lane);
    right &= __shfl_up_sync(~0u, double(lane), 4, 16) == double(lane % 16 < 4 ? lane : lane - 4);
    right &= __ballot_sync(~0u, lane % 3 == 0) == 0x49249249u;
    right &= __any_sync(~0u, lane == 9) && !__all_sync(~0u, lane == 9);
    right &= __byte_perm(0x33221100u, 0x77665544u, 0x7250) == 0x77225500u;
    if (lane < 16) right &= __shfl_xor_sync(0xffffu, lane, 1) == (lane ^ 1);
    right &= __syncthreads_count(threadIdx.x < 40) == 40;
  });
  CHECK(right, "shuffles, votes and byte_perm");
}

// What the manual says of matrices in registers (../ptx/fragments.inl).
struct Element {
  const char *instruction, *operand;
  size_t index, half;  // of the register
  int (*row)(int group, int thread);
  int (*column)(int group, int thread);
};
const Element elements[] = {
#define ELEMENT(instruction, operand, index, half, row, column)                 \
  {#instruction,                                                                \
   #operand,                                                                    \
   index,                                                                       \
   half,                                                                        \
   []([[maybe_unused]] int group, [[maybe_unused]] int thread) { return row; }, \
   []([[maybe_unused]] int group, [[maybe_unused]] int thread) { return column; }},
#include "../ptx/fragments.inl"
#undef ELEMENT
};

// Calls `body` with the place of each element of an operand in a lane's registers, and its row and column.
template <class Body>
void for_each_element(const std::string& instruction, const std::string& operand, int lane, const Body& body) {
  int found = 0;
  for (const Element& e : elements) {
    if (e.instruction != instruction || e.operand != operand) continue;
    body(e.index, e.half, e.row(lane / 4, lane % 4), e.column(lane / 4, lane % 4)), ++found;
  }
  CHECK(found > 0, "the table has rows for " + instruction + " " + operand);
}

// D = A * B + C with A, B and C put into registers as the table says.
void products() {
  for (const int depth : {16, 8}) {
    const std::string name = "m16n8k" + std::to_string(depth);
    float a[16][16], b[16][8], c[16][8];
    for (int i = 0; i < 16; ++i) {
      for (int k = 0; k < 16; ++k) a[i][k] = float((i * 7 + k * 3) % 11 - 5);
      for (int j = 0; j < 8; ++j) b[i][j] = float((i * 5 + j * 13) % 17 - 8), c[i][j] = float(i * 8 + j);
    }
    double worst = 0;
    launch_test(1, 32, 0, [&] {
      const int lane = int(threadIdx.x);
      uint32_t as[4] = {}, bs[2] = {};
      float d[4] = {};
      const auto put = [](uint32_t& to, size_t half, float value) { to |= uint32_t(element_bits(value)) << 16 * half; };
      for_each_element(name, "a", lane, [&](size_t i, size_t half, int row, int k) { put(as[i], half, a[row][k]); });
      for_each_element(name, "b", lane, [&](size_t i, size_t half, int k, int col) { put(bs[i], half, b[k][col]); });
      for_each_element(name, "d", lane, [&](size_t i, size_t, int row, int column) { d[i] = c[row][column]; });
      if (depth == 16) {
        multiply<BFloat16>(d, as, bs);
      } else {
        multiply<BFloat16>(d, {as[0], as[1]}, {bs[0]});
      }
      for_each_element(name, "d", lane, [&](size_t i, size_t, int row, int column) {
        double want = c[row][column];
        for (int k = 0; k < depth; ++k) want += a[row][k] * b[k][column];
        worst += std::fabs(d[i] - want);
      });
    });
    CHECK(worst == 0, name + " off by " + std::to_string(worst));
  }
}

// ldmatrix of two and four matrices, plain and transposed, and movmatrix: element (row, column) of matrix m is
// 64 * m + 8 * row + column.
void matrices() {
  int wrong = 0;
  launch_test(1, 32, 512, [&] {
    auto* memory = reinterpret_cast<uint16_t*>(shared_memory());
    const int lane = int(threadIdx.x);
    for (int i = lane; i < 256; i += 32) memory[i] = uint16_t(i);
    __syncwarp();
    const auto check = [&](const char* name, const char* operand, uint32_t value, int matrix) {
      for_each_element(name, operand, lane, [&](size_t, size_t half, int row, int column) {
        wrong += (value >> 16 * half & 0xffff) != uint32_t(64 * matrix + 8 * row + column);
      });
    };
    uint32_t four[4], two[2];
    load_matrices(four, memory + 8 * lane);
    for (int m = 0; m < 4; ++m) check("ldmatrix", "d", four[m], m);
    load_matrices(two, memory + 8 * (lane % 16));
    for (int m = 0; m < 2; ++m) check("ldmatrix", "d", two[m], m);
    load_matrices_transposed(four, memory + 8 * lane);
    for (int m = 0; m < 4; ++m) check("ldmatrix_trans", "d", four[m], m);
    load_matrices_transposed(two, memory + 8 * (lane % 16));
    for (int m = 0; m < 2; ++m) check("ldmatrix_trans", "d", two[m], m);
    uint32_t source = 0;
    for_each_element("movmatrix", "a", lane, [&](size_t, size_t half, int row, int column) {
      source |= uint32_t(8 * row + column) << 16 * half;
    });
    check("movmatrix", "d", transpose_matrix(source), 0);
  });
  CHECK(wrong == 0, std::to_string(wrong) + " elements of ldmatrix and movmatrix are in the wrong place");
}

void copies() {
  alignas(16) float source[128];
  for (int i = 0; i < 128; ++i) source[i] = float(i);
  bool early_is_nan = true, arrived = true, zeros = true;
  launch_test(1, 32, 1024, [&] {
    float* shared = reinterpret_cast<float*>(shared_memory()) + 4 * threadIdx.x;
    copy_async<16>(shared, source + 4 * threadIdx.x);
    commit_copies();
    copy_async<8>(shared + 128, source, false);
    commit_copies();
    early_is_nan &= std::isnan(shared[0]);
    wait_for_copies<1>();
    arrived &= shared[3] == float(4 * threadIdx.x + 3) && std::isnan(shared[128]);
    wait_for_copies<0>();
    zeros &= shared[128] == 0 && shared[129] == 0;
  });
  CHECK(early_is_nan, "a copy has not arrived before it was waited for");
  CHECK(arrived && zeros, "copies arrive, group by group");
  expect_error("did not wait for", 32, 1024, [&] { copy_async<16>(shared_memory(), source); });
  expect_error("misaligned", 32, 1024, [&] { copy_async<16>(shared_memory() + 4, source); });
  expect_error("not in shared memory", 32, 1024, [&] { copy_async<16>(shared_memory() + 1024, source); });
}

void wrong_kernels() {
  expect_error("another one", 64, 0, [] {
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  });
  expect_error("left", 64, 0, [] {
    if (threadIdx.x != 5) __syncthreads();
  });
  expect_error("while lanes of the warp wait", 32, 0, [] {
    if (threadIdx.x < 16) {
      __shfl_sync(~0u, 1, 0);
    } else {
      __ballot_sync(~0u, 1);
    }
  });
  expect_error("left while others wait", 32, 0, [] {
    if (threadIdx.x != 31) __syncwarp();
  });
  expect_error("deadlock", 64, 0, [] {
    if (threadIdx.x == 0) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  });
  expect_error("does not name", 32, 0, [] { __syncwarp(1u); });
  expect_error("does not have", 20, 0, [] { __syncwarp(); });
  expect_error("lane that the mask does not name", 32, 0, [] {
    if (threadIdx.x < 2) __shfl_sync(3u, 1, 9);
  });
  expect_error("misaligned row", 32, 2048, [] {
    uint32_t registers[4];
    load_matrices(registers, shared_memory() + 16 * threadIdx.x + 2);
  });
  expect_error("invalid shared memory", 32, emulator::max_shared_bytes + 1, [] {});
  expect_error("invalid block", 1025, 0, [] {});
  const std::string none = checks::message_of([] { launch_test(0, 32, 0, [] {}); });
  CHECK(none.find("invalid grid") != std::string::npos, "a grid without blocks: " + none);

  bool poisoned = true;
  launch_test(2, 32, 512, [&] {
    float* shared = reinterpret_cast<float*>(shared_memory());
    poisoned &= std::isnan(shared[threadIdx.x]);
    __syncthreads();
    shared[threadIdx.x] = 1;
  });
  CHECK(poisoned, "shared memory is NaN when a block starts");

  const Guarded memory(4 * 100);
  const float* first = reinterpret_cast<const float*>(memory.data());
  volatile float sink = 0;
  CHECK(!dies([&] { launch_test(1, 100, 0, [&] { sink = first[threadIdx.x]; }); }), "reading all of a buffer");
  CHECK(dies([&] { launch_test(1, 101, 0, [&] { sink = first[threadIdx.x]; }); }),
        "reading past a buffer ends the process");
  CHECK(dies([&] {
          launch_test(1, 32, emulator::max_shared_bytes,
                      [&] { shared_memory()[emulator::max_shared_bytes + int(threadIdx.x)] = 1; });
        }),
        "writing past shared memory ends the process");
}

// Reverses 64 numbers and sums neighbours, in two steps that each need their barrier.
std::vector<float> reverse_and_sum() {
  std::vector<float> result(64, -1);
  launch_test(1, 64, 256, [&] {
    float* shared = reinterpret_cast<float*>(shared_memory());
    const int thread = int(threadIdx.x);
    shared[63 - thread] = float(thread * thread);
    __syncthreads();
    const float sum = shared[thread] + shared[(thread + 33) % 64];
    __syncthreads();
    shared[thread] = sum;
    __syncthreads();
    result[size_t(thread)] = shared[(thread + 32) % 64];
  });
  return result;
}

// Lanes of a warp exchange through shared memory before ldmatrix.
std::vector<float> exchange_in_warp() {
  std::vector<float> result(128);
  launch_test(1, 32, 512, [&] {
    uint32_t* words = reinterpret_cast<uint32_t*>(shared_memory());
    const unsigned lane = threadIdx.x;
    for (unsigned i = 0; i < 4; ++i) words[i * 32 + lane] = i * 32 + lane;
    __syncwarp();
    uint32_t registers[4];
    load_matrices(registers, words + 4 * lane);
    for (int i = 0; i < 4; ++i) result[size_t(4 * lane) + size_t(i)] = float(registers[i]);
  });
  return result;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void races() {
  for (auto* kernel : {reverse_and_sum, exchange_in_warp}) {
    emulator::options() = {};
    emulator::forget_statistics();
    const std::vector<float> right = kernel();
    const int syncs = int(emulator::sync_sites().size());
    for (const Schedule schedule : emulator::schedules)
      for (uint64_t seed = 1; seed <= 5; ++seed) {
        emulator::options() = {schedule, seed, -1};
        CHECK(same_bits(kernel(), right),
              std::string("every schedule gives the same bits: ") + emulator::to_string(schedule));
      }
    for (int dropped = 0; dropped < syncs; ++dropped) {
      int caught = 0;
      for (const Schedule schedule : emulator::schedules) {
        emulator::options() = {schedule, 1, dropped};
        caught += !same_bits(kernel(), right);
      }
      CHECK(caught > 0, "a dropped synchronisation is caught: " + emulator::sync_sites()[size_t(dropped)].text());
    }
  }
  emulator::options() = {};
}

void bank_conflicts() {
  for (const int pitch : {16, 24}) {  // rows of 32 bytes share banks, rows of 48 do not
    emulator::forget_statistics();
    launch_test(1, 32, 2048, [=] {
      uint32_t registers[4];
      load_matrices(registers, shared_memory() + 2 * pitch * int(threadIdx.x));
    });
    CHECK(emulator::statistics().matrix_loads == 4, "four matrices were loaded");
    CHECK((emulator::statistics().bank_conflicts > 0) == (pitch == 16),
          "bank conflicts at a pitch of " + std::to_string(pitch));
  }
}

// Beside multiples, where a quotient changes, up to the largest numbers.
void divisions() {
  std::mt19937_64 engine(1);
  const auto any = [&] { return uint32_t(engine() & 0x7fffffff) >> engine() % 31; };
  int wrong = 0;
  for (int i = 0; i < 200000; ++i) {
    const uint32_t divisor = i < 1000 ? uint32_t(i) + 1 : std::max(1u, any());
    const Division division(divisor);
    const uint32_t multiple = (i % 2 ? 0x7fffffff : any()) / divisor * divisor;
    for (const uint32_t number : {any(), multiple, multiple - (multiple > 0), uint32_t{0x7fffffff}}) {
      uint32_t quotient = number;
      const int remainder = division.split(quotient);
      wrong +=
          quotient != number / divisor || remainder != int(number % divisor) || division.quotient(number) != quotient;
    }
  }
  CHECK(wrong == 0, std::to_string(wrong) + " wrong divisions");
}

}  // namespace

int main() {
  numbers();
  indices_and_blocks();
  warp_operations();
  products();
  matrices();
  copies();
  wrong_kernels();
  races();
  bank_conflicts();
  divisions();
  return checks::report("cuda emulator");
}
