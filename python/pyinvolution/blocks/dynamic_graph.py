"""Dynamic graph message passing."""

import torch
from torch import Tensor, nn
from torchvision.ops import DeformConv2d, deform_conv2d

from pyinvolution.blocks._flops import count_deformable_convolutions

__all__ = ["DynamicGraph2d"]


class DynamicGraph2d(nn.Module):
    r"""Every pixel gathers messages from sampled neighbours, with filters and affinities of its own (Zhang et al.,
    "Dynamic Graph Message Passing Networks", CVPR 2020, equations 3 to 7)::

        message_r[c, p] = sum over k of  filter_r[g(c), k, p] * affinity_r[k, p] * x(c, p + r * p_k + walk_r[k, p])
        y               = x + sum over rates r of  gamma_r * message_r

    The nine neighbours of rate r lie on a 3x3 grid of that spacing, each moved by a walk that a 3x3 convolution of x
    predicts; a deformable convolution over the same neighbours predicts filters (softmax over k) and affinities
    (sigmoid). With walks of zero and equal affinities a message is an involution whose kernels are softmaxed.

    Args:
        channels: of input and output.
        groups: channels share a filter within a group; must divide ``channels``.
        rates: spacings of the grids.

    Shape:
        - Input, output: (N, channels, H, W).

    Raises:
        ValueError: ``groups`` does not divide ``channels``.
    """

    def __init__(self, channels: int, groups: int = 4, rates: tuple[int, ...] = (1, 4, 8, 12)) -> None:
        super().__init__()
        if channels % groups:
            raise ValueError(f"groups is {groups}, expected a divisor of channels={channels}")
        self.groups, self.rates = groups, rates
        self.walk = nn.ModuleList(nn.Conv2d(channels, 18, 3, 1, rate, rate) for rate in rates)
        self.filter = nn.ModuleList(
            DeformConv2d(channels, 9 * groups + 9, 3, 1, rate, rate, bias=False) for rate in rates
        )
        self.gamma = nn.Parameter(torch.ones(len(rates)))
        self.register_buffer("sample", torch.ones(channels, 1, 3, 3), persistent=False)
        for parameter in self.walk.parameters():
            nn.init.zeros_(parameter)

    def forward(self, input: Tensor) -> Tensor:
        output = input
        for index in range(len(self.rates)):
            output = output + self.gamma[index] * self.message(input, index)
        return output

    def message(self, input: Tensor, index: int) -> Tensor:
        """The message of rate ``rates[index]``."""
        rate, walk = self.rates[index], self.walk[index](input)
        filters, affinity = self.filter[index](input, walk).split([9 * self.groups, 9], 1)
        filters = filters.unflatten(1, (self.groups, 9)).softmax(2) * affinity.sigmoid().unsqueeze(1)
        return deform_conv2d(
            input,
            walk.repeat(1, self.groups, 1, 1),
            self.sample.to(input.dtype),
            padding=rate,
            dilation=rate,
            mask=filters.flatten(1, 2),
        )


count_deformable_convolutions()
