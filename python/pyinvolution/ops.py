"""The operators torch.ops.pyinvolution.*: what PyTorch has to know of them besides their CPU and CUDA kernels.

The kernels and schemas come from the native library (cpp/ops/schema.cpp). Registered here: shape functions for fake
tensors (torch.compile, torch.export, the meta device), autocast, vmap and FLOP formulas. Autograd is in ``functional``.
"""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils.flop_counter import register_flop_formula

from pyinvolution import _library  # noqa: F401

involution2d = torch.ops.pyinvolution.involution2d.default
involution2d_backward = torch.ops.pyinvolution.involution2d_backward.default

Pair = tuple[int, int]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int | torch.SymInt:
    """Pixels of the output along one axis, as for a convolution; 0 where the kernel does not fit."""
    return torch.sym_max((size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1, 0)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def check(
    input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> None:
    """Raises a TypeError or ValueError for arguments that are no involution; the kernels make the same checks."""
    for name, tensor in (("input", input), ("weight", weight)):
        if tensor.layout != torch.strided:
            raise ValueError(f"involution2d: {name} has layout {tensor.layout}, expected torch.strided")
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"involution2d: {name} has dtype {tensor.dtype}, expected float32, float64, float16 or bfloat16"
            )
    if weight.dtype != input.dtype:
        raise TypeError(f"involution2d: weight has dtype {weight.dtype}, expected input's dtype {input.dtype}")
    if weight.device != input.device:
        raise ValueError(f"involution2d: weight is on {weight.device}, expected input's device {input.device}")
    if input.dim() != 4:
        raise ValueError(f"involution2d: input has shape {_shape(input)}, expected (N, C, H, W) or (C, H, W)")
    if weight.dim() != 6:
        raise ValueError(
            f"involution2d: weight has shape {_shape(weight)}, expected (N, G, Kh, Kw, Ho, Wo), or without N for an "
            "input without N"
        )
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(pair) != 2 or any(value < least or value >= 2**31 for value in pair):
            raise ValueError(
                f"involution2d: {name} is {tuple(pair)}, expected two values of at least {least} and below 2^31"
            )
    batch, channels, height, width = input.shape
    if weight.shape[0] != batch:
        raise ValueError(f"involution2d: weight has batch size {weight.shape[0]}, expected input's, {batch}")
    groups, kh, kw, out_h, out_w = weight.shape[1:]
    if groups < 1 or channels % groups != 0:
        raise ValueError(f"involution2d: weight has {groups} groups, expected a divisor of input's {channels} channels")
    if kh < 1 or kw < 1:
        raise ValueError(f"involution2d: weight has a kernel of {kh} x {kw} taps, expected at least 1 x 1")
    expected_h = output_size(height, kh, stride[0], padding[0], dilation[0])
    expected_w = output_size(width, kw, stride[1], padding[1], dilation[1])
    if out_h != expected_h or out_w != expected_w:
        too_large = "" if expected_h > 0 and expected_w > 0 else ": the kernel is larger than the padded input"
        raise ValueError(
            f"involution2d: weight has kernels for {out_h} x {out_w} output pixels, expected "
            f"{expected_h} x {expected_w} for an input of {height} x {width}, a kernel of {kh} x {kw}, "
            f"stride {tuple(stride)}, padding {tuple(padding)} and dilation {tuple(dilation)}{too_large}"
        )


def explain_failure(
    error: RuntimeError, input: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair
) -> NoReturn:
    """Turns an operator's RuntimeError into the TypeError or ValueError of the argument at fault, where one is."""
    check(input, weight, stride, padding, dilation)
    raise error


# --- shape functions --------------------------------------------------------------------------------------------------


@torch.library.register_fake("pyinvolution::involution2d")
def _(input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Tensor:
    check(input, weight, stride, padding, dilation)
    shape = (*input.shape[:2], *weight.shape[-2:])
    return input.new_empty(shape).to(memory_format=suggest_memory_format(input))


@torch.library.register_fake("pyinvolution::involution2d_backward")
def _(grad_output, input, weight, stride, padding, dilation, output_mask):
    check(input, weight, stride, padding, dilation)
    expected = (*input.shape[:2], *weight.shape[-2:])
    if tuple(grad_output.shape) != expected:
        raise ValueError(f"involution2d: grad_output has shape {_shape(grad_output)}, expected {expected}")
    return tuple(
        torch.empty_like(tensor) if wanted else input.new_empty(0)
        for tensor, wanted in zip((input, weight), output_mask, strict=True)
    )


# --- autocast ---------------------------------------------------------------------------------------------------------


def autocast_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts as autocast does for a convolution: to its dtype on its device, all floating dtypes but float64."""
    device_type = tensors[0].device.type
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


_autocast = torch.library.Library("pyinvolution", "IMPL")


def _register_autocast(key: str, device_type: str) -> None:
    def involution2d_autocast(input, weight, stride, padding, dilation):
        tensors = autocast_tensors(input, weight)
        with torch.amp.autocast(device_type, enabled=False):
            return involution2d(*tensors, stride, padding, dilation)

    _autocast.impl("involution2d", involution2d_autocast, key)


_register_autocast("AutocastCPU", "cpu")
_register_autocast("AutocastCUDA", "cuda")


# --- vmap: each image has its own kernels, so a mapped dimension is a part of the batch -------------------------------


def to_batch(tensor: Tensor, mapped: int | None, size: int) -> Tensor:
    """Moves the mapped dimension to the front, or makes it there, and merges it with the batch behind it."""
    tensor = tensor.unsqueeze(0).expand(size, *tensor.shape) if mapped is None else tensor.movedim(mapped, 0)
    return tensor.flatten(0, 1)


@torch.library.register_vmap("pyinvolution::involution2d")
def _(info, in_dims, input, weight, stride, padding, dilation):
    size = info.batch_size
    merged = (to_batch(t, d, size) for t, d in zip((input, weight), in_dims[:2], strict=True))
    return involution2d(*merged, stride, padding, dilation).unflatten(0, (size, -1)), 0


@torch.library.register_vmap("pyinvolution::involution2d_backward")
def _(info, in_dims, grad_output, input, weight, stride, padding, dilation, output_mask):
    size = info.batch_size
    merged = (to_batch(t, d, size) for t, d in zip((grad_output, input, weight), in_dims[:3], strict=True))
    grads = involution2d_backward(*merged, stride, padding, dilation, output_mask)
    return tuple(
        grad.unflatten(0, (size, -1)) if wanted else grad for grad, wanted in zip(grads, output_mask, strict=True)
    ), tuple(0 if wanted else None for wanted in output_mask)


# --- FLOP formulas: a multiply-add is two -----------------------------------------------------------------------------


def _flops(input_shape: Sequence[int], weight_shape: Sequence[int]) -> int:
    batch, channels = input_shape[:2]
    kh, kw, out_h, out_w = weight_shape[2:]
    return 2 * batch * channels * kh * kw * out_h * out_w


@register_flop_formula(torch.ops.pyinvolution.involution2d)
def _(input_shape, weight_shape, *args, **kwargs) -> int:
    return _flops(input_shape, weight_shape)


@register_flop_formula(torch.ops.pyinvolution.involution2d_backward)
def _(grad_shape, input_shape, weight_shape, stride, padding, dilation, output_mask, **kwargs) -> int:
    return sum(output_mask) * _flops(input_shape, weight_shape)
