// The CUDA variant `fused` in the emulator: strides, tiles, numbers of reduced channels, layouts, bias and epilogue;
// numbers that are not finite stay where they belong; every schedule gives the same bits; each removed synchronisation
// is noticed.
#include "cuda/variants.h"

#include <array>

#include "variant.h"

namespace {

struct SpanCase {
  Case shape;
  int64_t reduced;
  DType dtype = DType::bf16;
  bool bias = true, epilogue = false, relu = false, special = false;
  int64_t gap = 0;     // in elements, after the channels of a pixel
  bool layer = false;  // reduced is computed, too

  std::string text() const {
    return shape.text() + " R=" + std::to_string(reduced) + (dtype == DType::f16 ? " f16" : " bf16") +
           (bias ? " bias" : "") + (epilogue ? " epilogue" : "") + (relu ? " relu" : "") + (special ? " special" : "") +
           " gap=" + std::to_string(gap) + (layer ? " layer" : "");
  }
};

std::vector<int64_t> channels_last(int64_t n, int64_t c, int64_t h, int64_t w, int64_t gap) {
  return strides_in_order({n, c + gap, h, w}, {0, 2, 3, 1});
}

class SpanSetting {
 public:
  explicit SpanSetting(const SpanCase& c, uint64_t seed = 1, bool backward = false)
      : trial(c),
        x(c.dtype, {c.shape.n, c.shape.c, c.shape.h, c.shape.w},
          channels_last(c.shape.n, c.shape.c, c.shape.h, c.shape.w, c.gap)),
        reduced(c.dtype, {c.shape.n, c.reduced, c.shape.out_h(), c.shape.out_w()},
                channels_last(c.shape.n, c.reduced, c.shape.out_h(), c.shape.out_w(), 2 * c.gap)),
        reduce(c.dtype, {c.reduced, c.shape.c}, {c.shape.c + c.gap, 1}),
        reduce_bias(c.dtype, {c.reduced}, {1}),
        span(c.dtype, {c.shape.g * 49, c.reduced}, {c.reduced + c.gap, 1}),
        bias(c.dtype, {c.shape.g * 49}, {1}),
        scale(DType::f32, {c.shape.c}, {1}),
        shift(DType::f32, {c.shape.c}, {1}),
        y(c.dtype, {c.shape.n, c.shape.c, c.shape.out_h(), c.shape.out_w()},
          channels_last(c.shape.n, c.shape.c, c.shape.out_h(), c.shape.out_w(), c.gap)) {
    std::mt19937_64 engine(seed);
    std::uniform_real_distribution<double> uniform(-1, 1);
    for (Tensor* tensor : {&x, &reduced, &span, &bias, &scale, &shift, &y, &reduce, &reduce_bias})
      for (int64_t i = 0, n = tensor->count(); i < n; ++i) tensor->set(i, uniform(engine));
    if (c.special) {
      x.set(int64_t(engine() % uint64_t(x.count())), INFINITY);
      x.set(int64_t(engine() % uint64_t(x.count())), NAN);
      x.set(0, -INFINITY);
      reduced.set(int64_t(engine() % uint64_t(reduced.count())), NAN);
    }
    if (!backward) y.poison();
    problem.involution = problem_of(c.shape, c.dtype, Device::cuda, {x.strides, std::vector<int64_t>(6, 0), y.strides});
    problem.reduced = c.reduced;
    std::copy(reduced.strides.begin(), reduced.strides.end(), problem.reduced_stride);
    std::copy(span.strides.begin(), span.strides.end(), problem.span_stride);
    std::copy(reduce.strides.begin(), reduce.strides.end(), problem.reduce_stride);
    problem.epilogue = c.epilogue, problem.relu = c.relu;
  }

  SpanOp op() const { return trial.layer ? SpanOp::layer : SpanOp::forward; }

  void run() {
    SpanBuffers buffers{};
    buffers.x = x.data(), buffers.span = span.data(), buffers.y = y.data();
    if (trial.layer) {
      buffers.reduce = reduce.data();
      if (trial.bias) buffers.reduce_bias = reduce_bias.data();
    } else {
      buffers.reduced = reduced.data();
    }
    if (trial.bias) buffers.bias = bias.data();
    if (trial.epilogue) buffers.scale = scale.data(), buffers.shift = shift.data();
    const std::string error = checks::message_of([&] { cuda::fused_run(problem, op(), buffers, {}); });
    CHECK(error.empty(), trial.text() + ": " + error);
  }

  std::vector<char> bytes() const { return y.bytes(); }

  // An element of R in double, and how far it may be off. Where its sum is infinite, ReLU makes an exact zero or not.
  std::pair<double, double> reduced_at(int64_t n, int64_t r, int64_t pixel, int64_t pixels) const {
    if (!trial.layer) return {reduced.get((n * trial.reduced + r) * pixels + pixel), 0};
    const int64_t channels = problem.involution.channels;
    double sum = trial.bias ? reduce_bias.get(r) : 0, magnitude = std::fabs(sum);
    for (int64_t c = 0; c < channels; ++c) {
      const double term = reduce.get(r * channels + c) * x.get((n * channels + c) * pixels + pixel);
      sum += term, magnitude += std::fabs(term);
    }
    const double error = std::isfinite(sum) ? rounding(sum) + float_sum(channels + 1, magnitude) : 0;
    return {sum < 0 ? 0 : sum, error};
  }

  // W in double, and how far it may be off by its rounding to the storage type and that of its sum in float.
  void generate(Tensor& w, Tensor& w_error) const {
    const int64_t pixels = problem.involution.out_h * problem.involution.out_w, rows = problem.span_rows();
    std::vector<std::pair<double, double>> of_pixel(size_t(trial.reduced));
    for (int64_t n = 0; n < problem.involution.batch; ++n)
      for (int64_t v = 0; v < pixels; ++v) {
        for (int64_t r = 0; r < trial.reduced; ++r) of_pixel[size_t(r)] = reduced_at(n, r, v, pixels);
        for (int64_t k = 0; k < rows; ++k) {
          double sum = trial.bias ? bias.get(k) : 0, magnitude = std::fabs(sum), inherited = 0;
          for (int64_t r = 0; r < trial.reduced; ++r) {
            const auto [value, error] = of_pixel[size_t(r)];
            const double factor = span.get(k * trial.reduced + r), term = factor * value;
            sum += term, magnitude += std::fabs(term), inherited += std::fabs(factor) * error;
          }
          w.set((n * rows + k) * pixels + v, sum);
          w_error.set((n * rows + k) * pixels + v,
                      rounding(std::fabs(sum) + inherited) + inherited + float_sum(trial.reduced + 1, magnitude));
        }
      }
  }
  double rounding(double value) const { return unit_roundoff(trial.dtype) * std::fabs(value) + smallest(trial.dtype); }
  static double float_sum(int64_t terms, double magnitude) { return 2 * double(terms) * 0x1p-24 * magnitude; }

  Tensor weights() const {
    const Problem& p = problem.involution;
    const std::vector<int64_t> sizes{p.batch, p.groups, 7, 7, p.out_h, p.out_w};
    return {DType::f64, sizes, strides_in_order(sizes, {0, 1, 2, 3, 4, 5})};
  }

  void check() {
    const Problem& p = problem.involution;
    const int64_t pixels = p.out_h * p.out_w;
    Tensor w = weights(), w_error = weights();
    generate(w, w_error);
    const Expected expected = expect(p, Pass::forward, x, w, y), error = expect(p, Pass::forward, x, w_error, y);
    double worst = 0;
    bool specials_agree = true;
    for (int64_t i = 0, n = y.count(); i < n; ++i) {
      const int64_t c = i / pixels % p.channels;
      const double factor = trial.epilogue ? scale.get(c) : 1, offset = trial.epilogue ? shift.get(c) : 0;
      double want = factor * expected.value[size_t(i)] + offset;
      if (trial.relu && want < 0) want = 0;
      const double got = y.get(i);
      if (!std::isfinite(want) || !std::isfinite(got)) {
        specials_agree &= std::isnan(want) ? std::isnan(got) : got == want;
        continue;
      }
      const double bound =
          unit_roundoff(trial.dtype) * std::fabs(want) + smallest(trial.dtype) + 0x1p-22 * std::fabs(offset) +
          std::fabs(factor) * (error.magnitude[size_t(i)] + 2 * 50 * 0x1p-24 * expected.magnitude[size_t(i)]);
      worst = std::max(worst, std::fabs(got - want) / bound);
    }
    CHECK(specials_agree, trial.text() + ": NaN or Inf in other places than expected");
    CHECK(worst <= 1, trial.text() + ": off by " + std::to_string(worst) + " bounds");
    CHECK(y.gaps_untouched(), trial.text() + ": memory between elements was written");
  }

  const SpanCase trial;
  SpanProblem problem{};
  Tensor x, reduced, reduce, reduce_bias, span, bias, scale, shift, y;
};

// The same problem backward; y holds grad_output.
class GradientSetting : public SpanSetting {
 public:
  explicit GradientSetting(const SpanCase& c, uint64_t seed = 1)
      : SpanSetting(c, seed, true),
        grad_x(c.dtype, x.sizes, x.strides),
        grad_reduced(c.dtype, reduced.sizes, reduced.strides),
        grad_span(c.dtype, span.sizes, {c.reduced, 1}),
        grad_bias(c.dtype, bias.sizes, {1}) {
    if (c.special) {
      y.set(int64_t(seed * 7919 % uint64_t(y.count())), INFINITY);
      y.set(int64_t(seed * 104729 % uint64_t(y.count())), NAN);
    }
    for (Tensor* tensor : written()) tensor->poison();
    std::copy(x.strides.begin(), x.strides.end(), problem.grad_x_stride);
    std::copy(reduced.strides.begin(), reduced.strides.end(), problem.grad_reduced_stride);
  }

  std::array<Tensor*, 4> written() { return {&grad_x, &grad_reduced, &grad_span, &grad_bias}; }

  // Those that `wanted` has a bit for.
  void run(unsigned wanted = 15) {
    const Guarded scratch(size_t(cuda::fused_scratch(problem, SpanOp::backward)));
    SpanBuffers buffers{};
    buffers.x = x.data(), buffers.reduced = reduced.data(), buffers.span = span.data(), buffers.y = y.data();
    if (trial.bias) buffers.bias = bias.data();
    void** const gradients[] = {&buffers.grad_x, &buffers.grad_reduced, &buffers.grad_span, &buffers.grad_bias};
    for (int i = 0; i < 4; ++i)
      if (wanted >> i & 1) *gradients[i] = written()[size_t(i)]->data();
    buffers.scratch = scratch.data();
    const std::string error = checks::message_of([&] { cuda::fused_run(problem, SpanOp::backward, buffers, {}); });
    // Without a synchronisation, threads may take different ways, which the emulator reports. The result is then missing.
    CHECK(error.empty() || emulator::options().dropped_sync >= 0, trial.text() + ": " + error);
  }

  std::vector<char> bytes() {
    std::vector<char> all;
    for (const Tensor* tensor : written()) {
      const std::vector<char> one = tensor->bytes();
      all.insert(all.end(), one.begin(), one.end());
    }
    return all;
  }

  // Each number may be off by its own rounding, those of W or dW on the way, and those of the sums in float.
  void check() {
    const Problem& p = problem.involution;
    const int64_t pixels = p.out_h * p.out_w, rows = problem.span_rows(), channels = trial.reduced;
    Tensor w = weights(), w_error = weights();
    generate(w, w_error);
    const Expected to_x = expect(p, Pass::grad_input, x, w, y), x_error = expect(p, Pass::grad_input, x, w_error, y);
    compare("grad_x", grad_x, [&](int64_t i) {
      const size_t at = size_t(i);
      return std::pair{to_x.value[at], x_error.magnitude[at] + float_sum(50, to_x.magnitude[at])};
    });

    const Expected to_w = expect(p, Pass::grad_weight, x, w, y);
    const auto sum = [&](int64_t terms, const auto& term) {  // of (factor, element of dW)
      double value = 0, error = 0, magnitude = 0;
      for (int64_t i = 0; i < terms; ++i) {
        const auto [factor, at] = term(i);
        const double gradient = to_w.value[size_t(at)];
        value += factor * gradient, magnitude += std::fabs(factor * gradient);
        error += std::fabs(factor) * (rounding(gradient) + float_sum(16, to_w.magnitude[size_t(at)]));
      }
      return std::pair{value, error + float_sum(terms, magnitude)};
    };
    compare("grad_reduced", grad_reduced, [&](int64_t i) {
      const int64_t pixel = i % pixels, r = i / pixels % channels, n = i / pixels / channels;
      return sum(rows,
                 [&](int64_t k) { return std::pair{span.get(k * channels + r), (n * rows + k) * pixels + pixel}; });
    });
    const auto over_pixels = [&](int64_t k, int64_t r) {
      return sum(p.batch * pixels, [&](int64_t i) {
        const int64_t n = i / pixels, pixel = i % pixels;
        return std::pair{r < 0 ? 1.0 : reduced.get((n * channels + r) * pixels + pixel),
                         (n * rows + k) * pixels + pixel};
      });
    };
    compare("grad_span", grad_span, [&](int64_t i) { return over_pixels(i / channels, i % channels); });
    compare("grad_bias", grad_bias, [&](int64_t i) { return over_pixels(i, -1); });
  }

  template <class Want>
  void compare(const char* name, const Tensor& result, const Want& want_at) {
    double worst = 0;
    bool specials_agree = true;
    for (int64_t i = 0, n = result.count(); i < n; ++i) {
      const auto [want, error] = want_at(i);
      const double got = result.get(i);
      if (!std::isfinite(want) || !std::isfinite(got)) {
        specials_agree &= std::isnan(want) ? std::isnan(got) : got == want;
        continue;
      }
      worst = std::max(worst, std::fabs(got - want) / (rounding(want) + error));
    }
    const std::string where = trial.text() + " " + name;
    CHECK(specials_agree, where + ": NaN or Inf in other places than expected");
    CHECK(worst <= 1, where + ": off by " + std::to_string(worst) + " bounds");
    CHECK(result.gaps_untouched(), where + ": memory between elements was written");
  }

  Tensor grad_x, grad_reduced, grad_span, grad_bias;
};

std::vector<char> differentiate_and_check(const SpanCase& trial, uint64_t seed = 1) {
  GradientSetting setting(trial, seed);
  const std::string refusal = cuda::fused_refusal(setting.problem, SpanOp::backward).text();
  if (!CHECK(refusal.empty(), trial.text() + ": refused, " + refusal)) return {};
  setting.run();
  setting.check();
  return setting.bytes();
}

std::vector<char> run_and_check(const SpanCase& trial, uint64_t seed = 1) {
  SpanSetting setting(trial, seed);
  const std::string refusal = cuda::fused_refusal(setting.problem, setting.op()).text();
  if (!CHECK(refusal.empty(), trial.text() + ": refused, " + refusal)) return {};
  setting.run();
  setting.check();
  return setting.y.bytes();
}

void cases() {
  uint64_t seed = 0;
  for (const int64_t s : {1, 2})
    for (const Case& shape : {Case{2, 64, 4, 9, 20, 7, 7, s, s, 3, 3}, Case{1, 32, 2, 7, 7, 7, 7, s, s, 3, 3},
                              Case{1, 96, 6, 17, 18, 7, 7, s, s, 2, 5}, Case{1, 16, 1, 20, 33, 7, 7, s, s, 0, 0}})
      for (const int64_t reduced : {16, 32, 64}) {
        ++seed;
        const DType dtype = seed % 2 ? DType::bf16 : DType::f16;
        run_and_check({shape, reduced, dtype, seed % 3 != 0, seed % 4 < 2, seed % 4 == 1, false,
                       seed % 4 == 3   ? 1
                       : seed % 4 == 2 ? 8
                                       : 0},
                      seed);
      }
  run_and_check({{2, 80, 5, 10, 18, 7, 7, 1, 1, 3, 3}, 48});
  run_and_check({{2, 80, 5, 10, 10, 7, 7, 1, 1, 3, 3}, 128, DType::f16});
  run_and_check({{1, 96, 6, 18, 15, 7, 7, 2, 2, 3, 3}, 80});
  run_and_check({{1, 64, 4, 10, 10, 7, 7, 1, 1, 3, 3}, 16, DType::bf16, true, false, true});
}

void gradients() {
  uint64_t seed = 0;
  for (const int64_t s : {1, 2})
    for (const Case& shape : {Case{2, 64, 4, 9, 20, 7, 7, s, s, 3, 3}, Case{1, 32, 2, 7, 7, 7, 7, s, s, 3, 3},
                              Case{1, 96, 6, 17, 18, 7, 7, s, s, 2, 5}, Case{1, 16, 1, 20, 33, 7, 7, s, s, 0, 0}})
      for (const int64_t reduced : {16, 32, 48}) {
        ++seed;
        const DType dtype = seed % 2 ? DType::bf16 : DType::f16;
        differentiate_and_check({shape, reduced, dtype, seed % 3 != 0, false, false, false,
                                 seed % 4 == 3   ? 1
                                 : seed % 4 == 2 ? 8
                                                 : 0},
                                seed);
      }
  differentiate_and_check({{1, 64, 4, 10, 10, 7, 7, 1, 1, 3, 3}, 128});
  differentiate_and_check({{1, 80, 5, 20, 17, 7, 7, 2, 2, 4, 4}, 80});
}

void wanted_gradients() {
  const SpanCase trial{{1, 32, 2, 9, 10, 7, 7, 1, 1, 3, 3}, 16};
  GradientSetting all(trial);
  all.run();
  for (unsigned wanted = 0; wanted < 16; ++wanted) {
    GradientSetting some(trial);
    some.run(wanted);
    for (unsigned i = 0; i < 4; ++i) {
      GradientSetting none(trial);
      const auto right = (wanted >> i & 1 ? all : none).written()[i]->bytes();
      CHECK(some.written()[i]->bytes() == right, "gradient " + std::to_string(i) + " of " + std::to_string(wanted));
    }
  }
}

void special_values() {
  for (const int64_t s : {1, 2})
    for (const Case& shape : {Case{1, 32, 2, 14, 19, 7, 7, s, s, 3, 3}, Case{1, 16, 1, 8, 8, 7, 7, s, s, 3, 3}})
      for (uint64_t seed = 1; seed <= 2; ++seed)
        run_and_check(
            {shape, seed == 1 ? 16 : 48, seed % 2 ? DType::bf16 : DType::f16, true, seed == 2, seed == 2, true}, seed);
  for (const int64_t s : {1, 2})
    for (const Case& shape : {Case{1, 80, 5, 14, 19, 7, 7, s, s, 3, 3}, Case{2, 16, 1, 11, 9, 7, 7, s, s, 3, 3}})
      for (uint64_t seed = 1; seed <= 2; ++seed)
        differentiate_and_check(
            {shape, seed == 1 ? 16 : 32, seed % 2 ? DType::bf16 : DType::f16, true, false, false, true}, seed);
}

template <class Setting>
void schedules_and_races(const SpanCase& trial, bool races) {
  check_schedules(
      trial.text(),
      [&] {
        Setting setting(trial);
        setting.run();
        return setting.bytes();
      },
      races);
}

void schedules_and_races() {
  for (const int64_t s : {1, 2}) {
    // The blocks go from a stripe to the next, with all of its first rows at hand or not.
    for (const int64_t reduced : {32, 48})
      schedules_and_races<SpanSetting>({{3, 64, 4, 9, 18, 7, 7, s, s, 3, 3}, reduced}, true);
    const Case shape{1, 80, 5, 22, 37, 7, 7, s, s, 3, 3};
    for (const int64_t reduced : {16, 32}) schedules_and_races<GradientSetting>({shape, reduced}, true);
  }
  emulator::options() = {};
}

void layers() {
  uint64_t seed = 0;
  for (const Case& shape : {Case{2, 64, 4, 9, 20, 7, 7, 1, 1, 3, 3}, Case{1, 32, 2, 7, 7, 7, 7, 1, 1, 3, 3},
                            Case{3, 48, 3, 17, 18, 7, 7, 1, 1, 3, 3}, Case{1, 16, 1, 21, 33, 7, 7, 1, 1, 3, 3}})
    for (const int64_t reduced : {16, 32, 48, 64}) {
      ++seed;
      const DType dtype = seed % 2 ? DType::bf16 : DType::f16;
      run_and_check({shape, reduced, dtype, seed % 3 != 0, seed % 4 < 2, seed % 4 == 1, false,
                     seed % 8 == 3   ? 1
                     : seed % 4 == 2 ? 8
                                     : 0,
                     true},
                    seed);
    }
  run_and_check({{1, 48, 3, 9, 10, 7, 7, 1, 1, 3, 3}, 96, DType::f16, true, false, false, false, 0, true});
  run_and_check({{1, 48, 3, 9, 10, 7, 7, 1, 1, 3, 3}, 80, DType::f16, true, false, false, false, 1, true});
  for (const Case& shape : {Case{1, 32, 2, 14, 19, 7, 7, 1, 1, 3, 3}, Case{1, 16, 1, 8, 8, 7, 7, 1, 1, 3, 3}})
    for (const int64_t reduced : {16, 48}) {
      ++seed;
      run_and_check(
          {shape, reduced, seed % 2 ? DType::bf16 : DType::f16, true, reduced == 48, reduced == 48, true, 0, true},
          seed);
    }
  // The blocks go from a stripe to the next, with all of its first rows at hand or not.
  for (const int64_t reduced : {16, 32})
    schedules_and_races<SpanSetting>(
        {{3, 64, 4, 9, 18, 7, 7, 1, 1, 3, 3}, reduced, DType::bf16, true, false, false, false, 0, true}, true);
  emulator::options() = {};
}

void refusals() {
  const auto refused = [](const std::function<void(SpanProblem&)>& change, const char* part,
                          SpanOp pass = SpanOp::forward) {
    SpanSetting setting(SpanCase{{1, 32, 2, 8, 8, 7, 7, 1, 1, 3, 3}, 16});
    change(setting.problem);
    const std::string refusal = cuda::fused_refusal(setting.problem, pass).text();
    CHECK(refusal.find(part) != std::string::npos,
          std::string("expected a refusal with \"") + part + "\", got " + refusal);
  };
  refused([](SpanProblem& p) { p.grad_x_stride[1] = 64; },
          "gradients of the input and of reduced with a channel stride", SpanOp::backward);
  refused([](SpanProblem& p) { p.grad_reduced_stride[1] = 64; },
          "gradients of the input and of reduced with a channel stride", SpanOp::backward);
  refused([](SpanProblem& p) { p.grad_x_stride[2] = int64_t{1} << 29; }, "32 bits", SpanOp::backward);
  refused([](SpanProblem& p) { p.involution.dtype = DType::f32; }, "float16 or bfloat16, got float32");
  refused([](SpanProblem& p) { p.involution.kernel_w = 5; }, "7 x 7");
  refused([](SpanProblem& p) { p.involution.dilation_h = 2; }, "dilation");
  refused([](SpanProblem& p) { p.involution.stride_h = 3; }, "stride of 1 or 2");
  refused([](SpanProblem& p) { p.involution.groups = 4; }, "channels per group, got");
  refused([](SpanProblem& p) { p.reduced = 24; }, "multiple of 16");
  refused([](SpanProblem& p) { p.reduced = 144; }, "16 to 128");
  refused([](SpanProblem& p) { p.involution.x_stride[1] = 64; }, "input");
  refused([](SpanProblem& p) { p.reduced_stride[1] = 64; },
          "reduced with a channel stride of 1 (channels_last), got 64");
  refused([](SpanProblem& p) { p.span_stride[1] = 2; }, "span weight");
  refused([](SpanProblem& p) { p.involution.out_h = 0; }, "with pixels");
  refused([](SpanProblem& p) { p.reduced = 128; }, "at most 64 pixels");
  refused([](SpanProblem& p) { p.reduced_stride[2] = int64_t{1} << 29; }, "32 bits");
  const auto layer_refused = [&](const std::function<void(SpanProblem&)>& change, const char* part) {
    refused(change, part, SpanOp::layer);
  };
  layer_refused([](SpanProblem& p) { p.involution.stride_h = p.involution.stride_w = 2; }, "stride of 1 in a whole");
  layer_refused([](SpanProblem& p) { p.involution.channels = 80, p.involution.groups = 5; }, "at most 64 channels");
  layer_refused([](SpanProblem& p) { p.involution.padding_w = 5; }, "padding of at most 4 in a whole layer, got 3 x 5");
  layer_refused([](SpanProblem& p) { p.reduce_stride[1] = 2; }, "reduce weight with dense rows");
  layer_refused([](SpanProblem& p) { p.reduce_stride[0] = int64_t{1} << 29; }, "32 bits");
  layer_refused([](SpanProblem& p) { p.reduced = 112, p.involution.in_h = p.involution.out_h = 9; },
                "at most 101376 bytes of shared memory");
}

// Gradients that the composed operators are estimated to compute faster.
void slower() {
  const auto left = [](int64_t batch, int64_t size, int64_t stride, int64_t reduced, SpanOp pass = SpanOp::backward) {
    SpanProblem problem{};
    problem.reduced = reduced;
    Problem& p = problem.involution;
    p.batch = batch, p.out_h = p.out_w = size, p.stride_h = p.stride_w = stride;
    return !cuda::fused_slower(problem, pass).text().empty();
  };
  CHECK(!left(1, 14, 1, 48), "fewer than 64 reduced channels");
  CHECK(!left(256, 14, 1, 64), "sums over many pixels");
  CHECK(left(64, 14, 1, 64), "sums over few pixels");
  CHECK(left(256, 14, 2, 64), "stride 2");
  CHECK(left(256, 14, 1, 80), "more reduced channels");
  CHECK(!left(1, 14, 1, 64, SpanOp::forward), "the forward pass");
  CHECK(!left(1, 14, 1, 64, SpanOp::layer), "the whole layer");
}

}  // namespace

int main() {
  cases();
  gradients();
  wanted_gradients();
  special_values();
  schedules_and_races();
  layers();
  refusals();
  slower();
  return checks::report("cuda fused");
}
