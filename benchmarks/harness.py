"""What the benchmarks of every device share: random problems, checks, limits, rows and files."""

import csv
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from cases import Case, in_layout, oracle_passes, reference_passes
from tolerance import assert_accurate
from torch import Tensor
from torch.nn.functional import conv2d

from benchmarks import ROOT
from pyinvolution import build_info, ops, reference
from pyinvolution.studies.doctor import poisoned
from pyinvolution.studies.timing import Clock, Function, host_clock, interleaved

RESULTS = ROOT / "benchmarks" / "results"
REDUCTION = 4

# --- problems ---------------------------------------------------------------------------------------------------------


def random(shape: Sequence[int], dtype: torch.dtype, layout: str, device: str) -> Tensor:
    """Normal numbers, made on the device, in a layout of ``tests/cases.py``."""
    strides = in_layout(torch.empty(tuple(shape), device="meta"), layout).stride()
    order = sorted(range(len(shape)), key=lambda d: -strides[d])
    made = torch.randn([shape[d] for d in order], dtype=dtype, device=device)
    return made.permute([order.index(d) for d in range(len(shape))])


def involution_tensors(case: Case, dtype: torch.dtype, layout: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """X, W and the gradient of Y."""
    shapes = (case.input, case.weight, (*case.input[:2], *case.output))
    x, w, gy = (random(shape, dtype, layout, device) for shape in shapes)
    return x, w, gy


def reduced_channels(case: Case) -> int:
    return max(case.input[1] // REDUCTION, 1)


def span_tensors(
    case: Case, dtype: torch.dtype = torch.float32, layout: str = "channels_last", device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """R, S and b of a layer."""
    reduced, rows = reduced_channels(case), case.groups * case.kernel[0] * case.kernel[1]
    r = random((case.input[0], reduced, *case.output), dtype, layout, device)
    s, b = (random(shape, dtype, "contiguous", device) for shape in ((rows, reduced), (rows,)))
    return r, s / reduced**0.5, b


def convolution(case: Case, x: Tensor, gy: Tensor, kernel: int, groups: int = 1) -> tuple[Function, Function]:
    """A convolution of ``kernel`` x ``kernel`` in an involution's place, forward and backward."""
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    c = case.input[1]
    weight = torch.randn(c, c // groups, kernel, kernel, dtype=x.dtype, device=x.device).to(memory_format=layout)
    padding = (kernel // 2, kernel // 2)
    rest = (None, case.stride, padding, (1, 1), False, (0, 0), groups, (True, True, False))
    return (
        lambda: conv2d(x, weight, None, case.stride, padding, 1, groups),
        lambda: torch.ops.aten.convolution_backward(gy, x, weight, *rest),
    )


# --- checks -----------------------------------------------------------------------------------------------------------

SAMPLED_IMAGES = 8
"""Of a larger batch so many, evenly spaced, are compared with the float64 oracle."""
COLUMNS = 1 << 26
"""So many elements does the oracle unfold at a time."""


def sampled_images(case: Case) -> list[int]:
    n = case.input[0]
    count = min(n, SAMPLED_IMAGES)
    return [round(i * (n - 1) / max(count - 1, 1)) for i in range(count)]


def pieces(case: Case) -> Iterator[tuple[int, slice, slice, Case]]:
    """Image, channels, groups and sub-problem of each piece that the oracle computes by itself."""
    c, h, w = case.input[1:]
    width = c // case.groups
    per_group = width * case.kernel[0] * case.kernel[1] * case.output[0] * case.output[1]
    step = max(COLUMNS // max(per_group, 1), 1)
    for image in sampled_images(case):
        for first in range(0, case.groups, step):
            last = min(first + step, case.groups)
            part = replace(case, input=(1, (last - first) * width, h, w), groups=last - first)
            yield image, slice(first * width, last * width), slice(first, last), part


def require_finite(results: Sequence[Tensor], what: str) -> None:
    for name, result in zip(("output", *["gradient"] * 4), results, strict=False):
        assert bool(torch.isfinite(result).all()), f"{what}: the {name} has NaN or infinities"


def compare(names: Sequence[str], found: Sequence[Sequence[Sequence[Tensor]]], what: str) -> None:
    """For each name the pieces of the result, of the oracle and of the reference, under the one accuracy policy."""
    for name, (actual, exact, same) in zip(names, found, strict=True):
        ours, oracle, reference = (torch.cat([t.flatten() for t in tensors]) for tensors in (actual, exact, same))
        assert_accurate(ours, oracle, reference, f"{name} of {what}")


def check_involution(case: Case, x: Tensor, w: Tensor, gy: Tensor) -> tuple[Tensor, ...]:
    """Y and both gradients, after a comparison with the oracle. Raises an AssertionError where they are wrong."""
    with poisoned():
        results = (
            ops.involution2d(x, w, *case.geometry),
            *ops.involution2d_backward(gy, x, w, *case.geometry, (True, True)),
        )
    what = f"{case}, {x.dtype}"
    require_finite(results, what)
    found: list[list[list[Tensor]]] = [[[], [], []] for _ in results]
    for image, channels, groups, part in pieces(case):
        at, given = slice(image, image + 1), (x, w, gy)
        inputs = [t[at, groups if t is w else channels] for t in given]
        for place, (result, exact, same) in enumerate(
            zip(results, oracle_passes(part, *inputs), reference_passes(part, *inputs), strict=True)
        ):
            piece = result[at, groups if place == 2 else channels]
            for tensors, tensor in zip(found[place], (piece, exact, same), strict=True):
                tensors.append(tensor)
    compare(("output", "grad_input", "grad_weight"), found, what)
    return results


def composed_passes(
    case: Case, work: torch.dtype, x: Tensor, r: Tensor, s: Tensor, b: Tensor, gy: Tensor
) -> list[Tensor]:
    """Y and the gradients of X, R, S and b by a convolution and unfolding in ``work``, W rounded as stored."""
    dtype = x.dtype
    leaves = [t.detach().to(work).clone().requires_grad_() for t in (x, r, s, b)]
    weight = conv2d(leaves[1], leaves[2][..., None, None], leaves[3])
    if work != torch.float64:
        weight = weight + (weight.to(dtype).to(work) - weight).detach()
    y = reference.involution2d(leaves[0], weight.unflatten(1, (case.groups, *case.kernel)), None, *case.geometry)
    return [t.detach() for t in (y, *torch.autograd.grad(y, leaves, gy.to(work)))]


def check_span(case: Case, x: Tensor, r: Tensor, s: Tensor, b: Tensor, gy: Tensor) -> tuple[Tensor, ...]:
    """Y and the gradients of X, R, S and b, after a comparison with the oracle.

    Where images are sampled, the gradients of S and b are compared for a grad_output that is zero in all others.
    """
    geometry, mask = (case.kernel, *case.geometry), (True,) * 4
    images = sampled_images(case)
    with poisoned():
        y = ops.span_involution2d(x, r, s, b, None, None, False, *geometry)
        results = (y, *ops.span_involution2d_backward(gy, x, r, s, b, *geometry, mask))
        sums = results[3:]
        if len(images) < case.input[0]:
            some = torch.zeros_like(gy)
            some[images] = gy[images]
            sums = ops.span_involution2d_backward(some, x, r, s, b, *geometry, mask)[2:]
    what = f"span_involution2d of {case}, {x.dtype}"
    require_finite(results, what)
    taps = case.kernel[0] * case.kernel[1]
    found: list[list[list[Tensor]]] = [[[], [], []] for _ in results]
    works = (torch.float64, torch.float32 if x.dtype.itemsize == 2 else x.dtype)
    totals = {work: [torch.zeros_like(t, dtype=work) for t in (r, s, b)] for work in works}
    for image, channels, groups, part in pieces(case):
        at, rows = slice(image, image + 1), slice(groups.start * taps, groups.stop * taps)
        given = (x[at, channels], r[at], s[rows], b[rows], gy[at, channels])
        for place, tensor in ((0, results[0]), (1, results[1])):
            found[place][0].append(tensor[at, channels])
        for number, work in enumerate(works):
            output, grad_x, *grads = composed_passes(part, work, *given)
            kept = work if number == 0 else x.dtype
            found[0][number + 1].append(output.to(kept))
            found[1][number + 1].append(grad_x.to(kept))
            for total, grad, where in zip(totals[work], grads, (at, rows, rows), strict=True):
                total[where] += grad
    for place, actual in enumerate((results[2][images], *sums)):
        exact, same = (t[images] if place == 0 else t for t in (totals[work][place] for work in works))
        for tensors, tensor in zip(found[2 + place], (actual, exact, same.to(x.dtype)), strict=True):
            tensors.append(tensor)
    compare(("output", "grad_input", "grad_reduced", "grad_span_weight", "grad_span_bias"), found, what)
    return results


ALIKE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""The largest difference, relative in the root mean square, between two ways to compute the same."""


def check_alike(actual: Any, expected: Any, what: str, tolerance: float | None = None) -> None:
    """Compares whole results, of the batch's every image, with one that was checked."""
    ours, theirs = ((t,) if isinstance(t, Tensor) else tuple(t) for t in (expected, actual))
    for place, (a, e) in enumerate(zip(theirs, ours, strict=True)):
        assert a.shape == e.shape, f"{what}, result {place}: shape {tuple(a.shape)}, expected {tuple(e.shape)}"
        distance = torch.linalg.vector_norm(a.detach() - e.detach(), dtype=torch.float32).item()
        norm = torch.linalg.vector_norm(e.detach(), dtype=torch.float32).item()
        allowed = (ALIKE[e.dtype] if tolerance is None else tolerance) * norm
        assert distance <= allowed, f"{what}, result {place}: differs by {distance:.3g} in norm, allowed {allowed:.3g}"


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """How far a result is from an exact one, relative in norm."""
    return float((actual.float() - expected).norm() / expected.norm())


# --- limits -----------------------------------------------------------------------------------------------------------


def product_and_copy(
    device: str, dtype: torch.dtype, side: int, elements: int, clock: Clock = host_clock, seconds: float = 1.0
) -> dict[str, float]:
    """10^9 multiply-adds a second of a matrix product, and 10^9 bytes a second of a copy (read and written)."""
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    big = torch.randn(elements, dtype=dtype, device=device)
    other = torch.empty_like(big)
    times = interleaved({"mm": lambda: torch.mm(a, b), "copy": lambda: other.copy_(big)}, seconds, clock=clock)
    return {"gmac_per_s": side**3 / min(times["mm"]) / 1e9, "copy_gb_per_s": 2 * big.nbytes / min(times["copy"]) / 1e9}


def ratios_text(row: dict[str, Any]) -> str:
    return ", ".join(f"{k.removesuffix(': ratio')} {v:.2f}x" for k, v in row.items() if k.endswith(": ratio"))


# --- files ------------------------------------------------------------------------------------------------------------


def processor() -> dict[str, str]:
    info = dict(
        line.split(":", 1) for line in subprocess.run(["lscpu"], capture_output=True, text=True).stdout.splitlines()
        if ":" in line
    ) if platform.system() == "Linux" else {}  # fmt: skip
    keys = ("Model name", "CPU family", "Model", "CPU(s)", "L1d cache", "L2 cache", "L3 cache")
    return {key: info[key].strip() for key in keys if key in info} or {"Model name": platform.processor()}


def about(**more: Any) -> dict[str, Any]:
    """Where, when and of what a run was made."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return {
        "date": str(date.today()),
        "machine": processor(),
        "build": build_info(),
        "commit": commit.strip(),
        "load": os.getloadavg(),
        **more,
    }


def slug(name: str) -> str:
    return "-".join(name.lower().replace("(r)", "").split())


def write_rows(stem: Path, rows: Sequence[dict[str, Any]], **sections: Any) -> None:
    """``stem``.json, with the sections before the rows, and ``stem``.csv."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps({**sections, "rows": rows}, indent=1) + "\n")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def pyplot() -> Any:
    """matplotlib's, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plots

    return plots
