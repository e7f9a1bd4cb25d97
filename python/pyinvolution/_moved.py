"""Modules under the names they had before: users' imports, and class paths in their files, lead to the new place."""

import sys
import warnings
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

__all__ = ["alias_modules"]


class _Alias(ModuleType):
    """Stands for a module that has moved; what is looked up in it comes from the new one, with a warning."""

    def __init__(self, old: str, new: str) -> None:
        super().__init__(old, f"Moved to `{new}`.")
        self._new = new

    def __getattr__(self, name: str) -> Any:
        # Tools that look through sys.modules ask for __file__ and the like.
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(import_module(self._new), name)
        warnings.warn(f"{self.__name__} has moved to {self._new}", DeprecationWarning, stacklevel=2)
        return value


def alias_modules(moved: Mapping[str, str]) -> None:
    """Let each old name in ``moved`` be imported as before; the parent packages of the old names must exist.

    The new modules are imported when something is looked up in the old ones.
    """
    for old, new in moved.items():
        sys.modules[f"pyinvolution.{old}"] = _Alias(f"pyinvolution.{old}", f"pyinvolution.{new}")
