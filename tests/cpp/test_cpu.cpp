// The CPU variants with every instruction set of this machine: each pass, dtype and layout, odd shapes, special values,
// and the span involution against the composition in double.
#include "cpp/cpu/variants.h"

#include "cpp/core/isa.h"

#include "span_oracle.h"

namespace {

struct Named {
  const char* name;
  decltype(&cpu::columns_refusal) refusal;
  decltype(&cpu::columns_run) run;
};
constexpr Named variants_here[] = {
    {"channels", cpu::channels_refusal, cpu::channels_run},
    {"columns", cpu::columns_refusal, cpu::columns_run},
    {"scalar", cpu::scalar_refusal, cpu::scalar_run},
};

int run_and_check(const Trial& trial, const Named& variant, uint64_t seed = 1) {
  Setting setting(trial, Device::cpu, seed);
  if (variant.refusal(setting.problem, trial.pass) || setting.written().count() == 0) return 0;
  variant.run(setting.problem, trial.pass, setting.buffers(), seed % 2 == 0 ? two_threads : Execution{});
  setting.check();
  return 1;
}

// Shapes of 8 and more channels a group, whose rows fit tiles in every way.
std::vector<Case> wide_cases() {
  return {{1, 32, 2, 9, 11, 7, 7, 1, 1, 3, 3},  {1, 32, 2, 10, 9, 7, 7, 2, 2, 3, 3},
          {2, 16, 1, 7, 9, 3, 3, 1, 1, 1, 1},   {1, 16, 1, 13, 6, 5, 5, 2, 1, 2, 2},
          {1, 24, 2, 6, 5, 2, 4, 1, 1, 0, 1},   {1, 40, 1, 9, 9, 3, 3, 1, 2, 2, 3, 2, 3},
          {1, 16, 1, 3, 130, 1, 3, 1, 1, 0, 1}, {1, 16, 1, 3, 260, 3, 7, 1, 2, 1, 3},
          {1, 8, 1, 4, 4, 9, 9, 1, 1, 4, 4},    {1, 16, 1, 3, 3, 3, 3, 7, 9, 30, 30, 25, 25},
          {1, 9, 1, 5, 230, 3, 3, 1, 1, 1, 1},  {2, 33, 3, 14, 14, 5, 5, 1, 1, 2, 2}};
}

// Windows that a border shifts: one of them in a row, vectors whose lanes jump by more than their width, rows of several
// tiles, strips, and long rows of few channels.
std::vector<Case> wide_shifted_cases() {
  constexpr Border shift = Border::shift;
  return {{1, 16, 1, 14, 14, 13, 13, 1, 1, 0, 0, 1, 1, shift}, {1, 32, 2, 7, 7, 7, 7, 1, 1, 0, 0, 1, 1, shift},
          {1, 16, 1, 3, 83, 1, 4, 1, 1, 0, 0, 1, 20, shift},   {1, 16, 1, 3, 130, 3, 5, 1, 1, 0, 0, 1, 8, shift},
          {1, 40, 2, 17, 33, 4, 3, 2, 3, 0, 0, 3, 2, shift},   {1, 16, 1, 150, 120, 3, 11, 1, 1, 0, 0, 2, 1, shift},
          {1, 3, 3, 40, 61, 5, 7, 1, 1, 0, 0, 1, 3, shift}};
}

// Images that the backward passes take in several strips of rows.
std::vector<Case> long_cases() {
  return {{2, 16, 1, 70, 210, 3, 3, 1, 1, 1, 1},
          {1, 24, 1, 130, 160, 3, 3, 2, 2, 1, 1},
          {1, 16, 2, 200, 420, 1, 5, 3, 2, 0, 2},
          {1, 16, 1, 75, 200, 2, 3, 1, 1, 4, 0, 2, 1},
          {1, 16, 1, 141, 190, 2, 2, 3, 3, 0, 0}};
}

// What the backward pass by pairs of bfloat16 distinguishes: windows of 3, 5, 7 and other columns at strides of 1, 2 and
// more, also of more than the window, so that columns of X have no tap; odd and even numbers of tap rows; rows that fill
// vectors, that leave lanes empty, and that follow each other; several tiles, and strips; groups of one, several and parts
// of blocks; rows that are too long for it.
std::vector<Case> pair_cases() {
  return {{3, 16, 1, 16, 16, 7, 7, 1, 1, 3, 3},   {2, 32, 2, 14, 14, 7, 7, 2, 2, 3, 3},
          {1, 24, 1, 8, 7, 7, 7, 1, 1, 3, 3},     {5, 16, 1, 4, 4, 7, 7, 1, 1, 3, 3},
          {1, 8, 1, 11, 56, 3, 3, 1, 1, 1, 1},    {1, 16, 1, 21, 30, 3, 3, 2, 2, 1, 1},
          {1, 16, 1, 12, 28, 5, 5, 1, 1, 2, 2},   {1, 17, 1, 12, 41, 5, 5, 2, 2, 2, 2},
          {1, 16, 1, 9, 112, 7, 7, 1, 1, 3, 3},   {1, 16, 1, 9, 113, 3, 3, 1, 1, 1, 1},
          {1, 40, 1, 10, 4, 4, 6, 1, 1, 2, 3},    {2, 16, 1, 15, 17, 9, 9, 3, 3, 4, 4},
          {1, 16, 1, 10, 10, 15, 15, 1, 1, 7, 7}, {1, 16, 1, 10, 40, 1, 1, 1, 1, 0, 0},
          {1, 16, 1, 9, 20, 3, 11, 1, 4, 1, 5},   {1, 16, 1, 16, 33, 2, 3, 3, 5, 0, 0},
          {1, 16, 1, 7, 6, 3, 3, 1, 1, 6, 5},     {1, 32, 1, 170, 100, 3, 3, 1, 1, 1, 1},
          {1, 16, 1, 330, 60, 4, 3, 2, 2, 0, 1},  {2, 12, 3, 9, 14, 5, 5, 1, 1, 2, 2},
          {1, 9, 3, 7, 13, 3, 3, 2, 2, 1, 1},     {1, 6, 6, 8, 20, 3, 3, 1, 1, 1, 1}};
}

// Few channels a group: W beyond the cache, windows that are read in several blocks of taps, short rows that are joined
// at every stride, rows that are not, chunks of groups and of channels.
std::vector<Case> narrow_cases() {
  return {{1, 2, 1, 36, 140, 21, 21, 1, 1, 10, 10}, {1, 2, 2, 30, 58, 15, 13, 1, 1, 7, 6},
          {1, 33, 11, 19, 37, 5, 5, 1, 1, 2, 2},    {1, 8, 4, 31, 60, 9, 9, 2, 2, 4, 4},
          {1, 18, 9, 23, 41, 7, 7, 1, 1, 6, 3, 2},  {1, 40, 2, 17, 35, 11, 3, 1, 1, 5, 1, 1, 2}};
}

void involution() {
  for (const Named& variant : variants_here) {
    int ran = 0;
    std::vector<Case> cases = basic_cases();
    for (const auto& more : {wide_cases(), shifted_cases(), wide_shifted_cases(), upsampled_cases()})
      cases.insert(cases.end(), more.begin(), more.end());
    for (const Case& shape : random_cases(40, 7)) cases.push_back(shape);
    uint64_t seed = 0;
    for (const Case& shape : cases)
      for (const Pass pass : passes) {
        ++seed;
        ran += run_and_check({shape, layouts[seed % 4], dtypes[seed / 4 % 4], pass}, variant, seed);
        ran += run_and_check({shape, layouts[(seed + 1) % 4], DType::f32, pass}, variant, seed);
      }
    for (const Case& shape : long_cases())
      for (const Pass pass : {Pass::grad_input, Pass::grad_weight})
        ran += run_and_check({shape, layouts[++seed % 3], dtypes[seed % 2 == 0 ? 0 : 3], pass}, variant, seed);
    for (const Case& shape : narrow_cases())
      for (const Pass pass : passes)
        ran += run_and_check({shape, layouts[++seed % 2], dtypes[seed / 2 % 4], pass}, variant, seed);
    for (const Case& shape : wide_cases())
      for (const Layout layout : layouts)
        for (const DType dtype : dtypes) ran += run_and_check({shape, layout, dtype, Pass::forward}, variant, ++seed);
    for (const Case& shape : {Case{1, 16, 2, 8, 9, 3, 3, 1, 1, 1, 1}, Case{1, 16, 1, 9, 9, 5, 5, 2, 2, 2, 2}})
      for (const Layout layout : {Layout::contiguous, Layout::channels_last})
        for (const Pass pass : passes)
          for (seed = 1; seed <= 4; ++seed)
            for (const DType dtype : {DType::f32, DType::bf16})
              ran += run_and_check({shape, layout, dtype, pass, Values::special}, variant, seed);
    CHECK(ran > 0, std::string(variant.name) + " ran nothing");
  }
}

// --- span ------------------------------------------------------------------------------------------------------------

// A whole layer against the span involution of its R, computed here in double.
void layer_case(const Case& shape, int64_t reduced, DType dtype, Layout layout, const Execution& execution) {
  const Strides strides = strides_of(shape, layout, Pass::forward);
  SpanProblem span{};
  span.involution = problem_of(shape, dtype, Device::cpu, strides);
  Problem& p = span.involution;
  span.reduced = reduced;
  const int64_t rows = span.span_rows(), pixels = p.out_h * p.out_w;
  const std::vector<int64_t> r_sizes{shape.n, reduced, p.out_h, p.out_w}, y_sizes{shape.n, shape.c, p.out_h, p.out_w};
  Tensor x(dtype, {shape.n, shape.c, shape.h, shape.w}, strides.x), y(dtype, y_sizes, strides.y);
  // W is not rounded in between, or R is, too.
  const DType inner = rounds_kernels(dtype) ? dtype : DType::f32;
  Tensor r(inner, r_sizes, strides_in_order(r_sizes, {0, 1, 2, 3})), want(inner, y_sizes, strides.y);
  Tensor a(dtype, {reduced, shape.c},
           layout == Layout::gapped ? std::vector<int64_t>{1, reduced} : std::vector<int64_t>{shape.c, 1});
  Tensor a_bias(dtype, {reduced}, {1}), s(dtype, {rows, reduced}, {reduced, 1});
  std::mt19937_64 engine(1);
  std::uniform_real_distribution<double> uniform(-1, 1);
  for (Tensor* tensor : {&x, &a, &a_bias, &s})
    for (int64_t i = 0, n = tensor->count(); i < n; ++i) tensor->set(i, uniform(engine));
  for (int64_t n = 0; n < shape.n; ++n)
    for (int64_t v = 0; v < pixels; ++v) {
      const int64_t h = v / p.out_w * shape.sh, q = v % p.out_w * shape.sw;
      const int64_t high = std::min(shape.sh, shape.h - h), wide = std::min(shape.sw, shape.w - q);
      for (int64_t k = 0; k < reduced; ++k) {
        double sum = a_bias.get(k);
        for (int64_t c = 0; c < shape.c; ++c) {
          double mean = 0;
          for (int64_t i = 0; i < high * wide; ++i)
            mean += x.get(((n * shape.c + c) * shape.h + h + i / wide) * shape.w + q + i % wide) / double(high * wide);
          sum += a.get(k * shape.c + c) * (rounds_kernels(dtype) ? as_bfloat16(mean) : mean);
        }
        r.set((n * reduced + k) * pixels + v, std::max(0.0, sum));
      }
    }
  Tensor inner_x(inner, {shape.n, shape.c, shape.h, shape.w}, strides.x), inner_s(inner, {rows, reduced}, {reduced, 1});
  for (int64_t i = 0; i < x.count(); ++i) inner_x.set(i, x.get(i));
  for (int64_t i = 0; i < s.count(); ++i) inner_s.set(i, s.get(i));
  std::copy_n(r.strides.begin(), 4, span.reduced_stride);
  std::copy_n(s.strides.begin(), 2, span.span_stride);
  std::copy_n(a.strides.begin(), 2, span.reduce_stride);
  SpanBuffers buffers{};
  buffers.x = inner_x.data(), buffers.reduced = r.data(), buffers.span = inner_s.data(), buffers.y = want.data();
  p.dtype = inner;
  if (cpu::fused_refusal(span, SpanOp::forward)) return;
  cpu::fused_run(span, SpanOp::forward, buffers, {});
  p.dtype = dtype;
  buffers.x = x.data(), buffers.reduced = nullptr, buffers.span = s.data(), buffers.y = y.data();
  buffers.reduce = a.data(), buffers.reduce_bias = a_bias.data();
  y.poison();
  cpu::fused_run(span, SpanOp::layer, buffers, execution);
  std::vector<double> wanted(size_t(want.count()));
  for (size_t i = 0; i < wanted.size(); ++i) wanted[i] = want.get(int64_t(i));
  const auto check = [&](const char* what) {
    double largest = 0;
    const double worst = worst_difference(y, wanted, &largest);
    CHECK(worst <= (unit_roundoff(dtype) + 4e-6) * 2 * largest,
          what + std::string(" ") + to_string(dtype) + " " + to_text(layout) + " R=" + std::to_string(reduced) + " " +
              shape.text() + " is off by " + std::to_string(worst) + " of " + std::to_string(largest));
    CHECK(y.gaps_untouched(), what + std::string(": memory between elements was written"));
  };
  check("layer");
  if (rounds_kernels(dtype)) return;
  y.poison();
  run_by_pixel(span, SpanOp::layer, buffers, execution);
  check("layer by pixel");
}

void layers() {
  int index = 0;
  for (const Case& shape : {Case{2, 32, 2, 9, 11, 7, 7, 1, 1, 3, 3}, Case{1, 96, 6, 13, 14, 3, 3, 2, 2, 1, 1},
                            Case{1, 40, 1, 10, 9, 3, 5, 3, 2, 2, 2, 2, 1}, Case{1, 16, 1, 2, 230, 1, 3, 1, 1, 0, 1},
                            Case{2, 20, 5, 9, 7, 5, 3, 1, 1, 2, 1}, Case{1, 7, 7, 6, 9, 3, 3, 2, 2, 1, 1}})
    for (const Layout layout : {Layout::contiguous, Layout::channels_last, Layout::gapped})
      for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
        ++index;
        layer_case(shape, 1 + index * 7 % 40, dtype, layout, index % 2 == 0 ? two_threads : Execution{});
      }
}

void span_involution() {
  int index = 0;
  for (const Case& shape : wide_cases())
    for (const Layout layout : layouts)
      for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
        ++index;
        span_case(shape, 1 + index % 19, dtype, layout, index % 2 == 0, index % 3 == 0 ? two_threads : Execution{});
      }
  // Parts of a vector, and float64, for which there is no fused kernel.
  for (const Case& shape : {Case{2, 6, 3, 7, 8, 3, 5, 2, 1, 1, 2, 1, 2}, Case{1, 16, 1, 5, 4, 3, 3, 1, 1, 1, 1}})
    for (const Layout layout : {Layout::contiguous, Layout::channels_last, Layout::gapped})
      for (const DType dtype : {DType::f64, DType::f32, DType::f16, DType::bf16})
        span_case(shape, 3, dtype, layout, layout != Layout::gapped, two_threads);
  for (const Case& shape : pair_cases())
    for (const Layout layout : {Layout::channels_last, Layout::contiguous, Layout::gapped}) {
      ++index;
      const bool special = shape.h < 100 && index % 4 == 0;
      span_case(shape, 1 + index * 5 % 37, DType::bf16, layout, index % 2 == 0,
                index % 3 == 0 ? two_threads : Execution{}, special);
    }
  for (const Case& shape : long_cases()) {
    ++index;
    span_case(shape, 1 + index % 9, index % 2 == 0 ? DType::f32 : DType::bf16, layouts[index % 3], true,
              index % 2 == 0 ? two_threads : Execution{});
  }
}

}  // namespace

int main() {
  for (const std::string& isa : available_isas()) {
    override_isa(isa);
    involution();
    span_involution();
    layers();
    std::printf("%s: %d checks so far\n", isa.c_str(), checks::passed + checks::failed);
  }
  return checks::report("cpu");
}
