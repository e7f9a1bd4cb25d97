"""Stands in for ``natten`` 0.14 and 0.15, whose modules differ from those of 0.17 under the same names.

They have relative positional biases unless ``bias=False``, take no ``is_causal``, and pad an input that is smaller than
the window. The functions are those of `pyinvolution.compat.natten.functional`.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyinvolution.compat.natten import functional
from pyinvolution.compat.natten.functional import Size
from pyinvolution.compat.natten.modules import _NeighborhoodAttention

__all__ = [
    "NeighborhoodAttention",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "functional",
]

# Opaque to torch.fx, which cannot follow their branches.
torch.fx.wrap("_padded")
torch.fx.wrap("_cut")

__version__ = "0.14.6"


class _Padded(_NeighborhoodAttention):
    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: Size,
        dilation: Size | None = 1,
        bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(dim, num_heads, kernel_size, dilation, False, bias, qkv_bias, qk_scale, attn_drop, proj_drop)

    def _attend(self, name: str, x: Tensor) -> Tensor:
        windows = tuple(k * d for k, d in zip(self.kernel_size, self.dilation, strict=True))
        return _cut(super()._attend(name, _padded(x, windows)), x)


def _padded(x: Tensor, windows: tuple[int, ...]) -> Tensor:
    """(B, *lengths, dim) with zeros at the end of each axis that is shorter than its window."""
    missing = [max(window - length, 0) for window, length in zip(windows, x.shape[1:-1], strict=True)]
    return pad(x, [0, 0, *(side for count in reversed(missing) for side in (0, count))]) if any(missing) else x


def _cut(output: Tensor, x: Tensor) -> Tensor:
    """``output`` without what `_padded` has added to ``x``."""
    return output if output.shape == x.shape else output[(slice(None), *map(slice, x.shape[1:-1]))]


class NeighborhoodAttention1D(_Padded):
    """`NeighborhoodAttention2D` for sequences: (B, L, dim) to (B, L, dim)."""

    axes = 1


class NeighborhoodAttention2D(_Padded):
    """Neighbourhood attention between two linear layers, by the arguments of NATTEN 0.14 and 0.15.

    Args:
        dim, num_heads, kernel_size, dilation, qkv_bias, qk_scale, attn_drop, proj_drop: as in
            `pyinvolution.compat.natten.NeighborhoodAttention2D`. NATTEN 0.14.1 has the kernel size before the heads:
            give both by name.
        bias: whether there is a parameter ``rpb``, (num_heads, 2 K - 1, 2 K - 1).

    Shape:
        - Input: (B, H, W, dim). An axis smaller than the kernel size times the dilation is padded with zeros at its
          end, and the output is cut off there.
        - Output: (B, H, W, dim).
    """

    axes = 2


class NeighborhoodAttention3D(_Padded):
    """`NeighborhoodAttention2D` for volumes, by the arguments of NATTEN 0.15: (B, Z, Y, X, dim) to (B, Z, Y, X, dim).

    Args:
        kernel_size, dilation: of the last two axes.
        kernel_size_d, dilation_d: of the first axis; None for the same.
        dim, num_heads, bias, qkv_bias, qk_scale, attn_drop, proj_drop: as in `NeighborhoodAttention2D`.
    """

    axes = 3

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        kernel_size_d: int | None = None,
        dilation: int = 1,
        dilation_d: int | None = None,
        bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        dilation = dilation or 1
        kernel = (kernel_size_d or kernel_size, kernel_size, kernel_size)
        steps = (dilation_d or dilation, dilation, dilation)
        super().__init__(dim, num_heads, kernel, steps, bias, qkv_bias, qk_scale, attn_drop, proj_drop)


NeighborhoodAttention = NeighborhoodAttention2D
