// pyinvolution._C: what the library says of itself. No torch types; operators are reached through
// torch.ops.pyinvolution.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../cuda/build.h"
#include "isa.h"
#include "pyinvolution/involution.h"

namespace py = pybind11;
using namespace pyinvolution;

namespace {

template <class Enum>
Enum parse(const std::string& name, const std::vector<Enum>& values) {
  for (const Enum value : values)
    if (name == to_string(value)) return value;
  throw std::invalid_argument("unknown name \"" + name + "\"");
}

DType dtype_of(const std::string& name) {
  return parse<DType>(name, {DType::f32, DType::f64, DType::f16, DType::bf16});
}

Device device_of(const std::string& name) { return parse<Device>(name, {Device::cpu, Device::cuda}); }

Problem problem_of(const std::string& dtype, const std::string& device, const std::vector<int64_t>& input,
                   const std::vector<int64_t>& weight, const std::vector<int64_t>& stride,
                   const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                   const std::vector<int64_t>& input_stride, const std::vector<int64_t>& weight_stride,
                   const std::vector<int64_t>& output_stride) {
  Problem p{};
  p.dtype = dtype_of(dtype), p.device = device_of(device);
  p.batch = input.at(0), p.channels = input.at(1), p.in_h = input.at(2), p.in_w = input.at(3);
  p.groups = weight.at(1), p.kernel_h = weight.at(2), p.kernel_w = weight.at(3);
  p.out_h = weight.at(4), p.out_w = weight.at(5);
  p.stride_h = stride.at(0), p.stride_w = stride.at(1);
  p.padding_h = padding.at(0), p.padding_w = padding.at(1);
  p.dilation_h = dilation.at(0), p.dilation_w = dilation.at(1);
  std::copy_n(input_stride.begin(), 4, p.x_stride);
  std::copy_n(weight_stride.begin(), 6, p.w_stride);
  std::copy_n(output_stride.begin(), 4, p.y_stride);
  return p;
}

py::list listed(const std::vector<Verdict>& verdicts) {
  py::list all;
  for (const Verdict& verdict : verdicts) all.append(py::make_tuple(verdict.variant, verdict.refusal, verdict.chosen));
  return all;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("compiler") = PYINVOLUTION_COMPILER;
  m.attr("torch_built") = PYINVOLUTION_TORCH_BUILT;
  m.def("cuda_build", &cuda::cuda_build);

  m.def("variants", &variants, py::arg("op"));
  m.def("force_variant", &force_variant, py::arg("name"));
  m.def("forced_variant", &forced_variant);

  m.def("available_isas", &available_isas);
  m.def("current_isa", [] { return to_string(current_isa()); });
  m.def("override_isa", &override_isa, py::arg("name"));

  const char* const answer = "[(variant, refusal or None, chosen)] in the order of the plan table";
  m.def(
      "explain",
      [](const std::string& pass, const std::string& dtype, const std::string& device,
         const std::vector<int64_t>& input, const std::vector<int64_t>& weight, const std::vector<int64_t>& stride,
         const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
         const std::vector<int64_t>& input_stride, const std::vector<int64_t>& weight_stride,
         const std::vector<int64_t>& output_stride) {
        const Problem problem = problem_of(dtype, device, input, weight, stride, padding, dilation, input_stride,
                                           weight_stride, output_stride);
        return listed(explain(problem, parse<Pass>(pass, {Pass::forward, Pass::grad_input, Pass::grad_weight})));
      },
      py::kw_only(), py::arg("pass_"), py::arg("dtype"), py::arg("device"), py::arg("input"), py::arg("weight"),
      py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("input_stride"), py::arg("weight_stride"),
      py::arg("output_stride"), answer);

  // `weight` is the shape that W would have.
  m.def(
      "explain_span",
      [](const std::string& pass, const std::string& dtype, const std::string& device,
         const std::vector<int64_t>& input, const std::vector<int64_t>& weight, int64_t reduced,
         const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
         const std::vector<int64_t>& input_stride, const std::vector<int64_t>& reduced_stride,
         const std::vector<int64_t>& span_stride, const std::vector<int64_t>& output_stride) {
        SpanProblem span{};
        span.involution = problem_of(dtype, device, input, weight, stride, padding, dilation, input_stride,
                                     std::vector<int64_t>(6, 0), output_stride);
        span.reduced = reduced;
        std::copy_n(reduced_stride.begin(), 4, span.reduced_stride);
        std::copy_n(span_stride.begin(), 2, span.span_stride);
        std::copy_n(input_stride.begin(), 4, span.grad_x_stride);
        std::copy_n(reduced_stride.begin(), 4, span.grad_reduced_stride);
        return listed(explain(span, parse<SpanPass>(pass, {SpanPass::forward, SpanPass::backward})));
      },
      py::kw_only(), py::arg("pass_"), py::arg("dtype"), py::arg("device"), py::arg("input"), py::arg("weight"),
      py::arg("reduced"), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("input_stride"),
      py::arg("reduced_stride"), py::arg("span_stride"), py::arg("output_stride"), answer);

  m.def(
      "fuses",
      [](const std::string& dtype, const std::string& device, int64_t channels, int64_t groups, int64_t reduced,
         const std::array<int64_t, 2>& kernel, const std::array<int64_t, 2>& stride,
         const std::array<int64_t, 2>& dilation) {
        Geometry geometry;
        geometry.kernel = kernel, geometry.stride = stride, geometry.dilation = dilation;
        return fuses(dtype_of(dtype), device_of(device), channels, groups, reduced, geometry);
      },
      py::arg("dtype"), py::arg("device"), py::arg("channels"), py::arg("groups"), py::arg("reduced"),
      py::arg("kernel"), py::arg("stride"), py::arg("dilation"));
}
