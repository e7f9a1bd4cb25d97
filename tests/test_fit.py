"""Training by a function, without a command line."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning")
from recipe_support import (
    assert_same_state,
    fit_arguments,
    one_thread,  # noqa: F401
    training_state,
    write_images,
)

from pyinvolution.recipes import RecipeError, configs, small_data
from pyinvolution.recipes import cli as recipe_cli
from pyinvolution.recipes.data import data_of


def test_fit_by_the_configuration_that_a_run_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends with the bits of that run; the arguments of this process play no part."""
    data, folder = write_images(tmp_path / "data"), tmp_path / "run"
    recipe_cli.run(fit_arguments(data, folder, "--trainer.max_epochs=2"))
    config = configs.load(str(folder / "logs/version_0/config.yaml"))
    config["trainer"]["default_root_dir"] = str(tmp_path / "again")
    monkeypatch.setattr(sys, "argv", ["program", "--its", "own"])
    trainer = recipe_cli.fit(config)
    assert sys.argv == ["program", "--its", "own"]
    assert trainer.current_epoch == 2
    assert data_of(trainer).steps_per_epoch == 6
    assert_same_state(training_state(tmp_path / "again/last.ckpt"), training_state(folder / "last.ckpt"))
    config["trainer"]["max_epochs"] = 3
    assert recipe_cli.fit(config, tmp_path / "again/last.ckpt").global_step == 18
    with pytest.raises(RecipeError, match=r"model\.lr is -1\.0, expected a positive number"):
        recipe_cli.fit(configs.merge(config, {"model": {"init_args": {"lr": -1}}}))


def test_other_processes_get_arguments_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pyinvolution", "demo"])
    with recipe_cli.other_processes(["fit", "--config", "own.yaml"]):
        assert sys.argv == ["pyinvolution", "fit", "--config", "own.yaml"]
    assert sys.argv == ["pyinvolution", "demo"]


def test_unknown_small_data(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="make_data is 'imagenet', expected one of cityscapes-digits, coco-digits, "):
        small_data.write("imagenet", tmp_path)
