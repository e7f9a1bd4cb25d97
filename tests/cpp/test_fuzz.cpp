// Random problems, the same ones on every run, for every CPU variant that accepts them and every instruction set of
// this machine; and sizes that no machine has, which must be refused.
//
//   test_fuzz [CASES [SEED]]
//
// A case depends only on its seed, SEED + its number. A failure prints it with the problem, and so does an end by a
// sanitizer: `test_fuzz 1 SEED` repeats it.
#include <csignal>
#include <cstdlib>

#include "../../cpp/core/isa.h"
#include "pyinvolution/involution.h"
#include "span_oracle.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace {

constexpr int64_t default_cases = 40000;

using Engine = std::mt19937_64;

int64_t pick(Engine& engine, int64_t low, int64_t high) { return low + int64_t(engine() % uint64_t(high - low + 1)); }
bool one_in(Engine& engine, int64_t n) { return pick(engine, 1, n) == 1; }

template <class Values>
auto choice(Engine& engine, const Values& values) {
  return values[size_t(pick(engine, 0, int64_t(std::size(values)) - 1))];
}

// --- what runs now ---------------------------------------------------------------------------------------------------

struct {
  uint64_t seed = 0;
  std::string isa, variant, text;
} current;

void print_current() {
  std::printf("test_fuzz 1 %llu: %s %s %s\n", static_cast<unsigned long long>(current.seed), current.isa.c_str(),
              current.variant.c_str(), current.text.c_str());
  std::fflush(stdout);
}

template <size_t Axes>
std::string text_of(const char* name, const int64_t (&strides)[Axes]) {
  std::string all = std::string(" ") + name + "_stride";
  for (size_t i = 0; i < Axes; ++i) all += (i == 0 ? "=" : ",") + std::to_string(strides[i]);
  return all;
}

std::string text_of(const Trial& trial, const Problem& p) {
  return trial.text() + text_of("x", p.x_stride) + text_of("w", p.w_stride) + text_of("y", p.y_stride);
}

// GCC's sanitizers end the process each in its way: one by a callback, the other by a signal.
extern "C" const char* __ubsan_default_options() { return "abort_on_error=1:print_stacktrace=1"; }

void on_abort(int) {
  print_current();
  std::_Exit(1);
}

// --- problems --------------------------------------------------------------------------------------------------------

// The largest numbers that a window may have, in combinations whose output is small.
void make_extreme(Engine& engine, int64_t size, int64_t& kernel, int64_t& stride, int64_t& padding, int64_t& dilation) {
  constexpr int64_t most = (int64_t{1} << 31) - 1;
  kernel = pick(engine, 1, 3);
  dilation = kernel > 1 ? most - pick(engine, 0, 3) : most;
  padding = kernel > 1 ? dilation * (kernel - 1) / 2 + pick(engine, -size / 2, 3) : pick(engine, 0, 2);
  stride = one_in(engine, 2) ? pick(engine, 1, 3) : most - pick(engine, 0, 3);
  if (stride > 3 && one_in(engine, 2)) padding = most - pick(engine, 0, 3);  // windows far from each other
  padding = std::clamp<int64_t>(padding, 0, most);
}

Case random_shape(Engine& engine) {
  for (;;) {
    Case k{};
    const bool wide = one_in(engine, 2);  // enough channels in a group for the variant `channels`
    k.n = pick(engine, 1, 2);
    k.g = pick(engine, 1, 3);
    k.c = k.g * (wide ? pick(engine, 8, 19) : pick(engine, 1, 5));
    k.h = pick(engine, 1, 7), k.w = pick(engine, 1, one_in(engine, 8) ? 70 : 12);
    const int64_t most_taps = one_in(engine, 8) ? 7 : 3;
    k.kh = pick(engine, 1, most_taps), k.kw = pick(engine, 1, most_taps);
    k.sh = pick(engine, 1, 3), k.sw = pick(engine, 1, 3);
    k.ph = pick(engine, 0, k.kh), k.pw = pick(engine, 0, k.kw);
    k.dh = one_in(engine, 3) ? pick(engine, 2, 4) : 1, k.dw = one_in(engine, 3) ? pick(engine, 2, 4) : 1;
    if (one_in(engine, 16)) make_extreme(engine, k.h, k.kh, k.sh, k.ph, k.dh);
    if (one_in(engine, 16)) make_extreme(engine, k.w, k.kw, k.sw, k.pw, k.dw);
    if (one_in(engine, 64)) choice(engine, std::vector{&k.n, &k.h, &k.w})[0] = 0;
    if (one_in(engine, 6)) k.sh = 1, k.uh = pick(engine, 1, 3);
    if (one_in(engine, 6)) k.sw = 1, k.uw = pick(engine, 1, 3);
    if (one_in(engine, 6)) {
      k.border = Border::shift, k.ph = k.pw = 0;
      if (k.h > 0) k.h = std::max(k.h, k.kh * k.dh);
      if (k.w > 0) k.w = std::max(k.w, k.kw * k.dw);
      if (k.h > 90 || k.w > 90) continue;
    }
    const int64_t pixels = k.out_h() * k.out_w();
    if (k.out_h() > 90 || k.out_w() > 90 || pixels > 900) continue;
    if (pixels == 0 && !one_in(engine, 8)) continue;
    return k;
  }
}

// Any order of the dimensions in memory, gaps, and zeros where the tensor is only read.
std::vector<int64_t> random_strides(Engine& engine, const std::vector<int64_t>& sizes, bool read) {
  std::vector<int> order(sizes.size());
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), engine);
  std::vector<int64_t> strides = strides_in_order(sizes, order, one_in(engine, 2) ? 0 : pick(engine, 1, 3));
  if (read && one_in(engine, 3))
    for (int64_t& stride : strides)
      if (one_in(engine, 3)) stride = 0;
  return strides;
}

Strides random_layout(Engine& engine, const Trial& trial) {
  Strides strides = strides_of(trial.shape, trial.layout, trial.pass);
  const Case& k = trial.shape;
  const auto replace = [&](std::vector<int64_t>& known, const std::vector<int64_t>& sizes, Pass written_by) {
    if (one_in(engine, 3)) known = random_strides(engine, sizes, trial.pass != written_by);
  };
  replace(strides.x, {k.n, k.c, k.h, k.w}, Pass::grad_input);
  replace(strides.w, {k.n, k.g, k.kh, k.kw, k.out_h(), k.out_w()}, Pass::grad_weight);
  replace(strides.y, {k.n, k.c, k.out_h(), k.out_w()}, Pass::forward);
  return strides;
}

void involution(Engine& engine) {
  const Trial trial{random_shape(engine), choice(engine, layouts), choice(engine, dtypes), choice(engine, passes),
                    one_in(engine, 16) ? Values::special : Values::normal};
  Setting setting(trial, Device::cpu, engine(), random_layout(engine, trial));
  const Problem& p = setting.problem;
  current.text = text_of(trial, p);
  validate(p);
  const Execution execution = one_in(engine, 8) ? two_threads : Execution{};
  int ran = 0;
  for (const Verdict& verdict : explain(p, trial.pass)) {
    current.variant = std::string("cpu/") + verdict.variant;
    force_variant(current.variant);
    if (!verdict.refusal.empty()) {
      const std::string message = checks::message_of([&] { choose(p, trial.pass); });
      CHECK(message.find(verdict.refusal) != std::string::npos, "a forced variant that refuses says why: " + message);
      continue;
    }
    setting.written().poison();
    run(p, trial.pass, setting.buffers(), execution);
    setting.check();
    ++ran;
  }
  force_variant("");
  CHECK(ran > 0, "no variant takes the problem");
}

void span_involution(Engine& engine) {
  Case shape = random_shape(engine);
  shape.n = std::max<int64_t>(shape.n, 1);
  shape.border = Border::zeros, shape.uh = shape.uw = 1;
  if (shape.h == 0 || shape.w == 0 || shape.out_h() == 0 || shape.out_w() == 0) return;
  const Trial trial{shape, choice(engine, layouts), choice(engine, dtypes), Pass::forward};
  const int64_t reduced = pick(engine, 1, 20);
  current.variant = "span, " + std::to_string(reduced) + " reduced channels", current.text = trial.text();
  span_case(shape, reduced, trial.dtype, trial.layout, one_in(engine, 2),
            one_in(engine, 8) ? two_threads : Execution{});
}

// Sizes from everywhere in 64 bits: a problem that can be computed with, or an error, but never an overflow.
void hostile(Engine& engine) {
  const auto any = [&] {
    const int64_t edges[] = {0, 1, 2, 3, 7, 64, int64_t{1} << 31, int64_t{1} << 32, int64_t{1} << 62, INT64_MAX};
    const int64_t value = one_in(engine, 8) ? int64_t(engine()) : choice(engine, edges);
    return one_in(engine, 2) || value == INT64_MIN ? pick(engine, 1, 4)
           : one_in(engine, 8)                     ? -value
                                                   : value - pick(engine, 0, 1);
  };
  const auto two = [&] { return std::array<int64_t, 2>{any(), any()}; };
  const std::array<int64_t, 4> input{any(), any(), any(), any()};
  WindowParams geometry{two(), two(), two(), two()};
  const WindowParams plain = geometry;
  if (one_in(engine, 4)) geometry.border = Border::shift;
  if (one_in(engine, 4)) geometry.padding = {0, 0};
  if (one_in(engine, 4)) geometry.upsample = two();
  const int64_t groups = any(), reduced = any();
  const DType dtype = choice(engine, dtypes);
  const auto layout = one_in(engine, 2) ? pyinvolution::Layout::nchw : pyinvolution::Layout::nhwc;
  const int64_t channels = any();
  current.variant = "make_problem", current.text = "";
  for (const int64_t value :
       {input[0], input[1], input[2], input[3], geometry.kernel[0], geometry.kernel[1], geometry.stride[0],
        geometry.stride[1], geometry.padding[0], geometry.padding[1], geometry.dilation[0], geometry.dilation[1],
        int64_t(geometry.border), geometry.upsample[0], geometry.upsample[1], groups, reduced, channels})
    current.text += std::to_string(value) + " ";
  const auto explain_all = [](const Problem& p) {
    validate(p);
    CHECK(p.out_h >= 0 && p.out_w >= 0 && p.w_stride[0] > 0 && p.x_stride[0] > 0 && p.y_stride[0] > 0, "an overflow");
    for (const Pass pass : passes) {
      CHECK(!explain(p, pass).empty(), "a verdict");
      const std::string message = checks::message_of([&] { run(p, pass, {}, {}); });
      CHECK(message.empty() || message.find("is null, expected the address of") != std::string::npos, message);
    }
  };
  try {
    explain_all(make_problem(dtype, Device::cpu, input, groups, geometry, layout));
  } catch (const std::invalid_argument& error) {
    CHECK(std::string(error.what()).find("expected") != std::string::npos, error.what());
  }
  try {
    route(make_layer_problem(dtype, Device::cpu, input, groups, reduced, geometry), SpanOp::layer, true);
  } catch (const std::invalid_argument& error) {
    CHECK(std::string(error.what()).find("expected") != std::string::npos, error.what());
  }
  try {
    const SpanProblem span = make_span_problem(dtype, Device::cpu, input, groups, reduced, plain, layout);
    explain_all(span.involution);
    for (const SpanOp pass : {SpanOp::forward, SpanOp::backward}) CHECK(!explain(span, pass).empty(), "a verdict");
  } catch (const std::invalid_argument& error) {
    CHECK(std::string(error.what()).find("expected") != std::string::npos, error.what());
  }
}

}  // namespace

int main(int count, char** arguments) {
  const int64_t cases = count > 1 ? std::atoll(arguments[1]) : default_cases;
  const uint64_t first = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1;
  std::signal(SIGABRT, on_abort);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_set_death_callback(print_current);
#endif
  const std::vector<std::string> isas = available_isas();
  for (int64_t i = 0; i < cases; ++i) {
    current.seed = first + uint64_t(i);
    Engine engine(current.seed);
    current.isa = choice(engine, isas);
    override_isa(current.isa);
    const int failed = checks::failed;
    try {
      switch (pick(engine, 0, 9)) {
        case 0: span_involution(engine); break;
        case 1: hostile(engine); break;
        default: involution(engine);
      }
    } catch (const std::exception& error) {
      CHECK(false, error.what());
    }
    if (checks::failed > failed && failed < 20) print_current();
  }
  return checks::report("fuzz");
}
