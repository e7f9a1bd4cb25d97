"""Loading the weights of a checkpoint, whoever wrote it: this library, a recipe's training run or the authors' code."""

import os
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from pyinvolution.models.checkpoint import check_fit, origin, read, weights
from pyinvolution.models.official import load_official

__all__ = ["load", "load_backbone"]

Model = TypeVar("Model", bound=nn.Module)

_TO_BACKBONE = re.compile(r"^(module\.|net\.)?(backbone\.(body\.)?)?")


def load(model: Model, source: str | os.PathLike[str] | Mapping[str, Any]) -> Model:
    """Load the weights of a checkpoint, of any `Origin`, into ``model``: all of them or none.

    Only a checkpoint of the authors' code may lack parts of the model (`load_official`).

    Args:
        model: of the same architecture.
        source: path of the checkpoint, or its content.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: it is not a checkpoint, or the weights are of another model.
    """
    where, checkpoint = _open(source)
    state = weights(checkpoint, where)
    if state.keys() != model.state_dict().keys():
        if origin(checkpoint) == "authors":
            return load_official(model, source if isinstance(source, (str, os.PathLike)) else state)
        state = {key.removeprefix("net."): value for key, value in state.items()}  # a recipe's network
    check_fit(state, model, where)
    model.load_state_dict(state)
    return model


def load_backbone(backbone: Model, source: str | os.PathLike[str] | Mapping[str, Any]) -> Model:
    """Likewise the weights of a network's backbone, from a classifier, detector or segmentation model."""
    where, checkpoint = _open(source)
    state = weights(checkpoint, where)
    if origin(checkpoint) == "authors":
        return load_official(backbone, state)
    own = backbone.state_dict()
    bare = {_TO_BACKBONE.sub("", key): value for key, value in state.items()}
    found = {key: value for key, value in bare.items() if key in own}
    check_fit(found, backbone, where)
    backbone.load_state_dict(found)
    return backbone


def _open(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source), read(source)
    return "the checkpoint", source
