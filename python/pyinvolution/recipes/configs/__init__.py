"""Configurations in YAML: packaged ones by their short names, and those of users.

The short name is the path of a file below this folder. A file may name another on whose values it builds, ``base:
coco/_base.yaml``: a path relative to its own folder, or else a packaged file. So a copy of a packaged file is complete,
wherever it is. Files that begin with ``_`` are only bases.
"""

import re
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from pyinvolution.recipes.errors import RecipeError

__all__ = ["chain", "dump", "find", "listing", "load", "merge"]

ROOT = Path(__file__).parent


class _Loader(yaml.SafeLoader):
    """Plain data only, with 1e-3 as a number, as in YAML 1.2 and in jsonargparse."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
    [*"-+0123456789."],
)


def listing(root: Path = ROOT) -> list[tuple[str, str]]:
    """Short names below ``root``, and the comment at the top of each file (or of its base)."""
    names = []
    for path in sorted(root.rglob("*.yaml"), key=lambda path: (path.parent.name, len(path.name), path.name)):
        if not path.name.startswith("_"):
            comments = (_comment(file) for file in _files(path, root))
            names.append((path.relative_to(root).as_posix(), next(filter(None, comments), "")))
    return names


def find(name: str, root: Path = ROOT) -> Path:
    """The file ``name``, else the packaged one below ``root``.

    Raises:
        RecipeError: there is neither; the message lists the packaged ones.
    """
    if Path(name).is_file():
        return Path(name)
    known = [known for known, _ in listing(root)]
    if name not in known:
        raise RecipeError(f"--config is {name}, expected a file or one of {', '.join(known)}")
    return root / name


def chain(name: str, root: Path = ROOT, before: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The contents of a configuration's bases, the first one on which all others build, and its own, without ``base``.

    Args:
        name: of the configuration.
        root: folder of the packaged ones.
        before: what is in force when this one is read, whose options of the model remain.

    Raises:
        RecipeError: a file is missing, is not a mapping in YAML, or is its own base.
    """
    contents = [_read(path) for path in _files(find(name, root), root)]
    found: list[dict[str, Any]] = []
    options: Mapping[str, Any] = _arguments_of_model(before or {}).get("options") or {}
    for content in reversed(contents):
        own = {key: value for key, value in content.items() if key != "base"}
        # The command line would take a model's options as one value, in place of those that it builds on.
        place = _arguments_of_model(own)
        if isinstance(place.get("options"), Mapping):
            place["options"] = options = merge(options, place["options"])
        found.append(own)
    return found


def _arguments_of_model(content: Mapping[str, Any]) -> Any:
    section = content.get("model")
    if isinstance(section, Mapping) and isinstance(section.get("init_args"), Mapping):
        section = section["init_args"]
    return section if isinstance(section, Mapping) else {}


def load(name: str, root: Path = ROOT) -> dict[str, Any]:
    """The configuration ``name`` with all that it takes from its bases."""
    return reduce(merge, chain(name, root))


def merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the entries of ``overrides`` in place of its own, mapping by mapping."""
    result = dict(base)
    for name, value in overrides.items():
        both = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = merge(result[name], value) if both else value
    return result


def dump(config: Mapping[str, Any]) -> str:
    """The configuration as text in YAML."""
    return yaml.safe_dump(dict(config), sort_keys=False)


def _files(path: Path, root: Path) -> list[Path]:
    """The file, its base, the base of that, ..."""
    seen: list[Path] = []
    while True:
        seen.append(path)
        base = _read(path).get("base")
        if base is None:
            return seen
        if not isinstance(base, str):
            raise RecipeError(f"base in {path} is {base!r}, expected the path of a file")
        candidates = [path.parent / base, root / base]
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found is None:
            raise RecipeError(f"base in {path} is {base}, expected a file relative to {path.parent} or a packaged one")
        if found.resolve() in [file.resolve() for file in seen]:
            raise RecipeError(f"base in {path} is {base}, expected a file that does not build on this one")
        path = found


def _read(path: Path) -> dict[str, Any]:
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        try:
            content = loader.get_single_data()
        finally:
            loader.dispose()
    except UnicodeDecodeError as error:
        raise RecipeError(f"--config {path} is not text in UTF-8: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise RecipeError(f"--config {path} holds {_kind(content)}, expected a mapping of sections")
    return content


def _kind(content: Any) -> str:
    return "nothing" if content is None else f"a {type(content).__name__}"


def _comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""
