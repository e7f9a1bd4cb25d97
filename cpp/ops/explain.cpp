#include "explain.h"

#include "arguments.h"
#include "store.h"

namespace pyinvolution::ops {
namespace {

Device device_of(const Problem& problem) { return problem.device; }
Device device_of(const SpanProblem& span) { return span.involution.device; }

template <class P, class Op>
std::string lines(const P& problem, Op op) {
  recall(device_of(problem));
  std::string text;
  for (const Verdict& verdict : explain(problem, op))
    text += std::string(verdict.variant) +
            (verdict.measured ? "\tmeasured\t"
             : verdict.chosen ? "\tchosen\t"
                              : "\t\t") +
            verdict.refusal + "\n";
  return text;
}

template <class Enum>
Enum parse(const char* op, const std::string& name, std::initializer_list<Enum> values) {
  std::string known;
  for (const Enum value : values) {
    if (name == to_string(value)) return value;
    known += std::string(known.empty() ? "" : ", ") + to_string(value);
  }
  fail(op, "pass is \"", name, "\", expected one of ", known);
}

}  // namespace

std::string explain_involution2d(const Tensor& input, const Tensor& weight, const std::vector<int64_t>& stride,
                                 const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                 const std::string& pass, int64_t border, const std::vector<int64_t>& upsample) {
  return lines(involution_problem(input, weight, stride, padding, dilation, border, upsample),
               parse("explain", pass, {Pass::forward, Pass::grad_input, Pass::grad_weight}));
}

std::string explain_local_correlation2d(const Tensor& query, const Tensor& key, const std::vector<int64_t>& kernel_size,
                                        const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                        const std::vector<int64_t>& dilation, int64_t groups, int64_t border,
                                        const std::vector<int64_t>& upsample) {
  Problem problem = correlation_problem(query, key, kernel_size, stride, padding, dilation, groups, border, upsample);
  new_weight(key, problem);
  return lines(problem, Pass::grad_weight);
}

std::string explain_span_involution2d(const Tensor& input, const Tensor& reduced, const Tensor& span_weight,
                                      const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                                      const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                      const std::string& pass) {
  return lines(span_problem(input, reduced, span_weight, std::nullopt, kernel_size, stride, padding, dilation),
               parse("explain", pass, {SpanOp::forward, SpanOp::backward}));
}

std::string explain_involution_layer2d(const Tensor& input, const Tensor& reduce_weight, const Tensor& span_weight,
                                       const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                                       const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  return lines(layer_problem(input, reduce_weight, std::nullopt, span_weight, std::nullopt, kernel_size, stride,
                             padding, dilation),
               SpanOp::layer);
}

bool fuses_span(const Tensor& input, const Tensor& reduced, const Tensor& span_weight,
                const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, bool differentiable) {
  const SpanProblem span =
      span_problem(input, reduced, span_weight, std::nullopt, kernel_size, stride, padding, dilation);
  recall(device_of(span));
  return route(span, SpanOp::forward, differentiable) == Route::span;
}

}  // namespace pyinvolution::ops
