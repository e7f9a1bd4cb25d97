"""Detection and instance segmentation with RedNet and involution (appendix A.2 of the paper), on torchvision's parts.

Where torchvision differs from the code behind the paper's figures (mmdet 2), these models follow the latter, so that
its checkpoints give the same detections: anchors and RoIAlign are not rounded to pixels, RoIAlign samples every pixel,
a RetinaNet has no output for a background, and the change of a box's sides is limited both ways.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torchvision.models import detection
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign, box_area, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from pyinvolution.models._registry import create_model, register_model
from pyinvolution.models.fpn import ExtraLevels, FPNBackbone, Neck
from pyinvolution.models.official import Entry, fpn_entries, official_entries, official_key, prefixed
from pyinvolution.models.rednet import LAYERS, RedNet
from pyinvolution.modules import Involution2d, positive_int

__all__ = ["Anchors", "RetinaNet", "RoIAlign", "faster_rcnn", "mask_rcnn", "retinanet"]

BACKBONE = {"frozen_stages": 1, "norm_eval": True, "stem_kernel_size": 7}
"""Options of a RedNet in the official detection configurations."""


class Anchors(AnchorGenerator):
    """Anchors of exact sizes at exact strides, in at least single precision.

    torchvision's are rounded to whole pixels, their strides inferred from the sizes of image and feature map (of odd
    sizes a wrong one), and they take the features' type, which under autocast is too coarse for coordinates.

    Args:
        strides: of the levels.
        scales: of the anchors' sides, in strides.
        ratios: of height to width.
    """

    def __init__(self, strides: Sequence[int], scales: Sequence[float], ratios: Sequence[float]) -> None:
        self.strides = tuple(strides)
        super().__init__(
            tuple(tuple(stride * scale for scale in scales) for stride in strides), (tuple(ratios),) * len(strides)
        )

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device=None) -> Tensor:
        sizes = torch.as_tensor(scales, dtype=dtype, device=device)
        roots = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        widths, heights = torch.outer(1 / roots, sizes).flatten(), torch.outer(roots, sizes).flatten()
        return torch.stack([-widths, -heights, widths, heights], 1) / 2

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(torch.promote_types(dtype, torch.float32), device)

    def grid_anchors(self, grid_sizes, strides) -> list[Tensor]:
        return super().grid_anchors(grid_sizes, [(stride, stride) for stride in self.strides])


class RoIAlign(MultiScaleRoIAlign):
    """RoIAlign on the level that fits the size of a box (Lin et al., CVPR 2017, equation 1: 224 pixels at stride 16),
    with pixels at their centres and a sample for every pixel.

    Args:
        levels: names of the feature maps.
        strides: of these.
        output_size: height and width of the result.
    """

    def __init__(self, levels: Sequence[str], strides: Sequence[int], output_size: int) -> None:
        super().__init__(list(levels), output_size, sampling_ratio=0)
        self.strides = tuple(strides)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        maps = [x[name] for name in self.featmap_names]
        rois = torch.cat([pad(part, (1, 0), value=index) for index, part in enumerate(boxes)])
        sides = box_area(rois[:, 1:]).sqrt()
        levels = (sides / (14 * self.strides[0]) + 1e-6).log2().floor().clamp(0, len(maps) - 1)
        result = maps[0].new_zeros(rois.shape[0], maps[0].shape[1], *self.output_size)
        for level, (features, stride) in enumerate(zip(maps, self.strides, strict=True)):
            chosen = torch.where(levels == level)[0]
            pooled = roi_align(features.to(rois.dtype), rois[chosen], self.output_size, 1 / stride, 0, aligned=True)
            result[chosen] = pooled.to(result.dtype)
        return result


class TwoSidedBoxCoder(BoxCoder):
    """torchvision's, but as in mmdet a box is also not made narrower or lower than 16/1000 of its anchor or proposal:
    the logarithms of both ratios are clamped to [-``bbox_xform_clip``, ``bbox_xform_clip``], where torchvision has the
    upper limit only."""

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        x, y, width, height = rel_codes.unflatten(1, (-1, 4)).unbind(2)
        least = [-self.bbox_xform_clip * weight for weight in self.weights[2:]]
        codes = torch.stack([x, y, width.clamp(min=least[0]), height.clamp(min=least[1])], 2)
        return super().decode_single(codes.flatten(1), boxes)


class RetinaNet(detection.RetinaNet):
    """torchvision's RetinaNet with labels from 1, as in the other detectors, and no output for the background."""

    def compute_loss(self, targets, head_outputs, anchors) -> dict[str, Tensor]:
        targets = [{**target, "labels": target["labels"] - 1} for target in targets]
        return super().compute_loss(targets, head_outputs, anchors)

    def postprocess_detections(self, head_outputs, anchors, image_shapes) -> list[dict[str, Tensor]]:
        found = super().postprocess_detections(head_outputs, anchors, image_shapes)
        return [{**image, "labels": image["labels"] + 1} for image in found]


def _involution_relu(channels: int) -> nn.Sequential:
    return nn.Sequential(Involution2d(channels, 7), nn.ReLU(inplace=True))


def _in_single_precision(module: nn.Module, inputs: Any, output: Any) -> Any:
    # Under autocast, boxes in half precision would be off by pixels.
    if isinstance(output, Tensor):
        return output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
    if isinstance(output, dict):
        return {name: _in_single_precision(module, inputs, value) for name, value in output.items()}
    return type(output)(_in_single_precision(module, inputs, value) for value in output)


def _backbone(
    backbone: str | nn.Module,
    options: Mapping[str, Any] | None,
    channels: int,
    neck: Neck,
    levels: Sequence[int],
    extra: Any,
) -> FPNBackbone:
    positive_int("channels", channels)
    if isinstance(backbone, str):
        defaults: dict[str, Any] = {} if backbone == "searchable" else {"global_pool": "", **BACKBONE}
        backbone = create_model(backbone, **{"num_classes": 0, **defaults, **(options or {})})
    elif options:
        raise ValueError(
            f"backbone_options is {options!r}, expected None with a module as backbone, {type(backbone).__name__}"
        )
    return FPNBackbone(backbone, levels, channels, neck, extra)


def _check_head(head: str, allowed: Sequence[str] = ("conv", "involution")) -> None:
    if head not in allowed:
        raise ValueError(f"head is {head!r}, expected {' or '.join(map(repr, allowed))}")


def _check_options(model: type[nn.Module], options: Mapping[str, Any]) -> None:
    # torchvision silently ignores arguments that it does not know.
    known = {"size_divisible", "fixed_size"}
    for base in model.__mro__:
        if base.__module__.startswith("torchvision"):
            known |= inspect.signature(base).parameters.keys()
    if unknown := sorted(options.keys() - known):
        raise TypeError(f"{model.__name__} has no argument {unknown[0]!r}")


def _rcnn(
    model: type[detection.FasterRCNN],
    backbone: str | nn.Module,
    num_classes: int,
    neck: Neck,
    head: Neck,
    *,
    backbone_options: Mapping[str, Any] | None = None,
    channels: int = 256,
    levels: Sequence[int] = (0, 1, 2, 3),
    anchor_scales: Sequence[float] = (8,),
    anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    hidden: int = 1024,
    **kwargs: Any,
) -> detection.FasterRCNN:
    positive_int("num_classes", num_classes, 2)
    _check_head(head)
    _check_options(model, kwargs)
    body = _backbone(backbone, backbone_options, channels, neck, levels, lambda *_: LastLevelMaxPool())
    names, strides = [str(level) for level in levels], body.strides
    anchors = Anchors([*strides, 2 * strides[-1]], anchor_scales, anchor_ratios)
    rpn_head = RPNHead(channels, anchors.num_anchors_per_location()[0])
    if head == "involution":
        rpn_head.conv = _involution_relu(channels)
    parts: dict[str, Any] = {
        "rpn_anchor_generator": anchors,
        "rpn_head": rpn_head,
        "box_roi_pool": RoIAlign(names, strides, 7),
        "box_head": TwoMLPHead(channels * 7**2, hidden),
        "box_predictor": FastRCNNPredictor(hidden, num_classes),
    }
    if model is detection.MaskRCNN:
        involutions = nn.Sequential(*(_involution_relu(channels) for _ in range(4)))
        parts |= {
            "mask_roi_pool": RoIAlign(names, strides, 14),
            "mask_head": involutions if head == "involution" else MaskRCNNHeads(channels, [channels] * 4, 1),
            "mask_predictor": MaskRCNNPredictor(channels, channels, num_classes),
        }
    for name in ("rpn_head", "box_predictor", "mask_predictor"):
        if name in parts:
            parts[name].register_forward_hook(_in_single_precision)
    net = model(body, **{"rpn_post_nms_top_n_train": 1000, **parts, **kwargs})
    for part in (net.rpn, net.roi_heads):
        part.box_coder = TwoSidedBoxCoder(part.box_coder.weights)
    return net


@partial(register_model, listed=False)
def faster_rcnn(
    backbone: str | nn.Module = "rednet50",
    num_classes: int = 81,
    neck: Neck = "conv",
    head: Neck = "conv",
    **kwargs: Any,
) -> detection.FasterRCNN:
    """Faster R-CNN on a feature pyramid: torchvision's `FasterRCNN`, with the settings of the official configurations.

    In training it is called with a list of images (3, H, W) in [0, 1] and a list of targets (``boxes`` as x1, y1, x2,
    y2, and ``labels`` from 1), and returns a dict of losses; in evaluation with images, and returns for each ``boxes``,
    ``labels`` and ``scores``. It resizes (to 800 pixels, at most 1333 on the longer side) and normalises them itself.

    With RedNet-50, trained parameters and multiply-adds at 800 x 1280 with 1000 proposals: 31.60 M and 177.4 G, with
    ``neck="involution"`` 29.51 M and 134.0 G, with ``head="involution"`` too 28.99 M and 90.5 G. The published counts
    (177.9, 135.0, 91.5 G) also have an operation for each element of a bias, norm or ReLU, and 4,100 parameters fewer:
    there the box of the background has no outputs.

    Args:
        backbone: a name for `create_model`, or a module as `FPNBackbone` takes it.
        num_classes: classes and background.
        neck: "conv" or "involution": the layers on the pyramid's outputs.
        head: likewise, the layer of the region proposal network (and the mask head's four).
        backbone_options: of a ``backbone`` that is given by name. Unless they say otherwise, a RedNet's stem and first
            stage are frozen and the norms fixed (``frozen_stages``, ``norm_eval``), and the involution of the stem is
            7x7 as in the official detectors, where ImageNet classifiers have 3x3 (``stem_kernel_size``).
        channels: of pyramid and heads.
        levels: stages of the backbone in the pyramid, from 0; a level of twice the stride is added.
        anchor_scales: sides of the anchors in strides.
        anchor_ratios: of their heights to their widths.
        hidden: width of the box head.
        kwargs: of torchvision's class, e.g. ``min_size``, ``max_size``, ``box_score_thresh``.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    return _rcnn(detection.FasterRCNN, backbone, num_classes, neck, head, **kwargs)


@partial(register_model, listed=False)
def mask_rcnn(
    backbone: str | nn.Module = "rednet50",
    num_classes: int = 81,
    neck: Neck = "conv",
    head: Neck = "conv",
    **kwargs: Any,
) -> detection.MaskRCNN:
    """Mask R-CNN: as `faster_rcnn`; targets have ``masks`` (objects, H, W) too, results ``masks`` (objects, 1, H, W) of
    probabilities.

    With RedNet-50 and 100 masks: 34.25 M trained parameters and 230.4 G multiply-adds, with ``neck="involution"``
    32.16 M and 187.0 G, with ``head="involution"`` too 29.54 M and 103.4 G. Published are 224.2, 181.3 and 104.6 G; the
    first two leave out the mask head's deconvolution and classifier (6.7 G), the last counts them.
    """
    return _rcnn(detection.MaskRCNN, backbone, num_classes, neck, head, **kwargs)  # type: ignore[return-value]


@partial(register_model, listed=False)
def retinanet(
    backbone: str | nn.Module = "rednet50",
    num_classes: int = 81,
    neck: Neck = "conv",
    head: Neck = "conv",
    *,
    backbone_options: Mapping[str, Any] | None = None,
    channels: int = 256,
    levels: Sequence[int] = (1, 2, 3),
    anchor_scales: Sequence[float] = (4, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3)),
    anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    **kwargs: Any,
) -> RetinaNet:
    """RetinaNet: called as `faster_rcnn`, with its arguments. Two levels are added to the pyramid, and the heads are
    convolutions always, as in the paper.

    With RedNet-50 27.81 M trained parameters and 209.6 G multiply-adds at 800 x 1280 (published 210.1), with
    ``neck="involution"`` 26.25 M and 198.9 G (199.9).
    """
    positive_int("num_classes", num_classes, 2)
    _check_head(head, ("conv",))
    _check_options(RetinaNet, kwargs)
    body = _backbone(backbone, backbone_options, channels, neck, levels, ExtraLevels)
    strides = [*body.strides, 2 * body.strides[-1], 4 * body.strides[-1]]
    anchors = Anchors(strides, anchor_scales, anchor_ratios)
    # num_classes counts the background, for which a classifier with a sigmoid for each class needs no output.
    classes = num_classes - 1
    retina_head = RetinaNetHead(channels, anchors.num_anchors_per_location()[0], classes)
    retina_head.register_forward_hook(_in_single_precision)
    kwargs = {"detections_per_img": 100, **kwargs}
    net = RetinaNet(body, classes, anchor_generator=anchors, head=retina_head, **kwargs)
    net.box_coder = TwoSidedBoxCoder(net.box_coder.weights)
    return net


def _register(family: Any, title: str, depth: int) -> None:
    def build(**kwargs: Any) -> nn.Module:
        return family(f"rednet{depth}", **kwargs)

    build.__name__ = build.__qualname__ = f"{family.__name__}_rednet{depth}"
    build.__doc__ = f"{title}, RedNet-{depth}-FPN."
    register_model(build)


for _family, _title in ((faster_rcnn, "Faster R-CNN"), (mask_rcnn, "Mask R-CNN"), (retinanet, "RetinaNet")):
    for _depth in LAYERS:
        _register(_family, _title, _depth)


# --- Checkpoints of the authors' code. There the background is the last class of the box head; no other output has it.

_HEADS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^rpn\.head\.conv\.0\.(0\.)?", "rpn_head.rpn_conv."),
        (r"^rpn\.head\.cls_logits\.", "rpn_head.rpn_cls."),
        (r"^rpn\.head\.bbox_pred\.", "rpn_head.rpn_reg."),
        (r"^roi_heads\.box_head\.fc6\.", "roi_head.bbox_head.shared_fcs.0."),
        (r"^roi_heads\.box_head\.fc7\.", "roi_head.bbox_head.shared_fcs.1."),
        (r"^roi_heads\.box_predictor\.cls_score\.", "roi_head.bbox_head.fc_cls."),
        (r"^roi_heads\.box_predictor\.bbox_pred\.", "roi_head.bbox_head.fc_reg."),
        (r"^roi_heads\.mask_head\.(\d)\.0\.(weight|bias)$", r"roi_head.mask_head.convs.\1.conv.\2"),
        (r"^roi_heads\.mask_head\.(\d)\.", r"roi_head.mask_head.convs.\1."),
        (r"^roi_heads\.mask_predictor\.conv5_mask\.", "roi_head.mask_head.upsample."),
        (r"^roi_heads\.mask_predictor\.mask_fcn_logits\.", "roi_head.mask_head.conv_logits."),
        (r"^head\.classification_head\.conv\.(\d)\.0\.", r"bbox_head.cls_convs.\1.conv."),
        (r"^head\.classification_head\.cls_logits\.", "bbox_head.retina_cls."),
        (r"^head\.regression_head\.conv\.(\d)\.0\.", r"bbox_head.reg_convs.\1.conv."),
        (r"^head\.regression_head\.bbox_reg\.", "bbox_head.retina_reg."),
    )
)


def _background_first(value: Tensor) -> Tensor:
    return value.roll(1, 0)


def _background_last(value: Tensor) -> Tensor:
    return value.roll(-1, 0)


def _add_background(rows: int, value: Tensor) -> Tensor:
    return torch.cat([value.new_zeros(rows, *value.shape[1:]), value])


def _drop_background(rows: int, value: Tensor) -> Tensor:
    return value[rows:]


@official_entries.register(detection.FasterRCNN)
@official_entries.register(detection.RetinaNet)
def _(model: detection.FasterRCNN | detection.RetinaNet) -> dict[str, Entry]:
    backbone = model.backbone
    if not isinstance(backbone, FPNBackbone) or not isinstance(backbone.body, RedNet):
        raise TypeError(
            f"the model's backbone is {type(backbone).__name__}, expected a RedNet, which official checkpoints are of"
        )
    entries = prefixed("backbone.body.", official_entries(backbone.body))
    entries |= prefixed("backbone.fpn.", fpn_entries(backbone.fpn))
    for key in model.state_dict():
        if key in entries:
            continue
        name = key
        for pattern, replacement in _HEADS:
            name = pattern.sub(replacement, name)
        coders: tuple[Any, ...] = ()
        if ".fc_cls." in name:
            coders = (_background_first, _background_last)
        elif ".fc_reg." in name:
            coders = (partial(_add_background, 4), partial(_drop_background, 4))
        elif ".conv_logits." in name:
            coders = (partial(_add_background, 1), partial(_drop_background, 1))
        entries[key] = Entry(official_key(name), *coders)
    return entries
