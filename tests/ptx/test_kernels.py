"""Every CUDA kernel, as nvcc compiles it, in the PTX interpreter: results, races, accesses, each byte written once."""

import pytest

from . import cases, launches
from .problems import Problem, check_problem, make_inputs, prepare, run_launch
from .program import Instruction

pytestmark = pytest.mark.skipif(launches.missing() is not None, reason=str(launches.missing()))
CASES = list(cases.cases())


@pytest.mark.parametrize("problem", CASES, ids=str)
def test_results(problem: Problem):
    check_problem(problem)


def test_every_kernel_is_launched():
    launched = {launch.kernel.name for problem in CASES for launch in prepare(problem, None).launches}
    assert set(launches.recorder().paths) - launched == set()


def test_a_refusal_is_passed_on():
    with pytest.raises(launches.Refused, match="16 channels per group"):
        prepare(Problem("mma", "forward", "bfloat16", "nhwc", 1, 8, 9, 9, 1, 7), None)


def test_wrong_results_are_noticed():
    """The comparison can fail: a kernel without one of its products."""
    problem = Problem("generic", "forward", "float32", "nchw", 1, 4, 5, 6, 2, 3)
    prepared = prepare(problem, make_inputs(problem))
    (launch,) = prepared.launches
    executed = run_launch(launch, prepared.memory).by_instruction
    product = next(
        i for i, one in enumerate(launch.kernel.instructions) if one.opcode == "fma.rn.f32" and executed[i] > 0
    )
    with pytest.raises(AssertionError, match="error"):
        check_problem(problem, {launch.kernel.name: launch.kernel.changed(product, Instruction("nop", ()))})
