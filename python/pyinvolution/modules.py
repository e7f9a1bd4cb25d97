"""Learned involution: the layer that generates its own kernels."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pyinvolution.functional import involution2d, span_involution2d
from pyinvolution.normalization import norm_relu
from pyinvolution.ops import cell_mean, shape_of
from pyinvolution.stock import is_pointwise, is_stock

__all__ = ["Involution2d"]

# Opaque to torch.fx, which cannot follow their branches.
torch.fx.wrap("involution2d")
torch.fx.wrap("span_involution2d")
torch.fx.wrap("check_input")
torch.fx.wrap("_drop_batch")


class Involution2d(nn.Module):
    r"""Involution with kernels generated from the input (Li et al., CVPR 2021, section 3, equations 4 to 6).

    The kernel of an output pixel p and group g is a function of the input at that pixel only, shared by the
    ``group_channels`` channels of the group; k runs over the taps of the window::

        H[p]    = span(act(norm(reduce(P[p]))))      P = X, or its average over each stride x stride cell
        Y[c, p] = sum over k of  H[g(c), k, p] * X[c, stride * p + dilation * k - padding]
        g(c)    = c // group_channels

    ``reduce`` is a 1x1 convolution C -> C // reduction, ``span`` a 1x1 convolution to G * Kh * Kw channels
    whose channel ``g * Kh * Kw + i * Kw + j`` is tap (i, j) of group g. The window is centred and zero-padded
    like a convolution with ``padding="same"`` (an even window takes its extra row or column from the bottom
    or right), so the output always has ``ceil(H / stride)`` rows, the only size for which there are kernels.
    The layer is a drop-in for ``Conv2d(channels, out_channels, 3, stride, padding=1)``. On even sizes it
    computes what the authors' code does; a trailing odd row or column, on which that code fails, is averaged
    by itself.

    Parameters: C²/r (reduce) + 2C/r (norm) + (C/r + 1)·G·Kh·Kw (span). Multiply-adds for each output pixel:
    C²/r + (C/r)·G·Kh·Kw (kernel generation) + C·Kh·Kw (application). A projection adds C·out_channels to
    both.

    Submodules: ``reduce.conv``, ``reduce.norm``, ``reduce.act``, ``span`` and, if ``out_channels`` needs it,
    ``project``. These names, and with them the keys of the state dict, are stable.

    Args:
        channels: channels C of the input.
        kernel_size: window, an int or (vertical, horizontal); even sizes are allowed.
        stride: int or (vertical, horizontal).
        dilation: distance between taps, int or (vertical, horizontal).
        group_channels: channels which share a kernel; must divide ``channels``.
        reduction: ratio r of the bottleneck that generates the kernels; at most ``channels``.
        out_channels: channels of the output; if other than ``channels``, a 1x1 convolution follows the
            involution.
        bias: add a learned value to each output channel.
        norm_layer: called with the reduced channels, returns the layer after ``reduce.conv``; None for none
            (``reduce.conv`` then has a bias).
        activation: called without arguments, returns the non-linearity after the norm.
        fused: compute the kernels inside the involution (`functional.span_involution2d`), so that they are never in
            memory. None and True do so where the library has a kernel for the layer and ``span`` is the convolution
            that the layer made; False never does. A ``span`` that was replaced, wrapped, parametrized or hooked is
            called: it returns the kernels, (N, G * Kh * Kw, Ho, Wo).
        device, dtype: of the parameters.

    Shape:
        - Input: (N, C, H, W) or (C, H, W), floating point, NCHW or channels_last.
        - Output: (N, out_channels, ceil(H / stride), ceil(W / stride)) or the same without N, in the input's
          memory format.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or the input has another rank or number of channels.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int] = 7,
        stride: int | tuple[int, int] = 1,
        dilation: int | tuple[int, int] = 1,
        group_channels: int = 16,
        reduction: int = 4,
        *,
        out_channels: int | None = None,
        bias: bool = False,
        norm_layer: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
        activation: Callable[[], nn.Module] = nn.ReLU,
        fused: bool | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels)
        self.kernel_size = _positive_pair("kernel_size", kernel_size)
        self.stride = _positive_pair("stride", stride)
        self.dilation = _positive_pair("dilation", dilation)
        self.group_channels = positive_int("group_channels", group_channels)
        self.reduction = positive_int("reduction", reduction)
        self.out_channels = channels if out_channels is None else positive_int("out_channels", out_channels)
        if channels % group_channels:
            raise ValueError(f"group_channels is {group_channels}, expected a divisor of channels={channels}")
        if reduction > channels:
            raise ValueError(f"reduction is {reduction}, expected at most channels={channels}")
        if fused is not None and not isinstance(fused, bool):
            raise TypeError(f"fused is {fused!r}, expected a bool or None")
        self.groups = channels // group_channels
        self.fused = fused

        kh, kw = self.kernel_size
        halo = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        self.padding = (halo[0] // 2, halo[1] // 2)
        self._extra_padding = (0, halo[1] % 2, 0, halo[0] % 2)

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        reduced = channels // reduction
        self.pool = None
        if self.stride != (1, 1):
            self.pool = _CellMean(self.stride)
        conv = nn.Conv2d(channels, reduced, 1, bias=norm_layer is None, **factory)
        self.reduce = nn.Sequential(OrderedDict(conv=conv))
        if norm_layer is not None:
            self.reduce.add_module("norm", norm_layer(reduced).to(**factory))
        self.reduce.add_module("act", activation())
        self.span = nn.Conv2d(reduced, self.groups * kh * kw, 1, **factory)
        self.project = None
        if self.out_channels != channels:
            self.project = nn.Conv2d(channels, self.out_channels, 1, bias=bias, **factory)
        if bias and self.project is None:
            self.bias = nn.Parameter(torch.empty(channels, **factory))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the convolutions as the authors do (`init_conv`) and zero the bias."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                init_conv(module)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        x = check_input(input, self.channels, "Involution2d", unbatched=True)
        reduced = self._reduce(x if self.pool is None else self.pool(x))
        if any(self._extra_padding):
            x = pad(x, self._extra_padding)
        window = (self.stride, self.padding, self.dilation)
        if self.fused is not False and is_pointwise(self.span):
            span: Any = self.span
            output = span_involution2d(x, reduced, span.weight, span.bias, self.kernel_size, *window)
            if self.bias is not None:
                output = output + self.bias.view(-1, 1, 1)
        else:
            kernels = self.span(reduced).unflatten(1, (self.groups, *self.kernel_size))
            output = involution2d(x, kernels, self.bias, *window)
        if self.project is not None:
            output = self.project(output)
        return _drop_batch(output, input)

    def _reduce(self, input: Tensor) -> Tensor:
        reduce: Any = self.reduce
        if self.training and is_stock(reduce, nn.Sequential) and list(reduce._modules) == ["conv", "norm", "act"]:
            return norm_relu(reduce.norm, reduce.act, reduce.conv(input))
        return reduce(input)

    def extra_repr(self) -> str:
        text = f"{self.channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        text += f", group_channels={self.group_channels}, reduction={self.reduction}"
        return text if self.bias is None else text + ", bias=True"


class _CellMean(nn.AvgPool2d):
    """(N, C, H, W) -> mean over cells of ``stride``, (N, C, ceil(H / stride), ceil(W / stride))."""

    stride: tuple[int, int]

    def __init__(self, stride: tuple[int, int]) -> None:
        super().__init__(stride, stride, ceil_mode=True)

    def forward(self, input: Tensor) -> Tensor:
        if not (torch.compiler.is_exporting() and any(isinstance(n, torch.SymInt) for n in input.shape[2:])):
            return super().forward(input)
        return cell_mean(input, self.stride)


def init_conv(conv: nn.Conv2d) -> None:
    """Kaiming normal over the fan out for ReLU, zero bias: the initialisation of the authors' code."""
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def positive_int(name: str, value: object, minimum: int = 1) -> int:
    """``value`` if it is an int of at least ``minimum``, else a TypeError or ValueError that names it."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, expected an int")
    if value < minimum:
        raise ValueError(f"{name} is {value}, expected at least {minimum}")
    return value


def _positive_pair(name: str, value: object) -> tuple[int, int]:
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{name} is {value!r}, expected an int or a pair of ints")
        return positive_int(f"{name}[0]", value[0]), positive_int(f"{name}[1]", value[1])
    if not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}, expected an int or a pair of ints")
    return (positive_int(name, value),) * 2


def check_input(input: Tensor, channels: int, owner: str, unbatched: bool = False) -> Tensor:
    """``input`` as (N, C, H, W), or a TypeError or ValueError in the name of ``owner``."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{owner}: input is a {type(input).__name__}, expected a Tensor")
    if not input.is_floating_point():
        raise TypeError(f"{owner}: input has dtype {input.dtype}, expected a floating-point dtype")
    shape = f"(N, {channels}, H, W)" + f" or ({channels}, H, W)" * unbatched
    if input.dim() not in ((3, 4) if unbatched else (4,)) or shape_of(input)[-3] != channels:
        raise ValueError(f"{owner}: input has shape {tuple(shape_of(input))}, expected {shape}")
    return input if input.dim() == 4 else input.unsqueeze(0)


def _drop_batch(output: Tensor, input: Tensor) -> Tensor:
    return output if input.dim() == 4 else output.squeeze(0)
