"""Operators, layers and models on a CPU, against what they replace: `python -m benchmarks.cpu` (about 9 minutes).

Everything that is compared runs in one process, by turns; a ratio is the median of the ratios of neighbouring runs,
with their quartiles. A result is compared with the reference before it is timed. Written to benchmarks/results: JSON
(rows, machine, versions, limits measured in the same run), CSV, a bar chart (PNG) and the summary as Markdown. Shares
of the limits are those of the fewest multiply-adds and bytes (benchmarks/roofline.py).

Unfolding allocates tens of megabytes a call; with glibc's default each is mapped and unmapped, and page faults take
half of its time. Its columns are therefore there twice: as found, and with the threshold raised ("malloc tuned").
"""

import argparse
import ctypes
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from cases import REDNET50, Case, tensors
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, cross_entropy, pad

from benchmarks import ROOT
from benchmarks.harness import (
    RESULTS,
    about,
    check_alike,
    check_involution,
    check_span,
    convolution,
    product_and_copy,
    pyplot,
    ratios_text,
    relative_error,
    slug,
    span_tensors,
    write_rows,
)
from benchmarks.loader import loader
from benchmarks.models import simplest
from benchmarks.roofline import Work
from benchmarks.systems import systems
from pyinvolution import force_variant, ops, optimize_for_inference, reference
from pyinvolution.functional import involution2d, span_involution2d
from pyinvolution.models import create_model
from pyinvolution.studies.timing import Function, Ratio, high_water, interleaved


class Report:
    """Rows of one run, and the machine's limits by number of threads."""

    def __init__(self, limits: dict[str, dict[str, float]]) -> None:
        self.limits = limits
        self.rows: list[dict[str, Any]] = []

    def add(
        self, what: str, name: str, threads: int, ours: str, times: dict[str, list[float]], work: Work | None = None
    ) -> None:
        row: dict[str, Any] = {
            "what": what,
            "name": name,
            "threads": threads,
            "ms": statistics.median(times[ours]) * 1e3,
        }
        if work is not None:
            limit, per_second = self.limits[str(threads)], 1e6 * row["ms"]
            row["gmac"] = work.fma / 1e9
            row["fma_share"] = work.fma / per_second / limit["gmac_per_s"]
            row["copy_share"] = work.bytes / per_second / limit["copy_gb_per_s"]
        for other, seconds in times.items():
            if other != ours:
                row[f"{other}: ms"] = statistics.median(seconds) * 1e3
                row.update(Ratio.between(times[ours], seconds).columns(other))
        self.rows.append(row)
        print(f"{what}, {name}, {threads} threads: {row['ms']:.3f} ms; {ratios_text(row)}", flush=True)


# --- limits -----------------------------------------------------------------------------------------------------------


def limits(threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    return product_and_copy("cpu", torch.float32, 1024, 1 << 25)


# --- operators --------------------------------------------------------------------------------------------------------


def layer(report: Report, name: str, case: Case, threads: int) -> None:
    """The fused operator, and the whole layer that generates its kernels, against ResNet-50's 3x3 convolution there."""
    x, _, gy = tensors(case, torch.float32, "channels_last")
    r, s, b = span_tensors(case)
    check_span(case, x, r, s, b, gy)
    geometry, channels = (case.kernel, *case.geometry), case.input[1]
    forward, convolution_backward = convolution(case, x, gy, 3)
    reduce, scale, shift = torch.randn(s.shape[1], channels, 1, 1), torch.rand(channels), torch.randn(channels)
    pooled = x if case.stride == (1, 1) else avg_pool2d(x, case.stride)
    composed = ops.span_involution2d(x, conv2d(pooled, reduce).relu_(), s, b, scale, shift, True, *geometry)

    def fused() -> Tensor:
        return ops.span_involution2d(x, r, s, b, None, None, False, *geometry)

    def whole() -> Tensor:
        return ops.involution_layer2d(x, reduce, None, s, b, scale, shift, True, *geometry)

    def backward() -> object:
        return ops.span_involution2d_backward(gy, x, r, s, b, *geometry, (True,) * 4)

    torch.testing.assert_close(whole(), composed, rtol=1e-3, atol=1e-4 * composed.abs().max().item())
    for what, operator, ours, other, against in (
        ("fused", "span_involution2d", fused, forward, "oneDNN 3x3"),
        ("whole layer", "whole layer", whole, forward, "oneDNN 3x3"),
        ("fused backward", "span_involution2d backward", backward, convolution_backward, "oneDNN 3x3 backward"),
    ):
        times = interleaved({"ours": ours, against: other}, 0.3)
        work = Work.of(operator, case, "float32")
        report.add(what, f"{name} N={case.input[0]}", threads, "ours", times, work)


def overhead(report: Report) -> None:
    """What a call costs the host besides its arithmetic: one pixel, one thread, against conv2d."""
    case = Case((1, 16, 1, 1), 1, (3, 3), reduced=4)
    x, w, _ = tensors(case, torch.float32, "contiguous")
    r, s, b = span_tensors(case)
    kernel, bias = torch.randn(16, 16, 3, 3), torch.randn(16)
    torch.testing.assert_close(involution2d(x, w, None, 1, 1), reference.involution2d(x, w, None, 1, 1))
    span = (s @ r.flatten()).add(b).view(1, 1, 3, 3, 1, 1)
    torch.testing.assert_close(
        span_involution2d(x, r, s, b, 3, 1, 1), involution2d(x, span, None, 1, 1), rtol=1e-4, atol=1e-5
    )

    def hundred(call: Function) -> Function:
        def run() -> None:
            for _ in range(100):
                call()

        return run

    for name, ours in (
        ("involution2d", lambda: involution2d(x, w, None, 1, 1)),
        ("span_involution2d", lambda: span_involution2d(x, r, s, b, 3, 1, 1)),
    ):
        times = interleaved({"ours": hundred(ours), "conv2d": hundred(lambda: conv2d(x, kernel, bias, 1, 1))}, 0.3)
        report.add("host overhead of 100 calls", name, 1, "ours", times)


def unfolding(
    report: Report, name: str, case: Case, layout: str, threads: int, suffix: str, compiled: Callable | None
) -> None:
    """involution2d against unfold + einsum: forward, and backward alone."""
    x, w, gy = tensors(case, torch.float32, layout)
    check_involution(case, x, w, gy)
    leaves = (x.clone().requires_grad_(), w.contiguous().clone().requires_grad_())
    kept = reference.involution2d(*leaves, None, *case.geometry)
    forward: dict[str, Function] = {
        "ours": lambda: ops.involution2d(x, w, *case.geometry),
        f"unfold{suffix}": lambda: reference.involution2d(x, w, None, *case.geometry),
    }
    if compiled is not None:
        forward["unfold, compiled"] = lambda: compiled(x, w, None, *case.geometry)
    backward: dict[str, Function] = {
        "ours": lambda: ops.involution2d_backward(gy, x, w, *case.geometry, (True, True)),
        f"unfold{suffix}": lambda: torch.autograd.grad(kept, leaves, gy, retain_graph=True),
    }
    for what, functions in (("involution2d", forward), ("involution2d backward", backward)):
        times = interleaved(functions, 0.25, 3)
        report.add(what, f"{name} {layout}", threads, "ours", times, Work.of(what, case, "float32"))


def unfold_table(report: Report, threads: Sequence[int], tuned: bool) -> None:
    compiled = torch.compile(reference.involution2d, dynamic=False)
    for count in threads:
        torch.set_num_threads(count)
        for name, case in REDNET50.items():
            for layout in ("channels_last", "contiguous"):
                use = tuned and layout == "contiguous" and count == 1
                suffix = ", malloc tuned" if tuned else ""
                unfolding(report, name, case, layout, count, suffix, compiled if use else None)


# --- users' shapes ----------------------------------------------------------------------------------------------------

# What others use the operator for: few channels a group, large windows, filters of an image, patches. N, C, G, K, size.
USERS = {
    f"{n}x{c}@{size} G{g} K{k}": Case((n, c, size, size), g, (k, k), padding=(k // 2,) * 2)
    for n, c, g, k, size in (
        (2, 64, 64, 3, 56), (2, 64, 64, 7, 56), (2, 64, 32, 5, 56), (2, 64, 16, 7, 56), (1, 180, 60, 7, 48),
        (1, 3, 1, 7, 256), (1, 1, 1, 15, 256), (1, 3, 1, 21, 128), (1, 384, 1, 7, 64), (128, 96, 48, 3, 11),
        (64, 64, 32, 5, 13), (64, 96, 8, 3, 17), (64, 96, 32, 5, 25),
    )
}  # fmt: skip
CHANNELS_LAST = ("2x64@56 G64 K3", "2x64@56 G32 K5", "2x64@56 G16 K7", "1x3@256 G1 K7", "128x96@11 G48 K3")
COMPILED = ("2x64@56 G64 K3", "128x96@11 G48 K3")
"""Compiling the sum of shifted products takes from seconds (9 taps) to a minute (49); these are always compiled."""
UNFOLDED = 1 << 26
"""Unfolding to more elements takes seconds a call, and is left out."""


def shifted_sum(case: Case, x: Tensor, w: Tensor) -> Tensor:
    """The operator as a sum of shifted products, at stride 1: what a compiler can turn into one loop."""
    (n, c, *_), (height, width) = case.input, case.output
    padded = pad(x, (case.padding[1],) * 2 + (case.padding[0],) * 2).unflatten(1, (case.groups, c // case.groups))
    taps = [
        w[:, :, i, j, None] * padded[..., i : i + height, j : j + width]
        for i in range(case.kernel[0])
        for j in range(case.kernel[1])
    ]
    return sum(taps[1:], taps[0]).reshape(n, c, height, width)


def user(report: Report, name: str, case: Case, layout: str, threads: int, compiled: bool) -> None:
    """Each pass of involution2d against unfolding, and against the compiled sum of shifted products."""
    x, w, gy = tensors(case, torch.float32, layout)
    results = check_involution(case, x, w, gy)
    leaves = (x.clone().requires_grad_(), w.contiguous().clone().requires_grad_())

    def gradient(output: Tensor, *of: Tensor) -> Function:
        return lambda: torch.autograd.grad(output, of, gy, retain_graph=True)

    def ours(*mask: bool) -> Function:
        return lambda: ops.involution2d_backward(gy, x, w, *case.geometry, mask)

    passes: dict[str, dict[str, Function]] = {
        "forward": {"ours": lambda: ops.involution2d(x, w, *case.geometry)},
        "grad_input": {"ours": ours(True, False)},
        "grad_weight": {"ours": ours(False, True)},
    }
    if math.prod((*case.input[:2], *case.kernel, *case.output)) <= UNFOLDED:
        unfolded = reference.involution2d(*leaves, None, *case.geometry)
        passes["forward"]["unfold"] = lambda: reference.involution2d(x, w, None, *case.geometry)
        passes["grad_input"]["unfold"] = gradient(unfolded, leaves[0])
        passes["grad_weight"]["unfold"] = gradient(unfolded, leaves[1])
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(partial(shifted_sum, case), dynamic=False)
        shifted = function(*leaves)
        check_alike((shifted, *gradient(shifted, *leaves)()), results, f"compiled shifts of {case}")
        passes["forward"]["shifts, compiled"] = lambda: function(x, w)
        passes["both gradients"] = {"ours": ours(True, True), "shifts, compiled": gradient(shifted, *leaves)}
    for what, functions in passes.items():
        # Each of them has to do with X, W and Y once; both gradients with more.
        work = Work.of("involution2d backward" if what == "both gradients" else "involution2d", case, "float32")
        report.add(f"users' shapes, {what}", f"{name} {layout}", threads, "ours", interleaved(functions, 0.1, 3), work)


def users(report: Report, threads: Sequence[int], shifts: bool) -> None:
    with torch._functorch.config.patch(donated_buffer=False):  # gradients are taken many times
        for count in threads:
            torch.set_num_threads(count)
            for name, case in USERS.items():
                user(report, name, case, "contiguous", count, shifts or name in COMPILED)
                if name in CHANNELS_LAST:
                    user(report, name, case, "channels_last", count, shifts)


# --- models -----------------------------------------------------------------------------------------------------------


def resnet50() -> nn.Module:
    from torchvision.models import resnet50

    return resnet50()


MODELS: dict[str, Callable[[], nn.Module]] = {"RedNet-50": lambda: create_model("rednet50"), "ResNet-50": resnet50}
CONV_STAGES = "conv_stages=1"
WITH_CONV_STAGES = MODELS | {CONV_STAGES: lambda: create_model("rednet50", conv_stages=1)}


def against_resnet(report: Report, what: str, batch: int, threads: int, times: dict[str, list[float]]) -> None:
    """A row for RedNet-50, and one for that with convolutions in the stem and first stage."""
    for name, prefix in (("RedNet-50", ""), (CONV_STAGES, f"{CONV_STAGES}, ")):
        both = {name: times[name], "ResNet-50": times["ResNet-50"]}
        report.add(what, f"{prefix}N={batch}", threads, name, both)


def inference(report: Report, threads: Sequence[int], batches: Sequence[int]) -> None:
    import torch._inductor.config

    for dtype in (torch.float32, torch.bfloat16):
        suffix = "" if dtype is torch.float32 else ", bfloat16"
        exact = {name: make().eval() for name, make in WITH_CONV_STAGES.items()}
        models = {name: optimize_for_inference(deepcopy(model).to(dtype)) for name, model in exact.items()}
        with torch.no_grad(), torch._inductor.config.patch(freezing=True):
            for count, batch in product(threads, batches):
                torch.set_num_threads(count)
                x = torch.randn(batch, 3, 224, 224, dtype=dtype).to(memory_format=torch.channels_last)
                seconds = 6.0 if batch == 1 else 10.0
                if dtype is torch.float32:
                    eager: dict[str, Function] = {name: partial(model, x) for name, model in models.items()}
                    against_resnet(report, "inference, eager", batch, count, interleaved(eager, seconds))
                torch._dynamo.reset()
                compiled = {name: torch.compile(m, fullgraph=True) for name, m in models.items()}
                for name, model in compiled.items():
                    # A compiler rounds in other places, but not more often.
                    expected = exact[name](x.float())
                    allowed = max(1e-3, 2 * relative_error(models[name](x), expected))
                    check_alike(model(x).float(), expected, f"{name}, compiled{suffix}", allowed)
                frozen: dict[str, Function] = {name: partial(model, x) for name, model in compiled.items()}
                what = f"inference, compile + freezing{suffix}"
                against_resnet(report, what, batch, count, interleaved(frozen, seconds))


def training_step(
    model: nn.Module, batch: int, size: int = 224, amp: bool = False, compiled: bool = False, classes: int = 1000
) -> Function:
    """A step of SGD with momentum, which returns the loss; with ``amp`` under bfloat16 autocast."""
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    x = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    y = torch.randint(0, classes, (batch,))

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            return cross_entropy(model(x), y)

    run = torch.compile(loss_of, fullgraph=True) if compiled else loss_of

    def step() -> float:
        optimizer.zero_grad()
        loss = run(x, y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def training(report: Report, threads: int, batch: int) -> None:
    torch.set_num_threads(threads)
    for compiled, amp in product((False, True), repeat=2):
        torch._dynamo.reset()
        steps = {}
        for name, make in WITH_CONV_STAGES.items():
            torch.manual_seed(0)
            expected = training_step(make(), batch)()
            torch.manual_seed(0)
            step, start = training_step(make(), batch, amp=amp, compiled=compiled), time.perf_counter()
            assert abs(step() - expected) < (0.1 if amp else 1e-3), f"{name}: another loss than in float32"
            if compiled:
                print(f"first step of {name}, compiled{', bfloat16' * amp}: {time.perf_counter() - start:.1f} s")
            steps[name] = step
        what = f"training step, {'compiled' if compiled else 'eager'}{', bfloat16' if amp else ''}"
        against_resnet(report, what, batch, threads, interleaved(steps, 20.0))


def recipe_net(name: str) -> nn.Module:
    """The network of the recipe ``cifar10/NAME``."""
    from pyinvolution.recipes import configs

    arguments = configs.load(f"cifar10/{name}.yaml")["model"]["init_args"]
    return create_model(arguments["name"], num_classes=arguments["num_classes"], **arguments["options"])


def recipes(report: Report, threads: Sequence[int]) -> None:
    """Training steps of the RedNets for CIFAR-10 against the ResNets of the same structure."""
    for count, amp, size, end in product(threads, (False, True), ("small", "large"), ("", "_mixed")):
        torch.set_num_threads(count)
        ours, rival = f"rednet_{size}{end}", f"resnet_{size}"
        steps = {}
        for name, title in ((ours, ours), (rival, "ResNet")):
            torch.manual_seed(0)
            with force_variant(simplest("cpu")):
                expected = training_step(recipe_net(name), 128, 32, classes=10)()
            torch.manual_seed(0)
            steps[title] = training_step(recipe_net(name), 128, 32, amp=amp, classes=10)
            assert abs(steps[title]() - expected) < (0.05 if amp else 1e-3), f"{name}: another loss than in float32"
        what = f"step of CIFAR-10's recipes{', bfloat16' if amp else ''}"
        report.add(what, f"{ours}, N=128", count, ours, interleaved(steps, 10.0))


def peak_memory(name: str, batch: int) -> None:
    """Prints how many MB a training step adds to the process at its peak. Runs in a process of its own."""
    step = training_step(MODELS[name](), 1)
    step()
    before = high_water()
    step = training_step(MODELS[name](), batch)
    step()
    step()
    print((high_water() - before) / 2**20)


def memory(report: Report, batch: int) -> None:
    """With glibc's malloc as found, which keeps freed pieces, and with every tensor given back when it is freed."""
    for title, environment in (("as found", {}), ("in use", {"MALLOC_MMAP_THRESHOLD_": "65536"})):
        peaks = {}
        for name in MODELS:
            command = [sys.executable, "-m", "benchmarks.cpu", "--peak-memory", name, "--batch", str(batch)]
            variables = os.environ | environment
            result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=True)
            peaks[name] = float(result.stdout.split()[-1])
        print(f"peak memory of a training step at N={batch}, MB, {title}: {peaks}")
        report.rows.append({"what": f"training step, peak MB {title}", "name": f"N={batch}", "mb": peaks["RedNet-50"],
                            "ResNet-50: mb": peaks["ResNet-50"]})  # fmt: skip


# --- output -----------------------------------------------------------------------------------------------------------


def summary(report: Report, about: dict[str, Any]) -> str:
    """The tables of the README."""
    isa = about["build"]["isa"].split()[0]
    cpu = f"{about['machine']['Model name']} ({about['machine'].get('CPU(s)', '?')} cores, {isa})"
    head = f"{cpu}, torch {about['build']['torch_running']}, float32, {about['date']}.\n"
    head += "How many times faster: median (quartiles) of neighbouring runs."

    models: list[tuple[object, ...]] = []
    for r in report.rows:
        if "mb" in r:
            models.append(
                (f"{r['what']}, {r['name']}", "", f"{r['mb']:.0f} MB", f"(ResNet-50: {r['ResNet-50: mb']:.0f} MB)")
            )
        elif r["what"].startswith(("inference", "training", "system")):
            models.append((f"{r['what']}, {r['name']}", r["threads"], f"{r['ms']:.1f}", Ratio.from_row(r, "ResNet-50")))

    layers = []
    by = {(r["what"], r["name"], r["threads"]): r for r in report.rows if "threads" in r}
    for (what, *place), r in by.items():
        if what == "fused":
            whole = by[("whole layer", *place)]["oneDNN 3x3: ratio"]
            back = by[("fused backward", *place)]["oneDNN 3x3 backward: ratio"]
            ratios = (f"{ratio:.1f}" for ratio in (r["oneDNN 3x3: ratio"], whole, back))
            layers.append((*place, f"{r['ms']:.3f}", f"{100 * r['fma_share']:.0f}", *ratios))

    groups: dict[str, list[float]] = {}
    for r in report.rows:
        if r["what"].startswith("involution2d"):
            layout = r["name"].split()[-1]
            for key, value in r.items():
                if key.endswith(": ratio"):
                    title = f"{r['what']}, {layout}, {r['threads']} threads: {key.removesuffix(': ratio')}"
                    groups.setdefault(title, []).append(value)
    unfolded = [(title, f"{min(v):.1f}", f"{statistics.median(v):.1f}") for title, v in groups.items()]

    calls = [
        (r["name"], f"{r['ms'] * 10:.2f}", f"{r['conv2d: ms'] * 10:.2f}", f"{1 / r['conv2d: ratio']:.2f}")
        for r in report.rows
        if r["what"].startswith("host overhead")
    ]

    steps = [
        (f"{r['name']}{', bfloat16' if 'bfloat16' in r['what'] else ''}", r["threads"], f"{r['ms']:.1f}",
         Ratio.from_row(r, "ResNet"))
        for r in report.rows
        if r["what"].startswith("step of")
    ]  # fmt: skip

    loaded = [
        (
            r["name"],
            f"{r['images_per_s']:.0f}",
            f"{r['Pillow, float: images_per_s']:.0f}",
            Ratio.from_row(r, "Pillow, float"),
        )
        for r in report.rows
        if r["what"] == "loader"
    ]

    shapes: dict[tuple[str, int], list[object]] = {}
    for (what, name, threads), r in by.items():
        if what.startswith("users' shapes"):
            line = shapes.setdefault((name, threads), [])
            if what.endswith("both gradients"):
                line[0] = f"{line[0]}, both gradients: {Ratio.from_row(r, 'shifts, compiled')}"
                continue
            if not line:
                line.append(Ratio.from_row(r, "shifts, compiled") if "shifts, compiled: ratio" in r else "")
            line += [
                f"{r['ms']:.2f} ({100 * r['copy_share']:.0f}%)",
                f"{r['unfold: ratio']:.1f}" if "unfold: ratio" in r else "",
            ]
    narrow = [(name, threads, *cells[1:], cells[0]) for (name, threads), cells in shapes.items()]
    passes = ("forward", "grad_input", "grad_weight")
    narrow_head = ("shape", "threads", *(t for pass_ in passes for t in (f"{pass_}, ms", "unfold")), "compiled shifts")
    narrow_text = (
        "involution2d on users' shapes: ms (share of the copy bandwidth of this run), and how many times faster "
    )
    narrow_text += "than unfold + einsum and than the compiled sum of shifted products."

    share = "Layers against oneDNN's 3x3 convolution; the share is that of a large matrix product's rate."
    parts: tuple[tuple[str, tuple[str, ...], Sequence[Sequence[object]]], ...] = (
        (head, ("RedNet-50 against ResNet-50", "threads", "ms", "faster"), models),
        (share, ("layer of RedNet-50", "threads", "fused ms", "share, %", "fused", "whole layer", "backward"), layers),
        ("One pixel, one thread.", ("overhead of a call", "us", "conv2d, us", "times conv2d's"), calls),
        ("", ("involution2d against unfold + einsum", "slowest layer", "median layer"), unfolded),
        (narrow_text, narrow_head, narrow),
        ("", ("training step of CIFAR-10's recipes, against the ResNet's", "threads", "ms", "faster"), steps),
        ("One core.", ("data loading", "images/s", "Pillow and floats, images/s", "faster"), loaded),
    )
    texts: list[str] = []
    for text, columns, cells in parts:
        lines: list[Sequence[object]] = [columns, ["---"] * len(columns), *cells] if cells else []
        table = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
        texts += [part for part in (text if table or text == head else "", table) if part]
    return "\n\n".join(texts) + "\n"


def chart(report: Report, path: Path) -> None:
    plots = pyplot()
    figure, (left, right, below) = plots.subplots(1, 3, figsize=(20, 6))
    rows = [r for r in report.rows if r["what"] == "whole layer" and r["threads"] == 1 and r["name"].endswith("N=1")]
    left.bar([r["name"].removesuffix(" N=1") for r in rows], [r["oneDNN 3x3: ratio"] for r in rows], color="#c0392b")
    left.axhline(3, color="gray", linestyle="--", linewidth=1)
    left.set(ylabel="times faster", title="Whole involution layer against oneDNN's 3x3 convolution, N=1, 1 thread")
    left.tick_params(axis="x", rotation=45)
    rows = [r for r in report.rows if "ResNet-50: ratio" in r]
    names = [f"{r['what'].replace('inference, ', '')}\n{r['name']}, {r['threads']} thr." for r in rows]
    errors = [
        [r["ResNet-50: ratio"] - r["ResNet-50: low"] for r in rows],
        [r["ResNet-50: high"] - r["ResNet-50: ratio"] for r in rows],
    ]
    right.barh(
        names[::-1], [r["ResNet-50: ratio"] for r in rows][::-1], xerr=[e[::-1] for e in errors], color="#2980b9"
    )
    right.axvline(1, color="gray", linestyle="--", linewidth=1)
    right.set(xlabel="times faster", title="RedNet-50 against ResNet-50, same tooling")
    rows = [r for r in report.rows if r["what"].startswith("users' shapes") and r["threads"] == 1]
    places = {name: -place for place, name in enumerate(dict.fromkeys(r["name"] for r in rows))}
    for shift, (pass_, color) in enumerate(
        (("forward", "#c0392b"), ("grad_input", "#2980b9"), ("grad_weight", "gray"))
    ):
        of = [r for r in rows if r["what"].endswith(pass_)]
        heights, shares = [places[r["name"]] - 0.27 * shift for r in of], [100 * r["copy_share"] for r in of]
        below.barh(heights, shares, 0.25, color=color, label=pass_)
    below.set_yticks([place - 0.27 for place in places.values()], list(places))
    below.set(xlabel="%", title="Users' shapes: share of the copy bandwidth, 1 thread")
    below.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


PARTS = ("overhead", "layers", "users", "unfold", "inference", "training", "recipes", "systems", "loader")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=8, help="the larger batch of models and of a training step")
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--shifts", action="store_true", help="compile the shifted products of every one of the users' "
                        "shapes (up to a minute each)")  # fmt: skip
    parser.add_argument("--output", type=Path, default=RESULTS, help="a directory")
    parser.add_argument("--peak-memory", choices=list(MODELS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_memory:
        return peak_memory(arguments.peak_memory, arguments.batch)

    def wanted(part: str) -> bool:
        return arguments.only is None or part in arguments.only

    torch.manual_seed(0)
    measured = {str(threads): limits(threads) for threads in arguments.threads}
    report = Report(measured)
    print("limits:", measured)
    if wanted("overhead"):
        torch.set_num_threads(1)
        overhead(report)
    if wanted("layers"):
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for name, case in REDNET50.items():
                layer(report, name, case, threads)
    if wanted("users"):
        users(report, arguments.threads, arguments.shifts)
    if wanted("unfold"):
        unfold_table(report, arguments.threads, tuned=False)
    if wanted("inference"):
        inference(report, arguments.threads, (1, arguments.batch))
    if wanted("training"):
        training(report, max(arguments.threads), arguments.batch)
        memory(report, arguments.batch)
    if wanted("recipes"):
        recipes(report, arguments.threads)
    if wanted("systems"):
        systems(report, max(arguments.threads))
    if wanted("loader"):
        loader(report)
    if wanted("unfold") and platform.system() == "Linux":
        # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD; last, since they stay.
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)
        libc.mallopt(-1, (1 << 31) - 1)
        unfold_table(report, arguments.threads, tuned=True)

    run = about(limits=measured)
    stem = arguments.output / f"{run['date']}-cpu-{slug(run['machine']['Model name'])}-{run['build']['isa'].split()[0]}"
    write_rows(stem, report.rows, about=run)
    chart(report, stem.with_suffix(".png"))
    stem.with_suffix(".md").write_text(summary(report, run))
    print(f"written: {stem}.*")


if __name__ == "__main__":
    main()
