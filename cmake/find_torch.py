"""Finds the torch of this interpreter without importing it; prints its folder and version, or nothing.

A build in isolation cannot import the packages of the environment that it builds for, but it can look into its
site-packages.
"""

import importlib.util
import re
import sysconfig
from pathlib import Path

HEADER = "include/torch/csrc/stable/library.h"
ADVICE = (
    "pyinvolution needs PyTorch 2.10 or newer in the environment that it is installed into, and {where}. "
    "Install it first (pip install torch) and then pyinvolution; its build does not download a torch of its own."
)


def find_torch() -> tuple[Path, str] | None:
    """Folder and version of a torch with the headers of the stable ABI."""
    spec = importlib.util.find_spec("torch")
    places = list(spec.submodule_search_locations or []) if spec else []
    places += [f"{sysconfig.get_path(name)}/torch" for name in ("platlib", "purelib")]
    for place in map(Path, places):
        if (place / HEADER).exists():
            version = re.search(r"__version__ = '([^']+)'", (place / "version.py").read_text())
            return place, version[1] if version else "unknown"
    return None


if __name__ == "__main__" and (found := find_torch()):
    print(found[0].as_posix(), found[1], sep=";", end="")
