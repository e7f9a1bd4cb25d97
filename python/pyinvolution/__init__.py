"""Involution (CVPR 2021) for PyTorch: the operator, the module, RedNet and its recipes.

Without torch only ``pyinvolution.onnxruntime`` can be used.
"""

from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

__version__ = version("pyinvolution")

if find_spec("torch") is not None:
    from pyinvolution import functional, models
    from pyinvolution._library import cmake_prefix_path
    from pyinvolution.autotuning import autotune
    from pyinvolution.conversion import convert
    from pyinvolution.explain import (
        build_info,
        disable_variants,
        explain,
        explain_layer,
        explain_span,
        force_variant,
        override_isa,
    )
    from pyinvolution.functional import involution2d, span_involution2d
    from pyinvolution.inference import optimize_for_inference
    from pyinvolution.modules import Involution2d
else:

    def __getattr__(name: str) -> Any:
        if name in __all__:
            raise ImportError(f"pyinvolution.{name} needs torch, which is not installed")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Involution2d",
    "__version__",
    "autotune",
    "build_info",
    "cmake_prefix_path",
    "convert",
    "disable_variants",
    "explain",
    "explain_layer",
    "explain_span",
    "force_variant",
    "functional",
    "involution2d",
    "models",
    "optimize_for_inference",
    "override_isa",
    "span_involution2d",
]
