"""Detectors: published sizes, features and heads from official checkpoints, and what differs from torchvision's."""

import math
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


@pytest.mark.parametrize("family", ["faster_rcnn", "mask_rcnn", "retinanet"])
def test_every_depth_has_a_name(family):
    assert list_models(f"{family}_rednet*") == [f"{family}_rednet{depth}" for depth in (26, 38, 50, 101, 152)]


# --- Official checkpoints ---------------------------------------------------------------------------------------------


def official_neck(entries, maps, kind, extra):
    """The levels that the authors' neck makes of the backbone's maps, from its state dict alone."""

    def conv(name, x, **more):
        return F.conv2d(x, entries[f"{name}.weight"], entries[f"{name}.bias"], **more)

    def involution(name, x):
        n, channels, height, width = x.shape
        bn = f"{name}.conv1.bn"
        hidden = F.conv2d(x, entries[f"{name}.conv1.conv.weight"])
        statistics = (entries[f"{bn}.{entry}"] for entry in ("running_mean", "running_var", "weight", "bias"))
        weight = conv(f"{name}.conv2.conv", F.batch_norm(hidden, *statistics).relu())
        patches = F.unfold(x, 7, padding=3).view(n, channels // 16, 16, 49, height * width)
        return (weight.view(n, channels // 16, 1, 49, -1) * patches).sum(3).view_as(x)

    laterals = [conv(f"neck.lateral_convs.{i}.conv", x) for i, x in enumerate(maps)]
    for i in range(len(maps) - 1, 0, -1):
        laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], laterals[i - 1].shape[2:])
    if kind == "involution":
        outputs = [involution(f"neck.fpn_convs.{i}", x) for i, x in enumerate(laterals)]
    else:
        outputs = [conv(f"neck.fpn_convs.{i}.conv", x, padding=1) for i, x in enumerate(laterals)]
    if not extra:
        return [*outputs, outputs[-1][:, :, ::2, ::2]]
    first = conv("neck.fpn_convs.3.conv", maps[-1], stride=2, padding=1)
    return [*outputs, first, conv("neck.fpn_convs.4.conv", first, stride=2, padding=1)]


@pytest.mark.parametrize(("family", "neck", "head"), KINDS)
def test_features_from_an_official_checkpoint(family, neck, head):
    model = scramble(small(family, neck, head), 1).eval()
    entries = official_state_dict(scramble(small(family, neck, head), 2))
    load_official(model, entries)
    images = torch.rand(2, 3, 64, 104)
    maps = model.backbone.body.features(images)[1 if family == "retinanet" else 0 :]
    expected = official_neck(entries, maps, neck, extra=family == "retinanet")
    found = list(model.backbone(images).values())
    assert [level.shape[1] for level in found] == [32] * 5
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_names_of_an_official_checkpoint():
    names = set(official_state_dict(small("mask_rcnn", "involution", "involution")))
    assert names >= {
        "backbone.stem.1.conv2.conv.bias",
        "backbone.layer4.0.downsample.1.running_var",
        "neck.lateral_convs.3.conv.weight",
        "neck.fpn_convs.3.conv1.bn.running_mean",
        "neck.fpn_convs.3.conv2.conv.bias",
        "rpn_head.rpn_conv.conv1.conv.weight",
        "rpn_head.rpn_cls.weight",
        "rpn_head.rpn_reg.bias",
        "roi_head.bbox_head.shared_fcs.1.weight",
        "roi_head.bbox_head.fc_cls.bias",
        "roi_head.bbox_head.fc_reg.weight",
        "roi_head.mask_head.convs.3.0.conv2.conv.weight",
        "roi_head.mask_head.upsample.weight",
        "roi_head.mask_head.conv_logits.bias",
    }
    assert {"rpn_head.rpn_conv.bias", "roi_head.mask_head.convs.3.conv.bias"} < set(
        official_state_dict(small(neck="conv"))
    )
    names = set(official_state_dict(small("retinanet", "conv")))
    assert {f"bbox_head.{kind}_convs.3.conv.weight" for kind in ("cls", "reg")} < names
    assert {"bbox_head.retina_cls.bias", "bbox_head.retina_reg.bias", "neck.fpn_convs.4.conv.bias"} < names


def test_classes_of_an_official_checkpoint():
    """There the classes are 0, 1, 2, then the background; boxes and masks have none for the background."""
    model, entries = small(), official_state_dict(scramble(small()))
    heads = load_official(model, entries).eval().roi_heads
    hidden = torch.randn(5, 1024)
    scores, deltas = heads.box_predictor(hidden)
    box = {name: entries[f"roi_head.bbox_head.{name}"] for name in ("fc_cls.weight", "fc_cls.bias", "fc_reg.weight")}
    assert box["fc_cls.weight"].shape == (4, 1024)
    assert box["fc_reg.weight"].shape == (12, 1024)
    theirs = F.linear(hidden, box["fc_cls.weight"], box["fc_cls.bias"])
    torch.testing.assert_close(scores, theirs[:, [3, 0, 1, 2]])
    torch.testing.assert_close(
        deltas[:, 4:], F.linear(hidden, box["fc_reg.weight"], entries["roi_head.bbox_head.fc_reg.bias"])
    )
    maps = torch.randn(5, 32, 14, 14)
    up = F.conv_transpose2d(
        maps, *(entries[f"roi_head.mask_head.upsample.{name}"] for name in ("weight", "bias")), stride=2
    )
    logits = F.conv2d(up.relu(), *(entries[f"roi_head.mask_head.conv_logits.{name}"] for name in ("weight", "bias")))
    torch.testing.assert_close(heads.mask_predictor(maps)[:, 1:], logits)


@pytest.mark.parametrize(("family", "neck", "head"), KINDS)
def test_same_detections_after_a_round_trip(family, neck, head):
    one = scramble(small(family, neck, head)).eval()
    other = load_official(small(family, neck, head), official_state_dict(one)).eval()
    images, _ = samples()
    for ours, theirs in zip(one(images), other(images), strict=True):
        for name in ours:
            # Four random involutions on end overflow: an involution squares what it gets.
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, equal_nan=True)


def test_parts_of_a_checkpoint():
    entries = official_state_dict(scramble(small()))
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    some = {name: value for name, value in entries.items() if name.startswith(("backbone.", "neck.", "roi_head.bbox"))}
    with pytest.warns(UserWarning, match=r"lacks rpn_head, roi_head.mask_head, which the model keeps") as caught:
        load_official(model, some)
    assert len(caught) == 1
    after = official_state_dict(model)
    assert all(torch.equal(after[name], value) for name, value in some.items())
    kept = [name for name in before if name.startswith(("rpn.", "roi_heads.mask"))]
    assert kept
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in kept)

    classifier = {name: value for name, value in entries.items() if name.startswith("backbone.")}
    classifier |= {"head.fc.weight": torch.zeros(10, 512)}
    with pytest.warns(UserWarning, match=r"lacks neck, rpn_head, .* and has head.fc.weight, for which .* no place"):
        load_official(small(), classifier)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_official(small(), {**classifier, **some}, head=False)
        load_official(
            create_model("rednet", layers=[1] * 4, stem_kernel_size=7, stem_channels=32, base_channels=16),
            entries,
            head=False,
        )


def test_parts_that_do_not_fit():
    entries = official_state_dict(small())
    model = scramble(small())
    before = official_state_dict(model)

    def refused(entries, match):
        with pytest.raises(ValueError, match=match):
            load_official(model, entries)
        assert all(torch.equal(value, before[name]) for name, value in official_state_dict(model).items())

    refused(
        official_state_dict(small(num_classes=5)), r"fc_cls.weight is \(5, 1024\), .*\(4, 1024\).*head=False loads it"
    )
    refused(
        {name: value for name, value in entries.items() if "rpn_reg.bias" not in name}, "missing: rpn_head.rpn_reg.bias"
    )
    refused({**entries, "neck.fpn_convs.4.conv.bias": torch.zeros(32)}, "unexpected: neck.fpn_convs.4.conv.bias")
    refused(official_state_dict(small(neck="conv")), "missing: neck.fpn_convs.0.conv1.conv.weight")
    stem = create_model("rednet", layers=[1] * 4, stem_channels=32, base_channels=16)
    refused(official_state_dict(stem), "in its stem is 3x3, the model's 7x7.*stem_kernel_size=3")


# --- What differs from torchvision ------------------------------------------------------------------------------------


def test_anchors():
    """Not rounded, and at the strides of the levels also where a pooled map has an odd size."""
    model = small(min_size=100, max_size=150).eval()
    images, _ = model.transform([torch.rand(3, 100, 150)])
    levels = list(model.backbone(images.tensors).values())
    assert [level.shape[2] for level in levels] == [32, 16, 8, 4, 2]
    (anchors,) = model.rpn.anchor_generator(images, levels)
    counts = [3 * level.shape[2] * level.shape[3] for level in levels]
    for stride, part in zip((4, 8, 16, 32, 64), anchors.split(counts), strict=True):
        side = 8 * stride
        expected = [[-side / 2**0.5, -side / 8**0.5], [-side / 2, -side / 2], [-side / 8**0.5, -side / 2**0.5]]
        torch.testing.assert_close(part[:3, :2], torch.tensor(expected))
        torch.testing.assert_close(part[3:6] - part[:3], torch.tensor([[stride, 0.0, stride, 0.0]] * 3))
    scales = (4, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3))
    cell = Anchors([8], scales, (0.5, 1.0)).cell_anchors[0]
    torch.testing.assert_close(cell[3:, 2], torch.tensor(scales) * 4)
    assert cell.shape == (6, 4)


def test_roi_align_has_no_offset():
    """On a map of coordinates, a bin is the coordinate of its centre."""
    strides = (4, 8, 16)
    maps = {}
    for index, stride in enumerate(strides):
        centres = (torch.arange(512 // stride) + 0.5) * stride
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        maps[str(index)] = torch.stack([x, y, torch.full_like(x, index)])[None].double()
    boxes = torch.tensor([[100.0, 50, 211, 161], [60, 70, 173, 183], [40, 30, 263, 253], [20, 40, 245, 265]]).double()
    pooled = RoIAlign(["0", "1", "2"], strides, 7)(maps, [boxes, boxes[:0]], [(512, 512)] * 2)
    steps = (torch.arange(7) + 0.5) / 7
    centres = boxes[:, :2, None] + steps * (boxes[:, 2:] - boxes[:, :2])[:, :, None]
    torch.testing.assert_close(pooled[:, 0], centres[:, :1].expand(4, 7, 7))
    torch.testing.assert_close(pooled[:, 1], centres[:, 1, :, None].expand(4, 7, 7))
    assert pooled[:, 2, 0, 0].tolist() == [0, 1, 1, 2]  # sides of 111, 113, 223 and 225 pixels


@pytest.mark.parametrize(("family", "neck", "head"), KINDS)
def test_training(family, neck, head):
    """Also on images without objects; frozen parts stay as they are."""
    model = small(family, neck, head).train()
    frozen = {
        name: value.clone()
        for name, value in model.state_dict().items()
        if name.startswith("backbone.body.") and ("stem" in name or "layer1" in name or "running" in name)
    }
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 0.001)
    for objects in (2, 0):
        optimizer.zero_grad()
        loss = sum(model(*samples(objects)).values())
        assert loss.isfinite()
        loss.backward()
        assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
        optimizer.step()
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in frozen.items())
    assert all(value.isfinite().all() for value in state.values())
    assert state["backbone.fpn.inner_blocks.0.0.bias"].abs().max() > 0


def test_boxes_are_precise_under_autocast():
    model = small(min_size=640, max_size=800, box_score_thresh=0.0).eval()
    images, targets = samples()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images)[0]["boxes"].dtype == torch.float32
        losses = model.train()(images, targets)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    levels = [torch.zeros(1, 32, 200, 250, dtype=torch.bfloat16)]
    assert Anchors([4], (8,), (1.0,)).double().generate_anchors((8,), (1.0,)).dtype == torch.float32
    images, _ = model.transform([torch.rand(3, 64, 80)])
    anchors = Anchors([4], (8,), (1.0,))(images, levels)[0]
    assert anchors[-1].tolist() == [249 * 4 - 16, 199 * 4 - 16, 249 * 4 + 16, 199 * 4 + 16]


def test_retinanet_labels():
    """From 1 to the last class, as the other detectors have them, though there is no output for 0."""
    model = small("retinanet", num_classes=3, score_thresh=0.0).train()
    assert model.head.classification_head.cls_logits.out_channels == 2 * 9
    torch.nn.init.constant_(model.head.classification_head.cls_logits.bias.data.view(9, 2)[:, 1], 2.0)
    images, targets = samples()
    for target in targets:
        target["labels"] = torch.tensor([2, 2])
    confident = model(images, targets)["classification"].item()
    for target in targets:
        target["labels"] = torch.tensor([1, 1])
    assert model(images, targets)["classification"].item() > confident
    assert set(model.eval()(images)[0]["labels"][:20].tolist()) == {2}


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"neck": "fpn"}, ValueError, "neck is 'fpn', expected 'conv' or 'involution'"),
        ({"head": "mlp"}, ValueError, "head is 'mlp', expected 'conv' or 'involution'"),
        ({"family": "retinanet", "head": "involution"}, ValueError, "head is 'involution', expected 'conv'"),
        ({"num_classes": 1}, ValueError, "num_classes"),
        ({"levels": [4]}, ValueError, r"levels is \[4\], expected stages from 0 to 3"),
        ({"channels": 0}, ValueError, "channels"),
        ({"box_nms_tresh": 0.3}, TypeError, "MaskRCNN has no argument 'box_nms_tresh'"),
        ({"backbone": nn.Identity()}, ValueError, "expected None with a module as backbone"),
    ],
)
def test_wrong_arguments(arguments, error, match):
    arguments = {"neck": "conv", **arguments}
    family = arguments.pop("family", "mask_rcnn")
    with pytest.raises(error, match=match):
        create_model(family, **{"backbone": "rednet26", "backbone_options": {"stem_kernel_size": 3}, **arguments})


@pytest.mark.parametrize("name", ["faster_rcnn", "mask_rcnn", "retinanet"])
def test_sides_of_boxes_are_limited_both_ways(name):
    """As DeltaXYWHBBoxCoder of mmdet 2: the logarithms of the ratios are clamped to +-log(1000 / 16)."""
    net = create_model(name, num_classes=3, backbone="rednet", backbone_options={"layers": [1, 1, 1, 1]})
    coders = [net.box_coder] if name == "retinanet" else [net.rpn.box_coder, net.roi_heads.box_coder]
    boxes = torch.tensor([[10.0, 20, 60, 100], [0, 0, 30, 10]])
    for coder in coders:
        draw = torch.Generator().manual_seed(0)
        deltas = torch.randn(2, 12, generator=draw) * 8
        deltas[0, 2:4], deltas[1, 6:8] = torch.tensor([-20.0, 20]), torch.tensor([20.0, -20])
        found = coder.decode(deltas * torch.tensor(coder.weights).repeat(3), [boxes])
        assert found.shape == (2, 3, 4)
        limit = math.log(1000 / 16)
        for box, row, results in zip(boxes, deltas.unflatten(1, (3, 4)), found, strict=True):
            size, centre = box[2:] - box[:2], (box[2:] + box[:2]) / 2
            for (*shift, width, height), result in zip(row, results, strict=True):
                sides = size * torch.stack([width, height]).clamp(-limit, limit).exp()
                middle = centre + size * torch.stack(shift)
                torch.testing.assert_close(result, torch.cat([middle - sides / 2, middle + sides / 2]))
