// pyinvolution._C: what the library says of itself. No torch types; operators are reached through
// torch.ops.pyinvolution.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "isa.h"
#include "pyinvolution/involution.h"

namespace py = pybind11;
using namespace pyinvolution;

namespace {

DType dtype_of(const std::string& name) {
#define RETURN(dtype, text, storage, sum, scalar_type) \
  if (name == text) return DType::dtype;
  PYINVOLUTION_DTYPES(RETURN)
#undef RETURN
  throw std::invalid_argument("dtype is \"" + name + "\", expected float32, float64, float16 or bfloat16");
}

Device device_of(const std::string& name) {
  for (const Device device : {Device::cpu, Device::cuda})
    if (name == to_string(device)) return device;
  throw std::invalid_argument("device is \"" + name + "\", expected cpu or cuda");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("compiler") = PYINVOLUTION_COMPILER;
  m.attr("torch_built") = PYINVOLUTION_TORCH_BUILT;
  m.def("cuda_build", &cuda_build);

  m.def("variants", &variants, py::arg("op"));
  m.def("force_variant", &force_variant, py::arg("name"));
  m.def("forced_variant", &forced_variant);

  m.def("available_isas", &available_isas);
  m.def("current_isa", [] { return to_string(current_isa()); });
  m.def("override_isa", &override_isa, py::arg("name"));

  m.def(
      "fuses_span",
      [](const std::string& dtype, const std::string& device, const std::array<int64_t, 4>& input, int64_t groups,
         int64_t reduced, const std::array<int64_t, 2>& kernel_size, const std::array<int64_t, 2>& stride,
         const std::array<int64_t, 2>& padding, const std::array<int64_t, 2>& dilation, bool channels_last,
         bool differentiable) {
        const SpanProblem span =
            make_span_problem(dtype_of(dtype), device_of(device), input, groups, reduced,
                              {kernel_size, stride, padding, dilation}, channels_last ? Layout::nhwc : Layout::nchw);
        return route(span, SpanOp::forward, differentiable) == Route::span;
      },
      py::kw_only(), py::arg("dtype"), py::arg("device"), py::arg("input"), py::arg("groups"), py::arg("reduced"),
      py::arg("kernel_size"), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("channels_last"),
      py::arg("differentiable"),
      "torch.ops.pyinvolution.fuses_span for dense tensors of these sizes, where there are none (in torch.compile)");
}
