// The CUDA variant `fused` in the emulator: strides, tiles, numbers of reduced channels, layouts, bias and epilogue;
// numbers that are not finite stay where they belong; every schedule gives the same bits; each removed synchronisation
// is noticed.
#include "../../cuda/fused/fused.h"

#include "cuda_emulator/emulator.h"
#include "oracle.h"

namespace {

using emulator::Schedule;

struct SpanCase {
  Case shape;
  int64_t reduced;
  DType dtype = DType::bf16;
  bool bias = true, epilogue = false, relu = false, special = false;
  int64_t gap = 0;  // in elements, after the channels of a pixel

  std::string text() const {
    return shape.text() + " R=" + std::to_string(reduced) + (dtype == DType::f16 ? " f16" : " bf16") +
           (bias ? " bias" : "") + (epilogue ? " epilogue" : "") + (relu ? " relu" : "") + (special ? " special" : "") +
           " gap=" + std::to_string(gap);
  }
};

std::vector<int64_t> channels_last(int64_t n, int64_t c, int64_t h, int64_t w, int64_t gap) {
  return strides_in_order({n, c + gap, h, w}, {0, 2, 3, 1});
}

class SpanSetting {
 public:
  explicit SpanSetting(const SpanCase& c, uint64_t seed = 1)
      : trial(c),
        x(c.dtype, {c.shape.n, c.shape.c, c.shape.h, c.shape.w},
          channels_last(c.shape.n, c.shape.c, c.shape.h, c.shape.w, c.gap)),
        reduced(c.dtype, {c.shape.n, c.reduced, c.shape.out_h(), c.shape.out_w()},
                channels_last(c.shape.n, c.reduced, c.shape.out_h(), c.shape.out_w(), 2 * c.gap)),
        span(c.dtype, {c.shape.g * 49, c.reduced}, {c.reduced + c.gap, 1}),
        bias(c.dtype, {c.shape.g * 49}, {1}),
        scale(DType::f32, {c.shape.c}, {1}),
        shift(DType::f32, {c.shape.c}, {1}),
        y(c.dtype, {c.shape.n, c.shape.c, c.shape.out_h(), c.shape.out_w()},
          channels_last(c.shape.n, c.shape.c, c.shape.out_h(), c.shape.out_w(), c.gap)) {
    std::mt19937_64 engine(seed);
    std::uniform_real_distribution<double> uniform(-1, 1);
    for (Tensor* tensor : {&x, &reduced, &span, &bias, &scale, &shift})
      for (int64_t i = 0, n = tensor->count(); i < n; ++i) tensor->set(i, uniform(engine));
    if (c.special) {
      x.set(int64_t(engine() % uint64_t(x.count())), INFINITY);
      x.set(int64_t(engine() % uint64_t(x.count())), NAN);
      x.set(0, -INFINITY);
      reduced.set(int64_t(engine() % uint64_t(reduced.count())), NAN);
    }
    y.poison();
    problem.involution = problem_of(c.shape, c.dtype, Device::cuda, {x.strides, std::vector<int64_t>(6, 0), y.strides});
    problem.reduced = c.reduced;
    std::copy(reduced.strides.begin(), reduced.strides.end(), problem.reduced_stride);
    std::copy(span.strides.begin(), span.strides.end(), problem.span_stride);
    problem.epilogue = c.epilogue, problem.relu = c.relu;
  }

  void run() {
    SpanBuffers buffers{};
    buffers.x = x.data(), buffers.reduced = reduced.data(), buffers.span = span.data(), buffers.y = y.data();
    if (trial.bias) buffers.bias = bias.data();
    if (trial.epilogue) buffers.scale = scale.data(), buffers.shift = shift.data();
    const std::string error = checks::message_of([&] { cuda::fused_run(problem, SpanPass::forward, buffers, {}); });
    CHECK(error.empty(), trial.text() + ": " + error);
  }

  // Against weights in double. Each may be off by its own rounding to the storage type and that of the sum in float.
  void check() {
    const Problem& p = problem.involution;
    const int64_t pixels = p.out_h * p.out_w, rows = problem.span_rows();
    const std::vector<int64_t> sizes{p.batch, p.groups, 7, 7, p.out_h, p.out_w};
    const std::vector<int64_t> contiguous = strides_in_order(sizes, {0, 1, 2, 3, 4, 5});
    Tensor w(DType::f64, sizes, contiguous), w_error(DType::f64, sizes, contiguous);
    for (int64_t n = 0; n < p.batch; ++n)
      for (int64_t k = 0; k < rows; ++k)
        for (int64_t v = 0; v < pixels; ++v) {
          double sum = trial.bias ? bias.get(k) : 0, magnitude = std::fabs(sum);
          for (int64_t r = 0; r < trial.reduced; ++r) {
            const double term = span.get(k * trial.reduced + r) * reduced.get((n * trial.reduced + r) * pixels + v);
            sum += term, magnitude += std::fabs(term);
          }
          w.set((n * rows + k) * pixels + v, sum);
          w_error.set((n * rows + k) * pixels + v, unit_roundoff(trial.dtype) * std::fabs(sum) + smallest(trial.dtype) +
                                                       2 * double(trial.reduced + 1) * 0x1p-24 * magnitude);
        }
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
  Tensor x, reduced, span, bias, scale, shift, y;
};

std::vector<char> run_and_check(const SpanCase& trial, uint64_t seed = 1) {
  SpanSetting setting(trial, seed);
  const char* refusal = cuda::fused_refusal(setting.problem, SpanPass::forward);
  if (!CHECK(refusal == nullptr, trial.text() + ": refused, " + (refusal ? refusal : ""))) return {};
  setting.run();
  setting.check();
  return setting.y.bytes();
}

void cases() {
  uint64_t seed = 0;
  for (const int64_t s : {1, 2})
    for (const Case& shape : {Case{2, 64, 4, 9, 20, 7, 7, s, s, 3, 3}, Case{1, 32, 2, 7, 7, 7, 7, s, s, 3, 3},
                              Case{1, 96, 6, 17, 18, 7, 7, s, s, 2, 5}, Case{1, 16, 1, 20, 33, 7, 7, s, s, 0, 0}})
      for (const int64_t reduced : {16, 48, 64}) {
        ++seed;
        const DType dtype = seed % 2 ? DType::bf16 : DType::f16;
        run_and_check({shape, reduced, dtype, seed % 3 != 0, seed % 4 < 2, seed % 4 == 1, false,
                       seed % 4 == 3   ? 1
                       : seed % 4 == 2 ? 8
                                       : 0},
                      seed);
      }
  run_and_check({{1, 64, 4, 10, 10, 7, 7, 1, 1, 3, 3}, 128});
  run_and_check({{1, 64, 4, 10, 10, 7, 7, 1, 1, 3, 3}, 16, DType::bf16, true, false, true});
}

void special_values() {
  for (const int64_t s : {1, 2})
    for (const Case& shape : {Case{1, 32, 2, 14, 19, 7, 7, s, s, 3, 3}, Case{1, 16, 1, 8, 8, 7, 7, s, s, 3, 3}})
      for (uint64_t seed = 1; seed <= 2; ++seed)
        run_and_check({shape, 16, seed % 2 ? DType::bf16 : DType::f16, true, seed == 2, seed == 2, true}, seed);
}

void schedules_and_races() {
  for (const int64_t s : {1, 2}) {
    const SpanCase trial{{1, 64, 4, 9, 18, 7, 7, s, s, 3, 3}, 32};
    emulator::options() = {};
    emulator::forget_statistics();
    const std::vector<char> right = run_and_check(trial);
    CHECK(emulator::statistics().bank_conflicts == 0, trial.text() + ": matrix loads have bank conflicts");
    for (const Schedule schedule : emulator::schedules) {
      emulator::options() = {schedule, 3, -1};
      CHECK(run_and_check(trial) == right,
            trial.text() + ": other bits in the schedule " + emulator::to_string(schedule));
    }
    if (s == 2) continue;  // there a warp reads and writes all pixels of its group, and no other's
    const auto sites = emulator::sync_sites();
    for (size_t dropped = 0; dropped < sites.size(); ++dropped) {
      int caught = 0;
      for (const Schedule schedule : emulator::schedules) {
        emulator::options() = {schedule, 3, int(dropped)};
        SpanSetting setting(trial);
        setting.run();
        caught += setting.y.bytes() != right;
        if (caught > 0) break;
      }
      CHECK(caught > 0, trial.text() + ": nobody missed the synchronisation at " + sites[dropped].text());
    }
  }
  emulator::options() = {};
}

void refusals() {
  const auto refused = [](const std::function<void(SpanProblem&)>& change, const char* part,
                          SpanPass pass = SpanPass::forward) {
    SpanSetting setting(SpanCase{{1, 32, 2, 8, 8, 7, 7, 1, 1, 3, 3}, 16});
    change(setting.problem);
    const char* refusal = cuda::fused_refusal(setting.problem, pass);
    CHECK(refusal != nullptr && std::string(refusal).find(part) != std::string::npos,
          std::string("expected a refusal with \"") + part + "\", got " + (refusal ? refusal : "none"));
  };
  refused([](SpanProblem&) {}, "gradients", SpanPass::backward);
  refused([](SpanProblem& p) { p.involution.dtype = DType::f32; }, "half and bfloat16");
  refused([](SpanProblem& p) { p.involution.kernel_w = 5; }, "7 x 7");
  refused([](SpanProblem& p) { p.involution.dilation_h = 2; }, "dilation");
  refused([](SpanProblem& p) { p.involution.stride_h = 3; }, "strides");
  refused([](SpanProblem& p) { p.involution.groups = 4; }, "channels a group");
  refused([](SpanProblem& p) { p.reduced = 24; }, "multiple of 16");
  refused([](SpanProblem& p) { p.reduced = 144; }, "16 to 128");
  refused([](SpanProblem& p) { p.involution.x_stride[1] = 64; }, "input");
  refused([](SpanProblem& p) { p.reduced_stride[1] = 64; }, "reduced channels are not dense");
  refused([](SpanProblem& p) { p.span_stride[1] = 2; }, "span weight");
  refused([](SpanProblem& p) { p.involution.out_h = 0; }, "no pixels");
  refused([](SpanProblem& p) { p.reduced = 128; }, "few pixels");
  refused([](SpanProblem& p) { p.reduced_stride[2] = int64_t{1} << 29; }, "32-bit");
}

}  // namespace

int main() {
  cases();
  special_values();
  schedules_and_races();
  refusals();
  return checks::report("cuda fused");
}
