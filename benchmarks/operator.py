"""Times involution2d against unfold + einsum on RedNet-50's layers; results are checked before they are timed.

    python -m benchmarks.operator [--batch N] [--threads N ...] [--json FILE]

Columns: median milliseconds, 10^9 multiply-adds a second, and how much faster than unfold. Unfold is given glibc's
raised mmap threshold (MALLOC_MMAP_THRESHOLD_ in the environment, with which the program restarts itself), without which
half of its time is page faults.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.benchmark import Timer

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))

from cases import REDNET50, Case, oracle_passes, reference_passes, tensors, with_batch  # noqa: E402
from tolerance import assert_accurate  # noqa: E402

from pyinvolution import build_info, ops, reference  # noqa: E402

MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def milliseconds(function: Callable[[], object], threads: int) -> float:
    timer = Timer("function()", globals={"function": function}, num_threads=threads)
    return timer.blocked_autorange(min_run_time=0.2).median * 1e3


def passes(case: Case, layout: str, check: bool) -> dict[str, tuple[Callable, Callable]]:
    """Ours and unfold for each pass, after comparing them with the float64 oracle."""
    x, w, gy = tensors(case, torch.float32, layout)
    if check:
        ours = (
            ops.involution2d(x, w, *case.geometry),
            *ops.involution2d_backward(gy, x, w, *case.geometry, (True, True)),
        )
        for result, exact, same in zip(
            ours, oracle_passes(case, x, w, gy), reference_passes(case, x, w, gy), strict=True
        ):
            assert_accurate(result, exact, same, str(case))
    xg, wg = x.clone().requires_grad_(), w.clone().requires_grad_()

    def unfold_backward() -> None:
        torch.autograd.grad(reference.involution2d(xg, wg, None, *case.geometry), (xg, wg), gy)

    def ours_both() -> None:
        ops.involution2d(x, w, *case.geometry)
        ops.involution2d_backward(gy, x, w, *case.geometry, (True, True))

    return {
        "forward": (
            lambda: ops.involution2d(x, w, *case.geometry),
            lambda: reference.involution2d(x, w, None, *case.geometry),
        ),
        "forward + backward": (ours_both, unfold_backward),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="also write the rows, with machine and versions, to this file")
    arguments = parser.parse_args()
    if not set(MALLOC) <= set(os.environ):
        os.execve(
            sys.executable, [sys.executable, "-m", "benchmarks.operator", *sys.argv[1:]], {**os.environ, **MALLOC}
        )

    rows = []
    table = Table(title=f"involution2d, float32, batch {arguments.batch}, {build_info()['isa']}")
    for column in ("layer", "layout", "pass", "threads", "ms", "GMAC/s", "unfold ms", "faster"):
        table.add_column(column, justify="left" if column in ("layer", "layout", "pass") else "right", no_wrap=True)
    for name, case in REDNET50.items():
        case = with_batch(case, arguments.batch)
        for layout in ("contiguous", "channels_last"):
            for pass_, (ours, unfold) in passes(case, layout, check=True).items():
                for threads in arguments.threads:
                    mine, theirs = milliseconds(ours, threads), milliseconds(unfold, threads)
                    macs = (
                        case.input[0]
                        * case.input[1]
                        * case.kernel[0]
                        * case.kernel[1]
                        * case.output[0]
                        * case.output[1]
                    )
                    rate = macs * (1 if pass_ == "forward" else 3) / mine / 1e6
                    rows.append(
                        {"layer": name, "layout": layout, "pass": pass_, "threads": threads, "ms": mine,
                         "gmac_per_s": rate, "unfold_ms": theirs}
                    )  # fmt: skip
                    cells = (f"{mine:.2f}", f"{rate:.1f}", f"{theirs:.1f}", f"{theirs / mine:.1f} x")
                    table.add_row(name, layout, pass_, str(threads), *cells)
    Console(width=120).print(table)
    if arguments.json:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout
        about = {"date": str(date.today()), "processor": processor(), "commit": commit.strip(), **build_info()}
        arguments.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
