"""Where the native libraries are. Needs nothing but Python."""

from importlib.util import find_spec
from pathlib import Path

__all__ = ["folder"]


def folder() -> Path:
    """The folder of the native libraries; with an editable installation that is not the one of this file.

    Raises:
        ImportError: they have not been built.
    """
    spec = find_spec("pyinvolution._C")
    if spec is None or spec.origin is None:
        raise ImportError(
            "pyinvolution's native library is missing; install the package (pip install .), or run outside its source"
        )
    return Path(spec.origin).parent
