"""Residual networks with an operator of its own in every block: convolution or an involution of some size."""

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyinvolution.models._registry import register_model
from pyinvolution.models.rednet import Bottleneck, NormLayer, Stage
from pyinvolution.modules import Involution2d, check_input, init_conv, positive_int
from pyinvolution.normalization import conv_norm

__all__ = ["SearchableNet", "parse_operator", "searchable"]

torch.fx.wrap("check_input")
_INVOLUTION = re.compile(r"inv([1-9]\d*)x([1-9]\d*)")
_STAGE = {"channels", "width", "stride", "operators"}


def parse_operator(name: str) -> tuple[int, int] | None:
    """Kernel size and channels of a group of the involution ``"inv7x16"``; None for ``"conv3"``.

    Raises:
        ValueError: ``name`` is neither.
    """
    if name == "conv3":
        return None
    match = _INVOLUTION.fullmatch(str(name))
    if match is None:
        raise ValueError(f"operator is {name!r}, expected 'conv3' or e.g. 'inv7x16' (7 x 7, 16 channels a group)")
    return int(match[1]), int(match[2])


class SearchableNet(nn.Module):
    """ResNet of bottleneck blocks (1x1 convolution, operator, 1x1 convolution), each with a given operator.

    With ``conv3`` in every block it is a ResNet, with ``inv7x16`` in every block a RedNet, both with a stem of one
    convolution. Children: ``stem`` (``conv, norm, act``), ``pool``, ``layer1`` to ``layerN`` (a `Stage` of
    `Bottleneck` each, whose ``involution`` is the operator), ``global_pool``, ``head_drop`` and ``head``.

    Args:
        stages: for each stage ``{"channels": of its output, "width": channels inside its blocks, "stride": of its first
            block, "operators": one for each block}``; an operator is ``"conv3"``, a 3x3 convolution, or e.g.
            ``"inv7x16"``, a 7x7 involution with 16 channels a group. "stride" may be left out: 1, then 2, 2, ...
        num_classes: outputs of the classifier; 0 for none, `forward` then returns the pooled features.
        in_channels: channels of the image.
        stem: ``"imagenet"`` is followed by a max-pool (first stage at stride 4); ``"small"``, for images of about 32
            pixels, is not (stride 2).
        stem_channels: output of the stem.
        reduction: bottleneck ratio of the kernel generation.
        kernel_norm: of the involutions' kernels, as for `pyinvolution.Involution2d`.
        drop_rate: dropout before the classifier.
        norm_layer: called with the channels.

    Attributes:
        feature_info: for the stem and each stage its ``num_chs``, ``reduction`` (stride) and ``module``, so that it can
            be the backbone of segmentation and detection, as `RedNet`.

    Shape:
        - Input: (N, in_channels, H, W), floating point, any H, W >= 1.
        - Output: (N, num_classes).

    Raises:
        TypeError: a stage is not such a mapping, or an argument has the wrong type.
        ValueError: a value is out of range, or an operator's groups do not divide the width.
    """

    stem: nn.Module

    def __init__(
        self,
        stages: Sequence[Mapping[str, Any]],
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        stem: str = "imagenet",
        stem_channels: int = 64,
        reduction: int = 4,
        kernel_norm: str | None = None,
        drop_rate: float = 0.0,
        norm_layer: NormLayer = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if stem not in ("imagenet", "small"):
            raise ValueError(f"stem is {stem!r}, expected 'imagenet' or 'small'")
        if not stages:
            raise ValueError("stages is empty, expected at least one stage")
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate is {drop_rate}, expected a value in [0, 1)")
        self.in_channels = positive_int("in_channels", in_channels)
        conv = nn.Conv2d(in_channels, positive_int("stem_channels", stem_channels), 3, 2, 1, bias=False)
        relu = partial(nn.ReLU, inplace=True)
        self.stem = nn.Sequential(OrderedDict(conv=conv, norm=norm_layer(stem_channels), act=relu()))
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        conv1x1 = partial(nn.Conv2d, kernel_size=1, bias=False)
        channels, total_stride = stem_channels, 4 if stem == "imagenet" else 2
        self.feature_info: list[dict[str, Any]] = [{"num_chs": stem_channels, "reduction": 2, "module": "stem"}]
        for index, stage in enumerate(stages):
            operators, width, out, stride = _check_stage(index, stage)
            blocks = []
            for position, operator in enumerate(operators):
                factory = _operator(operator, width, reduction, kernel_norm, norm_layer, relu)
                first = stride if position == 0 else 1
                blocks.append(Bottleneck(channels, width, out, first, factory, norm_layer, conv1x1))
                channels = out
            name = f"layer{index + 1}"
            self.add_module(name, Stage(*blocks))
            total_stride *= stride
            self.feature_info.append({"num_chs": channels, "reduction": total_stride, "module": name})
        self.num_features = channels
        self.num_classes = positive_int("num_classes", num_classes, 0)
        self.global_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                init_conv(module)
        if isinstance(self.head, nn.Linear):
            nn.init.normal_(self.head.weight, std=0.01)
            nn.init.zeros_(self.head.bias)

    @property
    def stages(self) -> list[Stage]:
        """The residual stages, first to last."""
        return [getattr(self, info["module"]) for info in self.feature_info[1:]]

    def features(self, input: Tensor) -> list[Tensor]:
        """Feature maps of all stages, first to last."""
        x = self.pool(conv_norm(self.stem, check_input(input, self.in_channels, "SearchableNet")))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.head_drop(self.global_pool(self.features(input)[-1])))


def _check_stage(index: int, stage: Mapping[str, Any]) -> tuple[list[str], int, int, int]:
    if not isinstance(stage, Mapping):
        raise TypeError(f"stages[{index}] is {stage!r}, expected a mapping with {', '.join(sorted(_STAGE))}")
    stage = {"stride": 1 if index == 0 else 2, **stage}
    if stage.keys() != _STAGE:
        raise ValueError(
            f"stages[{index}] has the keys {', '.join(sorted(stage))}, expected {', '.join(sorted(_STAGE))}"
        )
    operators = stage["operators"]
    if isinstance(operators, str) or not isinstance(operators, Sequence) or not operators:
        raise ValueError(f"stages[{index}].operators is {operators!r}, expected a list with an operator for each block")
    width, out, stride = (
        positive_int(f"stages[{index}].{name}", stage[name]) for name in ("width", "channels", "stride")
    )
    return list(operators), width, out, stride


def _operator(
    name: str,
    width: int,
    reduction: int,
    kernel_norm: str | None,
    norm_layer: NormLayer,
    activation: Callable[[], nn.Module],
) -> Callable[..., nn.Module]:
    involution = parse_operator(name)
    if involution is None:
        return partial(nn.Conv2d, out_channels=width, kernel_size=3, padding=1, bias=False)
    kernel_size, group_channels = involution
    if width % group_channels:
        raise ValueError(
            f"width of a stage is {width}, expected a multiple of the {group_channels} channels in a group of {name}"
        )
    return partial(
        Involution2d,
        kernel_size=kernel_size,
        group_channels=group_channels,
        reduction=reduction,
        kernel_norm=kernel_norm,
        norm_layer=norm_layer,
        activation=activation,
    )


@partial(register_model, listed=False)
def searchable(stages: Sequence[Mapping[str, Any]], **kwargs) -> SearchableNet:
    """A network described block by block, as an architecture search exports it."""
    return SearchableNet(stages, **kwargs)
