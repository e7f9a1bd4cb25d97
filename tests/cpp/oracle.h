// The equation as loops in double, and the check of a kernel's result against it.
#pragma once

#include <cmath>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "cases.h"
#include "check.h"
#include "tensor.h"

namespace {

struct Expected {
  std::vector<double> value;
  std::vector<double> magnitude;  // the sum of the absolute values of the terms
  std::vector<int> terms;
};

// The input position of tap 0 of an output, for one axis: a window that a border shifts is moved, in steps of the
// dilation, until it is inside.
inline int64_t first_tap(Border border, int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                         int64_t upsample, int64_t output) {
  const int64_t position = output * stride / upsample;
  if (border == Border::zeros) return position - padding;
  int64_t first = position - kernel / 2 * dilation;
  while (first < 0) first += dilation;
  while (first + dilation * (kernel - 1) >= size) first -= dilation;
  return first;
}

inline Expected expect(const Problem& p, Pass pass, const Tensor& x, const Tensor& w, const Tensor& y) {
  const Tensor& written = pass == Pass::forward ? y : pass == Pass::grad_input ? x : w;
  const auto logical = [](const Tensor& tensor) {
    std::vector<double> all(size_t(tensor.count()));
    for (size_t i = 0; i < all.size(); ++i) all[i] = tensor.get(int64_t(i));
    return all;
  };
  const std::vector<double> xs = pass == Pass::grad_input ? std::vector<double>() : logical(x);
  const std::vector<double> ws = pass == Pass::grad_weight ? std::vector<double>() : logical(w);
  const std::vector<double> ys = pass == Pass::forward ? std::vector<double>() : logical(y);
  Expected all{std::vector<double>(size_t(written.count())), std::vector<double>(size_t(written.count())),
               std::vector<int>(size_t(written.count()))};
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t c = 0; c < p.channels; ++c)
      for (int64_t i = 0; i < p.kernel_h; ++i)
        for (int64_t j = 0; j < p.kernel_w; ++j)
          for (int64_t oh = 0; oh < p.out_h; ++oh)
            for (int64_t ow = 0; ow < p.out_w; ++ow) {
              const int64_t h = i * p.dilation_h + first_tap(p.border, p.in_h, p.kernel_h, p.stride_h, p.padding_h,
                                                             p.dilation_h, p.upsample_h, oh);
              const int64_t v = j * p.dilation_w + first_tap(p.border, p.in_w, p.kernel_w, p.stride_w, p.padding_w,
                                                             p.dilation_w, p.upsample_w, ow);
              const bool inside = h >= 0 && h < p.in_h && v >= 0 && v < p.in_w;
              const size_t in = size_t(((n * p.channels + c) * p.in_h + h) * p.in_w + v);
              const size_t out = size_t(((n * p.channels + c) * p.out_h + oh) * p.out_w + ow);
              const int64_t g = c / p.group_channels();
              const size_t tap =
                  size_t(((((n * p.groups + g) * p.kernel_h + i) * p.kernel_w + j) * p.out_h + oh) * p.out_w + ow);
              double term = 0;
              size_t to = 0;
              switch (pass) {
                case Pass::forward: term = ws[tap] * (inside ? xs[in] : 0.0), to = out; break;
                case Pass::grad_input:
                  if (!inside) continue;
                  term = ws[tap] * ys[out], to = in;
                  break;
                case Pass::grad_weight: term = ys[out] * (inside ? xs[in] : 0.0), to = tap; break;
              }
              all.value[to] += term;
              all.magnitude[to] += std::fabs(term);
              ++all.terms[to];
            }
  return all;
}

enum class Values {
  normal,
  special,  // an Inf and a NaN in each of the tensors that are read, and an Inf at a tap of padding
};

using Runner = std::function<void(const Problem&, Pass, const Buffers&)>;

struct Trial {
  Case shape;
  Layout layout;
  DType dtype;
  Pass pass;
  Values values = Values::normal;

  std::string text() const {
    static const char* const pass_names[] = {"forward", "grad_input", "grad_weight"};
    static const char* const dtype_names[] = {"f32", "f64", "f16", "bf16"};
    return std::string(pass_names[int(pass)]) + " " + dtype_names[int(dtype)] + " " + to_text(layout) +
           (values == Values::special ? " special " : " ") + shape.text();
  }
};

// A problem with its tensors: what is read has values that the dtype can hold, what is written is NaN, and so is all
// memory between elements.
class Setting {
 public:
  Setting(const Trial& trial, Device device, uint64_t seed = 1)
      : Setting(trial, device, seed, strides_of(trial.shape, trial.layout, trial.pass)) {}
  Setting(const Trial& trial, Device device, uint64_t seed, const Strides& strides)
      : trial(trial),
        problem(problem_of(trial.shape, trial.dtype, device, strides)),
        x(trial.dtype, {trial.shape.n, trial.shape.c, trial.shape.h, trial.shape.w}, strides.x),
        w(trial.dtype, {trial.shape.n, trial.shape.g, trial.shape.kh, trial.shape.kw, problem.out_h, problem.out_w},
          strides.w),
        y(trial.dtype, {trial.shape.n, trial.shape.c, problem.out_h, problem.out_w}, strides.y) {
    std::mt19937_64 engine(seed);
    for (Tensor* tensor : {&x, &w, &y}) {
      if (tensor == &written()) {
        tensor->poison();
        continue;
      }
      std::uniform_real_distribution<double> uniform(-1, 1);
      for (int64_t i = 0, n = tensor->count(); i < n; ++i) tensor->set(i, uniform(engine));
      if (trial.values == Values::special && tensor->count() > 1) {
        tensor->set(int64_t(engine() % uint64_t(tensor->count())), INFINITY);
        tensor->set(int64_t(engine() % uint64_t(tensor->count())), NAN);
        tensor->set(0, -INFINITY);  // of W: the corner tap of the corner pixel, which padding covers
      }
    }
  }

  Buffers buffers() const { return {x.data(), w.data(), y.data()}; }
  Tensor& written() { return trial.pass == Pass::forward ? y : trial.pass == Pass::grad_input ? x : w; }

  // The largest error in units of the bound, which is the rounding of the result and of each addition at its worst.
  // `factor` widens it for kernels that round something else too.
  void check(double factor = 1) {
    const Expected expected = expect(problem, trial.pass, x, w, y);
    const DType accumulator = trial.dtype == DType::f64 ? DType::f64 : DType::f32;
    const Tensor& result = written();
    double worst = 0;
    int64_t worst_at = -1;
    bool specials_agree = true;
    for (int64_t i = 0, n = result.count(); i < n; ++i) {
      const double got = result.get(i), want = expected.value[size_t(i)];
      if (!std::isfinite(want) || !std::isfinite(got)) {
        const bool same = std::isnan(want) ? std::isnan(got) : got == want;
        if (!same && specials_agree) {
          specials_agree = false;
          CHECK(false, trial.text() + ": element " + std::to_string(i) + " is " + std::to_string(got) + ", expected " +
                           std::to_string(want));
        }
        continue;
      }
      const double bound = unit_roundoff(trial.dtype) * std::fabs(want) + smallest(trial.dtype) +
                           2 * expected.terms[size_t(i)] * unit_roundoff(accumulator) * expected.magnitude[size_t(i)];
      const double ratio = std::fabs(got - want) / (factor * bound);
      if (ratio > worst) worst = ratio, worst_at = i;
    }
    CHECK(worst <= 1,
          trial.text() + ": element " + std::to_string(worst_at) + " is off by " + std::to_string(worst) + " bounds");
    CHECK(result.gaps_untouched(), trial.text() + ": memory between elements was written");
  }

  const Trial trial;
  const Problem problem;
  Tensor x, w, y;
};

}  // namespace
