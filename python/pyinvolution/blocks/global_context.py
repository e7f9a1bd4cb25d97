"""Global context block."""

import torch
from torch import Tensor, nn

__all__ = ["GlobalContext2d"]


class GlobalContext2d(nn.Module):
    r"""The same context for every pixel (Cao et al., "GCNet", ICCV workshop 2019, equation 4)::

        context = sum over q of  softmax over q of attention(x[q])  *  x[q]
        z[p]    = x[p] + expand(relu(norm(squeeze(context))))

    ``expand`` begins at zero.

    Args:
        channels: of input and output.
        ratio: of the bottleneck between squeeze and expand.

    Shape:
        - Input, output: (N, channels, H, W).
    """

    def __init__(self, channels: int, ratio: int = 16) -> None:
        super().__init__()
        inner = max(channels // ratio, 1)
        self.attention = nn.Conv2d(channels, 1, 1)
        squeeze, expand = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)
        self.transform = nn.Sequential(squeeze, nn.LayerNorm([inner, 1, 1]), nn.ReLU(inplace=True), expand)
        for parameter in expand.parameters():
            nn.init.zeros_(parameter)

    def forward(self, input: Tensor) -> Tensor:
        weights = self.attention(input).flatten(2).softmax(2)
        context = torch.einsum("ncp,nop->nc", input.flatten(2), weights)
        return input + self.transform(context[:, :, None, None])
