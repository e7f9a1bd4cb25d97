"""Weights of our models on disk: safetensors, with a small JSON that says which model they belong to."""

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from pyinvolution._files import replacing
from pyinvolution.models._registry import create_model
from pyinvolution.models.checkpoint import check_fit, reason_of
from pyinvolution.models.hub import download, is_repository

__all__ = ["from_pretrained", "save_pretrained"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_pretrained(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write ``path``/config.json and ``path``/model.safetensors, replacing those that are there.

    Args:
        model: built by `create_model`, from arguments that JSON can hold.
        path: a folder; it is made if need be.

    Returns:
        The folder.

    Raises:
        ModuleNotFoundError: safetensors is not installed (``pip install "pyinvolution[export]"``).
        TypeError: the model does not come from `create_model`, or an argument of it is not plain data.
        OSError: the files cannot be written; those that were there are kept.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    config = getattr(model, "model_config", None)
    if not isinstance(config, dict):
        raise TypeError(
            f"model is a {type(model).__name__} of unknown arguments, expected one that create_model has built"
        )
    try:
        text = json.dumps(config, indent=2) + "\n"
    except TypeError as error:
        raise TypeError(f"model was built from arguments that JSON cannot hold: {error}") from None
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().contiguous().cpu() for name, value in model.state_dict().items()}
    try:
        # The weights get their name first: no configuration is there without them.
        with replacing(folder / CONFIG) as names, replacing(folder / WEIGHTS) as weights:
            names.write_text(text)
            save_file(state, weights, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"cannot write {folder / WEIGHTS}: {error}") from None
    return folder


def from_pretrained(path: str | os.PathLike[str], *, revision: str | None = None, **overrides: Any) -> nn.Module:
    """Build the model that `save_pretrained` wrote to ``path``, with its weights in their dtype, on the CPU.

    Args:
        path: the folder; or OWNER/NAME of a model on Hugging Face's hub that `push_to_hub` has uploaded, if there is
            neither a folder of this name nor a folder OWNER here.
        revision: branch, tag or commit on the hub.
        overrides: arguments of `create_model` instead of the saved ones, as far as they change no weights (e.g.
            ``grad_checkpointing=True``).

    Returns:
        The model, in training mode like a new one.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is damaged, the configuration is not one of this version of the library, or the weights are
            not those of the model.
        ModuleNotFoundError, TypeError: safetensors is not installed, or huggingface_hub for a model on the hub; an
            override is unknown.
        ConnectionError: the hub has no such model, or cannot be reached.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = download(os.fspath(path), (CONFIG, WEIGHTS), revision) if is_repository(path) else Path(path)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"there is no {folder / file}")
    try:
        config = json.loads((folder / CONFIG).read_text())
        name = config.pop("name")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} does not name a model: {type(error).__name__}: {error}") from None
    try:
        state = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged: {error}") from None
    try:
        model = create_model(name, **{**config, **overrides})
    except Exception as error:
        if overrides:
            raise
        raise ValueError(f"{folder / CONFIG} does not describe a model of this library: {reason_of(error)}") from error
    check_fit(state, model, f"{folder / WEIGHTS}, of {name!r} by {CONFIG},")
    # The file's tensors become the parameters, and keep their dtype.
    model.load_state_dict(state, assign=True)
    return model
