"""The FLOP formula of torchvision's deformable convolution, which has none."""

from collections.abc import Sequence

import torch
import torchvision  # noqa: F401  defines the operator
from torch.utils.flop_counter import flop_registry, register_flop_formula

__all__ = ["count_deformable_convolutions"]


def count_deformable_convolutions() -> None:
    """Let `torch.utils.flop_counter.FlopCounterMode` count ``torchvision::deform_conv2d``."""
    if torch.ops.torchvision.deform_conv2d not in flop_registry:
        register_flop_formula(torch.ops.torchvision.deform_conv2d)(_flops)


def _flops(input_shape: Sequence[int], weight_shape: Sequence[int], offset_shape: Sequence[int], *_, **__) -> int:
    """As of the convolution; the interpolation between pixels is not counted."""
    outputs, *taps = weight_shape
    rows, columns = offset_shape[2:]
    return 2 * input_shape[0] * outputs * taps[0] * taps[1] * taps[2] * rows * columns
