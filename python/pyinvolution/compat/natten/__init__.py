"""Stands in for ``natten``: say ``pyinvolution.compat.natten`` where code written for NATTEN says ``natten``.

`pyinvolution.compat.natten.functional` has the functions; the modules here are those of NATTEN 0.17, and
`pyinvolution.compat.natten.v014` has those of 0.14 and 0.15. Nothing is fused: NATTEN's own kernels for GPUs, or
FlexAttention, keep the attention weights out of memory. Source: https://github.com/SHI-Labs/NATTEN.
"""

import sys
from types import ModuleType
from typing import Any

import torch

from pyinvolution.compat import _install
from pyinvolution.compat.natten import functional
from pyinvolution.compat.natten.functional import na1d, na2d, na3d
from pyinvolution.compat.natten.modules import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    without_fused_kernels,
)

__all__ = [
    "NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D",
    "functional", "install", "na1d", "na2d", "na3d",
]  # fmt: skip

__version__ = "0.17.4"
"""The last version of NATTEN that had every function that is here."""


def install(version: str = "0.17") -> None:
    """Makes ``import natten`` return this package in this process, for imports that lie inside installed packages.

    Call it before they are imported. `importlib.metadata` then also knows a distribution "natten", where transformers
    looks.

    Args:
        version: whose modules the name ``natten`` has: "0.14", "0.15" or "0.17". The functions are the same.

    Raises:
        ImportError: another ``natten`` was imported before.
        ValueError: ``version`` is another one.
    """
    from pyinvolution.compat.natten import v014

    generations: dict[str, tuple[ModuleType, str]] = {
        "0.14": (v014, "0.14.6"),
        "0.15": (v014, "0.15.1"),
        "0.17": (sys.modules[__name__], __version__),
    }
    if version not in generations:
        raise ValueError(f"install: version is {version!r}, expected one of {', '.join(generations)}")
    package, full = generations[version]
    inner = ("na1d", "na2d", "na3d", "natten1d", "natten2d", "natten3d", "nattencuda", "nattencuda1d", "nattencuda2d")
    modules = {"natten": package, "natten.functional": functional} | {f"natten.{name}": package for name in inner}
    _install.install(modules, ("natten", full))


# --- what code asks about the build, and switches between kernels -----------------------------------------------------


def has_cuda() -> bool:
    return torch.cuda.is_available()


def has_bfloat(*device: Any) -> bool:
    return True


has_half = has_bfloat


def has_fused_na(*device: Any) -> bool:
    return False


has_fna = has_gemm = is_fna_enabled = is_fused_na_enabled = is_gemm_na_enabled = is_tiled_na_enabled = has_fused_na

use_fused_na = without_fused_kernels("use_fused_na")
use_fna = without_fused_kernels("use_fna")
use_gemm_na = without_fused_kernels("use_gemm_na")
use_tiled_na = without_fused_kernels("use_tiled_na")
use_autotuner = without_fused_kernels("use_autotuner")
