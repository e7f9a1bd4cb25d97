"""Checkpoints of the authors' code (mmcls, mmdet, mmseg), in both directions."""

import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import singledispatch
from typing import TypeVar

from torch import Tensor, nn

from pyinvolution.models.checkpoint import read
from pyinvolution.models.rednet import LAYERS, RedNet

__all__ = [
    "Entry",
    "fpn_entries",
    "load_official",
    "official_entries",
    "official_key",
    "official_state_dict",
    "prefixed",
]

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


def _same(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class Entry:
    """Where the authors' files keep an entry of a model's state dict.

    Attributes:
        name: there, e.g. ``roi_head.bbox_head.fc_cls.weight``.
        decode: makes our tensor of theirs, where the two differ, e.g. in the order of classes.
        encode: its inverse.
    """

    name: str
    decode: Callable[[Tensor], Tensor] = _same
    encode: Callable[[Tensor], Tensor] = _same

    @property
    def part(self) -> str:
        """backbone, neck, rpn_head, roi_head.mask_head, ..."""
        return ".".join(self.name.split(".")[: 2 if self.name.startswith("roi_head.") else 1])


@singledispatch
def official_entries(model: nn.Module) -> dict[str, Entry]:
    """The `Entry` of every key in the state dict of ``model``.

    This one is for a `RedNet`. Models that consist of parts (backbone, neck, heads) register their own.
    """
    return {key: Entry(official_key(key)) for key in model.state_dict()}


def fpn_entries(fpn: nn.Module) -> dict[str, Entry]:
    """Entries of an `FPN` of either kind, as the part ``neck``."""
    levels = len(fpn.inner_blocks)  # type: ignore[arg-type]
    renames = (
        (r"^inner_blocks\.(\d+)\.0\.", r"lateral_convs.\1.conv."),
        (r"^layer_blocks\.(\d+)\.0\.", r"fpn_convs.\1.conv."),
        (r"^layer_blocks\.", "fpn_convs."),
        (r"^extra_blocks\.p6\.", f"fpn_convs.{levels}.conv."),
        (r"^extra_blocks\.p7\.", f"fpn_convs.{levels + 1}.conv."),
    )
    entries = {}
    for key in fpn.state_dict():
        name = official_key(key)
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        entries[key] = Entry(f"neck.{name}")
    return entries


def prefixed(prefix: str, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The same entries in a module where the keys begin with ``prefix``."""
    return {prefix + key: entry for key, entry in entries.items()}


def official_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``model``, a `RedNet` or a model with one, under the names of the authors' code."""
    entries = official_entries(model)
    return {entries[key].name: entries[key].encode(value) for key, value in model.state_dict().items()}


def load_official(model: Model, source: str | os.PathLike[str] | Mapping[str, object], *, head: bool = True) -> Model:
    """Load a checkpoint of the authors' code into ``model``.

    Files hold a state dict, or a dict with one under ``"state_dict"``, with keys such as
    ``backbone.layer1.0.conv2.conv1.conv.weight``, ``neck.fpn_convs.0.conv2.conv.bias`` and ``head.fc.weight``. The
    prefix ``module.`` of a parallel wrapper is removed, and backbone files without ``backbone.`` are understood. Only
    tensors and plain data are read from a file (torch.load with ``weights_only=True``). PaddleClas's files
    (``.pdparams``), which were converted from the authors', are read without Paddle and without executing anything.

    A `RedNet` is loaded completely or not at all. A detector or segmentation model gets the parts (backbone, neck,
    heads) that the file has, e.g. the backbone of a classifier, and a warning names the others. In either case every
    entry of a part must fit: a missing, unexpected or differently shaped one is an error, and nothing is loaded.

    Args:
        model: a `RedNet`, detector or segmentation model of the same depth and width.
        source: path of the checkpoint, or the dict itself.
        head: False keeps the model's own heads and reads only backbone and neck, e.g. for another number of classes;
            a `RedNet` may so be read from a detector's checkpoint. A `RedNet` with ``num_classes=0`` always does.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: ``source`` or an entry of it has the wrong type.
        ValueError: the file is unreadable or unsafe, or it does not fit; the message names the depth it seems
            to have and the offending keys.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    if isinstance(source, (str, os.PathLike)):
        where = f"checkpoint {os.fspath(source)!r}"
        content: object = read(source)
    else:
        where, content = "state dict", source
    entries = official_entries(model)
    if not head:
        entries = {key: entry for key, entry in entries.items() if entry.part in ("backbone", "neck")}
    parts = list(dict.fromkeys(entry.part for entry in entries.values()))
    given = _entries(content, where, parts)
    if parts == ["backbone"] or not isinstance(model, RedNet):
        absent = [part for part in parts if not _of(given, part)]
        foreign = [name for name in given if not any(_of([name], part) for part in parts)]
        entries = {key: entry for key, entry in entries.items() if entry.part not in absent}
        given = {name: value for name, value in given.items() if name not in foreign}

    own = model.state_dict()
    names = {entry.name: key for key, entry in entries.items()}
    expected = {entry.name: tuple(entry.encode(own[key]).shape) for key, entry in entries.items()}
    faults = {
        "missing": [name for name in names if name not in given],
        "unexpected": [name for name in given if name not in names],
        "wrong shape": [
            f"{name} is {tuple(given[name].shape)}, the model has {shape}"
            for name, shape in expected.items()
            if name in given and tuple(given[name].shape) != shape
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{fault}: {_shorten(keys)}" for fault, keys in faults.items() if keys)
        if not any(name.startswith(("backbone.", "neck.")) for keys in faults.values() for name in keys):
            listed += ". The backbone fits: head=False loads it and keeps the model's own heads"
        listed += _stem_hint(given, expected)
        raise ValueError(
            f"{where} seems to be {_describe(given)} and does not fit the model, {_describe(names)}; {listed}"
        )
    if head and not isinstance(model, RedNet) and (absent or foreign):
        said = [f"lacks {', '.join(absent)}, which the model keeps as it is"] * bool(absent)
        said += [f"has {_shorten(foreign)}, for which the model has no place"] * bool(foreign)
        warnings.warn(f"{where} {' and '.join(said)}", stacklevel=2)
    model.load_state_dict({key: entry.decode(given[entry.name]) for key, entry in entries.items()}, strict=False)
    return model


def _of(names: Iterable[str], part: str) -> bool:
    return any(name.startswith(f"{part}.") for name in names)


def _stem_hint(given: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> str:
    conv, span = "backbone.stem.0.conv.weight", "backbone.stem.1.conv2.conv.bias"
    if not all(name in given and name in expected for name in (conv, span)) or given[span].shape == expected[span]:
        return ""
    theirs, ours = (math.isqrt(16 * shape[0] // expected[conv][0]) for shape in (given[span].shape, expected[span]))
    return (
        f". The involution in its stem is {theirs}x{theirs}, the model's {ours}x{ours} (the authors' classifiers have "
        f"3x3, their detectors and segmentation models 7x7): build the model with stem_kernel_size={theirs}"
    )


def _entries(content: object, where: str, parts: Iterable[str]) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        expected = "a dict of tensors, or a dict with one as 'state_dict'"
        raise TypeError(f"{where} is a {type(content).__name__}, expected {expected}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise TypeError(f"{where} has a {type(value).__name__} at {key!r}, expected a tensor")
    entries = dict(content)
    if entries and all(key.startswith("module.") for key in entries):
        entries = {key.removeprefix("module."): value for key, value in entries.items()}
    if not any(key.startswith("backbone.") for key in entries):
        bare = re.compile(r"(stem\.\d|layer\d+\.)")
        entries = {f"backbone.{key}" if bare.match(key) else key: value for key, value in entries.items()}
    if not any(_of(entries, part) for part in parts if part != "head"):
        raise ValueError(f"{where} has {_shorten(entries)}, expected entries 'backbone.*' of the authors' format")
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
