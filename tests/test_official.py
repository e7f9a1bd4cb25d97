"""Checkpoints in the format of the authors' code, against a forward pass written over that format's keys."""

import datetime

import pytest
import torch
from torch.nn import functional as F

from pyinvolution.models import create_model, list_models, load_official, official_state_dict
from pyinvolution.models.rednet import LAYERS

NARROW = {"stem_channels": 32, "base_channels": 16, "num_classes": 10, "dtype": torch.float64}


def checkpoint(layers, stem=32, base=16, classes=10, dtype=torch.float64, seed=0):
    """A state dict as the authors' classifier of this shape would save it, every entry random."""
    draw = torch.Generator().manual_seed(seed)
    entries = {}

    def conv(name, channels_out, channels_in, kernel=1, gain=1.0, bias=False):
        weight = torch.randn(channels_out, channels_in, kernel, kernel, generator=draw, dtype=dtype)
        entries[f"{name}.weight"] = weight * gain / (channels_in * kernel**2) ** 0.5
        if bias:
            entries[f"{name}.bias"] = torch.randn(channels_out, generator=draw, dtype=dtype) * 0.1

    def norm(name, channels, gain=1.0):
        for entry, spread, middle in (("weight", 0.5, gain), ("bias", 0.2, 0), ("running_mean", 0.2, 0)):
            entries[f"{name}.{entry}"] = middle + spread * (torch.rand(channels, generator=draw, dtype=dtype) - 0.5)
        entries[f"{name}.running_var"] = 0.5 + torch.rand(channels, generator=draw, dtype=dtype)
        entries[f"{name}.num_batches_tracked"] = torch.tensor(17)

    def involution(name, channels, kernel):
        conv(f"{name}.conv1.conv", channels // 4, channels)
        norm(f"{name}.conv1.bn", channels // 4)
        conv(f"{name}.conv2.conv", kernel**2 * (channels // 16), channels // 4, gain=1 / kernel, bias=True)

    conv("backbone.stem.0.conv", stem // 2, 3, 3)
    norm("backbone.stem.0.bn", stem // 2)
    involution("backbone.stem.1", stem // 2, 3)
    norm("backbone.stem.2", stem // 2)
    conv("backbone.stem.4.conv", stem, stem // 2, 3)
    norm("backbone.stem.4.bn", stem)
    channels = stem
    for stage, depth in enumerate(layers, start=1):
        mid = base * 2 ** (stage - 1)
        for index in range(depth):
            name = f"backbone.layer{stage}.{index}"
            conv(f"{name}.conv1", mid, channels)
            norm(f"{name}.bn1", mid)
            involution(f"{name}.conv2", mid, 7)
            norm(f"{name}.bn2", mid)
            conv(f"{name}.conv3", 4 * mid, mid)
            norm(f"{name}.bn3", 4 * mid, gain=0.4)
            if index == 0:
                conv(f"{name}.downsample.0", 4 * mid, channels)
                norm(f"{name}.downsample.1", 4 * mid)
            channels = 4 * mid
    entries["head.fc.weight"] = torch.randn(classes, channels, generator=draw, dtype=dtype)
    entries["head.fc.bias"] = torch.randn(classes, generator=draw, dtype=dtype)
    return entries


def forward(entries, layers, x):
    """Logits and stage features of the authors' network, from its state dict alone."""

    def conv(name, x, stride=1, padding=0):
        return F.conv2d(x, entries[f"{name}.weight"], entries.get(f"{name}.bias"), stride, padding)

    def norm(name, x):
        weight, bias, mean, var = (entries[f"{name}.{e}"] for e in ("weight", "bias", "running_mean", "running_var"))
        return F.batch_norm(x, mean, var, weight, bias)

    def involution(name, x, kernel, stride=1):
        n, channels, height, width = x.shape
        pooled = F.avg_pool2d(x, stride, stride) if stride > 1 else x
        weight = conv(f"{name}.conv2.conv", norm(f"{name}.conv1.bn", conv(f"{name}.conv1.conv", pooled)).relu())
        weight = weight.view(n, channels // 16, 1, kernel**2, -1)
        patches = F.unfold(x, kernel, 1, (kernel - 1) // 2, stride).view(n, channels // 16, 16, kernel**2, -1)
        return (weight * patches).sum(3).view(n, channels, height // stride, width // stride)

    x = norm("backbone.stem.0.bn", conv("backbone.stem.0.conv", x, 2, 1)).relu()
    x = norm("backbone.stem.2", involution("backbone.stem.1", x, 3)).relu()
    x = norm("backbone.stem.4.bn", conv("backbone.stem.4.conv", x, 1, 1)).relu()
    x = F.max_pool2d(x, 3, 2, 1)
    stages = []
    for stage, depth in enumerate(layers, start=1):
        for index in range(depth):
            name, stride = f"backbone.layer{stage}.{index}", 2 if stage > 1 and index == 0 else 1
            out = norm(f"{name}.bn1", conv(f"{name}.conv1", x)).relu()
            out = norm(f"{name}.bn2", involution(f"{name}.conv2", out, 7, stride)).relu()
            out = norm(f"{name}.bn3", conv(f"{name}.conv3", out))
            if index == 0:
                x = norm(f"{name}.downsample.1", conv(f"{name}.downsample.0", x, stride))
            x = (out + x).relu()
        stages.append(x)
    return F.linear(x.mean((2, 3)), entries["head.fc.weight"], entries["head.fc.bias"]), stages


@pytest.fixture
def entries():
    return checkpoint((1, 2, 4, 1))


@pytest.fixture
def model():
    return create_model("rednet26", **NARROW)


@pytest.mark.parametrize("depth", LAYERS)
def test_outputs(depth, tmp_path):
    layers = LAYERS[depth]
    entries = checkpoint(layers)
    torch.save({"meta": {"epoch": 130, "CLASSES": ["tench"]}, "state_dict": entries}, tmp_path / "official.pth")
    model = create_model(f"rednet{depth}", **NARROW).eval()
    assert load_official(model, tmp_path / "official.pth") is model
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        logits, stages = forward(entries, layers, x)
        torch.testing.assert_close(model(x), logits, rtol=1e-9, atol=1e-9)
        for feature, expected in zip(model.features(x), stages, strict=True):
            torch.testing.assert_close(feature, expected, rtol=1e-9, atol=1e-9)


def test_full_size_in_single_precision():
    entries = checkpoint(LAYERS[26], 64, 64, 1000, torch.float32)
    model = load_official(create_model("rednet26"), entries).eval()
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        expected = forward(entries, LAYERS[26], x)[0]
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_every_name_has_its_counterpart(entries, model):
    assert len(LAYERS) == len(list_models("rednet*"))
    for name, depth in zip(list_models("rednet*"), LAYERS, strict=True):
        there = {key: value.shape for key, value in checkpoint(LAYERS[depth]).items()}
        here = official_state_dict(create_model(name, **NARROW))
        assert {key: value.shape for key, value in here.items()} == there
    back = official_state_dict(load_official(model, entries))
    assert all(torch.equal(back[key], value) for key, value in entries.items())


@pytest.mark.parametrize("form", ["plain", "module", "half", "meta", "legacy"])
def test_forms_of_the_file(form, entries, model, tmp_path):
    numpy = pytest.importorskip("numpy")
    given = entries
    if form == "module":
        given = {f"module.{key}": value for key, value in entries.items()}
    elif form == "half":
        given = {key: value.half() if value.is_floating_point() else value for key, value in entries.items()}
    elif form == "meta":
        meta = {"time": datetime.datetime(2021, 3, 10), "best": numpy.float64(0.78), "iter": numpy.int64(3)}
        given = {"state_dict": entries, "meta": meta, "optimizer": {"param_groups": [{"lr": 0.8}]}}
    path = tmp_path / "official.pth"
    torch.save(given, path, _use_new_zipfile_serialization=form != "legacy")
    load_official(model, str(path))
    tolerance = 1e-3 if form == "half" else 0
    for key, value in official_state_dict(model).items():
        torch.testing.assert_close(value, entries[key], rtol=tolerance, atol=tolerance)


def test_backbone_alone(entries, model):
    backbone = {key: value for key, value in entries.items() if key.startswith("backbone.")}
    detector = {**backbone, "neck.fpn_convs.0.conv2.conv.bias": torch.zeros(8)}
    bare = {key.removeprefix("backbone."): value for key, value in backbone.items()}
    for given in (backbone, detector, bare, entries):
        headless = load_official(create_model("rednet26", **{**NARROW, "num_classes": 0}), given)
        assert torch.equal(headless.layer4[0].conv3.weight, entries["backbone.layer4.0.conv3.weight"])
        kept = model.head.weight.clone()
        load_official(model, given, head=False)
        assert torch.equal(model.head.weight, kept)
        assert torch.equal(model.stem.norm2.running_var, entries["backbone.stem.2.running_var"])
    with pytest.raises(ValueError, match=r"missing: head\.fc\.weight, head\.fc\.bias\. The backbone fits: head=False"):
        load_official(model, backbone)


def without(*keys):
    return lambda entries: {key: value for key, value in entries.items() if key not in keys}


def with_entry(key, value):
    return lambda entries: {**entries, key: value}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda entries: checkpoint((2, 3, 5, 2)),
            ValueError,
            "seems to be RedNet-38 .* the model, RedNet-26; unexpected",
        ),
        (
            lambda entries: checkpoint((1, 1)),
            ValueError,
            r"seems to be a RedNet with layers=\(1, 1\) .*; missing",
        ),
        (
            without("backbone.layer3.2.conv2.conv1.bn.running_mean"),
            ValueError,
            r"RedNet-26; missing: backbone\.layer3\.2\.conv2\.conv1\.bn\.running_mean$",
        ),
        (
            without("backbone.stem.0.bn.num_batches_tracked"),
            ValueError,
            r"missing: backbone\.stem\.0\.bn\.num",
        ),
        (
            with_entry("backbone.layer1.0.se.weight", torch.zeros(1)),
            ValueError,
            r"unexpected: backbone\.layer1\.0\.se",
        ),
        (
            with_entry("backbone.stem.1.conv2.conv.weight", torch.zeros(49, 4, 1, 1)),
            ValueError,
            r"wrong shape: backbone\.stem\.1\.conv2\.conv\.weight is \(49, 4, 1, 1\), .* has \(9, 4, 1, 1\)",
        ),
        (
            lambda entries: checkpoint((1, 2, 4, 1), classes=7),
            ValueError,
            r"head\.fc\.weight is \(7, 512\), the model has \(10, 512\).*head=False",
        ),
        (
            with_entry("backbone.stem.2.bias", [0.0]),
            TypeError,
            r"has a list at 'backbone\.stem\.2\.bias', expected",
        ),
        (lambda entries: {"weight": torch.zeros(1)}, ValueError, r"has weight, expected entries 'backbone\.\*'"),
        (lambda entries: {}, ValueError, "has nothing, expected entries"),
        (lambda entries: list(entries), TypeError, "is a list, expected a dict of tensors"),
    ],
)
def test_what_does_not_fit(change, error, message, entries, model):
    before = official_state_dict(model)
    before = {key: value.clone() for key, value in before.items()}
    with pytest.raises(error, match=message):
        load_official(model, change(entries))
    assert all(torch.equal(value, before[key]) for key, value in official_state_dict(model).items())


class Payload:
    def __reduce__(self):
        return (pytest.fail, ("the file was executed",))


def test_unreadable_files(entries, model, tmp_path):
    path = tmp_path / "official.pth"
    torch.save({"state_dict": entries, "meta": Payload()}, path)
    with pytest.raises(ValueError, match=r"official\.pth.* will not be executed.*save only its state dict"):
        load_official(model, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"official\.pth"):
        load_official(model, path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"official\.pth"):
        load_official(model, path)
    with pytest.raises(FileNotFoundError):
        load_official(model, tmp_path / "missing.pth")
    with pytest.raises(TypeError, match=r"model is a dict, expected a torch\.nn\.Module"):
        load_official(entries, model)
