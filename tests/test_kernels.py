"""Every kernel variant over the shared cases, dtypes and layouts, against the float64 oracle."""

from collections.abc import Sequence

import pytest
import torch
from cases import CASES, DTYPES, EMPTY_CASES, LAYOUTS, Case, oracle_passes, reference_passes, tensors
from tolerance import assert_accurate

from pyinvolution import explain, ops, override_isa
from pyinvolution.explain import PASSES, available_isas, force_variant, variants

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """torch.empty gives NaN, so that an element that a kernel forgets is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def compute(
    case: Case, x: torch.Tensor, w: torch.Tensor, gy: torch.Tensor, passes: Sequence[str] = PASSES
) -> list[torch.Tensor]:
    y = [ops.involution2d(x, w, *case.geometry)] if "forward" in passes else []
    mask = ("grad_input" in passes, "grad_weight" in passes)
    grads = ops.involution2d_backward(gy, x, w, *case.geometry, mask)
    return [*y, *(grad for grad, wanted in zip(grads, mask, strict=True) if wanted)]


def supported(name: str, x: torch.Tensor, w: torch.Tensor, case: Case) -> list[str]:
    """The passes that a variant can run."""
    return [
        pass_
        for pass_ in PASSES
        for verdict in explain(x, w, *case.geometry, pass_=pass_).verdicts
        if verdict.variant == name and verdict.refusal is None
    ]


def of_passes(results: Sequence[torch.Tensor], passes: Sequence[str]) -> list[torch.Tensor]:
    return [result for result, pass_ in zip(results, PASSES, strict=True) if pass_ in passes]


def check_given(case: Case, given: Sequence[torch.Tensor], what: str, passes: Sequence[str] = PASSES) -> None:
    inputs = [t.cpu() for t in given]
    oracle = of_passes(oracle_passes(case, *inputs), passes)
    reference = of_passes(reference_passes(case, *inputs), passes)
    for name, actual, exact, same in zip(passes, compute(case, *given, passes), oracle, reference, strict=True):
        assert_accurate(actual.cpu(), exact, same, f"{name} of {case}, {given[0].dtype}, {what}")


def check(case: Case, dtype: torch.dtype, layout: str, device: str, passes: Sequence[str] = PASSES) -> None:
    check_given(case, tensors(case, dtype, layout, device), f"{layout}, {device}", passes)


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
            passes = supported(name, x, w, case)
            if passes:
                check(case, dtype, layout, device, passes)
                ran += 1
    assert ran or explain(x, w, *case.geometry).chosen != name, f"{variant} ran nothing"


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_isa(isa: str, dtype: torch.dtype, layout: str) -> None:
    for variant in ("cpu/columns", "cpu/channels"):
        with override_isa(isa), force_variant(variant):
            for case in CASES:
                x, w, _ = tensors(case, dtype, layout)
                check(case, dtype, layout, "cpu", supported(variant.removeprefix("cpu/"), x, w, case))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", EMPTY_CASES, ids=str)
def test_empty(case: Case, device: str) -> None:
    for output, expected in zip(
        compute(case, *tensors(case, torch.float32, "contiguous", device)),
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
                results.append([])
                for case in CASES:
                    x, w, gy = tensors(case, torch.float32, layout)
                    passes = supported(variant.removeprefix("cpu/"), x, w, case)
                    results[-1].append(compute(case, x, w, gy, passes))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_non_finite_values_reach_what_the_equation_says(
    variant: str, value: float, layout: str, dtype: torch.dtype, stride: int
) -> None:
    device, name = variant.split("/")
    if device not in DEVICES:
        pytest.skip("no CUDA device")
    if device == "cpu" and (dtype != torch.float32 or stride != 1):
        pytest.skip("on a CPU all dtypes are computed in float32, and strides alike")
    case = Case((1, 32, 20, 20), 2, (7, 7), (stride,) * 2, (3, 3))
    for spoiled in range(3):
        inputs = list(tensors(case, dtype, layout))
        if spoiled == 1:
            inputs[1][0, 1, 6, 6, -1, -1] = value  # a tap on padding: 0 * value
            inputs[1][0, 1, 0, 3, 5, 5] = value
        else:
            inputs[spoiled][0, 17, 2, 9] = value
        expected = oracle_passes(case, *inputs)
        assert sum(not torch.isfinite(e).all() for e in expected) == 2
        with force_variant(variant):
            x, w, gy = (t.to(device) for t in inputs)
            passes = supported(name, x, w, case)
            actual = compute(case, x, w, gy, passes)
        expected = of_passes(expected, passes)
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(torch.isnan(a.cpu()), torch.isnan(e))
            assert torch.equal(torch.isposinf(a.cpu()), torch.isposinf(e))
            assert torch.equal(torch.isneginf(a.cpu()), torch.isneginf(e))
