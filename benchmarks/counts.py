"""What the CUDA kernels execute, from the committed table of `tests/ptx/budgets`."""

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

from benchmarks import ROOT

MMA_FLOP = 2 * 16 * 8 * 16
"""Of an mma.m16n8k16; the few m16n8k8 are counted as if they were larger."""


@dataclass(frozen=True)
class Count:
    """Of a kernel's launches for a batch: warp instructions, wavefronts of shared memory, tensor FLOP, and the bytes of
    scratch memory that are written and read again."""

    instructions: float
    wavefronts: float
    tensor_flop: float
    scratch_bytes: float = 0.0

    def __add__(self, other: "Count") -> "Count":
        return Count(
            self.instructions + other.instructions,
            self.wavefronts + other.wavefronts,
            self.tensor_flop + other.tensor_flop,
            self.scratch_bytes + other.scratch_bytes,
        )


@cache
def table() -> dict[str, Any]:
    """That of the newest nvcc."""
    paths = (ROOT / "tests" / "ptx" / "budgets").glob("nvcc-*.json")
    newest = max(paths, key=lambda path: [int(part) for part in path.stem.removeprefix("nvcc-").split(".")])
    return json.loads(newest.read_text())


def of_row(row: dict[str, Any], batch: int) -> Count:
    blocks = row["blocks"] * batch / row["batch"]
    instructions, traffic = row["instructions"], row["traffic"]
    wavefronts = sum(value for name, value in traffic.items() if name.startswith("shared") and "wavefronts" in name)
    # A kernel that adds up partial sums reads what another has written.
    scratch = 2 * traffic.get("global read bytes", 0) if row["kernel"].startswith("sum_") else 0
    return Count(
        blocks * instructions["all"], blocks * wavefronts, blocks * instructions.get("mma", 0) * MMA_FLOP,
        row["blocks"] * scratch,
    )  # fmt: skip


def counts_of(strategy: str, kernels: tuple[str, ...], shape: str, batch: int) -> Count | None:
    """The sum over those of ``kernels`` that were counted, in bfloat16, channels_last; None if none of them was."""
    found = {
        row["kernel"]: of_row(row, batch)
        for row in table()["rows"]
        if (row["strategy"], row["shape"], row["dtype"], row["layout"]) == (strategy, shape, "bfloat16", "nhwc")
        and row["kernel"] in kernels
    }
    return sum(found.values(), Count(0, 0, 0)) if found else None
