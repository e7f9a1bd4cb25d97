"""Learned involution: the layers that generate their own kernels."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pyinvolution.functional import involution2d, span_involution2d
from pyinvolution.kernel_norms import KERNEL_NORMS, KernelNorm, per_kernel_length
from pyinvolution.normalization import conv_norm
from pyinvolution.ops import cell_mean, layer_output_size, shape_of
from pyinvolution.stock import is_pointwise, is_stock
from pyinvolution.training_layer import run_as_one, trains_as_one

__all__ = ["Involution1d", "Involution2d"]

# Opaque to torch.fx, which cannot follow their branches.
torch.fx.wrap("involution2d")
torch.fx.wrap("span_involution2d")
torch.fx.wrap("check_input")
torch.fx.wrap("_drop_batch")
torch.fx.wrap("_source")
torch.fx.wrap("_check_kernels")
torch.fx.wrap("_with_row")
torch.fx.wrap("_drop_row")
torch.fx.wrap("per_kernel_length")


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
    ``project``; with a ``generator`` that one in the place of ``reduce`` and ``span``. These names, and with them the
    keys of the state dict, are stable.

    The kernels may come from another tensor, the guide of `forward`: ``layer(x, guide)`` filters x by kernels that are
    a function of the guide, as joint filters do.

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
        kernel_norm: of each kernel over its taps: "softmax" (weights of an average), "l2" (of length one), a function
            from and to (N, G, Kh * Kw, Ho, Wo), or None. The kernels then are in memory, but for "l2" with at most
            Kh * Kw reduced channels: their lengths are computed from the reduced channels, and the output is divided
            by them.
        guide_channels: channels of the guide that the kernels are made from; a layer with another number than
            ``channels`` needs a guide. None: ``channels``.
        generator: a module of your own in the place of pooling, ``reduce`` and ``span``; called with the guide, or the
            input where there is none, as (N, guide_channels, H, W), it returns the kernels, (N, G * Kh * Kw, Ho, Wo) or
            (N, G, Kh, Kw, Ho, Wo). ``reduction``, ``norm_layer`` and ``activation`` then have no meaning.
        device, dtype: of the parameters.

    Shape:
        - Input: (N, C, H, W) or (C, H, W), floating point, NCHW or channels_last.
        - Guide: (N, guide_channels, H, W), or without N; input's height and width.
        - Output: (N, out_channels, ceil(H / stride), ceil(W / stride)) or the same without N, in the input's
          memory format.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or the input, the guide or what the generator returns has another rank
            or number of channels or pixels.
    """

    reduce: nn.Sequential | None
    span: nn.Module | None

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
        kernel_norm: str | KernelNorm | None = None,
        guide_channels: int | None = None,
        generator: nn.Module | None = None,
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
        self.guide_channels = channels if guide_channels is None else positive_int("guide_channels", guide_channels)
        if channels % group_channels:
            raise ValueError(
                f"group_channels is {group_channels}, expected a divisor of channels={channels}: "
                f"{_nearest_divisors(channels, group_channels)}"
            )
        if reduction > self.guide_channels and generator is None:
            name = "channels" if guide_channels is None else "guide_channels"
            raise ValueError(f"reduction is {reduction}, expected at most {name}={self.guide_channels}")
        if fused is not None and not isinstance(fused, bool):
            raise TypeError(f"fused is {fused!r}, expected a bool or None")
        if isinstance(kernel_norm, str) and kernel_norm not in KERNEL_NORMS:
            raise ValueError(f"kernel_norm is {kernel_norm!r}, expected one of {', '.join(KERNEL_NORMS)}")
        if not (kernel_norm is None or isinstance(kernel_norm, str) or callable(kernel_norm)):
            raise TypeError(f"kernel_norm is {kernel_norm!r}, expected a str, a function or None")
        if not (generator is None or isinstance(generator, nn.Module)):
            raise TypeError(f"generator is a {type(generator).__name__}, expected a Module or None")
        self.groups = channels // group_channels
        self.fused = fused
        self.kernel_norm = kernel_norm

        kh, kw = self.kernel_size
        halo = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        self.padding = (halo[0] // 2, halo[1] // 2)
        self._extra_padding = (0, halo[1] % 2, 0, halo[0] % 2)

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.pool = None
        self.generator = generator
        if generator is None:
            reduced = self.guide_channels // reduction
            if self.stride != (1, 1):
                self.pool = _CellMean(self.stride)
            conv = nn.Conv2d(self.guide_channels, reduced, 1, bias=norm_layer is None, **factory)
            self.reduce = nn.Sequential(OrderedDict(conv=conv))
            if norm_layer is not None:
                self.reduce.add_module("norm", norm_layer(reduced).to(**factory))
            self.reduce.add_module("act", activation())
            self.span = nn.Conv2d(reduced, self.groups * kh * kw, 1, **factory)
        else:
            self.reduce = self.span = None
        self.project = None
        if self.out_channels != channels:
            self.project = nn.Conv2d(channels, self.out_channels, 1, bias=bias, **factory)
        if bias and self.project is None:
            self.bias = nn.Parameter(torch.empty(channels, **factory))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the convolutions as the authors do (`init_conv`) and zero the bias; not those of a generator."""
        foreign = set() if self.generator is None else set(self.generator.modules())
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module not in foreign:
                init_conv(module)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, guide: Tensor | None = None) -> Tensor:
        x = check_input(input, self.channels, "Involution2d", unbatched=True)
        source = _source(x, guide, self.guide_channels)
        window = (self.stride, self.padding, self.dilation)
        if guide is None and self._trains_as_one(x):
            output = _plus(run_as_one(self, x), self.bias)
        elif self._may_fuse():
            reduced = self._reduce(source)
            span: Any = self.span
            x = self._padded(x)
            output = span_involution2d(x, reduced, span.weight, span.bias, self.kernel_size, *window)
            if self.kernel_norm is not None:
                output = per_kernel_length(output, reduced, span.weight, span.bias, self.groups)
            output = _plus(output, self.bias)
        else:
            kernels = self._generate(source)
            output = involution2d(self._padded(x), kernels, self.bias, *window)
        if self.project is not None:
            output = self.project(output)
        return _drop_batch(output, input)

    def kernels(self, input: Tensor, guide: Tensor | None = None) -> Tensor:
        """The kernels that `forward` applies for these arguments, (N, G, Kh, Kw, Ho, Wo), or without N."""
        x = check_input(input, self.channels, "Involution2d", unbatched=True)
        kernels = self._generate(_source(x, guide, self.guide_channels))
        return kernels if input.dim() == 4 else kernels.squeeze(0)

    def _may_fuse(self) -> bool:
        """Whether the kernels are those of the span's convolution, but for a factor that is cheaper than they are: then
        they can be computed where they are used."""
        if self.fused is False or not is_pointwise(self.span):
            return False
        taps = self.kernel_size[0] * self.kernel_size[1]
        return self.kernel_norm is None or (self.kernel_norm == "l2" and self.span.in_channels <= taps)  # type: ignore

    def _trains_as_one(self, x: Tensor) -> bool:
        return self.training and (self.pool is None or is_stock(self.pool, _CellMean)) and trains_as_one(self, x)

    def _padded(self, x: Tensor) -> Tensor:
        return pad(x, self._extra_padding) if any(self._extra_padding) else x

    def _generate(self, source: Tensor) -> Tensor:
        if self.generator is not None:
            kernels = _check_kernels(self.generator(source), (self.groups, *self.kernel_size), source, self.stride)
        else:
            span: Any = self.span
            kernels = span(self._reduce(source)).unflatten(1, (self.groups, *self.kernel_size))
        if self.kernel_norm is None:
            return kernels
        norm = KERNEL_NORMS[self.kernel_norm] if isinstance(self.kernel_norm, str) else self.kernel_norm
        return norm(kernels.flatten(2, 3)).unflatten(2, self.kernel_size)

    def _reduce(self, input: Tensor) -> Tensor:
        if self.pool is not None:
            input = self.pool(input)
        reduce: Any = self.reduce
        return conv_norm(reduce, input)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Layers that were pickled before there were these attributes.
        state.setdefault("kernel_norm", None)
        state.setdefault("guide_channels", state["channels"])
        if "generator" not in state["_modules"]:
            state.setdefault("generator", None)
        super().__setstate__(state)

    def extra_repr(self) -> str:
        text = f"{self.channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        text += f", group_channels={self.group_channels}"
        if self.generator is None:
            text += f", reduction={self.reduction}"
        if self.guide_channels != self.channels:
            text += f", guide_channels={self.guide_channels}"
        if self.kernel_norm is not None:
            text += f", kernel_norm={self.kernel_norm!r}"
        return text if self.bias is None else text + ", bias=True"


class Involution1d(Involution2d):
    r"""Involution of sequences, such as speech or time series: `Involution2d` of images with one row.

    With ``causal`` an output at a time sees the inputs up to it and none after: its window ends there, and the kernel
    is made from the input at that time. That holds in evaluation mode with the norm that there is by default; in
    training its statistics are those of all times, as in any network, and a GroupNorm or InstanceNorm takes such
    statistics in evaluation mode, too. A ``generator`` must be causal itself.

    Args:
        channels, group_channels, reduction, and all keyword arguments: as for `Involution2d`. ``norm_layer`` and
            ``generator`` see sequences as (N, channels, 1, L), the generator returning (N, G * K, 1, Lo).
        kernel_size, stride, dilation: ints.
        causal: windows end at their output instead of being centred; needs a stride of 1.

    Shape:
        - Input: (N, C, L) or (C, L), floating point.
        - Output: (N, out_channels, ceil(L / stride)) or the same without N.

    Raises:
        TypeError, ValueError: as `Involution2d` does.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        stride: int = 1,
        dilation: int = 1,
        group_channels: int = 16,
        reduction: int = 4,
        *,
        causal: bool = False,
        **options: Any,
    ) -> None:
        for name, value in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation)):
            positive_int(name, value)
        if not isinstance(causal, bool):
            raise TypeError(f"causal is {causal!r}, expected a bool")
        if causal and stride > 1:
            raise ValueError(f"stride is {stride}, expected 1 with causal=True: its cells reach into the future")
        super().__init__(channels, (1, kernel_size), (1, stride), (1, dilation), group_channels, reduction, **options)
        self.causal = causal
        if causal:
            self.padding, self._extra_padding = (0, 0), (dilation * (kernel_size - 1), 0, 0, 0)

    def forward(self, input: Tensor, guide: Tensor | None = None) -> Tensor:
        return _drop_row(super().forward(_with_row(input, "input"), _with_row(guide, "guide")))

    def kernels(self, input: Tensor, guide: Tensor | None = None) -> Tensor:
        """The kernels that `forward` applies for these arguments, (N, G, K, Lo), or without N."""
        kernels = super().kernels(_with_row(input, "input"), _with_row(guide, "guide"))
        return kernels.squeeze(-4).squeeze(-2)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", causal=True" if self.causal else "")


def _with_row(sequence: Any, name: str) -> Any:
    """(N, C, L) or (C, L) as an image of one row; no guide is none."""
    if sequence is None and name == "guide":
        return None
    if not isinstance(sequence, Tensor):
        raise TypeError(f"Involution1d: {name} is a {type(sequence).__name__}, expected a Tensor")
    if sequence.dim() not in (2, 3):
        raise ValueError(f"Involution1d: {name} has shape {tuple(shape_of(sequence))}, expected (N, C, L) or (C, L)")
    return sequence.unsqueeze(-2)


def _drop_row(image: Tensor) -> Tensor:
    return image.squeeze(-2)


class _CellMean(nn.AvgPool2d):
    """(N, C, H, W) -> mean over cells of ``stride``, (N, C, ceil(H / stride), ceil(W / stride))."""

    stride: tuple[int, int]

    def __init__(self, stride: tuple[int, int]) -> None:
        super().__init__(stride, stride, ceil_mode=True)

    def forward(self, input: Tensor) -> Tensor:
        if not (torch.compiler.is_exporting() and any(isinstance(n, torch.SymInt) for n in input.shape[2:])):
            return super().forward(input)
        return cell_mean(input, self.stride)


def _plus(output: Tensor, bias: Tensor | None) -> Tensor:
    return output if bias is None else output + bias.view(-1, 1, 1)


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


def _source(x: Tensor, guide: Tensor | None, channels: int) -> Tensor:
    """What the kernels for an input (N, C, H, W) are made from, (N, channels, H, W): the guide, or the input."""
    if guide is None:
        if shape_of(x)[1] != channels:
            raise ValueError(f"Involution2d: guide is None, expected a tensor with {channels} channels")
        return x
    if not isinstance(guide, Tensor):
        raise TypeError(f"Involution2d: guide is a {type(guide).__name__}, expected a Tensor or None")
    batch, _, height, width = shape_of(x)
    expected = (batch, channels, height, width)
    batched = guide if guide.dim() == 4 else guide.unsqueeze(0)
    if tuple(shape_of(batched)) != expected:
        raise ValueError(
            f"Involution2d: guide has shape {tuple(shape_of(guide))}, expected {expected} for an input of "
            f"{tuple(shape_of(x))}"
        )
    return batched


def _check_kernels(kernels: Tensor, kernel: tuple[int, int, int], source: Tensor, stride: tuple[int, int]) -> Tensor:
    """What a generator returned for ``source``, as (N, G, Kh, Kw, Ho, Wo); ``kernel`` is G, Kh and Kw."""
    if not isinstance(kernels, Tensor):
        raise TypeError(f"Involution2d: generator returned a {type(kernels).__name__}, expected a Tensor")
    groups, kh, kw = kernel
    pixels = tuple(map(layer_output_size, shape_of(source)[2:], stride))
    shape, got = (*kernel, *pixels), tuple(shape_of(kernels))[1:]
    if got not in (shape, (groups * kh * kw, *pixels)):
        raise ValueError(
            f"Involution2d: generator returned kernels of shape {tuple(shape_of(kernels))}, expected "
            f"(N, {groups * kh * kw}, {pixels[0]}, {pixels[1]}) or {('N', *shape)}".replace("'", "")
        )
    return kernels if kernels.dim() == 6 else kernels.unflatten(1, (groups, kh, kw))


def _nearest_divisors(number: int, value: int) -> str:
    """The divisors of ``number`` next to ``value``, which is none: "the nearest are 16 and 32"."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below, above = [d for d in divisors if d < value], [d for d in divisors if d > value]
    nearest = [*below[-1:], *above[:1]]
    return f"the nearest is {nearest[0]}" if len(nearest) == 1 else f"the nearest are {nearest[0]} and {nearest[1]}"


def _drop_batch(output: Tensor, input: Tensor) -> Tensor:
    return output if input.dim() == 4 else output.squeeze(0)
