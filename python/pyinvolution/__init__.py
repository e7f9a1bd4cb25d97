"""Involution (CVPR 2021) for PyTorch: the operator, the module, RedNet and its recipes."""

from importlib.metadata import version

__version__ = version("pyinvolution")

from pyinvolution import functional, models
from pyinvolution._library import cmake_prefix_path
from pyinvolution.autotuning import autotune
from pyinvolution.conversion import convert
from pyinvolution.explain import (
    build_info,
    disable_variants,
    explain,
    explain_correlation,
    explain_layer,
    explain_span,
    force_variant,
    override_isa,
)
from pyinvolution.functional import involution2d, local_correlation2d, span_involution2d
from pyinvolution.inference import optimize_for_inference
from pyinvolution.modules import Involution1d, Involution2d

__all__ = [
    "Involution1d",
    "Involution2d",
    "__version__",
    "autotune",
    "build_info",
    "cmake_prefix_path",
    "convert",
    "disable_variants",
    "explain",
    "explain_correlation",
    "explain_layer",
    "explain_span",
    "force_variant",
    "functional",
    "involution2d",
    "local_correlation2d",
    "models",
    "optimize_for_inference",
    "override_isa",
    "span_involution2d",
]
