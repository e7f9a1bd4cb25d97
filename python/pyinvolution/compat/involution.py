"""Stands in for the authors' CuPy file, ``involution_cuda.py``: the same names, arguments, shapes and state-dict keys.

Where their code says ``from mmcls.models.utils.involution_cuda import involution``, say
``from pyinvolution.compat.involution import involution``. It needs neither CuPy nor mmcv, runs on a CPU as well, and
takes float16 and bfloat16. Source: https://github.com/d-li14/involution.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from pyinvolution.functional import involution2d, span_involution2d
from pyinvolution.modules import check_input, init_conv, positive_int
from pyinvolution.ops import Pair
from pyinvolution.stock import is_pointwise, is_stock

__all__ = ["_involution_cuda", "involution"]

# Opaque to torch.fx, which cannot follow their branches.
torch.fx.wrap("check_input")
torch.fx.wrap("involution2d")
torch.fx.wrap("span_involution2d")


def _involution_cuda(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
) -> Tensor:
    """`pyinvolution.functional.involution2d` under the name and with the arguments of the authors' function.

    Channel c belongs to group ``c // (C // G)``. The result is theirs wherever theirs is defined: their function reads
    other memory if ``weight`` does not have the size of the output (e.g. without padding), this one raises an error.

    Args:
        input: (N, C, H, W); float32, float64, float16 or bfloat16.
        weight: (N, G, K, K, Ho, Wo), the kernel of every output pixel and group; input's dtype and device.
        bias: C values in any shape, e.g. (C,) or (1, C, 1, 1), added to every pixel; or None.
        stride, padding, dilation: int or (vertical, horizontal).

    Returns:
        (N, C, Ho, Wo) with Ho = floor((H + 2 padding - dilation (K - 1) - 1) / stride) + 1, and Wo alike.

    Raises:
        TypeError, ValueError: as `pyinvolution.functional.involution2d` does.
    """
    if isinstance(bias, Tensor):
        bias = bias.reshape(-1)
    return involution2d(input, weight, bias, stride, padding, dilation)


class involution(nn.Module):
    """The authors' layer: 16 channels per group, a reduction of 4, their submodules and state-dict keys.

    ``conv1.conv.weight``, ``conv1.bn.*``, ``conv2.conv.weight`` and ``conv2.conv.bias`` are the keys, so that their
    checkpoints load strictly. It computes what `pyinvolution.Involution2d` with the same values does, fused where the
    library has a kernel for it, unless ``conv2`` was replaced or has hooks: then it is called, and returns the kernels,
    (N, G * K * K, Ho, Wo). Source: Li et al., CVPR 2021, section 3; https://github.com/d-li14/involution.

    If ``channels`` is not a multiple of 16, there are ``channels // 16`` larger groups, as in their CUDA kernel.
    Where the size is not a multiple of the stride and the window is odd, their kernel reads other memory; here, the
    rows and columns that remain are averaged by themselves. The result is theirs wherever theirs is defined.

    Args:
        channels: channels C of input and output, at least 16 and a multiple of ``channels // 16``.
        kernel_size: window K; odd if ``stride`` is 1, since there are not as many outputs as kernels otherwise.
        stride: of the window, which is padded by ``(K - 1) // 2``.

    Shape:
        - Input: (N, C, H, W), floating point.
        - Output: (N, C, ceil(H / stride), ceil(W / stride)); with an even window, the sizes are rounded down.

    Raises:
        TypeError: an argument is not an int, or the input is not a floating-point tensor.
        ValueError: an argument is out of range, or the input has another rank or number of channels, or a size for
            which an even window has more outputs than kernels.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.kernel_size = positive_int("kernel_size", kernel_size)
        self.stride = positive_int("stride", stride)
        self.channels = positive_int("channels", channels, minimum=16)
        self.group_channels = 16
        self.groups = channels // self.group_channels
        if kernel_size % 2 == 0 and stride == 1:
            raise ValueError(f"kernel_size is {kernel_size}, expected an odd number with stride 1")
        if channels % self.groups:
            raise ValueError(f"channels is {channels}, expected a multiple of channels // 16, here {self.groups}")
        reduced = channels // 4
        reduce = nn.Conv2d(channels, reduced, 1, bias=False)
        span = nn.Conv2d(reduced, kernel_size**2 * self.groups, 1)
        for conv in (reduce, span):
            init_conv(conv)
        layers = OrderedDict(conv=reduce, bn=nn.BatchNorm2d(reduced), activate=nn.ReLU(inplace=True))
        self.conv1 = nn.Sequential(layers)
        self.conv2 = nn.Sequential(OrderedDict(conv=span))
        if stride > 1:
            # As many cells as the padded window has positions.
            self.avgpool = nn.AvgPool2d(stride, stride, ceil_mode=kernel_size % 2 == 1)

    def forward(self, x: Tensor) -> Tensor:
        x = check_input(x, self.channels, "involution")
        reduced = self.conv1(x if self.stride == 1 else self.avgpool(x))
        window = (self.stride, (self.kernel_size - 1) // 2)
        if is_stock(self.conv2, nn.Sequential) and len(self.conv2) == 1 and is_pointwise(self.conv2[0]):
            span: Any = self.conv2[0]
            return span_involution2d(x, reduced, span.weight, span.bias, self.kernel_size, *window)
        weight = self.conv2(reduced).unflatten(1, (self.groups, self.kernel_size, self.kernel_size))
        return involution2d(x, weight, None, *window)
