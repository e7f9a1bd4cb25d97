"""Each barrier and each wait for copies is needed: without it, or where it waits for one group of copies less, the
interpreter must notice a fault."""

from collections.abc import Iterator

import pytest

from . import launches
from .memory import Fault
from .problems import Problem, check_problem, make_inputs, prepare, run_launch
from .program import Instruction, Kernel

pytestmark = pytest.mark.skipif(launches.missing() is not None, reason=str(launches.missing()))

SYNCHRONISATIONS = ("bar.sync", "bar.warp.sync", "cp.async.wait_group", "cp.async.wait_all")
BF16 = ("bfloat16", "nhwc")
REPRESENTATIVES = (
    Problem("mma", "forward", *BF16, 1, 64, 9, 10, 4, 7),
    Problem("mma", "forward", *BF16, 1, 32, 9, 12, 2, 3, 2),
    Problem("mma", "grad_input", *BF16, 1, 64, 12, 10, 4, 7),
    Problem("mma", "grad_input", *BF16, 1, 32, 12, 10, 2, 5, 2),
    Problem("mma", "grad_weight", *BF16, 1, 64, 8, 8, 4, 7),
    Problem("fused", "forward", *BF16, 1, 64, 9, 10, 4, 7, reduced=16),
    Problem("fused", "layer", *BF16, 1, 64, 13, 18, 4, 7, reduced=32, multiprocessors=1),
    Problem("fused", "backward", *BF16, 1, 80, 16, 18, 5, 7, reduced=16),
    Problem("fused", "backward", *BF16, 1, 80, 16, 18, 5, 7, reduced=64),
    Problem("fused", "backward", *BF16, 2, 80, 10, 18, 5, 7, 2, reduced=48),
    Problem("tiled", "forward", "float32", "nhwc", 1, 16, 8, 16, 1, 7),
    Problem("tiled", "forward", "bfloat16", "nhwc", 1, 16, 8, 8, 1, 5, 2),
    Problem("tiled", "grad_weight", "float32", "nhwc", 1, 16, 8, 8, 1, 7),
)


def mutants(problem: Problem) -> Iterator[tuple[Kernel, str]]:
    """A kernel for each barrier and wait that the problem executes, without it, and what was changed."""
    prepared = prepare(problem, make_inputs(problem))
    for launch in prepared.launches:
        machine = run_launch(launch, prepared.memory)
        for i, instruction in enumerate(launch.kernel.instructions):
            if machine.by_instruction[i] == 0 or instruction.opcode not in SYNCHRONISATIONS:
                continue
            yield launch.kernel.changed(i, Instruction("nop", ())), f"{i}: {instruction} removed"
            if instruction.opcode == "cp.async.wait_group":
                weaker = Instruction(instruction.opcode, (str(int(instruction.operands[0]) + 1),), instruction.guard)
                yield launch.kernel.changed(i, weaker), f"{i}: {instruction} leaves one more"


@pytest.mark.parametrize("problem", REPRESENTATIVES, ids=str)
def test_each_synchronisation_is_needed(problem: Problem):
    found, missed = 0, []
    for kernel, text in mutants(problem):
        try:
            check_problem(problem, {kernel.name: kernel})
            missed.append(f"{text} in {kernel.name}")
        except (Fault, AssertionError):
            found += 1
    assert found >= 1
    assert not missed, f"{found} were noticed, not these: {missed}"
