"""A whole involution layer of a training step as one operator each way (on a CPU)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, batch_norm, conv2d

from pyinvolution import ops
from pyinvolution.functional import span_involution2d
from pyinvolution.kernel_norms import LEAST_LENGTH, per_kernel_length
from pyinvolution.normalization import DTYPES, has_plain_vectors
from pyinvolution.stock import intercepted, is_pointwise, is_stock

__all__ = ["TrainingLayer", "run_as_one", "trains_as_one"]

LENGTHS_REDUCED = 32
"""Lengths are computed for up to so many reduced channels, or as many as there are taps. They cost R² products for each
kernel: with 32 a layer takes 0.63 to 0.86 of the time that it takes with kernels in memory, with 64 1.1 to 1.9 times as
much (3x3 to 7x7 taps, float32 and bfloat16)."""

_forward = torch.ops.pyinvolution.training_layer2d.default
_backward = torch.ops.pyinvolution.training_layer2d_backward.default


def trains_as_one(layer: Any, input: Tensor) -> bool:
    """Whether `run_as_one` computes what the modules of an `Involution2d` would.

    It does for an input (N, C, H, W) of float32, float16 or bfloat16 in channels_last on a CPU, if the layer's parts
    are those that it made (1x1 convolutions without hooks, a batch norm that computes statistics, ReLU; the caller has
    looked at the pooling), the span involution has a kernel, and no transform, mode, tracer or compiler takes part.
    """
    reduce = layer.reduce
    if reduce is None or not reduce.training or layer.fused is False or layer.kernel_norm not in (None, "l2"):
        return False
    if (
        type(input) is not Tensor
        or torch.compiler.is_compiling()
        or intercepted()
        or not is_stock(reduce, nn.Sequential)
    ):
        return False
    parts = reduce._modules
    if list(parts) != ["conv", "norm", "act"] or any(layer._extra_padding):
        return False
    conv, norm, span, pool = parts["conv"], parts["norm"], layer.span, layer.pool
    if not (
        is_pointwise(conv)
        and conv.bias is None
        and is_stock(norm, nn.BatchNorm2d)
        and norm.training
        and is_stock(parts["act"], nn.ReLU)
        and is_pointwise(span)
        and (pool is None or _averages_cells(pool, layer.stride))
        and input.device.type == "cpu"
        and input.dtype in DTYPES
        and input.is_contiguous(memory_format=torch.channels_last)
        and has_plain_vectors(norm)
    ):
        return False
    dtype, cast = input.dtype, torch.is_autocast_enabled("cpu")
    if cast and torch.get_autocast_dtype("cpu") != dtype:
        return False
    for parameter in (conv.weight, span.weight, span.bias):
        if parameter is not None and not (
            (parameter.dtype == dtype or (cast and parameter.dtype == torch.float32)) and parameter.device.type == "cpu"
        ):
            return False
    reduced, channels = conv.weight.shape[:2]
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    batch, _, height, width = input.shape
    if (
        channels != input.shape[1]
        or span.weight.shape[:2] != (layer.groups * taps, reduced)
        or norm.num_features != reduced
        or batch * ops.layer_output_size(height, layer.stride[0]) * ops.layer_output_size(width, layer.stride[1]) < 2
        or (layer.kernel_norm == "l2" and reduced > max(taps, LENGTHS_REDUCED))
    ):
        return False
    window = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return ops.fuses_dense_span(input, layer.groups, reduced, window)


def _averages_cells(pool: Any, stride: tuple[int, int]) -> bool:
    """Whether the layer's own pooling still is what it was made as."""
    return (
        pool.kernel_size == pool.stride == stride
        and pool.padding == 0
        and pool.ceil_mode
        and pool.divisor_override is None
    )


def run_as_one(layer: Any, input: Tensor) -> Tensor:
    """The involution of an `Involution2d` by the kernels that it makes from ``input``, without bias and projection."""
    conv, norm, span = layer.reduce.conv, layer.reduce.norm, layer.span
    least = None if layer.kernel_norm is None else LEAST_LENGTH
    statistics = (norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.momentum, norm.eps)
    window = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return TrainingLayer.apply(
        input, conv.weight, norm.weight, norm.bias, span.weight, span.bias, statistics, least, window
    )


class TrainingLayer(torch.autograd.Function):
    """Y from X and the parameters of reduction, norm and span; saves these, the reduction before its norm, the norm's
    statistics and, for kernels of length one, Y.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        reduce_weight: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        span_weight: Tensor,
        span_bias: Tensor | None,
        statistics: tuple,
        least_length: float | None,
        window: tuple,
    ) -> Tensor:
        parameters = (reduce_weight, norm_weight, norm_bias)
        output, z, mean, invstd = _forward(
            input, *parameters, *statistics, span_weight, span_bias, least_length, *window
        )
        kept = None if least_length is None else output
        ctx.eps, ctx.least_length, ctx.window = statistics[-1], least_length, window
        ctx.save_for_backward(input, *parameters, span_weight, span_bias, z, mean, invstd, kept)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad[:6]
        if torch.is_grad_enabled():
            grads = _differentiable(grad_output, saved[:6], wanted, ctx.eps, ctx.least_length, ctx.window)
        else:
            grads = _backward(grad_output, *saved, ctx.least_length, *ctx.window)
        return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None, None, None


def _differentiable(
    grad_output: Tensor,
    tensors: Any,
    wanted: tuple[bool, ...],
    eps: float,
    least_length: float | None,
    window: tuple,
) -> list[Tensor | None]:
    """The same gradients by operators that autograd can differentiate again."""
    with torch.autocast("cpu", enabled=False):
        output = _composed(tensors, eps, least_length, window)
        sources = [tensor for tensor, want in zip(tensors, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(output, sources, grad_output, create_graph=True))
    return [next(found) if want else None for want in wanted]


def _composed(tensors: Any, eps: float, least_length: float | None, window: tuple) -> Tensor:
    input, reduce_weight, norm_weight, norm_bias, span_weight, span_bias = tensors
    dtype, (kernel_size, stride, *_) = input.dtype, window
    cells = input if max(stride) == 1 else avg_pool2d(input, stride, stride, ceil_mode=True)
    z = conv2d(cells, reduce_weight.to(dtype))
    reduced = batch_norm(z, None, None, norm_weight, norm_bias, True, 0.0, eps).relu()
    bias = None if span_bias is None else span_bias.to(dtype)
    output = span_involution2d(input, reduced, span_weight.to(dtype), bias, *window)
    if least_length is None:
        return output
    groups = span_weight.shape[0] // (kernel_size[0] * kernel_size[1])
    return per_kernel_length(output, reduced, span_weight, span_bias, groups)
