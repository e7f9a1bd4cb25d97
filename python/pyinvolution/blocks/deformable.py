"""Modulated deformable convolution."""

import torch
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

from pyinvolution.blocks._flops import count_deformable_convolutions

__all__ = ["DeformableConv2d"]


class DeformableConv2d(nn.Module):
    r"""A 3x3 convolution that moves and weighs its taps (Zhu et al., "Deformable ConvNets v2", CVPR 2019, equation 1)::

        y[p] = sum over k of  w[k] * m[k, p] * x(p + p_k + offset[k, p])

    Offsets and modulation m in (0, 1) come from a 3x3 convolution of x, which begins at zero: no offsets and m = 1/2.

    Args:
        channels: of input and output.
        stride: of the window.

    Shape:
        - Input: (N, channels, H, W).
        - Output: (N, channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.offset = nn.Conv2d(channels, 27, 3, stride, 1)
        for parameter in self.offset.parameters():
            nn.init.zeros_(parameter)
        self.conv = DeformConv2d(channels, channels, 3, stride, 1, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        rows_and_columns, modulation = self.offset(input).split([18, 9], 1)
        return self.conv(input, rows_and_columns.contiguous(), torch.sigmoid(modulation))


count_deformable_convolutions()
