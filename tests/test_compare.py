"""Mask R-CNN with the peers of involution: sizes, training, and the comparison of `pyinvolution compare`."""

import warnings
from functools import partial

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("rich")
from recipe_support import one_thread  # noqa: F401

from pyinvolution import cli
from pyinvolution.blocks import BLOCKS
from pyinvolution.models import create_model
from pyinvolution.studies import compare_systems

ADDED = {None: 0.0, "non_local": 2.10176, "criss_cross": 1.312001, "global_context": 1.586307}


def meta(name, **options):
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return create_model(name, **options)


def trained(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("block", [None, *BLOCKS])
def test_every_peer_adds_and_ours_removes(block):
    """Mask R-CNN, ResNet-50-FPN has 44.18 M trained parameters in mmdetection."""
    plain = trained(meta("mask_rcnn_resnet50"))
    assert plain / 1e6 == pytest.approx(44.175, abs=0.005)
    count = trained(meta("mask_rcnn_resnet50", block=block))
    assert trained(meta("mask_rcnn_rednet50", neck="involution")) < plain <= count
    if block in ADDED:
        assert (count - plain) / 1e6 == pytest.approx(ADDED[block], abs=1e-5)
    else:
        assert count > plain


def test_trains_what_is_not_frozen():
    model = create_model("mask_rcnn_resnet50", block="deformable", num_classes=3, min_size=64, max_size=64).train()
    body = model.backbone.body
    assert not body.stem.training
    assert not body.layer4[0].bn1.training
    targets = {
        "boxes": torch.tensor([[8.0, 8, 50, 50]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
    }
    sum(model([torch.rand(3, 64, 64)], [targets]).values()).backward()
    frozen = ("backbone.body.stem.", "backbone.body.layer1.")
    assert all((p.grad is None) == name.startswith(frozen) for name, p in model.named_parameters())
    with pytest.raises(ValueError, match="block is 'senet', expected one of"):
        create_model("mask_rcnn_resnet50", block="senet")
    with pytest.raises(ValueError, match="frozen_stages is 5, expected at most the number of stages, 4"):
        create_model("mask_rcnn_resnet50", frozen_stages=5)


def test_measures(one_thread):  # noqa: F811
    systems = (compare_systems.SYSTEMS[0], compare_systems.SYSTEMS[4], compare_systems.SYSTEMS[-1])
    workload = compare_systems.Workload((64, 96), proposals=6, masks=2)
    build = partial(create_model, num_classes=3)
    results = compare_systems.measure(workload, systems, repeats=2, build=build)
    plain, deformable, ours = results
    assert plain.trained == trained(build("mask_rcnn_resnet50"))
    # Three convolutions of 512 channels become deformable; 27 more outputs at 2 x 3 pixels each.
    assert deformable.multiply_adds - plain.multiply_adds == 27 * 512 * 9 * 3 * 6
    assert ours.multiply_adds < plain.multiply_adds
    assert all(result.seconds > 0 and result.peak > 0 for result in results)
    assert all(result.quartiles[0] <= result.seconds <= result.quartiles[1] for result in results)
    grid = compare_systems.table(results, systems)
    assert [*grid.columns[9].cells] == ["38.4", "41.5 (38.2)", "40.8 (38.4)"]
    assert next(iter(grid.columns[2].cells)) == "+0%"


def test_command(tmp_path, monkeypatch, capsys):
    def measure(workload, systems, repeats):
        assert (workload.size, repeats) == ((96, 64), 3)
        return [
            compare_systems.Measurement(system.title, 100 - index, 200, 10**9 + index, 0.5, (0.4, 0.6), 2**20 + index)
            for index, system in enumerate(systems)
        ]

    monkeypatch.setattr(compare_systems, "measure", measure)
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "--output", str(tmp_path), "--size", "96", "64", "--repeats", "3"])
    assert not stop.value.code
    assert (tmp_path / "systems.csv").read_text().count("\n") == 1 + len(compare_systems.SYSTEMS)
    assert (tmp_path / "systems.png").read_bytes().startswith(b"\x89PNG")
    assert "RedNet-50" in capsys.readouterr().out
    for wrong, message in (
        (["--size", "0", "64"], "expected positive numbers"),
        (["--device", "cuda"], "expected cpu"),
    ):
        if wrong[0] == "--device" and torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit) as stop:
            cli.main(["compare", "--output", str(tmp_path), *wrong])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
