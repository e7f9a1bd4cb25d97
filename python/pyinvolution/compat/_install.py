"""Registers stand-ins under the names of what they stand in for, for imports that lie inside installed packages."""

import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from os import PathLike
from types import ModuleType
from typing import Any


class _Distribution(metadata.Distribution):
    """A name and a version."""

    def __init__(self, name: str, version: str) -> None:
        self.text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"

    def read_text(self, filename: str) -> str | None:
        return self.text if filename == "METADATA" else None

    def locate_file(self, path: str | PathLike[str]) -> Any:
        raise FileNotFoundError(path)


class _Finder(metadata.DistributionFinder):
    """Answers `importlib.metadata.version` for what is installed here, and finds no modules."""

    versions: dict[str, str]

    def __init__(self) -> None:
        self.versions = {}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        return None

    def find_distributions(
        self,
        context: metadata.DistributionFinder.Context = metadata.DistributionFinder.Context(),  # noqa: B008
    ) -> Iterable[metadata.Distribution]:
        version = self.versions.get(str(context.name))
        return [] if version is None else [_Distribution(str(context.name), version)]


_finder = _Finder()


def install(modules: Mapping[str, ModuleType], distribution: tuple[str, str] | None = None) -> None:
    """Makes ``import NAME`` return the module given for each NAME.

    Args:
        modules: by the name under which they are imported.
        distribution: name and version that `importlib.metadata` reports, for packages that look there first.

    Raises:
        ImportError: another module of such a name was imported before; code that holds its functions would keep them.
    """
    for name, module in modules.items():
        known = sys.modules.get(name)
        if known is not None and not known.__name__.startswith("pyinvolution."):
            place = getattr(known, "__file__", None) or known
            raise ImportError(f"{name} is already imported from {place}, expected install() before its first import")
        if module.__spec__ is None:
            raise ImportError(f"{module.__name__} is run as a program, expected an imported module")
    sys.modules.update(modules)
    if distribution is not None:
        name, version = distribution
        _finder.versions[name] = version
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
