"""The one accuracy policy: at most twice the error of the reference in the same dtype, plus an epsilon floor."""

import torch
from torch import Tensor

__all__ = ["assert_accurate"]


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise AssertionError(text)  # also under python -O


def assert_accurate(actual: Tensor, oracle: Tensor, reference: Tensor, what: str = "result") -> None:
    """Compares a result with a float64 oracle, and demands NaN and infinities exactly where the oracle has them.

    Args:
        actual: the result under test.
        oracle: the same in float64.
        reference: the same by the reference code in ``actual``'s dtype, with float32 sums for 16-bit dtypes.

    Raises:
        AssertionError: it is not as accurate. The message begins with ``what``.
    """
    _require(actual.shape == oracle.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}")
    _require(actual.dtype == reference.dtype, f"{what}: dtype {actual.dtype}, expected {reference.dtype}")
    # What float64 holds may overflow in the dtype under test.
    narrowed = oracle.to(actual.dtype)
    finite = torch.isfinite(narrowed)
    torch.testing.assert_close(
        torch.where(finite, 0, actual), torch.where(finite, 0, narrowed), equal_nan=True, rtol=0, atol=0,
        msg=lambda text: f"{what}: NaN or infinity at the wrong place\n{text}",
    )  # fmt: skip
    if not finite.any():
        return
    exact = oracle[finite]
    error = (actual[finite].double() - exact).abs().max().item()
    allowed = (reference[finite].double() - exact).abs().max().item()
    floor = 4 * torch.finfo(actual.dtype).eps * exact.abs().max().item() + torch.finfo(actual.dtype).tiny
    _require(error <= 2 * allowed + floor, f"{what}: error {error:.3e}, allowed 2 x {allowed:.3e} + {floor:.3e}")
