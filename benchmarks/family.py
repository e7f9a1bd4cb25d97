"""The operators under other papers' names, against how those are usually written: `python -m benchmarks.family`.

It takes a few minutes, on a CPU. Each call is compared with the usual formulation in float64 under the tests' accuracy
policy, or (a training step) with the usual formulation in float32, before both are timed by turns; a ratio is the
median of the ratios of neighbouring calls, with their quartiles. Memory is by how much the peak of one call exceeds
what was resident before it, in a process of its own, on one thread. Written to benchmarks/results: JSON, CSV, a chart
(PNG) and the table as Markdown.

``zero border`` is `involution2d` or `local_correlation2d` with the same tensors and a border of zeros: another result,
and the time by which a shifted border is judged.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from documents import defined
from tolerance import assert_accurate
from torch import Tensor
from torch.nn.functional import conv3d, interpolate, pad, unfold

from benchmarks.cpu import Report
from benchmarks.harness import RESULTS, about, check_alike, pyplot, slug, write_rows
from pyinvolution.compat.carafe import carafe
from pyinvolution.compat.featup import AdaptiveConv
from pyinvolution.compat.natten.functional import na2d_av, na2d_qk
from pyinvolution.compat.spatial_correlation_sampler import spatial_correlation_sample
from pyinvolution.functional import involution2d, local_correlation2d
from pyinvolution.studies.timing import Ratio, Spread, forked, interleaved, peak_growth

Compute = Callable[..., Tensor]
MB = 1e6


@dataclass(frozen=True)
class Call:
    """A call and its usual formulations, all functions of the same ``shapes``."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    ours: Compute
    usual: dict[str, Compute]
    wanted: dict[str, float]
    """How many times faster than each contender it is to be."""
    rulers: dict[str, Compute] = field(default_factory=dict)
    """Contenders with another result."""
    prepare: Callable[[list[Tensor]], list[Tensor]] = list
    """What is done with random numbers to have the call's tensors."""
    training: bool = False
    """Whether the gradients of all tensors are computed, too."""
    less_memory: float | None = None
    """How many times less memory it is to take than its first contender."""

    def tensors(self) -> list[Tensor]:
        return self.prepare([torch.randn(shape) for shape in self.shapes])


# --- usual formulations -----------------------------------------------------------------------------------------------


def window_index(length: int, kernel: int) -> Tensor:
    """(length, kernel): the positions that each position of an axis attends to."""
    return (torch.arange(length) - kernel // 2).clamp(0, length - kernel)[:, None] + torch.arange(kernel)


def gathered(image: Tensor, kernel: int) -> Tensor:
    """(B, heads, H, W, D) -> (B, heads, H, W, K K, D)."""
    rows, columns = (window_index(length, kernel) for length in image.shape[2:4])
    return image[:, :, rows[:, None, :, None], columns[None, :, None, :]].flatten(4, 5)


def gathered_qk(kernel: int, query: Tensor, key: Tensor) -> Tensor:
    return torch.einsum("bhyxd,bhyxkd->bhyxk", query, gathered(key, kernel))


def gathered_av(kernel: int, attn: Tensor, value: Tensor) -> Tensor:
    return torch.einsum("bhyxk,bhyxkd->bhyxd", attn, gathered(value, kernel))


def as_image(tokens: Tensor) -> Tensor:
    return tokens.permute(0, 1, 4, 2, 3).flatten(1, 2)


def zero_border_qk(kernel: int, query: Tensor, key: Tensor) -> Tensor:
    return local_correlation2d(as_image(query), as_image(key), kernel, padding=kernel // 2, groups=query.shape[1])


def zero_border_av(kernel: int, attn: Tensor, value: Tensor) -> Tensor:
    weight = attn.unflatten(-1, (kernel, kernel)).permute(0, 1, 4, 5, 2, 3)
    return involution2d(as_image(value), weight, padding=kernel // 2)


def one_projection(tensors: list[Tensor]) -> list[Tensor]:
    """Queries, keys and values as attention has them: views of (B, H, W, heads, D)."""
    return [t.permute(0, 2, 3, 1, 4).contiguous().permute(0, 3, 1, 2, 4) for t in tensors]


def unfold_nearest(kernel: int, scale: int, features: Tensor, masks: Tensor) -> Tensor:
    """CARAFE with one group: the columns, enlarged, multiplied by the masks and added up."""
    n, channels, height, width = features.shape
    columns = unfold(features, kernel, padding=kernel // 2).view(n, -1, height, width)
    columns = interpolate(columns, scale_factor=scale, mode="nearest")
    return (columns.view(n, channels, kernel**2, scale * height, scale * width) * masks[:, None]).sum(2)


def unfold_einsum(kernel: int, scale: int, features: Tensor, masks: Tensor) -> Tensor:
    """CARAFE with one group, without enlarging the columns."""
    n, channels, height, width = features.shape
    columns = unfold(features, kernel, padding=kernel // 2).view(n, channels, kernel**2, height, width)
    fine = masks.view(n, kernel**2, height, scale, width, scale)
    return torch.einsum("nckhw,nkhiwj->nchiwj", columns, fine).reshape(n, channels, scale * height, scale * width)


def shifted_filters(kernel: int, input: Tensor, filters: Tensor) -> Tensor:
    """FeatUp: a sum of shifted products."""
    _, height, width = filters.shape[:3]
    output = torch.zeros_like(input[:, :, :height, :width])
    for i in range(kernel):
        for j in range(kernel):
            output += input[:, :, i : i + height, j : j + width] * filters[:, None, :, :, i, j]
    return output


def shifted_correlation(patch: int, spacing: int, first: Tensor, second: Tensor) -> Tensor:
    reach, (height, width) = patch // 2 * spacing, first.shape[2:]
    padded = pad(second, [reach] * 4)
    products = [
        (first * padded[:, :, i * spacing : i * spacing + height, j * spacing : j * spacing + width]).sum(1)
        for i in range(patch)
        for j in range(patch)
    ]
    return torch.stack(products, 1).unflatten(1, (patch, patch))


def kernel_conv(size: int, frames: Tensor, core: Tensor) -> Tensor:
    """KPN: the shifted frames beside each other, multiplied and added up."""
    b, n, c, h, w = frames.shape
    padded = pad(frames, [size // 2] * 4)
    stack = torch.stack([padded[..., i : i + h, j : j + w] for i in range(size) for j in range(size)], 2)
    return (core.view(b, n, size**2, c, h, w) * stack).sum(2).mean(1)


PADS = [
    (0, 2, 0, 2), (1, 1, 0, 2), (2, 0, 0, 2), (0, 2, 1, 1), (2, 0, 1, 1), (0, 2, 2, 0), (1, 1, 2, 0), (2, 0, 2, 0),
]  # fmt: skip


def padded_gates(guidance: Tensor) -> Tensor:
    """CSPN: (N, 1, 8, H + 2, W + 2), the normalised affinities, each moved by one pixel."""
    gates = torch.stack([pad(guidance[:, k], pads) for k, pads in enumerate(PADS)], 1)
    return (gates / gates.abs().sum(1, keepdim=True)).unsqueeze(1)


def conv3d_step(gates: Tensor, depth: Tensor, kernels: Tensor) -> Tensor:
    """CSPN: one step, as a convolution with ones over eight moved copies."""
    moved = torch.stack([pad(depth[:, 0], pads) for pads in PADS], 1).unsqueeze(1)
    ones = torch.ones(1, 1, 8, 1, 1, dtype=depth.dtype)
    return conv3d(gates * moved, ones)[:, :, 0, 1:-1, 1:-1]


def cspn_tensors(tensors: list[Tensor]) -> list[Tensor]:
    guidance, depth = tensors
    return [padded_gates(guidance), depth, defined("family", "def affinities")["affinities"](guidance)[0]]


# --- calls ------------------------------------------------------------------------------------------------------------


def attention(heads: int, channels: int, side: int, kernel: int) -> list[Call]:
    image, weights = (1, heads, side, side, channels), (1, heads, side, side, kernel**2)
    name = f"{heads} x {channels}, {side} x {side}, K {kernel}"
    wanted = {"gather + einsum": 30, "zero border": 1 / 1.3}
    return [
        Call(
            f"na2d_qk, {name}",
            (image, image),
            partial(na2d_qk, kernel_size=kernel),
            {"gather + einsum": partial(gathered_qk, kernel)},
            wanted,
            rulers={"zero border": partial(zero_border_qk, kernel)},
            prepare=one_projection,
        ),
        Call(
            f"na2d_av, {name}",
            (weights, image),
            partial(na2d_av, kernel_size=kernel),
            {"gather + einsum": partial(gathered_av, kernel)},
            wanted,
            rulers={"zero border": partial(zero_border_av, kernel)},
            prepare=lambda tensors: [tensors[0].softmax(-1), *one_projection(tensors[1:])],
        ),
    ]


def upsampling(channels: int, height: int, width: int) -> list[Call]:
    name = f"CARAFE, {channels} to {2 * height} x {2 * width}, K 5"
    shapes = ((1, channels, height, width), (1, 25, 2 * height, 2 * width))
    ours = partial(carafe, kernel_size=5, group_size=1, scale_factor=2)
    usual: dict[str, Compute] = {"unfold + nearest": partial(unfold_nearest, 5, 2)}
    both = usual | {"unfold, einsum": partial(unfold_einsum, 5, 2)}

    def prepare(tensors: list[Tensor]) -> list[Tensor]:
        return [tensors[0], tensors[1].softmax(1)]

    return [
        Call(name, shapes, ours, both, {"unfold + nearest": 30}, prepare=prepare),
        Call(
            f"{name}, training step",
            shapes,
            ours,
            usual,
            {"unfold + nearest": 20},
            prepare=prepare,
            training=True,
            less_memory=20,
        ),
    ]


def filtering(channels: int, side: int) -> Call:
    shapes = ((1, channels, side + 6, side + 6), (1, side, side, 7, 7))
    usual: dict[str, Compute] = {"shifted products": partial(shifted_filters, 7)}
    name = f"FeatUp, {channels}, {side} x {side}, K 7"
    return Call(name, shapes, AdaptiveConv.apply, usual, {"shifted products": 10})


def correlation(paper: str, channels: int, height: int, width: int, patch: int, spacing: int) -> Call:
    return Call(
        f"{paper}, {channels}, {height} x {width}, {patch} x {patch}",
        ((1, channels, height, width),) * 2,
        partial(spatial_correlation_sample, patch_size=patch, dilation_patch=spacing),
        {"shifted products": partial(shifted_correlation, patch, spacing)},
        {"shifted products": 5},
    )


def burst(frames: int, side: int) -> Call:
    return Call(
        f"KPN, {frames} frames, {side} x {side}, K 5",
        ((1, frames, 1, side, side), (1, frames * 25, side, side)),
        partial(defined("family", "def predict")["predict"], size=5),
        {"stacked frames": partial(kernel_conv, 5)},
        {"stacked frames": 3},
    )


def flow(height: int, width: int) -> Call:
    recipe = defined("family", "def upsample_flow")
    return Call(
        f"RAFT with its softmax, {height} x {width} to {8 * height} x {8 * width}",
        ((1, 2, height, width), (1, 576, height, width)),
        recipe["upsample_flow"],
        {"torchvision": recipe["_utils"].upsample_flow},
        {"torchvision": 1.3},
    )


def propagation(height: int, width: int) -> Call:
    return Call(
        f"CSPN, a step, {height} x {width}",
        ((1, 8, height, width), (1, 1, height, width)),
        lambda gates, depth, kernels: involution2d(depth, kernels, padding=1),
        {"moved copies": conv3d_step},
        {"moved copies": 2},
        prepare=cspn_tensors,
    )


def calls(quick: bool = False) -> list[Call]:
    """The rows of the table; ``quick``: of the same kinds, on tiny images."""
    if quick:
        return [
            *attention(2, 32, 9, 3),
            *attention(8, 16, 6, 5),
            *upsampling(8, 4, 5),
            filtering(8, 8),
            correlation("PWC-Net", 8, 6, 7, 3, 1),
            correlation("FlowNetC", 8, 6, 7, 5, 2),
            burst(2, 9),
            flow(5, 6),
            propagation(9, 10),
        ]
    return [
        *attention(2, 32, 56, 7),
        *attention(8, 16, 14, 13),
        *upsampling(256, 50, 80),
        filtering(384, 128),
        correlation("PWC-Net", 96, 64, 112, 9, 1),
        correlation("FlowNetC", 256, 48, 64, 21, 2),
        burst(8, 256),
        flow(55, 128),
        propagation(228, 304),
    ]


# --- measurement ------------------------------------------------------------------------------------------------------


def run(call: Call, compute: Compute, tensors: Sequence[Tensor], upstream: Tensor | None = None) -> tuple[Tensor, ...]:
    """The result, and for a training step the gradients of the tensors."""
    if not call.training:
        return (compute(*tensors),)
    leaves = [t.detach().requires_grad_() for t in tensors]
    output = compute(*leaves)
    given = torch.ones_like(output) if upstream is None else upstream
    return (output.detach(), *torch.autograd.grad(output, leaves, given))


def check(call: Call, tensors: list[Tensor], upstream: Tensor | None) -> None:
    """Raises an AssertionError if a contender or the call itself has another result than the first contender."""
    results = {name: run(call, compute, tensors, upstream) for name, compute in call.usual.items()}
    first, ours = next(iter(results.values())), run(call, call.ours, tensors, upstream)
    for name, result in results.items():
        check_alike(result, first, f"{call.name}: {name}")
    if call.training:
        check_alike(ours, first, call.name)
        return
    usual = next(iter(call.usual.values()))
    assert_accurate(ours[0], usual(*(t.double() for t in tensors)), first[0], call.name)


def memory(call: Call) -> dict[str, float]:
    """MB that one call takes at its peak: ours, and the first contender's."""
    tensors = call.tensors()
    name, usual = next(iter(call.usual.items()))

    def peak(compute: Compute) -> int:
        # What the code itself takes when it runs for the first time is not counted.
        tiny = next(small for small in calls(quick=True) if small.training == call.training)
        run(tiny, compute, tiny.tensors())
        return peak_growth(lambda: run(call, compute, tensors))

    return {"mb": forked(peak, call.ours) / MB, f"{name}: mb": forked(peak, usual) / MB}


def measure(report: Report, call: Call, threads: int, seconds: float) -> None:
    torch.manual_seed(0)
    tensors = call.tensors()
    upstream = torch.randn_like(call.ours(*tensors)) if call.training else None
    check(call, tensors, upstream)
    contenders = {"ours": call.ours, **call.usual, **call.rulers}
    functions = {name: partial(run, call, compute, tensors, upstream) for name, compute in contenders.items()}
    times = interleaved(functions, seconds, 3, warm_up=not call.training)
    report.add("family", call.name, threads, "ours", times)
    report.rows[-1] |= {f"{name}: wanted": ratio for name, ratio in call.wanted.items()}


# --- output -----------------------------------------------------------------------------------------------------------


def contenders_of(row: dict[str, Any]) -> list[str]:
    return [column.removesuffix(": ratio") for column in row if column.endswith(": ratio")]


def table(report: Report, run: dict[str, Any]) -> str:
    machine = run["machine"]
    text = f"{machine['Model name']} ({machine.get('CPU(s)', '?')} cores, {run['build']['isa'].split()[0]}), "
    text += f"torch {run['build']['torch_running']}, float32, {run['date']}.\n"
    text += "How many times faster: median (quartiles) of neighbouring calls.\n\n"
    text += "| call | threads | ms | against | times faster | wanted |\n| --- | ---: | ---: | --- | ---: | ---: |\n"
    for row in report.rows:
        if "threads" not in row:
            continue
        for name in contenders_of(row):
            wanted = f"{row[f'{name}: wanted']:.3g}" if f"{name}: wanted" in row else ""
            ratio = Ratio.from_row(row, name)
            text += f"| {row['name']} | {row['threads']} | {row['ms']:.3g} | {name} | {ratio} | {wanted} |\n"
    for row in report.rows:
        if "mb" in row:
            name = next(column.removesuffix(": mb") for column in row if column.endswith(": mb"))
            text += f"\nMemory at the peak of {row['name']}: {row['mb']:.0f} MB, {name}: {row[f'{name}: mb']:.0f} MB "
            text += f"({row['less']:.1f} times, wanted {row['wanted']:.0f}).\n"
    return text


def chart(report: Report, path: Path) -> None:
    """The ratios of every row, and what is wanted of them."""
    plots = pyplot()
    rows = [(row, name) for row in report.rows if "threads" in row for name in contenders_of(row)]
    figure, axes = plots.subplots(figsize=(11, 0.3 * len(rows) + 1.5))
    names = [f"{row['name']}, {row['threads']} thr., {name}" for row, name in rows]
    spreads = [Spread(row[f"{name}: ratio"], row[f"{name}: low"], row[f"{name}: high"]) for row, name in rows]
    errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
    places = range(len(rows))
    axes.barh(places, [s.median for s in spreads], xerr=errors, color="#2980b9")
    marked = [(place, row[f"{name}: wanted"]) for place, (row, name) in enumerate(rows) if f"{name}: wanted" in row]
    axes.plot([wanted for _, wanted in marked], [place for place, _ in marked], "|", color="#c0392b", markersize=14)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="times faster (line: wanted)")
    axes.axvline(1, color="gray", linestyle="--", linewidth=1)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", metavar="TEXT", help="measures only the calls whose name contains it")
    parser.add_argument("--quick", action="store_true", help="tiny images, whose times mean nothing")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a directory")
    arguments = parser.parse_args(argv)
    wanted = [call for call in calls(arguments.quick) if arguments.only is None or arguments.only in call.name]
    report = Report({})
    # First, on one thread: a fork of a process that has computed with several would wait for them forever.
    torch.set_num_threads(1)
    peaks = {call.name: memory(call) for call in wanted if call.less_memory is not None}
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for call in wanted:
            measure(report, call, threads, 0.0 if arguments.quick else 1.5)
    for call in wanted:
        if call.less_memory is not None:
            sizes = peaks[call.name]
            ours, other = sizes.values()
            row = {"what": "family, memory", "name": call.name, **sizes, "less": other / max(ours, 1e-3)}
            report.rows.append(row | {"wanted": call.less_memory})
    found = about()
    name = f"{found['date']}-family-{slug(found['machine']['Model name'])}-{found['build']['isa'].split()[0]}"
    stem = arguments.output / name
    write_rows(stem, report.rows, about=found)
    chart(report, stem.with_suffix(".png"))
    text = table(report, found)
    stem.with_suffix(".md").write_text(text)
    print(text)
    print(f"written: {stem}.*")


if __name__ == "__main__":
    main()
