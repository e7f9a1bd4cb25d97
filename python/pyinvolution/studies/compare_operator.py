"""The operator against the same built from unfold, on the CPU: time and peak memory, after checking that both agree."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor

from pyinvolution.functional import involution2d
from pyinvolution.reference import involution2d as unfold_involution2d
from pyinvolution.studies.timing import Spread, forked, interleaved, peak_growth

__all__ = ["Measurement", "measure", "table"]

KERNEL, GROUP_CHANNELS = 7, 16
Shape = tuple[int, int, int, int]
SHAPES: list[Shape] = [(8, 64, 56, 56), (8, 256, 14, 14)]
"""N, C, H, W of involutions in the first and third stage of RedNet-50 at 224 x 224."""
VARIANTS: dict[str, Callable[..., Tensor]] = {"unfold": unfold_involution2d, "involution2d": involution2d}


@dataclass
class Measurement:
    """Median time in seconds and growth of the process' peak resident memory in bytes."""

    shape: Shape
    variant: str
    backward: bool
    seconds: float
    peak: int


def measure() -> list[Measurement]:
    """Measure `SHAPES` in a process of its own, whose memory no training has been through.

    Raises:
        subprocess.CalledProcessError: the two disagree, or one of them failed.
    """
    # By default glibc gives every large block back to the system, and half of unfold's time is then page faults.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
    command = [sys.executable, "-m", __name__, json.dumps(SHAPES)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [Measurement(**values) for values in json.loads(done.stdout.splitlines()[-1])]


def table(measurements: list[Measurement]) -> Table:
    """A row for each shape without and with gradients."""
    result = Table(
        title=f"Involutions as in RedNet-50, batch {measurements[0].shape[0]}: time and growth of peak memory",
        caption=f"float32, {torch.get_num_threads()} threads; checked equal first",
        box=SIMPLE,
        pad_edge=False,
    )
    for column in ("input", ""):
        result.add_column(column)
    for column in ("unfold", "", "ours", "", "faster", "smaller"):
        result.add_column(column, justify="right")
    for naive, ours in zip(measurements[::2], measurements[1::2], strict=True):
        result.add_row(
            *(("", "training") if ours.backward else ("x".join(map(str, ours.shape[1:])), "inference")),
            *(text for m in (naive, ours) for text in (f"{1e3 * m.seconds:.1f} ms", f"{m.peak / 2**20:.0f} MiB")),
            f"[bold]{naive.seconds / ours.seconds:.0f} x[/]",
            f"[bold]{naive.peak / max(ours.peak, 1):.0f} x[/]",
        )
    return result


def _inputs(shape: Shape, requires_grad: bool) -> tuple[Tensor, Tensor]:
    n, c, h, w = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, c, h, w, generator=generator)
    # In place: a temporary would leave free memory behind, which the measured peak would not count.
    kernels = torch.randn(n, c // GROUP_CHANNELS, KERNEL, KERNEL, h, w, generator=generator).div_(KERNEL)
    return x.requires_grad_(requires_grad), kernels.requires_grad_(requires_grad)


def _run(variant: str, x: Tensor, kernels: Tensor) -> list[Tensor]:
    """Output and, if the inputs require them, gradients."""
    x.grad = kernels.grad = None
    output = VARIANTS[variant](x, kernels, padding=KERNEL // 2)
    if output.requires_grad:
        output.sum().backward()
    return [tensor for tensor in (output, x.grad, kernels.grad) if tensor is not None]


def _check(shape: Shape) -> None:
    naive, ours = (_run(variant, *_inputs(shape, True)) for variant in VARIANTS)
    torch.testing.assert_close(ours, naive, rtol=1e-4, atol=1e-4)


def _peak(shape: Shape, variant: str, backward: bool) -> int:
    inputs = _inputs(shape, backward)
    return peak_growth(lambda: _run(variant, *inputs))


def _seconds(shape: Shape, backward: bool) -> dict[str, float]:
    inputs = _inputs(shape, backward)
    times = interleaved({variant: partial(_run, variant, *inputs) for variant in VARIANTS})
    return {variant: Spread.of(taken).median for variant, taken in times.items()}


def _main(shapes: list[Shape]) -> None:
    for shape in shapes:
        forked(_check, shape)
    results = []
    for shape in shapes:
        for backward in (False, True):
            seconds = forked(_seconds, shape, backward)
            results += [
                Measurement(shape, variant, backward, seconds[variant], forked(_peak, shape, variant, backward))
                for variant in VARIANTS
            ]
    print(json.dumps([asdict(result) for result in results]))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
