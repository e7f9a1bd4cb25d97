// Every operator that the library registers. Fake kernels, autocast, vmap and FLOP formulas are registered from Python
// (pyinvolution/ops.py); autograd lives in pyinvolution/functional.py and, for C++, in pyinvolution/torch.h.
#include <torch/csrc/stable/library.h>

#include "batch_norm.h"
#include "explain.h"
#include "involution2d.h"
#include "span_involution2d.h"
#include "training_layer.h"

STABLE_TORCH_LIBRARY(pyinvolution, m) {
  // Border and upsampling have defaults: programs from before there were any load as they are.
  m.def(
      "involution2d(Tensor input, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, int border=0, "
      "int[2] upsample=1) -> Tensor");
  m.def(
      "involution2d_backward(Tensor grad_output, Tensor input, Tensor weight, int[2] stride, int[2] padding, "
      "int[2] dilation, bool[2] output_mask, int border=0, int[2] upsample=1) -> (Tensor, Tensor)");
  m.def(
      "local_correlation2d(Tensor query, Tensor key, int[2] kernel_size, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, int border=0, int[2] upsample=1) -> Tensor");
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

  // A training step's norm, addition and ReLU in one, on a CPU; also in two, for graphs that are compiled.
  m.def(
      "batch_norm(Tensor input, Tensor? residual, Tensor weight, Tensor bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? batches, float? momentum, float eps, bool relu) -> (Tensor, Tensor, "
      "Tensor)");
  m.def(
      "batch_norm_statistics(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? batches, "
      "float? momentum, float eps) -> (Tensor, Tensor)");
  m.def(
      "batch_norm_output(Tensor input, Tensor? residual, Tensor weight, Tensor bias, Tensor mean, Tensor invstd, "
      "bool relu) -> Tensor");
  m.def(
      "batch_norm_backward(Tensor grad_output, Tensor input, Tensor? output, Tensor weight, Tensor bias, Tensor mean, "
      "Tensor invstd, bool relu) -> (Tensor, Tensor, Tensor, Tensor)");

  // A layer of a training step with the norm of its generation, on a CPU.
  m.def(
      "training_layer2d(Tensor input, Tensor reduce_weight, Tensor norm_weight, Tensor norm_bias, "
      "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? batches, float? momentum, float eps, "
      "Tensor span_weight, Tensor? span_bias, float? least_length, int[2] kernel_size, int[2] stride, int[2] padding, "
      "int[2] dilation) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "training_layer2d_backward(Tensor grad_output, Tensor input, Tensor reduce_weight, Tensor norm_weight, "
      "Tensor norm_bias, Tensor span_weight, Tensor? span_bias, Tensor z, Tensor mean, Tensor invstd, Tensor? output, "
      "float? least_length, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation) -> (Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor)");

  // The operators further up, as torch.jit.trace records them: Python gives these gradients of their own, which costs
  // every call more.
  m.def(
      "traced_involution2d(Tensor input, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, int border=0, "
      "int[2] upsample=1) -> Tensor");
  m.def(
      "traced_local_correlation2d(Tensor query, Tensor key, int[2] kernel_size, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, int border=0, int[2] upsample=1) -> Tensor");
  m.def(
      "traced_span_involution2d(Tensor input, Tensor reduced, Tensor span_weight, Tensor? span_bias, Tensor? scale, "
      "Tensor? shift, bool relu, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation) -> Tensor");

  m.def(
      "traced_involution_layer2d(Tensor input, Tensor reduce_weight, Tensor? reduce_bias, Tensor span_weight, "
      "Tensor? span_bias, Tensor? scale, Tensor? shift, bool relu, int[2] kernel_size, int[2] stride, int[2] padding, "
      "int[2] dilation) -> Tensor");

  // What the dispatch tables decide for these arguments.
  m.def(
      "explain_involution2d(Tensor input, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, str pass_, "
      "int border=0, int[2] upsample=1) -> str");
  m.def(
      "explain_local_correlation2d(Tensor query, Tensor key, int[2] kernel_size, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, int border=0, int[2] upsample=1) -> str");
  m.def(
      "explain_span_involution2d(Tensor input, Tensor reduced, Tensor span_weight, int[2] kernel_size, int[2] stride, "
      "int[2] padding, int[2] dilation, str pass_) -> str");
  m.def(
      "explain_involution_layer2d(Tensor input, Tensor reduce_weight, Tensor span_weight, int[2] kernel_size, "
      "int[2] stride, int[2] padding, int[2] dilation) -> str");
  m.def(
      "fuses_span(Tensor input, Tensor reduced, Tensor span_weight, int[2] kernel_size, int[2] stride, int[2] padding, "
      "int[2] dilation, bool differentiable) -> bool");
}

// The same functions for both devices: the problem says where it lives.
#define PYINVOLUTION_IMPLEMENT(key)                                                                    \
  STABLE_TORCH_LIBRARY_IMPL(pyinvolution, key, m) {                                                    \
    m.impl("traced_involution2d", TORCH_BOX(&pyinvolution::ops::involution2d));                        \
    m.impl("traced_involution_layer2d", TORCH_BOX(&pyinvolution::ops::involution_layer2d));            \
    m.impl("traced_span_involution2d", TORCH_BOX(&pyinvolution::ops::span_involution2d));              \
    m.impl("involution2d", TORCH_BOX(&pyinvolution::ops::involution2d));                               \
    m.impl("local_correlation2d", TORCH_BOX(&pyinvolution::ops::local_correlation2d));                 \
    m.impl("traced_local_correlation2d", TORCH_BOX(&pyinvolution::ops::local_correlation2d));          \
    m.impl("explain_local_correlation2d", TORCH_BOX(&pyinvolution::ops::explain_local_correlation2d)); \
    m.impl("involution2d_backward", TORCH_BOX(&pyinvolution::ops::involution2d_backward));             \
    m.impl("span_involution2d", TORCH_BOX(&pyinvolution::ops::span_involution2d));                     \
    m.impl("involution_layer2d", TORCH_BOX(&pyinvolution::ops::involution_layer2d));                   \
    m.impl("span_involution2d_backward", TORCH_BOX(&pyinvolution::ops::span_involution2d_backward));   \
    m.impl("explain_involution2d", TORCH_BOX(&pyinvolution::ops::explain_involution2d));               \
    m.impl("explain_span_involution2d", TORCH_BOX(&pyinvolution::ops::explain_span_involution2d));     \
    m.impl("explain_involution_layer2d", TORCH_BOX(&pyinvolution::ops::explain_involution_layer2d));   \
    m.impl("fuses_span", TORCH_BOX(&pyinvolution::ops::fuses_span));                                   \
  }

PYINVOLUTION_IMPLEMENT(CPU)
PYINVOLUTION_IMPLEMENT(CUDA)

STABLE_TORCH_LIBRARY_IMPL(pyinvolution, CPU, m) {
  m.impl("batch_norm", TORCH_BOX(&pyinvolution::ops::batch_norm));
  m.impl("batch_norm_statistics", TORCH_BOX(&pyinvolution::ops::batch_norm_statistics));
  m.impl("batch_norm_output", TORCH_BOX(&pyinvolution::ops::batch_norm_output));
  m.impl("batch_norm_backward", TORCH_BOX(&pyinvolution::ops::batch_norm_backward));
  m.impl("training_layer2d", TORCH_BOX(&pyinvolution::ops::training_layer2d));
  m.impl("training_layer2d_backward", TORCH_BOX(&pyinvolution::ops::training_layer2d_backward));
}
