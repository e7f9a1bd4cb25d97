"""Semantic FPN and UPerNet: sizes against the published ones, and what the heads compute."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pyinvolution import optimize_for_inference
from pyinvolution.models import create_model, load_official, official_state_dict

pytest.importorskip("timm")

TINY = {"layers": (1, 1, 1, 1), "base_channels": 16, "stem_channels": 32}

# Name, neck, published parameters in M and multiply-adds in G; the baselines' from the reductions beside them.
PUBLISHED = [
    ("semantic_fpn_rednet50", {"neck": "conv"}, 18.5, 293.9),
    ("semantic_fpn_rednet50", {"neck": "involution"}, 16.4, 205.2),
    ("upernet_rednet50", {}, 56.4, 1825.6),
    ("semantic_fpn_resnet50", {}, 28.5, 362.8),
    ("upernet_resnet50", {}, 66.4, 1893.8),
]


def tiny(name, **options):
    return create_model(name, backbone="rednet", backbone_options=TINY, **options)


def multiply_adds(model, height, width):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        logits = model.eval()(torch.empty(1, 3, height, width, device="meta"))
    assert logits.shape == (1, 19, height, width)
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize(("name", "options", "parameters", "published"), PUBLISHED)
def test_published_sizes(name, options, parameters, published):
    with torch.device("meta"):
        model = create_model(name, **options)
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - parameters) < 0.05
    # The published counts are of a whole image, and contain about 1 G of element-wise operations.
    whole = multiply_adds(model, 1024, 2048)
    assert 0 < published - whole < 1.3
    assert multiply_adds(model, 512, 1024) == pytest.approx(whole / 4, rel=1e-3)


def test_every_depth_and_option():
    with torch.device("meta"):
        deep = create_model(
            "semantic_fpn_rednet101", num_classes=7, neck="involution", backbone_options={"frozen_stages": 1}
        )
        assert len(deep.backbone.layer3) == 23
        assert deep(torch.empty(2, 3, 64, 96, device="meta")).shape == (2, 7, 64, 96)
        assert deep.backbone.stem.involution.kernel_size == (7, 7), "as in the authors' segmentation code"
        plain = create_model(
            "upernet", backbone="rednet", auxiliary_channels=0, backbone_options=TINY | {"stem_kernel_size": 3}
        )
        assert plain.auxiliary_head is None
        assert plain.backbone.stem.involution.kernel_size == (3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "semantic_fpn_rednet50", "neck": "none"}, "neck is 'none', expected 'conv' or 'involution'"),
        ({"name": "semantic_fpn_rednet50", "dropout": 1.5}, r"dropout is 1.5, expected a value in \[0, 1\)"),
        ({"name": "semantic_fpn_rednet50", "num_classes": 0}, "num_classes is 0, expected at least 1"),
        ({"name": "upernet_rednet50", "pool_scales": (1, 0)}, "pool_scales is 0, expected at least 1"),
        ({"name": "upernet", "backbone": "rednet51"}, "backbone is 'rednet51', expected a RedNet, 'searchable' or"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        create_model(**arguments)


def test_semantic_fpn_head_sums_its_branches():
    """By the definition: convolution and doubling until a level has the first one's size, then the sum."""
    torch.manual_seed(0)
    model = tiny("semantic_fpn", neck_channels=16, head_channels=8, num_classes=3).eval()
    head = model.decode_head
    for norm in (module for module in head.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_(std=0.1)
    levels = [torch.randn(2, 16, 16 >> i, 24 >> i) for i in range(4)]
    total = 0
    for index, (branch, level) in enumerate(zip(head.scale_heads, levels, strict=True)):
        convs = [m for m in branch.modules() if isinstance(m, nn.Conv2d)]
        norms = [m for m in branch.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(convs) == max(index, 1)
        for conv, norm in zip(convs, norms, strict=True):
            level = nn.functional.conv2d(level, conv.weight, padding=1)
            level = torch.relu((level - norm.running_mean.view(-1, 1, 1)) / (1 + norm.eps) ** 0.5)
            if index:
                level = nn.functional.interpolate(level, scale_factor=2, mode="bilinear", align_corners=False)
        total = total + level
    expected = torch.einsum("oc,nchw->nohw", head.conv_seg.weight[:, :, 0, 0], total) + head.conv_seg.bias.view(
        -1, 1, 1
    )
    torch.testing.assert_close(head(levels), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["semantic_fpn", "upernet"])
def test_odd_sizes_gradients_and_inference(name):
    torch.manual_seed(0)
    model = tiny(name, head_channels=16, num_classes=5)
    images = torch.randn(2, 3, 67, 45)
    model.return_auxiliary = True
    outputs = model(images)
    if name == "upernet":
        assert [tuple(output.shape) for output in outputs] == [(2, 5, 67, 45)] * 2
    else:
        assert outputs.shape == (2, 5, 67, 45)
    sum(output.square().mean() for output in outputs).backward()
    assert all(p.grad is not None for p in model.parameters())
    deployed = optimize_for_inference(model, images)
    torch.testing.assert_close(deployed(images), model.eval()(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("neck", ["conv", "involution"])
def test_official_checkpoint(neck):
    """The keys of mmseg, spelled out for one layer of each kind; then there and back."""
    torch.manual_seed(0)
    model = tiny("semantic_fpn", neck=neck, neck_channels=16, head_channels=8, num_classes=3)
    state = official_state_dict(model)
    expected = {
        "backbone.stem.1.conv2.conv.bias": model.backbone.stem.involution.span.bias,
        "backbone.layer4.0.conv2.conv1.bn.running_var": model.backbone.layer4[0].involution.reduce.norm.running_var,
        "neck.lateral_convs.3.conv.bias": model.neck.inner_blocks[3][0].bias,
        "decode_head.scale_heads.0.0.conv.weight": model.decode_head.scale_heads[0][0][0].weight,
        "decode_head.scale_heads.3.4.bn.running_mean": model.decode_head.scale_heads[3][4][1].running_mean,
        "decode_head.conv_seg.bias": model.decode_head.conv_seg.bias,
    }
    if neck == "conv":
        expected["neck.fpn_convs.0.conv.weight"] = model.neck.layer_blocks[0][0].weight
    else:
        expected["neck.fpn_convs.0.conv1.conv.weight"] = model.neck.layer_blocks[0].reduce.conv.weight
        expected["neck.fpn_convs.2.conv2.conv.weight"] = model.neck.layer_blocks[2].span.weight
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value.detach(), msg=key)
    other = tiny("semantic_fpn", neck=neck, neck_channels=16, head_channels=8, num_classes=3)
    load_official(other, {"state_dict": state})
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_official_upernet_and_baseline_names():
    model = tiny("upernet", head_channels=8, num_classes=3)
    names = set(official_state_dict(model))
    for layer in (
        "decode_head.psp_modules.1.1",
        "decode_head.bottleneck",
        "decode_head.lateral_convs.0",
        "decode_head.fpn_convs.2",
        "decode_head.fpn_bottleneck",
        "auxiliary_head.convs.0",
    ):
        assert {f"{layer}.conv.weight", f"{layer}.bn.weight", f"{layer}.bn.num_batches_tracked"} <= names
    assert "auxiliary_head.conv_seg.weight" in names
    with torch.device("meta"):
        names = set(official_state_dict(create_model("semantic_fpn_resnet50")))
    stem = {"backbone.stem.0.weight", "backbone.stem.1.running_var", "backbone.stem.6.weight", "backbone.stem.7.bias"}
    assert stem | {"backbone.layer1.0.bn3.weight", "backbone.layer2.0.downsample.0.weight"} <= names


def test_classifier_as_backbone():
    torch.manual_seed(0)
    classifier = create_model("rednet", num_classes=10, stem_kernel_size=7, **TINY)
    model = tiny("semantic_fpn", neck_channels=16)
    with pytest.warns(UserWarning, match="neck, decode_head"):
        load_official(model, official_state_dict(classifier))
    assert torch.equal(model.backbone.layer4[0].conv3.weight, classifier.layer4[0].conv3.weight)
