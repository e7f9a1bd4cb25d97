"""The one accuracy policy, which `pyinvolution doctor` applies, too; and its form for the step of a network."""

from collections.abc import Mapping
from statistics import median

from torch import Tensor

from pyinvolution.accuracy import assert_accurate

__all__ = ["assert_accurate", "assert_step_accurate"]

FLOOR = 1e-5
"""Relative error that is never too much."""


def assert_step_accurate(actual: Mapping[str, Tensor], oracle: Mapping[str, Tensor], reference: Mapping[str, Tensor]):
    """Outputs, gradients and buffers of a training step against those in float64: none is more than twice as wrong as
    in the reference's order of operations, and the median no more than a half more.

    After many roundings the error of a tensor of four numbers is a matter of luck, in the reference as well; so what is
    allowed to each is that of the reference or of the reference's median, whichever is more.
    """
    errors, usual = (
        {
            name: float((step[name].double() - exact).norm() / exact.double().norm().clamp_min(1e-30))
            for name, exact in oracle.items()
        }
        for step in (actual, reference)
    )
    middle = median(usual.values())
    for name, error in errors.items():
        assert error <= 2 * max(usual[name], middle) + FLOOR, (name, error, usual[name], middle)
    assert median(errors.values()) <= 1.5 * middle + FLOOR, (median(errors.values()), middle)
