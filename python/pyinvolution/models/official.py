"""Checkpoints of the authors' code (mmcls, mmdet, mmseg), in both directions."""

import datetime
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from pyinvolution.models.rednet import LAYERS

__all__ = ["load_official", "official_key", "official_state_dict"]

Model = TypeVar("Model", bound=nn.Module)

# Our names to theirs: every pattern is applied, in this order.
_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^stem\.conv1\.", "stem.0.conv."),
        (r"^stem\.norm1\.", "stem.0.bn."),
        (r"^stem\.involution\.", "stem.1."),
        (r"^stem\.norm2\.", "stem.2."),
        (r"^stem\.conv2\.", "stem.4.conv."),
        (r"^stem\.norm3\.", "stem.4.bn."),
        (r"^(layer\d+\.\d+)\.norm([123])\.", r"\1.bn\2."),
        (r"^(layer\d+\.\d+)\.involution\.", r"\1.conv2."),
        (r"^(layer\d+\.\d+)\.downsample\.conv\.", r"\1.downsample.0."),
        (r"^(layer\d+\.\d+)\.downsample\.norm\.", r"\1.downsample.1."),
        (r"\.reduce\.conv\.", ".conv1.conv."),
        (r"\.reduce\.norm\.", ".conv1.bn."),
        (r"\.span\.", ".conv2.conv."),
        (r"^head\.", "head.fc."),
        (r"^(?=stem\.|layer\d)", "backbone."),
    )
)
_BLOCK = re.compile(r"layer(\d+)\.(\d+)\.")
_DEPTHS = {layers: depth for depth, layers in LAYERS.items()}


def official_key(key: str) -> str:
    """The name which the authors' code gives to the entry ``key`` of a `RedNet` state dict."""
    for pattern, replacement in _RENAMES:
        key = pattern.sub(replacement, key)
    return key


def official_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``model``, a `RedNet`, under the names of the authors' code."""
    return {official_key(key): value for key, value in model.state_dict().items()}


def load_official(model: Model, source: str | os.PathLike[str] | Mapping[str, object], *, head: bool = True) -> Model:
    """Load a checkpoint of the authors' code into ``model``, completely or not at all.

    Files hold a state dict, or a dict with one under ``"state_dict"``, with keys such as
    ``backbone.layer1.0.conv2.conv1.conv.weight`` and ``head.fc.weight``. The prefix ``module.`` of a parallel
    wrapper is removed, and backbone files without ``backbone.`` are understood. Every entry must fit: a
    missing, unexpected or differently shaped one is an error. Only tensors and plain data are read from a
    file (torch.load with ``weights_only=True``).

    Args:
        model: a `RedNet` of the same depth and width.
        source: path of the checkpoint, or the dict itself.
        head: False keeps the model's own classifier and reads only ``backbone.*``, e.g. for another number of
            classes or a detector's checkpoint. A model with ``num_classes=0`` always does.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: ``source`` or an entry of it has the wrong type.
        ValueError: the file is unreadable or unsafe, or it does not fit; the message names the depth it seems
            to have and the offending keys.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(source, (str, os.PathLike)):
        where, content = f"checkpoint {os.fspath(source)!r}", _read(source)
    else:
        where, content = "state dict", source
    given = _entries(content, where)
    own = model.state_dict()
    if not head or not any(key.startswith("head.") for key in own):
        given = {key: value for key, value in given.items() if key.startswith("backbone.")}
        own = {key: value for key, value in own.items() if not key.startswith("head.")}
    names = {official_key(key): key for key in own}

    missing = [name for name in names if name not in given]
    unexpected = [name for name in given if name not in names]
    misshapen = [
        f"{name} is {tuple(given[name].shape)}, the model has {tuple(own[key].shape)}"
        for name, key in names.items()
        if name in given and given[name].shape != own[key].shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "wrong shape": misshapen}
    if any(faults.values()):
        listed = "; ".join(f"{fault}: {_shorten(keys)}" for fault, keys in faults.items() if keys)
        if all(name.startswith("head.") for keys in faults.values() for name in keys):
            listed += ". The backbone fits: head=False loads it and keeps the model's own classifier"
        raise ValueError(
            f"{where} seems to be {_describe(given)} and does not fit the model, {_describe(names)}; {listed}"
        )

    model.load_state_dict({key: given[name] for name, key in names.items()}, strict=head)
    return model


def _read(path: str | os.PathLike[str]) -> object:
    try:
        with torch.serialization.safe_globals(_plain_types()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = f"checkpoint {os.fspath(path)!r} is damaged or holds more than tensors and plain data"
        remedy = "where you trust it, save its state dict alone: torch.save(checkpoint['state_dict'], path)"
        raise ValueError(f"{reason}, and will not be executed ({remedy}). {error}") from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"checkpoint {os.fspath(path)!r} is no readable torch file. {error}") from error


def _plain_types() -> list:
    # Metadata beside the weights may hold times and numpy scalars, which run no code of the file's choice.
    types: list = [datetime.datetime, datetime.date, datetime.timedelta]
    try:
        import numpy
    except ImportError:
        return types
    scalar = numpy.float64(0).__reduce__()[0]
    types += [numpy.dtype, *(type(numpy.dtype(kind)) for kind in "?bhilqBHILQefdUS")]
    return [*types, *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))]


def _entries(content: object, where: str) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        expected = "a dict of tensors, or a dict with one as 'state_dict'"
        raise TypeError(f"{where} must be {expected}, got {type(content).__name__}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise TypeError(f"{where} must map names to tensors, got {type(value).__name__} at {key!r}")
    entries = dict(content)
    if entries and all(key.startswith("module.") for key in entries):
        entries = {key.removeprefix("module."): value for key, value in entries.items()}
    if not any(key.startswith("backbone.") for key in entries):
        bare = re.compile(r"(stem\.\d|layer\d+\.)")
        entries = {f"backbone.{key}" if bare.match(key) else key: value for key, value in entries.items()}
    if not any(key.startswith("backbone.") for key in entries):
        raise ValueError(f"{where} has no entry 'backbone.*' of the authors' format, got {_shorten(entries)}")
    return entries


def _describe(keys: Iterable[str]) -> str:
    blocks: dict[int, int] = {}
    for match in filter(None, map(_BLOCK.search, keys)):
        stage, block = map(int, match.groups())
        blocks[stage] = max(blocks.get(stage, 0), block + 1)
    layers = tuple(blocks[stage] for stage in sorted(blocks))
    return f"RedNet-{_DEPTHS[layers]}" if layers in _DEPTHS else f"a RedNet with layers={layers}"


def _shorten(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "nothing"
