"""Checkpoints of every origin, read in one place."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pyinvolution.models import checkpoint, create_model, loading, official_state_dict

SMALL = {"layers": [1, 1], "stem_channels": 32, "base_channels": 16, "num_classes": 4}
SEEN = {"hyper_parameters": {"name": "rednet"}, "pytorch-lightning_version": "2"}


def rednet() -> nn.Module:
    model = create_model("rednet", **SMALL)
    for value in model.state_dict().values():
        value.copy_(torch.rand_like(value, dtype=torch.float32))
    return model


def formats(model: nn.Module) -> dict[str, tuple[str, dict[str, Any]]]:
    ours, theirs = dict(model.state_dict()), official_state_dict(model)
    under_net = {f"net.{key}": value for key, value in ours.items()}
    return {
        "state dict": ("library", ours),
        "under state_dict": ("library", {"state_dict": ours}),
        "recipe": ("recipe", {"state_dict": under_net, **SEEN}),
        "weights of a recipe": ("library", under_net),
        "authors": ("authors", {"state_dict": theirs, "meta": {"epoch": 3}}),
        "authors, parallel": ("authors", {f"module.{key}": value for key, value in theirs.items()}),
        "authors, backbone": (
            "authors",
            {k.removeprefix("backbone."): v for k, v in theirs.items() if k.startswith("backbone.")},
        ),
    }


@pytest.mark.parametrize("name", [*formats(rednet())])
@pytest.mark.parametrize("in_file", [True, False])
def test_origin_and_load(name: str, in_file: bool, tmp_path: Path) -> None:
    source = rednet()
    origin, content = formats(source)[name]
    assert checkpoint.origin(content) == origin
    given: Any = content
    if in_file:
        given = tmp_path / "weights.pth"
        torch.save(content, given)
        read = checkpoint.read(given)
        assert read.keys() == content.keys()
    options = {**SMALL, "num_classes": 0} if name == "authors, backbone" else SMALL
    model = loading.load(create_model("rednet", **options), given)
    for key, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key


@pytest.mark.parametrize("name", ["detector", "segmentation", "resnet detector", "classifier", "authors"])
def test_backbone_of_every_network(name: str) -> None:
    pytest.importorskip("torchvision")
    source, options = rednet(), {**SMALL, "num_classes": 0, "global_pool": ""}
    body = create_model("rednet", **options)
    if name == "resnet detector":
        from pyinvolution.models.resnet_blocks import ResNetFeatures

        # Its stem is numbered as the authors' is.
        source, body = ResNetFeatures(), ResNetFeatures()
    before = {key: value.clone() for key, value in source.state_dict().items()}
    content = {
        "detector": lambda: {f"net.backbone.body.{k}": v for k, v in before.items()} | {"net.rpn.x": torch.ones(1)},
        "resnet detector": lambda: {f"net.backbone.body.{k}": v for k, v in before.items()},
        "segmentation": lambda: {f"backbone.{k}": v for k, v in before.items()},
        "classifier": lambda: before,
        "authors": lambda: official_state_dict(source),
    }[name]()
    loading.load_backbone(body, content)
    for key, value in body.state_dict().items():
        assert torch.equal(value, before[key]), key
    content.pop(next(key for key in content if "layer1" in key))
    with pytest.raises(ValueError, match=r"missing.*layer1|layer1.*is missing, expected"):
        loading.load_backbone(body, content)


def test_what_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    model, other = rednet(), create_model("rednet", **{**SMALL, "num_classes": 5})
    before = {key: value.clone() for key, value in other.state_dict().items()}
    first = r"2 of \d+ entries differ in name or shape; the first, head\.bias, is \(4,\), expected \(5,\)"
    with pytest.raises(ValueError, match=f"the checkpoint is of another model: {first}"):
        loading.load(other, model.state_dict())
    with pytest.raises(ValueError, match=r"more, is \(1,\), expected no such entry"):
        loading.load(other, {**before, "more": torch.ones(1)})
    with pytest.raises(ValueError, match="holds no weights"):
        loading.load(other, {})
    with pytest.raises(ValueError, match=r"head\.bias, is a str, expected \(5,\)"):
        loading.load(other, {**before, "head.bias": "text"})
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth is not a checkpoint.*: it holds a list, expected a dict"):
        loading.load(other, tmp_path / "list.pth")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.pth"):
        checkpoint.read(tmp_path / "none.pth")
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
