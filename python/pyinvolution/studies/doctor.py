"""What is installed, whether every kernel variant is right on this machine, and how long it takes.

This is the command ``pyinvolution doctor``. Each variant computes small problems of each class (dtype, layout, window,
stride, dilation, group width), on one thread, and the layers that are then timed, on all; the results are compared with
the equation in float64 under the one accuracy policy (``pyinvolution.accuracy``). It needs nothing beyond torch.
"""

import itertools
import json
import os
import platform
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d

from pyinvolution import build_info, explain, explain_layer, explain_span, force_variant, ops, reference
from pyinvolution.accuracy import assert_accurate
from pyinvolution.explain import PASSES, SPAN_PASSES, disabled_variants, driver_version, processor_name, variants
from pyinvolution.ops import Pair, output_size
from pyinvolution.studies.timing import Clock, DeviceClock, Function, host_clock, interleaved

__all__ = ["Check", "Report", "Timing", "examine"]

DTYPES = ("float32", "float64", "float16", "bfloat16")
LAYOUTS = ("contiguous", "channels_last", "strided")


# --- problems ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """An operator's sizes: ``width`` channels in each of two groups, and ``reduced`` of which a span makes kernels."""

    operator: str
    dtype: str
    layout: str
    kernel: int
    stride: int
    dilation: int
    width: int
    reduced: int = 0
    size: Pair = (9, 18)
    batch: int = 2
    groups: int = 2
    border: str = "zeros"
    upsample: int = 1

    def __str__(self) -> str:
        parts = [self.dtype, self.layout, f"{self.kernel}x{self.kernel}"]
        parts += [f"stride {self.stride}"] if self.stride > 1 else []
        parts += [f"dilation {self.dilation}"] if self.dilation > 1 else []
        parts += [f"border {self.border}"] if self.border != "zeros" else []
        parts += [f"upsample {self.upsample}"] if self.upsample > 1 else []
        parts += [f"{self.groups} x {self.width} channels"]
        parts += [f"{self.reduced} reduced"] if self.reduced else []
        return ", ".join(parts)

    @property
    def channels(self) -> int:
        return self.groups * self.width

    @property
    def geometry(self) -> tuple[Pair, Pair, Pair]:
        """stride, padding, dilation; the padding keeps ceil(size / stride) pixels, as a border that shifts does."""
        padding = self.dilation * (self.kernel - 1) // 2 if self.border == "zeros" else 0
        return (self.stride,) * 2, (padding,) * 2, (self.dilation,) * 2

    @property
    def trailing(self) -> tuple[int, Pair]:
        """border, upsample: the last arguments of involution2d."""
        return ops.BORDERS.index(self.border), (self.upsample,) * 2

    @property
    def window(self) -> tuple[Pair, Pair, Pair, Pair]:
        return (self.kernel,) * 2, *self.geometry

    def tensors(self, device: str) -> dict[str, Tensor]:
        """Random operands, the same for every variant."""
        stride, padding, dilation = (pair[0] for pair in self.geometry)
        window = (self.kernel, stride, padding, dilation, self.trailing[0], self.upsample)
        pixels = [int(output_size(size, *window)) for size in self.size]
        n, g, k, c, r = self.batch, self.groups, self.kernel, self.channels, self.reduced
        shapes: dict[str, tuple[int, ...]] = {"x": (n, c, *self.size)}
        if self.operator == "involution2d":
            shapes["w"] = (n, g, k, k, *pixels)
        else:
            if self.operator == "span_involution2d":
                shapes["r"] = (n, r, *pixels)
            else:
                shapes |= {"a": (r, c), "ab": (r,)}
            shapes |= {"s": (g * k * k, r), "b": (g * k * k,), "scale": (c,), "shift": (c,)}
        shapes["gy"] = (n, c, *pixels)
        generator = torch.Generator().manual_seed(0)
        made = {}
        for name, shape in shapes.items():
            tensor = torch.randn(shape, dtype=torch.float64, generator=generator)
            if len(shape) == 2:
                tensor /= shape[1] ** 0.5
            if self.dtype == "float64":
                # Products and sums are then exact: no oracle is better than float64.
                tensor = (tensor * 4096).round() / 4096
            wide = torch.promote_types(getattr(torch, self.dtype), torch.float32)
            tensor = tensor.to(device, wide if name in ("scale", "shift") else getattr(torch, self.dtype))
            made[name] = in_layout(tensor, self.layout) if tensor.dim() > 2 else tensor
        return made


def in_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same values with the strides of a layout; in channels_last the taps of a kernel are inside, too."""
    if layout == "channels_last":
        inner = range(1, tensor.dim() - 2)
        order = (0, tensor.dim() - 2, tensor.dim() - 1, *inner)
        return tensor.permute(order).contiguous().permute([order.index(d) for d in range(tensor.dim())])
    if layout == "strided":
        spaced = tensor.new_full([2 * size + 1 for size in tensor.shape], float("nan"))
        return spaced[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor)
    return tensor.contiguous()


def problems(quick: bool) -> Iterator[Problem]:
    """Small ones of each class."""
    # kernel, stride, dilation
    windows = [(3, 1, 1), (7, 1, 1), (7, 2, 1), (3, 1, 2)] + ([] if quick else [(5, 1, 1), (5, 2, 1), (3, 2, 1)])
    layouts = LAYOUTS[:2] if quick else LAYOUTS
    for dtype, layout, (k, s, d) in itertools.product(DTYPES, layouts, windows):
        if layout == "strided" and (k, s, d) not in windows[:3]:
            continue
        for width in (3, 16) if quick else (3, 8, 16, 24, 32):
            yield Problem("involution2d", dtype, layout, k, s, d, width)
    for dtype, layout, width in itertools.product(DTYPES, layouts[:2], (3, 16)):
        for k, s, d in ((7, 1, 1), (3, 1, 2), (3, 2, 1)):
            yield Problem("involution2d", dtype, layout, k, s, d, width, border="shift")
        yield Problem("involution2d", dtype, layout, 5, 1, 1, width, upsample=2)
    spans = [(width, r) for width in ((3, 16) if quick else (3, 8, 16)) for r in ((16,) if quick else (5, 16, 32))]
    for dtype, layout, (k, s, d), (width, r) in itertools.product(DTYPES, layouts, windows[:3], spans):
        yield Problem("span_involution2d", dtype, layout, k, s, d, width, r)
    for dtype, layout, (k, s, d), (width, r) in itertools.product(DTYPES, layouts[:2], windows[:3], spans):
        if r == 16:
            yield Problem("involution_layer2d", dtype, layout, k, s, d, width, r)


# --- what every operator computes, and the equation -------------------------------------------------------------------

Results = dict[str, Tensor]
RESULTS: dict[str, dict[str, tuple[str, ...]]] = {
    "involution2d": {"forward": ("output",), "grad_input": ("grad_input",), "grad_weight": ("grad_weight",)},
    "span_involution2d": {
        "forward": ("output",), "backward": ("grad_input", "grad_reduced", "grad_span_weight", "grad_span_bias")
    },
    "involution_layer2d": {"forward": ("output",)},
}  # fmt: skip
"""The passes of each operator, and what they compute."""


def computed(problem: Problem, pass_: str, t: dict[str, Tensor]) -> Results:
    """What a pass of the operator gives."""
    if problem.operator == "involution2d":
        if pass_ == "forward":
            found: Sequence[Tensor] = [ops.involution2d(t["x"], t["w"], *problem.geometry, *problem.trailing)]
        else:
            mask = (pass_ == "grad_input", pass_ == "grad_weight")
            both = ops.backward(t["gy"], t["x"], t["w"], (*problem.geometry, *problem.trailing), mask)
            found = [both[mask.index(True)]]
    elif problem.operator == "span_involution2d":
        if pass_ == "forward":
            epilogue = (t["scale"], t["shift"], True)
            found = [ops.span_involution2d(t["x"], t["r"], t["s"], t["b"], *epilogue, *problem.window)]
        else:
            operands = (t["gy"], t["x"], t["r"], t["s"], t["b"])
            found = ops.span_involution2d_backward(*operands, *problem.window, (True,) * 4)
    else:
        parameters = (t["a"], t["ab"], t["s"], t["b"], t["scale"], t["shift"], True)
        found = [ops.involution_layer2d(t["x"], *parameters, *problem.window)]
    return dict(zip(RESULTS[problem.operator][pass_], found, strict=True))


def expected(problem: Problem, t: dict[str, Tensor], work: torch.dtype | None) -> Results:
    """All results by the equation on the CPU: in the dtype ``work``, or in the operands' own with float32 sums."""
    dtype = t["x"].dtype
    inner = work or torch.promote_types(dtype, torch.float32)

    def stored(tensor: Tensor) -> Tensor:
        """What is left of an intermediate result that lies in memory."""
        return tensor if work is not None else tensor.to(dtype).to(inner)

    values = {name: tensor.detach().cpu().to(inner) for name, tensor in t.items()}
    scale, shift = (values.pop(name, None) for name in ("scale", "shift"))
    grad_output = values.pop("gy")
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}

    def output(x: Tensor, w: Tensor) -> Tensor:
        border, upsample = problem.border, problem.upsample
        return reference.involution2d(x, w, None, *problem.geometry, border=border, upsample=upsample)

    def spanned(r: Tensor) -> Tensor:
        kernels = conv2d(r, leaves["s"][..., None, None], leaves["b"])
        return output(leaves["x"], stored(kernels).unflatten(1, (problem.groups, problem.kernel, problem.kernel)))

    if problem.operator == "involution2d":
        y = output(leaves["x"], leaves["w"])
    elif problem.operator == "span_involution2d":
        y = spanned(leaves["r"])
    else:
        cells = avg_pool2d(leaves["x"], problem.stride, ceil_mode=True)
        y = spanned(stored(conv2d(stored(cells), leaves["a"][..., None, None], leaves["ab"]).relu()))
    found: list[Tensor] = [y.detach()]
    if scale is not None and shift is not None:
        found = [(y.detach() * scale[:, None, None] + shift[:, None, None]).relu()]
    names = [name for passes in RESULTS[problem.operator].values() for name in passes]
    if len(names) > 1:
        found += torch.autograd.grad(y, list(leaves.values()), grad_output)
    return {name: value.to(work or dtype) for name, value in zip(names, found, strict=True)}


def refusal(problem: Problem, pass_: str, variant: str, t: dict[str, Tensor]) -> str | None:
    """Why the dispatch table would not let ``variant`` run this pass, or None."""
    if problem.operator == "involution2d":
        border, upsample = problem.border, problem.upsample
        explanation = explain(t["x"], t["w"], *problem.geometry, border=border, upsample=upsample, pass_=pass_)
    elif problem.operator == "span_involution2d":
        explanation = explain_span(t["x"], t["r"], t["s"], t["b"], *problem.window, pass_=pass_)
    else:
        explanation = explain_layer(t["x"], t["a"], t["s"], *problem.window)
    return next(v.refusal for v in explanation.verdicts if v.variant == variant.partition("/")[2])


@contextmanager
def one_thread() -> Iterator[None]:
    """Small problems gain nothing by more, and OpenMP's threads wait for each other by spinning."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaN, so that an element which a kernel forgets is seen."""
    before, only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only)
        deterministic.fill_uninitialized_memory = fill


# --- checks -----------------------------------------------------------------------------------------------------------


@dataclass
class Check:
    """What became of a variant in the problems of an operator's pass."""

    variant: str
    operator: str
    pass_: str
    right: int = 0
    wrong: list[str] = field(default_factory=list)
    """For each problem with a wrong result, or none: which one, and in what."""


def table_of(operator: str) -> str:
    """The dispatch table of an operator."""
    return "involution2d" if operator == "involution2d" else "span_involution2d"


class Examination:
    """The checks of a device's variants, which go on until the device fails."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.checks: dict[tuple[str, str, str], Check] = {}
        self.lost: str | None = None

    def of(self, operator: str) -> list[str]:
        return [name for name in variants(table_of(operator)) if name.startswith(self.device + "/")]

    def wrong(self, variant: str) -> bool:
        return any(check.wrong for check in self.checks.values() if check.variant == variant)

    def simplest(self) -> str:
        """An involution that is right, for what is composed of one."""
        usable = [v for v in self.of("involution2d") if v not in disabled_variants() and not self.wrong(v)]
        return usable[-1] if usable else self.of("involution2d")[-1]

    def examine(self, problem: Problem) -> None:
        tensors = problem.tensors(self.device)
        exact = same = None
        for variant, pass_ in itertools.product(self.of(problem.operator), RESULTS[problem.operator]):
            key = (variant, problem.operator, pass_)
            check = self.checks.setdefault(key, Check(*key))
            if self.lost or refusal(problem, pass_, variant, tensors) is not None:
                continue
            if exact is None or same is None:
                exact, same = expected(problem, tensors, torch.float64), expected(problem, tensors, None)
            # What a variant is composed of must not decide about it.
            inner = "" if problem.operator == "involution2d" else f",{self.simplest()}"
            try:
                with force_variant(variant + inner), poisoned():
                    results = computed(problem, pass_, tensors)
                for name, result in results.items():
                    assert_accurate(result.cpu(), exact[name], same[name], name)
            except Exception as error:
                # Of comparisons with NaN the first line says enough.
                text = next(iter(str(error).splitlines()), "no message")
                check.wrong.append(f"{problem}: {text if isinstance(error, AssertionError) else repr(error)[:300]}")
                self.probe(check.wrong[-1])
            else:
                check.right += 1

    def probe(self, problem: str) -> None:
        """After an error of CUDA, nothing may run any more in this process."""
        if self.device == "cuda":
            try:
                torch.cuda.synchronize()
                torch.zeros(1, device="cuda").cpu()
            except RuntimeError:
                self.lost = problem


# --- times ------------------------------------------------------------------------------------------------------------


@dataclass
class Timing:
    """Median milliseconds of a call, by what is called."""

    what: str
    milliseconds: dict[str, float]


def layers(quick: bool, device: str) -> Iterator[tuple[str, Problem]]:
    """Layers of RedNet-50."""
    dtype, batch = ("float32", 1) if device == "cpu" else ("bfloat16", 32)
    shapes = ((64, 56), (256, 14)) if quick or device == "cpu" else ((64, 56), (128, 28), (256, 14), (512, 7))
    for channels, size in shapes[:1] if quick else shapes:
        for operator, reduced in (("involution2d", 0), ("span_involution2d", channels // 4)):
            groups = channels // 16
            problem = Problem(operator, dtype, "channels_last", 7, 1, 1, 16, reduced, (size, size), batch, groups)
            yield f"{operator} {channels}@{size} N={batch} {dtype}", problem


def measure(
    name: str, problem: Problem, device: str, clock: Clock, examined: Examination, seconds: float
) -> Iterator[Timing]:
    """Times of the variants that are right beside unfold and torch's 3x3 convolution, forward and backward."""
    t = problem.tensors(device)
    x, gy, channels = t["x"], t["gy"], problem.channels
    filters = torch.randn(channels, channels, 3, 3, dtype=x.dtype, device=device).to(memory_format=torch.channels_last)
    rest = (None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (True, True, False))
    leaves = [t[key].detach().requires_grad_() for key in t if key in ("x", "w", "r", "s", "b")]

    def unfold(x: Tensor, *others: Tensor) -> Tensor:
        if problem.operator == "involution2d":
            (w,) = others
        else:
            r, s, b = others
            w = ops.span(r, s, b, (problem.kernel, problem.kernel))
        return reference.involution2d(x, w, None, *problem.geometry)

    kept = unfold(*leaves)
    plain = [leaf.detach() for leaf in leaves]
    convolution = "cuDNN 3x3" if device == "cuda" else "oneDNN 3x3"
    others: dict[str, dict[str, Function]] = {
        "forward": {"unfold": lambda: unfold(*plain), convolution: lambda: conv2d(x, filters, None, 1, 1)},
        "backward": {
            "unfold": lambda: torch.autograd.grad(kept, leaves, gy, retain_graph=True),
            convolution: lambda: torch.ops.aten.convolution_backward(gy, x, filters, *rest),
        },
    }

    def call(variant: str, passes: Sequence[str]) -> Function:
        def run() -> None:
            with force_variant(variant):
                for pass_ in passes:
                    computed(problem, pass_, t)

        return run

    names = PASSES if problem.operator == "involution2d" else SPAN_PASSES
    for what, passes in (("forward", names[:1]), ("backward", names[1:])):
        functions: dict[str, Function] = {
            variant: call(variant, passes)
            for variant in variants(problem.operator)
            if variant.startswith(device + "/")
            and not examined.wrong(variant)
            and all(refusal(problem, pass_, variant, t) is None for pass_ in passes)
        } | others[what]
        times = interleaved(functions, seconds, 3, clock)
        yield Timing(f"{name}, {what}", {each: statistics.median(taken) * 1e3 for each, taken in times.items()})


# --- the machine ------------------------------------------------------------------------------------------------------


def code_for(capability: Pair, build: str) -> str | None:
    """What of the library's CUDA code a GPU runs, or None: real code of its generation, else PTX for an older one."""
    listed = {
        kind: [int(name.rstrip("af")) for name in names.split()]
        for kind, names in re.findall(r"(architectures|PTX)((?: \d+[af]?)+)", build)
    }
    wanted = capability[0] * 10 + capability[1]
    real = [a for a in listed.get("architectures", []) if a // 10 == capability[0] and a <= wanted]
    if real:
        return f"the code for compute capability {max(real) / 10}"
    older = [a for a in listed.get("PTX", []) if a <= wanted]
    return (
        f"the PTX for compute capability {max(older) / 10}, which the driver compiles at the first call"
        if older
        else None
    )


def environment() -> dict[str, str]:
    """The variables that change what runs."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("PYINVOLUTION_")}


def machine() -> dict[str, Any]:
    info: dict[str, Any] = {**build_info(), "processor": f"{processor_name()}, {torch.get_num_threads()} threads"}
    info |= {"system": platform.platform(), "torch_cuda": torch.version.cuda or "none", "driver": driver_version()}
    info["gpus"] = []
    if torch.cuda.is_available():
        info["cudnn"] = str(torch.backends.cudnn.version())
        for index in range(torch.cuda.device_count()):
            capability = torch.cuda.get_device_capability(index)
            name, runs = torch.cuda.get_device_name(index), code_for(capability, info["cuda"])
            info["gpus"].append({"name": name, "capability": "{}.{}".format(*capability), "runs": runs})
    info["environment"] = environment()
    info["disabled"] = disabled_variants()
    return info


# --- the report -------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """All that was found. ``str()`` is what the command prints."""

    machine: dict[str, Any]
    checks: list[Check] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def wrong(self) -> list[str]:
        """The variants with a wrong result, or none."""
        return list(dict.fromkeys(check.variant for check in self.checks if check.wrong))

    @property
    def remedy(self) -> str | None:
        """The line that disables the wrong variants and those that were disabled before, or None."""
        names = dict.fromkeys([*self.machine["disabled"], *self.wrong])
        return f"export PYINVOLUTION_DISABLE={','.join(names)}" if self.wrong else None

    def save(self, path: Path) -> None:
        found = {"wrong": self.wrong, "remedy": self.remedy, **asdict(self)}
        path.write_text(json.dumps(found, indent=1) + "\n")

    def __str__(self) -> str:
        parts = ["\n".join(self.of_machine()), table(CHECK_COLUMNS, self.check_rows())]
        parts += [table(*self.timing_rows(device)) for device in ("cpu", "cuda") if self.timings_on(device)]
        parts += ["\n".join(f"note: {note}" for note in self.notes)] if self.notes else []
        return "\n\n".join([*parts, self.verdict()])

    def of_machine(self) -> Iterator[str]:
        m = self.machine
        yield f"pyinvolution {m['version']} (built by {m['compiler']} with PyTorch {m['torch_built']})"
        yield f"PyTorch      {m['torch_running']}, CUDA {m['torch_cuda']}, Python {m['python']}, {m['system']}"
        yield f"CPU          {m['processor']}; kernels for {m['isa']}"
        yield f"CUDA kernels {m['cuda']}"
        yield f"driver       {m['driver']}"
        for gpu in m["gpus"]:
            runs = f"runs {gpu['runs']}" if gpu["runs"] else "runs none of this build's code"
            yield f"GPU          {gpu['name']}, compute capability {gpu['capability']}: {runs}"
        for name, value in m["environment"].items():
            yield f"{name}={value}"

    def check_rows(self) -> Iterator[list[str]]:
        for check in self.checks:
            if check.wrong:
                verdict = f"WRONG in {len(check.wrong)} of {check.right + len(check.wrong)}"
            elif check.right:
                verdict = f"right in {check.right}"
            elif check.variant in self.machine["disabled"]:
                verdict = "disabled"
            else:
                continue
            yield [check.variant, check.operator, check.pass_, verdict]

    def timings_on(self, device: str) -> list[Timing]:
        return [timing for timing in self.timings if any(name.startswith(device + "/") for name in timing.milliseconds)]

    def timing_rows(self, device: str) -> tuple[list[str], list[list[str]]]:
        timings = self.timings_on(device)
        columns = list(dict.fromkeys(name for timing in timings for name in timing.milliseconds))
        columns.sort(key=lambda name: not name.startswith(device + "/"))
        return [f"milliseconds on {device}", *(name.removeprefix(device + "/") for name in columns)], [
            [
                timing.what,
                *(f"{timing.milliseconds[name]:.3f}" if name in timing.milliseconds else "" for name in columns),
            ]
            for timing in timings
        ]

    def verdict(self) -> str:
        total = sum(check.right + len(check.wrong) for check in self.checks)
        if self.remedy is None:
            return f"All {total} checks are right ({self.seconds:.0f} s)."
        lines = []
        for variant in self.wrong:
            first = next(check for check in self.checks if check.variant == variant and check.wrong)
            lines.append(f"{variant} is WRONG, first in {first.operator} {first.pass_}: {first.wrong[0]}")
        only = (
            "Nothing of this library runs it then" if len(self.wrong) == 1 else "Nothing of this library runs them then"
        )
        lines.append(f"{only}, and the next best variant takes its place:\n\n    {self.remedy}\n")
        lines.append("Please report this with the file that --json FILE writes.")
        return "\n".join(lines)


CHECK_COLUMNS = ["variant", "operator", "pass", "problems"]


def table(columns: Sequence[str], rows: Iterator[list[str]] | list[list[str]]) -> str:
    """Columns as wide as their longest entry."""
    lines = [list(columns), *rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def examine(
    devices: Sequence[str] | None = None, quick: bool = False, progress: Callable[[str], None] | None = None
) -> Report:
    """Checks and times every kernel variant.

    Args:
        devices: "cpu", "cuda"; by default those that there are.
        quick: fewer problems, and one layer to time.
        progress: is called with what begins.
    """
    start = time.perf_counter()
    report = Report(machine())
    say = progress or (lambda text: None)
    has_kernels = not report.machine["cuda"].startswith("none")
    if report.machine["gpus"] and not has_kernels:
        report.notes.append("there is a GPU, but this build of the library has no CUDA kernels for it")
    for gpu in report.machine["gpus"]:
        if has_kernels and gpu["runs"] is None:
            report.notes.append(
                f"{gpu['name']} has compute capability {gpu['capability']}, for which this build has no code; build it "
                f"with PYINVOLUTION_CUDA_ARCHITECTURES={gpu['capability'].replace('.', '')} (8.0 is the oldest)"
            )
    if devices is None:
        devices = ["cpu", *(["cuda"] if report.machine["gpus"] and has_kernels else [])]
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # the accuracy policy is about float32
    try:
        for device in devices:
            examination = Examination(device)
            for operator, group in itertools.groupby(problems(quick), lambda problem: problem.operator):
                say(f"checking {operator} on {device}: {', '.join(examination.of(operator))}")
                with one_thread():
                    for problem in group:
                        examination.examine(problem)
            for name, problem in layers(quick, device):
                say(f"checking and timing {name}")
                examination.examine(replace(problem, batch=min(problem.batch, 2)))
                if not examination.lost:
                    clock: Clock = DeviceClock() if device == "cuda" else host_clock
                    report.timings += measure(name, problem, device, clock, examination, 0.1 if quick else 0.5)
            report.checks += examination.checks.values()
            if examination.lost:
                report.notes.append(f"the GPU takes no calls after {examination.lost}; what follows was not checked")
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    report.seconds = time.perf_counter() - start
    return report


def run(devices: Sequence[str] | None, quick: bool, json_file: Path | None) -> int:
    """The command: prints the report, and returns 1 where a variant is wrong."""
    report = examine(devices, quick, lambda text: print(f"{text} ...", file=sys.stderr, flush=True))
    print(report)
    if json_file is not None:
        report.save(json_file)
        print(f"written to {json_file}")
    return 1 if report.wrong else 0
