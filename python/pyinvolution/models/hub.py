"""Models on the hub of Hugging Face, through huggingface_hub where it is installed: files, and a card for them."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pyinvolution.models.checkpoint import read

__all__ = ["download", "is_repository", "model_card", "push_to_hub"]

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_OF_ONE_MACHINE = {"root", "predict_root", "init_from", "backbone_weights", "num_workers"}
"""Arguments of a recipe that say nothing to others."""


def is_repository(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` reads as OWNER/NAME of the hub and not as a folder here: neither it nor its parent exists."""
    text = os.fspath(path)
    return bool(_REPOSITORY.fullmatch(text)) and not Path(text).exists() and not Path(text).parent.is_dir()


def download(repository: str, files: Sequence[str], revision: str | None = None) -> Path:
    """The folder in huggingface_hub's cache with the ``files`` of a model of the hub.

    Raises:
        ModuleNotFoundError: huggingface_hub is not installed.
        ConnectionError: there is no such repository, it cannot be reached, or the cache cannot be written.
    """
    hub = _hub()
    try:
        return Path(hub.snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    except (OSError, ValueError) as error:  # its own errors are of these
        reason = " ".join(str(error).split())
        raise ConnectionError(
            f"path is {repository!r}, which is not a folder here, and cannot be had from the hub: {reason}"
        ) from error


def push_to_hub(
    model: nn.Module,
    repository: str,
    *,
    training: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    image: Sequence[int] | None = None,
    private: bool = False,
    token: str | None = None,
) -> str:
    """Upload what `save_pretrained` writes, and a `model_card` as README.md, to Hugging Face's hub.

    Args:
        model: built by `create_model`.
        repository: OWNER/NAME; it is made if need be.
        training: as of `model_card`.
        image: likewise.
        private: whether a new repository is.
        token: of the hub; None for the one that its login has stored.

    Returns:
        Address of the commit.

    Raises:
        ModuleNotFoundError: huggingface_hub or safetensors is not installed.
        TypeError, OSError: as `save_pretrained`; or the hub refuses.
        ValueError: ``repository`` is not OWNER/NAME.
    """
    from pyinvolution.models.pretrained import save_pretrained  # which downloads by this file

    if not _REPOSITORY.fullmatch(repository):
        raise ValueError(f"repository is {repository!r}, expected OWNER/NAME")
    api = _hub().HfApi(token=token)
    with TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        Path(folder, "README.md").write_text(model_card(model, training, image, repository), encoding="utf-8")
        api.create_repo(repository, private=private, exist_ok=True)
        made = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload a model of pyinvolution"
        )
    return str(getattr(made, "commit_url", made))


def model_card(
    model: nn.Module,
    training: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    image: Sequence[int] | None = None,
    repository: str = "OWNER/NAME",
) -> str:
    """Markdown that says what a model is, what it costs and how it was trained.

    Args:
        model: built by `create_model`.
        training: what is to be said, by name; or the checkpoint of a recipe's run, of which the card has the settings,
            without paths, and the number of steps.
        image: channels, height and width for which multiply-adds are counted; None leaves them out.
        repository: of the hub, from which the card loads the model.

    Raises:
        TypeError: the model does not come from `create_model`.
        FileNotFoundError, ValueError: there is no such checkpoint.
    """
    config = getattr(model, "model_config", None)
    if not isinstance(config, dict):
        raise TypeError(f"model is a {type(model).__name__} of unknown arguments, expected one of create_model")
    counts = {"parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}"}
    if image is not None:
        counts["multiply-adds"] = f"{_multiply_adds(model, image):,} for an image of {' x '.join(map(str, image))}"
    lines = [
        "---",
        "library_name: pyinvolution",
        "tags: [involution, rednet, pytorch]",
        "---",
        "",
        f"# {config['name']}",
        "",
    ]
    lines += ["A model of [involution](https://arxiv.org/abs/2103.06255), made with pyinvolution.", ""]
    lines += [
        "```python",
        "import pyinvolution",
        "",
        f'model = pyinvolution.models.from_pretrained("{repository}")',
        "```",
        "",
    ]
    lines += ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in counts.items()), ""]
    lines += [
        "## Configuration",
        "",
        "```json",
        json.dumps(config, indent=2, default=str),
        "```",
        "",
        "## Training",
        "",
    ]
    if training is None:
        lines.append("Nothing is known of how it was trained.")
    else:
        facts = training if isinstance(training, Mapping) else _facts(training)
        lines += ["```json", json.dumps(dict(facts), indent=2, default=str), "```"]
    return "\n".join(lines) + "\n"


def _facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Settings and steps of a recipe's run."""
    checkpoint = read(path)
    facts: dict[str, Any] = {}
    for title, key in (("model", "hyper_parameters"), ("data", "datamodule_hyper_parameters")):
        values = checkpoint.get(key)
        if not isinstance(values, Mapping):
            raise ValueError(
                f"training is {os.fspath(path)}, expected the checkpoint of a recipe's run: it has no {key}"
            )
        facts[title] = {
            name: _without_paths(value)
            for name, value in values.items()
            if name not in _OF_ONE_MACHINE and not name.startswith("_") and value is not None and not _is_path(value)
        }
    return facts | {"epochs": checkpoint.get("epoch"), "steps": checkpoint.get("global_step")}


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and (Path(value).is_absolute() or value.startswith("~"))


def _without_paths(value: Any) -> Any:
    """Without the entries that are paths of one machine."""
    if isinstance(value, Mapping):
        return {name: _without_paths(item) for name, item in value.items() if not _is_path(item)}
    if isinstance(value, (list, tuple)):
        return [_without_paths(item) for item in value if not _is_path(item)]
    return value


def _multiply_adds(model: nn.Module, image: Sequence[int]) -> int:
    weight, training = next(model.parameters()), model.training
    zeros = torch.zeros(1, *image, device=weight.device, dtype=weight.dtype)
    try:
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model.eval()([zeros[0]] if hasattr(model, "roi_heads") else zeros)
    finally:
        model.train(training)
    return counter.get_total_flops() // 2


def _hub() -> Any:
    try:
        return import_module("huggingface_hub")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("models on the hub need huggingface_hub: pip install huggingface_hub") from error
