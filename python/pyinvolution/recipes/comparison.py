"""The operator against the same built from unfold, on the CPU: time and peak memory, after checking that both agree."""

import json
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection

import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor

from pyinvolution.functional import involution2d
from pyinvolution.reference import involution2d as unfold_involution2d

__all__ = ["Measurement", "measure", "table"]

KERNEL, GROUP_CHANNELS = 7, 16
LAYERS = {"RedNet-50 stage 1": (8, 64, 56, 56), "RedNet-50 stage 3": (8, 256, 14, 14)}
"""N, C, H, W of involutions in RedNet-50 at 224 x 224."""
VARIANTS: dict[str, Callable[..., Tensor]] = {"unfold": unfold_involution2d, "involution2d": involution2d}


@dataclass
class Measurement:
    """Median time in seconds and growth of the process' peak resident memory in bytes."""

    layer: str
    variant: str
    backward: bool
    seconds: float
    peak: int


def measure() -> list[Measurement]:
    """Measure everything in a process of its own, whose memory no training has been through.

    Raises:
        subprocess.CalledProcessError: the two disagree, or one of them failed.
    """
    # By default glibc gives every large block back to the system, and half of unfold's time is then page faults.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
    done = subprocess.run(
        [sys.executable, "-m", __name__], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return [Measurement(**values) for values in json.loads(done.stdout.splitlines()[-1])]


def table(measurements: list[Measurement]) -> Table:
    """A row for each layer and direction."""
    found = {(m.layer, m.backward, m.variant): m for m in measurements}
    result = Table(
        title="Involutions of RedNet-50, batch 8",
        caption=f"float32, {torch.get_num_threads()} threads; time and growth of peak memory; checked equal first",
        box=SIMPLE,
    )
    for column in ("input", "pass"):
        result.add_column(column)
    for column in ("unfold", "", "ours", "", "faster", "smaller"):
        result.add_column(column, justify="right")
    for layer, shape in LAYERS.items():
        for backward in (False, True):
            naive, ours = (found[layer, backward, variant] for variant in VARIANTS)
            result.add_row(
                "" if backward else "x".join(map(str, shape[1:])),
                "forward, backward" if backward else "forward",
                *(text for m in (naive, ours) for text in (f"{1e3 * m.seconds:.0f} ms", f"{m.peak / 2**20:.0f} MiB")),
                f"[bold]{naive.seconds / ours.seconds:.0f} x[/]",
                f"[bold]{naive.peak / ours.peak:.0f} x[/]",
            )
    return result


def _inputs(layer: str, requires_grad: bool) -> tuple[Tensor, Tensor]:
    n, c, h, w = LAYERS[layer]
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


def _check(layer: str) -> None:
    naive, ours = (_run(variant, *_inputs(layer, True)) for variant in VARIANTS)
    torch.testing.assert_close(ours, naive, rtol=1e-4, atol=1e-4)


def _time_and_peak(layer: str, variant: str, backward: bool, repeats: int = 5) -> Measurement:
    inputs = _inputs(layer, backward)
    before = _resident()
    _run(variant, *inputs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        _run(variant, *inputs)
        times.append(time.perf_counter() - start)
    return Measurement(layer, variant, backward, sorted(times)[repeats // 2], peak)


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _forked(function: Callable, *arguments: object) -> object:
    """Result of ``function`` in a fork of this process, which has torch imported but has computed nothing yet."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def send(connection: Connection) -> None:
        connection.send(function(*arguments))

    process = context.Process(target=send, args=(sender,))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise SystemExit(f"{function.__name__}{arguments} failed") from None
    finally:
        process.join()


def _main() -> None:
    for layer in LAYERS:
        _forked(_check, layer)
    results = [
        _forked(_time_and_peak, layer, variant, backward)
        for layer in LAYERS
        for backward in (False, True)
        for variant in VARIANTS
    ]
    print(json.dumps([asdict(result) for result in results]))


if __name__ == "__main__":
    _main()
