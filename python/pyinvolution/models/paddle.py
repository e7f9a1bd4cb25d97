"""Weights of PaddleClas (``RedNet50_pretrained.pdparams``), read without Paddle.

A ``.pdparams`` file is a pickle, and a pickle can run any code. Here its only classes are stand-ins that hold an
array's size and bytes: nothing that a file names is imported or called, and what is not an array, a dict, a string, a
number or bytes is refused.

The names are those of the authors' code without ``backbone.`` and ``head.``; statistics are ``_mean`` and
``_variance``, and the classifier's matrix is (features, classes). Sources:
``ppcls/arch/backbone/model_zoo/rednet.py`` of PaddleClas and
``python/paddle/framework/io.py`` (Paddle 3.3).
"""

import math
import os
import pickle
import re
import sys
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["read_pdparams"]

_DTYPES = {
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "i4": torch.int32,
    "i8": torch.int64,
}
_NAMES_OF_PARAMETERS = "StructuredToParameterName@@"


def read_pdparams(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a file of ``paddle.save``, under the names of the authors' code (for `load_official`).

    Args:
        path: the file; pickle protocols 2 to 4 and both names that numpy has had for its functions are understood.

    Returns:
        Tensors on the CPU in the file's dtypes, with a counter of batches, 0, for each norm that has statistics.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds more than named arrays.
    """
    where = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {where}")
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file, encoding="latin1").load()
        return _renamed(_arrays(content))
    except Exception as error:  # a damaged file can be wrong in any way
        text = str(error) or type(error).__name__
        raise ValueError(f"{where} is not a file of named arrays by paddle.save, or a damaged one: {text}") from error


def _arrays(content: object) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        raise TypeError(f"it holds a {type(content).__name__}, expected a dict")
    found = {}
    for name, value in content.items():
        if name == _NAMES_OF_PARAMETERS:
            continue
        if not isinstance(name, str) or not isinstance(value, _Array):
            raise TypeError(f"it has a {type(value).__name__.strip('_')} at {name!r}, expected an array")
        found[name] = value.tensor()
    if not found:
        raise ValueError("it holds no arrays")
    return found


def _renamed(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for given, value in arrays.items():
        if given == "fc.weight":
            value = value.t().contiguous()
        name = re.sub(r"^fc\.", "head.fc.", re.sub(r"\._variance$", ".running_var", given))
        name = re.sub(r"\._mean$", ".running_mean", name)
        if name in state:
            raise ValueError(f"it has {given!r} and another array that is {name!r}")
        state[name] = value
        if given.endswith("._mean"):
            state[name.removesuffix("running_mean") + "num_batches_tracked"] = torch.tensor(0)
    return state


# --- what a pickle may build ------------------------------------------------------------------------------------------


class _DType:
    """``numpy.dtype("f4", ...)``, then its byte order."""

    def __init__(self, name: object = None, *_: object) -> None:
        if name not in _DTYPES:
            raise ValueError(f"an array has dtype {name!r}, expected one of {', '.join(_DTYPES)}")
        self.name = str(name)

    def __setstate__(self, state: object) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ("<" if sys.byteorder == "little" else ">", "=", "|"):
            raise ValueError(f"an array has byte order {order!r}, expected this machine's")


class _Array:
    """``numpy.ndarray``: version, shape, dtype, whether in Fortran's order, and the bytes."""

    shape: tuple[int, ...]
    dtype: _DType
    data: bytes

    def __init__(self) -> None:
        raise TypeError("an array without its content")

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise TypeError("an array's state is not of numpy's form")
        _, shape, dtype, fortran, data = state
        if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
            raise TypeError(f"an array has shape {shape!r}, expected integers")
        if not isinstance(dtype, _DType) or not isinstance(data, bytes) or fortran is not False:
            raise TypeError("an array is not of plain numbers in C's order")
        self.shape, self.dtype, self.data = shape, dtype, data

    def tensor(self) -> Tensor:
        if not hasattr(self, "data"):
            raise TypeError("an array without its content")
        dtype = _DTYPES[self.dtype.name]
        if len(self.data) != math.prod(self.shape) * dtype.itemsize:
            raise ValueError(f"an array of shape {self.shape} has {len(self.data)} bytes")
        # A writable copy: several entries may share what the file has once.
        return (
            torch.frombuffer(bytearray(self.data), dtype=dtype).view(self.shape)
            if self.data
            else torch.empty(self.shape, dtype=dtype)
        )


def _reconstruct(kind: object, shape: object, code: object) -> _Array:
    if kind is not _Array:
        raise TypeError("an array of another class than numpy.ndarray")
    return _Array.__new__(_Array)


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """How protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise TypeError(f"bytes are written as a {type(text).__name__} in {encoding!r}, expected a string in 'latin1'")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle._Unpickler):  # not the one in C, which calls what the process has registered (`copyreg`)
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise ValueError(f"it names {module}.{name}, which is not called")
        return _ALLOWED[module, name]

    def get_extension(self, code: int) -> None:
        raise ValueError(f"it names the registered extension {code}, which is not called")

    def _set_state(self: Any) -> None:
        if not isinstance(self.stack[-2], (_Array, _DType)):  # else a file could change the functions here
            raise ValueError(f"it sets the state of a {type(self.stack[-2]).__name__}")
        pickle._Unpickler.dispatch[pickle.BUILD[0]](self)

    dispatch: ClassVar[Any] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: _set_state}
