"""RedNet: ResNet whose 3x3 convolutions are involutions (Li et al., CVPR 2021, section 4.1)."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyinvolution.kernel_norms import KernelNorm
from pyinvolution.models._memory import checkpoint, forget_activations
from pyinvolution.models._registry import register_model
from pyinvolution.modules import Involution2d, check_input, init_conv, positive_int
from pyinvolution.normalization import conv_norm, norm_relu

__all__ = ["LAYERS", "RedNet", "rednet26", "rednet38", "rednet50", "rednet101", "rednet152"]

LAYERS = {
    26: (1, 2, 4, 1),
    38: (2, 3, 5, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
"""Blocks in each stage, by depth."""

NormLayer = Callable[[int], nn.Module]

torch.fx.wrap("check_input")
_relu = partial(nn.ReLU, inplace=True)


class Stage(nn.Sequential):
    """A run of layers that is frozen, normalised and checkpointed as one.

    The switches live here and not in `RedNet`, so that they hold in a feature extractor which keeps only the
    stages.
    """

    frozen = False
    norm_eval = False
    grad_checkpointing = False

    def freeze(self) -> None:
        self.frozen = True
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> "Stage":
        super().train(mode and not self.frozen)
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, input: Tensor) -> Tensor:
        for block in self:
            if self.grad_checkpointing:
                input = checkpoint(block, input)
                continue
            output = block(input)
            forget_activations(block, input, output)
            input = output
        return input


def fix_stages(parts: Sequence[Stage], frozen_stages: int, norm_eval: bool) -> None:
    """Freeze the stem and stages 1 to ``frozen_stages`` (-1: nothing) of ``parts``, stem and stages; with ``norm_eval``
    let batch norms keep their running statistics in training.

    Raises:
        ValueError: there are fewer stages.
    """
    _up_to_stage("frozen_stages", frozen_stages, len(parts) - 1)
    for part in parts[: frozen_stages + 1]:
        part.freeze()
    for part in parts:
        part.norm_eval = norm_eval


class Stem(Stage):
    """Convolution, involution and convolution, each with a norm and ReLU."""

    conv1: nn.Module
    norm1: nn.Module
    act1: nn.Module
    involution: nn.Module
    norm2: nn.Module
    act2: nn.Module
    conv2: nn.Module
    norm3: nn.Module
    act3: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        x = norm_relu(self.norm1, self.act1, self.conv1(input))
        x = norm_relu(self.norm2, self.act2, self.involution(x))
        x = norm_relu(self.norm3, self.act3, self.conv2(x))
        forget_activations(self, input, x)
        return x


class Bottleneck(nn.Module):
    """Residual block: 1x1 convolution, involution, 1x1 convolution, each with a norm; ReLU after the sum.

    Submodules: ``conv1``, ``norm1``, ``involution`` (or the convolution in its place), ``norm2``, ``conv3``,
    ``norm3``, ``act`` and, where the shape changes, ``downsample.conv`` and ``downsample.norm``.

    Shape: (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        stride: int,
        involution: Callable[..., nn.Module],
        norm_layer: NormLayer,
        conv1x1: Callable[..., nn.Module],
    ) -> None:
        super().__init__()
        self.conv1 = conv1x1(in_channels, mid_channels)
        self.norm1 = norm_layer(mid_channels)
        self.involution = involution(mid_channels, stride=stride)
        self.norm2 = norm_layer(mid_channels)
        self.conv3 = conv1x1(mid_channels, out_channels)
        self.norm3 = norm_layer(out_channels)
        self.act = _relu()
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            conv = conv1x1(in_channels, out_channels, stride=stride)
            self.downsample = nn.Sequential(OrderedDict(conv=conv, norm=norm_layer(out_channels)))

    def forward(self, input: Tensor) -> Tensor:
        x = norm_relu(self.norm1, self.act, self.conv1(input))
        x = norm_relu(self.norm2, self.act, self.involution(x))
        x = self.conv3(x)
        residual = input if self.downsample is None else conv_norm(self.downsample, input)
        return norm_relu(self.norm3, self.act, x, residual)


class RedNet(nn.Module):
    """RedNet, the ResNet-like classifier and backbone of the involution paper.

    Children: ``stem`` (``conv1, norm1, act1, involution, norm2, act2, conv2, norm3, act3``), ``pool``,
    ``layer1`` to ``layerN`` (a `Stage` of `Bottleneck` each), ``global_pool``, ``head_drop`` and ``head``.
    These names, and with them the keys of the state dict, are stable.

    Args:
        layers: blocks in each stage; the blocks of stage i (from 0) have ``base_channels * 2**i`` channels
            inside and ``expansion`` times as many outside.
        num_classes: outputs of the classifier; 0 for none, `forward` then returns the pooled features.
        in_channels: channels of the image.
        stem: ``"imagenet"`` is followed by a max-pool (first stage at stride 4); ``"small"``, for images of
            about 32 pixels, is not (stride 2).
        stem_channels: output of the stem; the involution inside it works on half of them.
        base_channels: channels inside the blocks of the first stage.
        expansion: ratio of a block's output to its inner channels.
        kernel_size: involution window of the stages.
        stem_kernel_size: involution window of the stem (3 in the authors' classification code, 7 in their
            detection and segmentation code).
        group_channels: channels which share an involution kernel.
        reduction: bottleneck ratio of the kernel generation.
        kernel_norm: of the involutions' kernels, as for `pyinvolution.Involution2d`.
        conv_stages: -1 for none, 0 for the stem, k for the stem and stages 1 to k: 3x3 convolutions instead of
            involutions, as in ResNet. There are no published weights of such networks.
        strides: stride of each stage's first block; default 1, 2, 2, ...
        dilations: dilation of each stage's involutions (or convolutions); default 1.
        output_stride: largest stride of the features; further strides become dilations. Instead of
            ``strides`` and ``dilations``.
        global_pool: ``"avg"``, or ``""`` to return feature maps (with ``num_classes=0``).
        drop_rate: dropout before the classifier.
        norm_layer: called with the channels (and ``device``, ``dtype``, if these are given).
        zero_init_residual: start every block as identity, by a zero weight in its last norm.
        frozen_stages: -1 for none, k to freeze the stem and stages 1 to k: no gradients, always in eval mode.
        norm_eval: batch norms keep their running statistics in training.
        grad_checkpointing: recompute blocks in the backward pass to save memory.
        device, dtype: of the parameters.

    Attributes:
        feature_info: for the stem and each stage its ``num_chs``, ``reduction`` (stride) and ``module``
            (name).
        num_features: channels of the last stage.

    Shape:
        - Input: (N, in_channels, H, W), floating point, any H, W >= 1.
        - Output: (N, num_classes).
    """

    stem: Stage
    pool: nn.Module
    global_pool: nn.Module
    head: nn.Module

    def __init__(
        self,
        layers: Sequence[int],
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        stem: str = "imagenet",
        stem_channels: int = 64,
        base_channels: int = 64,
        expansion: int = 4,
        kernel_size: int | tuple[int, int] = 7,
        stem_kernel_size: int | tuple[int, int] = 3,
        group_channels: int = 16,
        reduction: int = 4,
        kernel_norm: str | KernelNorm | None = None,
        conv_stages: int = -1,
        strides: Sequence[int] | None = None,
        dilations: Sequence[int] | None = None,
        output_stride: int | None = None,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        norm_layer: NormLayer = nn.BatchNorm2d,
        zero_init_residual: bool = True,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        grad_checkpointing: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layers = _int_tuple("layers", layers)
        self.in_channels = positive_int("in_channels", in_channels)
        stages = len(self.layers)
        if stem not in ("imagenet", "small"):
            raise ValueError(f"stem is {stem!r}, expected 'imagenet' or 'small'")
        if positive_int("stem_channels", stem_channels) % 2:
            raise ValueError(f"stem_channels is {stem_channels}, expected an even number")
        positive_int("base_channels", base_channels)
        positive_int("expansion", expansion)
        _up_to_stage("conv_stages", conv_stages, stages)
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate is {drop_rate}, expected a value in [0, 1)")

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        stride = 4 if stem == "imagenet" else 2
        if output_stride is not None:
            if strides is not None or dilations is not None:
                raise ValueError("strides and dilations are given, expected None with output_stride")
            strides, dilations = _trade_stride(stages, stride, output_stride)
        strides = _int_tuple("strides", (1,) + (2,) * (stages - 1) if strides is None else strides, stages)
        dilations = _int_tuple("dilations", (1,) * stages if dilations is None else dilations, stages)

        given = {key: value for key, value in factory.items() if value is not None}
        norm_layer = partial(norm_layer, **given)
        involution: Callable[..., nn.Module] = partial(
            Involution2d,
            group_channels=group_channels,
            reduction=reduction,
            kernel_norm=kernel_norm,
            norm_layer=norm_layer,
            activation=_relu,
            **factory,
        )
        conv1x1: Callable[..., nn.Module] = partial(nn.Conv2d, kernel_size=1, bias=False, **factory)
        conv3x3: Callable[..., nn.Module] = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False, **factory)

        half = stem_channels // 2
        self.stem = Stem(
            OrderedDict(
                conv1=conv3x3(in_channels, half, stride=2),
                norm1=norm_layer(half),
                act1=_relu(),
                involution=involution(half, stem_kernel_size) if conv_stages < 0 else conv3x3(half, half),
                norm2=norm_layer(half),
                act2=_relu(),
                conv2=conv3x3(half, stem_channels),
                norm3=norm_layer(stem_channels),
                act3=_relu(),
            )
        )
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        self.feature_info: list[dict[str, Any]] = [{"num_chs": stem_channels, "reduction": 2, "module": "stem"}]

        channels = stem_channels
        for index, depth in enumerate(self.layers):
            mid = base_channels * 2**index
            dilation = dilations[index]
            inner: Callable[..., nn.Module] = partial(involution, kernel_size=kernel_size, dilation=dilation)
            if index < conv_stages:
                inner = partial(conv3x3, out_channels=mid, padding=dilation, dilation=dilation)
            blocks = []
            for block in range(depth):
                first = strides[index] if block == 0 else 1
                blocks.append(Bottleneck(channels, mid, mid * expansion, first, inner, norm_layer, conv1x1))
                channels = mid * expansion
            name = f"layer{index + 1}"
            self.add_module(name, Stage(*blocks))
            stride *= strides[index]
            self.feature_info.append({"num_chs": channels, "reduction": stride, "module": name})

        self.num_features = self.head_hidden_size = channels
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.zero_init_residual = zero_init_residual
        self.init_weights()

        fix_stages([self.stem, *self.stages], frozen_stages, norm_eval)
        self.set_grad_checkpointing(grad_checkpointing)
        self.train()

    @property
    def stages(self) -> list[Stage]:
        """The residual stages, first to last."""
        return [getattr(self, info["module"]) for info in self.feature_info[1:]]

    def init_weights(self) -> None:
        """(Re)initialise as the authors do: `init_conv`, norms 1 and 0, classifier normal with std 0.01."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                init_conv(module)
            elif isinstance(module, (_BatchNorm, nn.GroupNorm)):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, Bottleneck) and self.zero_init_residual:
                weight = getattr(module.norm3, "weight", None)
                if weight is not None:
                    nn.init.zeros_(weight)
        self._init_head()

    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            nn.init.normal_(self.head.weight, std=0.01)
            nn.init.zeros_(self.head.bias)

    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        """The classifier, or its name."""
        return "head" if name_only else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one, or none (0); ``global_pool`` None keeps the pooling."""
        positive_int("num_classes", num_classes, 0)
        if global_pool not in ("avg", "", None):
            raise ValueError(f"global_pool is {global_pool!r}, expected 'avg' or ''")
        pooled = not isinstance(self.global_pool, nn.Identity) if global_pool is None else bool(global_pool)
        if num_classes and not pooled:
            raise ValueError(f"num_classes is {num_classes}, expected 0 with global_pool='' (feature maps)")
        self.num_classes = num_classes
        self.global_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1)) if pooled else nn.Identity()
        weight = next(self.parameters())
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)
        self._init_head()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns that sort parameter names into stem and blocks (coarse: stages), for timm's optimizers."""
        return {"stem": r"^stem", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def features(self, input: Tensor) -> list[Tensor]:
        """Feature maps of all stages, first to last: strides 4, 8, 16, 32 in the standard models."""
        x = self.pool(self.stem(check_input(input, self.in_channels, "RedNet")))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward_intermediates(
        self,
        input: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps at chosen depths (timm's protocol).

        Args:
            input: (N, in_channels, H, W).
            indices: into ``feature_info`` (0 is the stem, i is stage i); an int for the last n, None for all.
            norm: ignored, there is no final norm.
            stop_early: do not compute what follows the last index.
            output_fmt: only ``"NCHW"``.
            intermediates_only: return only the list.

        Returns:
            The last feature map and the list of chosen ones in order of depth, or only the list.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}, expected 'NCHW'")
        taken = self._take(indices)
        x = self.stem(check_input(input, self.in_channels, "RedNet"))
        chosen = [x] if 0 in taken else []
        stages = self.stages[: max(taken)] if stop_early or intermediates_only else self.stages
        if stages:
            x = self.pool(x)
        for index, stage in enumerate(stages, start=1):
            x = stage(x)
            if index in taken:
                chosen.append(x)
        return chosen if intermediates_only else (x, chosen)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop what the features at ``indices`` do not need (timm's protocol); return them counted from 0."""
        taken = self._take(indices)
        last = max(taken)
        if last < len(self.feature_info) - 1:
            for info in self.feature_info[last + 1 :]:
                delattr(self, info["module"])
            self.layers, self.feature_info = self.layers[:last], self.feature_info[: last + 1]
            self.num_features = self.head_hidden_size = self.feature_info[-1]["num_chs"]
            prune_head = True
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def _take(self, indices: int | Sequence[int] | None) -> list[int]:
        count = len(self.feature_info)
        if indices is None:
            return list(range(count))
        if isinstance(indices, int):
            if not 0 < indices <= count:
                raise ValueError(f"indices is {indices}, expected a number of features from 1 to {count}")
            return list(range(count - indices, count))
        if not indices or not all(-count <= index < count for index in indices):
            raise ValueError(f"indices is {indices!r}, expected one or more of {-count} to {count - 1}")
        return [index % count for index in indices]

    def forward_features(self, input: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> feature map of the last stage."""
        x = self.pool(self.stem(check_input(input, self.in_channels, "RedNet")))
        for stage in self.stages:
            x = stage(x)
        return x

    def forward_head(self, input: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature map of the last stage -> logits (or, ``pre_logits``, what the classifier would see)."""
        x = self.head_drop(self.global_pool(input))
        return x if pre_logits else self.head(x)

    def forward(self, input: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(input))


def _up_to_stage(name: str, value: int, stages: int) -> None:
    """``value`` is -1 (nothing), 0 (the stem) or the number of the last stage."""
    if positive_int(name, value, -1) > stages:
        raise ValueError(f"{name} is {value}, expected at most the number of stages, {stages}")


def _int_tuple(name: str, values: Sequence[int], length: int | None = None) -> tuple[int, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name} is {values!r}, expected a sequence of ints")
    if not values:
        raise ValueError(f"{name} is {values!r}, expected at least one entry")
    if length not in (None, len(values)):
        raise ValueError(f"{name} is {values!r}, expected {length} entries, one for each stage")
    return tuple(positive_int(f"{name}[{index}]", value) for index, value in enumerate(values))


def _trade_stride(stages: int, stem_stride: int, output_stride: int) -> tuple[list[int], list[int]]:
    allowed = [stem_stride * 2**index for index in range(stages)]
    if output_stride not in allowed:
        raise ValueError(f"output_stride is {output_stride!r}, expected one of {allowed}")
    strides = [1] + [2 if stride <= output_stride else 1 for stride in allowed[1:]]
    return strides, [max(1, stride // output_stride) for stride in allowed]


@partial(register_model, listed=False)
def rednet(layers: Sequence[int], **kwargs) -> RedNet:
    """RedNet of any depth and width."""
    return RedNet(layers, **kwargs)


@register_model
def rednet26(**kwargs) -> RedNet:
    """RedNet-26: 9.23 M parameters, 1.69 G multiply-adds at 224 x 224."""
    return RedNet(LAYERS[26], **kwargs)


@register_model
def rednet38(**kwargs) -> RedNet:
    """RedNet-38: 12.39 M parameters, 2.17 G multiply-adds at 224 x 224."""
    return RedNet(LAYERS[38], **kwargs)


@register_model
def rednet50(**kwargs) -> RedNet:
    """RedNet-50: 15.54 M parameters, 2.65 G multiply-adds at 224 x 224."""
    return RedNet(LAYERS[50], **kwargs)


@register_model
def rednet101(**kwargs) -> RedNet:
    """RedNet-101: 25.65 M parameters, 4.66 G multiply-adds at 224 x 224."""
    return RedNet(LAYERS[101], **kwargs)


@register_model
def rednet152(**kwargs) -> RedNet:
    """RedNet-152: 33.98 M parameters, 6.68 G multiply-adds at 224 x 224."""
    return RedNet(LAYERS[152], **kwargs)
