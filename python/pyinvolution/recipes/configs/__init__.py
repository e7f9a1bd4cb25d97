"""Packaged configurations and their short names: the path of a YAML file below this folder.

A folder's ``_base.yaml`` holds what its files share; it comes before each of them.
"""

from importlib.resources import files
from pathlib import Path

from pyinvolution.recipes.errors import RecipeError

__all__ = ["listing", "resolve"]

BASE = "_base.yaml"


def _root() -> Path:
    return Path(str(files(__name__)))


def listing() -> list[tuple[str, str]]:
    """Short names, and the comment at the top of each file (or of its base)."""
    names = []
    for path in sorted(_root().rglob("*.yaml"), key=lambda path: (path.parent.name, len(path.name), path.name)):
        if path.name != BASE:
            first = [file.read_text().splitlines()[0] for file in (path, path.with_name(BASE)) if file.is_file()]
            comment = next((line.lstrip("# ") for line in first if line.startswith("#")), "")
            names.append((path.relative_to(_root()).as_posix(), comment))
    return names


def resolve(name: str) -> list[str]:
    """Files that ``--config name`` stands for: a file of that path, else a packaged one after its base.

    Raises:
        RecipeError: there is neither, and the message lists the short names; or the file is not text.
    """
    if Path(name).is_file():
        try:
            Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(f"--config {name} is no text in UTF-8: {error}") from error
        return [name]
    packaged = _root() / name
    known = [known for known, _ in listing()]
    if name not in known:
        raise RecipeError(f"--config {name}: no such file, nor one of {', '.join(known)}")
    return [str(path) for path in (packaged.with_name(BASE), packaged) if path.is_file()]
