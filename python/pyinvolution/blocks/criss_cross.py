"""Recurrent criss-cross attention."""

import torch
from torch import Tensor, nn

__all__ = ["CrissCross2d"]


class CrissCross2d(nn.Module):
    r"""Every pixel attends to its row and column, twice (Huang et al., "CCNet", ICCV 2019, equations 1 and 2)::

        y[p] = sum over q in the cross of p of  softmax over q of (query(x[p]) . key(x[q]))  *  value(x[q])
        x   <- x + gamma * y

    The cross has the H + W - 1 pixels of the row and column of p. ``recurrence`` steps with the same weights carry
    information from every pixel to every other one. gamma begins at zero.

    Args:
        channels: of input and output.
        recurrence: steps.

    Shape:
        - Input, output: (N, channels, H, W).
    """

    def __init__(self, channels: int, recurrence: int = 2) -> None:
        super().__init__()
        inner = channels // 8
        self.query, self.key = nn.Conv2d(channels, inner, 1), nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(()))
        self.recurrence = recurrence

    def forward(self, input: Tensor) -> Tensor:
        for _ in range(self.recurrence):
            input = input + self.gamma * self.attend(input)
        return input

    def attend(self, input: Tensor) -> Tensor:
        """One step: y of the equation."""
        height, width = input.shape[2:]
        query, key, value = self.query(input), self.key(input), self.value(input)
        column = torch.einsum("nchw,ncjw->nhwj", query, key)
        row = torch.einsum("nchw,nchj->nhwj", query, key)
        # The pixel itself is in both; it counts in the row.
        itself = torch.eye(height, dtype=torch.bool, device=input.device)[:, None]
        energy = torch.cat([column.masked_fill(itself, -torch.inf), row], 3)
        column, row = energy.softmax(3).split([height, width], 3)
        return torch.einsum("nhwj,ncjw->nchw", column, value) + torch.einsum("nhwj,nchj->nchw", row, value)
