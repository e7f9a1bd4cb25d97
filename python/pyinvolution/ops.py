"""The operators torch.ops.pyinvolution.*: what PyTorch has to know of them besides their CPU and CUDA kernels.

The kernels and schemas come from the native library (cpp/ops/schema.cpp). Registered here: shape functions for fake
tensors (torch.compile, torch.export, the meta device), autocast, vmap and FLOP formulas. Autograd is in ``functional``:
the operators themselves have no derivative, so that their results have neither gradients nor tangents.
Every check of arguments that Python makes is here, too; the kernels make the same ones.
"""

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._prims_common import suggest_memory_format
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.nn.functional import avg_pool2d, conv2d, pad
from torch.utils.flop_counter import register_flop_formula

from pyinvolution import reference
from pyinvolution._library import _C

involution2d = torch.ops.pyinvolution.involution2d.default
involution2d_backward = torch.ops.pyinvolution.involution2d_backward.default
local_correlation2d = torch.ops.pyinvolution.local_correlation2d.default
span_involution2d = torch.ops.pyinvolution.span_involution2d.default
span_involution2d_backward = torch.ops.pyinvolution.span_involution2d_backward.default
involution_layer2d = torch.ops.pyinvolution.involution_layer2d.default
traced_involution2d = torch.ops.pyinvolution.traced_involution2d.default
traced_local_correlation2d = torch.ops.pyinvolution.traced_local_correlation2d.default
traced_span_involution2d = torch.ops.pyinvolution.traced_span_involution2d.default
traced_involution_layer2d = torch.ops.pyinvolution.traced_involution_layer2d.default

Pair = tuple[int, int]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


BORDERS = reference.BORDERS
"""Names of the borders; the operators take their indices."""


def border_index(op: str, border: str) -> int:
    """The index of the border that is called so, or a TypeError or ValueError."""
    if not isinstance(border, str):
        raise TypeError(f"{op}: border is {border!r}, expected a str")
    if border not in BORDERS:
        raise ValueError(f"{op}: border is {border!r}, expected one of {', '.join(BORDERS)}")
    return BORDERS.index(border)


def output_size(
    size: int, kernel: int, stride: int, padding: int, dilation: int, border: int = 0, upsample: int = 1
) -> int | torch.SymInt:
    """Pixels of the output along one axis: with zeros outside the border as for a convolution, and 0 where the kernel
    does not fit; with windows that it shifts one for each ``stride``; and ``upsample`` times as many.
    """
    if border:
        return upsample * ((size + stride - 1) // stride)
    return upsample * torch.sym_max((size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1, 0)


def layer_output_size(size: int, stride: int) -> int | torch.SymInt:
    """Pixels of a layer's output along one axis, one for each cell of the stride."""
    return (size + stride - 1) // stride


@contextmanager
def untraced() -> Iterator[None]:
    """Sizes are ints in here, also under torch.jit.trace, where they are tensors that must not decide anything."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def shape_of(tensor: Tensor) -> Sequence[int]:
    """``tensor.shape`` to check, also under torch.jit.trace."""
    if not torch.jit.is_tracing():
        return tensor.shape
    with untraced():
        return tensor.shape


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _check_tensors(op: str, first: str, **given: Tensor | None) -> None:
    """Layout and dtype of all that are given; the dtype and device of the others must be those of the first."""
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    input = tensors[first]
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            raise ValueError(f"{op}: {name} has layout {tensor.layout}, expected torch.strided")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, expected float32, float64, float16 or bfloat16")
    for name, tensor in tensors.items():
        if tensor.dtype != input.dtype:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, expected {first}'s dtype {input.dtype}")
        if tensor.device != input.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected {first}'s device {input.device}")


def _check_pairs(op: str, **pairs: Sequence[int]) -> None:
    for name, pair in pairs.items():
        least = 0 if name == "padding" else 1
        if len(pair) != 2 or any(value < least or value >= 2**31 for value in pair):
            raise ValueError(f"{op}: {name} is {tuple(pair)}, expected two values of at least {least} and below 2^31")


def _check_window(
    op: str,
    name: str,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    border: int,
    upsample: Sequence[int],
) -> None:
    """What border and upsampling demand of the rest; ``size`` is that of the argument ``name``."""
    _check_pairs(op, upsample=upsample)
    if border not in range(len(BORDERS)):
        raise ValueError(f"{op}: border is {border}, expected 0 (zeros) or 1 (shift)")
    for axis, *values in zip(("height", "width"), size, kernel, stride, padding, dilation, upsample, strict=True):
        length, taps, step, zeros, gap, factor = values
        if step > 1 and factor > 1:
            raise ValueError(
                f"{op}: stride is {step} and upsample is {factor} for the {axis}, expected 1 for one of the two"
            )
        if border and zeros:
            raise ValueError(f'{op}: padding is {zeros} for the {axis}, expected 0 with border="shift"')
        if border and 0 < length < taps * gap:
            raise ValueError(
                f"{op}: {name} has a {axis} of {length}, expected at least {taps * gap}, kernel {taps} times dilation "
                f'{gap}, with border="shift"'
            )


def _window_text(
    size: Sequence[int],
    kernel: Sequence[int],
    expected: Sequence[int | torch.SymInt],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    border: int = 0,
    upsample: Sequence[int] = (1, 1),
) -> str:
    text = (
        f"{size[0]} x {size[1]}, a kernel of {kernel[0]} x {kernel[1]}, stride {tuple(stride)}, padding "
        f"{tuple(padding)} and dilation {tuple(dilation)}"
    )
    if border or max(upsample) > 1:
        text += f", border {BORDERS[border]}, upsample {tuple(upsample)}"
    return text if min(expected) > 0 else f"{text}: the kernel is larger than the padded input"


def _check_kernel(
    op: str, holder: str, input: Tensor, groups: int, kernel: Sequence[int], out: Sequence[int], *window: Any
) -> None:
    channels, *size = input.shape[1:]
    if groups < 1 or channels % groups != 0:
        raise ValueError(f"{op}: {holder} has {groups} groups, expected a divisor of input's {channels} channels")
    kh, kw = kernel
    if kh < 1 or kw < 1:
        raise ValueError(f"{op}: {holder} has a kernel of {kh} x {kw} taps, expected at least 1 x 1")
    expected = _output(size, kernel, *window)
    if out[0] != expected[0] or out[1] != expected[1]:
        raise ValueError(
            f"{op}: {holder} has kernels for {out[0]} x {out[1]} output pixels, expected {expected[0]} x {expected[1]} "
            f"for an input of {_window_text(size, kernel, expected, *window)}"
        )


def _output(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    border: int = 0,
    upsample: Sequence[int] = (1, 1),
) -> list[int | torch.SymInt]:
    """Rows and columns of the output."""
    pairs = zip(size, kernel, stride, padding, dilation, (border, border), upsample, strict=True)
    return [output_size(*values) for values in pairs]


def check(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    border: int = 0,
    upsample: Sequence[int] = (1, 1),
) -> None:
    """Raises a TypeError or ValueError for arguments that are no involution; the kernels make the same checks."""
    op = "involution2d"
    _check_tensors(op, "input", input=input, weight=weight)
    if input.dim() != 4:
        raise ValueError(f"{op}: input has shape {_shape(input)}, expected (N, C, H, W) or (C, H, W)")
    if weight.dim() != 6:
        raise ValueError(
            f"{op}: weight has shape {_shape(weight)}, expected (N, G, Kh, Kw, Ho, Wo), or without N for an "
            "input without N"
        )
    _check_pairs(op, stride=stride, padding=padding, dilation=dilation)
    if weight.shape[0] != input.shape[0]:
        raise ValueError(f"{op}: weight has batch size {weight.shape[0]}, expected input's, {input.shape[0]}")
    groups, kh, kw, *out = weight.shape[1:]
    window = (stride, padding, dilation, border, upsample)
    _check_window(op, "input", input.shape[2:], (kh, kw), *window)
    _check_kernel(op, "weight", input, groups, (kh, kw), out, *window)


def check_correlation(
    query: Tensor,
    key: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    border: int = 0,
    upsample: Sequence[int] = (1, 1),
) -> None:
    """The same for a local correlation."""
    op = "local_correlation2d"
    _check_tensors(op, "key", key=key, query=query)
    if key.dim() != 4:
        raise ValueError(f"{op}: key has shape {_shape(key)}, expected (N, C, H, W) or (C, H, W)")
    _check_pairs(op, kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation)
    batch, channels, *size = key.shape
    if groups < 1 or channels % groups != 0:
        raise ValueError(f"{op}: groups is {groups}, expected a divisor of key's {channels} channels")
    window = (stride, padding, dilation, border, upsample)
    _check_window(op, "key", size, kernel_size, *window)
    out = _output(size, kernel_size, *window)
    if _shape(query) != (batch, channels, *out):
        raise ValueError(
            f"{op}: query has shape {_shape(query)}, expected {(batch, channels, *out)} for a key of "
            f"{_window_text(size, kernel_size, out, *window)}"
        )


def check_span(
    input: Tensor,
    reduced: Tensor,
    span_weight: Tensor,
    span_bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    """The same for a span involution."""
    op = "span_involution2d"
    _check_tensors(op, "input", input=input, reduced=reduced, span_weight=span_weight, span_bias=span_bias)
    if input.dim() != 4:
        raise ValueError(f"{op}: input has shape {_shape(input)}, expected (N, C, H, W) or (C, H, W)")
    if reduced.dim() != 4:
        raise ValueError(
            f"{op}: reduced has shape {_shape(reduced)}, expected (N, R, Ho, Wo), or without N for an input without N"
        )
    _check_pairs(op, kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation)
    if reduced.shape[0] != input.shape[0]:
        raise ValueError(f"{op}: reduced has batch size {reduced.shape[0]}, expected input's, {input.shape[0]}")
    groups = _check_span_weight(op, span_weight, span_bias, reduced.shape[1], "reduced's channels", kernel_size)
    holder = "reduced" if groups >= 1 and input.shape[1] % groups == 0 else "span_weight"
    _check_kernel(op, holder, input, groups, kernel_size, reduced.shape[2:], stride, padding, dilation)


def check_layer(
    input: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    span_weight: Tensor,
    span_bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    """The same for a whole layer, ``torch.ops.pyinvolution.involution_layer2d``."""
    op = "involution_layer2d"
    parameters = {"reduce_bias": reduce_bias, "span_weight": span_weight, "span_bias": span_bias}
    _check_tensors(op, "input", input=input, reduce_weight=reduce_weight, **parameters)
    if input.dim() != 4:
        raise ValueError(f"{op}: input has shape {_shape(input)}, expected (N, C, H, W)")
    _check_pairs(op, kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation)
    channels = input.shape[1]
    if not _is_pointwise(reduce_weight, channels):
        raise ValueError(
            f"{op}: reduce_weight has shape {_shape(reduce_weight)}, expected (R, C) or (R, C, 1, 1) with C = "
            f"{channels}, input's channels"
        )
    reduced = reduce_weight.shape[0]
    if reduce_bias is not None and tuple(reduce_bias.shape) != (reduced,):
        raise ValueError(f"{op}: reduce_bias has shape {_shape(reduce_bias)}, expected ({reduced},)")
    groups = _check_span_weight(op, span_weight, span_bias, reduced, "reduce_weight's rows", kernel_size)
    if groups < 1 or channels % groups != 0:
        raise ValueError(f"{op}: span_weight has {groups} groups, expected a divisor of input's {channels} channels")


def _is_pointwise(weight: Tensor, columns: int) -> bool:
    """Whether ``weight`` is that of a 1x1 convolution, with or without its last two dimensions."""
    shape = tuple(weight.shape)
    return len(shape) in (2, 4) and shape[1] == columns and shape[2:] in ((), (1, 1))


def _check_span_weight(
    op: str, span_weight: Tensor, span_bias: Tensor | None, reduced: int, holder: str, kernel_size: Sequence[int]
) -> int:
    """Returns the number of groups."""
    if not _is_pointwise(span_weight, reduced):
        raise ValueError(
            f"{op}: span_weight has shape {_shape(span_weight)}, expected (G * Kh * Kw, R) or (G * Kh * Kw, R, 1, 1) "
            f"with R = {reduced}, {holder}"
        )
    rows, taps = span_weight.shape[0], kernel_size[0] * kernel_size[1]
    if rows % taps != 0:
        raise ValueError(
            f"{op}: span_weight has {rows} rows, expected a multiple of the {taps} taps of kernel_size "
            f"{tuple(kernel_size)}"
        )
    if span_bias is not None and tuple(span_bias.shape) != (rows,):
        raise ValueError(f"{op}: span_bias has shape {_shape(span_bias)}, expected ({rows},)")
    return rows // taps


# --- how a span involution runs ---------------------------------------------------------------------------------------


def fuses_span(
    input: Tensor,
    reduced: Tensor,
    span_weight: Tensor,
    window: Sequence[Pair],
    differentiable: bool,
) -> bool:
    """Whether a kernel computes W inside the involution (``route`` in cpp/core/dispatch.cpp decides).

    ``window`` has kernel_size, stride, padding and dilation. ``differentiable``: a backward pass will follow. Where
    that has no kernel, W is better kept than computed twice.
    """
    if input.device.type not in ("cpu", "cuda"):
        return False
    transformed = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
    if not transformed and type(input) in PLAIN_TENSORS:
        return torch.ops.pyinvolution.fuses_span(input, reduced, span_weight, *window, differentiable)
    # Dynamo may take any int that it reads for a symbol; those of a window are specialised.
    window = tuple((operator.index(rows), operator.index(columns)) for rows, columns in window)
    # There are no addresses, and sizes may be symbols: dense tensors of these sizes, or where a size is a symbol of the
    # size that gives 14 output pixels. What every kernel is compiled for (channels, window) is specialised.
    window = [(operator.index(vertical), operator.index(horizontal)) for vertical, horizontal in window]
    sizes = [
        operator.index(size) if has_static_value(size) else 13 * s + d * (k - 1) + 1 - 2 * p
        for size, k, s, p, d in zip(input.shape[2:], *window, strict=True)
    ]
    channels = operator.index(input.shape[1])
    rows, width = operator.index(span_weight.shape[0]), operator.index(span_weight.shape[1])
    channels_last = True if input.stride(1) == 1 and channels > 1 else False  # noqa: SIM210  (a symbol as a bool)
    return _fuses_dense_span(
        str(input.dtype).removeprefix("torch."),
        input.device.type,
        (1, channels, *sizes),
        rows // (window[0][0] * window[0][1]),
        width,
        window,
        channels_last,
        differentiable,
    )


def fuses_dense_span(input: Tensor, groups: int, reduced: int, window: Sequence[Pair]) -> bool:
    """The same for a training step on a CPU, of a dense input; its reduced channels need not be there yet."""
    return _C.fuses_span(
        dtype=str(input.dtype).removeprefix("torch."),
        device="cpu",
        input=tuple(input.shape),
        groups=groups,
        reduced=reduced,
        kernel_size=window[0],
        stride=window[1],
        padding=window[2],
        dilation=window[3],
        channels_last=True,
        differentiable=True,
    )


PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


@torch.compiler.assume_constant_result
def _fuses_dense_span(
    dtype: str,
    device: str,
    input: tuple[int, ...],
    groups: int,
    reduced: int,
    window: Sequence[Pair],
    channels_last: bool,
    differentiable: bool,
) -> bool:
    kernel_size, stride, padding, dilation = window
    return _C.fuses_span(
        dtype=dtype, device=device, input=input, groups=groups, reduced=reduced, kernel_size=kernel_size,
        stride=stride, padding=padding, dilation=dilation, channels_last=channels_last, differentiable=differentiable,
    )  # fmt: skip


def backward(grad_output: Tensor, input: Tensor, weight: Tensor, window: Sequence[Any], needed: Sequence[bool]) -> Any:
    """Both gradients of an involution, or those that are needed; ``window`` is all that follows the weight."""
    return involution2d_backward(grad_output, input, weight, *window[:3], needed, *window[3:])


# --- shape functions --------------------------------------------------------------------------------------------------


@torch.library.register_fake("pyinvolution::involution2d")
def _fake_involution(input: Tensor, weight: Tensor, *window: Any) -> Tensor:
    check(input, weight, *window)
    shape = (*input.shape[:2], *weight.shape[-2:])
    return input.new_empty(shape).to(memory_format=suggest_memory_format(input))


@torch.library.register_fake("pyinvolution::involution2d_backward")
def _(grad_output, input, weight, stride, padding, dilation, output_mask, *window):
    check(input, weight, stride, padding, dilation, *window)
    expected = (*input.shape[:2], *weight.shape[-2:])
    if tuple(grad_output.shape) != expected:
        raise ValueError(f"involution2d: grad_output has shape {_shape(grad_output)}, expected {expected}")
    return tuple(
        torch.empty_like(tensor) if wanted else input.new_empty(0)
        for tensor, wanted in zip((input, weight), output_mask, strict=True)
    )


@torch.library.register_fake("pyinvolution::local_correlation2d")
def _fake_correlation(query, key, kernel_size, stride, padding, dilation, groups, *window):
    check_correlation(query, key, kernel_size, stride, padding, dilation, groups, *window)
    batch, pixels = key.shape[0], query.shape[2:]
    if suggest_memory_format(key) == torch.channels_last:
        return key.new_empty((batch, *pixels, groups, *kernel_size)).permute(0, 3, 4, 5, 1, 2)
    return key.new_empty((batch, groups, *kernel_size, *pixels))


@torch.library.register_fake("pyinvolution::span_involution2d")
def _fake_span(input, reduced, span_weight, span_bias, scale, shift, relu, kernel_size, stride, padding, dilation):
    check_span(input, reduced, span_weight, span_bias, kernel_size, stride, padding, dilation)
    shape = (*input.shape[:2], *reduced.shape[-2:])
    return input.new_empty(shape).to(memory_format=suggest_memory_format(input))


@torch.library.register_fake("pyinvolution::involution_layer2d")
def _fake_layer(
    input, reduce_weight, reduce_bias, span_weight, span_bias, scale, shift, relu, kernel_size, stride, *rest
):
    check_layer(input, reduce_weight, reduce_bias, span_weight, span_bias, kernel_size, stride, *rest)
    pixels = map(layer_output_size, input.shape[2:], stride)
    return input.new_empty((*input.shape[:2], *pixels)).to(memory_format=suggest_memory_format(input))


@torch.library.register_fake("pyinvolution::span_involution2d_backward")
def _(
    grad_output, input, reduced, span_weight, span_bias, kernel_size, stride, padding, dilation, output_mask
):  # fmt: skip
    check_span(input, reduced, span_weight, span_bias, kernel_size, stride, padding, dilation)
    expected = (*input.shape[:2], *reduced.shape[-2:])
    if tuple(grad_output.shape) != expected:
        raise ValueError(f"span_involution2d: grad_output has shape {_shape(grad_output)}, expected {expected}")
    grads = (
        torch.empty_like(input),
        torch.empty_like(reduced),
        span_weight.new_empty(span_weight.shape),
        input.new_empty(span_weight.shape[:1]),
    )
    return tuple(grad if wanted else input.new_empty(0) for grad, wanted in zip(grads, output_mask, strict=True))


def _statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    mean = input.new_empty(input.shape[1:2], dtype=torch.float32)
    return mean, torch.empty_like(mean)


@torch.library.register_fake("pyinvolution::batch_norm")
def _(input, residual, weight, bias, *rest):
    return torch.empty_like(input), *_statistics(input)


@torch.library.register_fake("pyinvolution::batch_norm_statistics")
def _(input, *rest):
    return _statistics(input)


@torch.library.register_fake("pyinvolution::batch_norm_output")
def _(input, *rest):
    return torch.empty_like(input)


@torch.library.register_fake("pyinvolution::batch_norm_backward")
def _(grad_output, input, output, weight, bias, mean, invstd, relu):
    grad_residual = input.new_empty(0) if output is None else torch.empty_like(input)
    return torch.empty_like(input), grad_residual, torch.empty_like(mean), torch.empty_like(mean)


@torch.library.register_fake("pyinvolution::training_layer2d")
def _(input, reduce_weight, norm_weight, *rest):
    window = rest[-4:]
    span_bias = None if rest[7] is None else rest[7].to(input.dtype)
    check_layer(input, reduce_weight.to(input.dtype), None, rest[6].to(input.dtype), span_bias, *window)
    pixels = [*map(layer_output_size, input.shape[2:], window[1])]
    images = [input.new_empty((input.shape[0], channels, *pixels)) for channels in (input.shape[1], len(reduce_weight))]
    mean = torch.empty_like(norm_weight)
    return *(image.to(memory_format=torch.channels_last) for image in images), mean, torch.empty_like(mean)


@torch.library.register_fake("pyinvolution::training_layer2d_backward")
def _(grad_output, input, reduce_weight, norm_weight, norm_bias, span_weight, span_bias, *rest):
    parameters = (reduce_weight, norm_weight, norm_bias, span_weight)
    grad_bias = input.new_empty(0) if span_bias is None else torch.empty_like(span_bias)
    return torch.empty_like(input), *map(torch.empty_like, parameters), grad_bias


# --- in operations of PyTorch, for torch.onnx -------------------------------------------------------------------------


def cell_mean(input: Tensor, stride: Sequence[int]) -> Tensor:
    """Means over cells of ``stride`` where sizes are symbols.

    torch.export cannot prove the size that ``ceil_mode`` of a pooling gives; that of means over a zero margin it can.
    (Sums would be simpler, but torch.onnx drops divisor_override.)
    """
    (sh, sw), (height, width) = stride, input.shape[2:]
    means = avg_pool2d(pad(input, (0, sw - 1, 0, sh - 1)), (sh, sw), (sh, sw))
    rows = (height - sh * torch.arange(means.shape[2], device=input.device)).clamp(max=sh)
    columns = (width - sw * torch.arange(means.shape[3], device=input.device)).clamp(max=sw)
    return means * (sh * sw / (rows[:, None] * columns).to(means.dtype))


def _widened(input: Tensor, *others: Tensor | None) -> tuple:
    """All in the type of sums."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return tuple(tensor if tensor is None else tensor.to(dtype) for tensor in (input, *others))


def _views_of_taps(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    border: int = 0,
    upsample: Sequence[int] = (1, 1),
    *,
    end: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """For each tap what all windows of ``x`` read there, (..., Ho, Wo): views, or with another border or an upsampling
    than the default images of their own. ``end`` is a padding of its own for the bottom and right.
    """
    if border or max(upsample) > 1:
        starts = [
            reference.first_taps(size, *values, border=border, device=x.device)
            for size, *values in zip(shape_of(x)[2:], kernel, stride, padding, dilation, upsample, strict=True)
        ]
        x = pad(x, (padding[1], padding[1], padding[0], padding[0]))
        for i in range(kernel[0]):
            of_row = x.index_select(-2, starts[0] + (padding[0] + dilation[0] * i))
            for j in range(kernel[1]):
                yield of_row.index_select(-1, starts[1] + (padding[1] + dilation[1] * j))
        return
    end = padding if end is None else end
    x = pad(x, (padding[1], end[1], padding[0], end[0]))
    for tap in itertools.product(*map(range, kernel)):
        # The last taps end with the image.
        rows, columns = (
            slice(d * i, -d * (k - 1 - i) or None, s) for i, k, s, d in zip(tap, kernel, stride, dilation, strict=True)
        )
        yield x[..., rows, columns]


def _sum_of_taps(x: Tensor, weight: Tensor, *window: Any, end: Sequence[int] | None = None) -> Tensor:
    """For each tap a shifted view of the input times the tap's weights: no memory beyond a few images."""
    groups, *kernel = shape_of(weight)[1:4]
    total: Tensor | None = None
    taps = itertools.product(*map(range, kernel))
    for (i, j), view in zip(taps, _views_of_taps(x, kernel, *window, end=end), strict=True):
        term = view.unflatten(1, (groups, -1)) * weight[:, :, i, j].unsqueeze(2)
        total = term if total is None else total + term
    assert total is not None
    return total.flatten(1, 2)


def _with_epilogue(output: Tensor, scale: Tensor | None, shift: Tensor | None, relu: bool) -> Tensor:
    if scale is not None and shift is not None:
        output = output * scale[:, None, None] + shift[:, None, None]
    return output.relu() if relu else output


def plain_involution2d(input, weight, *window) -> Tensor:
    x, weight = _widened(input, weight)
    return _sum_of_taps(x, weight, *window).to(input.dtype)


def plain_local_correlation2d(query, key, kernel_size, stride, padding, dilation, groups, *rest) -> Tensor:
    k, q = _widened(key, query)
    views = _views_of_taps(k, kernel_size, stride, padding, dilation, *rest)
    scores = [(view * q).unflatten(1, (groups, -1)).sum(2) for view in views]
    return torch.stack(scores, 2).unflatten(2, tuple(kernel_size)).to(key.dtype)


def plain_span_involution2d(
    input, reduced, span_weight, span_bias, scale, shift, relu, kernel_size, stride, padding, dilation
) -> Tensor:  # fmt: skip
    x, reduced, span_weight, span_bias = _widened(input, reduced, span_weight, span_bias)
    output = _sum_of_taps(x, span(reduced, span_weight, span_bias, kernel_size), stride, padding, dilation)
    return _with_epilogue(output, scale, shift, relu).to(input.dtype)


def plain_involution_layer2d(
    input, reduce_weight, reduce_bias, span_weight, span_bias, scale, shift, relu, kernel_size, stride, padding,
    dilation,
) -> Tensor:  # fmt: skip
    x, reduce_weight, reduce_bias, span_weight, span_bias = _widened(
        input, reduce_weight, reduce_bias, span_weight, span_bias
    )
    cells = x
    if max(stride) > 1:
        symbolic = any(isinstance(size, torch.SymInt) for size in x.shape[2:])
        cells = cell_mean(x, stride) if symbolic else avg_pool2d(x, stride, stride, ceil_mode=True)
    reduced = conv2d(cells, reduce_weight.flatten(1)[:, :, None, None], reduce_bias).relu()
    # As much end padding as gives an output pixel for every cell.
    end = [d * (k - 1) - p for d, k, p in zip(dilation, kernel_size, padding, strict=True)]
    output = _sum_of_taps(x, span(reduced, span_weight, span_bias, kernel_size), stride, padding, dilation, end=end)
    return _with_epilogue(output, scale, shift, relu).to(input.dtype)


PLAIN: dict[OpOverload, Callable[..., Tensor]] = {
    involution2d: plain_involution2d,
    local_correlation2d: plain_local_correlation2d,
    span_involution2d: plain_span_involution2d,
    involution_layer2d: plain_involution_layer2d,
}
"""The operators in operations of PyTorch: a table for ``ExportedProgram.run_decompositions``.

Not PyTorch's own table: inductor would then want to decompose them, too, and fails where the variable CI is set.
"""

_TRACED = {
    involution2d: traced_involution2d,
    local_correlation2d: traced_local_correlation2d,
    span_involution2d: traced_span_involution2d,
    involution_layer2d: traced_involution_layer2d,
}


def recorded(operator: OpOverload) -> Callable[..., Tensor]:
    """What an exporter is to record for ``operator``: for ONNX plain operations, for torch.jit.trace an operator with
    gradients of its own, else the operator.
    """
    tracing = torch.jit.is_tracing()
    if not tracing and not torch.compiler.is_exporting():
        return operator
    if torch.onnx.is_in_onnx_export():
        return PLAIN[operator]
    return partial(_trace, _TRACED[operator]) if tracing else operator


def _trace(operator: OpOverload, *arguments: Any) -> Tensor:
    """Records ``operator``; what it computes meanwhile is no occasion to measure its kernels (`autotune`)."""
    _C.pause_autotune(True)
    try:
        return operator(*arguments)
    finally:
        _C.pause_autotune(False)


# --- autocast ---------------------------------------------------------------------------------------------------------


def autocast_tensors(input: Tensor, *others: Tensor | None) -> tuple:
    """Casts as autocast does for a convolution: to its dtype on its device, all floating dtypes but float64."""
    tensors = (input, *others)
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return tensors
    device_type = input.device.type
    # Not torch.amp.is_autocast_available, which torch 2.10 cannot compile.
    if device_type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


_autocast = torch.library.Library("pyinvolution", "IMPL")


def _register_autocast(key: str, device_type: str, operator: OpOverload, tensors: int) -> None:
    """Let autocast cast the first ``tensors`` arguments of ``operator``; scales and shifts stay in their dtype."""

    def autocast(*arguments):
        cast = autocast_tensors(*arguments[:tensors])
        with torch.amp.autocast(device_type, enabled=False):
            return operator(*cast, *arguments[tensors:])

    _autocast.impl(operator, autocast, key)


for _key, _device_type in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
    for _operator, _tensors in (
        (involution2d, 2),
        (traced_involution2d, 2),
        (local_correlation2d, 2),
        (traced_local_correlation2d, 2),
        (span_involution2d, 4),
        (traced_span_involution2d, 4),
        (involution_layer2d, 5),
        (traced_involution_layer2d, 5),
    ):
        _register_autocast(_key, _device_type, _operator, _tensors)


# --- vmap: each image has its own kernels, so a mapped dimension is a part of the batch -------------------------------


def to_batch(tensor: Tensor, mapped: int | None, size: int) -> Tensor:
    """Moves the mapped dimension to the front, or makes it there, and merges it with the batch behind it."""
    tensor = tensor.unsqueeze(0).expand(size, *tensor.shape) if mapped is None else tensor.movedim(mapped, 0)
    return tensor.flatten(0, 1)


@torch.library.register_vmap("pyinvolution::involution2d")
def _(info, in_dims, input, weight, *window):
    size = info.batch_size
    merged = (to_batch(t, d, size) for t, d in zip((input, weight), in_dims[:2], strict=True))
    return involution2d(*merged, *window).unflatten(0, (size, -1)), 0


@torch.library.register_vmap("pyinvolution::local_correlation2d")
def _(info, in_dims, query, key, *rest):
    size = info.batch_size
    merged = (to_batch(t, d, size) for t, d in zip((query, key), in_dims[:2], strict=True))
    return local_correlation2d(*merged, *rest).unflatten(0, (size, -1)), 0


@torch.library.register_vmap("pyinvolution::involution2d_backward")
def _(info, in_dims, grad_output, input, weight, stride, padding, dilation, output_mask, *rest):
    size = info.batch_size
    merged = (to_batch(t, d, size) for t, d in zip((grad_output, input, weight), in_dims[:3], strict=True))
    grads = involution2d_backward(*merged, stride, padding, dilation, output_mask, *rest)
    return tuple(
        grad.unflatten(0, (size, -1)) if wanted else grad for grad, wanted in zip(grads, output_mask, strict=True)
    ), tuple(0 if wanted else None for wanted in output_mask)


def span(reduced: Tensor, span_weight: Tensor, span_bias: Tensor | None, kernel_size: Pair) -> Tensor:
    """The weights of a span involution, (N, G, Kh, Kw, Ho, Wo): its span as the 1x1 convolution that it is."""
    rows = span_weight.flatten(1)
    if not torch.compiler.is_compiling() and 0 in shape_of(reduced)[2:]:
        # A convolution refuses an image without pixels.
        weight = torch.einsum("kr,nrhw->nkhw", rows, reduced)
    else:
        weight = conv2d(reduced, rows[:, :, None, None], span_bias)
    return weight.unflatten(1, (-1, *kernel_size))


def span_gradients(
    grad_weight: Tensor, reduced: Tensor, span_weight: Tensor, span_bias: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of reduced, span_weight and span_bias, as functions that can be differentiated again."""
    grad = grad_weight.flatten(1, 3).flatten(2)
    rows = span_weight.flatten(1)
    return (
        torch.einsum("kr,nkp->nrp", rows, grad).reshape_as(reduced) if needed[0] else None,
        torch.einsum("nkp,nrp->kr", grad, reduced.flatten(2)).reshape_as(span_weight) if needed[1] else None,
        grad.sum((0, 2)) if needed[2] else None,
    )


def merged_span(
    reduced: Tensor,
    span_weight: Tensor,
    span_bias: Tensor | None,
    dims: Sequence[int | None],
    size: int,
    kernel_size: Sequence[int],
) -> Tensor:
    """The weights of ``size`` elements with parameters of their own, merged into the batch."""

    def each(tensor: Tensor, dim: int | None) -> Tensor:
        return to_batch(tensor, dim, size).unflatten(0, (size, -1))

    rows, pixels = each(span_weight, dims[1]).flatten(2), each(reduced, dims[0])
    weight = torch.einsum("vkr,vnrhw->vnkhw", rows, pixels)
    if span_bias is not None:
        weight = weight + each(span_bias, dims[2])[:, None, :, None, None]
    return weight.flatten(0, 1).unflatten(1, (-1, *kernel_size))


@torch.library.register_vmap("pyinvolution::span_involution2d")
def _(info, in_dims, input, reduced, span_weight, span_bias, scale, shift, relu, kernel_size, *geometry):
    size = info.batch_size
    if in_dims[2] is None and in_dims[3] is None and in_dims[4] is None and in_dims[5] is None:
        merged = (to_batch(t, d, size) for t, d in zip((input, reduced), in_dims[:2], strict=True))
        output = span_involution2d(*merged, span_weight, span_bias, scale, shift, relu, kernel_size, *geometry)
    elif scale is None and not relu:
        # Parameters of their own for each element: only their weights can be merged into the batch.
        weight = merged_span(reduced, span_weight, span_bias, in_dims[1:4], size, kernel_size)
        output = involution2d(to_batch(input, in_dims[0], size), weight, *geometry)
    else:
        raise ValueError("span_involution2d: vmap over the parameters takes no scale, shift and relu")
    return output.unflatten(0, (size, -1)), 0


@torch.library.register_vmap("pyinvolution::involution_layer2d")
def _(info, in_dims, input, *rest):
    if any(dim is not None for dim in in_dims[1:7]):
        raise ValueError("involution_layer2d: vmap takes a mapped input, expected parameters that are not")
    output = involution_layer2d(to_batch(input, in_dims[0], info.batch_size), *rest)
    return output.unflatten(0, (info.batch_size, -1)), 0


@torch.library.register_vmap("pyinvolution::span_involution2d_backward")
def _(info, in_dims, grad_output, input, reduced, span_weight, span_bias, kernel_size, *rest):
    # Each element has gradients of its parameters to itself, hence the weights are composed.
    *geometry, output_mask = rest
    size = info.batch_size
    weight = merged_span(reduced, span_weight, span_bias, in_dims[2:5], size, kernel_size)
    merged = (to_batch(t, d, size) for t, d in zip((grad_output, input), in_dims[:2], strict=True))
    mask = (output_mask[0], any(output_mask[1:]))
    grad_input, grad_weight = involution2d_backward(*merged, weight, *geometry, mask)
    grad = grad_weight.flatten(1, 3).flatten(2).unflatten(0, (size, -1)) if mask[1] else None
    rows = to_batch(span_weight, in_dims[3], size).unflatten(0, (size, -1))
    pixels = to_batch(reduced, in_dims[2], size).unflatten(0, (size, -1))
    empty = grad_input.new_empty(size, 0)
    return (
        grad_input.unflatten(0, (size, -1)) if output_mask[0] else empty,
        torch.einsum("vkr,vnkp->vnrp", rows.flatten(2), grad).reshape_as(pixels) if output_mask[1] else empty,
        torch.einsum("vnkp,vnrp->vkr", grad, pixels.flatten(3)).reshape_as(rows) if output_mask[2] else empty,
        grad.sum((1, 3)) if grad is not None and output_mask[3] else empty,
    ), (0,) * 4


# --- FLOP formulas: a multiply-add is two -----------------------------------------------------------------------------


def _flops(input_shape: Sequence[int], weight_shape: Sequence[int]) -> int:
    batch, channels = input_shape[:2]
    kh, kw, out_h, out_w = weight_shape[2:]
    return 2 * batch * channels * kh * kw * out_h * out_w


@register_flop_formula(torch.ops.pyinvolution.involution2d)
def _(input_shape, weight_shape, *args, **kwargs) -> int:
    return _flops(input_shape, weight_shape)


@register_flop_formula(torch.ops.pyinvolution.involution2d_backward)
def _(grad_shape, input_shape, weight_shape, stride, padding, dilation, output_mask, *args, **kwargs) -> int:
    return sum(output_mask) * _flops(input_shape, weight_shape)


@register_flop_formula(torch.ops.pyinvolution.local_correlation2d)
def _(query_shape, key_shape, kernel_size, *args, **kwargs) -> int:
    return 2 * math.prod(query_shape) * math.prod(kernel_size)


def _span_flops(reduced_shape: Sequence[int], span_shape: Sequence[int]) -> int:
    batch, reduced, out_h, out_w = reduced_shape
    return 2 * batch * reduced * span_shape[0] * out_h * out_w


def _applied_flops(input_shape: Sequence[int], reduced_shape: Sequence[int], kernel_size: Sequence[int]) -> int:
    return _flops(input_shape, (input_shape[0], 0, *kernel_size, *reduced_shape[2:]))


@register_flop_formula(torch.ops.pyinvolution.span_involution2d)
def _(input_shape, reduced_shape, span_shape, span_bias, scale, shift, relu, kernel_size, *args, **kwargs) -> int:
    return _span_flops(reduced_shape, span_shape) + _applied_flops(input_shape, reduced_shape, kernel_size)


@register_flop_formula(torch.ops.pyinvolution.involution_layer2d)
def _(
    input_shape, reduce_shape, reduce_bias, span_shape, span_bias, scale, shift, relu, kernel_size, stride, *args,
    **kwargs,
) -> int:  # fmt: skip
    cells = map(layer_output_size, input_shape[2:], stride)
    reduced_shape = (input_shape[0], reduce_shape[0], *cells)
    return (
        2 * math.prod(reduced_shape) * input_shape[1]
        + _span_flops(reduced_shape, span_shape)
        + _applied_flops(input_shape, reduced_shape, kernel_size)
    )


@register_flop_formula(torch.ops.pyinvolution.span_involution2d_backward)
def _(
    grad_shape, input_shape, reduced_shape, span_shape, span_bias, kernel_size, stride, padding, dilation, output_mask,
    **kwargs,
) -> int:  # fmt: skip
    # Of the mathematics, as for a layer whose weights are kept: recomputing them is not counted.
    applied = output_mask[0] + any(output_mask[1:])
    return applied * _applied_flops(input_shape, reduced_shape, kernel_size) + sum(output_mask[1:3]) * _span_flops(
        reduced_shape, span_shape
    )
