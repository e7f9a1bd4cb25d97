"""What the recipes use of Lightning beyond its public interface, that is, what breaks when its limit is lifted."""

import ast
import inspect
from pathlib import Path

import pytest

pytest.importorskip("lightning")
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI

from pyinvolution.recipes import _lightning


def test_the_installed_version_has_all_private_names() -> None:
    missing = _lightning.missing()
    assert not missing, "recipes/_lightning.py needs another way to:\n" + "\n".join(missing)


def test_each_difference_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for _, name, _ in _lightning.METHODS[:3]:
        monkeypatch.delattr(ModelCheckpoint, name)
    monkeypatch.setattr(LightningCLI, "_get", lambda self, key: None)
    monkeypatch.setattr(_lightning, "VALIDATION_PROGRESS", "somewhere.else")
    monkeypatch.setattr(_lightning, "cluster_environment", lambda trainer: trainer.no_connector)
    monkeypatch.setattr(_lightning, "ATTRIBUTES", ((EMAWeightAveraging, "_nothing"),))
    found = _lightning.missing()
    assert "EMAWeightAveraging._nothing is missing" in found
    for name in ("_save_last_checkpoint", "_monitor_candidates", "_find_last_checkpoints"):
        assert f"ModelCheckpoint.{name} is missing" in found
    assert "LightningCLI._get takes ('self', 'key'), expected ('self', 'config', 'key', 'default')" in found
    assert "the state of Trainer.fit_loop has no entry 'somewhere.else'" in found
    (text,) = (text for text in found if "environment" in text)
    assert "no_connector" in text
    assert len(found) == 7


def test_all_private_names_are_in_the_table_and_in_one_file() -> None:
    """A name with one underscore that is looked up in anything but ``self``, a class of ours or torch is foreign."""
    folder = Path(_lightning.__file__).parent
    known = {name for _, name, *_ in (*_lightning.METHODS, *_lightning.ATTRIBUTES)} | {"_accelerator_connector"}
    own = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                own.add(node.name)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own.add(node.attr)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                own.add(node.target.id)
    for path in folder.rglob("*.py"):
        here = path.name == "_lightning.py"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                if here:
                    assert node.attr in known, f"{path.name}:{node.lineno}: {node.attr} is not in the table"
                else:
                    assert node.attr in own - known, f"{path}:{node.lineno}: {node.attr} belongs into _lightning.py"


def test_overrides_are_called_by_lightning() -> None:
    """A method that Lightning no longer calls would be overridden in vain."""
    calls = {node.attr for node in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(ModelCheckpoint))))
             if isinstance(node, ast.Attribute)}  # fmt: skip
    assert "_save_checkpoint" in calls
    calls = {node.attr for node in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(LightningCLI))))
             if isinstance(node, ast.Attribute)}  # fmt: skip
    assert "_parse_ckpt_path" in calls
