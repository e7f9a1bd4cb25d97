"""The feature pyramid of detection and segmentation, with convolutions or involutions on its outputs."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelP6P7

from pyinvolution.modules import Involution2d

__all__ = ["FPN", "ExtraLevels", "FPNBackbone", "Neck"]

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
            raise ValueError(f"neck is {neck!r}, expected 'conv' or 'involution'")
        super().__init__(list(in_channels), out_channels, extra_blocks)
        if neck == "involution":
            self.layer_blocks = nn.ModuleList(Involution2d(out_channels, 7) for _ in in_channels)
        # As in the official configurations.
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.xavier_uniform_(conv.weight)


class ExtraLevels(LastLevelP6P7):
    """RetinaNet's two levels beyond the last of the backbone: 3x3 convolutions of stride 2, the first on the backbone's
    own map, without the ReLU between them that torchvision has, as in the official configurations.

    Submodules: ``p6``, ``p7``.
    """

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        p6 = self.p6(c[-1])
        return [*p, p6, self.p7(p6)], [*names, "p6", "p7"]


class FPNBackbone(nn.Module):
    """A classification network's stages under an `FPN`, as torchvision's detectors want it.

    Submodules: ``body`` and ``fpn``.

    Args:
        body: has ``features(images)``, the maps of all stages, and ``feature_info``, e.g. `RedNet`.
        levels: stages that go into the pyramid, from 0.
        out_channels, neck: as of `FPN`.
        extra_blocks: called with the channels of the last level and ``out_channels``; see `FPN`.

    Attributes:
        strides: of the ``levels``.

    Shape:
        - Input: (N, 3, H, W).
        - Output: ordered dict of (N, out_channels, H / stride, W / stride): the ``levels`` under their numbers as
          strings, and what ``extra_blocks`` adds.

    Raises:
        ValueError: ``levels`` are not of the body, or ``neck`` is neither kind.
    """

    def __init__(
        self,
        body: nn.Module,
        levels: Sequence[int],
        out_channels: int = 256,
        neck: Neck = "conv",
        extra_blocks: Callable[[int, int], ExtraFPNBlock] | None = None,
    ) -> None:
        super().__init__()
        stages = [info for info in body.feature_info if info["module"] != "stem"]  # type: ignore[union-attr]
        if not levels or not all(0 <= level < len(stages) for level in levels):
            raise ValueError(f"levels is {levels!r}, expected stages from 0 to {len(stages) - 1}")
        channels = [stages[level]["num_chs"] for level in levels]
        self.body, self.levels, self.out_channels = body, list(levels), out_channels
        self.strides: list[int] = [stages[level]["reduction"] for level in levels]
        self.fpn = FPN(channels, out_channels, neck, extra_blocks and extra_blocks(channels[-1], out_channels))

    def forward(self, input: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.body.features(input)  # type: ignore[operator]
        return self.fpn(OrderedDict((str(level), maps[level]) for level in self.levels))
