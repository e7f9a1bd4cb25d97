"""The blocks by name, each with its place in a ResNet."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

from torch import nn

__all__ = ["BLOCKS", "Block", "create_block", "insert_block"]

Place = Literal["before_last_block", "instead_of_conv2", "after_conv2", "after_conv3"]


@dataclass(frozen=True)
class Block:
    """Where a block goes.

    Attributes:
        title: as in tables.
        source: where it was published.
        module, name: the class, by the module below this package; imported on use, as two need torchvision.
        stage: of a ResNet: 4 is C4 (stride 16), 5 is C5 (stride 32).
        place: once before the last residual block of the stage, or in every residual block of it: instead of the 3x3
            convolution, after its norm and ReLU, or at the end of the branch before the addition.
    """

    title: str
    source: str
    module: str
    name: str
    stage: int
    place: Place

    @property
    def cls(self) -> Callable[..., nn.Module]:
        return getattr(import_module(f"pyinvolution.blocks.{self.module}"), self.name)


BLOCKS = {
    "non_local": Block("NL", "Wang et al., CVPR 2018", "non_local", "NonLocal2d", 4, "before_last_block"),
    "criss_cross": Block("RCCA", "Huang et al., ICCV 2019", "criss_cross", "CrissCross2d", 4, "before_last_block"),
    "global_context": Block("GC @C5", "Cao et al., ICCVW 2019", "global_context", "GlobalContext2d", 5, "after_conv3"),
    "deformable": Block("DCN @C5", "Zhu et al., CVPR 2019", "deformable", "DeformableConv2d", 5, "instead_of_conv2"),
    "dynamic_graph": Block("DGMN @C5", "Zhang et al., CVPR 2020", "dynamic_graph", "DynamicGraph2d", 5, "after_conv2"),
}


def create_block(name: str, channels: int, stride: int = 1) -> nn.Module:
    """Build the block ``name`` of `BLOCKS` for ``channels`` channels.

    Raises:
        ValueError: there is no such block, or ``stride`` is not 1 and the block keeps the size.
    """
    block = _find(name)
    if block.place == "instead_of_conv2":
        return block.cls(channels, stride=stride)
    if stride != 1:
        raise ValueError(f"stride is {stride}, expected 1 for the block {name!r}, which keeps the size")
    return block.cls(channels)


def insert_block(resnet: nn.Module, name: str) -> nn.Module:
    """Put the block ``name`` into ``resnet``, in place, where its authors do (`Block.stage`, `Block.place`).

    Args:
        resnet: of bottleneck blocks, with the attributes of torchvision's (``layer3``, ``layer4``; ``conv2``,
            ``conv3``, ``bn3``).

    Raises:
        ValueError: there is no such block.
    """
    block = _find(name)
    layer = f"layer{block.stage - 1}"
    stage = getattr(resnet, layer)
    if block.place == "before_last_block":
        *first, last = stage
        setattr(resnet, layer, nn.Sequential(*first, create_block(name, last.conv1.in_channels), last))
        return resnet
    for bottleneck in stage:
        if block.place == "instead_of_conv2":
            (stride, _) = bottleneck.conv2.stride
            bottleneck.conv2 = create_block(name, bottleneck.conv2.in_channels, stride)
        elif block.place == "after_conv2":
            bottleneck.conv3 = nn.Sequential(create_block(name, bottleneck.conv3.in_channels), bottleneck.conv3)
        else:
            bottleneck.bn3 = nn.Sequential(bottleneck.bn3, create_block(name, bottleneck.conv3.out_channels))
    return resnet


def _find(name: str) -> Block:
    if name not in BLOCKS:
        raise ValueError(f"block is {name!r}, expected one of {', '.join(BLOCKS)}")
    return BLOCKS[name]
