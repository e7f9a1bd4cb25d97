"""The command line: what a user types, reads and finds afterwards."""

import csv
import os
import subprocess
import sys

import pytest
import torch
import yaml
from recipe_support import OPTIONS, environment, fit_arguments, one_thread, write_images  # noqa: F401

from pyinvolution import cli
from pyinvolution.models import create_model, list_models

pytest.importorskip("lightning")

from pyinvolution.recipes import RecipeError
from pyinvolution.studies import compare_operator


def run(capsys, *arguments):
    """Exit status, stdout and stderr of a command line."""
    status = 0
    try:
        cli.main(arguments)
    except SystemExit as exit:
        status = exit.code or 0
    return (status, *capsys.readouterr())


def printed_config(capsys, *arguments):
    status, out, _ = run(capsys, "fit", *arguments, "--print_config")
    assert status == 0
    return yaml.safe_load(out)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of the data and of a run over it."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_images(folder / "data", val=7)
    cli.main(fit_arguments(data, folder / "run", "--trainer.max_epochs=2"))
    return data, folder / "run"


def test_help_and_configs(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert all(command in out for command in ("fit", "validate", "predict", "configs", "make-data", "demo"))
    assert run(capsys, "--version")[1].strip() == cli.__version__
    _, out, _ = run(capsys, "configs")
    names = [line.split()[0] for line in out.splitlines()]
    assert {"digits/rednet.yaml", *(f"imagenet/{name}.yaml" for name in list_models("rednet*"))} <= {*names}
    assert all(len(line.split()) > 3 for line in out.splitlines()), "each says what it is"


@pytest.mark.parametrize("name", list_models("rednet*"))
def test_imagenet_recipe_is_the_papers(capsys, name):
    config = printed_config(capsys, "--config", f"imagenet/{name}.yaml")
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    assert (model["name"], model["num_classes"]) == (name, 1000)
    assert config["trainer"]["max_epochs"] == 130
    recipe = {
        "lr": 0.8,
        "reference_batch": 2048,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 1e-4,
        "warmup_steps": 3130,
        "warmup_ratio": 0.25,
        "label_smoothing": 0.1,
    }
    assert {key: model[key] for key in recipe} == recipe
    assert (data["batch_size"], data["size"], data["resize"]) == (32, 224, 256)


def test_every_field_can_be_overridden(capsys, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("model: {lr: 0.3}\ntrainer: {max_epochs: 7}\n")
    config = printed_config(
        capsys,
        "--config=imagenet/rednet50.yaml",
        f"--config={own}",
        "--model.lr=0.4",
        "--data.scale=[0.25, 1.0]",
        "--data.train_transform=[{RandomCrop: {size: 32}}]",
        "--model.options.kernel_size=5",
        "--seed_everything=3",
    )
    assert config["model"]["init_args"]["lr"] == 0.4
    assert config["model"]["init_args"]["options"] == {"kernel_size": 5}
    assert config["trainer"]["max_epochs"] == 7
    assert config["data"]["init_args"]["scale"] == [0.25, 1.0]
    assert config["data"]["init_args"]["train_transform"] == [{"RandomCrop": {"size": 32}}]
    assert config["seed_everything"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config", "imagenet/rednet51.yaml"],
            "--config is imagenet/rednet51.yaml, expected a file or one of bccd/",
        ),
        (["--config"], "--config is empty, expected a file"),
        (["--trainer.max_epochs=many"], "trainer.max_epochs"),
        (["--modell.lr=1"], "modell.lr"),
        (["--model.lr=-1"], "model.lr is -1.0, expected a positive number"),
        (["--model.name=rednet51"], "did you mean 'rednet50'"),
        (["--data.root=/nowhere"], "data.root=/nowhere has no folder 'val'"),
        (["--trainer.precision=12"], "12"),
        (["--trainer.devices=0"], "devices"),
        (["--ckpt_path=/nowhere/last.ckpt"], "there is no file /nowhere/last.ckpt"),
        ([f"--ckpt_path={__file__}"], "not a checkpoint"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_input_is_one_line(capsys, tmp_path, arguments, message):
    common = ("--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}", "--trainer.max_epochs=1")
    status, _, err = run(capsys, "fit", *common, *arguments)
    assert status == 2
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert line.startswith("pyinvolution fit: error: ")
    assert message in line
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["validate", "predict"])
def test_an_untrained_model_is_not_used(capsys, trained, tmp_path, command):
    common = [f"--data.root={trained[0]}", f"--data.predict_root={trained[0] / 'val'}", "--trainer.accelerator=cpu"]
    status, _, err = run(capsys, command, f"--trainer.default_root_dir={tmp_path}", *common)
    assert status == 2
    assert f"--ckpt_path is empty, expected the checkpoint that {command} is to use" in err
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(RecipeError, match="no folder 'val'"):
        cli.main([*fit_arguments(tmp_path, tmp_path), "--debug"])


def test_wrong_classes(capsys, trained, tmp_path):
    status, _, err = run(capsys, *fit_arguments(trained[0], tmp_path, "--model.num_classes=3"))
    assert status == 2
    assert "model.num_classes is 3, but the data has 2 classes (class0, class1, ...): set --model.num_classes 2" in err


def test_what_a_run_leaves(trained):
    _, folder = trained
    logs = folder / "logs" / "version_0"
    for path in ("last.ckpt", "best.ckpt", "curves.png", "logs/version_0/config.yaml", "logs/version_0/metrics.csv"):
        assert (folder / path).stat().st_size > 0, path
    assert list(logs.glob("events.out.tfevents*"))
    with (logs / "metrics.csv").open() as file:
        columns = csv.DictReader(file).fieldnames
    assert {"step", "lr", "train/loss", "train/top1", "train/images_per_s", "val/loss", "val/top1", "val/top5"} <= set(
        columns
    )
    assert not list(folder.rglob("*.part"))


def test_validate_knows_the_model_from_the_checkpoint(capsys, trained, tmp_path):
    data, folder = trained
    common = ["--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}", f"--data.root={data}"]
    status, out, _ = run(capsys, "validate", f"--ckpt_path={folder / 'best.ckpt'}", *common)
    assert status == 0
    best = torch.load(folder / "best.ckpt", weights_only=True)["callbacks"]
    score = next(state["best_model_score"] for state in best.values() if state.get("monitor") == "val/top1")
    assert f"{score.item()}" in out
    assert not list(tmp_path.iterdir())


def test_predict(capsys, trained, tmp_path):
    data, folder = trained
    images = tmp_path / "images"
    (images / "deeper").mkdir(parents=True)
    strange = os.fsdecode(b"caf\xe9.png")  # a name that is not UTF-8
    copies = [("b.png", "class0/000"), ("deeper/a.png", "class1/001"), ("c.png", "class0/002"), (strange, "class0/004")]
    for name, source in copies:
        (images / name).write_bytes((data / "val" / f"{source}.png").read_bytes())
    (images / "broken.jpg").write_bytes(b"broken")
    (images / "notes.txt").write_text("not an image")
    with pytest.warns(UserWarning, match="broken.jpg"):
        status, _, _ = run(
            capsys,
            "predict",
            f"--ckpt_path={folder / 'last.ckpt'}",
            f"--data.predict_root={images}",
            "--trainer.accelerator=cpu",
            f"--trainer.default_root_dir={tmp_path}",
            "--output=out/predictions.csv",
        )
    assert status == 0
    with (tmp_path / "out" / "predictions.csv").open(errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [str(images / name) for name in ("b.png", "c.png", strange, "deeper/a.png")]
    for row in rows:
        assert {row["class_1"], row["class_2"]} == {"class0", "class1"}
        assert float(row["probability_1"]) >= float(row["probability_2"])
        assert float(row["probability_1"]) + float(row["probability_2"]) == pytest.approx(1, abs=1e-5)


def test_resume_refuses_what_does_not_fit(capsys, trained, tmp_path):
    data, folder = trained

    def resume(*more):
        last = folder / "last.ckpt"
        status, _, err = run(capsys, *fit_arguments(data, tmp_path, f"--ckpt_path={last}", *more))
        assert status == 2
        return err

    assert "made with steps_per_epoch=6, this run has 3" in resume("--data.batch_size=8")
    assert "made with seed=0, this run has 1" in resume("--seed_everything=1")
    assert "the checkpoint is of another model: " in resume("--model.options.kernel_size=5")
    other = write_images(tmp_path / "other")
    (other / "train" / "class0").rename(other / "train" / "klass0")
    (other / "val" / "class0").rename(other / "val" / "klass0")
    assert "has the classes class1, klass0; the checkpoint knows class0, class1" in resume(f"--data.root={other}")


def test_make_data(capsys, tmp_path):
    status, out, _ = run(capsys, "make-data", "digits", str(tmp_path))
    assert status == 0
    assert "1437 training and 360 validation images" in out
    assert run(capsys, "make-data", "letters", str(tmp_path))[0] == 2


def test_demo(capsys, tmp_path, monkeypatch):
    """A miss of the target fails, and everything is written and printed all the same."""
    monkeypatch.setattr(compare_operator, "SHAPES", [(1, 16, 9, 10)])
    arguments = ["demo", f"--output={tmp_path}", "--max-epochs=1", "--target=100"]
    status, out, _ = run(capsys, *arguments)
    assert status == 1
    assert "below the target of 100%" in out
    assert "of 360 held-out digits right" in out
    assert "16x9x10" in out
    for name in ("curves.png", "predictions.png", "kernels.png"):
        assert (tmp_path / "run" / name).stat().st_size > 10_000
        assert name in out


WITHOUT = """
import sys
sys.modules["lightning"] = None  # as if it were not installed
import pyinvolution
from pyinvolution import cli
heavy = {"torchvision", "torchmetrics", "matplotlib", "sklearn", "rich"} & sys.modules.keys()
assert not heavy, heavy
cli.main(["fit", "--config", "digits/rednet.yaml"])
"""


def test_without_the_training_extra():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert 'pip install "pyinvolution[train]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_fit_without_a_configuration(capsys, tmp_path):
    """It asks for one, and does not begin 1000 epochs of a default."""
    status, _, err = run(capsys, "fit", f"--data.root={write_images(tmp_path)}", "--model.num_classes=2")
    assert status == 2
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert "fit needs a configuration, such as --config imagenet/rednet50.yaml" in line
    assert "--trainer.max_epochs" in line


def test_table_of_the_model(capsys, tmp_path):
    """Parameters by part, and no count of operations, which nobody has counted."""
    arguments = [a for a in fit_arguments(write_images(tmp_path / "data"), tmp_path) if "model_summary" not in a]
    status, out, err = run(capsys, *arguments, "--trainer.max_epochs=1", "--trainer.limit_train_batches=1")
    assert status == 0
    assert "RedNet" in out
    count = sum(p.numel() for p in create_model("rednet", 2, **yaml.safe_load(OPTIONS)).parameters())
    assert f"{count / 1000:.1f} K trained of {count / 1000:.1f} K parameters" in out
    assert "flops" not in (out + err).lower()
