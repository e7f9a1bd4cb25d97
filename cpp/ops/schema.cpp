// Every operator that the library registers. Fake kernels, autocast, vmap and FLOP formulas are registered from Python
// (pyinvolution/ops.py); autograd lives in pyinvolution/functional.py and, for C++, in pyinvolution/torch.h.
#include <torch/csrc/stable/library.h>

#include "involution2d.h"
#include "span_involution2d.h"

STABLE_TORCH_LIBRARY(pyinvolution, m) {
  m.def("involution2d(Tensor input, Tensor weight, int[2] stride, int[2] padding, int[2] dilation) -> Tensor");
  m.def(
      "involution2d_backward(Tensor grad_output, Tensor input, Tensor weight, int[2] stride, int[2] padding, "
      "int[2] dilation, bool[2] output_mask) -> (Tensor, Tensor)");
  m.def(
      "span_involution2d(Tensor input, Tensor reduced, Tensor span_weight, Tensor? span_bias, Tensor? scale, "
      "Tensor? shift, bool relu, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation) -> Tensor");
  m.def(
      "involution_layer2d(Tensor input, Tensor reduce_weight, Tensor? reduce_bias, Tensor span_weight, "
      "Tensor? span_bias, Tensor? scale, Tensor? shift, bool relu, int[2] kernel_size, int[2] stride, int[2] padding, "
      "int[2] dilation) -> Tensor");
  m.def(
      "span_involution2d_backward(Tensor grad_output, Tensor input, Tensor reduced, Tensor span_weight, "
      "Tensor? span_bias, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, bool[4] output_mask) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyinvolution, CPU, m) {
  m.impl("involution2d", TORCH_BOX(&pyinvolution::ops::involution2d));
  m.impl("involution2d_backward", TORCH_BOX(&pyinvolution::ops::involution2d_backward));
  m.impl("span_involution2d", TORCH_BOX(&pyinvolution::ops::span_involution2d));
  m.impl("involution_layer2d", TORCH_BOX(&pyinvolution::ops::involution_layer2d));
  m.impl("span_involution2d_backward", TORCH_BOX(&pyinvolution::ops::span_involution2d_backward));
}

STABLE_TORCH_LIBRARY_IMPL(pyinvolution, CUDA, m) {
  m.impl("involution2d", TORCH_BOX(&pyinvolution::ops::involution2d));
  m.impl("involution2d_backward", TORCH_BOX(&pyinvolution::ops::involution2d_backward));
  m.impl("span_involution2d", TORCH_BOX(&pyinvolution::ops::span_involution2d));
  m.impl("involution_layer2d", TORCH_BOX(&pyinvolution::ops::involution_layer2d));
  m.impl("span_involution2d_backward", TORCH_BOX(&pyinvolution::ops::span_involution2d_backward));
}
