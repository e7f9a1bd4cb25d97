"""Involution problems of every kind, shared by tests and benchmarks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyinvolution import reference
from pyinvolution.ops import output_size


@dataclass(frozen=True)
class Case:
    """Sizes of a problem; ``input`` is N, C, H, W, and ``reduced`` the channels R that a span computes kernels from."""

    input: tuple[int, int, int, int]
    groups: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    reduced: int = 0
    border: str = "zeros"
    upsample: tuple[int, int] = (1, 1)

    @property
    def group_channels(self) -> int:
        return self.input[1] // self.groups

    @property
    def geometry(self) -> tuple[tuple[int, int], ...]:
        return self.stride, self.padding, self.dilation

    @property
    def output(self) -> tuple[int, int]:
        return tuple(
            output_size(size, k, s, p, d, reference.BORDERS.index(self.border), u)
            for size, k, s, p, d, u in zip(self.input[2:], self.kernel, *self.geometry, self.upsample, strict=True)
        )

    @property
    def options(self) -> dict[str, Any]:
        """Of the public functions, besides the geometry."""
        return {"border": self.border, "upsample": self.upsample}

    @property
    def trailing(self) -> tuple[int, tuple[int, int]]:
        """The same as the last arguments of the operators."""
        return reference.BORDERS.index(self.border), self.upsample

    @property
    def weight(self) -> tuple[int, ...]:
        return (self.input[0], self.groups, *self.kernel, *self.output)

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.input)), f"g{self.groups}", "k" + "x".join(map(str, self.kernel))]
        parts += [f"{n}{'x'.join(map(str, v))}" for n, v in zip("spd", self.geometry, strict=True)]
        parts += [f"r{self.reduced}"] if self.reduced else []
        parts += [self.border] if self.border != "zeros" else []
        parts += [f"u{'x'.join(map(str, self.upsample))}"] if self.upsample != (1, 1) else []
        return "-".join(parts)


def same(channels: int, size: int, kernel: int, stride: int = 1, batch: int = 1, group_channels: int = 16) -> Case:
    """An involution of RedNet: padding keeps ceil(size / stride) pixels."""
    return Case(
        (batch, channels, size, size),
        channels // group_channels,
        (kernel, kernel),
        (stride, stride),
        (kernel // 2,) * 2,
    )


# RedNet-50 at 224 x 224: the stem and each stage's layers.
REDNET50 = {
    "stem 32@112 K3": same(32, 112, 3),
    "64@56": same(64, 56, 7),
    "128@56 s2": same(128, 56, 7, 2),
    "128@28": same(128, 28, 7),
    "256@28 s2": same(256, 28, 7, 2),
    "256@14": same(256, 14, 7),
    "512@14 s2": same(512, 14, 7, 2),
    "512@7": same(512, 7, 7),
}

# One small problem for each class of parameters.
CASES = [
    Case((2, 32, 9, 11), 2, (7, 7), padding=(3, 3)),
    Case((2, 32, 9, 11), 2, (7, 7), (2, 2), (3, 3)),
    Case((1, 16, 8, 8), 1, (1, 1), padding=(0, 0)),
    Case((2, 6, 7, 9), 2, (3, 3)),
    Case((2, 6, 7, 9), 6, (3, 3)),
    Case((2, 6, 7, 9), 1, (5, 5), padding=(2, 2)),
    Case((1, 4, 10, 6), 2, (2, 4), padding=(0, 1)),
    Case((1, 4, 10, 12), 4, (3, 5), (2, 1), (0, 3)),
    Case((1, 8, 11, 13), 2, (3, 3), (3, 2), (2, 1), (2, 3)),
    Case((1, 8, 12, 12), 1, (3, 3), (2, 2), (4, 4), (4, 4)),
    Case((1, 3, 6, 40), 1, (3, 3), (1, 5), (1, 0), (1, 2)),
    Case((1, 40, 5, 5), 1, (3, 3)),
    Case((1, 2, 5, 7), 2, (5, 7), padding=(6, 6)),
    Case((1, 2, 3, 3), 1, (3, 3), (7, 9), (30, 30), (25, 25)),
    Case((1, 64, 14, 14), 4, (7, 7), padding=(3, 3)),
    Case((3, 1, 1, 1), 1, (3, 3)),
]


def shifted(
    input: tuple[int, int, int, int], groups: int, kernel: tuple[int, int], stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1), upsample: tuple[int, int] = (1, 1),
) -> Case:  # fmt: skip
    """Windows that the border moves inside."""
    return Case(input, groups, kernel, stride, (0, 0), dilation, border="shift", upsample=upsample)


SHIFTED_CASES = [
    shifted((2, 32, 9, 11), 2, (7, 7)),
    shifted((1, 6, 7, 12), 2, (7, 3)),  # one window high
    shifted((1, 16, 8, 10), 1, (4, 2)),  # even
    shifted((1, 16, 13, 11), 2, (3, 3), dilation=(4, 2)),  # no multiples of the dilation
    shifted((1, 8, 24, 9), 1, (3, 3), dilation=(8, 3)),  # one window in each residue class
    shifted((2, 3, 10, 9), 1, (3, 3), (3, 2), (2, 1)),
    shifted((1, 16, 6, 7), 1, (3, 3), dilation=(2, 1), upsample=(2, 3)),
]

UPSAMPLED_CASES = [
    Case((2, 32, 5, 6), 2, (5, 5), padding=(2, 2), upsample=(2, 2)),
    Case((1, 3, 4, 5), 1, (3, 3), padding=(1, 1), upsample=(8, 8)),
    Case((1, 16, 6, 7), 2, (3, 2), padding=(0, 1), dilation=(1, 2), upsample=(1, 3)),
    Case((1, 24, 7, 5), 3, (3, 3), (2, 1), (1, 1), upsample=(1, 4)),
]

SPAN_CASES = [
    Case((2, 32, 9, 11), 2, (7, 7), padding=(3, 3), reduced=8),
    Case((1, 32, 10, 9), 2, (7, 7), (2, 2), (3, 3), reduced=5),
    Case((2, 16, 7, 9), 1, (3, 3), reduced=4),
    Case((1, 16, 13, 6), 1, (5, 5), (2, 1), (2, 2), reduced=16),
    Case((1, 24, 6, 5), 2, (2, 4), padding=(0, 1), reduced=3),
    Case((1, 40, 9, 9), 1, (3, 3), (1, 2), (2, 3), (2, 3), reduced=1),
    Case((1, 16, 5, 130), 1, (1, 3), padding=(0, 1), reduced=20),
    Case((1, 16, 3, 260), 1, (3, 7), (1, 2), (1, 3), reduced=2),
    Case((1, 8, 4, 4), 1, (9, 9), padding=(4, 4), reduced=2),
    Case((1, 64, 14, 14), 4, (7, 7), padding=(3, 3), reduced=16),
    Case((1, 128, 7, 7), 8, (7, 7), padding=(3, 3), reduced=32),
    Case((1, 16, 3, 3), 1, (3, 3), (7, 9), (30, 30), (25, 25), reduced=4),
    Case((3, 32, 37, 29), 2, (3, 3), reduced=8),
    Case((1, 6, 7, 9), 2, (3, 3), reduced=2),
    Case((2, 80, 19, 22), 5, (7, 7), padding=(3, 3), reduced=32),
    Case((2, 80, 19, 22), 5, (7, 7), (2, 2), (3, 3), reduced=16),
    Case((1, 64, 12, 17), 4, (7, 7), padding=(3, 3), reduced=80),
]


def layer(
    input: tuple[int, int, int, int], groups: int, kernel: tuple[int, int], stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1), reduced: int = 0,
) -> Case:  # fmt: skip
    """A whole layer, whose padding gives ceil(size / stride) pixels, with one more at the end for an odd reach."""
    padding = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    return Case(input, groups, kernel, stride, padding, dilation, reduced)


LAYER_CASES = [
    layer((2, 32, 9, 11), 2, (7, 7), reduced=8),
    layer((1, 32, 10, 9), 2, (7, 7), (2, 2), reduced=5),
    layer((2, 16, 13, 6), 1, (3, 5), (2, 3), reduced=4),
    layer((1, 24, 6, 5), 2, (2, 4), reduced=3),
    layer((1, 40, 9, 9), 1, (4, 3), (3, 1), (1, 2), reduced=19),
    layer((1, 16, 3, 130), 1, (1, 3), reduced=20),
    layer((1, 128, 14, 15), 8, (3, 3), (2, 2), reduced=33),
    layer((3, 6, 7, 9), 2, (3, 3), reduced=2),
    layer((1, 64, 37, 29), 4, (3, 3), reduced=16),
]

EMPTY_CASES = [
    Case((0, 16, 8, 8), 1),
    Case((2, 0, 8, 8), 1),
    Case((2, 4, 0, 8), 2, padding=(1, 1)),
    Case((2, 4, 2, 8), 2, (5, 5), padding=(0, 2)),
    Case((2, 4, 0, 0), 2, padding=(2, 2)),
]

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

LAYOUTS = ("contiguous", "channels_last", "strided", "expanded")


def random_like(shape: tuple[int, ...], dtype: torch.dtype, device: str, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(device, dtype)


def in_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same values (for "expanded", those of the first channel or tap) with other strides."""
    match layout:
        case "contiguous":
            return tensor.contiguous()
        case "channels_last":
            # Channels (for weights: groups and taps) are the innermost dimensions.
            inner = range(1, tensor.dim() - 2)
            order = (0, tensor.dim() - 2, tensor.dim() - 1, *inner)
            return tensor.permute(order).contiguous().permute([order.index(d) for d in range(tensor.dim())])
        case "strided":
            padded = torch.full(
                [2 * s + 1 for s in tensor.shape], float("nan"), dtype=tensor.dtype, device=tensor.device
            )
            view = padded[tuple(slice(1, None, 2) for _ in tensor.shape)]
            return view.copy_(tensor)
        case "expanded":
            return tensor[:, :1].expand_as(tensor)
    raise ValueError(layout)


def tensors(
    case: Case, dtype: torch.dtype, layout: str = "contiguous", device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and grad_output of a case."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (case.input, case.weight, (*case.input[:2], *case.output))
    return tuple(in_layout(random_like(shape, dtype, device, generator), layout) for shape in shapes)


def with_gradients(function: Callable[..., Tensor], given: Sequence[Tensor], work: torch.dtype) -> list[Tensor]:
    """A function's value and its gradients, computed in the dtype ``work``; the last of ``given`` is grad_output."""
    *leaves, grad_output = (t.detach().to(work).clone() for t in given)
    output = function(*(t.requires_grad_() for t in leaves))
    return [t.detach() for t in (output, *torch.autograd.grad(output, leaves, grad_output))]


def reference_passes(case: Case, input: Tensor, weight: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, grad_input and grad_weight by the reference, in the tensors' dtype; 16-bit ones through float32 sums."""
    dtype = input.dtype
    results = with_gradients(
        lambda x, w: reference.involution2d(x, w, None, *case.geometry), (input, weight, grad_output),
        torch.float32 if dtype.itemsize == 2 else dtype,
    )  # fmt: skip
    return tuple(t.to(dtype) for t in results)


def oracle_passes(case: Case, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same in float64."""
    return reference_passes(case, *(t.double() for t in inputs))
