"""Files that a command writes, and archives that it reads."""

import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyinvolution.recipes.errors import RecipeError

__all__ = ["find_folder", "unpacked", "write_file"]


def write_file(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, whose folder is made; a file that holds the same already is not written again."""
    if not path.is_file() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@contextmanager
def unpacked(source: str | Path) -> Iterator[Path]:
    """The folder ``source``, or a temporary one with the content of an archive (tar, also compressed, or zip).

    Members of an archive that point outside of it, and special files, are refused (`tarfile.data_filter`).

    Raises:
        RecipeError: ``source`` is missing, or neither a folder nor such an archive, or is damaged.
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
                shutil.unpack_archive(source, folder, "zip")
            else:
                raise RecipeError(f"--source is {source}, expected a folder, a tar archive or a zip archive")
        # What damaged archives raise, each kind of compression its own.
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, ValueError, OSError) as error:
            raise RecipeError(f"--source: cannot unpack {source}: {' '.join(str(error).split())}") from error
        except Exception as error:
            if type(error).__name__ not in ("LZMAError", "error"):  # of lzma and zlib
                raise
            raise RecipeError(f"--source: cannot unpack {source}: {error}") from error
        yield Path(folder)


def find_folder(root: Path, wanted: tuple[str, ...], what: str) -> Path:
    """``root``, or the one folder below it (in up to three levels), that has all entries ``wanted``.

    Raises:
        RecipeError: there is none.
    """
    for pattern in (".", "*", "*/*", "*/*/*"):
        for folder in sorted(root.glob(pattern)) if pattern != "." else [root]:
            if folder.is_dir() and all((folder / name).exists() for name in wanted):
                return folder
    raise RecipeError(f"--source has no folder with {', '.join(wanted)}, expected {what}")
