"""RedNet through timm's interface."""

import subprocess
import sys

import pytest
import torch

timm = pytest.importorskip("timm")
pytest.importorskip("timm.optim")

import pyinvolution.timm  # noqa: E402, F401
from pyinvolution.export import load_model  # noqa: E402
from pyinvolution.models import create_model, list_models, official_state_dict  # noqa: E402

IMAGE = torch.randn(1, 3, 64, 64)


def run(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_package_alone_leaves_timm_alone():
    run(
        "import sys; finders = [*sys.meta_path]; import pyinvolution; assert 'timm' not in sys.modules;"
        "assert sys.meta_path == finders; import timm; assert not timm.list_models('rednet*')"
    )


@pytest.mark.parametrize("first", ["import timm, pyinvolution.timm", "import pyinvolution.timm, timm"])
def test_order_of_imports(first):
    run(
        f"{first}; timm.create_model('rednet50', features_only=True); assert len(timm.list_models('rednet*')) == 5;"
        "import importlib; importlib.reload(pyinvolution.timm)"
    )


def test_without_timm():
    run("import sys; sys.modules['timm'] = None; import pyinvolution; pyinvolution.models.create_model('rednet26')")


def test_list():
    assert timm.list_models("rednet*") == list_models("rednet*")
    assert timm.list_pretrained("rednet*") == []


@pytest.mark.parametrize("feature_cls", [None, "dict", "hook", "getter", "fx"])
def test_features_only(feature_cls):
    model = timm.create_model("rednet26", features_only=True, feature_cls=feature_cls).eval()
    with torch.no_grad():
        features = model(IMAGE)
    features = list(features.values()) if isinstance(features, dict) else features
    assert model.feature_info.channels() == [64, 256, 512, 1024, 2048]
    assert model.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert [f.shape[1:] for f in features] == [
        (c, 64 // s, 64 // s)
        for c, s in zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    ]


def test_features_only_selection_and_switches():
    model = timm.create_model(
        "rednet26", features_only=True, out_indices=(1, 3), output_stride=8, frozen_stages=1, in_chans=2
    ).train()
    assert [f.shape[1:] for f in model(torch.randn(2, 2, 64, 64))] == [(256, 16, 16), (1024, 8, 8)]
    assert not any(name.startswith("layer4") for name, _ in model.named_parameters())
    assert not any(m.training for part in ("stem", "layer1") for m in model[part].modules())
    assert model["layer2"].training


def test_classifier():
    model = timm.create_model("rednet26", num_classes=7, in_chans=1, drop_rate=0.1).eval()
    gray = IMAGE[:, :1]
    assert model(gray).shape == (1, 7)
    assert model.get_classifier() is model.head
    assert (model.num_classes, model.in_chans, model.head_drop.p) == (7, 1, 0.1)
    model.reset_classifier(3)
    assert model(gray).shape == (1, 3)
    model.reset_classifier(0)
    assert model(gray).shape == (1, model.num_features)
    assert timm.create_model("rednet26", num_classes=0, global_pool="")(IMAGE).shape == (1, 2048, 2, 2)


def test_same_model():
    ours, theirs = create_model("rednet26").eval(), timm.create_model("rednet26").eval()
    assert type(theirs) is type(ours)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(theirs(IMAGE), ours(IMAGE), rtol=0, atol=0)
    last = theirs.to(memory_format=torch.channels_last)(IMAGE.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, ours(IMAGE), rtol=1e-4, atol=1e-5)


def test_configuration():
    model = timm.create_model("rednet50", num_classes=5)
    assert model.pretrained_cfg["first_conv"] == "stem.conv1"
    assert model.default_cfg["classifier"] == model.get_classifier(name_only=True) == "head"
    assert isinstance(model.get_submodule(model.pretrained_cfg["first_conv"]), torch.nn.Conv2d)
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 224, 224)
    assert config["crop_pct"] == 0.875
    assert config["interpolation"] == "bilinear"
    assert config["mean"] == (0.485, 0.456, 0.406)
    groups = timm.optim.param_groups_layer_decay(model, layer_decay=0.5)
    assert len({group["lr_scale"] for group in groups}) == 1 + 16 + 1


@pytest.mark.parametrize("official", [False, True])
def test_pretrained_file(official, tmp_path):
    source = create_model("rednet26")
    weights = official_state_dict(source) if official else source.state_dict()
    torch.save({"state_dict": weights}, tmp_path / "rednet26.pth")
    overlay = {"file": str(tmp_path / "rednet26.pth")}
    whole = timm.create_model("rednet26", pretrained=True, pretrained_cfg_overlay=overlay)
    for key, value in source.state_dict().items():
        torch.testing.assert_close(whole.state_dict()[key], value, rtol=0, atol=0)
    tuned = timm.create_model("rednet26", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=4, in_chans=1)
    torch.testing.assert_close(tuned.stem.conv1.weight, source.stem.conv1.weight.sum(1, keepdim=True))
    assert torch.equal(tuned.layer4[0].conv3.weight, source.layer4[0].conv3.weight)


def test_models_of_timm_by_name(tmp_path):
    """As a baseline in recipes, and from what they save."""
    options = {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32], "stem_width": 8}
    model = create_model("timm/resnet26", num_classes=3, **options).eval()
    plain = timm.create_model("resnet26", num_classes=3, **options).eval()
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert model.model_config == {"name": "timm/resnet26", "num_classes": 3, **options}
    content = {
        "hyper_parameters": {"name": "timm/resnet26", "num_classes": 3, "options": options},
        "state_dict": {f"net.{key}": value for key, value in model.state_dict().items()},
    }
    torch.save(content, tmp_path / "last.ckpt")
    assert torch.equal(load_model(tmp_path / "last.ckpt").eval()(IMAGE), model(IMAGE))
    with pytest.raises(ValueError, match="name is 'timm/resnet27', expected a model of timm, such as timm/resnet26"):
        create_model("timm/resnet27")


def test_models_of_timm_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="name is 'timm/resnet26', which needs timm: pip install timm"):
        create_model("timm/resnet26")
