#include "phases.h"

#include <algorithm>
#include <array>
#include <memory>
#include <numeric>

#include "core/parallel.h"
#include "cpu/simd/dtype.h"

namespace pyinvolution {
namespace {

// More launches than this take longer than the generic kernel, by estimate.
constexpr int64_t most_launches = 16;

int64_t bytes_of(DType dtype) {
  int64_t bytes = 0;
  dispatch(dtype, [&](auto element) { bytes = sizeof element; });
  return bytes;
}

// The axes of a tensor, outermost first.
template <size_t Rank>
std::array<size_t, Rank> order_of(const int64_t (&strides)[Rank]) {
  std::array<size_t, Rank> order;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return strides[a] > strides[b]; });
  return order;
}

// Makes the strides those of a dense tensor with the same order of axes. Returns the number of elements.
template <size_t Rank>
int64_t make_dense(const int64_t (&sizes)[Rank], int64_t (&strides)[Rank]) {
  const auto order = order_of(strides);
  int64_t count = 1;
  for (size_t i = Rank; i-- > 0; count *= sizes[order[i]]) strides[order[i]] = count;
  return count;
}

// Copies a tensor to one with other strides and another type, both of the same sizes.
template <class From, class To, size_t Rank>
void copy(const From* from, const int64_t (&from_strides)[Rank], To* to, const int64_t (&to_strides)[Rank],
          const int64_t (&sizes)[Rank], const Execution& execution) {
  const auto order = order_of(to_strides);
  const size_t inner = order[Rank - 1];
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < Rank; ++i) rows *= sizes[order[i]];
  for_each_task(execution, rows, [&](int64_t row) {
    const From* source = from;
    To* target = to;
    for (size_t i = Rank - 1; i-- > 0; row /= sizes[order[i]]) {
      const int64_t at = row % sizes[order[i]];
      source += at * from_strides[order[i]], target += at * to_strides[order[i]];
    }
    for (int64_t i = 0; i < sizes[inner]; ++i)
      store(Accumulator<To>(load(source[i * from_strides[inner]])), &target[i * to_strides[inner]]);
  });
}

// Calls body(offset of W, offset of Y) for each phase; in elements.
template <class Body>
void for_each_phase(const Problem& p, const Body& body) {
  for (int64_t a = 0; a < p.upsample_h; ++a)
    for (int64_t b = 0; b < p.upsample_w; ++b)
      body(a * p.w_stride[4] + b * p.w_stride[5], a * p.y_stride[2] + b * p.y_stride[3]);
}

// W and Y of a phase as views of the whole.
Problem view_of(const Problem& p) {
  Problem phase = p;
  phase.upsample_h = phase.upsample_w = 1;
  phase.out_h /= p.upsample_h, phase.out_w /= p.upsample_w;
  phase.w_stride[4] *= p.upsample_h, phase.w_stride[5] *= p.upsample_w;
  phase.y_stride[2] *= p.upsample_h, phase.y_stride[3] *= p.upsample_w;
  return phase;
}

struct Sizes {
  int64_t x[4], w[6], y[4];
  explicit Sizes(const Problem& p)
      : x{p.batch, p.channels, p.in_h, p.in_w},
        w{p.batch, p.groups, p.kernel_h, p.kernel_w, p.out_h, p.out_w},
        y{p.batch, p.channels, p.out_h, p.out_w} {}
};

// For 16-bit types the terms of the sum are not rounded in between: W and Y become float first.
template <class T>
void sum_phases(void (*run)(const Problem&, Pass, const Buffers&, const Execution&), const Problem& p,
                const Buffers& buffers, const Execution& execution) {
  using Sum = Accumulator<T>;
  constexpr bool widens = !std::is_same_v<T, Sum>;
  const Problem view = view_of(p), phase = phase_of(p, Pass::grad_input);
  const Sizes sizes(phase);
  const auto count = [](const auto& of) {
    return std::accumulate(std::begin(of), std::end(of), int64_t{1}, std::multiplies<int64_t>());
  };
  const int64_t elements = count(sizes.x);
  const auto allocate = [](int64_t n) { return std::unique_ptr<Sum[]>(new Sum[size_t(n)]); };
  const auto total = allocate(elements), part = allocate(elements);
  const auto w = allocate(widens ? count(sizes.w) : 0), y = allocate(widens ? count(sizes.y) : 0);
  constexpr int64_t piece = 1 << 14;
  bool first = true;
  for_each_phase(p, [&](int64_t w_offset, int64_t y_offset) {
    T* const w_phase = static_cast<T*>(buffers.w) + w_offset;
    T* const y_phase = static_cast<T*>(buffers.y) + y_offset;
    Buffers all{first ? total.get() : part.get(), w_phase, y_phase};
    if constexpr (widens) {
      copy(w_phase, view.w_stride, w.get(), phase.w_stride, sizes.w, execution);
      copy(y_phase, view.y_stride, y.get(), phase.y_stride, sizes.y, execution);
      all.w = w.get(), all.y = y.get();
    }
    run(phase, Pass::grad_input, all, execution);
    if (!first)
      for_each_task(execution, (elements + piece - 1) / piece, [&](int64_t task) {
        for (int64_t i = task * piece; i < std::min(elements, (task + 1) * piece); ++i) total[i] += part[i];
      });
    first = false;
  });
  copy(total.get(), phase.x_stride, static_cast<T*>(buffers.x), p.x_stride, sizes.x, execution);
}

}  // namespace

bool has_phases(const Problem& p, Pass pass) {
  if ((p.upsample_h == 1 && p.upsample_w == 1) || p.out_h == 0 || p.out_w == 0) return false;
  return p.device == Device::cpu || (pass != Pass::grad_input && p.upsample_h * p.upsample_w <= most_launches);
}

Problem phase_of(const Problem& p, Pass pass) {
  Problem phase = view_of(p);
  if (pass != Pass::grad_input) return phase;
  const Sizes sizes(phase);
  make_dense(sizes.x, phase.x_stride);
  if (p.dtype == DType::f32 || p.dtype == DType::f64) return phase;
  phase.dtype = DType::f32;
  make_dense(sizes.w, phase.w_stride);
  make_dense(sizes.y, phase.y_stride);
  return phase;
}

void run_phases(void (*run)(const Problem&, Pass, const Buffers&, const Execution&), const Problem& p, Pass pass,
                const Buffers& buffers, const Execution& execution) {
  if (pass == Pass::grad_input)
    return dispatch(p.dtype, [&](auto element) { sum_phases<decltype(element)>(run, p, buffers, execution); });
  const Problem phase = phase_of(p, pass);
  const int64_t bytes = bytes_of(p.dtype);
  for_each_phase(p, [&](int64_t w_offset, int64_t y_offset) {
    const auto moved = [&](void* base, int64_t offset) { return static_cast<char*>(base) + offset * bytes; };
    run(phase, pass, {buffers.x, moved(buffers.w, w_offset), moved(buffers.y, y_offset)}, execution);
  });
}

}  // namespace pyinvolution
