"""The modules of `pyinvolution.compat.natten`, with NATTEN's parameter names: ``qkv``, ``rpb`` and ``proj``."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from pyinvolution.compat._arguments import integer, integers
from pyinvolution.compat.natten.functional import LAYOUTS, Causal, Size, _av, _qk, _refuse_causal
from pyinvolution.ops import shape_of

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]

# Opaque to torch.fx, which cannot follow their branches.
torch.fx.wrap("_check_tokens")
torch.fx.wrap("_qk")
torch.fx.wrap("_av")

SPATIAL = {axes: layout.replace("heads, ", "").replace("D)", "dim)") for axes, layout in LAYOUTS.items()}


class _NeighborhoodAttention(nn.Module):
    """What the three modules share; ``axes`` is all that differs."""

    axes: int
    rpb: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: Size,
        dilation: Size | None = 1,
        is_causal: Causal = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        use_experimental_ops: bool = False,
        *,
        stride: Size = 1,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.num_heads = integer(name, "num_heads", num_heads)
        if integer(name, "dim", dim) % num_heads:
            raise ValueError(f"{name}: dim is {dim}, expected a multiple of num_heads {num_heads}")
        self.kernel_size = integers(name, "kernel_size", kernel_size, self.axes)
        self.dilation = integers(name, "dilation", 1 if dilation is None else dilation, self.axes)
        _refuse_causal(name, self.axes, is_causal)
        if any(s != 1 for s in integers(name, "stride", stride, self.axes)):
            raise NotImplementedError(f"{name}: stride is {stride!r}, expected 1")
        self.is_causal = (False,) * self.axes
        self.head_dim = dim // num_heads
        self.scale = qk_scale or self.head_dim**-0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        rows = [2 * k - 1 for k in self.kernel_size]
        self.register_parameter("rpb", nn.Parameter(torch.empty(num_heads, *rows)) if rel_pos_bias else None)
        if self.rpb is not None:
            nn.init.trunc_normal_(self.rpb, std=0.02)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        name = type(self).__name__
        x = _check_tokens(name, self.axes, self.qkv.in_features, x)
        return self.proj_drop(self.proj(self._attend(name, x)))

    def _attend(self, name: str, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = qkv.movedim(-2, 1).unbind(-2)
        window = (self.kernel_size, self.dilation)
        logits = _qk(name, self.axes, query * self.scale, key, *window, None, False, self.rpb)
        attn = self.attn_drop(logits.softmax(-1))
        return _av(name, self.axes, attn, value, *window, None, False).movedim(1, -2).flatten(-2)

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}, "
            f"dilation={self.dilation}, is_causal={self.is_causal}, has_bias={self.rpb is not None}"
        )


def _check_tokens(op: str, axes: int, dim: int, x: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x is a {type(x).__name__}, expected a Tensor")
    if x.dim() != axes + 2 or x.shape[-1] != dim:
        expected = SPATIAL[axes].replace("dim", str(dim))
        raise ValueError(f"{op}: x has shape {tuple(shape_of(x))}, expected {expected}")
    return x


class NeighborhoodAttention1D(_NeighborhoodAttention):
    """`NeighborhoodAttention2D` for sequences: (B, L, dim) to (B, L, dim)."""

    axes = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    """Neighbourhood attention between two linear layers, by the arguments of NATTEN 0.17.

    Args:
        dim: channels of input and output, a multiple of ``num_heads``.
        num_heads: heads, of ``dim // num_heads`` channels each.
        kernel_size: K, an int or one for each axis.
        dilation: an int or one for each axis.
        is_causal: False; anything else raises an error.
        rel_pos_bias: whether there is a parameter ``rpb``, (num_heads, 2 K - 1, 2 K - 1). Up to NATTEN 0.15 it is
            called ``bias`` and is there by default: `pyinvolution.compat.natten.v014` has those modules.
        qkv_bias: whether ``qkv`` has a bias.
        qk_scale: of the queries; None for 1 / sqrt(head_dim).
        attn_drop, proj_drop: probabilities of dropout, of the attention weights and of the output.
        use_experimental_ops: has no effect.
        stride: 1 (of NATTEN 0.20; by name only).

    Shape:
        - Input: (B, H, W, dim), no axis smaller than the kernel size times the dilation.
        - Output: (B, H, W, dim).

    Raises:
        TypeError, ValueError: an argument or the input does not fit.
        NotImplementedError: ``is_causal`` is true or ``stride`` is not 1.
    """

    axes = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    """`NeighborhoodAttention2D` for volumes: (B, Z, Y, X, dim) to (B, Z, Y, X, dim)."""

    axes = 3


def without_fused_kernels(switch: str) -> Any:
    """A switch of NATTEN's that chooses kernels: it warns that there is nothing to choose."""

    def set_nothing(*values: Any, **options: Any) -> None:
        warnings.warn(f"{switch} has no effect: these modules have the same results in every mode", stacklevel=2)

    return set_nothing
