"""The former name of `pyinvolution.explain`, which holds the same functions."""

import warnings

from pyinvolution.explain import *  # noqa: F403
from pyinvolution.explain import PASSES, SPAN_PASSES  # noqa: F401

warnings.warn("pyinvolution.introspection is now called pyinvolution.explain", DeprecationWarning, stacklevel=2)
