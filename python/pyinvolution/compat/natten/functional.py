"""Stands in for ``natten.functional``: neighbourhood attention as two operators, by the names of every version.

A query attends to a window of K keys per axis, spaced by the dilation, that is shifted to stay in the image (Hassani et
al., CVPR 2023, arXiv 2204.07143; dilated: 2209.15001). On an axis of length L with kernel size K and dilation d, the
window of position i begins at::

    first(i) = a + d clamp(i // d - K // 2, 0, L_a - K),    a = i mod d,    L_a = ceil((L - a) / d)

``*_qk`` returns query . key for each of the window's positions, ``*_av`` the sum of the values weighted by ``attn``,
`na1d`, `na2d` and `na3d` both with a softmax between them. Nothing is scaled in ``*_qk``. Both operators are
`pyinvolution.local_correlation2d` and `pyinvolution.involution2d` with ``border="shift"``: on a CPU and a GPU, in
float32, float64, float16 and bfloat16, with derivatives of any order and the same bits on every run. In one dimension
they compute an image of height 1, in three they add up over the taps of the first axis.

The names and the order of arguments are those of NATTEN 0.14 to 0.17; of 0.20 and later, the names that it still has.
Causal windows, strides (0.20) and nested tensors raise an error. Source: https://github.com/SHI-Labs/NATTEN.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyinvolution.compat._arguments import integers, require_kind, require_shape, require_tensors
from pyinvolution.functional import involution2d, local_correlation2d

Size = int | Sequence[int]
Causal = bool | Sequence[bool] | None

__all__ = [
    "na1d", "na1d_av", "na1d_qk", "na1d_qk_with_bias",
    "na2d", "na2d_av", "na2d_qk", "na2d_qk_with_bias",
    "na3d", "na3d_av", "na3d_qk", "na3d_qk_with_bias",
    "natten1dav", "natten1dqk", "natten1dqkrpb",
    "natten2dav", "natten2dqk", "natten2dqkrpb",
    "natten3dav", "natten3dqk", "natten3dqkrpb",
]  # fmt: skip

# Opaque to torch.fx, which cannot follow their branches.
torch.fx.wrap("_qk")
torch.fx.wrap("_av")
torch.fx.wrap("_attend")

LAYOUTS = {1: "(B, heads, L, D)", 2: "(B, heads, H, W, D)", 3: "(B, heads, Z, Y, X, D)"}
WEIGHTS = {axes: layout.replace("D)", "K)") for axes, layout in LAYOUTS.items()}
HEADS_LAST = {1: "(B, L, heads, D)", 2: "(B, H, W, heads, D)", 3: "(B, Z, Y, X, heads, D)"}
TOKENS = "(B, heads, tokens, D)"

# --- attention logits -------------------------------------------------------------------------------------------------


def na1d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: Size,
    dilation: Size = 1,
    additional_keys: Tensor | None = None,
    is_causal: Causal = False,
    rpb: Tensor | None = None,
) -> Tensor:
    """`na2d_qk` on one axis: (B, heads, L, D) and (B, heads, L, D) to (B, heads, L, K)."""
    return _qk("na1d_qk", 1, query, key, kernel_size, dilation, additional_keys, is_causal, rpb)


def na2d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: Size,
    dilation: Size = 1,
    additional_keys: Tensor | None = None,
    is_causal: Causal = False,
    rpb: Tensor | None = None,
) -> Tensor:
    """The products of each query with the keys of its window.

    Args:
        query: (B, heads, H, W, D), scaled already; float32, float64, float16 or bfloat16; any strides.
        key: of the same shape.
        kernel_size: K, an int or one for each axis. Even sizes reach one position further back than forward.
        dilation: the spacing of the keys, an int or one for each axis.
        additional_keys: (B, heads, tokens, D), which every query attends to as well, or None.
        is_causal: False; anything else raises an error.
        rpb: relative positional biases, (heads, 2 Kh - 1, 2 Kw - 1), or None.

    Returns:
        (B, heads, H, W, Kh * Kw + tokens), the window's last axis fastest, the additional keys at the end.

    Raises:
        TypeError, ValueError: an argument does not fit; a window, K times the dilation, is larger than its axis.
        NotImplementedError: ``is_causal`` is true.
    """
    return _qk("na2d_qk", 2, query, key, kernel_size, dilation, additional_keys, is_causal, rpb)


def na3d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: Size,
    dilation: Size = 1,
    additional_keys: Any = None,
    is_causal: Any = False,
    rpb: Tensor | None = None,
) -> Tensor:
    """`na2d_qk` on three axes: (B, heads, Z, Y, X, D) twice to (B, heads, Z, Y, X, K).

    Also takes the order of NATTEN 0.15: kernel_size_d, kernel_size, dilation_d, dilation, additional_keys.
    """
    if isinstance(additional_keys, int):
        kernel_size, dilation = _with_depth(kernel_size, dilation, additional_keys, is_causal)
        additional_keys, is_causal, rpb = rpb, False, None
    return _qk("na3d_qk", 3, query, key, kernel_size, dilation, additional_keys, is_causal, rpb)


# --- weighted sums ----------------------------------------------------------------------------------------------------


def na1d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: Size,
    dilation: Size = 1,
    additional_values: Tensor | None = None,
    is_causal: Causal = False,
) -> Tensor:
    """`na2d_av` on one axis: (B, heads, L, K) and (B, heads, L, D) to (B, heads, L, D)."""
    return _av("na1d_av", 1, attn, value, kernel_size, dilation, additional_values, is_causal)


def na2d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: Size,
    dilation: Size = 1,
    additional_values: Tensor | None = None,
    is_causal: Causal = False,
) -> Tensor:
    """The sum of the values of each window, weighted by ``attn``.

    Args:
        attn: (B, heads, H, W, Kh * Kw + tokens), as `na2d_qk` returns it.
        value: (B, heads, H, W, D), of attn's dtype.
        kernel_size, dilation, is_causal: as in `na2d_qk`.
        additional_values: (B, heads, tokens, D), or None.

    Returns:
        (B, heads, H, W, D).

    Raises:
        TypeError, ValueError, NotImplementedError: as `na2d_qk` does.
    """
    return _av("na2d_av", 2, attn, value, kernel_size, dilation, additional_values, is_causal)


def na3d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: Size,
    dilation: Size = 1,
    additional_values: Any = None,
    is_causal: Any = False,
) -> Tensor:
    """`na2d_av` on three axes: (B, heads, Z, Y, X, K) and (B, heads, Z, Y, X, D) to (B, heads, Z, Y, X, D).

    Also takes the order of NATTEN 0.15: kernel_size_d, kernel_size, dilation_d, dilation.
    """
    if isinstance(additional_values, int):
        kernel_size, dilation = _with_depth(kernel_size, dilation, additional_values, is_causal)
        additional_values, is_causal = None, False
    return _av("na3d_av", 3, attn, value, kernel_size, dilation, additional_values, is_causal)


# --- both, with a softmax between them --------------------------------------------------------------------------------


def na1d(query: Tensor, key: Tensor, value: Tensor, kernel_size: Size, *order: Any, **options: Any) -> Tensor:
    """`na2d` on one axis: (B, L, heads, D) three times to (B, L, heads, D)."""
    return _attend("na1d", 1, query, key, value, kernel_size, order, **options)


def na2d(query: Tensor, key: Tensor, value: Tensor, kernel_size: Size, *order: Any, **options: Any) -> Tensor:
    """Neighbourhood attention: ``na2d_av(softmax(scale * na2d_qk(query, key)), value)``, with the heads last.

    NATTEN's function of this name is fused. This one is not: the attention weights, K values for each query, are in
    memory.

    Args:
        query, key: (B, H, W, heads, D).
        value: (B, H, W, heads, D) or with another D.
        kernel_size: K, an int or one for each axis.
        options: by name ``dilation``, ``is_causal`` (False), ``rpb``, ``scale`` (1 / sqrt(D)), ``stride`` (1),
            ``additional_keys`` and ``additional_values`` (B, tokens, heads, D). What chooses or tunes a kernel of
            NATTEN's (``backend``, tile shapes and so on) has no effect.

    Returns:
        (B, H, W, heads, D).

    Raises:
        TypeError, ValueError: an argument does not fit, or is not given by name though NATTEN's versions differ in its
            place.
        NotImplementedError: ``is_causal`` or ``return_lse`` is true, or ``stride`` is not 1.
    """
    return _attend("na2d", 2, query, key, value, kernel_size, order, **options)


def na3d(query: Tensor, key: Tensor, value: Tensor, kernel_size: Size, *order: Any, **options: Any) -> Tensor:
    """`na2d` on three axes: (B, Z, Y, X, heads, D) three times to (B, Z, Y, X, heads, D)."""
    return _attend("na3d", 3, query, key, value, kernel_size, order, **options)


# --- names of NATTEN 0.15 ---------------------------------------------------------------------------------------------


def na1d_qk_with_bias(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    kernel_size: Size,
    dilation: Size,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """`na1d_qk` with ``rpb=bias`` (NATTEN 0.15)."""
    return _qk("na1d_qk_with_bias", 1, query, key, kernel_size, dilation, additional_keys, False, bias, "bias")


def na2d_qk_with_bias(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    kernel_size: Size,
    dilation: Size,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """`na2d_qk` with ``rpb=bias`` (NATTEN 0.15)."""
    return _qk("na2d_qk_with_bias", 2, query, key, kernel_size, dilation, additional_keys, False, bias, "bias")


def na3d_qk_with_bias(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """`na3d_qk` with ``rpb=bias``; the sizes of the first axis, then those of the other two (NATTEN 0.15)."""
    window = _with_depth(kernel_size_d, kernel_size, dilation_d, dilation)
    return _qk("na3d_qk_with_bias", 3, query, key, *window, additional_keys, False, bias, "bias")


# --- names of NATTEN 0.14 to 0.17.4 -----------------------------------------------------------------------------------


def natten1dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, *sizes: int, **named: Any) -> Tensor:
    """`na1d_qk` with the biases third: ``kernel_size, dilation``, or ``dilation`` only (NATTEN 0.14.1)."""
    return _qkrpb("natten1dqkrpb", 1, query, key, rpb, sizes, **named)


def natten2dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, *sizes: int, **named: Any) -> Tensor:
    """`na2d_qk` with the biases third: ``kernel_size, dilation``, or ``dilation`` only (NATTEN 0.14.1).

    Without a kernel size, it is that of ``rpb``, which has 2 K - 1 rows.
    """
    return _qkrpb("natten2dqkrpb", 2, query, key, rpb, sizes, **named)


def natten3dqkrpb(
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
) -> Tensor:
    """`na3d_qk` with the biases third; the sizes of the first axis, then those of the other two."""
    window = _with_depth(kernel_size_d, kernel_size, dilation_d, dilation)
    return _qk("natten3dqkrpb", 3, query, key, *window, None, False, rpb)


def natten1dqk(
    query: Tensor, key: Tensor, kernel_size: int, dilation: int, additional_keys: Tensor | None = None
) -> Tensor:
    """`na1d_qk` without biases."""
    return _qk("natten1dqk", 1, query, key, kernel_size, dilation, additional_keys, False, None)


def natten2dqk(
    query: Tensor, key: Tensor, kernel_size: int, dilation: int, additional_keys: Tensor | None = None
) -> Tensor:
    """`na2d_qk` without biases."""
    return _qk("natten2dqk", 2, query, key, kernel_size, dilation, additional_keys, False, None)


def natten3dqk(
    query: Tensor,
    key: Tensor,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """`na3d_qk` without biases; the sizes of the first axis, then those of the other two."""
    window = _with_depth(kernel_size_d, kernel_size, dilation_d, dilation)
    return _qk("natten3dqk", 3, query, key, *window, additional_keys, False, None)


def natten1dav(attn: Tensor, value: Tensor, *sizes: Any, **named: Any) -> Tensor:
    """`na1d_av`: ``kernel_size, dilation``, or ``dilation`` only, for a kernel of attn's size (NATTEN 0.14.1)."""
    return _old_av("natten1dav", 1, attn, value, sizes, **named)


def natten2dav(attn: Tensor, value: Tensor, *sizes: Any, **named: Any) -> Tensor:
    """`na2d_av`: ``kernel_size, dilation``, or ``dilation`` only, for a square of attn's size (NATTEN 0.14.1)."""
    return _old_av("natten2dav", 2, attn, value, sizes, **named)


def natten3dav(
    attn: Tensor,
    value: Tensor,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
    additional_values: Tensor | None = None,
) -> Tensor:
    """`na3d_av`; the sizes of the first axis, then those of the other two."""
    window = _with_depth(kernel_size_d, kernel_size, dilation_d, dilation)
    return _av("natten3dav", 3, attn, value, *window, additional_values, False)


# --- how they are computed --------------------------------------------------------------------------------------------


def _qk(
    op: str,
    axes: int,
    query: Tensor,
    key: Tensor,
    kernel_size: Any,
    dilation: Any,
    additional_keys: Tensor | None,
    is_causal: Any,
    rpb: Tensor | None,
    rpb_name: str = "rpb",
) -> Tensor:
    require_tensors(op, LAYOUTS[axes], query=query, key=key)
    require_shape(op, "key", key, query.shape)
    kernel, steps = _window(op, query.shape[2:-1], kernel_size, dilation)
    _refuse_causal(op, axes, is_causal)
    logits = _qk3d(query, key, kernel, steps) if axes == 3 else _qk2d(query, key, kernel, steps)
    if rpb is not None:
        if not isinstance(rpb, Tensor):
            raise TypeError(f"{op}: {rpb_name} is a {type(rpb).__name__}, expected a Tensor or None")
        require_shape(op, rpb_name, rpb, (query.shape[1], *(2 * k - 1 for k in kernel)))
        if rpb.device != query.device:
            raise ValueError(f"{op}: {rpb_name} is on {rpb.device}, expected query's device {query.device}")
        logits = logits + _biases(rpb.to(logits.dtype), query.shape[2:-1], kernel, steps)
    if additional_keys is None:
        return logits
    require_tensors(op, TOKENS, additional_keys=additional_keys)
    require_kind(op, query=query, additional_keys=additional_keys)
    expected = (*query.shape[:2], additional_keys.shape[2], query.shape[-1])
    require_shape(op, "additional_keys", additional_keys, expected)
    more = query.flatten(2, -2) @ additional_keys.transpose(-2, -1)
    return torch.cat([logits, more.unflatten(2, query.shape[2:-1]).to(logits)], -1)


def _av(
    op: str,
    axes: int,
    attn: Tensor,
    value: Tensor,
    kernel_size: Any,
    dilation: Any,
    additional_values: Tensor | None,
    is_causal: Any,
) -> Tensor:
    require_tensors(op, WEIGHTS[axes], attn=attn)
    require_tensors(op, LAYOUTS[axes], value=value)
    require_kind(op, attn=attn, value=value)
    kernel, steps = _window(op, value.shape[2:-1], kernel_size, dilation)
    _refuse_causal(op, axes, is_causal)
    tokens = 0
    if additional_values is not None:
        require_tensors(op, TOKENS, additional_values=additional_values)
        tokens = additional_values.shape[2]
        expected = (*value.shape[:2], tokens, value.shape[-1])
        require_shape(op, "additional_values", additional_values, expected)
        require_kind(op, value=value, additional_values=additional_values)
    taps = math.prod(kernel)
    require_shape(op, "attn", attn, (*value.shape[:-1], taps + tokens))
    own = attn if not tokens else attn[..., :taps]
    output = _av3d(own, value, kernel, steps) if axes == 3 else _av2d(own, value, kernel, steps)
    if additional_values is None:
        return output
    more = attn[..., taps:].flatten(2, -2) @ additional_values
    return output + more.unflatten(2, value.shape[2:-1]).to(output)


def _attend(
    op: str,
    axes: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Any,
    order: tuple,
    *,
    stride: Any = 1,
    dilation: Any = 1,
    is_causal: Any = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    **tuning: Any,
) -> Tensor:
    # Ones mean the same in every order.
    if any(value != 1 for value in order[:2]) or len(order) > 2:
        raise TypeError(
            f"{op}: {order} follows kernel_size, expected names: NATTEN 0.17 has dilation first, 0.20 stride"
        )
    if unknown := sorted(tuning.keys() - TUNING):
        raise TypeError(f"{op}: {unknown[0]} is not an argument of NATTEN's")
    if any(s != 1 for s in integers(op, "stride", stride, axes)):
        raise NotImplementedError(f"{op}: stride is {stride!r}, expected 1: queries never share a window here")
    if return_lse:
        raise NotImplementedError(f"{op}: return_lse is {return_lse!r}, expected False")
    require_tensors(op, HEADS_LAST[axes], query=query, key=key, value=value)
    if (additional_keys is None) != (additional_values is None):
        missing = "additional_keys" if additional_keys is None else "additional_values"
        raise ValueError(f"{op}: {missing} is None, expected both or neither")
    tokens = (None if t is None else t.transpose(1, 2) for t in (additional_keys, additional_values))
    more_keys, more_values = tokens
    query, key, value = (t.movedim(-2, 1) for t in (query, key, value))
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    logits = _qk(op, axes, query, key, kernel_size, dilation, more_keys, is_causal, rpb)
    attn = logits.softmax(-1).to(value.dtype)
    return _av(op, axes, attn, value, kernel_size, dilation, more_values, is_causal).movedim(1, -2)


TUNING = {
    "attention_kwargs", "backend", "q_tile_shape", "kv_tile_shape", "backward_q_tile_shape", "backward_kv_tile_shape",
    "backward_kv_splits", "backward_use_pt_reduction", "run_persistent_kernel", "kernel_schedule", "torch_compile",
    "try_fuse_additional_kv",
}  # fmt: skip
"""What chooses or tunes a kernel of NATTEN's, in `na1d`, `na2d` and `na3d` from 0.20 on."""


def _as_image(tokens: Tensor) -> Tensor:
    """(B, heads, H, W, D) as (B, heads * D, H, W): a view if queries, keys and values come from one projection."""
    return tokens.permute(0, 1, 4, 2, 3).flatten(1, 2)


def _qk2d(query: Tensor, key: Tensor, kernel: tuple[int, ...], steps: tuple[int, ...]) -> Tensor:
    if len(kernel) == 1:
        return _qk2d(query.unsqueeze(2), key.unsqueeze(2), (1, *kernel), (1, *steps)).squeeze(2)
    size, dilation, heads = (kernel[0], kernel[1]), (steps[0], steps[1]), query.shape[1]
    query, key = _as_image(query), _as_image(key)
    logits = local_correlation2d(query, key, size, dilation=dilation, groups=heads, border="shift")
    return logits.permute(0, 1, 4, 5, 2, 3).flatten(4)


def _av2d(attn: Tensor, value: Tensor, kernel: tuple[int, ...], steps: tuple[int, ...]) -> Tensor:
    if len(kernel) == 1:
        return _av2d(attn.unsqueeze(2), value.unsqueeze(2), (1, *kernel), (1, *steps)).squeeze(2)
    weight = attn.unflatten(-1, kernel).permute(0, 1, 4, 5, 2, 3)
    output = involution2d(_as_image(value), weight, dilation=(steps[0], steps[1]), border="shift")
    return output.unflatten(1, (value.shape[1], value.shape[-1])).permute(0, 1, 3, 4, 2)


def _qk3d(query: Tensor, key: Tensor, kernel: tuple[int, ...], steps: tuple[int, ...]) -> Tensor:
    depths = _taps(query.shape[2], kernel[0], steps[0], query.device)
    slices = _slices(query)
    logits = [_qk2d(slices, _slices(key[:, :, depths[:, k]]), kernel[1:], steps[1:]) for k in range(kernel[0])]
    return torch.cat(logits, -1).unflatten(0, (query.shape[0], query.shape[2])).transpose(1, 2)


def _av3d(attn: Tensor, value: Tensor, kernel: tuple[int, ...], steps: tuple[int, ...]) -> Tensor:
    depths = _taps(value.shape[2], kernel[0], steps[0], value.device)
    weights = _slices(attn).chunk(kernel[0], -1)
    output = sum(
        _av2d(weight, _slices(value[:, :, depths[:, k]]), kernel[1:], steps[1:]) for k, weight in enumerate(weights)
    )
    assert isinstance(output, Tensor)
    return output.unflatten(0, (value.shape[0], value.shape[2])).transpose(1, 2)


def _slices(tokens: Tensor) -> Tensor:
    """(B, heads, Z, Y, X, D) as (B * Z, heads, Y, X, D)."""
    return tokens.transpose(1, 2).flatten(0, 1)


def _taps(length: int, kernel: int, dilation: int, device: torch.device) -> Tensor:
    """(length, kernel): the positions of each window, as at the top of this file."""
    position = torch.arange(length, device=device)
    residue, step = position % dilation, position // dilation
    last = (length - 1 - residue) // dilation + 1 - kernel
    first = residue + dilation * torch.minimum((step - kernel // 2).clamp(min=0), last)
    return first[:, None] + dilation * torch.arange(kernel, device=device)


def _biases(rpb: Tensor, lengths: Sequence[int], kernel: tuple[int, ...], steps: tuple[int, ...]) -> Tensor:
    """(heads, *lengths, K) of ``rpb`` (heads, 2 K - 1, ...): of a tap the entry K - 1 + its distance in steps."""
    axes = len(kernel)
    starts: list[Any] = [slice(None)]
    for axis, (length, size, step) in enumerate(zip(lengths, kernel, steps, strict=True)):
        first = _taps(length, size, step, rpb.device)[:, 0]
        start = size - 1 + (first - torch.arange(length, device=rpb.device)) // step
        starts.append(start.view([-1 if other == axis else 1 for other in range(axes)]))
        rpb = rpb.unfold(1 + axis, size, 1)
    return rpb.flatten(1 + axes)[tuple(starts)]


def _window(op: str, lengths: Sequence[int], kernel_size: Any, dilation: Any) -> tuple[tuple[int, ...], ...]:
    """Kernel sizes and dilations of each axis."""
    kernel = integers(op, "kernel_size", kernel_size, len(lengths))
    steps = integers(op, "dilation", 1 if dilation is None else dilation, len(lengths))
    for axis, (length, size, step) in enumerate(zip(lengths, kernel, steps, strict=True)):
        if size * step > length:
            expected = f"at most its length {length}"
            raise ValueError(f"{op}: kernel_size times dilation is {size} * {step} on axis {axis}, expected {expected}")
    return kernel, steps


def _refuse_causal(op: str, axes: int, is_causal: Any) -> None:
    values = is_causal if isinstance(is_causal, (tuple, list)) else (is_causal,)
    if any(value is not None and not isinstance(value, bool) for value in values) or len(values) not in (1, axes):
        raise TypeError(f"{op}: is_causal is {is_causal!r}, expected a bool or {axes} of them")
    if any(values):
        raise NotImplementedError(f"{op}: is_causal is {is_causal!r}, expected False: causal windows are not done here")


def _with_depth(kernel_size_d: Any, kernel_size: Any, dilation_d: Any, dilation: Any) -> tuple[tuple, tuple]:
    return (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)


def _qkrpb(op: str, axes: int, query: Tensor, key: Tensor, rpb: Tensor | None, sizes: tuple, **named: Any) -> Tensor:
    inferred = None
    if isinstance(rpb, Tensor) and rpb.dim() == axes + 1:
        inferred = tuple((rows + 1) // 2 for rows in rpb.shape[1:])
    kernel_size, dilation = _old_sizes(op, sizes, inferred, "rpb", **named)
    return _qk(op, axes, query, key, kernel_size, dilation, None, False, rpb)


def _old_av(op: str, axes: int, attn: Tensor, value: Tensor, sizes: tuple, **named: Any) -> Tensor:
    additional_values = sizes[2] if len(sizes) == 3 else named.pop("additional_values", None)
    inferred = None
    if isinstance(attn, Tensor) and attn.dim() == axes + 3 and additional_values is None:
        side = round(attn.shape[-1] ** (1 / axes))
        inferred = side if side**axes == attn.shape[-1] else None
    kernel_size, dilation = _old_sizes(op, sizes[:2] if len(sizes) == 3 else sizes, inferred, "attn", **named)
    return _av(op, axes, attn, value, kernel_size, dilation, additional_values, False)


def _old_sizes(op: str, sizes: tuple, inferred: Any, source: str, **named: Any) -> tuple[Any, Any]:
    """Kernel size and dilation: both, as from NATTEN 0.14.2 on, or only the dilation, as in 0.14.1."""
    names = ["kernel_size", "dilation"] if len(sizes) == 2 or "dilation" in named else ["dilation"]
    given = dict(zip(names, sizes, strict=False))
    if len(sizes) > 2 or named.keys() & given.keys() or named.keys() - {"kernel_size", "dilation"}:
        raise TypeError(f"{op}: {sizes} and {named} follow the tensors, expected kernel_size and dilation, or dilation")
    given |= named
    if "dilation" not in given:
        raise TypeError(f"{op}: dilation is missing, expected an int")
    if "kernel_size" not in given and inferred is None:
        raise TypeError(f"{op}: kernel_size is missing, and {source} does not have it; expected an int")
    return given.get("kernel_size", inferred), given["dilation"]
