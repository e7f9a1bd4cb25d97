"""pyinvolution study: what it trains, that it goes on where it stopped, and what it reports."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from recipe_support import environment, one_thread, write_images  # noqa: F401

pytest.importorskip("lightning")
from pyinvolution import cli
from pyinvolution.models import create_model
from pyinvolution.models.loading import load_backbone
from pyinvolution.recipes import Classification, ImageFolderData, RecipeError, configs
from pyinvolution.recipes import cli as recipe_cli
from pyinvolution.studies.comparison import definition, pipeline, report
from pyinvolution.studies.comparison.runner import Runner
from pyinvolution.studies.files import write_json

PACKAGED = [name for name, _ in configs.listing(definition.CONFIGS)]
LOOKS = ["cifar10-groups.yaml", "cifar10-parts.yaml", "cifar10-modern.yaml"]  # one change at a time instead of pairs
GRID = {"model.init_args.lr": [0.1, 4.0]}
STAGES = [{"width": 16, "channels": 32, "operators": ["inv3x16"]}]


def write_study(folder: Path, data: Path, **changed) -> Path:
    """A comparison of two small networks on images of noise, two epochs of six steps each."""
    recipes = {}
    for name, operator in (("conv", "conv3"), ("inv", "inv3x16")):
        options = {"stem": "small", "stem_channels": 16, "stages": [STAGES[0] | {"operators": [operator]}]}
        recipe = {
            "seed_everything": 5,
            "trainer": {"max_epochs": 2, "accelerator": "cpu", "log_every_n_steps": 1, "default_root_dir": "elsewhere"},
            "model": {
                "class_path": "pyinvolution.recipes.Classification",
                "init_args": {"name": "searchable", "num_classes": 2, "options": options, "warmup_steps": 0, "lr": 0.1},
            },
            "data": {
                "class_path": "pyinvolution.recipes.ImageFolderData",
                "init_args": {"root": str(data), "batch_size": 4, "num_workers": 0, "size": 16, "resize": 16},
            },
        }
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        recipes[name] = str(path)
    content = {"runs": recipes, "metrics": ["val/top1", "val/loss"], "image": [3, 16, 16], "seeds": [0, 1]}
    content |= {"pairs": [["conv", "inv"]]} | changed
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data"), train=24, val=8)


# --- Definitions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PACKAGED if name not in LOOKS])
def test_packaged_comparisons(name):
    """Their sides have the same settings but for the network; tuning looks at no image of the final evaluation."""
    study = definition.read(name, {})
    assert study.pairs
    for baseline, ours in study.pairs:
        one, other = (study.trainings(run, {})[0].config for run in (baseline, ours))
        for config in (one, other):
            for own in ("name", "options", "backbone_weights"):
                config["model"]["init_args"].pop(own, None)
            config["trainer"].pop("default_root_dir")
        assert one == other
    for run in study.runs:
        final = study.trainings(run, {})[0].config
        assert final["trainer"]["max_epochs"] % final["trainer"].get("check_val_every_n_epoch", 1) == 0
        count = math.prod(map(len, study.grid.values())) if study.grid else 0
        tunings = study.tunings(run)
        assert len({training.label for training in tunings}) == len(tunings) == count
        for training in tunings:
            assert training.config["trainer"]["max_epochs"] % training.config["trainer"]["check_val_every_n_epoch"] == 0
            data, evaluated = (config["data"]["init_args"] for config in (training.config, final))
            assert data.get("held_out") or any(
                data.get(name) != evaluated.get(name) for name in ("val", "val_annotations")
            )


def differences(one: dict, other: dict, prefix: str = "") -> set[str]:
    """Dotted names of the values that differ."""
    names: set[str] = set()
    for key in one.keys() | other.keys():
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            names |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            names.add(f"{prefix}{key}")
    return names


@pytest.mark.parametrize("name", LOOKS)
def test_packaged_looks(name):
    """Each run builds, changes something of the RedNet of its study, and sees no image of the final evaluation."""
    study = definition.read(name, {})
    configurations = {run: study.trainings(run, {})[0].config for run in study.runs}
    plain = [run for run, recipe in study.runs.items() if recipe == "cifar10/rednet_small.yaml"]
    assert len(plain) == 1
    for run, config in configurations.items():
        assert config["data"]["init_args"]["held_out"] > 0
        assert config["trainer"]["max_epochs"] % config["trainer"]["check_val_every_n_epoch"] == 0
        assert report.costs(config, study.image)[0] > 100_000
        if isinstance(study.runs[run], dict):
            changed = differences(configurations[plain[0]], config)
            assert changed
            written = differences({}, {key: value for key, value in study.runs[run].items() if key != "base"})
            assert all(any(name.startswith(whole) for whole in written) for name in changed), changed
            Classification(**config["model"]["init_args"])
            ImageFolderData(**config["data"]["init_args"])


def operators(run: dict) -> list[list[str]]:
    return [stage["operators"] for stage in run["model"]["init_args"]["options"]["stages"]]


@pytest.mark.parametrize("size", ["small", "large"])
def test_cifar10_pairs_differ_in_the_operator_only(size):
    resnet, rednet, deep = (
        configs.load(f"cifar10/{name}_{size}.yaml".replace("deep_", "")) if not name.endswith("deep") else
        configs.load(f"cifar10/rednet_{size}_deep.yaml") for name in ("resnet", "rednet", "deep")
    )  # fmt: skip
    assert {name for stage in operators(resnet) for name in stage} == {"conv3"}
    narrow = "inv5x(4|8|16)"
    for net, kinds in ((rednet, narrow), (deep, "inv[57]x16" if size == "small" else narrow)):
        assert all(re.fullmatch(kinds, name) for stage in operators(net) for name in stage)
    assert [len(stage) for stage in operators(resnet)] == [len(stage) for stage in operators(rednet)] == [2, 2, 2]
    assert [len(stage) for stage in operators(deep)] == [3, 3, 3]
    for one in (rednet, deep):
        for ours, theirs in zip(*(c["model"]["init_args"]["options"]["stages"] for c in (one, resnet)), strict=True):
            assert (ours["width"], ours["channels"]) == (theirs["width"], theirs["channels"])
    counts, sums = zip(*(report.costs(config, [3, 32, 32]) for config in (resnet, rednet, deep)), strict=True)
    assert counts[1] < 0.7 * counts[0]
    assert counts[2] < counts[0]
    assert sums[1] <= 0.7 * sums[0]
    assert 0.85 * sums[0] < sums[2] <= sums[0], "about as many multiply-adds"


@pytest.mark.parametrize("size", ["small", "large"])
def test_mixed_network_has_the_first_stage_of_one_and_the_others_of_the_other(size):
    resnet, rednet, mixed = (
        configs.load(f"cifar10/{name}_{size}{end}.yaml")
        for name, end in (("resnet", ""), ("rednet", ""), ("rednet", "_mixed"))
    )
    stages = [config["model"]["init_args"]["options"]["stages"] for config in (resnet, rednet, mixed)]
    assert stages[2] == [stages[0][0], *stages[1][1:]]
    mixed["model"]["init_args"]["options"]["stages"] = stages[1]
    assert differences(rednet, mixed) == {"trainer.default_root_dir"}


def first_stage(key: str) -> bool:
    """Whether an entry of a segmentation model's state dict is of its backbone's stem or first stage."""
    return key.startswith(("backbone.stem.", "backbone.conv1.", "backbone.bn1.", "backbone.layer1."))


def test_other_pairs_differ_in_the_operator_only():
    conv, inv = (
        configs.load(f"bccd/faster_rcnn_{name}.yaml")["model"]["init_args"]["options"] for name in ("conv", "inv")
    )
    assert conv.pop("neck") == "conv"
    assert inv.pop("neck") == "involution"
    assert conv == inv
    nets = {}
    for name in ("fpn_resnet", "fpn_rednet_inv", "fpn_rednet_mixed"):
        config = configs.load(f"camvid/{name}.yaml")["model"]["init_args"]
        nets[name] = create_model(config["name"], num_classes=config["num_classes"], **config["options"]).eval()
    with torch.inference_mode():
        maps = [
            [tuple(level.shape) for level in extract(torch.zeros(1, 3, 64, 96))]
            for extract in (nets["fpn_resnet"].backbone, nets["fpn_rednet_inv"].backbone.features)
        ]
    assert maps[0] == maps[1], "the stages have the same widths and strides"
    for name, early in (("fpn_resnet", True), ("fpn_rednet_inv", False)):
        ours, theirs = (
            [value.shape for key, value in state.items() if first_stage(key) == early]
            for state in (nets["fpn_rednet_mixed"].state_dict(), nets[name].state_dict())
        )
        assert ours == theirs, "the first stage of the ResNet, the rest of the RedNet"
    for name, net in nets.items():
        backbone = {"fpn_resnet": "resnet", "fpn_rednet_inv": "rednet", "fpn_rednet_mixed": "rednet_mixed"}[name]
        arguments = configs.load(f"camvid/backbone_{backbone}.yaml")["model"]["init_args"]
        classifier = create_model(arguments["name"], num_classes=arguments["num_classes"], **arguments["options"])
        load_backbone(net.backbone, {"state_dict": {f"net.{k}": v for k, v in classifier.state_dict().items()}})
        loaded = net.backbone.state_dict()
        assert all(torch.equal(value, classifier.state_dict()[key]) for key, value in loaded.items())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"runs": {}}, "runs is {}, expected at least one"),
        ({"metrics": []}, "metrics is .*, expected at least one"),
        ({"seeds": [1, 1]}, "seeds is .*, expected different numbers"),
        ({"pairs": [["conv", "other"]]}, "pairs is .*, expected two of conv, inv"),
        ({"grid": {"model.init_args.lr": []}}, "grid.model.init_args.lr is .*, expected at least one"),
        ({"runs": {"conv": {"model": {}}}, "pairs": []}, "runs.conv is .*, expected a recipe, or a mapping"),
        ({"image": [3, 0, 1]}, "image is .*, expected channels, height and width"),
        ({"unknown": 1}, "own.yaml: .*unknown"),
        ({"grid": GRID}, "tuning is {}, expected data that the final evaluation does not use"),
        (
            {"grid": GRID, "tuning": {"data": {}}, "metrics": ["val/loss"]},
            "metrics is .*, expected first one of which",
        ),
        ({"grid": {"model.init_args.lr": [1.0, 1.0]}}, "grid.model.init_args.lr is .*, expected different values"),
        (
            {"grid": GRID, "tuning": {"data": {}}, "forced": {"model": {"init_args": {"lr": 1}}}},
            "model.init_args.lr is 1, expected no value of its own, since it is tuned",
        ),
    ],
)
def test_wrong_definitions(tmp_path, data, changed, message):
    with pytest.raises(RecipeError, match=message):
        definition.read(str(write_study(tmp_path, data, **changed)), {})


def test_the_command_line_is_in_force_everywhere(tmp_path, data, monkeypatch):
    """In tuning, and in a run that has a value of its own."""
    path = write_study(tmp_path, data, grid=GRID, tuning={"trainer": {"max_epochs": 6}, "data": {"init_args": {}}})
    content = yaml.safe_load(path.read_text())
    content["runs"]["inv"] = {"base": content["runs"]["inv"], "data": {"init_args": {"root": "/theirs"}}}
    path.write_text(yaml.safe_dump(content))
    given = {}

    def run(study, name, *arguments):
        given.update(study=study, changes=arguments[-2])

    monkeypatch.setattr(pipeline, "run", run)
    options = ["--data-root=/given", "--set", "trainer.max_epochs=1", "--seeds", "3", "4"]
    with pytest.raises(SystemExit) as exit:
        cli.main(["study", str(path), *options])
    assert not exit.value.code
    study = given["study"]
    for training in [*study.tunings("inv"), *study.trainings("inv", {})]:
        assert training.config["data"]["init_args"]["root"] == "/given"
        assert training.config["trainer"]["max_epochs"] == 1
    assert given["changes"] == ["--set trainer.max_epochs=1", "--seeds 3 4"]
    with pytest.raises(SystemExit):
        cli.main(["study", str(path), "--no-tuning"])
    assert given["study"].grid == {}
    assert given["changes"] == ["--no-tuning"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "NAME is nowhere, expected a file or one of bccd, camvid, cifar10-"),
        (["bccd", "--set", "a=[1"], "--set a is [1, expected a value in YAML"),
        (["bccd", "--set", "a"], "--set is a, expected NAME=VALUE"),
        (["bccd", "--set", "model.init_args.lr=1"], "model.init_args.lr is 1, expected no value of its own"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["study", *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


class Done:
    """A process that has ended."""

    def __init__(self, returncode: int) -> None:
        self.returncode = returncode

    def poll(self) -> int:
        return self.returncode


@pytest.fixture
def here(monkeypatch):
    """Lets trainings run in this process, which need not import everything again; gives their names as they begin."""
    begun = []

    def start(runner, training):
        folder = runner.place(training)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(runner.recipe(training))
        begun.append(f"{training.run}, {training.label}")
        try:
            recipe_cli.run(["fit", "--config", str(folder / "recipe.yaml")])
        except RecipeError as error:
            (folder / "log.txt").write_text(str(error))
            return Done(2)
        (folder / "log.txt").write_text("done")
        return Done(0)

    monkeypatch.setattr(Runner, "_start", start)
    return begun


# --- Runs -------------------------------------------------------------------------------------------------------------


def test_from_data_to_table(tmp_path, data, capsys, here):
    """A whole comparison with tuning; the second call trains nothing, and a change is refused."""
    tuning = {"trainer": {"max_epochs": 1}, "data": {"init_args": {"held_out": 0.5}}}
    path = write_study(tmp_path, data, seeds=[0], grid={"model.init_args.lr": [0.01, 0.5]}, tuning=tuning)
    output, results = tmp_path / "out", tmp_path / "results"
    arguments = ["study", str(path), f"--output={output}", "--jobs=2", f"--results={results}"]

    def run(*more):
        with pytest.raises(SystemExit) as exit:
            cli.main([*arguments, *more])
        return exit.value.code, capsys.readouterr()

    code, printed = run()
    assert not code, printed.err
    made = json.loads((output / "report.json").read_text())
    assert made["complete"]
    for name, entry in made["runs"].items():
        tried = {one["values"]["model.init_args.lr"]: one["val/top1"] for one in entry["tuning"]}
        assert [*tried] == [0.01, 0.5]
        assert tried[entry["values"]["model.init_args.lr"]] == max(tried.values())
        (training,) = entry["trainings"]
        assert (training["steps"], training["seed"]) == (12, 0)
        recipe = yaml.safe_load((output / name / "seed0/recipe.yaml").read_text())
        assert recipe["model"]["init_args"]["lr"] == entry["values"]["model.init_args.lr"]
        assert recipe["data"]["init_args"].get("held_out", 0) == 0
        assert entry["val/top1"] == {"mean": training["metrics"]["val/top1"], "std": None, "count": 1}
        logged = (output / name / "seed0/logs/version_0/metrics.csv").read_text()
        assert f"{training['metrics']['val/loss']}"[:8] in logged
        assert training["epoch_cpu_s"] > 0
        assert training["validation"].keys() == {"val/loss", "val/top1", "val/top5"}
    stem = f"{made['date']}-study-own"
    assert {path.name for path in results.iterdir()} == {stem, f"{stem}.json", f"{stem}.md"}
    assert {path.name for path in (results / stem).iterdir()} == {"conv-seed0.log", "inv-seed0.log"}
    text = (results / f"{stem}.md").read_text()
    assert "`inv` against `conv`" in text
    assert f"`pyinvolution study own` on {training['machine']}, torch {torch.__version__}, commit" in text
    expected = [f"{name}, tuning_lr={lr}" for name in ("conv", "inv") for lr in (0.01, 0.5)]
    assert here == [*expected, "conv, seed0", "inv, seed0"]
    assert not run()[0]
    assert len(here) == 6, "nothing is trained again"
    code, printed = run("--set", "trainer.max_epochs=3")
    assert code == 2
    assert "is not the configuration of this comparison's" in printed.err


def test_costs_and_means():
    config = {
        "model": {"init_args": {"name": "searchable", "num_classes": 2, "options": {"stages": STAGES, "stem": "small"}}}
    }
    net = create_model("searchable", num_classes=2, stages=STAGES, stem="small")
    parameters, operations = report.costs(config, [3, 16, 16])
    assert parameters == sum(parameter.numel() for parameter in net.parameters())
    assert operations > 64 * 27 * 64, "of the stem only"
    spread = report._spread([0.5, 0.6, 0.7])
    assert spread["mean"] == pytest.approx(0.6)
    assert spread["std"] == pytest.approx(0.1)
    assert report._text(spread, 100, 1) == "60.0 ± 10.0"
    assert report._text(None, 100, 1) == "not finished"


def test_nothing_unfinished_is_published(tmp_path, data, here):
    """Of two recipes one is trained: the comparison of both is reported, but nothing of it goes to the results."""
    study = definition.read(str(write_study(tmp_path, data, seeds=[0])), {})
    made = pipeline.run(study, "own", tmp_path / "out", only=["inv"])
    assert [*made["runs"]] == ["inv"]
    with pytest.raises(RecipeError, match="--only is other, expected some of conv, inv"):
        pipeline.run(study, "own", tmp_path / "out", only=["other"])
    made = pipeline.run(study, "own", tmp_path / "out", train=False, results=tmp_path / "results")
    assert [len(entry["trainings"]) for entry in made["runs"].values()] == [0, 1]
    assert "not finished" in report.markdown(made)
    assert not (tmp_path / "results").exists()
    (tmp_path / "out/inv/seed0/last.ckpt").unlink()
    (tmp_path / "out/inv/seed0/result.json").unlink()
    made = pipeline.run(study, "own", tmp_path / "out", train=False)
    assert made["runs"]["inv"]["trainings"] == [], "a run without a result is not reported"


def test_a_failed_training_is_named(tmp_path, data, here):
    """The others come to their end before."""
    path = write_study(tmp_path, data, seeds=[0])
    broken = yaml.safe_load((tmp_path / "conv.yaml").read_text())
    broken["data"]["init_args"]["root"] = "/nowhere"
    (tmp_path / "conv.yaml").write_text(yaml.safe_dump(broken))
    study = definition.read(str(path), {})
    with pytest.raises(RecipeError, match=r"1 of 2 trainings failed: conv, seed0 \(see .*conv/seed0/log.txt\)"):
        pipeline.run(study, "own", tmp_path / "out")
    assert "data.root=/nowhere" in (tmp_path / "out/conv/seed0/log.txt").read_text()
    assert (tmp_path / "out/inv/seed0/result.json").is_file()


@pytest.fixture
def scored(monkeypatch):
    """Lets trainings end at once with the scores that it is given by their labels; "diverged" and "failed" are some."""
    scores: dict[str, object] = {}

    def start(runner, training):
        folder = runner.place(training)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(runner.recipe(training))
        score = scores.get(training.label, 0.5)
        log = {"diverged": "pyinvolution fit: error: the loss is nan", "failed": "Traceback\nMemoryError"}
        (folder / "log.txt").write_text(log.get(str(score), "done"))
        return Done(1 if str(score) in log else 0)

    def finish(runner, training, metrics):
        score = scores.get(training.label, 0.5)
        result = {
            "metrics": dict.fromkeys(metrics, score), "validation": {"val/top5": 0.75}, "seed": training.seed,
            "epoch_s": 1.0, "epoch_cpu_s": 1.0, "machine": "one", "torch": "2", "commit": "c",
            "values": training.values,
        }  # fmt: skip
        write_json(runner.place(training) / "result.json", result)

    monkeypatch.setattr(Runner, "_start", start)
    monkeypatch.setattr(Runner, "_finish", finish)
    return scores


def tuned_study(tmp_path, data, **changed):
    tuning = {"data": {"init_args": {"held_out": 0.5}}}
    return write_study(tmp_path, data, seeds=[0], grid=GRID, tuning=tuning, **changed)


@pytest.mark.parametrize("other", ["diverged", float("nan")], ids=str)
def test_values_that_cannot_be_trained_with_lose(tmp_path, data, scored, other):
    """The comparison goes on; in a final training it is an error."""
    scored["tuning_lr=0.1"] = other
    study = definition.read(str(tuned_study(tmp_path, data)), {})
    made = pipeline.run(study, "own", tmp_path / "out")
    assert made["runs"]["inv"]["values"] == {"model.init_args.lr": 4.0}
    assert made["complete"]
    scored["seed0"] = "diverged"
    with pytest.raises(RecipeError, match="2 of 2 trainings failed"):
        pipeline.run(study, "own", tmp_path / "other")
    scored |= {"tuning_lr=0.1": "failed"}
    with pytest.raises(RecipeError, match="2 of 4 trainings failed"):
        pipeline.run(study, "own", tmp_path / "third")


def test_nothing_can_be_trained(tmp_path, data, scored):
    scored |= {"tuning_lr=0.1": "diverged", "tuning_lr=4.0": "diverged"}
    with pytest.raises(RecipeError, match="with which every training of conv diverged"):
        pipeline.run(definition.read(str(tuned_study(tmp_path, data)), {}), "own", tmp_path / "out")


def test_a_changed_comparison_says_so(tmp_path, data, scored):
    study = definition.read(str(write_study(tmp_path, data, seeds=[0])), {})
    changes = ["--set trainer.max_epochs=1"]
    made = pipeline.run(study, "own", tmp_path / "out", results=tmp_path / "results", changes=changes)
    text = (tmp_path / f"results/{made['date']}-study-own-changed.md").read_text()
    assert "`pyinvolution study own --set trainer.max_epochs=1` on" in text
    assert "| val/loss |" in text.replace("| val/top1 (%) ", "| ")
    assert "| 50.00 | 0.5000 |" in text


def test_a_part_of_a_comparison_says_so(tmp_path, data, scored):
    """It is published under a name of its own, and takes the place of no other part."""
    study = definition.read(str(write_study(tmp_path, data, seeds=[0])), {})
    results = tmp_path / "results"
    made = pipeline.run(study, "own", tmp_path / "out", only=["inv"], results=results)
    text = (results / f"{made['date']}-study-own-changed.md").read_text()
    assert "`pyinvolution study own --only inv` on" in text
    assert "| `conv` |" not in text
    with pytest.raises(RecipeError, match=r"own-changed\.json of a comparison with --only inv: move it"):
        pipeline.run(study, "own", tmp_path / "out", only=["conv"], results=results)
    assert not pipeline.run(study, "own", tmp_path / "out", only=["inv", "conv"], results=results)["changes"]
    assert {path.suffix or path.name for path in results.glob("*own*") if "changed" not in path.name} == {
        ".json", ".md", f"{made['date']}-study-own"}  # fmt: skip


def test_published_trainings_are_known(tmp_path, data, scored):
    """What a report has is not trained again, wherever the data lie: neither tunings nor the seeds that it has."""
    path, results = tuned_study(tmp_path, data), tmp_path / "results"
    scored |= {"tuning_lr=4.0": 0.75, "tuning_lr=0.1": "diverged", "seed0": 0.625}
    first = definition.read(str(path), {"data_root": str(data)})
    made = pipeline.run(first, "own", tmp_path / "out", results=results)
    assert made["runs"]["inv"]["config"]["data"]["init_args"]["root"] == str(data)
    published = results / f"{made['date']}-study-own.json"
    (published.with_suffix("") / "inv-seed0.log").write_text("its log")
    scored.clear()
    recipe = tmp_path / "inv.yaml"
    recipe.write_text(recipe.read_text().replace("default_root_dir: elsewhere", "default_root_dir: runs/other"))
    second = definition.read(str(path), {"data_root": "/elsewhere", "seeds": [0, 1]})
    told = pipeline.run(second, "own", tmp_path / "other", results=tmp_path / "new", known=published)
    for run in ("conv", "inv"):
        assert [result["metrics"]["val/top1"] for result in told["runs"][run]["trainings"]] == [0.625, 0.5]
        assert told["runs"][run]["tuning"] == made["runs"][run]["tuning"]
    assert told["runs"]["conv"]["config"] == made["runs"]["conv"]["config"]
    assert told["runs"]["inv"]["config"]["trainer"]["default_root_dir"] == "runs/other"
    stem = f"{told['date']}-study-own"
    assert (tmp_path / "new" / stem / "inv-seed0.log").read_text() == "its log"
    begun = (tmp_path / "other/inv/seed1/recipe.yaml").read_text()
    assert "/elsewhere" in begun
    # The folder has them now: nothing is written a second time, and nothing is lost.
    changed = told["runs"]["inv"]["trainings"][1] | {"seed": 0}
    write_json(tmp_path / "other/inv/seed0/result.json", changed)
    again = pipeline.run(second, "own", tmp_path / "other", known=published)
    assert again["runs"]["inv"]["trainings"][0]["metrics"]["val/top1"] == 0.5
    # The report in the folder of a comparison serves as well.
    third = pipeline.run(second, "own", tmp_path / "third", known=tmp_path / "other/report.json")
    assert third["runs"] == again["runs"]
    # Times of several machines are not put side by side without a word.
    assert "Times of different machines" not in report.markdown(again)
    write_json(tmp_path / "other/inv/seed0/result.json", changed | {"seed": 0, "machine": "two"})
    mixed = pipeline.run(second, "own", tmp_path / "other", train=False)
    assert "cannot be compared:\n\n- `conv`: one\n- `inv`: one, two\n" in report.markdown(mixed)


def test_other_trainings_are_not_known(tmp_path, data, scored):
    made = pipeline.run(definition.read(str(tuned_study(tmp_path, data)), {}), "own", tmp_path / "out")
    scored |= {"tuning_lr=0.1": 0.875, "seed0": 0.25}
    other = definition.read(str(tuned_study(tmp_path, data, overrides={"trainer": {"max_epochs": 3}})), {})
    report_file = tmp_path / "out/report.json"
    with pytest.raises(RecipeError, match=r"--known is .*report\.json, which has no training of conv, inv with"):
        pipeline.run(other, "own", tmp_path / "other", known=report_file)
    (tmp_path / "text.json").write_text("no report")
    (tmp_path / "list.json").write_text("[]")
    for file in ("nowhere", tmp_path / "text.json", tmp_path / "list.json"):
        with pytest.raises(RecipeError, match=rf"--known is {file}, expected a report\.json of pyinvolution study"):
            pipeline.run(other, "own", tmp_path / "other", known=file)
    assert not list((tmp_path / "other").glob("*/*"))
    # Tuned in another way: the trainings are known, their tuning is not, which chooses another value.
    changed = definition.read(str(tuned_study(tmp_path, data)), {"tuning": {"trainer": {"max_epochs": 1}}})
    told = pipeline.run(changed, "own", tmp_path / "third", known=report_file)
    assert told["runs"]["inv"]["tuning"][0]["val/top1"] == 0.875
    assert [result["metrics"]["val/top1"] for result in told["runs"]["inv"]["trainings"]] == [
        made["runs"]["inv"]["val/top1"]["mean"]
    ]


def test_metrics_that_are_asked_for_later(tmp_path, data, scored):
    path = write_study(tmp_path, data, seeds=[0])
    pipeline.run(definition.read(str(path), {}), "own", tmp_path / "out")
    more = definition.read(str(path), {"metrics": ["val/top1", "val/top5"]})
    made = pipeline.run(more, "own", tmp_path / "out", train=False)
    assert made["runs"]["inv"]["val/top5"]["mean"] == 0.75
    other = definition.read(str(path), {"metrics": ["val/miou"]})
    with pytest.raises(RecipeError, match="metrics has val/miou, expected some of what the trainings logged: val/top5"):
        pipeline.run(other, "own", tmp_path / "out", train=False)


def test_whose_results_are_in_a_folder(tmp_path, data, scored, monkeypatch):
    """The same folder by another name is the same; a result without its recipe is nobody's."""
    study = definition.read(str(write_study(tmp_path, data, seeds=[0])), {})
    monkeypatch.chdir(tmp_path)
    pipeline.run(study, "own", "out")
    assert pipeline.run(study, "own", tmp_path / "out", train=False)["complete"]
    (tmp_path / "out/inv/seed0/recipe.yaml").unlink()
    with pytest.raises(RecipeError, match="is not the configuration of this comparison's inv, seed0"):
        pipeline.run(study, "own", "out", train=False)


def test_one_command_at_a_time(tmp_path, data, scored):
    study = definition.read(str(write_study(tmp_path, data, seeds=[0])), {})
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out/.lock"), pytest.raises(RecipeError, match="where another command is training"):
        pipeline.run(study, "own", tmp_path / "out")
    assert pipeline.run(study, "own", tmp_path / "out")["complete"]


def test_recipes_are_built_before_anything_is_trained(tmp_path, data, scored):
    path = write_study(tmp_path, data, seeds=[0])
    recipe = yaml.safe_load((tmp_path / "inv.yaml").read_text())
    del recipe["model"]["init_args"]["num_classes"]
    (tmp_path / "inv.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match=r"has no model\.init_args\.num_classes"):
        pipeline.run(definition.read(str(path), {}), "own", tmp_path / "out")
    assert not (tmp_path / "out/conv").exists()


def test_stopped_comparison_goes_on(tmp_path, data, here):
    """SIGTERM in the middle of a training: it saves itself, and ends with the weights of one that was not stopped."""
    path = write_study(tmp_path, data, seeds=[0], overrides={"trainer": {"max_epochs": 40}})
    command = [sys.executable, "-m", "pyinvolution", "study", str(path), "--only", "inv"]

    def start(output):
        return subprocess.Popen([*command, "--output", str(output)], env=environment(), stdout=subprocess.DEVNULL)

    pipeline.run(definition.read(str(path), {}), "own", tmp_path / "whole", only=["inv"])
    assert here == ["inv, seed0"]
    process = start(tmp_path / "half")
    last = tmp_path / "half/inv/seed0/last.ckpt"
    end = time.monotonic() + 200
    while not last.is_file() and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(200) == 143
    step = torch.load(last, weights_only=True)["global_step"]
    assert 0 < step < 240, "else it was stopped too late"
    assert not (last.parent / "result.json").exists()
    assert start(tmp_path / "half").wait(300) == 0
    one, other = (
        torch.load(tmp_path / name / "inv/seed0/last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "half")
    )
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    results = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "half")]
    found = [result["runs"]["inv"]["trainings"][0] for result in results]
    assert found[0]["metrics"] == found[1]["metrics"]
    assert found[0]["curves"] == found[1]["curves"]
