"""Mask R-CNN on ResNet-50, plain or with one of the blocks that involution is compared with (Table 1)."""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.detection import MaskRCNN

from pyinvolution.blocks import insert_block
from pyinvolution.models._registry import register_model
from pyinvolution.models.detection import mask_rcnn
from pyinvolution.models.rednet import Stage, fix_stages
from pyinvolution.modules import check_input

__all__ = ["ResNetFeatures", "mask_rcnn_resnet50"]

torch.fx.wrap("check_input")


class ResNetFeatures(nn.Module):
    """Stages of torchvision's ResNet-50, trained as the official configurations train a RedNet.

    Submodules: ``stem``, ``layer1`` to ``layer4``.

    Args:
        block: name in `pyinvolution.blocks.BLOCKS`, or None for none.
        frozen_stages: -1 for none, k to freeze the stem and stages 1 to k.
        norm_eval: batch norms keep their running statistics in training.

    Shape:
        - Input: (N, 3, H, W).
        - Output of ``features``: maps of the four stages, with 256, 512, 1024 and 2048 channels at strides 4 to 32.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, block: str | None = None, frozen_stages: int = 1, norm_eval: bool = True) -> None:
        super().__init__()
        net = resnet50()
        if block is not None:
            insert_block(net, block)
        self.stem = Stage(net.conv1, net.bn1, net.relu, net.maxpool)
        self.layer1, self.layer2 = Stage(*net.layer1), Stage(*net.layer2)
        self.layer3, self.layer4 = Stage(*net.layer3), Stage(*net.layer4)
        self.feature_info = [{"num_chs": 64, "reduction": 2, "module": "stem"}] + [
            {"num_chs": 256 << index, "reduction": 4 << index, "module": f"layer{index + 1}"} for index in range(4)
        ]
        fix_stages([self.stem, self.layer1, self.layer2, self.layer3, self.layer4], frozen_stages, norm_eval)
        self.train()

    def features(self, input: Tensor) -> list[Tensor]:
        maps = [self.stem(check_input(input, 3, "ResNetFeatures"))]
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            maps.append(stage(maps[-1]))
        return maps[1:]


@register_model
def mask_rcnn_resnet50(
    block: str | None = None, *, frozen_stages: int = 1, norm_eval: bool = True, **kwargs: Any
) -> MaskRCNN:
    """Mask R-CNN, ResNet-50-FPN: the baseline of the paper, and with ``block`` its peers.

    Args:
        block: None, "non_local", "criss_cross", "global_context", "deformable" or "dynamic_graph"; see
            `pyinvolution.blocks.BLOCKS` for sources and places.
        frozen_stages, norm_eval: of `ResNetFeatures`.
        kwargs: of `pyinvolution.models.detection.mask_rcnn`, e.g. ``num_classes``, ``neck``.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    return mask_rcnn(ResNetFeatures(block, frozen_stages, norm_eval), **kwargs)
