"""Files that are whole, or as they were before."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing"]


@contextmanager
def replacing(path: Path, ending: str = "") -> Iterator[Path]:
    """Give a path beside ``path`` to write to, which takes the place of ``path`` at the end.

    If the block raises, the new file is removed; if the process is killed, a hidden file NAME.part is left. In no case
    is there half a file at ``path``. Two processes must not do it at the same time.

    Args:
        path: in a folder that is there.
        ending: of the path to write to, for writers that look at it.
    """
    part = path.with_name(f".{path.name}.part{ending}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
