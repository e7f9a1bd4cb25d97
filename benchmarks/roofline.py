"""What no kernel can beat: bytes and multiply-adds of each operator over the rates of the machine.

Bytes are the fewest: each operand of the operator read once and each result written once. Multiply-adds are those of
the mathematics, as in the FLOP formulas of ``pyinvolution.ops``; recomputing is not counted.
"""

import math
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from cases import REDNET50, Case, same

from benchmarks.harness import product_and_copy, reduced_channels
from pyinvolution.studies.timing import Clock

# A batch as in detection: the levels of a feature pyramid for images of about 800 x 1344.
DETECTION = {
    f"256@{h}x{w}": replace(same(256, h, 7), input=(1, 256, h, w)) for h, w in ((200, 336), (100, 168), (50, 84))
}
SHAPES = {**REDNET50, **DETECTION}
OPERATORS = (
    "involution2d",
    "involution2d backward",
    "span_involution2d",
    "span_involution2d backward",
    "span_involution2d forward + backward",
    "whole layer",
)
WIDTH = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def batched(case: Case, batch: int) -> Case:
    return replace(case, input=(batch, *case.input[1:]))


def multiply_adds(case: Case, reduced: int = 0) -> int:
    """Of an application of the kernels, and of their generation from so many reduced channels."""
    n, c = case.input[:2]
    return n * math.prod(case.kernel) * math.prod(case.output) * (c + case.groups * reduced)


@dataclass(frozen=True)
class Work:
    """Fewest bytes to move, and multiply-adds."""

    bytes: int
    fma: int

    @staticmethod
    def of(operator: str, case: Case, dtype: str) -> "Work":
        n, c = case.input[:2]
        pixels, reduced = n * math.prod(case.output), reduced_channels(case)
        x, y, r = math.prod(case.input), pixels * c, pixels * reduced
        w, rows = math.prod(case.weight), case.groups * math.prod(case.kernel)
        s = rows * (reduced + 1)
        applied, both = multiply_adds(case), multiply_adds(case, reduced)
        elements, fma = {
            "involution2d": (x + w + y, applied),
            "involution2d backward": (2 * x + 2 * w + y, 2 * applied),
            "span_involution2d": (x + r + y + s, both),
            "span_involution2d backward": (2 * x + 2 * r + y + 2 * s, 2 * both),
            "span_involution2d forward + backward": (3 * x + 3 * r + 2 * y + 3 * s, 3 * both),
            "whole layer": (x + y + s + c * reduced, both + pixels * c * reduced),
        }[operator]
        return Work(elements * WIDTH[dtype], fma)


@dataclass(frozen=True)
class Limits:
    """Rates of a machine: 10^9 bytes a second of a copy, and 10^9 multiply-adds a second.

    ``gfma`` is by dtype and of a matrix product: in float32 (without TF32) on CUDA cores, in 16 bits on tensor cores.
    ``issue_gfma`` is what the CUDA cores could issue, SMs x lanes x clock; predictions (``predict.py``) go by it.
    """

    device: str
    source: str
    copy_gb_per_s: float
    gfma: dict[str, float]
    issue_gfma: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def floor(self, work: Work, dtype: str, unit: str | None = None) -> "Floor":
        """Milliseconds; ``unit`` is the dtype whose rate multiplies, where it is another than the operands'."""
        return Floor(work.bytes / self.copy_gb_per_s / 1e6, work.fma / self.gfma[unit or dtype] / 1e6)


@dataclass(frozen=True)
class Floor:
    bytes_ms: float
    fma_ms: float

    @property
    def ms(self) -> float:
        return max(self.bytes_ms, self.fma_ms)


H200 = Limits(
    "NVIDIA H200",
    "a copy (4.3 TB/s) and 16-bit products (788 TFLOP/s) measured on one; float32 from the datasheet (67 TFLOP/s)",
    4300.0,
    {"float32": 33_500.0, "float16": 394_000.0, "bfloat16": 394_000.0},
    29_650.0,
)


def issue_rate() -> float | None:
    """10^9 multiply-adds a second that the GPU's CUDA cores can issue at their highest clock; None where not known."""
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", f"--id={torch.cuda.current_device()}", "--query-gpu=clocks.max.sm",
             "--format=csv,noheader,nounits"]  # fmt: skip
    try:
        clock = float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return None
    lanes = 64 if (properties.major, properties.minor) == (8, 0) else 128
    return properties.multi_processor_count * lanes * clock / 1e3


def measure(device: str, clock: Clock, quick: bool) -> Limits:
    """The machine's own limits. A 16-bit matrix product of a CPU without such instructions is as slow as it is."""
    side, elements = (256, 1 << 20) if quick else (8192, 1 << 29)
    rates = {
        dtype: product_and_copy(device, getattr(torch, dtype), side, elements, clock, 0.1 if quick else 1.0)
        for dtype in ("float32", "float16", "bfloat16")
    }
    return Limits(
        torch.cuda.get_device_name() if device == "cuda" else "the CPU",
        f"measured in this run: a copy of {elements * 4 / 1e9:.2f} GB, matrix products of {side} x {side}",
        rates["float32"]["copy_gb_per_s"],
        {dtype: rate["gmac_per_s"] for dtype, rate in rates.items()},
        issue_rate() if device == "cuda" else None,
    )


# --- the table that needs no GPU --------------------------------------------------------------------------------------


def floors(limits: Limits, dtype: str) -> Iterator[dict[str, Any]]:
    """Microseconds for each shape at the batch of the targets: 256, for detection 2."""
    for shape, case in SHAPES.items():
        batch = 2 if shape in DETECTION else 256
        row: dict[str, Any] = {"shape": shape, "batch": batch}
        for operator in OPERATORS[:4]:
            work = Work.of(operator, batched(case, batch), dtype)
            floor = limits.floor(work, dtype)
            row[operator] = {
                "bytes": floor.bytes_ms * 1e3,
                "fma": floor.fma_ms * 1e3,
                "cuda cores": limits.floor(work, dtype, "float32").fma_ms * 1e3,
                "floor": floor.ms * 1e3,
            }
        yield row


def floors_table(limits: Limits, dtype: str) -> str:
    """Markdown, in microseconds."""
    lines = [
        f"{dtype}, {limits.device}: computed, not measured. Rates: {limits.source}.",
        "",
        "| shape | N | " + " | ".join(f"{o}: floor | measured" for o in OPERATORS[:4]) + " |",
        "| --- | ---: |" + " ---: | --- |" * 4,
    ]
    for row in floors(limits, dtype):
        cells = [row["shape"], str(row["batch"])]
        for operator in OPERATORS[:4]:
            times = row[operator]
            cells += [
                f"{times['floor']:.0f} ({'bytes' if times['bytes'] >= times['fma'] else 'FMA'})",
                "not measured yet",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def bounds_table(limits: Limits) -> str:
    """Markdown: what bounds the forward operators in bfloat16, in microseconds."""
    lines = [
        "What bounds the forward operators in bfloat16 at N = 256, in microseconds:",
        "",
        "| shape | operator | bytes | FMA, tensor cores | FMA, CUDA cores |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for row in floors(limits, "bfloat16"):
        if row["batch"] != 256:
            continue
        for operator in ("involution2d", "span_involution2d"):
            times = row[operator]
            cells = [f"{times['bytes']:.0f}", f"{times['fma']:.1f}", f"{times['cuda cores']:.0f}"]
            lines.append(f"| {' | '.join([row['shape'], operator, *cells])} |")
    return "\n".join(lines) + "\n"
