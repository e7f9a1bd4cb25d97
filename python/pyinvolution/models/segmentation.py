"""Semantic segmentation with RedNet: semantic FPN and UPerNet (appendix A.3 of the involution paper)."""

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.ops import Conv2dNormActivation

from pyinvolution.models._registry import create_model, list_models, register_model
from pyinvolution.models.fpn import FPN, Neck
from pyinvolution.models.official import Entry, fpn_entries, official_entries, prefixed
from pyinvolution.models.rednet import LAYERS, RedNet
from pyinvolution.models.searchable import SearchableNet
from pyinvolution.modules import init_conv, positive_int

__all__ = ["FCNHead", "SegmentationModel", "SemanticFPNHead", "UPerHead", "semantic_fpn", "upernet"]

_OWN = (RedNet, SearchableNet)
_resize = partial(interpolate, mode="bilinear", align_corners=False)


class SegmentationModel(nn.Module):
    """A backbone whose feature maps become logits for every pixel of the input.

    Submodules: ``backbone``, ``neck`` (semantic FPN), ``decode_head``, ``auxiliary_head`` (UPerNet).

    Args:
        backbone: `RedNet`, `SearchableNet`, or a model of timm with ``features_only=True``.
        neck: from an ordered dict of feature maps, fine to coarse, to another; None for none.
        decode_head: from a list of feature maps to logits at the resolution of the first.
        auxiliary_head: likewise, for a second loss in training; None for none.

    Attributes:
        num_classes: channels of the logits.
        return_auxiliary: whether the model, in training mode, returns a pair, the second from the auxiliary head. False
            at first.

    Shape:
        - Input: (N, 3, H, W), floating point, any H, W >= 1.
        - Output: logits (N, num_classes, H, W): the head's, enlarged bilinearly.
    """

    return_auxiliary = False

    def __init__(
        self,
        backbone: nn.Module,
        neck: nn.Module | None,
        decode_head: nn.Module,
        auxiliary_head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.decode_head = decode_head
        self.auxiliary_head = auxiliary_head
        self.num_classes: int = decode_head.num_classes  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        maps = self.backbone.features(input) if isinstance(self.backbone, _OWN) else self.backbone(input)
        levels = maps if self.neck is None else [*self.neck(OrderedDict(enumerate(maps))).values()]
        size = input.shape[-2:]
        logits = _resize(self.decode_head(levels), size)
        if self.auxiliary_head is not None and self.return_auxiliary and self.training:
            return logits, _resize(self.auxiliary_head(maps), size)
        return logits


class _Classifier(nn.Module):
    """Dropout of whole channels and a 1x1 convolution to the classes."""

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.num_classes = positive_int("num_classes", num_classes)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}, expected a value in [0, 1)")
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def classify(self, input: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(input))

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                init_conv(module)
        nn.init.normal_(self.conv_seg.weight, std=0.01)


class SemanticFPNHead(_Classifier):
    """Head of semantic FPN (Kirillov et al., CVPR 2019): each level goes through 3x3 convolutions, with an upsampling
    by 2 after each until it has the resolution of the first; their sum is classified.

    Submodules: ``scale_heads.I`` for level I, ``dropout``, ``conv_seg``.

    Args:
        in_channels: of every level.
        strides: of the levels, fine to coarse, doubling.
        num_classes: channels of the logits.
        channels: inside the head.
        dropout: probability with which a channel is dropped before the classifier.

    Shape:
        - Input: list of (N, in_channels, H_i, W_i).
        - Output: (N, num_classes, H_0, W_0).
    """

    def __init__(
        self,
        in_channels: int,
        strides: Sequence[int],
        num_classes: int,
        channels: int = 128,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(positive_int("channels", channels), num_classes, dropout)
        self.scale_heads = nn.ModuleList()
        for stride in strides:
            doublings = (stride // strides[0]).bit_length() - 1
            layers: list[nn.Module] = []
            for index in range(max(doublings, 1)):
                layers.append(Conv2dNormActivation(in_channels if index == 0 else channels, channels))
                if doublings:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.scale_heads.append(nn.Sequential(*layers))
        self.init_weights()

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        x = self.scale_heads[0](levels[0])
        for head, level in zip(self.scale_heads[1:], levels[1:], strict=True):
            # The resize is for sizes that halving has rounded up.
            x = x + _resize(head(level), x.shape[-2:])
        return self.classify(x)


class UPerHead(_Classifier):
    """Head of UPerNet (Xiao et al., ECCV 2018): pyramid pooling of the last level (PSPNet), a feature pyramid over all
    levels, and a fusion of its outputs at the resolution of the first.

    Submodules: ``psp_modules.I`` (pooling and 1x1 convolution), ``bottleneck``, ``lateral_convs.I``, ``fpn_convs.I``,
    ``fpn_bottleneck``, ``dropout``, ``conv_seg``.

    Args:
        in_channels: of the levels, fine to coarse.
        num_classes: channels of the logits.
        channels: inside the head.
        pool_scales: rows and columns that the last level is pooled to.
        dropout: probability with which a channel is dropped before the classifier.

    Shape:
        - Input: list of (N, in_channels[i], H_i, W_i).
        - Output: (N, num_classes, H_0, W_0).
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
    ) -> None:
        super().__init__(positive_int("channels", channels), num_classes, dropout)
        pool_scales = [positive_int("pool_scales", scale) for scale in pool_scales]
        *fine, last = in_channels
        conv: Callable[..., nn.Module] = partial(Conv2dNormActivation, out_channels=channels)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), conv(last, kernel_size=1)) for scale in pool_scales
        )
        self.bottleneck = conv(last + len(pool_scales) * channels)
        self.lateral_convs = nn.ModuleList(conv(width, kernel_size=1) for width in fine)
        self.fpn_convs = nn.ModuleList(conv(channels) for _ in fine)
        self.fpn_bottleneck = conv(len(in_channels) * channels)
        self.init_weights()

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        *fine, last = levels
        pooled = [_resize(module(last), last.shape[-2:]) for module in self.psp_modules]
        coarser = self.bottleneck(torch.cat([last, *pooled], 1))
        outputs = [coarser]
        for lateral, conv, level in reversed([*zip(self.lateral_convs, self.fpn_convs, fine, strict=True)]):
            coarser = lateral(level) + _resize(coarser, level.shape[-2:])
            outputs.insert(0, conv(coarser))
        size = outputs[0].shape[-2:]
        fused = torch.cat([outputs[0], *(_resize(output, size) for output in outputs[1:])], 1)
        return self.classify(self.fpn_bottleneck(fused))


class FCNHead(_Classifier):
    """3x3 convolution and classifier on one level (Long et al., CVPR 2015); UPerNet's auxiliary head.

    Submodules: ``convs.0``, ``dropout``, ``conv_seg``.

    Args:
        level: index of the level that it works on.
        in_channels: of that level.
        num_classes: channels of the logits.
        channels: inside the head.
        dropout: probability with which a channel is dropped before the classifier.

    Shape:
        - Input: list of (N, C_i, H_i, W_i).
        - Output: (N, num_classes, H_level, W_level).
    """

    def __init__(
        self, level: int, in_channels: int, num_classes: int, channels: int = 256, dropout: float = 0.1
    ) -> None:
        super().__init__(positive_int("channels", channels), num_classes, dropout)
        self.level = level
        self.convs = nn.Sequential(Conv2dNormActivation(in_channels, channels))
        self.init_weights()

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        return self.classify(self.convs(levels[self.level]))


@partial(register_model, listed=False)
def semantic_fpn(
    backbone: str | nn.Module = "rednet50",
    num_classes: int = 19,
    *,
    neck: Neck = "conv",
    neck_channels: int = 256,
    head_channels: int = 128,
    dropout: float = 0.1,
    backbone_options: Mapping[str, Any] | None = None,
) -> SegmentationModel:
    """Semantic FPN (Kirillov et al., CVPR 2019) as in the paper, appendix A.3.

    With RedNet-50 18.46 M parameters and 73.2 G multiply-adds at 512 x 1024; with ``neck="involution"`` 16.37 M and
    51.0 G. The published 293.9 and 205.2 G are of a whole image, 1024 x 2048, where convolutions and involutions take
    292.9 and 204.0 G, and also count an operation for each element of a bias, ReLU, pooling or upsampling.

    Args:
        backbone: a RedNet, a `SearchableNet`, a model of timm with ``features_only=True``, or the name of one.
        num_classes: channels of the logits.
        neck: what follows the sums of the feature pyramid: "conv" (3x3) or "involution" (7x7).
        neck_channels: of the pyramid.
        head_channels: inside the head.
        dropout: before the classifier.
        backbone_options: of a ``backbone`` that is given by name. Unless they say otherwise, the involution of the stem
            of a RedNet is 7x7 as in the official segmentation models, where ImageNet classifiers have 3x3
            (``stem_kernel_size``).

    Raises:
        ValueError: an argument is out of range, or there is no such backbone.
    """
    net, widths, strides = _backbone(backbone, backbone_options)
    pyramid = FPN(widths, positive_int("neck_channels", neck_channels), neck)
    return SegmentationModel(net, pyramid, SemanticFPNHead(neck_channels, strides, num_classes, head_channels, dropout))


@partial(register_model, listed=False)
def upernet(
    backbone: str | nn.Module = "rednet50",
    num_classes: int = 19,
    *,
    head_channels: int = 512,
    pool_scales: Sequence[int] = (1, 2, 3, 6),
    auxiliary_channels: int = 256,
    dropout: float = 0.1,
    backbone_options: Mapping[str, Any] | None = None,
) -> SegmentationModel:
    """UPerNet (Xiao et al., ECCV 2018) as in the paper, appendix A.3, with an auxiliary FCN head on stage 3.

    With RedNet-50 56.38 M parameters, 2.36 M of them the auxiliary head's, and 456.2 G multiply-adds at 512 x 1024
    without that head. The published 1825.6 G are of 1024 x 2048 and counted as for `semantic_fpn`: 1824.5 G are
    convolutions and involutions.

    Args:
        backbone: a RedNet, a `SearchableNet`, a model of timm with ``features_only=True``, or the name of one.
        num_classes: channels of the logits.
        head_channels: inside the head.
        pool_scales: of the pyramid pooling.
        auxiliary_channels: inside the auxiliary head; 0 for no such head.
        dropout: before the classifiers.
        backbone_options: as for `semantic_fpn`.

    Raises:
        ValueError: an argument is out of range, or there is no such backbone.
    """
    net, widths, _ = _backbone(backbone, backbone_options)
    auxiliary = FCNHead(-2, widths[-2], num_classes, auxiliary_channels, dropout) if auxiliary_channels else None
    return SegmentationModel(net, None, UPerHead(widths, num_classes, head_channels, pool_scales, dropout), auxiliary)


def _backbone(backbone: str | nn.Module, options: Mapping[str, Any] | None) -> tuple[nn.Module, list[int], list[int]]:
    """The backbone, channels and strides of its stages."""
    net: Any = backbone
    given: dict[str, Any] = dict(options or {})
    if not isinstance(backbone, str):
        if options:
            raise ValueError(
                f"backbone_options is {options!r}, expected None with a module as backbone, {type(backbone).__name__}"
            )
    elif backbone == "rednet" or backbone in list_models("rednet*"):
        defaults: dict[str, Any] = {"num_classes": 0, "global_pool": "", "stem_kernel_size": 7}
        net = create_model(backbone, **(defaults | given))
    elif backbone == "searchable":
        net = create_model(backbone, **({"num_classes": 0} | given))
    else:
        import timm

        if not timm.is_model(backbone):
            raise ValueError(f"backbone is {backbone!r}, expected a RedNet, 'searchable' or a model of timm")
        net = timm.create_model(backbone, features_only=True, **({"out_indices": (1, 2, 3, 4)} | given))
    if isinstance(net, _OWN):
        info = net.feature_info[1:]
        return net, [level["num_chs"] for level in info], [level["reduction"] for level in info]
    return net, net.feature_info.channels(), net.feature_info.reduction()


@official_entries.register
def _official(model: SegmentationModel) -> dict[str, Entry]:
    if isinstance(model.backbone, RedNet):
        entries = prefixed("backbone.", official_entries(model.backbone))
    else:
        entries = {f"backbone.{key}": Entry(f"backbone.{_v1c(key)}") for key in model.backbone.state_dict()}
    if model.neck is not None:
        entries |= prefixed("neck.", fpn_entries(model.neck))
    for key in model.state_dict():
        if key not in entries:
            # Layers 0 and 1 of a Conv2dNormActivation.
            name = re.sub(r"\.0\.(weight|bias)$", r".conv.\1", key)
            entries[key] = Entry(re.sub(r"\.1\.(\w+)$", r".bn.\1", name))
    return entries


def _v1c(key: str) -> str:
    """The name in the authors' library, mmseg, of an entry of timm's ResNet-C."""
    return re.sub(r"^bn1\.", "stem.7.", re.sub(r"^conv1\.(\d)", r"stem.\1", key))


def _register(build: Callable[..., nn.Module], backbone: str, name: str) -> None:
    def builder(**kwargs) -> nn.Module:
        return build(backbone, **kwargs)

    builder.__name__ = builder.__qualname__ = name
    register_model(builder)


for _build in (semantic_fpn, upernet):
    for _depth in LAYERS:
        _register(_build, f"rednet{_depth}", f"{_build.__name__}_rednet{_depth}")
    if find_spec("timm"):
        # The paper's baseline has a stem of three 3x3 convolutions: ResNet-C, called V1c in the authors' code.
        for _depth in (50, 101):
            _register(_build, f"resnet{_depth}c", f"{_build.__name__}_resnet{_depth}")
