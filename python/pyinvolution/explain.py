"""What the library would run, why, and how it was built."""

import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.modules.utils import _pair

from pyinvolution import ops
from pyinvolution._library import _C
from pyinvolution.ops import Pair, border_index

PASSES = ("forward", "grad_input", "grad_weight")
SPAN_PASSES = ("forward", "backward")


@dataclass(frozen=True)
class Verdict:
    """What a kernel variant says of a problem: ``refusal`` is what it requires, or None where it can run it.

    ``measured``: it is chosen because `autotune` has measured it to be the fastest.
    """

    variant: str
    refusal: str | None
    chosen: bool
    measured: bool = False

    def __str__(self) -> str:
        if self.refusal is not None:
            return self.refusal
        if self.measured:
            return "runs, the fastest when autotune measured it"
        return "runs" if self.chosen else "could run"


@dataclass(frozen=True)
class Explanation:
    """The verdicts of the dispatch table on one problem, best variant first. ``str()`` gives a line for each.

    ``isa`` is the instruction set that CPU kernels use, or None on a GPU. With "avx512_bf16" the variants "channels"
    and "fused" multiply pairs of bfloat16 in their forward passes; the rest is computed as with "avx512".
    """

    problem: str
    verdicts: tuple[Verdict, ...]
    isa: str | None = None

    @property
    def chosen(self) -> str | None:
        """The variant that runs, or None where none can."""
        return next((v.variant for v in self.verdicts if v.chosen), None)

    def __str__(self) -> str:
        lines = [self.problem if self.isa is None else f"{self.problem}, instruction set {self.isa}"]
        for verdict in self.verdicts:
            mark = "->" if verdict.chosen else "  "
            lines.append(f" {mark} {verdict.variant}: {verdict}")
        return "\n".join(lines)


def explain(
    input: Tensor,
    weight: Tensor,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    *,
    border: str = "zeros",
    upsample: int | Pair = 1,
    pass_: str = "forward",
) -> Explanation:
    """Says which kernel ``functional.involution2d`` would run for these (batched) arguments, and why not the others.

    With an upsampling a kernel that has none runs once for each of the ``upsample`` x ``upsample`` phases.

    Args:
        pass_: "forward", "grad_input" or "grad_weight".

    Raises:
        TypeError, ValueError: as ``functional.involution2d`` does.
    """
    window = (_pair(stride), _pair(padding), _pair(dilation))
    rest = (border_index("explain", border), _pair(upsample))
    _check_pass("explain", pass_, PASSES)
    ops.check(input, weight, *window, *rest)
    _check_device("explain", input)
    problem = f"involution2d {pass_}, {_text(input)}, weight {tuple(weight.shape)}, {_window_text(*window, *rest)}"
    verdicts = torch.ops.pyinvolution.explain_involution2d(input, weight, *window, pass_, *rest)
    return _explanation(problem, verdicts, input)


def explain_correlation(
    query: Tensor,
    key: Tensor,
    kernel_size: int | Pair,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    *,
    border: str = "zeros",
    upsample: int | Pair = 1,
) -> Explanation:
    """The same for ``functional.local_correlation2d``, which the kernels of `explain`'s pass "grad_weight" compute."""
    window = (_pair(stride), _pair(padding), _pair(dilation))
    rest = (border_index("explain_correlation", border), _pair(upsample))
    arguments = (query, key, _pair(kernel_size), *window, groups, *rest)
    ops.check_correlation(*arguments)
    _check_device("explain_correlation", key)
    problem = (
        f"local_correlation2d, {_text(key, 'key')}, {groups} groups, kernel_size {_pair(kernel_size)}, "
        f"{_window_text(*window, *rest)}"
    )
    return _explanation(problem, torch.ops.pyinvolution.explain_local_correlation2d(*arguments), key)


def explain_span(
    input: Tensor,
    reduced: Tensor,
    span_weight: Tensor,
    span_bias: Tensor | None = None,
    kernel_size: int | Pair = 7,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    *,
    pass_: str = "forward",
) -> Explanation:
    """The same for ``functional.span_involution2d``.

    Args:
        pass_: "forward" or "backward".
    """
    window = (_pair(kernel_size), _pair(stride), _pair(padding), _pair(dilation))
    _check_pass("explain_span", pass_, SPAN_PASSES)
    ops.check_span(input, reduced, span_weight, span_bias, *window)
    _check_device("explain_span", input)
    problem = (
        f"span_involution2d {pass_}, {_text(input)}, reduced {tuple(reduced.shape)}, "
        f"{_groups(span_weight, window[0])} groups, kernel_size {window[0]}, stride {window[1]}, padding {window[2]}, "
        f"dilation {window[3]}"
    )
    verdicts = torch.ops.pyinvolution.explain_span_involution2d(input, reduced, span_weight, *window, pass_)
    return _explanation(problem, verdicts, input)


def explain_layer(
    input: Tensor,
    reduce_weight: Tensor,
    span_weight: Tensor,
    kernel_size: int | Pair = 7,
    stride: int | Pair = 1,
    padding: int | Pair = 3,
    dilation: int | Pair = 1,
) -> Explanation:
    """The same for ``torch.ops.pyinvolution.involution_layer2d``, which optimized models run.

    Args:
        reduce_weight: (R, C) or (R, C, 1, 1), the reduction's weight.
        span_weight: (G * Kh * Kw, R) or (G * Kh * Kw, R, 1, 1).
    """
    window = (_pair(kernel_size), _pair(stride), _pair(padding), _pair(dilation))
    ops.check_layer(input, reduce_weight, None, span_weight, None, *window)
    _check_device("explain_layer", input)
    problem = (
        f"involution_layer2d, {_text(input)}, {reduce_weight.shape[0]} reduced channels, "
        f"{_groups(span_weight, window[0])} groups, kernel_size {window[0]}, stride {window[1]}, padding {window[2]}, "
        f"dilation {window[3]}"
    )
    verdicts = torch.ops.pyinvolution.explain_involution_layer2d(input, reduce_weight, span_weight, *window)
    return _explanation(problem, verdicts, input)


def _explanation(problem: str, verdicts: str, input: Tensor) -> Explanation:
    rows = (line.split("\t") for line in verdicts.splitlines())
    return Explanation(
        problem,
        tuple(Verdict(name, refusal or None, bool(how), how == "measured") for name, how, refusal in rows),
        _C.current_isa() if input.device.type == "cpu" else None,
    )


def _check_pass(function: str, pass_: str, expected: tuple[str, ...]) -> None:
    if pass_ not in expected:
        raise ValueError(f"{function}: pass_ is {pass_!r}, expected one of {', '.join(expected)}")


def _check_device(function: str, input: Tensor) -> None:
    if input.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{function}: input is on {input.device}, expected a CPU or CUDA device")


def _text(input: Tensor, name: str = "input") -> str:
    return f"{input.dtype} on {input.device.type}: {name} {tuple(input.shape)}"


def _window_text(stride: Pair, padding: Pair, dilation: Pair, border: int, upsample: Pair) -> str:
    text = f"stride {stride}, padding {padding}, dilation {dilation}"
    return text if (border, upsample) == (0, (1, 1)) else f"{text}, border {ops.BORDERS[border]}, upsample {upsample}"


def _groups(span_weight: Tensor, kernel_size: Pair) -> int:
    return span_weight.shape[0] // (kernel_size[0] * kernel_size[1])


def variants(operator: str = "involution2d") -> list[str]:
    """Every kernel variant of an operator as "device/name", best first for each device."""
    return _C.variants(operator)


@contextmanager
def force_variant(name: str) -> Iterator[None]:
    """Within the context, every involution on the variant's device runs it, or raises an error with its refusal.

    For tests and benchmarks; the environment variable PYINVOLUTION_VARIANT does the same for a process.

    Args:
        name: from ``variants()``, with or without the device.

    Raises:
        ValueError: no device has such a variant.
    """
    before = _C.forced_variant()
    _C.force_variant(name)
    try:
        yield
    finally:
        _C.force_variant(before)


@contextmanager
def disable_variants(names: str) -> Iterator[None]:
    """Within the context, no involution runs these variants: each refuses every problem, and the next best runs.

    For a variant that is wrong or slow somewhere; the environment variable PYINVOLUTION_DISABLE does the same for a
    process. Those that are disabled already stay so.

    Args:
        names: from ``variants()``, with or without the device, separated by commas.

    Raises:
        ValueError: no device has such a variant.
    """
    before = _C.disabled_variants()
    _C.disable_variants(",".join(filter(None, (before, names))))
    try:
        yield
    finally:
        _C.disable_variants(before)


def disabled_variants() -> list[str]:
    """The variants that PYINVOLUTION_DISABLE or `disable_variants` disables, as "device/name"."""
    return [name for name in _C.disabled_variants().split(",") if name]


@contextmanager
def override_isa(name: str) -> Iterator[None]:
    """Within the context, CPU kernels use the instruction set ``name``: "baseline", "avx2", "avx512" or "avx512_bf16".

    The environment variable PYINVOLUTION_ISA does the same for a process.

    Raises:
        ValueError: unknown, not built, or not available on this processor.
    """
    before = _C.current_isa()
    _C.override_isa(name)
    try:
        yield
    finally:
        _C.override_isa(before)


def available_isas() -> list[str]:
    """The CPU instruction sets that were built and run here, in ascending order."""
    return _C.available_isas()


def build_info() -> dict[str, str]:
    """How the library was built and where it runs: version, compiler, CUDA, instruction set, both torch versions."""
    from pyinvolution import __version__

    return {
        "version": __version__,
        "compiler": _C.compiler,
        "cuda": _C.cuda_build(),
        "isa": f"{_C.current_isa()} (of {', '.join(_C.available_isas())} on {platform.machine()})",
        "torch_built": _C.torch_built,
        "torch_running": torch.__version__,
        "python": platform.python_version(),
    }


@cache
def processor_name() -> str:
    """Model of the CPU; on Linux with its numbers, since virtual machines often name only the brand ("AMD EPYC")."""
    try:
        first = Path("/proc/cpuinfo").read_text(errors="replace").partition("\n\n")[0]
    except OSError:
        first = ""
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    name = fields.get("model name") or platform.processor() or platform.machine()
    numbers = {"cpu family": "family", "model": "model", "CPU implementer": "implementer", "CPU part": "part"}
    known = [f"{label} {fields[key]}" for key, label in numbers.items() if fields.get(key)]
    return f"{name} ({', '.join(known)})" if known else name


@cache
def driver_version() -> str:
    """The NVIDIA driver's version (Linux), or "none"."""
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)*\b", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    return found.group() if found else "none"
