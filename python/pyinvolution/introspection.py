"""What the library would run, why, and how it was built."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.nn.modules.utils import _pair

from pyinvolution import ops
from pyinvolution._library import _C
from pyinvolution.ops import Pair

PASSES = ("forward", "grad_input", "grad_weight")
SPAN_PASSES = ("forward", "backward")


@dataclass(frozen=True)
class Verdict:
    """What one kernel variant says of a problem: ``refusal`` is None where it can run it."""

    variant: str
    refusal: str | None
    chosen: bool


@dataclass(frozen=True)
class Explanation:
    """The plan table's verdicts on one problem, best variant first. ``str()`` gives a line for each."""

    problem: str
    verdicts: tuple[Verdict, ...]

    @property
    def chosen(self) -> str | None:
        """The variant that runs, or None where none can."""
        return next((v.variant for v in self.verdicts if v.chosen), None)

    def __str__(self) -> str:
        lines = [self.problem]
        for verdict in self.verdicts:
            mark = "->" if verdict.chosen else "  "
            lines.append(f" {mark} {verdict.variant}: {verdict.refusal or ('runs' if verdict.chosen else 'could run')}")
        return "\n".join(lines)


def explain(
    input: Tensor,
    weight: Tensor,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    *,
    pass_: str = "forward",
) -> Explanation:
    """Says which kernel ``functional.involution2d`` would run for these (batched) arguments, and why not the others.

    Args:
        pass_: "forward", "grad_input" or "grad_weight".

    Raises:
        TypeError, ValueError: as ``functional.involution2d`` does.
    """
    if pass_ not in PASSES:
        raise ValueError(f"explain: pass_ is {pass_!r}, expected one of {', '.join(PASSES)}")
    geometry = (_pair(stride), _pair(padding), _pair(dilation))
    ops.check(input, weight, *geometry)
    if input.device.type not in ("cpu", "cuda"):
        raise ValueError(f"explain: input is on {input.device}, expected a CPU or CUDA device")
    output = torch.empty(
        *input.shape[:2], *weight.shape[-2:], device="meta", memory_format=suggest_memory_format(input)
    )
    verdicts = _C.explain(
        pass_=pass_,
        dtype=str(input.dtype).removeprefix("torch."),
        device=input.device.type,
        input=input.shape,
        weight=weight.shape,
        stride=geometry[0],
        padding=geometry[1],
        dilation=geometry[2],
        input_stride=input.stride(),
        weight_stride=weight.stride(),
        output_stride=output.stride(),
    )
    problem = (
        f"involution2d {pass_}, {input.dtype} on {input.device.type}: input {tuple(input.shape)}, weight "
        f"{tuple(weight.shape)}, stride {geometry[0]}, padding {geometry[1]}, dilation {geometry[2]}"
    )
    return Explanation(problem, tuple(Verdict(*verdict) for verdict in verdicts))


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
    if pass_ not in SPAN_PASSES:
        raise ValueError(f"explain_span: pass_ is {pass_!r}, expected one of {', '.join(SPAN_PASSES)}")
    kernel, *geometry = (_pair(kernel_size), _pair(stride), _pair(padding), _pair(dilation))
    ops.check_span(input, reduced, span_weight, span_bias, kernel, *geometry)
    if input.device.type not in ("cpu", "cuda"):
        raise ValueError(f"explain_span: input is on {input.device}, expected a CPU or CUDA device")
    groups = span_weight.shape[0] // (kernel[0] * kernel[1])
    output = torch.empty(
        *input.shape[:2], *reduced.shape[-2:], device="meta", memory_format=suggest_memory_format(input)
    )
    verdicts = _C.explain_span(
        pass_=pass_,
        dtype=str(input.dtype).removeprefix("torch."),
        device=input.device.type,
        input=input.shape,
        weight=(input.shape[0], groups, *kernel, *reduced.shape[2:]),
        reduced=reduced.shape[1],
        stride=geometry[0],
        padding=geometry[1],
        dilation=geometry[2],
        input_stride=input.stride(),
        reduced_stride=reduced.stride(),
        span_stride=span_weight.stride()[:2],
        output_stride=output.stride(),
    )
    problem = (
        f"span_involution2d {pass_}, {input.dtype} on {input.device.type}: input {tuple(input.shape)}, reduced "
        f"{tuple(reduced.shape)}, {groups} groups, kernel_size {kernel}, stride {geometry[0]}, padding {geometry[1]}, "
        f"dilation {geometry[2]}"
    )
    return Explanation(problem, tuple(Verdict(*verdict) for verdict in verdicts))


def span_fuses(
    input: Tensor, channels: int, span_weight: Tensor, kernel_size: Pair, stride: Pair, dilation: Pair
) -> bool:
    """Whether a fused kernel runs a layer forward and backward, by what does not change from call to call."""
    device, dtype = input.device.type, input.dtype
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    rows, width = span_weight.shape[:2]
    groups = rows // (kernel_size[0] * kernel_size[1])
    # The sizes of a parameter and those that the layer knows: the input's may be symbols.
    name = str(dtype).removeprefix("torch.")
    return _layer_fuses(device, name, channels, groups, width, kernel_size, stride, dilation)


@torch.compiler.assume_constant_result
def _layer_fuses(*layer: Any) -> bool:
    return _layer_verdict(_C.forced_variant(), *layer)


@lru_cache
def _layer_verdict(forced: str, device: str, dtype: str, channels: int, groups: int, *layer: Any) -> bool:
    return device in ("cpu", "cuda") and groups > 0 and _C.fuses(dtype, device, channels, groups, *layer)


def variants(operator: str = "involution2d") -> list[str]:
    """Every kernel variant of an operator as "device/name", best first for each device."""
    return _C.variants(operator)


@contextmanager
def force_variant(name: str) -> Iterator[None]:
    """Within the context, every involution on the variant's device runs it, or raises its refusal as a RuntimeError.

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
def override_isa(name: str) -> Iterator[None]:
    """Within the context, CPU kernels use the instruction set ``name``: "baseline", "avx2" or "avx512".

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
