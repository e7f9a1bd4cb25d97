"""Detectors: published sizes, features and heads from official checkpoints, and what differs from torchvision's."""

import warnings

import pytest
import torch
from recipe_support import one_thread  # noqa: F401
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pyinvolution.models import create_model, list_models, load_official, official_state_dict
from pyinvolution.models.detection import Anchors, RoIAlign

SYSTEMS = [
    # Model, neck, head, trained parameters in M, multiply-adds in G (appendix B of the paper).
    ("faster_rcnn", "conv", "conv", 31.598, 177.9),
    ("faster_rcnn", "involution", "conv", 29.508, 135.0),
    ("faster_rcnn", "involution", "involution", 28.985, 91.5),
    ("mask_rcnn", "conv", "conv", 34.242, 224.2),
    ("mask_rcnn", "involution", "conv", 32.151, 181.3),
    ("mask_rcnn", "involution", "involution", 29.538, 104.6),
    ("retinanet", "conv", "conv", 27.814, 210.1),
    ("retinanet", "involution", "conv", 26.246, 199.9),
]
KINDS = [system[:3] for system in SYSTEMS]


def small(family="mask_rcnn", neck="involution", head="conv", **kwargs):
    options = {"layers": [1, 1, 1, 1], "stem_channels": 32, "base_channels": 16}
    sizes = {"num_classes": 4, "channels": 32, "min_size": 64, "max_size": 96}
    return create_model(family, backbone="rednet", backbone_options=options, neck=neck, head=head, **sizes | kwargs)


def scramble(model, seed=0):
    """Random parameters and statistics, so that nothing is hidden behind a zero."""
    draw = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.copy_(0.5 + torch.rand(value.shape, generator=draw))
        elif value.is_floating_point():
            value.add_(0.05 * torch.randn(value.shape, generator=draw))
    return model


def samples(objects=2):
    draw = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 64, 80, generator=draw), torch.rand(3, 72, 64, generator=draw)]
    boxes = torch.tensor([[5.0, 6, 40, 50], [10, 10, 30, 20]])[:objects]
    targets = [
        {
            "boxes": boxes,
            "labels": torch.tensor([1, 3])[:objects],
            "masks": torch.ones(objects, *image.shape[1:], dtype=torch.uint8),
        }
        for image in images
    ]
    return images, targets


def published_count(model):
    """Operations at 800 x 1280 with 1000 proposals and 100 masks, as they were counted for the paper: a multiply-add is
    one, and so is every element of a bias, norm (two) or ReLU. Of Mask R-CNN with convolutions in its head,
    deconvolution and classifier of the masks were left out."""
    elementwise = 0

    def count(module, inputs, output):
        nonlocal elementwise
        each = {nn.BatchNorm2d: 2, nn.ReLU: 1}.get(type(module), int(getattr(module, "bias", None) is not None))
        elementwise += each * output.numel()

    for module in model.modules():
        if not list(module.children()) and type(module).__module__.startswith("torch.nn"):
            module.register_forward_hook(count)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        levels = list(model.backbone(torch.empty(1, 3, 800, 1280, device="meta")).values())
        if not hasattr(model, "rpn"):
            model.head(levels)
        else:
            heads = model.roi_heads
            model.rpn.head(levels)
            heads.box_predictor(heads.box_head(torch.empty(1000, 256, 7, 7, device="meta")))
            if heads.has_mask():
                masks = heads.mask_head(torch.empty(100, 256, 14, 14, device="meta"))
                if isinstance(heads.mask_head[0][0], nn.Conv2d):
                    return counter.get_total_flops() / 2 + elementwise
                heads.mask_predictor(masks)
    return counter.get_total_flops() / 2 + elementwise


@pytest.mark.parametrize(("family", "neck", "head", "parameters", "operations"), SYSTEMS)
def test_published_sizes(family, neck, head, parameters, operations):
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = create_model(f"{family}_rednet50", neck=neck, head=head)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained / 1e6 == pytest.approx(parameters, abs=0.005)
    assert published_count(model.eval()) / 1e9 == pytest.approx(operations, rel=0.005)
