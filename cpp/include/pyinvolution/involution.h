// Involution on raw pointers, CPU and CUDA: the C++ API for any runtime. It needs neither PyTorch nor Python; with
// PyTorch, pyinvolution/torch.h is the one to include. CMake: find_package(pyinvolution COMPONENTS core), target
// pyinvolution::core. A problem says what is computed, buffers say where, an execution says on what threads or stream:
//
//   using namespace pyinvolution;
//   const Problem problem = make_problem(DType::f32, Device::cpu, {n, c, h, w}, groups, {.kernel = {7, 7}});
//   run(problem, Pass::forward, {x, weight, y}, {});
//
// Tensors with other strides than the dense ones of make_problem: set x_stride, w_stride and y_stride (problem.h).
// `explain` and `force_variant` (dispatch.h) show and settle which kernel runs. All functions are thread-safe.
#pragma once

#include <array>
#include <cstdint>

#include "pyinvolution/dispatch.h"
#include "pyinvolution/export.h"
#include "pyinvolution/problem.h"

namespace pyinvolution {

// The version of the library.
PYINVOLUTION_API const char* version();

// The window of an involution; each pair is (vertical, horizontal).
struct WindowParams {
  std::array<int64_t, 2> kernel{7, 7};
  std::array<int64_t, 2> stride{1, 1};
  std::array<int64_t, 2> padding{3, 3};
  std::array<int64_t, 2> dilation{1, 1};
  Border border = Border::zeros;  // shift: the padding must be 0
  std::array<int64_t, 2> upsample{1, 1};
};

using Geometry [[deprecated("Geometry is now called WindowParams")]] = WindowParams;

enum class Layout : int32_t {
  nchw,  // X, Y and R dense in this order, W as N,G,Kh,Kw,Ho,Wo
  nhwc,  // the channels of a pixel next to each other (channels_last), W as N,Ho,Wo,G,Kh,Kw; the faster one
};

// Pixels of the output along one axis, `upsample` times as many as there are windows: with a border of zeros
// floor((size + 2 padding - dilation (kernel - 1) - 1) / stride) + 1, and 0 where the window does not fit; with a border
// that shifts ceil(size / stride). 2^63 - 1 where the number is larger.
PYINVOLUTION_API int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                                     Border border = Border::zeros, int64_t upsample = 1);
// Pixels of a layer's output along one axis, one for each cell of the stride: ceil(size / stride).
PYINVOLUTION_API int64_t layer_output_size(int64_t size, int64_t stride);

// An involution of dense tensors; `input` is N,C,H,W in either layout. The output has `output_size` rows and columns:
// problem.out_h, problem.out_w. Throws std::invalid_argument that names the value and what was expected.
PYINVOLUTION_API Problem make_problem(DType, Device, const std::array<int64_t, 4>& input, int64_t groups,
                                      const WindowParams& = {}, Layout = Layout::nchw);

// The same with kernels from a 1x1 convolution of `reduced` channels (problem.h). `epilogue`: a scale and a shift for
// each channel of the result; `relu`: ReLU after that.
PYINVOLUTION_API SpanProblem make_span_problem(DType, Device, const std::array<int64_t, 4>& input, int64_t groups,
                                               int64_t reduced, const WindowParams& = {}, Layout = Layout::nhwc,
                                               bool epilogue = false, bool relu = false);

// The same for SpanOp::layer, which computes R too; the output has `layer_output_size` rows and columns.
PYINVOLUTION_API SpanProblem make_layer_problem(DType, Device, const std::array<int64_t, 4>& input, int64_t groups,
                                                int64_t reduced, const WindowParams& = {}, Layout = Layout::nhwc,
                                                bool epilogue = false, bool relu = false);

// Checks the sizes of a problem that was filled by hand, and that its tensors have addresses, as `run` does; strides
// are the caller's responsibility. Throws std::invalid_argument.
PYINVOLUTION_API void validate(const Problem&);
PYINVOLUTION_API void validate(const Problem&, const Buffers&);
PYINVOLUTION_API void validate(const SpanProblem&, SpanOp);
PYINVOLUTION_API void validate(const SpanProblem&, SpanOp, const SpanBuffers&);

// Whether a kernel runs the span involution of a layer forward and backward, judged by an example of 14 x 14 output
// pixels. `route` (dispatch.h) answers for the real problem.
[[deprecated("use route(problem, SpanOp::forward, true)")]] PYINVOLUTION_API bool fuses(DType, Device, int64_t channels,
                                                                                        int64_t groups, int64_t reduced,
                                                                                        const WindowParams&);

}  // namespace pyinvolution
