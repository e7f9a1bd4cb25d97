"""The feature pyramid of detection and segmentation, with convolutions or involutions on its outputs."""

from collections.abc import Sequence
from typing import Literal

from torch import nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from pyinvolution.modules import Involution2d

__all__ = ["FPN", "Neck"]

Neck = Literal["conv", "involution"]


class FPN(FeaturePyramidNetwork):
    """Feature pyramid (Lin et al., CVPR 2017); as in appendix A.2 of the paper, ``neck="involution"`` replaces the 3x3
    convolution on each output by ``Involution2d(out_channels, 7)``.

    Submodules: ``inner_blocks.I.0`` (1x1 convolutions), ``layer_blocks.I`` (``layer_blocks.I.0`` is the convolution),
    ``extra_blocks``.

    Args:
        in_channels: of the levels, fine to coarse.
        out_channels: of every output.
        neck: "conv" or "involution".
        extra_blocks: makes coarser levels, as in torchvision.

    Shape:
        - Input: ordered dict of (N, in_channels[i], H_i, W_i).
        - Output: ordered dict of (N, out_channels, H_i, W_i), and what ``extra_blocks`` adds.

    Raises:
        ValueError: ``neck`` is neither.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        neck: Neck = "conv",
        extra_blocks: ExtraFPNBlock | None = None,
    ) -> None:
        if neck not in ("conv", "involution"):
            raise ValueError(f"neck must be 'conv' or 'involution', got {neck!r}")
        super().__init__(list(in_channels), out_channels, extra_blocks)
        if neck == "involution":
            self.layer_blocks = nn.ModuleList(Involution2d(out_channels, 7) for _ in in_channels)
        # As in the official configurations.
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.xavier_uniform_(conv.weight)
