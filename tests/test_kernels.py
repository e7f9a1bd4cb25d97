"""Every kernel variant of every operator: who takes what, and that each computes the equation to the last element."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product

import pytest
import torch
from cases import DTYPES, LAYOUTS, Case, layer
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from operators import (
    CORRELATION,
    INVOLUTION,
    ISAS,
    LAYER,
    OPERATORS,
    SPAN,
    WITH_VECTORS,
    Operator,
    needs_cuda,
    over_devices,
    over_operators,
    over_variants,
    rounds_kernels,
    run_taken,
)
from tolerance import assert_accurate

from pyinvolution import force_variant, override_isa
from pyinvolution._library import _C

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

DENSE = ("contiguous", "channels_last")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@over_variants(each_isa=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_variant_takes_what_the_table_says_and_is_accurate(
    op: Operator, variant: str, isa: str, dtype: torch.dtype, layout: str
) -> None:
    device, rounded = variant.split("/")[0], rounds_kernels(variant, dtype, isa)
    for case in op.cases_on(device):
        tensors, exact, same = op.problem(case, dtype, layout, device, rounded)
        with override_isa(isa):
            taken, results = run_taken(op, variant, case, tensors)
        assert taken == op.taken(variant, case, dtype, layout), f"{variant} of {case}, {dtype}, {layout}"
        op.compare(case, results, exact, same, f"{variant}, {isa}, {layout}")


@over_operators
def test_the_table_has_every_variant_in_order(op: Operator) -> None:
    assert list(op.takes) == _C.variants(op.kernels)


@over_devices
@pytest.mark.parametrize("op", [op for op in OPERATORS if op is not LAYER], ids=str)
def test_explain_says_what_the_table_says(op: Operator, device: str) -> None:
    for case, dtype, layout in product(op.cases_on(device), DTYPES, DENSE):
        tensors = op.tensors(case, dtype, layout, device)
        for pass_ in op.passes:
            explanation = op.explain(case, *tensors, pass_=pass_)
            able = [
                name.split("/")[1] for name, takes in op.takes.items()
                if name.startswith(device) and takes(pass_, case, dtype, layout)
            ]  # fmt: skip
            assert [v.variant for v in explanation.verdicts if v.refusal is None] == able, str(explanation)
            assert explanation.chosen == able[0]


@st.composite
def problems(draw: st.DrawFn, op: Operator) -> Case:
    groups, size = draw(st.integers(1, 9)), (draw(st.integers(1, 20)), draw(st.integers(1, 40)))
    shape = (draw(st.integers(1, 2)), groups * draw(st.integers(8, 36 if groups < 4 else 20)), *size)
    kernel, reduced = (draw(st.integers(1, 7)), draw(st.integers(1, 8))), draw(st.integers(1, 40))
    stride, dilation = (draw(st.tuples(st.integers(1, most), st.integers(1, most))) for most in (3, 2))
    if op is LAYER:
        return layer(shape, groups, kernel, stride, dilation, reduced)
    padding = draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    case = Case(shape, groups, kernel, stride, padding, dilation, reduced)
    if op in (INVOLUTION, CORRELATION):
        factors = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
        case = replace(case, upsample=tuple(u if s == 1 else 1 for u, s in zip(factors, stride, strict=True)))
    assume(0 not in case.output)
    return case


@over_variants(WITH_VECTORS)
def test_any_shape_is_accurate(op: Operator, variant: str) -> None:
    @settings(max_examples=50, deadline=None, derandomize=True)
    @given(problems(op), st.sampled_from(LAYOUTS), st.sampled_from(ISAS), st.integers(1, 3))
    def check(case: Case, layout: str, isa: str, count: int) -> None:
        tensors = op.tensors(case, torch.float32, layout)
        exact = op.expected(case, tensors, torch.float64)
        # Over chance shapes the reference's own error is a matter of luck; a bound by the absolute terms is not.
        magnitude = op.expected(case, [t.abs() for t in tensors], torch.float64)
        with override_isa(isa), force_variant(variant), threads(count):
            actual = op.run(case, tensors)
        for name, result in actual.items():
            error = (result.double() - exact[name]).abs()
            allowed = op.roundings * torch.finfo(torch.float32).eps * magnitude[name]
            assert (error <= allowed).all(), f"{op} {name} of {case}, {layout}, {isa}"  # false for NaN

    check()


@over_operators
@over_devices
def test_empty_batches_and_images_give_zeros(op: Operator, device: str) -> None:
    for case in op.empty:
        tensors = op.tensors(case, torch.float32, device=device)
        results = op.run(case, tensors)
        shapes = [op.output(case), *(t.shape for t in tensors)]
        for (name, result), shape in zip(results.items(), shapes, strict=False):
            assert result.shape == shape, f"{name} of {case}"
            assert torch.equal(result, torch.zeros_like(result)), f"{name} of {case}"


@over_variants(["cpu"])
@pytest.mark.parametrize("layout", DENSE)
def test_threads_and_runs_give_the_same_bits(op: Operator, variant: str, layout: str) -> None:
    large = [
        Case((3, 64, 28, 28), 4, (7, 7), padding=(3, 3), reduced=16),
        Case((2, 64, 23, 23), 4, (7, 7), padding=(3, 3), reduced=64),  # a pixel more than vectors
        Case((2, 128, 7, 7), 8, (7, 7), padding=(3, 3), reduced=128),
    ]
    counts = (1, 1) if variant == "cpu/composed" else (1, 2, 3, 8, 1)  # torch's convolution promises no more
    problems = [(case, torch.float32) for case in (*op.cases, *large)] + [(case, torch.bfloat16) for case in large]
    for case, dtype in problems:
        tensors, results = op.tensors(case, dtype, layout), []
        for count in counts:
            with threads(count):
                results.append(run_taken(op, variant, case, tensors)[1])
        for name, first in results[0].items():
            assert all(torch.equal(first, other[name]) for other in results), f"{variant}, {name} of {case}, {dtype}"


@over_variants(["cpu", "cuda/mma", "cuda/sliding", "cuda/tiled", "cuda/generic", "cuda/fused"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("stride", [1, 2])
def test_values_that_are_not_finite_reach_what_the_equation_says(
    op: Operator, variant: str, value: float, layout: str, stride: int
) -> None:
    case = Case((1, 32, 20, 20), 2, (7, 7), (stride,) * 2, (3, 3), reduced=16)
    # On a CPU float16 is computed in float32, and bfloat16 with some instruction sets.
    for dtype in (
        (torch.float32, torch.float16, torch.bfloat16)
        if variant.startswith("cuda")
        else (torch.float32, torch.bfloat16)
    ):
        for spoiled, places in op.spoiled:
            tensors = op.tensors(case, dtype, layout)
            for place in places:
                tensors[op.names.index(spoiled)][place] = value
            # Zero times infinity in a convolution is one more NaN: the oracle is the equation.
            expected = op.expected(case, tensors, torch.float64)
            assert not all(result.isfinite().all() for result in expected.values())
            actual = run_taken(op, variant, case, [t.to(variant.split("/")[0]) for t in tensors])[1]
            for name, result in actual.items():
                for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                    assert torch.equal(kind(result).cpu(), kind(expected[name])), f"{name}, {spoiled} spoiled, {dtype}"


@over_variants(operators=(SPAN, LAYER))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", DENSE)
def test_scale_shift_and_relu_are_applied(op: Operator, variant: str, dtype: torch.dtype, layout: str) -> None:
    device, wide = variant.split("/")[0], torch.promote_types(dtype, torch.float32)
    for case in op.cases_on(device):
        if "forward" not in op.taken(variant, case, dtype, layout):
            continue
        tensors = op.tensors(case, dtype, layout, device)
        tensors[0][0, 0, 0, 0] = float("nan")  # ReLU keeps it
        column = torch.randn(2, case.input[1], 1, 1, dtype=wide, generator=torch.Generator().manual_seed(0))
        exact, same = (
            expected["output"].to(work) * column[0].to(work) + column[1].to(work)
            for work, expected in (
                (torch.float64, op.expected(case, tensors, torch.float64)),
                (wide, op.expected(case, tensors, rounded=rounds_kernels(variant, dtype))),
            )
        )
        scale, shift = column.flatten(1).to(device)
        for relu in (False, True):
            operator, arguments = op.forward(case, *tensors[: op.leaves], scale=scale, shift=shift, relu=relu)
            with force_variant(variant):
                actual = operator(*arguments).cpu()
            what = f"{op} of {case}, {dtype}, {layout}, {variant}"
            assert_accurate(actual, *((t.relu() if relu else t) for t in (exact, same.to(dtype))), what)


@pytest.mark.parametrize("op", [SPAN, LAYER], ids=str)
def test_biases_may_be_absent_and_weights_may_be_those_of_a_convolution(op: Operator) -> None:
    case = op.cases[0]
    tensors = dict(zip(op.names[: op.leaves], op.tensors(case, torch.float32), strict=False))
    zero = {name: 0 * t if "bias" in name else t for name, t in tensors.items()}
    absent = {name: None if "bias" in name else t for name, t in tensors.items()}
    four = {name: t[..., None, None] if t.dim() == 2 else t for name, t in tensors.items()}
    for one, other in ((zero, absent), (tensors, four)):
        first, second = (operator(*a) for operator, a in (op.forward(case, *t.values()) for t in (one, other)))
        assert torch.equal(first, second)


# --- the kernels of a span are never in memory ------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("stride", [1, 2])
def test_on_cuda_the_kernels_are_never_in_memory(stride: int) -> None:
    case = Case((8, 128, 56, 56), 8, (7, 7), (stride, stride), (3, 3), reduced=32)
    tensors = SPAN.tensors(case, torch.bfloat16, "channels_last", "cuda")
    torch.use_deterministic_algorithms(False)
    with force_variant("cuda/fused"):
        first = SPAN.run(case, tensors)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        second = SPAN.run(case, tensors)
        peak = torch.cuda.max_memory_allocated() - before
    for name, result in second.items():
        assert torch.equal(first[name], result), f"{name} has other bits in the second run"
    results = sum(t.nbytes for t in second.values())
    kernels = case.input[0] * case.groups * 49 * case.output[0] * case.output[1] * 2
    assert peak - results < kernels / 2


MEMORY = """
import torch
from pathlib import Path
from pyinvolution.functional import span_involution2d

def high_water():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

torch.set_num_threads(2)
def step(size):
    x, r, y = (torch.rand(1, c, size, size).to(memory_format=torch.channels_last) for c in (64, 16, 64))
    s, b = torch.randn(4 * 49, 16), torch.randn(4 * 49)
    leaves = [t.requires_grad_() for t in (x, r, s, b)]
    before = high_water()
    out = span_involution2d(*leaves, 7, padding=3)
    out.backward(y)
    return high_water() - before - sum(t.nbytes for t in (out, *leaves))

step(16)
print(step(640))
"""


def test_on_the_cpu_the_kernels_are_never_in_memory() -> None:
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    kernels = 4 * 49 * 640 * 640 * 4
    assert int(result.stdout) < kernels / 2
