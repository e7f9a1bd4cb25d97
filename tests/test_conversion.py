"""Involution in networks of others, and models kept on disk."""

import json
import re

import pytest
import torch
from torch import nn

from pyinvolution import Involution2d, convert
from pyinvolution.models import RedNet, create_model, from_pretrained, save_pretrained

IMAGE = torch.randn(2, 3, 64, 64)


def involutions(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Involution2d)}


@pytest.mark.parametrize("source", ["torchvision", "timm"])
def test_resnet(source):
    """Every 3x3 convolution of the blocks, and nothing else."""
    library = pytest.importorskip(f"{source}.models" if source == "torchvision" else source)
    model = library.resnet50() if source == "torchvision" else library.create_model("resnet50")
    before = model.state_dict()
    model.eval()
    model.layer2.train()
    assert convert(model, kernel_size=5) is model
    found = involutions(model)
    assert sorted(found) == sorted(f"layer{i + 1}.{j}.conv2" for i, n in enumerate((3, 4, 6, 3)) for j in range(n))
    assert {module.kernel_size for module in found.values()} == {(5, 5)}
    assert [found[f"layer{i}.0.conv2"].stride for i in (1, 2)] == [(1, 1), (2, 2)]
    assert found["layer2.0.conv2"].training
    assert not found["layer3.0.conv2"].training
    for name, value in model.state_dict().items():
        if ".conv2." not in name:
            assert value is before[name] or torch.equal(value, before[name])
    output = model.train()(IMAGE)
    assert output.shape == (2, 1000)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_keeps_sizes_and_attributes():
    convolution = nn.Conv2d(32, 48, 3, (2, 1), 2, dilation=2, dtype=torch.float64)
    involution = convert(convolution.eval())
    assert isinstance(involution, Involution2d)
    assert not involution.training
    x = torch.randn(1, 32, 9, 10, dtype=torch.float64)
    assert involution(x).shape == convolution(x).shape
    assert involution.project.bias is not None


def test_match():
    def build():
        shared = nn.Conv2d(16, 16, 3, padding=1)
        return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), shared, shared, nn.Conv2d(16, 16, 5, padding=2))

    model = convert(build())
    assert [type(layer) for layer in model] == [nn.Conv2d, Involution2d, Involution2d, nn.Conv2d]
    assert model[1] is model[2]
    assert [*involutions(convert(build(), "[12]"))] == ["1"]
    assert [*involutions(convert(build(), re.compile("^[12]$")))] == ["1"]
    # Of what a pattern picks, the 3x3 convolutions.
    assert [*involutions(convert(build()[1:], "*"))] == ["1"]
    assert [*involutions(convert(build(), lambda name, conv: name == "0", group_channels=3, reduction=1))] == ["0"]
    for match, options, message in (
        ("3", {}, r"match picks 3, which no involution can replace: kernel_size is \(5, 5\), expected \(3, 3\)"),
        ("0", {}, "group_channels=16 does not divide its 3 channels"),
        ("*", {}, "match picks 0, .*group_channels=16 does not divide its 3 channels"),
        ("conv*", {}, "match='conv\\*' picks no convolution of Sequential"),
        (None, {"group_channels": 5}, "picks no convolution"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(build(), match, **options)
    with pytest.raises(TypeError, match="stride comes from each convolution"):
        convert(build(), stride=2)
    with pytest.raises(TypeError, match="match is 3, expected None, a pattern or a function"):
        convert(build(), 3)
    with pytest.raises(TypeError, match="model is a str, expected a module"):
        convert("resnet50")


def test_groups_and_second_calls():
    layers = [nn.Conv2d(32, 32, 3, 2, 1, groups=groups) for groups in (1, 4, 32)]
    network = convert(nn.Sequential(*layers))
    assert [*involutions(network)] == ["0", "1"]
    before = list(network)
    assert list(convert(network)) == before
    assert list(convert(network, "[01]")) == before
    with pytest.raises(ValueError, match="picks no convolution"):
        convert(network, "conv*")
    assert [*involutions(convert(network, "2"))] == ["0", "1", "2"]
    assert network(IMAGE.repeat(1, 11, 1, 1)[:, :32]).shape == (2, 32, 8, 8)


def test_dilated_resnet():
    models = pytest.importorskip("torchvision.models")
    model = models.resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    backbone = nn.Sequential(*list(model.children())[:-2])
    with torch.no_grad():
        shape = backbone(IMAGE).shape
        convert(model)
        assert backbone(IMAGE).shape == shape == (2, 2048, 8, 8)
    assert model.layer4[2].conv2.dilation == (4, 4)


def small(**kwargs):
    options = {"layers": [1, 1], "stem": "small", "stem_channels": 32, "base_channels": 16, "num_classes": 4}
    return create_model("rednet", **options | kwargs)


def test_pretrained_round_trip(tmp_path):
    pytest.importorskip("safetensors")
    model = small()
    model(IMAGE)
    assert save_pretrained(model, tmp_path / "model") == tmp_path / "model"
    again = from_pretrained(tmp_path / "model")
    assert isinstance(again, RedNet)
    assert again.training
    torch.testing.assert_close(again.eval()(IMAGE), model.eval()(IMAGE), rtol=0, atol=0)
    assert from_pretrained(tmp_path / "model", grad_checkpointing=True).state_dict().keys() == model.state_dict().keys()
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    # Files of others would be read with code, these cannot hold any.
    assert json.loads((tmp_path / "model" / "config.json").read_text())["name"] == "rednet"


def test_pretrained_keeps_the_dtype(tmp_path):
    pytest.importorskip("safetensors")
    again = from_pretrained(save_pretrained(small().half(), tmp_path))
    assert {value.dtype for value in again.parameters()} == {torch.float16}
    assert all(value.requires_grad for value in again.parameters())


def test_a_failed_save_keeps_what_was_there(tmp_path, monkeypatch):
    torch_files = pytest.importorskip("safetensors.torch")
    from safetensors import SafetensorError

    def full(state, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    model = small()
    save_pretrained(model, tmp_path)
    monkeypatch.setattr(torch_files, "save_file", full)
    with pytest.raises(OSError, match=r"cannot write .*model\.safetensors: No space left"):
        save_pretrained(small(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    torch.testing.assert_close(from_pretrained(tmp_path).state_dict(), model.state_dict(), rtol=0, atol=0)


def test_pretrained_errors(tmp_path):
    pytest.importorskip("safetensors")
    with pytest.raises(TypeError, match="expected one that create_model has built"):
        save_pretrained(RedNet((1, 1)), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no .*config\.json"):
        from_pretrained(tmp_path)
    folder = save_pretrained(small(), tmp_path)
    with pytest.raises(
        ValueError,
        match=r"of 'rednet' by config.json, is of another model: .*first, head\.bias, is \(4,\), expected \(5,\)",
    ):
        from_pretrained(folder, num_classes=5)
    config, weights = (folder / "config.json").read_text(), (folder / "model.safetensors").read_bytes()
    for damaged in ("", "[1]", '{"layers": 3}', "\x00"):
        (folder / "config.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"config\.json does not name a model"):
            from_pretrained(folder)
    known = json.loads(config)
    for changed in ({"later": 1}, {"layers": "abc"}, {"name": "rednet50"}, {"name": [1]}, {"base_channels": 10**14}):
        (folder / "config.json").write_text(json.dumps(known | changed))
        with pytest.raises(ValueError, match=r"config\.json does not describe a model of this library"):
            from_pretrained(folder)
    (folder / "config.json").write_text(config)
    for bytes in (b"", weights[:100], b"\xff" * 200):
        (folder / "model.safetensors").write_bytes(bytes)
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
            from_pretrained(folder)
