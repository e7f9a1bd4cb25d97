"""What the stand-ins check of their arguments. An error names the argument as the other side calls it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyinvolution.ops import shape_of


def require_tensors(op: str, layout: str, **tensors: Any) -> None:
    """Each is a dense floating-point tensor of the rank of ``layout``, e.g. "(N, C, H, W)"; they are of one kind."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} is a {type(tensor).__name__}, expected a Tensor")
        if tensor.is_nested:
            raise ValueError(f"{op}: {name} is a nested tensor, expected a dense one of shape {layout}")
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, expected a floating-point dtype")
        if tensor.dim() != layout.count(",") + 1:
            raise ValueError(f"{op}: {name} has shape {shape_text(tensor)}, expected {layout}")
    require_kind(op, **tensors)


def require_kind(op: str, **tensors: Tensor | None) -> None:
    """All are on the device of the first, and outside autocast of its dtype."""
    (first, expected), *others = tensors.items()
    assert expected is not None
    for name, tensor in others:
        if tensor is None:
            continue
        if tensor.device != expected.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected {first}'s device {expected.device}")
        if tensor.dtype != expected.dtype and not torch.is_autocast_enabled(expected.device.type):
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, expected {first}'s dtype {expected.dtype}")


def require_shape(op: str, name: str, tensor: Tensor, expected: Sequence[int]) -> None:
    if tuple(shape_of(tensor)) != tuple(expected):
        raise ValueError(f"{op}: {name} has shape {shape_text(tensor)}, expected {tuple(expected)}")


def shape_text(tensor: Tensor) -> str:
    return str(tuple(shape_of(tensor)))


def integers(op: str, name: str, value: object, count: int, minimum: int = 1) -> tuple[int, ...]:
    """``value`` as ``count`` ints of at least ``minimum``; an int stands for ``count`` of them."""
    kind = {1: "an int", 2: "an int or a pair of ints"}.get(count, f"an int or {count} ints")
    values: Sequence[Any] = value if isinstance(value, (tuple, list)) else (value,) * count
    if len(values) != count:
        raise ValueError(f"{op}: {name} is {value!r}, expected {kind}")
    if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise TypeError(f"{op}: {name} is {value!r}, expected {kind}")
    if any(v < minimum for v in values):
        raise ValueError(f"{op}: {name} is {value!r}, expected at least {minimum}")
    return tuple(values)


def pair(op: str, name: str, value: object, minimum: int = 1) -> tuple[int, int]:
    first, second = integers(op, name, value, 2, minimum)
    return first, second


def integer(op: str, name: str, value: object, minimum: int = 1) -> int:
    if isinstance(value, (tuple, list)):
        raise TypeError(f"{op}: {name} is {value!r}, expected an int")
    return integers(op, name, value, 1, minimum)[0]
