"""Files that a command writes, and archives that it reads."""

import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from pyinvolution._files import replacing
from pyinvolution.recipes.errors import RecipeError
from pyinvolution.recipes.images import is_hidden, is_image_name

__all__ = ["Files", "find_folder", "unpacked", "write_file", "write_splits", "write_tree"]

Files = Mapping[Path, Callable[[], bytes]]
"""What is to be in files, by their relative paths."""


def write_file(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, whose folder is made; a file that holds the same already is not written again.

    Raises:
        RecipeError: the file is there with other content.
    """
    if not _holds(path, content):
        _write(path, content)


def _holds(path: Path, content: bytes) -> bool:
    if not path.is_file():
        return False
    there = path.read_bytes()
    if there != content and not (path.suffix == ".png" and _pixels(there) == _pixels(content)):
        raise RecipeError(
            f"{path} is there with other content, expected a folder without other data: remove one of them"
        )
    return True


def _pixels(content: bytes) -> Any:
    """What a PNG file shows, which versions of zlib compress differently."""
    try:
        with Image.open(BytesIO(content)) as image:
            return image.mode, image.size, image.getpalette(), image.tobytes()
    except (OSError, SyntaxError):  # the latter of a broken PNG
        return content


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_bytes(content)


def write_tree(root: Path, files: Files, folders: Iterable[str], others: Files | None = None) -> None:
    """Write ``files`` below ``root`` in their order, but for those that are there; so what makes a data set readable
    should be the last. Nothing is written before all that is there has been looked at.

    Args:
        folders: of ``root``, which must not hold any image but these, for they would be taken for the data set's.
        others: which may be in ``folders`` too.

    Raises:
        RecipeError: there is another image, or a file with other content.
    """
    allowed = {**(others or {}), **files}
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            strange = is_image_name(path) and not is_hidden(path.relative_to(root / folder))
            if strange and path.relative_to(root) not in allowed:
                raise RecipeError(f"{path} is not an image of this data set, expected a folder without other data")
    there = {path for path, content in allowed.items() if (root / path).is_file() and _holds(root / path, content())}
    for path, content in files.items():
        if path not in there:
            _write(root / path, content())


def write_splits(root: Path, files: Files, splits: Iterable[str], folders: Iterable[str] = ()) -> None:
    """`write_tree`, of ``files`` in the folders ``splits``, which appear together when all are complete.

    Args:
        folders: of ``root`` besides, which must not hold any image.

    Raises:
        RecipeError: as `write_tree`.
    """
    places = {split: split if (root / split).exists() else f".{split}.part" for split in splits}
    placed = {Path(places[path.parts[0]], *path.parts[1:]): content for path, content in files.items()}
    write_tree(root, placed, [*places.values(), *folders])
    for split, place in places.items():
        if place != split:
            (root / place).rename(root / split)


@contextmanager
def unpacked(source: str | Path) -> Iterator[Path]:
    """The folder ``source``, or a temporary one with the content of an archive (tar, also compressed, or zip).

    Members of an archive that point outside of it, and special files, are refused (`tarfile.data_filter`).

    Raises:
        RecipeError: ``source`` is missing, or neither a folder nor such an archive, or is damaged or encrypted.
    """
    source = Path(source)
    if source.is_dir():
        yield source
        return
    if not source.is_file():
        raise RecipeError(f"--source is {source}, expected a folder or an archive: there is no such file")
    with tempfile.TemporaryDirectory(prefix="pyinvolution-") as folder:
        try:
            if tarfile.is_tarfile(source):
                with tarfile.open(source) as archive:
                    archive.extractall(folder, filter="data")
            elif zipfile.is_zipfile(source):
                # Not shutil, which leaves out names with two dots without a word.
                with zipfile.ZipFile(source) as zipped:
                    outside = [name for name in zipped.namelist() if name.startswith("/") or ".." in Path(name).parts]
                    if outside:
                        raise ValueError(f"{outside[0]} is outside of the archive")
                    zipped.extractall(folder)
            else:
                raise RecipeError(f"--source is {source}, expected a folder, a tar archive or a zip archive")
        # What damaged archives raise, each kind of compression its own; and what zip raises that is encrypted, or of an
        # unknown compression.
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, ValueError, OSError, RuntimeError) as error:
            raise RecipeError(f"--source: cannot unpack {source}: {' '.join(str(error).split())}") from error
        except Exception as error:
            if type(error).__name__ not in ("LZMAError", "error"):  # of lzma and zlib
                raise
            raise RecipeError(f"--source: cannot unpack {source}: {error}") from error
        yield Path(folder)


def find_folder(root: Path, what: str, *forms: tuple[str, ...]) -> Path:
    """``root``, or the one folder below it (in up to three levels), that has all entries of one of ``forms``, the first
    that is found.

    Raises:
        RecipeError: there is none, or there are several.
    """
    for wanted in forms:
        if _has(root, wanted):
            return root
        found: list[Path] = []
        for pattern in ("*", "*/*", "*/*/*"):
            for folder in sorted(root.glob(pattern)):
                inside = any(other in folder.parents for other in found)
                if not inside and not is_hidden(folder.relative_to(root)) and _has(folder, wanted):
                    found.append(folder)
        if len(found) > 1:
            names = ", ".join(folder.relative_to(root).as_posix() for folder in found)
            raise RecipeError(f"--source has several folders with {', '.join(wanted)}: {names}, expected it to be one")
        if found:
            return found[0]
    raise RecipeError(f"--source has no folder with {' or '.join(map(', '.join, forms))}, expected {what}")


def _has(folder: Path, wanted: tuple[str, ...]) -> bool:
    return all((folder / name).exists() for name in wanted)
