"""Modules that have moved: their old names still work, in imports, in configurations and in checkpoints, and warn."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("optuna")
from recipe_support import fit_arguments, one_thread, write_images  # noqa: F401

import pyinvolution
import pyinvolution.recipes
from pyinvolution import _moved
from pyinvolution.recipes import cli as recipe_cli

ALIASES = {name: module for name, module in sys.modules.items() if isinstance(module, _moved._Alias)}


@pytest.mark.parametrize("old", sorted(ALIASES))
def test_old_names_lead_to_the_new_modules(old: str) -> None:
    alias, new = ALIASES[old], import_module(ALIASES[old]._new)
    assert import_module(old) is alias
    assert not Path(pyinvolution.__path__[0], *old.split(".")[1:]).with_suffix(".py").exists(), "hidden by its alias"
    for name in new.__all__:
        with pytest.warns(DeprecationWarning, match=f"{old} has moved to {new.__name__}"):
            assert getattr(alias, name) is getattr(new, name)
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = alias.nothing_of_this_name


def test_first_import_of_a_process() -> None:
    """Without anything of the package in sys.modules."""
    script = "from pyinvolution.recipes.search.costs import CostTable as old\n"
    script += "from pyinvolution.studies.search.costs import CostTable as new\nassert old is new"
    done = subprocess.run([sys.executable, "-W", "always", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "DeprecationWarning: pyinvolution.recipes.search.costs has moved" in done.stderr


def test_old_class_paths_in_configuration_and_checkpoint(tmp_path: Path) -> None:
    """As `found.yaml` and the checkpoints of a search from before the move name them."""
    data = write_images(tmp_path / "data")
    held_out = ["--data=pyinvolution.recipes.search.HeldOut", "--data.held_out=0.5"]
    arguments = fit_arguments(data, tmp_path / "run", "--trainer.max_epochs=1")
    with pytest.warns(DeprecationWarning, match="pyinvolution.recipes.search has moved to pyinvolution.studies.search"):
        recipe_cli.run([arguments[0], *held_out, *arguments[1:]])
    path = tmp_path / "run" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["datamodule_hyper_parameters"]["_class_path"] = "pyinvolution.recipes.search.HeldOut"
    checkpoint["hyper_parameters"]["_class_path"] = "pyinvolution.recipes.classification.module.Classification"
    torch.save(checkpoint, path)
    common = ["--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}"]
    with pytest.warns(DeprecationWarning, match="has moved to"):
        run = recipe_cli.run(["validate", f"--ckpt_path={path}", *common])
    assert len(run.datamodule.val_samples) == 12
    assert type(run.model).__module__ == "pyinvolution.recipes.classification.task"
