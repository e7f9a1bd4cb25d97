"""Every kernel variant over the shared cases, dtypes and layouts, against the float64 oracle."""

import pytest
import torch
from cases import CASES, DTYPES, EMPTY_CASES, LAYOUTS, Case, oracle_passes, reference_passes, tensors
from tolerance import assert_accurate

from pyinvolution import explain, ops, override_isa
from pyinvolution.introspection import available_isas, force_variant, variants

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """torch.empty gives NaN, so that an element that a kernel forgets is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def run(case: Case, dtype: torch.dtype, layout: str, device: str) -> list[torch.Tensor]:
    x, w, gy = tensors(case, dtype, layout, device)
    y = ops.involution2d(x, w, *case.geometry)
    return [y, *ops.involution2d_backward(gy, x, w, *case.geometry, (True, True))]


def check(case: Case, dtype: torch.dtype, layout: str, device: str) -> None:
    inputs = tensors(case, dtype, layout)
    oracle = oracle_passes(case, *inputs)
    reference = reference_passes(case, *inputs)
    for what, actual, exact, same in zip(
        ("output", "grad_input", "grad_weight"), run(case, dtype, layout, device), oracle, reference, strict=True
    ):
        assert_accurate(actual.cpu(), exact, same, f"{what} of {case}, {dtype}, {layout}, {device}")


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_variant(variant: str, dtype: torch.dtype, layout: str) -> None:
    device, name = variant.split("/")
    if device not in DEVICES:
        pytest.skip("no CUDA device")
    ran = 0
    for case in CASES:
        x, w, _ = tensors(case, dtype, layout, device)
        with force_variant(variant):
            verdict = next(v for v in explain(x, w, *case.geometry).verdicts if v.variant == name)
            if verdict.refusal is None:
                check(case, dtype, layout, device)
                ran += 1
    assert ran or verdict.refusal, f"{variant} ran nothing"


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_isa(isa: str, dtype: torch.dtype, layout: str) -> None:
    with override_isa(isa), force_variant("cpu/columns"):
        for case in CASES:
            check(case, dtype, layout, "cpu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", EMPTY_CASES, ids=str)
def test_empty(case: Case, device: str) -> None:
    for output, expected in zip(
        run(case, torch.float32, "contiguous", device),
        ((*case.input[:2], *case.output), case.input, case.weight),
        strict=True,
    ):
        assert tuple(output.shape) == expected
        assert torch.equal(output, torch.zeros_like(output))


@pytest.mark.parametrize("variant", [v for v in variants() if v.startswith("cpu")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_threads_and_runs_give_the_same_bits(variant: str, layout: str) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        with force_variant(variant):
            for threads in (1, 2, 3, 1):
                torch.set_num_threads(threads)
                results.append([run(case, torch.float32, layout, "cpu") for case in CASES])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_non_finite_values_reach_what_the_equation_says(variant: str, value: float, layout: str) -> None:
    device, _ = variant.split("/")
    if device not in DEVICES:
        pytest.skip("no CUDA device")
    case = Case((1, 32, 20, 20), 2, (7, 7), padding=(3, 3))
    for spoiled in range(3):
        inputs = list(tensors(case, torch.float32, layout))
        if spoiled == 1:
            inputs[1][0, 1, 6, 6, 19, 19] = value  # a tap on padding: 0 * value
            inputs[1][0, 1, 0, 3, 10, 10] = value
        else:
            inputs[spoiled][0, 17, 2, 9] = value
        expected = oracle_passes(case, *inputs)
        with force_variant(variant):
            x, w, gy = (t.to(device) for t in inputs)
            y = ops.involution2d(x, w, *case.geometry)
            actual = (y, *ops.involution2d_backward(gy, x, w, *case.geometry, (True, True)))
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(torch.isnan(a.cpu()), torch.isnan(e))
            assert torch.equal(torch.isposinf(a.cpu()), torch.isposinf(e))
            assert torch.equal(torch.isneginf(a.cpu()), torch.isneginf(e))
        assert sum(not torch.isfinite(e).all() for e in expected) == 2
