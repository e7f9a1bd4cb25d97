// A tensor of a test: any strides, storage that ends at memory nobody may touch, elements as double.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>
#include <vector>

#include "../../cpp/cpu/simd/dtype.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace {

using pyinvolution::DType;

inline size_t bytes_of(DType dtype) {
  switch (dtype) {
    case DType::f64: return 8;
    case DType::f32: return 4;
    default: return 2;
  }
}

// The rounding of a result to the storage type: half a unit in the last place, and the smallest number.
inline double unit_roundoff(DType dtype) {
  switch (dtype) {
    case DType::f64: return 0x1p-53;
    case DType::f32: return 0x1p-24;
    case DType::f16: return 0x1p-11;
    case DType::bf16: return 0x1p-8;
  }
  return 0;
}
inline double smallest(DType dtype) {
  switch (dtype) {
    case DType::f64: return 0x1p-1074;
    case DType::f16: return 0x1p-24;
    case DType::bf16: return 0x1p-133;
    default: return 0x1p-149;
  }
}

// Memory between two pages without access, filled with NaN, its end at the second one. Pages are taken as they are
// used.
class Guarded {
 public:
  explicit Guarded(size_t bytes, bool fill = true) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    const size_t inner = (bytes + page - 1) / page * page + page;
    mapped_bytes_ = inner + 2 * page;
    mapped_ = static_cast<char*>(
        mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (mapped_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(mapped_, page, PROT_NONE);
    mprotect(mapped_ + mapped_bytes_ - page, page, PROT_NONE);
    char* end = mapped_ + mapped_bytes_ - page;
    data_ = end - (bytes + 15) / 16 * 16;
    if (fill) std::memset(data_, 0xff, bytes);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(data_ + bytes, size_t(end - data_) - bytes);
    ASAN_POISON_MEMORY_REGION(mapped_ + page, size_t(data_ - mapped_) - page);
#endif
  }
  Guarded(const Guarded&) = delete;
  Guarded(Guarded&& other) noexcept : mapped_(other.mapped_), data_(other.data_), mapped_bytes_(other.mapped_bytes_) {
    other.mapped_ = nullptr;
  }
  ~Guarded() {
    if (mapped_ == nullptr) return;
#if defined(__SANITIZE_ADDRESS__)
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    ASAN_UNPOISON_MEMORY_REGION(mapped_ + page, size_t(data_ - mapped_) - page);
    ASAN_UNPOISON_MEMORY_REGION(mapped_ + mapped_bytes_ - page - 16, 16);
#endif
    munmap(mapped_, mapped_bytes_);
  }
  char* data() const { return data_; }

 private:
  char* mapped_;
  char* data_;
  size_t mapped_bytes_;
};

class Tensor {
 public:
  Tensor(DType dtype, std::vector<int64_t> sizes, std::vector<int64_t> strides)
      : dtype(dtype),
        sizes(std::move(sizes)),
        strides(std::move(strides)),
        extent_(extent()),
        memory_(size_t(extent_) * bytes_of(dtype), extent_ <= int64_t{1} << 24) {}

  int64_t count() const {
    int64_t product = 1;
    for (const int64_t size : sizes) product *= size;
    return product;
  }
  // Offset of a row-major index.
  int64_t offset(int64_t index) const {
    int64_t at = 0;
    for (size_t d = sizes.size(); d-- > 0;) {
      at += index % sizes[d] * strides[d];
      index /= sizes[d];
    }
    return at;
  }
  void* data() const { return memory_.data(); }

  double get(int64_t index) const {
    const char* at = memory_.data() + size_t(offset(index)) * bytes_of(dtype);
    double value = 0;
    pyinvolution::dispatch(dtype, [&](auto element) {
      std::memcpy(&element, at, sizeof element);
      value = double(pyinvolution::load(element));
    });
    return value;
  }
  void set(int64_t index, double value) {
    char* at = memory_.data() + size_t(offset(index)) * bytes_of(dtype);
    pyinvolution::dispatch(dtype, [&](auto element) {
      pyinvolution::store(pyinvolution::Accumulator<decltype(element)>(value), &element);
      std::memcpy(at, &element, sizeof element);
    });
  }
  void poison() {
    for (int64_t i = 0, n = count(); i < n; ++i)
      std::memset(memory_.data() + size_t(offset(i)) * bytes_of(dtype), 0xff, bytes_of(dtype));
  }
  std::vector<char> bytes() const {
    std::vector<char> all;
    const size_t size = bytes_of(dtype);
    for (int64_t i = 0, n = count(); i < n; ++i) {
      const char* at = memory_.data() + size_t(offset(i)) * size;
      all.insert(all.end(), at, at + size);
    }
    return all;
  }
  // Whether everything between the elements still is what the constructor wrote.
  bool gaps_untouched() const {
    const size_t size = bytes_of(dtype);
    if (extent_ > int64_t{1} << 24) return true;
    std::vector<char> used(size_t(extent_) * size, 0);
    for (int64_t i = 0, n = count(); i < n; ++i) std::memset(&used[size_t(offset(i)) * size], 1, size);
    for (size_t i = 0; i < used.size(); ++i)
      if (!used[i] && memory_.data()[i] != char(0xff)) return false;
    return true;
  }

  const DType dtype;
  const std::vector<int64_t> sizes, strides;

 private:
  int64_t extent() const {
    int64_t last = 1;
    for (size_t d = 0; d < sizes.size(); ++d) {
      if (sizes[d] == 0) return 0;
      last += (sizes[d] - 1) * strides[d];
    }
    return last;
  }
  int64_t extent_;
  Guarded memory_;
};

}  // namespace
