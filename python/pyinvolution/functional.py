"""Involution as a function: differentiable, and at home in autocast, torch.compile, torch.export and torch.func."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch.autograd import forward_ad

from pyinvolution import ops, reference
from pyinvolution.ops import Pair

__all__ = ["involution2d", "local_correlation2d", "span_involution2d"]

Window = tuple[Any, ...]
"""Stride, padding and dilation, and where they are not the default the border (its index) and the upsampling."""


def involution2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    *,
    border: str = "zeros",
    upsample: int | Pair = 1,
) -> Tensor:
    r"""Applies to each pixel the kernel that ``weight`` holds for it (Li et al., CVPR 2021, arXiv 2103.06255, eq. 4).

    .. math::
        Y_{n,c,p} = b_c + \sum_k W_{n,g(c),k,p} \, X_{n,c,\,s p + d k - P}, \qquad g(c) = \lfloor c \, G / C \rfloor

    with X zero outside its borders. With ``border="shift"`` a window that reaches beyond the input is moved inside, by
    multiples of the dilation, as in neighbourhood attention (Hassani et al., CVPR 2023; dilated: arXiv 2209.15001); a
    stride then takes every s-th output, where NATTEN from 0.20 on shares windows. With ``upsample`` u, u x u outputs
    read the window of one input position, :math:`\lfloor p / u \rfloor` in the place of p (CARAFE, ICCV 2019). Both
    combine with each other and with dilation.

    Differentiable twice and more in ``input``, ``weight`` and ``bias``. Sums are kept
    in float32 (float64 for float64); the same bits on every run. On processors with AVX512-BF16, the forward pass in
    bfloat16 takes subnormal numbers as zeros. Under autocast, tensors take its dtype. Forward mode
    (`torch.func.jvp`, dual numbers) works too, outside torch.compile. `torch.jit.trace` records the operator, which has
    the same gradients in a process that imports this package; a C++ program without Python has none of it.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, float16 or bfloat16; any strides.
        weight: (N, G, Kh, Kw, Ho, Wo), or without N; G divides C; input's dtype and device; any strides.
            Ho = upsample (floor((H + 2 padding - dilation (Kh - 1) - 1) / stride) + 1), with ``border="shift"``
            upsample ceil(H / stride), and Wo alike.
        bias: (C,) or None.
        stride, padding, dilation: int or (vertical, horizontal).
        border: "zeros" or "shift"; the latter needs a padding of 0 and dilation Kh <= H, dilation Kw <= W.
        upsample: outputs for each position of the input, int or (vertical, horizontal); 1 on an axis with a stride.

    Returns:
        (N, C, Ho, Wo) or (C, Ho, Wo), in input's memory format.

    Raises:
        TypeError: an argument is not a tensor (or int), or its dtype is unsupported or differs from input's.
        ValueError: shapes, devices, layouts or values do not fit. The message names the argument, its value and
            what was expected.
    """
    op = "involution2d"
    window = _window(op, stride, padding, dilation, border, upsample)
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor)):
        _refuse_types(op, input=input, weight=weight)
    unbatched = input.dim() == 3 and weight.dim() == 5
    if unbatched:
        input, weight = input.unsqueeze(0), weight.unsqueeze(0)
    input, weight = ops.autocast_tensors(input, weight)
    output = _explained(_apply, ops.check, input, weight, *window)
    if bias is not None:
        output = output + _column(bias, input)
    return output.squeeze(0) if unbatched else output


def local_correlation2d(
    query: Tensor,
    key: Tensor,
    kernel_size: int | Pair,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    *,
    border: str = "zeros",
    upsample: int | Pair = 1,
) -> Tensor:
    r"""The score of each pixel with every pixel in its window, summed over the channels of a group.

    .. math::
        S_{n,g,k,p} = \sum_{c : g(c) = g} Q_{n,c,p} \, K_{n,c,\,s p + d k - P}

    It is the gradient of an involution's weight, computed by the same kernels: the query-key product of neighbourhood
    attention (``border="shift"``, groups are heads, the scale is on the query beforehand), and the cost volume of
    optical flow (FlowNet, PWC-Net). Its softmax over the taps is a weight for `involution2d`. Border, upsampling and
    the rest are as there: derivatives of every order, autocast, forward mode, torch.compile, torch.export and
    torch.func.

    Args:
        query: (N, C, Ho, Wo) or (C, Ho, Wo); float32, float64, float16 or bfloat16; any strides.
        key: (N, C, H, W), or without N; query's dtype and device; any strides. `involution2d` explains what Ho and Wo
            are for H and W.
        kernel_size: int or (vertical, horizontal).
        stride, padding, dilation: int or (vertical, horizontal).
        groups: G, a divisor of C.
        border, upsample: as for `involution2d`.

    Returns:
        (N, G, Kh, Kw, Ho, Wo) or (G, Kh, Kw, Ho, Wo). For a key in channels_last memory the taps of a pixel lie next to
        each other, else it is contiguous.

    Raises:
        TypeError, ValueError: as `involution2d` does.
    """
    op = "local_correlation2d"
    kernel = _pair(op, "kernel_size", kernel_size)
    window = _window(op, stride, padding, dilation, border, upsample)
    if not isinstance(groups, (int, torch.SymInt)) or isinstance(groups, bool):
        raise TypeError(f"{op}: groups is {groups!r}, expected an int")
    if not (isinstance(query, Tensor) and isinstance(key, Tensor)):
        _refuse_types(op, query=query, key=key)
    unbatched = query.dim() == 3 and key.dim() == 3
    if unbatched:
        query, key = query.unsqueeze(0), key.unsqueeze(0)
    # autocast takes the device of the first.
    key, query = ops.autocast_tensors(key, query)
    arguments = (query, key, kernel, *window[:3], groups, *window[3:])
    output = _explained(_correlate, ops.check_correlation, *arguments)
    return output.squeeze(0) if unbatched else output


def span_involution2d(
    input: Tensor,
    reduced: Tensor,
    span_weight: Tensor,
    span_bias: Tensor | None = None,
    kernel_size: int | Pair = 7,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
) -> Tensor:
    r"""Involution with kernels from a 1x1 convolution, ``involution2d(input, span(reduced))``, in one operator.

    .. math::
        W_{n,g,k,p} = b_{g K + k} + \sum_r S_{g K + k, r} \, R_{n,r,p}, \qquad K = K_h K_w

    (Li et al., CVPR 2021, section 3, equation 6, after its reduction.) Where the device has a fused kernel, W is never
    in memory, neither forward nor backward: backward computes it again from ``reduced``. Elsewhere, and in a backward
    pass that is to be differentiated again, the result is composed of a convolution and `involution2d`. Under autocast,
    tensors take its dtype.

    On a CPU W is kept in float32, but on processors with AVX512-BF16 the forward pass in bfloat16 rounds W to bfloat16
    after its sum in float32, as that convolution does, and takes subnormal numbers as zeros.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, float16 or bfloat16; any strides.
        reduced: (N, R, Ho, Wo), or without N; input's dtype and device, like the other tensors.
        span_weight: (G * Kh * Kw, R) or (G * Kh * Kw, R, 1, 1); row g * Kh * Kw + i * Kw + j gives tap (i, j) of group
            g. G divides C.
        span_bias: (G * Kh * Kw,) or None.
        kernel_size: Kh and Kw.
        stride, padding, dilation: int or (vertical, horizontal).

    Returns:
        (N, C, Ho, Wo) or (C, Ho, Wo), in input's memory format.

    Raises:
        TypeError, ValueError: as `involution2d` does.
    """
    op = "span_involution2d"
    window = (
        _pair(op, "kernel_size", kernel_size),
        _pair(op, "stride", stride),
        _pair(op, "padding", padding),
        _pair(op, "dilation", dilation),
    )
    if not (
        isinstance(input, Tensor)
        and isinstance(reduced, Tensor)
        and isinstance(span_weight, Tensor)
        and (span_bias is None or isinstance(span_bias, Tensor))
    ):
        _refuse_types(op, input=input, reduced=reduced, span_weight=span_weight, span_bias=span_bias)
    unbatched = input.dim() == 3 and reduced.dim() == 3
    if unbatched:
        input, reduced = input.unsqueeze(0), reduced.unsqueeze(0)
    tensors = ops.autocast_tensors(input, reduced, span_weight, span_bias)
    output = _explained(_apply_span, ops.check_span, *tensors, *window)
    return output.squeeze(0) if unbatched else output


def _explained(function: Callable[..., Tensor], check: Callable[..., None], *arguments: Any) -> Tensor:
    """Turns an operator's RuntimeError into the TypeError or ValueError of the argument at fault, where one is."""
    if torch.compiler.is_compiling():
        return function(*arguments)
    try:
        return function(*arguments)
    except RuntimeError:
        with ops.untraced():
            check(*arguments)
        raise


def _refuse_types(op: str, **values: object) -> NoReturn:
    name, value = next((n, v) for n, v in values.items() if not isinstance(v, Tensor) and (v, n) != (None, "span_bias"))
    raise TypeError(f"{op}: {name} is a {type(value).__name__}, expected a Tensor")


def forward_mode() -> bool:
    """Whether tensors may have tangents: torch.func.jvp or dual numbers are at work."""
    return forward_ad._current_level >= 0


def may_require_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd may ask for a gradient of what is computed from ``tensors``."""
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            return True
    # What vmap maps does not say whether the tensor inside does.
    return torch._C._are_functorch_transforms_active()


def _compiles_vmap(*tensors: Tensor | None) -> bool:
    """Whether torch.compile, which drops a Function none of whose tensors requires a gradient, sees mapped tensors."""
    return (
        torch.compiler.is_compiling()
        and torch._C._are_functorch_transforms_active()
        and not any(tensor is not None and tensor.requires_grad for tensor in tensors)
    )


def _nested_forward_mode() -> bool:
    """Whether forward mode is applied twice, where PyTorch loses the tangents that the `jvp` of a Function makes."""
    return eager_transforms.JVP_NESTING > 1


def _reference_involution(input: Tensor, weight: Tensor, window: tuple) -> Tensor:
    return reference.involution2d(input, weight, None, *window[:3], **_named(*window[3:]))


def _named(border: int = 0, upsample: Pair = (1, 1)) -> dict[str, Any]:
    """The end of a window as `reference` takes it."""
    return {"border": ops.BORDERS[border], "upsample": upsample}


def _apply(input: Tensor, weight: Tensor, *window: Any) -> Tensor:
    if (operator := ops.recorded(ops.involution2d)) is not ops.involution2d:
        return operator(input, weight, *window)
    if forward_mode():
        if _nested_forward_mode():
            return _reference_involution(input, weight, window)
        return _Involution2dForwardMode.apply(input, weight, *window)
    # The operator by itself costs half of what it does through a Function.
    if may_require_grad(input, weight):
        if _compiles_vmap(input, weight):
            return _reference_involution(input, weight, window)
        return _Involution2d.apply(input, weight, *window)
    return ops.involution2d(input, weight, *window)


def _correlate(query: Tensor, key: Tensor, *rest: Any) -> Tensor:
    """The arguments are those of ``ops.local_correlation2d``."""
    if (operator := ops.recorded(ops.local_correlation2d)) is not ops.local_correlation2d:
        return operator(query, key, *rest)
    if forward_mode():
        if _nested_forward_mode():
            return _reference_correlation(query, key, *rest)
        return _LocalCorrelation2dForwardMode.apply(query, key, *rest)
    if may_require_grad(query, key):
        if _compiles_vmap(query, key):
            return _reference_correlation(query, key, *rest)
        return _LocalCorrelation2d.apply(query, key, *rest)
    return ops.local_correlation2d(query, key, *rest)


def _reference_correlation(query: Tensor, key: Tensor, kernel_size: Pair, *rest: Any) -> Tensor:
    return reference.local_correlation2d(query, key, kernel_size, *rest[:4], **_named(*rest[4:]))


def _apply_span(input: Tensor, reduced: Tensor, span_weight: Tensor, span_bias: Tensor | None, *window: Pair) -> Tensor:
    if (operator := ops.recorded(ops.span_involution2d)) is not ops.span_involution2d:
        return operator(input, reduced, span_weight, span_bias, None, None, False, *window)
    if forward_mode():
        return _compose_span(input, reduced, span_weight, span_bias, window)
    tensors = (input, reduced, span_weight, span_bias)
    if may_require_grad(*tensors):
        if _compiles_vmap(*tensors) or not ops.fuses_span(input, reduced, span_weight, window, differentiable=True):
            return _compose_span(*tensors, window)
        return _SpanInvolution2d.apply(*tensors, *window)
    return ops.span_involution2d(input, reduced, span_weight, span_bias, None, None, False, *window)


def _window(
    op: str, stride: int | Pair, padding: int | Pair, dilation: int | Pair, border: str, upsample: int | Pair
) -> Window:
    window = (_pair(op, "stride", stride), _pair(op, "padding", padding), _pair(op, "dilation", dilation))
    if type(border) is str and border == "zeros" and type(upsample) is int and upsample == 1:
        return window
    return (*window, ops.border_index(op, border), _pair(op, "upsample", upsample))


def _pair(op: str, name: str, value: int | Pair) -> Pair:
    if type(value) is int:
        return value, value
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value, value
    if not isinstance(value, (tuple, list)) or any(
        isinstance(v, bool) or not isinstance(v, (int, torch.SymInt)) for v in value
    ):
        raise TypeError(f"{op}: {name} is {value!r}, expected an int or a pair of ints")
    if len(value) != 2:
        raise ValueError(f"{op}: {name} is {value!r}, expected an int or a pair of ints")
    return value[0], value[1]


def _column(bias: Tensor, input: Tensor) -> Tensor:
    if not isinstance(bias, Tensor):
        raise TypeError(f"involution2d: bias is a {type(bias).__name__}, expected a Tensor or None")
    if bias.layout != torch.strided:
        raise ValueError(f"involution2d: bias has layout {bias.layout}, expected torch.strided")
    shape, channels = ops.shape_of(bias), ops.shape_of(input)[1]
    if shape != (channels,):
        raise ValueError(f"involution2d: bias has shape {tuple(shape)}, expected ({channels},), one for each channel")
    (bias,) = ops.autocast_tensors(bias)
    if bias.dtype != input.dtype:
        raise TypeError(f"involution2d: bias has dtype {bias.dtype}, expected input's dtype {input.dtype}")
    if bias.device != input.device:
        raise ValueError(f"involution2d: bias is on {bias.device}, expected input's device {input.device}")
    return bias.view(-1, 1, 1)


class _Involution2d(torch.autograd.Function):
    """Y from X and W, with both gradients."""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, *window: Any) -> Tensor:
        return ops.involution2d(input, weight, *window)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, weight, *ctx.window = inputs
        ctx.save_for_backward(input, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        grads = _gradients(grad_output, input, weight, *ctx.window, needed)
        nothing = (None,) * len(ctx.window)
        return *(grad if want else None for grad, want in zip(grads, needed, strict=True)), *nothing

    @staticmethod
    def vmap(info: Any, in_dims: tuple, input: Tensor, weight: Tensor, *window: Any) -> tuple[Tensor, int]:
        size = info.batch_size
        merged = ops.to_batch(input, in_dims[0], size), ops.to_batch(weight, in_dims[1], size)
        return _apply(*merged, *window).unflatten(0, (size, -1)), 0


def _product_rule(
    op: Callable[..., Tensor], tensors: Sequence[Tensor], tangents: Sequence[Tensor | None], rest: Window
) -> Tensor:
    """The tangent of a bilinear ``op(first, second, *rest)``; None is a tangent of zeros, of at most one tensor."""
    (first, second), (first_tangent, second_tangent) = tensors, tangents
    pairs = ((first_tangent, second), (first, second_tangent))
    terms = [op(a, b, *rest) for a, b in pairs if a is not None and b is not None]
    return sum(terms[1:], terms[0])


class _Involution2dForwardMode(_Involution2d):
    """The same with tangents. A class of its own, since Dynamo refuses Functions that have a `jvp`."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _Involution2d.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def jvp(ctx: Any, input_tangent: Tensor | None, weight_tangent: Tensor | None, *window: None) -> Tensor:
        return _product_rule(_apply, ctx.saved_tensors, (input_tangent, weight_tangent), ctx.window)


def _gradients(grad_output: Tensor, input: Tensor, weight: Tensor, *window_and_needed: Any) -> tuple[Tensor, Tensor]:
    arguments = (grad_output, input, weight, *window_and_needed)
    if forward_mode():
        if _nested_forward_mode():
            *window, needed = window_and_needed
            pullback: Any = torch.func.vjp(lambda x, w: _reference_involution(x, w, tuple(window)), input, weight)[1]
            grad_input, grad_weight = pullback(grad_output)
            none = input.new_empty(0)
            return grad_input if needed[0] else none, grad_weight if needed[1] else none
        return _Involution2dBackwardForwardMode.apply(*arguments)
    if torch.is_grad_enabled():
        return _Involution2dBackward.apply(*arguments)
    *window, needed = window_and_needed
    return ops.backward(grad_output, input, weight, window, needed)


class _Involution2dBackward(torch.autograd.Function):
    """Both gradients as functions of grad_output, X and W, which they are linear in: the second derivative."""

    @staticmethod
    def forward(
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        *window_and_needed: Any,
    ) -> tuple[Tensor, Tensor]:
        *window, needed = window_and_needed
        return ops.backward(grad_output, input, weight, window, needed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        grad_output, input, weight, *ctx.window, ctx.computed = inputs
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
            return _gradients(grad_output, x, w, *ctx.window, needed)

        for computed, x, w, other in (
            (ctx.computed[0], grad_grad_input, weight, 2),
            (ctx.computed[1], input, grad_grad_weight, 1),
        ):
            if not computed:
                continue
            if ctx.needs_input_grad[0]:
                add(0, _apply(x, w, *ctx.window))
            if ctx.needs_input_grad[other]:
                add(other, backward_of(x, w, (other == 1, other == 2))[other - 1])
        return *grads, *(None,) * (len(ctx.window) + 1)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple, grad_output: Tensor, input: Tensor, weight: Tensor, *rest: Any
    ) -> tuple[tuple, tuple]:
        size = info.batch_size
        merged = (ops.to_batch(t, d, size) for t, d in zip((grad_output, input, weight), in_dims[:3], strict=True))
        grads = _gradients(*merged, *rest)
        needed = rest[-1]
        return (
            tuple(g.unflatten(0, (size, -1)) if want else g for g, want in zip(grads, needed, strict=True)),
            tuple(0 if want else None for want in needed),
        )


class _Involution2dBackwardForwardMode(_Involution2dBackward):
    """The same with tangents: both gradients are bilinear."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _Involution2dBackward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3])

    @staticmethod
    def jvp(
        ctx: Any, grad_tangent: Tensor | None, input_tangent: Tensor | None, weight_tangent: Tensor | None, *rest: None
    ) -> tuple[Tensor | None, ...]:
        grad_output, input, weight = ctx.saved_tensors
        tangents: list[Tensor | None] = [None, None]
        for gy, x, w, computed in (
            (grad_tangent, input, weight, ctx.computed),
            (grad_output, input_tangent, weight, (False, ctx.computed[1])),
            (grad_output, input, weight_tangent, (ctx.computed[0], False)),
        ):
            if gy is None or x is None or w is None or not any(computed):
                continue
            for place, term in enumerate(_gradients(gy, x, w, *ctx.window, computed)):
                known = tangents[place]
                if computed[place]:
                    tangents[place] = term if known is None else known + term
        # What is not computed is an empty tensor, and so is its tangent.
        zeros = [
            torch.zeros_like(tensor) if wanted else tensor.new_zeros(0)
            for tensor, wanted in zip((input, weight), ctx.computed, strict=True)
        ]
        return tuple(zero if term is None else term for zero, term in zip(zeros, tangents, strict=True))


class _LocalCorrelation2d(torch.autograd.Function):
    """S from Q and K, which it is linear in; it is the gradient of a weight, so that its own gradients are an
    involution with the incoming gradient as the weight, and the gradient of that one's input.
    """

    @staticmethod
    def forward(query: Tensor, key: Tensor, *rest: Any) -> Tensor:
        return ops.local_correlation2d(query, key, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        query, key, *ctx.rest = inputs
        ctx.save_for_backward(query, key)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key = ctx.saved_tensors
        _, stride, padding, dilation, _, *border = ctx.rest
        window = (stride, padding, dilation, *border)
        grad_query = _apply(key, grad_output, *window) if ctx.needs_input_grad[0] else None
        grad_key = None
        if ctx.needs_input_grad[1]:
            grad_key = _gradients(query, key, grad_output, *window, (True, False))[0]
        return grad_query, grad_key, *(None,) * len(ctx.rest)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, int]:
        size = info.batch_size
        merged = ops.to_batch(query, in_dims[0], size), ops.to_batch(key, in_dims[1], size)
        return _correlate(*merged, *rest).unflatten(0, (size, -1)), 0


class _LocalCorrelation2dForwardMode(_LocalCorrelation2d):
    """The same with tangents."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _LocalCorrelation2d.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def jvp(ctx: Any, query_tangent: Tensor | None, key_tangent: Tensor | None, *rest: None) -> Tensor:
        return _product_rule(_correlate, ctx.saved_tensors, (query_tangent, key_tangent), ctx.rest)


class _SpanInvolution2d(torch.autograd.Function):
    """Y from X, R and the span's parameters, with all gradients; W is not saved."""

    @staticmethod
    def forward(input: Tensor, reduced: Tensor, span_weight: Tensor, span_bias: Tensor | None, *window: Pair) -> Tensor:
        return ops.span_involution2d(input, reduced, span_weight, span_bias, None, None, False, *window)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.kernel_size, ctx.stride, ctx.padding, ctx.dilation = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        window = (ctx.kernel_size, ctx.stride, ctx.padding, ctx.dilation)
        needed = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled() or forward_mode():
            grads = _composed_gradients(window, needed, grad_output, *tensors)
        else:
            grads = ops.span_involution2d_backward(grad_output, *tensors, *window, needed)
        return *(grad if want else None for grad, want in zip(grads, needed, strict=True)), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple[Tensor, int]:
        tensors, window = arguments[:4], arguments[4:]
        if in_dims[2] is None and in_dims[3] is None:
            size = info.batch_size
            input, reduced = (ops.to_batch(t, d, size) for t, d in zip(tensors[:2], in_dims[:2], strict=True))
            return _apply_span(input, reduced, *tensors[2:], *window).unflatten(0, (size, -1)), 0
        return torch.vmap(partial(_compose_span, window=window), in_dims[:4])(*tensors), 0


def _compose_span(
    input: Tensor, reduced: Tensor, span_weight: Tensor, span_bias: Tensor | None, window: tuple[Pair, ...]
) -> Tensor:
    return _apply(input, ops.span(reduced, span_weight, span_bias, window[0]), *window[1:])


def _composed_gradients(
    window: tuple[Pair, ...],
    needed: tuple[bool, ...],
    grad_output: Tensor,
    input: Tensor,
    reduced: Tensor,
    span_weight: Tensor,
    span_bias: Tensor | None,
) -> tuple[Tensor, ...]:
    """All gradients in operators that autograd can differentiate again."""
    weight = ops.span(reduced, span_weight, span_bias, window[0])
    mask = (needed[0], any(needed[1:]))
    grad_input, grad_weight = _gradients(grad_output, input, weight, *window[1:], mask)
    grads: tuple[Tensor | None, ...] = (None, None, None)
    none = input.new_empty(0)
    if mask[1]:
        grads = ops.span_gradients(grad_weight, reduced, span_weight, span_bias, needed[1:])
    return tuple(g if want and g is not None else none for g, want in zip((grad_input, *grads), needed, strict=True))


# --- gradients of what torch.jit.trace records ------------------------------------------------------------------------
# Only for these operators: a registered gradient makes every call slower, also one that needs none.


def _set_up_involution(ctx: Any, inputs: tuple, output: Tensor) -> None:
    input, weight, *ctx.window = inputs
    ctx.save_for_backward(input, weight)


def _set_up_correlation(ctx: Any, inputs: tuple, output: Tensor) -> None:
    query, key, *ctx.rest = inputs
    ctx.save_for_backward(query, key)


def _set_up_span(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, scale, shift, relu, ctx.kernel_size, ctx.stride, ctx.padding, ctx.dilation = inputs
    ctx.has_epilogue = scale is not None or shift is not None or relu
    ctx.save_for_backward(*tensors)


def _differentiate_span(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.has_epilogue:
        raise RuntimeError(
            "span_involution2d: scale, shift and relu have no derivative, expected them without autograd"
        )
    grads = _SpanInvolution2d.backward(ctx, grad_output)
    return *grads[:4], None, None, None, *grads[4:]


def _refuse_layer(ctx: Any, grad_output: Tensor) -> None:
    raise RuntimeError("involution_layer2d has no derivative, expected a call without autograd")


torch.library.register_autograd(ops.traced_involution2d, _Involution2d.backward, setup_context=_set_up_involution)
torch.library.register_autograd(
    ops.traced_local_correlation2d, _LocalCorrelation2d.backward, setup_context=_set_up_correlation
)
torch.library.register_autograd(ops.traced_span_involution2d, _differentiate_span, setup_context=_set_up_span)
torch.library.register_autograd(ops.traced_involution_layer2d, _refuse_layer)
