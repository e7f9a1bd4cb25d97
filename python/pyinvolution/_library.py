"""Loads the native library: the operators into torch.ops.pyinvolution, and what it says of itself into ``_C``."""

from importlib import import_module

import torch

from pyinvolution._native import folder

# A second copy of the library would register the operators twice, which ends the process without a message.
if torch._C._jit_get_schemas_for_operator("pyinvolution::involution2d"):
    raise ImportError(
        "another copy of the pyinvolution library is already loaded in this process; load one copy, "
        "either by `import pyinvolution` or by torch.ops.load_library"
    )

_folder = folder()
# Loaded first by its path, so that _C finds it already in the process.
torch.ops.load_library(_folder / "libpyinvolution.so")
_C = import_module("pyinvolution._C")

cmake_prefix_path = str(_folder / "share/cmake")
"""For CMAKE_PREFIX_PATH of C++ projects that call find_package(pyinvolution)."""
