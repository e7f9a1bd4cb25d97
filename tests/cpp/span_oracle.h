// The fused span involution on the CPU against the composition in double, and an execution with two threads.
#pragma once

#include <thread>

#include "../../cpp/cpu/channels/tiling.h"
#include "../../cpp/cpu/kernels.h"
#include "oracle.h"
#include "pyinvolution/dispatch.h"

namespace {

// Two threads by turns in ranges of one task, to find what tasks share.
inline void parallel_for(int64_t begin, int64_t end, int64_t, ParallelBody body, void* state) {
  const auto half = [&](int64_t parity) {
    for (int64_t task = begin + parity; task < end; task += 2) body(task, task + 1, state);
  };
  std::thread other(half, 1);
  half(0);
  other.join();
}
constexpr Execution two_threads{parallel_for, 2, nullptr};

inline double worst_difference(const Tensor& result, const std::vector<double>& want, double* largest) {
  double worst = 0;
  *largest = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double value = result.get(int64_t(i));
    if (!std::isfinite(want[i]) && (std::isnan(want[i]) ? std::isnan(value) : value == want[i])) continue;
    *largest = std::max(*largest, std::fabs(want[i]));
    const double difference = std::fabs(value - want[i]);
    worst = std::isnan(difference) ? INFINITY : std::max(worst, difference);
  }
  return worst;
}

// Whether the forward passes round W, and R in a layer, to bfloat16, and the backward pass grad_W for its products. For
// grad_X it rounds W where its loops are those of pairs.
inline bool rounds_kernels(DType dtype) { return dtype == DType::bf16 && cpu::current_kernels().bfloat16_pairs; }

inline double as_bfloat16(double value) {
  BFloat16 rounded;
  store(float(value), &rounded);
  return double(load(rounded));
}

// Runs and checks every pass that the fused variant supports. `special`: with values of X and grad_Y that are not finite.
inline void span_case(const Case& shape, int64_t reduced, DType dtype, Layout layout, bool with_bias,
                      const Execution& execution, bool special = false) {
  const Strides forward = strides_of(shape, layout, Pass::forward);
  const Strides written = strides_of(shape, layout == Layout::expanded ? Layout::contiguous : layout, Pass::forward);
  SpanProblem span{};
  span.involution = problem_of(shape, dtype, Device::cpu, forward);
  Problem& p = span.involution;
  span.reduced = reduced;
  const int64_t rows = span.span_rows();
  const std::vector<int64_t> r_sizes{shape.n, reduced, p.out_h, p.out_w}, x_sizes{shape.n, shape.c, shape.h, shape.w};
  const std::vector<int64_t> y_sizes{shape.n, shape.c, p.out_h, p.out_w};
  const std::vector<int64_t> r_strides = layout == Layout::channels_last ? strides_in_order(r_sizes, {0, 2, 3, 1})
                                         : layout == Layout::gapped      ? strides_in_order(r_sizes, {1, 0, 3, 2}, 1)
                                                                         : strides_in_order(r_sizes, {0, 1, 2, 3});
  Tensor x(dtype, x_sizes, forward.x), y(dtype, y_sizes, forward.y), r(dtype, r_sizes, r_strides);
  Tensor s(dtype, {rows, reduced},
           layout == Layout::gapped ? std::vector<int64_t>{2 * reduced + 1, 2} : std::vector<int64_t>{reduced, 1});
  Tensor b(dtype, {rows}, {1}), gy(dtype, y_sizes, written.y);
  Tensor gx(dtype, x_sizes, written.x), gr(dtype, r_sizes, r_strides), gs(dtype, {rows, reduced}, {reduced, 1}),
      gb(dtype, {rows}, {1});
  Tensor scale(DType::f32, {shape.c}, {1}), shift(DType::f32, {shape.c}, {1});
  std::mt19937_64 engine(1);
  std::uniform_real_distribution<double> uniform(-1, 1);
  for (Tensor* tensor : {&x, &r, &s, &b, &gy, &scale, &shift})
    for (int64_t i = 0, n = tensor->count(); i < n; ++i) tensor->set(i, uniform(engine));
  if (special) {
    x.set(int64_t(engine() % uint64_t(x.count())), INFINITY);
    x.set(x.count() - 1, NAN);
    gy.set(int64_t(engine() % uint64_t(gy.count())), -INFINITY);
    gy.set(int64_t(engine() % uint64_t(gy.count())), NAN);
    gy.set(0, INFINITY);
  }
  std::copy_n(r_strides.begin(), 4, span.reduced_stride);
  std::copy_n(s.strides.begin(), 2, span.span_stride);
  std::copy_n(written.x.begin(), 4, span.grad_x_stride);
  std::copy_n(r_strides.begin(), 4, span.grad_reduced_stride);

  // W, and its involution and gradients, in double.
  Tensor w(DType::f64, {shape.n, shape.g, shape.kh, shape.kw, p.out_h, p.out_w},
           strides_in_order({shape.n, shape.g, shape.kh, shape.kw, p.out_h, p.out_w}, {0, 1, 2, 3, 4, 5}));
  const int64_t pixels = p.out_h * p.out_w;
  for (int64_t n = 0; n < shape.n; ++n)
    for (int64_t k = 0; k < rows; ++k)
      for (int64_t v = 0; v < pixels; ++v) {
        double sum = with_bias ? b.get(k) : 0;
        for (int64_t q = 0; q < reduced; ++q) sum += s.get(k * reduced + q) * r.get((n * reduced + q) * pixels + v);
        w.set((n * rows + k) * pixels + v, sum);
      }
  Tensor rounded(DType::f64, w.sizes, w.strides);
  for (int64_t i = 0, n = w.count(); i < n; ++i)
    rounded.set(i, rounds_kernels(dtype) ? as_bfloat16(w.get(i)) : w.get(i));
  const std::vector<double> y_want = expect(p, Pass::forward, x, rounded, y).value;
  const bool rounds_backward = cpu::backward_in_pairs(span, cpu::current_kernels());
  const std::vector<double> gx_want = expect(p, Pass::grad_input, gx, rounds_backward ? rounded : w, gy).value;
  const std::vector<double> gw = expect(p, Pass::grad_weight, x, w, gy).value;
  std::vector<double> gr_want(size_t(r.count())), gs_want(size_t(s.count())), gb_want((size_t(rows)));
  for (int64_t n = 0; n < shape.n; ++n)
    for (int64_t k = 0; k < rows; ++k)
      for (int64_t v = 0; v < pixels; ++v) {
        const double grad = gw[size_t((n * rows + k) * pixels + v)];
        gb_want[size_t(k)] += grad;
        const double factor = rounds_kernels(dtype) ? as_bfloat16(grad) : grad;
        for (int64_t q = 0; q < reduced; ++q) {
          gr_want[size_t((n * reduced + q) * pixels + v)] += factor * s.get(k * reduced + q);
          gs_want[size_t(k * reduced + q)] += factor * r.get((n * reduced + q) * pixels + v);
        }
      }

  const std::string text = "span " + std::string(to_string(dtype)) + " " + to_text(layout) +
                           " R=" + std::to_string(reduced) + " " + shape.text();
  const auto check = [&](const char* what, const Tensor& result, const std::vector<double>& want) {
    double largest = 0;
    const double worst = worst_difference(result, want, &largest);
    // At least 1, the size of the terms: a sum of few terms may be far smaller than the terms.
    CHECK(worst <= (unit_roundoff(dtype) + 4e-6) * 2 * std::max(largest, 1.0),
          text + ": " + what + " is off by " + std::to_string(worst) + " of " + std::to_string(largest));
    CHECK(result.gaps_untouched(), text + ": " + what + ": memory between elements was written");
  };
  SpanBuffers buffers{};
  buffers.x = x.data(), buffers.reduced = r.data(), buffers.span = s.data(), buffers.y = y.data();
  buffers.bias = with_bias ? b.data() : nullptr;
  const auto run_fused = [&](SpanOp pass) { choose(span, pass).run(span, pass, buffers, execution); };
  if (!rounds_kernels(dtype)) {
    y.poison();
    run_by_pixel(span, SpanOp::forward, buffers, execution);
    check("y by pixel", y, y_want);
  }
  if (choose(span, SpanOp::forward).run == nullptr) return;
  y.poison();
  run_fused(SpanOp::forward);
  check("y", y, y_want);

  span.epilogue = span.relu = true;
  buffers.scale = scale.data(), buffers.shift = shift.data();
  y.poison();
  run_fused(SpanOp::forward);
  std::vector<double> z_want(y_want);
  for (size_t i = 0; i < z_want.size(); ++i) {
    const int64_t c = int64_t(i) / pixels % shape.c;
    z_want[i] = std::max(0.0, scale.get(c) * y_want[i] + shift.get(c));
  }
  double largest = 0, ignored = 0;
  for (const double value : y_want) largest = std::max(largest, std::fabs(value));
  CHECK(worst_difference(y, z_want, &ignored) <= (unit_roundoff(dtype) + 4e-6) * 4 * (largest + 1),
        text + ": epilogue");

  span.epilogue = span.relu = false;
  buffers.scale = buffers.shift = nullptr;
  std::copy(written.y.begin(), written.y.end(), p.y_stride);
  buffers.y = gy.data();
  buffers.grad_x = gx.data(), buffers.grad_reduced = gr.data(), buffers.grad_span = gs.data(),
  buffers.grad_bias = gb.data();
  if (choose(span, SpanOp::backward).run == nullptr) return;
  for (Tensor* tensor : {&gx, &gr, &gs, &gb}) tensor->poison();
  run_fused(SpanOp::backward);
  check("grad_x", gx, gx_want);
  check("grad_reduced", gr, gr_want);
  check("grad_span", gs, gs_want);
  check("grad_bias", gb, gb_want);

  // Each gradient by itself.
  void** const results[] = {&buffers.grad_x, &buffers.grad_reduced, &buffers.grad_span, &buffers.grad_bias};
  const std::vector<double>* const wanted[] = {&gx_want, &gr_want, &gs_want, &gb_want};
  Tensor* const tensors[] = {&gx, &gr, &gs, &gb};
  for (int only = 0; only < 4; ++only) {
    for (int i = 0; i < 4; ++i) *results[i] = i == only ? tensors[i]->data() : nullptr;
    tensors[only]->poison();
    run_fused(SpanOp::backward);
    check(("only gradient " + std::to_string(only)).c_str(), *tensors[only], *wanted[only]);
  }
}

}  // namespace
