"""Involution as a function: differentiable, and at home in autocast, torch.compile, torch.export and torch.func."""

from typing import Any

import torch
from torch import Tensor

from pyinvolution import ops
from pyinvolution.ops import Pair

__all__ = ["involution2d"]


def involution2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
) -> Tensor:
    r"""Applies to each pixel the kernel that ``weight`` holds for it (Li et al., CVPR 2021, arXiv 2103.06255, eq. 4).

    .. math::
        Y_{n,c,p} = b_c + \sum_k W_{n,g(c),k,p} \, X_{n,c,\,s p + d k - P}, \qquad g(c) = \lfloor c \, G / C \rfloor

    with X zero outside its borders. Differentiable twice and more in ``input``, ``weight`` and ``bias``. Sums are kept
    in float32 (float64 for float64); the same bits on every run. Under autocast, tensors take its dtype.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, float16 or bfloat16; any strides.
        weight: (N, G, Kh, Kw, Ho, Wo), or without N; G divides C; input's dtype and device; any strides.
            Ho = floor((H + 2 padding - dilation (Kh - 1) - 1) / stride) + 1, and Wo alike.
        bias: (C,) or None.
        stride, padding, dilation: int or (vertical, horizontal).

    Returns:
        (N, C, Ho, Wo) or (C, Ho, Wo), in input's memory format.

    Raises:
        TypeError: an argument is no tensor or int, or dtypes are not supported or differ.
        ValueError: shapes, devices, layouts or values do not fit. The message names the argument, its value and
            what was expected.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"involution2d: input is a {type(input).__name__}, expected a Tensor")
    if not isinstance(weight, Tensor):
        raise TypeError(f"involution2d: weight is a {type(weight).__name__}, expected a Tensor")
    geometry = (_pair("stride", stride), _pair("padding", padding), _pair("dilation", dilation))
    unbatched = input.dim() == 3 and weight.dim() == 5
    if unbatched:
        input, weight = input.unsqueeze(0), weight.unsqueeze(0)
    input, weight = ops.autocast_tensors(input, weight)

    if torch.compiler.is_compiling():
        output = _apply(input, weight, geometry)
    else:
        try:
            output = _apply(input, weight, geometry)
        except RuntimeError as error:
            ops.explain_failure(error, input, weight, *geometry)
    if bias is not None:
        output = output + _column(bias, input)
    return output.squeeze(0) if unbatched else output


def _apply(input: Tensor, weight: Tensor, geometry: tuple[Pair, ...]) -> Tensor:
    # The operator alone costs half of what it does through a Function.
    if torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad):
        return _Involution2d.apply(input, weight, *geometry)
    return ops.involution2d(input, weight, *geometry)


def _pair(name: str, value: int | Pair) -> Pair:
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value, value
    if not isinstance(value, (tuple, list)) or any(
        isinstance(v, bool) or not isinstance(v, (int, torch.SymInt)) for v in value
    ):
        raise TypeError(f"involution2d: {name} is {value!r}, expected an int or a pair of ints")
    if len(value) != 2:
        raise ValueError(f"involution2d: {name} is {value!r}, expected an int or a pair of ints")
    return value[0], value[1]


def _column(bias: Tensor, input: Tensor) -> Tensor:
    if not isinstance(bias, Tensor):
        raise TypeError(f"involution2d: bias is a {type(bias).__name__}, expected a Tensor or None")
    if bias.shape != input.shape[1:2]:
        raise ValueError(
            f"involution2d: bias has shape {tuple(bias.shape)}, expected ({input.shape[1]},), one for each channel"
        )
    (bias,) = ops.autocast_tensors(bias)
    if bias.dtype != input.dtype:
        raise TypeError(f"involution2d: bias has dtype {bias.dtype}, expected input's dtype {input.dtype}")
    if bias.device != input.device:
        raise ValueError(f"involution2d: bias is on {bias.device}, expected input's device {input.device}")
    return bias.view(-1, 1, 1)


class _Involution2d(torch.autograd.Function):
    """Y from X and W, with both gradients."""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
        return ops.involution2d(input, weight, stride, padding, dilation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, weight, *ctx.geometry = inputs
        ctx.save_for_backward(input, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            grads = _Involution2dBackward.apply(grad_output, input, weight, *ctx.geometry, needed)
        else:
            grads = ops.involution2d_backward(grad_output, input, weight, *ctx.geometry, needed)
        return *(grad if want else None for grad, want in zip(grads, needed, strict=True)), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, input: Tensor, weight: Tensor, *geometry: Pair) -> tuple[Tensor, int]:
        size = info.batch_size
        merged = ops.to_batch(input, in_dims[0], size), ops.to_batch(weight, in_dims[1], size)
        return _apply(*merged, geometry).unflatten(0, (size, -1)), 0


class _Involution2dBackward(torch.autograd.Function):
    """Both gradients as functions of grad_output, X and W, which they are linear in: the second derivative."""

    @staticmethod
    def forward(
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        needed: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        return ops.involution2d_backward(grad_output, input, weight, stride, padding, dilation, needed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        grad_output, input, weight, *ctx.geometry, ctx.computed = inputs
        ctx.save_for_backward(grad_output, input, weight)

    @staticmethod
    def backward(ctx: Any, grad_grad_input: Tensor, grad_grad_weight: Tensor) -> tuple[Tensor | None, ...]:
        # inv(x, w) is bilinear: <u, grad_input> = <gy, inv(u, w)> and <v, grad_weight> = <gy, inv(x, v)>, so that the
        # gradients of each are an involution and a backward pass of it again.
        grad_output, input, weight = ctx.saved_tensors
        grads: list[Tensor | None] = [None, None, None]

        def add(place: int, grad: Tensor) -> None:
            known = grads[place]
            grads[place] = grad if known is None else known + grad

        def backward_of(x: Tensor, w: Tensor, needed: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
            return _Involution2dBackward.apply(grad_output, x, w, *ctx.geometry, needed)

        for computed, x, w, other in (
            (ctx.computed[0], grad_grad_input, weight, 2),
            (ctx.computed[1], input, grad_grad_weight, 1),
        ):
            if not computed:
                continue
            if ctx.needs_input_grad[0]:
                add(0, _apply(x, w, tuple(ctx.geometry)))
            if ctx.needs_input_grad[other]:
                add(other, backward_of(x, w, (other == 1, other == 2))[other - 1])
        return *grads, None, None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple, grad_output: Tensor, input: Tensor, weight: Tensor, *rest: Any
    ) -> tuple[tuple, tuple]:
        size = info.batch_size
        merged = (ops.to_batch(t, d, size) for t, d in zip((grad_output, input, weight), in_dims[:3], strict=True))
        grads = _Involution2dBackward.apply(*merged, *rest)
        needed = rest[-1]
        return (
            tuple(g.unflatten(0, (size, -1)) if want else g for g, want in zip(grads, needed, strict=True)),
            tuple(0 if want else None for want in needed),
        )
