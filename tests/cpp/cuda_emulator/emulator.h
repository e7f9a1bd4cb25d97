// CUDA kernels on the host: the same .cuh sources, compiled by a C++ compiler, with the threads of a block as fibers of
// one thread. A fiber runs until it meets others (__syncthreads, a warp operation) or ends; the schedule chooses who
// runs next. What a kernel does wrong becomes an exception from `launch`: threads that meet in different places, that
// wait for one that has left or wait for ever, lanes that are not in their own mask, misaligned or foreign addresses,
// copies that nobody waited for. Shared memory holds NaN when a block starts. Not modelled: tensor-core rounding,
// memory ordering between blocks, anything asynchronous but cp.async.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#include "../../../cpp/cpu/simd/float16.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

namespace emulator {

enum class Schedule {
  ascending,     // the lowest thread that can run
  descending,    // the highest
  random,        // any
  random_warps,  // the lowest thread of the first warp, in an order of the warps that changes at each __syncthreads
};
constexpr Schedule schedules[] = {Schedule::ascending, Schedule::descending, Schedule::random, Schedule::random_warps};
const char* to_string(Schedule);

// A place in a kernel's source.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Site& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
  std::string text() const;
};

struct Options {
  Schedule schedule = Schedule::ascending;
  uint64_t seed = 1;
  int dropped_sync = -1;  // plants a race: this element of `sync_sites` synchronises nobody
};
Options& options();

// Every __syncthreads and __syncwarp met since the last call of `forget_statistics`, in the order of their first use.
const std::vector<Site>& sync_sites();

struct Statistics {
  int64_t blocks = 0;
  int64_t switches = 0;
  int64_t matrix_loads = 0;    // 8x8 matrices by ldmatrix
  int64_t bank_conflicts = 0;  // extra shared memory cycles that they took
};
Statistics& statistics();
void forget_statistics();

constexpr int max_threads = 1024;
constexpr int max_shared_bytes = 227 * 1024;

// Runs `kernel` for every thread of every block, one block after the other in an order by the schedule. Throws
// std::runtime_error with `what` for whatever the kernel did wrong.
void launch(const char* what, int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel);

// For the calls below, made by a kernel's threads.
[[noreturn]] void fail(const std::string& message, Site site);
char* shared_memory();
int lane();

// Waits for the block's threads; returns how many of them gave a true value.
int sync_threads(bool value, Site site);

// Waits for the lanes of the mask. The last one to arrive calls `combine` with the argument that each lane gave.
using Combine = void (*)(void* const (&arguments)[32], uint32_t mask, Site site);
void rendezvous(const char* operation, uint32_t mask, void* argument, Combine combine, Site site);
bool is_dropped(Site site);

struct Shuffle {
  uint64_t value, result;
  int source;
};
void shuffle(const char* operation, uint32_t mask, Shuffle& shuffle, Site site);
uint32_t ballot(const char* operation, uint32_t mask, bool value, Site site);

void copy_async(void* shared, const void* global, int bytes, bool valid, Site site);
void commit_copies();
void wait_for_copies(int groups_left);

void load_matrices(uint32_t* registers, int matrices, bool transposed, const void* row, Site site);
uint32_t transpose_matrix(uint32_t value, Site site);

struct Mma {
  float* d;
  const uint32_t *a, *b;
  int depth;  // 16 or 8
  float (*value)(uint16_t);
};
void multiply(Mma& operands, Site site);

}  // namespace emulator

struct EmulatedIndex {
  unsigned x, y, z;
};
inline EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

using emulator::Site;

inline void __syncthreads(Site site = Site::here()) {
  if (!emulator::is_dropped(site)) emulator::sync_threads(false, site);
}
inline int __syncthreads_or(int value, Site site = Site::here()) {
  return emulator::sync_threads(value != 0, site) > 0;
}
inline int __syncthreads_count(int value, Site site = Site::here()) { return emulator::sync_threads(value != 0, site); }
inline void __syncwarp(uint32_t mask = ~0u, Site site = Site::here()) {
  if (!emulator::is_dropped(site)) emulator::rendezvous("__syncwarp", mask, nullptr, nullptr, site);
}

namespace emulator {
template <class T>
T shuffled(const char* operation, uint32_t mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "");
  Shuffle exchange{0, 0, source};
  std::memcpy(&exchange.value, &value, sizeof(T));
  shuffle(operation, mask, exchange, site);
  std::memcpy(&value, &exchange.result, sizeof(T));
  return value;
}
}  // namespace emulator

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, Site site = Site::here()) {
  return emulator::shuffled("__shfl_sync", mask, value, (emulator::lane() & -width) | (source & (width - 1)), site);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int flip, int width = 32, Site site = Site::here()) {
  const int source = emulator::lane() ^ flip, end = (emulator::lane() & -width) + width;
  return emulator::shuffled("__shfl_xor_sync", mask, value, source < end ? source : emulator::lane(), site);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, int distance, int width = 32, Site site = Site::here()) {
  const int source = emulator::lane() + distance, end = (emulator::lane() & -width) + width;
  return emulator::shuffled("__shfl_down_sync", mask, value, source < end ? source : emulator::lane(), site);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, int distance, int width = 32, Site site = Site::here()) {
  const int source = emulator::lane() - distance, begin = emulator::lane() & -width;
  return emulator::shuffled("__shfl_up_sync", mask, value, source >= begin ? source : emulator::lane(), site);
}
inline uint32_t __ballot_sync(uint32_t mask, int value, Site site = Site::here()) {
  return emulator::ballot("__ballot_sync", mask, value != 0, site);
}
inline int __any_sync(uint32_t mask, int value, Site site = Site::here()) {
  return emulator::ballot("__any_sync", mask, value != 0, site) != 0;
}
inline int __all_sync(uint32_t mask, int value, Site site = Site::here()) {
  return emulator::ballot("__all_sync", mask, value != 0, site) == mask;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= uint32_t(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}

// The host bodies of cuda/primitives.cuh.
namespace pyinvolution::cuda {

inline char* shared_memory() { return emulator::shared_memory(); }
inline int opaque(int value) { return value; }
inline unsigned thread_again() { return threadIdx.x; }
constexpr bool keeps_many_registers = true;
template <class T>
T kept(T value) {
  return value;
}

template <int Bytes>
void copy_async(void* shared, const void* global, bool valid = true, Site site = Site::here()) {
  emulator::copy_async(shared, global, Bytes, valid, site);
}
inline void commit_copies() { emulator::commit_copies(); }
template <int GroupsLeft>
void wait_for_copies() {
  emulator::wait_for_copies(GroupsLeft);
}

template <int Matrices>
void load_matrices(uint32_t (&registers)[Matrices], const void* row, Site site = Site::here()) {
  static_assert(Matrices == 2 || Matrices == 4, "what the kernels use");
  emulator::load_matrices(registers, Matrices, false, row, site);
}
template <int Matrices>
void load_matrices_transposed(uint32_t (&registers)[Matrices], const void* row, Site site = Site::here()) {
  static_assert(Matrices == 2 || Matrices == 4, "what the kernels use");
  emulator::load_matrices(registers, Matrices, true, row, site);
}
inline uint32_t transpose_matrix(uint32_t value, Site site = Site::here()) {
  return emulator::transpose_matrix(value, site);
}

template <class T>
float value_of_bits(uint16_t bits) {
  return load(T{bits});
}
template <class T>
uint32_t pack(float low, float high) {
  T pair[2];
  store(low, &pair[0]);
  store(high, &pair[1]);
  uint32_t bits;
  std::memcpy(&bits, pair, sizeof bits);
  return bits;
}
template <class T, int A, int B>
void multiply(float (&d)[4], const uint32_t (&a)[A], const uint32_t (&b)[B], const float (&c)[4],
              Site site = Site::here()) {
  static_assert((A == 4 && B == 2) || (A == 2 && B == 1), "m16n8k16 or m16n8k8");
  std::copy_n(c, 4, d);
  emulator::Mma operands{d, a, b, 8 * B, value_of_bits<T>};
  emulator::multiply(operands, site);
}
template <class T, int A, int B>
void multiply(float (&d)[4], const uint32_t (&a)[A], const uint32_t (&b)[B], Site site = Site::here()) {
  multiply<T>(d, a, b, d, site);
}

}  // namespace pyinvolution::cuda
