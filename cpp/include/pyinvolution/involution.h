// Involution on raw pointers, CPU and CUDA: the C++ API for any runtime. It needs neither PyTorch nor Python; with
// PyTorch, pyinvolution/torch.h is the one to include. CMake: find_package(pyinvolution COMPONENTS core), target
// pyinvolution::core. A problem says what is computed, buffers say where, an execution says on what threads or stream:
//
//   using namespace pyinvolution;
//   const Problem problem = make_problem(DType::f32, Device::cpu, {n, c, h, w}, groups, {.kernel = {7, 7}});
//   run(problem, Pass::forward, {x, weight, y}, {});
//
// Tensors with other strides than the dense ones of make_problem: set x_stride, w_stride and y_stride (problem.h).
// `explain` and `force_variant` (plan.h) show and settle which kernel runs. All functions are thread-safe.
#pragma once

#include <array>
#include <cstdint>

#include "pyinvolution/export.h"
#include "pyinvolution/plan.h"
#include "pyinvolution/problem.h"

namespace pyinvolution {

// Of the library.
PYINVOLUTION_API const char* version();

// Vertical, horizontal.
struct Geometry {
  std::array<int64_t, 2> kernel{7, 7};
  std::array<int64_t, 2> stride{1, 1};
  std::array<int64_t, 2> padding{3, 3};
  std::array<int64_t, 2> dilation{1, 1};
};

enum class Layout : int32_t {
  nchw,  // X, Y and R dense in this order, W as N,G,Kh,Kw,Ho,Wo
  nhwc,  // the channels of a pixel next to each other (channels_last), W as N,Ho,Wo,G,Kh,Kw; the faster one
};

// An involution of dense tensors; `input` is N,C,H,W in either layout. The output has
// floor((H + 2 padding - dilation (kernel - 1) - 1) / stride) + 1 rows, and columns alike: problem.out_h,
// problem.out_w. Throws std::invalid_argument that names the value and what was expected.
PYINVOLUTION_API Problem make_problem(DType, Device, const std::array<int64_t, 4>& input, int64_t groups,
                                      const Geometry& = {}, Layout = Layout::nchw);

// The same with kernels from a 1x1 convolution of `reduced` channels (problem.h). `epilogue`: a scale and a shift for
// each channel of the result; `relu`: ReLU after that.
PYINVOLUTION_API SpanProblem make_span_problem(DType, Device, const std::array<int64_t, 4>& input, int64_t groups,
                                               int64_t reduced, const Geometry& = {}, Layout = Layout::nhwc,
                                               bool epilogue = false, bool relu = false);

// The same for SpanPass::layer, which computes R too: ceil(H / stride) rows of output, and columns alike.
PYINVOLUTION_API SpanProblem make_layer_problem(DType, Device, const std::array<int64_t, 4>& input, int64_t groups,
                                                int64_t reduced, const Geometry& = {}, Layout = Layout::nhwc,
                                                bool epilogue = false, bool relu = false);

// Checks the sizes of a problem that was filled by hand, and that its tensors have addresses, as `run` does; strides
// are the caller's. Throws std::invalid_argument.
PYINVOLUTION_API void validate(const Problem&);
PYINVOLUTION_API void validate(const Problem&, const Buffers&);

// Bytes of the device's memory, aligned to 16, that `run` needs in buffers.scratch; with CUDA, of the current device.
PYINVOLUTION_API int64_t scratch_bytes(const SpanProblem&, SpanPass);

// Chooses a fused kernel and runs it; does nothing for an empty output (whose gradients are zero). Throws
// std::invalid_argument with the reasons where the device has no fused kernel for the problem (see `fuses`): compute W
// by a convolution and run the involution.
PYINVOLUTION_API void run(const SpanProblem&, SpanPass, const SpanBuffers&, const Execution&);

// Whether a fused kernel runs a layer forward and backward, by what does not change from call to call.
PYINVOLUTION_API bool fuses(DType, Device, int64_t channels, int64_t groups, int64_t reduced, const Geometry&);

}  // namespace pyinvolution
