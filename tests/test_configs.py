"""Configurations: what a copy of a packaged one takes from its base, and what is wrong with a file of one's own."""

import shutil
from pathlib import Path

import pytest
import yaml

from pyinvolution import cli

pytest.importorskip("lightning")
from pyinvolution.recipes import RecipeError, configs

NAMES = [name for name, _ in configs.listing()]


def output_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert not ended.value.code
    return capsys.readouterr().out


def parsed(capsys: pytest.CaptureFixture[str], *names: str) -> str:
    return output_of(capsys, "fit", *(f"--config={name}" for name in names), "--print_config")


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_elsewhere_is_the_same_configuration(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(configs.ROOT / name, "own.yaml")
    packaged = configs.load(name)
    assert configs.load("own.yaml") == packaged
    assert {"trainer", "model", "data"} <= packaged.keys()
    assert "base" not in packaged
    text = output_of(capsys, "configs", "--print", name)
    Path("printed.yaml").write_text(text)
    assert "base:" not in text
    assert configs.load("printed.yaml") == packaged


@pytest.mark.parametrize("folder", sorted({name.partition("/")[0] for name in NAMES}))
def test_a_copy_is_parsed_to_the_same(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = next(name for name in NAMES if name.startswith(f"{folder}/"))
    shutil.copy(configs.ROOT / name, "own.yaml")
    expected = parsed(capsys, name)
    assert parsed(capsys, "own.yaml") == expected
    values = yaml.safe_load(expected)
    lr = configs.load(name)["model"].get("init_args", configs.load(name)["model"])["lr"]
    assert values["model"]["init_args"]["lr"] == lr


def test_bases_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    (tmp_path / "_mine.yaml").write_text(
        "base: coco/_base.yaml\ntrainer: {max_epochs: 3}\nmodel: {init_args: {lr: 1e-3}}"
    )
    (tmp_path / "deeper" / "own.yaml").write_text("base: ../_mine.yaml\ntrainer: {devices: 2}\n")
    base, middle, own = configs.chain(str(tmp_path / "deeper" / "own.yaml"))
    assert base["trainer"]["max_epochs"] == 12
    assert middle == {"trainer": {"max_epochs": 3}, "model": {"init_args": {"lr": 0.001}}}
    assert own == {"trainer": {"devices": 2}}
    merged = configs.load(str(tmp_path / "deeper" / "own.yaml"))
    assert merged["trainer"] == {**base["trainer"], "max_epochs": 3, "devices": 2}
    assert merged["model"]["init_args"] == {**base["model"]["init_args"], "lr": 0.001}


def test_options_of_a_base_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line sees the options of the model that the printed file has: the base's, and one's own."""
    (tmp_path / "own.yaml").write_text(
        "base: bccd/faster_rcnn_inv.yaml\n"
        "model: {init_args: {options: {hidden: 8, backbone_options: {layers: [2, 2, 2]}}}}"
    )
    expected = configs.load("bccd/faster_rcnn_inv.yaml")["model"]["init_args"]["options"]
    assert (expected["neck"], expected["backbone_options"]["frozen_stages"]) == ("involution", -1)
    expected = configs.merge(expected, {"hidden": 8, "backbone_options": {"layers": [2, 2, 2]}})
    assert configs.load(str(tmp_path / "own.yaml"))["model"]["init_args"]["options"] == expected
    values = yaml.safe_load(parsed(capsys, str(tmp_path / "own.yaml")))
    assert values["model"]["init_args"]["options"] == expected


def test_options_of_an_earlier_configuration_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.yaml").write_text("model: {init_args: {options: {hidden: 8}}}")
    names = ["bccd/faster_rcnn_inv.yaml", str(tmp_path / "own.yaml")]
    values = yaml.safe_load(parsed(capsys, *names))
    expected = configs.merge(*(configs.load(name)["model"]["init_args"]["options"] for name in names))
    assert values["model"]["init_args"]["options"] == expected
    assert expected["neck"] == "involution"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: nowhere.yaml", "base in .*own.yaml is nowhere.yaml, expected a file relative to"),
        ("base: [a]", r"base in .*own.yaml is \['a'\], expected the path of a file"),
        ("base: own.yaml", "is own.yaml, expected a file that does not build on this one"),
        ("", "own.yaml holds nothing, expected a mapping"),
        ("- 1", "own.yaml holds a list, expected a mapping"),
        ("1: 2", "own.yaml holds a dict, expected a mapping of sections"),
        ("a: [", "own.yaml is not YAML"),
        ("a: !!python/name:os.mkdir", "own.yaml is not YAML"),
    ],
)
def test_what_is_wrong_with_a_file(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        configs.load(str(tmp_path / "own.yaml"))


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("1.5", 1.5), ("-2.E+3", -2000.0), (".5", 0.5), ("3", 3), ("1e", "1e"),
     ("2020-01-01x", "2020-01-01x"), (".inf", float("inf")), ("1_0.5", 10.5), ("e3", "e3"), ("yes", True)],
)  # fmt: skip
def test_numbers(text: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(f"a: {text}")
    found = configs.load(str(tmp_path / "own.yaml"))["a"]
    assert found == value
    assert type(found) is type(value)
