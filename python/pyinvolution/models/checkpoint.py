"""Checkpoints: reading their files safely, and telling whose they are. `loading` loads their weights."""

import datetime
import os
import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from textwrap import shorten
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyinvolution.models.paddle import read_pdparams

__all__ = ["Origin", "check_fit", "origin", "read", "reason_of", "weights"]

Origin = Literal["authors", "recipe", "library"]
"""Whose format a checkpoint has: the one of the authors' code (mmcls, mmdet, mmseg), of a recipe's training run, or
of a state dict of this library's models."""

_AUTHORS = re.compile(
    r"(module\.)?"
    r"(backbone\.stem\.\d|stem\.\d\.(conv|bn)\.|neck\.(lateral|fpn)_convs\.|(rpn|roi|bbox)_head\.|head\.fc\.)"
)


def read(path: str | os.PathLike[str], *, mmap: bool = False) -> dict[str, Any]:
    """The dict in a file that torch.save wrote, on the CPU; of a ``.pdparams`` file, `read_pdparams`.

    Only tensors and plain data are read; no code of the file is executed.

    Args:
        path: the file.
        mmap: map the file into memory and read a tensor when it is used; not for files of torch before 1.6.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, holds more than tensors and plain data, or does not hold a dict.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {os.fspath(path)}")
    if Path(path).suffix == ".pdparams":
        return dict(read_pdparams(path))
    try:
        with torch.serialization.safe_globals(_plain_types()):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if not isinstance(checkpoint, dict):
            raise TypeError(f"it holds a {type(checkpoint).__name__}, expected a dict")
    except UnpicklingError as error:
        # torch's own text advises to switch this safety off.
        remedy = "if you trust it, save only its state dict: torch.save(checkpoint['state_dict'], path)"
        reason = f"it is damaged or holds more than tensors and plain data, and will not be executed ({remedy})"
        raise ValueError(f"{os.fspath(path)} is not a checkpoint: {reason}") from error
    except Exception as error:  # a damaged file can be wrong in any way
        raise ValueError(f"{os.fspath(path)} is not a checkpoint, or a damaged one: {reason_of(error)}") from error
    return checkpoint


def _plain_types() -> list[Any]:
    # Metadata beside the weights may hold times and numpy scalars, which run no code of the file's choice.
    types: list[Any] = [datetime.datetime, datetime.date, datetime.timedelta]
    try:
        import numpy
    except ImportError:
        return types
    scalar = numpy.float64(0).__reduce__()[0]
    types += [numpy.dtype, *(type(numpy.dtype(kind)) for kind in "?bhilqBHILQefdUS")]
    return [*types, *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))]


def weights(checkpoint: Mapping[str, Any], where: str = "the checkpoint") -> dict[str, Tensor]:
    """The state dict of a checkpoint: its entry ``state_dict``, or the checkpoint itself.

    Raises:
        ValueError: there is none; the message begins with ``where``.
    """
    state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, Mapping) or not state or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{where} holds no weights, expected a dict of tensors, perhaps under 'state_dict'")
    return dict(state)


def origin(checkpoint: Mapping[str, Any]) -> Origin:
    """Whose format a checkpoint has, by the names in it.

    Raises:
        ValueError: it holds no weights.
    """
    if "hyper_parameters" in checkpoint and "state_dict" in checkpoint:
        return "recipe"
    return "authors" if any(map(_AUTHORS.match, weights(checkpoint))) else "library"


def check_fit(state: Mapping[str, Any], model: nn.Module, where: str) -> None:
    """See that ``state`` has the names and shapes of the state dict of ``model``.

    Raises:
        ValueError: it differs; the message begins with ``where``.
    """
    expected = {name: _kind(value) for name, value in model.state_dict().items()}
    found = {name: _kind(value) for name, value in state.items()}
    different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if different:
        name = different[0]
        raise ValueError(
            f"{where} is of another model: {len(different)} of {len(expected)} entries differ in name or shape; the "
            f"first, {name}, is {found.get(name, 'missing')}, expected {expected.get(name, 'no such entry')}"
        )


def reason_of(error: BaseException) -> str:
    """What an error says, on one line of at most 300 characters."""
    return shorten(str(error), 300, placeholder=" ...") or type(error).__name__


def _kind(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"
