"""The one accuracy policy, which `pyinvolution doctor` applies, too."""

from pyinvolution.accuracy import assert_accurate

__all__ = ["assert_accurate"]
