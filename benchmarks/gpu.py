"""Operators and models on a GPU, against what they replace and against the machine: `python -m benchmarks.gpu`.

Everything is compared with the reference before it is timed. Times are between CUDA events, after warm-up, with the
second level of cache flushed before each call of an operator; what is compared runs by turns, and a ratio is the median
of the ratios of neighbouring calls, with their quartiles. The limits are measured in the same run: the bandwidth of a
large copy (read + written), and the multiply-adds a second of a large matrix product: in float32, without TF32, what
cuBLAS gets out of the CUDA cores, in 16 bits out of the tensor cores.

The most important cases come first: `--minutes 10` gives the headline rows. Written to benchmarks/results: JSON (rows,
targets, machine, versions, limits), CSV, a roofline and a bar chart (PNG) and the summary as Markdown.

Without a GPU it prints what bounds each shape on an H200, computed. `--device cpu --quick` goes through the whole
program with tiny problems on the CPU: a dry run, whose figures say nothing about a GPU.
"""

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from cases import same

from benchmarks import ROOT, models, operators, predict, roofline, targets
from benchmarks.harness import RESULTS, about, pyplot, slug, write_rows
from benchmarks.operators import LAYOUTS, Bench, Setting
from benchmarks.roofline import DETECTION, H200, SHAPES, batched
from pyinvolution import build_info
from pyinvolution.studies.timing import DeviceClock, Ratio, host_clock

DRY_RUN = ROOT / "build" / "benchmarks-dry-run"
DTYPES = ("bfloat16", "float32", "float16")
TINY = {"stem 16@10 K3": same(16, 10, 3), "32@9": same(32, 9, 7), "32@10 s2": same(32, 10, 7, 2)}
PEERS = ("RedNet-50", "ResNet-50", "ConvNeXt-nano", "RedNet-26")


@dataclass(frozen=True)
class Task:
    label: str
    run: Callable[[], None]


# --- what to run, the most important first ----------------------------------------------------------------------------


def operator_tasks(bench: Bench, settings: Sequence[Setting], compiled: bool = False) -> Iterator[Task]:
    for setting in settings:
        if compiled:
            run: Callable[[], None] = partial(operators.involution, bench, setting, compiled=True)
            yield Task(f"unfold, compiled: {setting}", run)
            continue
        yield Task(f"involution2d: {setting}", partial(operators.involution, bench, setting))
        yield Task(f"span_involution2d: {setting}", partial(operators.span_involution, bench, setting))


def settings(device: str, batch: int, dtype: str, layout: str, detection: bool = False) -> list[Setting]:
    names = [name for name in SHAPES if (name in DETECTION) == detection]
    # The stem has other kernels; no target names it.
    names.sort(key=lambda name: name not in targets.K7)
    return [Setting(name, batched(SHAPES[name], batch), dtype, layout, device) for name in names]


def all_operators(bench: Bench) -> list[list[Task]]:
    """Groups by falling importance."""
    order = [
        (256, "bfloat16", "channels_last"),
        (256, "float32", "channels_last"),
        (256, "float16", "channels_last"),
        (256, "bfloat16", "NCHW"),
        (2, "bfloat16", "channels_last"),
        (1, "bfloat16", "channels_last"),
        (32, "bfloat16", "channels_last"),
    ]
    order += [k for k in product((256, 2, 1, 32), DTYPES, LAYOUTS) if k not in order]
    groups = [
        list(operator_tasks(bench, settings(bench.device, *key, detection=key[0] == 2))) for key in order
    ]  # fmt: skip
    for place, dtype in ((4, "bfloat16"), (9, "float32"), (11, "float16")):
        compiled = settings(bench.device, 256, dtype, "channels_last")
        groups.insert(place, list(operator_tasks(bench, compiled, compiled=True)))
    return groups


def all_models(bench: Bench) -> list[list[Task]]:
    ready = models.Inference(224)

    def inference(batch: int, mode: str) -> Task:
        return Task(f"inference N={batch}, {mode}", partial(ready, bench, batch, mode, PEERS, 4.0))

    def training(mode: str) -> Task:
        return Task(f"training step N=128, {mode}", partial(models.training, bench, 128, 224, mode, PEERS, 6.0))

    eager, graph, compiled = models.MODES
    return [
        [inference(256, eager), inference(1, graph), training(eager), inference(256, graph)],
        [inference(256, compiled), training(compiled), training(graph)],
        [*(inference(1, m) for m in (eager, compiled)), *(inference(32, m) for m in models.MODES)],
    ]


def tasks_of(bench: Bench, latency: Bench, only: str | None) -> list[Task]:
    ops = all_operators(bench) if only != "models" else []
    nets = all_models(latency) if only != "ops" else []
    groups = [group for pair in zip(ops, nets, strict=False) for group in pair]
    groups += ops[len(nets) :] + nets[len(ops) :]
    return [task for group in groups for task in group]


def quick_tasks(bench: Bench, only: str | None) -> list[Task]:
    """Every kind of task once, tiny."""
    tasks: list[Task] = []
    if only != "models":
        for name, dtype, layout in product(TINY, ("float32", "bfloat16"), LAYOUTS):
            tasks += operator_tasks(bench, [Setting(name, batched(TINY[name], 2), dtype, layout, bench.device)])
        first = Setting("32@9", batched(TINY["32@9"], 2), "float32", "channels_last", bench.device)
        tasks += operator_tasks(bench, [first], compiled=True)
    if only != "ops":
        ready = models.Inference(64)
        for mode in models.MODES:
            names = PEERS if mode == "eager" else ("RedNet-26", "ResNet-50")
            run = partial(ready, bench, 2, mode, names, 0.0)
            tasks.append(Task(f"inference N=2, {mode}", run))
        for mode in ("eager", "CUDA graph"):
            run = partial(models.training, bench, 4, 64, mode, ("RedNet-26", "ResNet-50"), 0.0)
            tasks.append(Task(f"training step N=4, {mode}", run))
    return tasks


def run(bench: Bench, tasks: Sequence[Task], minutes: float) -> dict[str, list[str]]:
    """The labels of those that the time did not allow, and of those for which the device has too little memory."""
    end = time.perf_counter() + minutes * 60
    missing: dict[str, list[str]] = {"left_out": [], "does_not_fit": []}
    for task in tasks:
        if time.perf_counter() > end:
            missing["left_out"].append(task.label)
            continue
        try:
            task.run()
        except torch.OutOfMemoryError:
            missing["does_not_fit"].append(task.label)
            print(f"{task.label}: does not fit into memory", flush=True)
        bench.release()
    return missing


# --- output -----------------------------------------------------------------------------------------------------------


def device_info(device: str) -> dict[str, Any]:
    if device != "cuda":
        return {"name": "CPU, a dry run"}
    properties = torch.cuda.get_device_properties(0)
    info = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "l2_mb": properties.L2_cache_size / 2**20,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
        info.update(zip(("driver", "max_sm_clock", "power_limit"), found, strict=False))
    except (OSError, subprocess.CalledProcessError, IndexError):
        info["driver"] = "unknown: no nvidia-smi"
    return info


def versions() -> dict[str, str]:
    found = {}
    for name in ("torchvision", "timm", "triton", "cupy"):
        try:
            found[name] = str(__import__(name).__version__)
        except ImportError:
            found[name] = "not installed"
    return found


def ratio_cell(row: dict[str, Any], other: str) -> str:
    if f"{other}: ratio" in row:
        return str(Ratio.from_row(row, other))
    return row.get(f"{other}: note", "").split(":")[0]


def operator_tables(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A table of ratios for each operator, of the largest batch in the first dtype and layout that were measured."""
    for operator in roofline.OPERATORS:
        of = [r for r in rows if r["what"] == operator]
        if not of:
            continue
        batch = max(r["batch"] for r in of)
        found = {(r["dtype"], r["layout"]) for r in of if r["batch"] == batch}
        key = next(k for k in product(DTYPES, LAYOUTS) if k in found)
        of = [r for r in of if r["batch"] == batch and (r["dtype"], r["layout"]) == key]
        others = dict.fromkeys(
            c.rsplit(": ", 1)[0] for r in of for c in r if c.endswith((": ratio", ": note"))
        )  # fmt: skip
        yield f"`{operator}`, N = {batch}, {key[0]}, {key[1]}; how many times longer the others take:"
        yield ""
        head = ["shape", "kernel", "ms", "copy rate, %", "x floor", "MB", *others]
        yield f"| {' | '.join(head)} |"
        yield f"|{' --- |' * len(head)}"
        for r in of:
            cells = [r["shape"], r["variant"], f"{r['ms']:.4f}", f"{100 * r['copy_share']:.0f}"]
            cells += [f"{r['ms'] / r['floor_ms']:.2f}", "" if r["peak_mb"] is None else f"{r['peak_mb']:.0f}"]
            yield f"| {' | '.join([*cells, *(ratio_cell(r, other) for other in others)])} |"
        yield ""


def model_table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    of = [r for r in rows if "model" in r]
    if not of:
        return
    yield "End to end, AMP bfloat16, channels_last; how many times longer the others take:"
    yield ""
    yield f"| what | N | mode | model | ms | images/s | MB | {' | '.join(models.RIVALS)} |"
    yield f"|{' --- |' * (7 + len(models.RIVALS))}"
    for r in of:
        cells = [r["what"], str(r["batch"]), r["mode"], r["model"]]
        if "ms" in r:
            memory = "" if r.get("peak_mb") is None else f"{r['peak_mb']:.0f}"
            cells += [f"{r['ms']:.3f}", f"{r['images_per_s']:.0f}", memory]
            cells += [ratio_cell(r, rival) for rival in models.RIVALS]
        else:
            cells += [r["model: note"], *[""] * (2 + len(models.RIVALS))]
        yield f"| {' | '.join(cells)} |"
    yield ""


def summary(rows: Sequence[dict[str, Any]], run: dict[str, Any], verdicts: Sequence[targets.Verdict]) -> str:
    """The tables of the README."""
    limits = run["limits"]
    rates = ", ".join(f"{name} {rate / 1e3:.1f}" for name, rate in limits["gfma"].items())
    lines = (
        ["**A dry run on a CPU with tiny problems: its figures say nothing about a GPU.**", ""]
        if run["dry_run"]
        else []
    )
    lines += [
        f"{run['device']['name']}, driver {run['device'].get('driver', '-')}, torch {run['build']['torch_running']}, "
        f"commit {run['commit']}, {run['date']}: `{run['command']}`.",
        f"Limits, measured: copy {limits['copy_gb_per_s']:.0f} GB/s; matrix products, TFMA/s: {rates}.",
        "",
        *(f"Does not fit into memory: {label}.\n" for label in run["does_not_fit"]),
        *([f"Left out, for the time was over: {len(run['left_out'])} cases.\n"] if run["left_out"] else []),
        *operator_tables(rows),
        *model_table(rows),
        predict.comparison(rows),
        targets.table(verdicts),
    ]
    return "\n".join(lines)


def roofline_chart(rows: Sequence[dict[str, Any]], limits: roofline.Limits, title: str, path: Path) -> None:
    plots = pyplot()
    figure, axes = plots.subplots(figsize=(12, 6.5))
    of = [r for r in rows if r["what"] in roofline.OPERATORS[:4]]
    intensity = {id(r): r["gfma_per_s"] / r["gb_per_s"] for r in of}
    values = sorted(intensity.values()) or [1.0]
    span = [values[0] / 2, max(values[-1] * 2, 1.3 * max(limits.gfma.values()) / limits.copy_gb_per_s)]
    top = max(limits.gfma.values())
    corner = top / limits.copy_gb_per_s
    roof = [span[0], corner, span[1]]
    axes.plot(roof, [min(limits.copy_gb_per_s * v, top) for v in roof], color="black", linewidth=1.2,
              label=f"copy, {limits.copy_gb_per_s:.0f} GB/s")  # fmt: skip
    for dtype, dash in zip(("float32", "bfloat16"), ("--", ":"), strict=True):
        rate = limits.gfma[dtype]
        axes.axhline(rate, color="gray", linestyle=dash, linewidth=1)
        axes.annotate(f"{dtype} product, {rate:.0f} GFMA/s", (span[1], rate), textcoords="offset points",
                      xytext=(-4, 3), ha="right", fontsize=8)  # fmt: skip
    colors = dict(zip(roofline.OPERATORS[:4], ("#2980b9", "#7fb3d5", "#c0392b", "#e6a49b"), strict=True))
    markers = {"float32": "s", "float16": "^", "bfloat16": "o"}
    for r in of:
        full = r["layout"] == "channels_last"
        axes.scatter(
            intensity[id(r)], r["gfma_per_s"], marker=markers[r["dtype"]], s=12 + 9 * max(r["batch"], 1).bit_length(),
            facecolors=colors[r["what"]] if full else "none", edgecolors=colors[r["what"]], linewidths=0.9, alpha=0.85,
        )  # fmt: skip
    handles = axes.get_legend_handles_labels()[0]
    handles += [plots.Line2D([], [], marker="o", linestyle="", color=c, label=o) for o, c in colors.items()]
    handles += [plots.Line2D([], [], marker=m, linestyle="", color="gray", label=d) for d, m in markers.items()]
    handles.append(plots.Line2D([], [], marker="o", linestyle="", color="gray", markerfacecolor="none", label="NCHW"))
    axes.legend(handles=handles, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axes.set(xscale="log", yscale="log", xlim=span, xlabel="multiply-adds per byte (fewest bytes)",
             ylabel="10^9 multiply-adds a second", title=title)  # fmt: skip
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plots.close(figure)


def bar_chart(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Our operators against each contender, and the models against ResNet-50."""
    plots = pyplot()
    figure, axes = plots.subplots(1, 3, figsize=(18, 6), width_ratios=(3, 3, 2))
    shown = {
        "involution2d": (
            "unfold",
            "unfold, compiled",
            "variant generic",
            "official",
            "3x3 convolution",
            "depthwise 7x7",
        ),
        "span_involution2d": ("library span + involution2d", "unfold", "3x3 convolution"),
    }
    for axis, (operator, others) in zip(axes, shown.items(), strict=False):
        of = [r for r in rows if r["what"] == operator and r["layout"] == "channels_last"]
        batch = max((r["batch"] for r in of), default=0)
        dtype = next((d for d in DTYPES if any(r["dtype"] == d and r["batch"] == batch for r in of)), "")
        of = [r for r in of if r["batch"] == batch and r["dtype"] == dtype]
        present = [o for o in others if any(f"{o}: ratio" in r for r in of)]
        width = 0.8 / max(len(present), 1)
        for place, other in enumerate(present):
            at = [i + place * width for i, r in enumerate(of) if f"{other}: ratio" in r]
            ratios = [Ratio.from_row(r, other) for r in of if f"{other}: ratio" in r]
            errors = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
            axis.bar(at, [r.median for r in ratios], width, yerr=errors, label=other, error_kw={"linewidth": 0.8})
        axis.set_xticks(
            [i + 0.4 - width / 2 for i in range(len(of))], [r["shape"] for r in of], rotation=45, ha="right"
        )
        axis.axhline(1, color="gray", linestyle="--", linewidth=1)
        axis.set(yscale="log", ylabel="times as long as ours",
                 title=f"{operator}, N={batch}, {dtype}, channels_last")  # fmt: skip
        if present:
            axis.margins(y=0.25)
            axis.legend(fontsize=8, loc="upper left", ncols=2)
    of = [r for r in rows if str(r.get("model", "")).startswith("RedNet") and "ResNet-50: ratio" in r]
    names = [f"{r['model']}, {r['what']}\nN={r['batch']}, {r['mode']}" for r in of]
    ratios = [Ratio.from_row(r, "ResNet-50") for r in of]
    colors = ["#c0392b" if r["model"] == "RedNet-50" else "#e6a49b" for r in of]
    axes[2].barh(range(len(of)), [r.median for r in ratios], color=colors,
                 xerr=[[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]],
                 error_kw={"linewidth": 0.8})  # fmt: skip
    axes[2].set_yticks(range(len(of)), names, fontsize=8)
    axes[2].invert_yaxis()
    axes[2].axvline(1, color="gray", linestyle="--", linewidth=1)
    axes[2].set(xlabel="times faster", title="against ResNet-50")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plots.close(figure)


def floors_text() -> str:
    tables = [roofline.floors_table(H200, dtype) for dtype in ("bfloat16", "float32")]
    return "\n".join([*tables, roofline.bounds_table(H200)])


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny problems; the only ones for --device cpu")
    parser.add_argument("--only", choices=["ops", "models"])
    parser.add_argument(
        "--minutes", type=float, default=45.0, help="start no case after so long (default: %(default)g)"
    )
    parser.add_argument("--official", type=Path, metavar="PATH", help="a checkout of the authors' code, or its "
                        "involution_cuda.py: its CuPy operator is measured too, where CuPy is installed")  # fmt: skip
    parser.add_argument("--output", type=Path, help=f"a directory (default: {RESULTS.relative_to(ROOT)}; for a dry or "
                        f"quick run {DRY_RUN.relative_to(ROOT)})")  # fmt: skip
    parser.add_argument("--predict", choices=sorted(predict.GPUS), nargs="?", const="h200", metavar="GPU",
                        help="print what each layer and RedNet-50 against ResNet-50 should take on a GPU "
                        f"({', '.join(sorted(predict.GPUS))}; default: h200), by counts; run nothing")  # fmt: skip
    parser.add_argument("--floors", action="store_true", help="print the computed floors on an H200, run nothing")
    arguments = parser.parse_args(argv)
    if arguments.device == "cpu" and not arguments.quick:
        parser.error("--device cpu needs --quick: it is a dry run (python -m benchmarks.cpu measures CPUs)")
    if arguments.official is not None and not arguments.official.exists():
        parser.error(f"--official {arguments.official}: there is no such file or directory")
    if not arguments.minutes > 0:
        parser.error(f"--minutes is {arguments.minutes:g}, expected more than 0")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = arguments_of(argv)
    device = arguments.device
    if arguments.floors:
        return print(floors_text())
    if arguments.predict:
        return print(predict.text(predict.GPUS[arguments.predict]))
    if device == "cuda" and not torch.cuda.is_available():
        print(f"There is no GPU here: nothing is measured. What bounds each shape on an H200:\n\n{floors_text()}")
        return None
    if device == "cuda" and build_info()["cuda"].startswith("none"):
        sys.exit(f"The library has no CUDA kernels ({build_info()['cuda']}): build it where nvcc is found.")

    if device == "cpu":
        # On a machine that others use, threads wait for each other longer than tiny problems take.
        torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    clock = DeviceClock() if device == "cuda" else host_clock
    limits = roofline.measure(device, clock, arguments.quick)
    print("limits:", limits.as_dict())
    official = operators.load_official(arguments.official) if arguments.official else "no --official PATH was given"
    if isinstance(official, str):
        print(f"the official operator is not measured: {official}")
    rows: list[dict[str, Any]] = []
    bench = Bench(device, clock, limits, rows, 0.0 if arguments.quick else 0.15, official=official)
    if arguments.quick:
        bench.compiler, bench.least = "aot_eager", 3
        tasks = quick_tasks(bench, arguments.only)
    else:
        # Models find their weights where the last call left them.
        tasks = tasks_of(bench, replace(bench, clock=DeviceClock(flush=False)), arguments.only)
    missing = run(bench, tasks, arguments.minutes)

    dry = device == "cpu" or arguments.quick
    verdicts = targets.evaluate(rows, limits)
    run_info = about(
        device=device_info(device),
        versions=versions(),
        command=shlex.join(["python", "-m", "benchmarks.gpu", *(sys.argv[1:] if argv is None else argv)]),
        dry_run=dry,
        tf32=False,
        official=official if isinstance(official, str) else "measured",
        limits=limits.as_dict(),
        **missing,
    )
    name = "dry-run" if dry else f"gpu-{slug(run_info['device']['name'])}"
    stem = (arguments.output or (DRY_RUN if dry else RESULTS)) / f"{run_info['date']}-{name}"
    write_rows(stem, rows, about=run_info, targets=targets.as_dicts(verdicts))
    title = ("DRY RUN on a CPU, tiny problems" if device == "cpu" else "DRY RUN, tiny problems") if dry else (
        f"{run_info['device']['name']}, {run_info['date']}, {run_info['commit']}"
    )  # fmt: skip
    roofline_chart(rows, limits, title, stem.with_name(stem.name + "-roofline.png"))
    bar_chart(rows, title, stem.with_name(stem.name + "-ratios.png"))
    text = summary(rows, run_info, verdicts)
    stem.with_suffix(".md").write_text(text)
    print(f"\n{text}\nwritten: {stem}*")


if __name__ == "__main__":
    main()
