"""Mask R-CNN on ResNet-50, plain or with one of the blocks that involution is compared with (Table 1)."""

from typing import Any

from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.detection import MaskRCNN

from pyinvolution.blocks import insert_block
from pyinvolution.models._registry import register_model
from pyinvolution.models.detection import mask_rcnn
from pyinvolution.modules import check_input, positive_int

__all__ = ["ResNetFeatures", "mask_rcnn_resnet50"]


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
        if positive_int("frozen_stages", frozen_stages, -1) > 4:
            raise ValueError(f"frozen_stages must be at most the number of stages, 4, got {frozen_stages}")
        net = resnet50()
        if block is not None:
            insert_block(net, block)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        self.feature_info = [{"num_chs": 64, "reduction": 2, "module": "stem"}] + [
            {"num_chs": 256 << index, "reduction": 4 << index, "module": f"layer{index + 1}"} for index in range(4)
        ]
        self.norm_eval = norm_eval
        # Not a ModuleList: the parts are registered under their names already.
        names = ["stem", "layer1", "layer2", "layer3", "layer4"]
        self.frozen = tuple(getattr(self, name) for name in names[: frozen_stages + 1])
        for part in self.frozen:
            part.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "ResNetFeatures":
        super().train(mode)
        for part in self.frozen:
            part.eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

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
