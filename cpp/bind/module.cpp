// pyinvolution._C: what the library says of itself. No torch types; operators are reached through
// torch.ops.pyinvolution.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>

#include "isa.h"
#include "pyinvolution/involution.h"
#include "store.h"

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

// A function of Python's that any thread may call. An error in it is reported as one in a destructor is.
template <class Result, class... Arguments>
std::function<Result(Arguments...)> from_any_thread(py::object function, Result otherwise) {
  // Destroyed, too, by a thread that need not hold the interpreter's lock.
  const std::shared_ptr<py::object> shared(new py::object(std::move(function)), [](py::object* object) {
    const py::gil_scoped_acquire lock;
    delete object;
  });
  return [shared, otherwise](Arguments... arguments) {
    const py::gil_scoped_acquire lock;
    try {
      return (*shared)(arguments...).template cast<Result>();
    } catch (py::error_already_set& error) {
      error.discard_as_unraisable("pyinvolution.autotune");
      return otherwise;
    }
  };
}

void set_store(const py::object& recall, const py::object& remember) {
  ops::Store store;
  if (!recall.is_none()) {
    store.recall = from_any_thread<bool, const std::string&>(recall, true);
    const auto note =
        from_any_thread<bool, const std::string&, const std::string&, const std::string&, const std::string&>(remember,
                                                                                                              true);
    store.remember = [note](const auto&... arguments) { note(arguments...); };
  }
  const py::gil_scoped_release unlocked;
  ops::set_store(std::move(store));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("compiler") = PYINVOLUTION_COMPILER;
  m.attr("torch_built") = PYINVOLUTION_TORCH_BUILT;
  m.def("cuda_build", &cuda_build);

  m.def("variants", &variants, py::arg("op"));
  m.def("force_variant", &force_variant, py::arg("name"));
  m.def("forced_variant", &forced_variant);

  m.def("disable_variants", &disable_variants, py::arg("names"));
  m.def("disabled_variants", &disabled_variants);

  m.def("autotune", &autotune, py::arg("on"));
  m.def("autotunes", &autotunes);
  m.def("keep_choice", &keep_choice, py::arg("problem"), py::arg("variant"));
  m.def("forget_choices", &forget_choices);
  m.def("set_store", &set_store, py::arg("recall"), py::arg("remember"));
  m.def("pause_autotune", &ops::pause_autotune, py::arg("paused"));

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
        ops::recall(span.involution.device);
        return route(span, SpanOp::forward, differentiable) == Route::span;
      },
      py::kw_only(), py::arg("dtype"), py::arg("device"), py::arg("input"), py::arg("groups"), py::arg("reduced"),
      py::arg("kernel_size"), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("channels_last"),
      py::arg("differentiable"),
      "torch.ops.pyinvolution.fuses_span for dense tensors of these sizes, where there are none (in torch.compile)");
}
