"""The committed table of what each kernel costs, budgets/nvcc-VERSION.json.

`python -m tests.ptx.budgets` prints what differs from the table, with `--rebase` it writes the table and the documents.

ptxas says what it makes of a kernel (registers, spills), the interpreter what a block executes. Averages are over all
blocks of the first image, so interior and edge count as often as they occur. Where blocks do not belong to images (they
walk over several), they are over up to four blocks at equal distances.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from .launches import ARCHITECTURE, BUILD, PTXAS, ROOT, Launch, nvcc_version, recorder
from .machine import Counts
from .problems import STORAGE, Prepared, Problem, prepare, run_launch
from .program import entry_text

FOLDER = Path(__file__).with_name("budgets")
TOLERANCE = 0.03
MULTIPROCESSORS = 132  # of an H200
SHAPES = {
    "64@56": (64, 56, 1), "128@56 s2": (128, 56, 2), "128@28": (128, 28, 1), "256@28 s2": (256, 28, 2),
    "256@14": (256, 14, 1), "512@14 s2": (512, 14, 2), "512@7": (512, 7, 1),
}  # fmt: skip
"""The layers of RedNet-50 with 7 x 7 kernels: channels, height and width, stride."""
NARROW: dict[str, dict[str, Any]] = {
    "64@56, groups of 1": {"groups": 64, "batch": 16},
    "64@56, groups of 4": {"groups": 16, "batch": 64},
    "96@13 K3, groups of 12": {"channels": 96, "height": 13, "width": 13, "groups": 8, "kernel": 3, "batch": 128},
    "3@64 K15, one group": {"channels": 3, "height": 64, "width": 64, "groups": 1, "kernel": 15, "batch": 16},
}
"""What `sliding` is for."""
SHIFTED: dict[str, dict[str, Any]] = {
    "64@56 shifted, groups of 32": {"groups": 2, "batch": 32},
    "64@56 shifted, dilation 8": {"groups": 2, "dilation": 8, "batch": 32},
    "128@14 K13 shifted": {"channels": 128, "height": 14, "width": 14, "groups": 8, "kernel": 13, "batch": 32},
}
"""Neighbourhood attention: windows that the border moves inside."""
DILATED: dict[str, dict[str, Any]] = {
    "64@56 dilation 8, groups of 32": {"groups": 2, "dilation": 8, "padding": 24, "batch": 32},
}
"""Classes of a border of zeros."""
INVOLUTION_PASSES = ("forward", "grad_input", "grad_weight")


def layer(strategy: str, pass_: str, dtype: str, layout: str, shape: str, **changes: Any) -> Problem:
    channels, size, stride = SHAPES[shape]
    fields: dict[str, Any] = {
        "batch": 256, "channels": channels, "height": size, "width": size, "groups": channels // 16, "kernel": 7,
        "stride": stride, "multiprocessors": MULTIPROCESSORS,
    }  # fmt: skip
    return Problem(strategy, pass_, dtype, layout, **{**fields, **changes})


def classes() -> Iterator[tuple[str, Problem]]:
    """The rows of the table: a shape's name and the problem. Add rows for new kernels here."""
    for shape, (channels, _, _) in SHAPES.items():
        for pass_ in INVOLUTION_PASSES:
            yield shape, layer("mma", pass_, "bfloat16", "nhwc", shape)
        if channels < 512:  # refused there, where W stays in the L2 cache
            for pass_ in ("forward", "backward"):
                yield shape, layer("fused", pass_, "bfloat16", "nhwc", shape, reduced=channels // 4)
        if channels == 64:
            yield shape, layer("fused", "layer", "bfloat16", "nhwc", shape, reduced=channels // 4)
        for pass_ in INVOLUTION_PASSES:
            yield shape, layer("tiled", pass_, "float32", "nhwc", shape)
    for pass_ in INVOLUTION_PASSES:
        for size, stride in ((56, 1), (56, 2)):
            small = {"batch": 64, "height": size, "width": size, "stride": stride}
            name = f"64@{size}" + " s2" * (stride == 2)
            yield name, layer("mma", pass_, "bfloat16", "nchw", "64@56", **small)
            yield name, layer("tiled", pass_, "float32", "nchw", "64@56", **small)
            yield name, layer("tiled", pass_, "bfloat16", "nhwc", "64@56", **small)
        stem = {"batch": 64, "channels": 32, "groups": 2, "height": 112, "width": 112, "kernel": 3}
        yield "stem 32@112 K3", layer("mma", pass_, "bfloat16", "nhwc", "64@56", **stem)
        for name, narrow in NARROW.items():
            yield name, layer("sliding", pass_, "float32", "nchw", "64@56", **narrow)
        for name, shifted in SHIFTED.items():
            yield name, layer("sliding", pass_, "float32", "nhwc", "64@56", shift=True, **shifted)
        for name, dilated in DILATED.items():
            yield name, layer("sliding", pass_, "float32", "nhwc", "64@56", **dilated)
        yield "64@56, groups of 4", layer("sliding", pass_, "bfloat16", "nchw", "64@56", **NARROW["64@56, groups of 4"])
        for dtype in ("float32", "bfloat16", "float64"):
            yield "64@14", layer("generic", pass_, dtype, "nhwc", "64@56", batch=16, height=14, width=14)


@dataclass(frozen=True)
class Compiled:
    """What ptxas made of a kernel."""

    registers: int
    spill_bytes: int
    static_shared: int


PROPERTIES = re.compile(
    r"Compiling entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers([^\n]*)",
    re.DOTALL,
)


def occupancy(path: str, name: str, threads: int, shared_bytes: int) -> int:
    """Blocks on a multiprocessor, as the CUDA runtime answers."""
    compiled = _properties(_assemble(path, {name}))[name]
    return blocks_per_multiprocessor(threads, compiled.registers, compiled.static_shared + shared_bytes)


def compile_kernels(kernels: Iterable[tuple[str, str]]) -> dict[str, Compiled]:
    """Registers and spills of each kernel, given by the path of its PTX and its name."""
    assert PTXAS is not None
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        logs = list(pool.map(lambda kernel: _assemble(kernel[0], {kernel[1]}), sorted(set(kernels))))
    return {name: properties for log in logs for name, properties in _properties(log).items()}


def _properties(log: str) -> dict[str, Compiled]:
    result = {}
    for match in PROPERTIES.finditer(log):
        shared = re.search(r"(\d+) bytes smem", match[5])
        result[match[1]] = Compiled(int(match[4]), int(match[2]) + int(match[3]), int(shared[1]) if shared else 0)
    return result


def _assemble(path: str, names: set[str]) -> str:
    text = entry_text(path, names)
    key = hashlib.sha256((nvcc_version() + text).encode()).hexdigest()[:16]
    log = BUILD / f"ptxas-{key}.txt"
    if not log.exists():
        source = BUILD / f"ptxas-{key}-{os.getpid()}.ptx"
        source.write_text(text)
        command = [str(PTXAS), f"-arch=sm_{ARCHITECTURE}", "-v", str(source), "-o", "/dev/null"]
        result = subprocess.run(command, capture_output=True, text=True)
        source.unlink()
        if result.returncode != 0:
            raise RuntimeError(result.stderr)
        made = log.with_suffix(f".{os.getpid()}")
        made.write_text(result.stdout + result.stderr)
        made.rename(log)
    return log.read_text()


def blocks_per_multiprocessor(threads: int, registers: int, shared_bytes: int) -> int:
    """By the limits of compute capability 9.0 (CUDA C++ Programming Guide, "Technical Specifications per Compute
    Capability"): 64 warps, 32 blocks, 65536 registers in units of 256 a warp, 228 KB of shared memory in units of 128
    bytes, of which the system takes 1 KB a block."""
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    shared = -(-(shared_bytes + 1024) // 128) * 128
    return min(32, 64 // warps, 65536 // per_warp // warps, 228 * 1024 // shared)


def short_name(mangled: str) -> tuple[str, list[tuple[str, list[int]]]]:
    """The kernel's function and the configurations among its template arguments, with their numbers."""
    function = re.match(r"_ZN\d+pyinvolution\d+cuda(\d+)", mangled)
    names, at = [], function.start(1) if function else 0
    while match := re.match(r"(\d+)", mangled[at:]):
        length, begin = int(match[1]), at + match.end()
        names.append(mangled[begin : begin + length])
        at = begin + length
    configurations = [
        (match[2][: int(match[1])], [int(n.replace("n", "-")) for n in re.findall(r"L[ib](n?\d+)E", match[3])])
        for match in re.finditer(r"(\d+)([A-Z][A-Za-z]*)I((?:L[ib]n?\d+E)+)E", mangled)
    ]
    return names[-1] if names else mangled, configurations


def tile_of(launch: Launch, problem: Problem) -> list[int] | None:
    """Rows, columns and channels of the pixels that a block works on at a time, where the template says it."""
    chunk = min(64, problem.channels)
    for name, numbers in short_name(launch.kernel.name)[1]:
        if name == "TileConfig":
            return [numbers[2], numbers[3], chunk]
        if name == "Config":
            return [numbers[2], numbers[3], problem.channels // problem.groups]
        if name == "StripeConfig":
            return [numbers[1], numbers[2], chunk]
        if name == "SpanConfig":
            return [4, 16 if numbers[0] == 1 else 8, chunk]
        if name == "WalkConfig":  # of grad_input: rows of a step, columns
            return [2 // numbers[1], numbers[2], chunk] if len(numbers) == 3 else [1, 16, chunk]
    return None


def count_launch(prepared: Prepared, launch: Launch) -> Counts:
    """One image's blocks, if these write one image's part of the output; else some at equal distances."""
    batch = prepared.problem.batch
    if launch.blocks % batch == 0:
        machine = run_launch(launch, prepared.memory, range(launch.blocks // batch), check=False, count=True)
        size = np.dtype(STORAGE[prepared.problem.dtype]).itemsize
        outputs = [int(np.prod(prepared.tensors[name].sizes)) * size for name in prepared.outputs]
        if machine.counts.traffic["global write bytes"] * batch in outputs:
            return machine.counts
    number = min(launch.blocks, 4)
    chosen = [i * (launch.blocks - 1) // max(number - 1, 1) for i in range(number)]
    return run_launch(launch, prepared.memory, chosen, check=False, count=True).counts


def rounded(value: float) -> float:
    return round(value) if value >= 100 else round(value, 1)


def measure_row(shape: str, problem: Problem) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """A row for each launch, still without what ptxas says, and the path and name of its kernel."""
    prepared = prepare(problem, None, count_writes=False, occupancy=occupancy)
    rows = []
    for launch in prepared.launches:
        counts = count_launch(prepared, launch)
        function, _ = short_name(launch.kernel.name)
        traffic = {name: rounded(value / counts.blocks) for name, value in sorted(counts.traffic.items())}
        lanes = counts.traffic["copy lanes"] / max(counts.traffic["copy instructions"], 1)
        for name in ("copy lanes", "copy instructions"):
            traffic.pop(name, None)
        instructions = {name: rounded(v / counts.blocks) for name, v in sorted(counts.instructions.items())}
        rows.append(
            {
                "strategy": problem.strategy, "pass": problem.pass_, "kernel": function, "dtype": problem.dtype,
                "layout": problem.layout, "shape": shape, "batch": problem.batch, "channels": problem.channels,
                "height": problem.height, "width": problem.width, "groups": problem.groups, "window": problem.kernel,
                "stride": problem.stride, "reduced": problem.reduced, "tile": tile_of(launch, problem),
                "blocks": launch.blocks, "threads": launch.threads,
                "static_shared": launch.kernel.static_shared_bytes, "dynamic_shared": launch.shared_bytes,
                "counted_blocks": counts.blocks, "copy_lanes": rounded(lanes),
                "instructions": {"all": rounded(sum(counts.instructions.values()) / counts.blocks), **instructions},
                "traffic": traffic,
            }
        )  # fmt: skip
    return rows, [(launch.path, launch.kernel.name) for launch in prepared.launches]


def measure(chosen: Sequence[tuple[str, Problem]]) -> list[dict[str, Any]]:
    """The rows of these classes, counted now by as many processes as there are processors."""
    recorder()  # compiles for all of them
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        measured = list(pool.map(measure_row, *zip(*chosen, strict=True)))
    rows = [row for more, _ in measured for row in more]
    kernels = [kernel for _, more in measured for kernel in more]
    compiled = compile_kernels(kernels)
    for row, (_, name) in zip(rows, kernels, strict=True):
        properties = compiled[name]
        row["registers"], row["spill_bytes"] = properties.registers, properties.spill_bytes
        row["blocks_per_sm"] = blocks_per_multiprocessor(
            row["threads"], row["registers"], row["static_shared"] + row["dynamic_shared"]
        )
    return rows


def table_path() -> Path:
    return FOLDER / f"nvcc-{nvcc_version()}.json"


def write_table(rows: Sequence[dict[str, Any]]) -> None:
    FOLDER.mkdir(exist_ok=True)
    head = {
        "about": "Per block, counted in PTX by python -m tests.ptx.budgets --rebase; README.md explains the columns.",
        "nvcc": nvcc_version(), "architecture": f"sm_{ARCHITECTURE}", "multiprocessors": MULTIPROCESSORS,
    }  # fmt: skip
    lines = [f" {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    body = []
    for row in rows:
        plain = {name: value for name, value in row.items() if not isinstance(value, dict)}
        parts = [json.dumps(plain)[1:-1]]
        parts += [f"{json.dumps(name)}: {json.dumps(row[name])}" for name in ("instructions", "traffic")]
        body.append("  {" + ",\n   ".join(parts) + "}")
    text = "{\n" + "\n".join(lines) + '\n "rows": [\n' + ",\n".join(body) + "\n ]\n}\n"
    table_path().write_text(text)


def read_table(path: Path | None = None) -> list[dict[str, Any]]:
    """The rows of a table; by default the newest one."""
    newest = max(FOLDER.glob("nvcc-*.json"), key=lambda p: [int(n) for n in re.findall(r"\d+", p.stem)])
    rows: list[dict[str, Any]] = json.loads((path or newest).read_text())["rows"]
    return rows


IDENTITY = ("strategy", "pass", "kernel", "dtype", "layout", "shape")
EXACT = ("spill_bytes", "registers", "static_shared", "dynamic_shared", "blocks_per_sm", "blocks", "threads")


def identity(row: dict[str, Any]) -> str:
    return " ".join(str(row[name]) for name in IDENTITY)


def differences(committed: dict[str, Any], measured: dict[str, Any]) -> list[str]:
    """What has changed: anything that ptxas and the launch settle, and counts by more than TOLERANCE.

    Counts below a hundred may differ by three, which is less than their class matters for a block.
    """
    found = [
        f"{name} is {measured[name]}, expected {committed[name]}" for name in EXACT if measured[name] != committed[name]
    ]
    for part in ("instructions", "traffic"):
        for name in sorted({*committed[part], *measured[part]}):
            old, new = committed[part].get(name, 0), measured[part].get(name, 0)
            if abs(new - old) > max(TOLERANCE * old, 3):
                found.append(f"{part}: {name} is {new}, expected {old} +- {TOLERANCE:.0%}")
    return found


# --- figures in documents


def per_strip(row: dict[str, Any]) -> float:
    """Warp instructions for 8 neighbouring pixels of Y of a group."""
    pixels = row["batch"] * (row["height"] // row["stride"]) * (row["width"] // row["stride"]) * row["groups"]
    return row["instructions"]["all"] * row["blocks"] / (pixels / 8)


def figures_table(rows: Iterable[dict[str, Any]]) -> str:
    head = ("kernel", "shape", "tile", "registers", "shared memory", "blocks on an SM", "warp instructions",
            "for 8 pixels of a group", "HMMA", "cycles of shared memory", "KB read, written")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        traffic = row["traffic"]
        cycles = sum(value for name, value in traffic.items() if name.endswith("wavefronts"))
        tile = " x ".join(str(n) for n in row["tile"]) if row["tile"] else ""
        kilobytes = f"{traffic.get('global read bytes', 0) / 1024:.0f}, {traffic['global write bytes'] / 1024:.1f}"
        shared = (row["static_shared"] + row["dynamic_shared"]) / 1024
        kernel = row["pass"] if row["kernel"] in ("apply", "forward") else row["kernel"]
        cells = (
            f"`{row['strategy']}` {kernel}", row["shape"], tile, row["registers"], f"{shared:.0f} KB",
            row["blocks_per_sm"], f"{row['instructions']['all']:,}", f"{per_strip(row):.0f}",
            f"{row['instructions'].get('mma', 0):,}", f"{cycles:,.0f}", kilobytes,
        )  # fmt: skip
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def chosen(rows: Iterable[dict[str, Any]], strategies: Sequence[str], shapes: Sequence[str]) -> list[dict[str, Any]]:
    """Rows with channels inside, of the dtype that the strategy is for, strategy by strategy."""
    dtypes = {"mma": "bfloat16", "fused": "bfloat16", "tiled": "float32"}
    found = [
        row for row in rows
        if row["strategy"] in strategies and row["shape"] in shapes and row["layout"] == "nhwc" and row["batch"] == 256
        and row["dtype"] == dtypes.get(row["strategy"], row["dtype"]) and row["kernel"] != "sum_partials"
    ]  # fmt: skip
    return sorted(found, key=lambda row: strategies.index(row["strategy"]))


def passes(rows: Iterable[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["pass"] in names]


FUSED_SHAPES = ("64@56", "128@28", "256@14", "128@56 s2")
FIGURES = {
    "involution": lambda rows: figures_table(chosen(rows, ("tiled", "mma"), ("64@56", "128@56 s2"))),
    "fused": lambda rows: figures_table(chosen(passes(rows, "forward", "backward"), ("fused",), FUSED_SHAPES)),
    "layer": lambda rows: figures_table(chosen(passes(rows, "layer"), ("fused",), FUSED_SHAPES)),
}
DOCUMENTS = ("cuda/README.md",)
MARKED = re.compile(r"(<!-- budgets: (\w+) -->\n)(.*?)(<!-- end of budgets -->)", re.DOTALL)


def with_figures(text: str, rows: Sequence[dict[str, Any]]) -> str:
    """A document with what stands between its markers made from the table."""
    return MARKED.sub(lambda match: match[1] + FIGURES[match[2]](rows) + "\n" + match[4], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rebase", action="store_true", help="count again, and write the table and the documents")
    options = parser.parse_args()
    if options.rebase:
        rows = measure(list(classes()))
        write_table(rows)
        print(f"{table_path().relative_to(ROOT)}: {len(rows)} rows", file=sys.stderr)
        for name in DOCUMENTS:
            document = ROOT / name
            document.write_text(with_figures(document.read_text(), read_table()))
        return
    committed = {identity(row): row for row in read_table(table_path())}
    for row in measure(list(classes())):
        known = committed.get(identity(row))
        for line in ["not in the table"] if known is None else differences(known, row):
            print(f"{identity(row)}: {line}")


if __name__ == "__main__":
    main()
