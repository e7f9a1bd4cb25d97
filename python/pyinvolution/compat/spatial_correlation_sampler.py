"""Stands in for ``spatial_correlation_sampler``, for mmcv's ``Correlation`` and for the file of pytorch-pwc.

All three compare each position of one image with a patch of displacements around it in another: FlowNetC (Dosovitskiy
et al., ICCV 2015, arXiv 1504.06852) and PWC-Net (Sun et al., CVPR 2018, arXiv 1709.02371). They are
`pyinvolution.local_correlation2d`, on a CPU and a GPU, differentiable twice and more. Sources:
https://github.com/ClementPinard/Pytorch-Correlation-extension, https://github.com/open-mmlab/mmcv,
https://github.com/sniklaus/pytorch-pwc.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pyinvolution.compat._arguments import integer, pair, require_shape, require_tensors
from pyinvolution.functional import local_correlation2d

__all__ = [
    "Correlation",
    "FunctionCorrelation",
    "ModuleCorrelation",
    "SpatialCorrelationSampler",
    "spatial_correlation_sample",
]

Size = int | Sequence[int]

# Opaque to torch.fx, which cannot follow their branches.
torch.fx.wrap("_sample")
torch.fx.wrap("_cost_volume")


def spatial_correlation_sample(
    input1: Tensor,
    input2: Tensor,
    kernel_size: Size = 1,
    patch_size: Size = 1,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    dilation_patch: Size = 1,
) -> Tensor:
    r"""Correlates each window of ``input1`` with the displaced windows of ``input2``.

    .. math::
        Y_{n,u,v,p} = \sum_c \sum_k A_{n,c,\,s p + d k - P} \,
            B_{n,c,\,s p + d k - P + e ((u, v) - \lfloor (D - 1) / 2 \rfloor)}

    with A, B zero outside their borders, kernel size K (:math:`k < K`), patch size D, stride s, padding P, dilation d
    and patch dilation e. Not divided by the number of products.

    Args:
        input1: A, (N, C, H, W); float32, float64, float16 or bfloat16; any strides.
        input2: B, of the same shape.
        kernel_size, patch_size, stride, padding, dilation, dilation_patch: int or (vertical, horizontal).

    Returns:
        (N, D, D, Ho, Wo) with Ho = floor((H + 2 P - d (K - 1) - 1) / s) + 1, and Wo alike.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    sizes = (kernel_size, patch_size, stride, padding, dilation, dilation_patch)
    return _sample("spatial_correlation_sample", input1, input2, sizes)


SIZES = ("kernel_size", "patch_size", "stride", "padding", "dilation", "dilation_patch")


def _sample(op: str, input1: Tensor, input2: Tensor, sizes: Sequence[Size]) -> Tensor:
    require_tensors(op, "(N, C, H, W)", input1=input1, input2=input2)
    require_shape(op, "input2", input2, input1.shape)
    pairs = [pair(op, name, size, int(name != "padding")) for name, size in zip(SIZES, sizes, strict=True)]
    kernel, patch, step, edge, inner, spacing = pairs
    for side, size, k, d, p in zip(("height", "width"), input1.shape[2:], kernel, inner, edge, strict=True):
        if size + 2 * p < d * (k - 1) + 1:
            expected = f"a window of at most the padded {side} {size + 2 * p}"
            raise ValueError(f"{op}: kernel_size is {kernel} and dilation {inner}, expected {expected}")
    query = pad(input1, [edge[1], edge[1], edge[0], edge[0]]) if any(edge) else input1
    # A patch of an even size has one displacement more after the position than before it.
    more = [(1 - size % 2) * e for size, e in zip(patch, spacing, strict=True)]
    key = pad(input2, [0, more[1], 0, more[0]]) if any(more) else input2
    before = (edge[0] + (patch[0] - 1) // 2 * spacing[0], edge[1] + (patch[1] - 1) // 2 * spacing[1])
    if kernel == (1, 1):
        query = query[..., :: step[0], :: step[1]]
        return local_correlation2d(query, key, patch, step, before, spacing).squeeze(1)
    costs = local_correlation2d(query, key, patch, 1, before, spacing).squeeze(1)
    for axis in (0, 1):
        costs = _box_sum(costs, axis - 2, kernel[axis], step[axis], inner[axis])
    return costs


def _box_sum(costs: Tensor, axis: int, size: int, stride: int, dilation: int) -> Tensor:
    """The sums of ``size`` entries of an axis, ``dilation`` apart, at every ``stride``-th start."""
    reach = costs.shape[axis] - dilation * (size - 1)
    taps = [costs.narrow(axis, dilation * k, reach) for k in range(size)]
    every = (slice(None),) * (costs.dim() + axis) + (slice(None, None, stride),)
    return sum((tap[every] for tap in taps[1:]), taps[0][every])


class SpatialCorrelationSampler(nn.Module):
    """`spatial_correlation_sample` with fixed sizes, as a module without parameters."""

    def __init__(
        self,
        kernel_size: Size = 1,
        patch_size: Size = 1,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        dilation_patch: Size = 1,
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.patch_size = patch_size
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.dilation_patch = dilation_patch

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        return _sample(type(self).__name__, input1, input2, [getattr(self, name) for name in SIZES])

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)}" for name in SIZES)


class Correlation(SpatialCorrelationSampler):
    """mmcv's ``mmcv.ops.Correlation``: `spatial_correlation_sample` with a patch of ``2 * max_displacement + 1``.

    Args:
        max_displacement: the furthest displacement, in steps of ``dilation_patch``.
        kernel_size, stride, padding, dilation, dilation_patch: as in `spatial_correlation_sample`.
    """

    def __init__(
        self,
        kernel_size: int = 1,
        max_displacement: int = 1,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        dilation_patch: int = 1,
    ) -> None:
        displacement = integer("Correlation", "max_displacement", max_displacement, minimum=0)
        super().__init__(kernel_size, 2 * displacement + 1, stride, padding, dilation, dilation_patch)
        self.max_displacement = displacement

    def extra_repr(self) -> str:
        names = (name.replace("patch_size", "max_displacement") for name in SIZES)
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


def FunctionCorrelation(tenOne: Tensor, tenTwo: Tensor) -> Tensor:
    """pytorch-pwc's cost volume: the mean over the channels of the products at the 9 x 9 displacements up to 4.

    Args:
        tenOne: (N, C, H, W).
        tenTwo: of the same shape.

    Returns:
        (N, 81, H, W), the horizontal displacement fastest.
    """
    return _cost_volume("FunctionCorrelation", tenOne, tenTwo)


def _cost_volume(op: str, tenOne: Tensor, tenTwo: Tensor) -> Tensor:
    require_tensors(op, "(N, C, H, W)", tenOne=tenOne, tenTwo=tenTwo)
    require_shape(op, "tenTwo", tenTwo, tenOne.shape)
    volume = local_correlation2d(tenOne, tenTwo, 9, padding=4)
    return volume.flatten(1, 3) / tenOne.shape[1]


class ModuleCorrelation(nn.Module):
    """`FunctionCorrelation` as a module."""

    def forward(self, tenOne: Tensor, tenTwo: Tensor) -> Tensor:
        return _cost_volume("ModuleCorrelation", tenOne, tenTwo)
