"""The operators, one shape at a time, against everything that they replace; checked, then timed.

What each is compared with, by the name of its columns:

- ``unfold``, ``unfold, compiled``: the reference (unfold + einsum), eager and under torch.compile; for
  `span_involution2d` after the span as a convolution.
- ``variant NAME``: the other kernels of the plan table, forced. ``variant generic`` is the direct algorithm of the
  authors' CuPy kernel: one thread for each output, which reads every operand from memory.
- ``official``: the authors' CuPy operator itself (float32, NCHW), where CuPy is installed and its file is given.
- ``3x3 convolution``: cuDNN's, of as many channels, as in ResNet-50 at the same place; ``depthwise 7x7``: cuDNN's.
- ``library span + involution2d``: the span as a convolution, then our unfused operator.

All float32 arithmetic is float32's: TF32 is off on every side. A wrong result of ours stops the run; what gives another
result than ours, which was checked, is not timed, and its note says so.
"""

import gc
import importlib.util
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from cases import Case
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d

from benchmarks.harness import (
    check_alike,
    check_involution,
    check_span,
    convolution,
    involution_tensors,
    ratios_text,
    span_tensors,
)
from benchmarks.predict import Gpu, predicted_ms
from benchmarks.roofline import Limits, Work
from pyinvolution import explain, explain_span, force_variant, functional, ops, reference
from pyinvolution.explain import PASSES, SPAN_PASSES, Explanation, variants
from pyinvolution.studies.timing import Clock, Function, Ratio, Spread, device_peak, interleaved

LAYOUTS = {"channels_last": "channels_last", "NCHW": "contiguous"}
Involution = Callable[..., Tensor]


@dataclass(frozen=True)
class Setting:
    """A problem as it is benchmarked."""

    shape: str
    case: Case
    dtype: str
    layout: str
    device: str

    def __str__(self) -> str:
        return f"{self.shape} N={self.case.input[0]} {self.dtype} {self.layout}"

    def columns(self) -> dict[str, Any]:
        return {"shape": self.shape, "batch": self.case.input[0], "dtype": self.dtype, "layout": self.layout}


@dataclass(frozen=True)
class Contender:
    """Something to compare with. ``prepare`` makes the call, which gives our results again where ``same`` is true.

    ``own`` marks what is a part of the library.
    """

    name: str
    prepare: Callable[[], Function]
    same: bool = True
    own: bool = False


@dataclass
class Bench:
    """What all measurements of a run share."""

    device: str
    clock: Clock
    limits: Limits
    rows: list[dict[str, Any]]
    seconds: float
    least: int = 5
    compiler: str = "inductor"
    official: Involution | str = "no --official PATH was given"

    def peak(self, function: Function) -> float | None:
        """MB that a call adds to what is allocated, at its peak; None on a CPU."""
        if self.device != "cuda":
            function()
            return None
        return device_peak(function) / 2**20

    def release(self) -> None:
        if self.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    @contextmanager
    def tolerant(self, row: dict[str, Any], name: str, own: bool = False) -> Iterator[None]:
        """What does not run or fit is a note in the row; a wrong result of ours stops everything."""
        try:
            yield
        except AssertionError as error:
            if own:
                raise
            row[f"{name}: note"] = f"not timed: {first_line(error)}"
        except torch.OutOfMemoryError:
            row[f"{name}: note"] = "does not fit into memory"
        except Exception as error:
            row[f"{name}: note"] = f"does not run: {type(error).__name__}: {first_line(error)}"

    def times(self, functions: dict[str, Function], seconds: float | None = None) -> dict[str, list[float]]:
        return interleaved(functions, self.seconds if seconds is None else seconds, self.least, self.clock)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["no message"])[0][:160]


def spread(seconds: Sequence[float]) -> dict[str, float]:
    found = Spread.of(seconds)
    return {"ms": found.median * 1e3, "ms: low": found.low * 1e3, "ms: high": found.high * 1e3, "calls": len(seconds)}


def measure(
    bench: Bench,
    setting: Setting,
    operator: str,
    variant: str,
    ours: Function,
    expected: Any,
    contenders: Sequence[Contender],
) -> None:
    """A row of our operator, whose results were checked before, and of all contenders."""
    check_alike(ours(), expected, f"{operator}, {setting}")
    row = next((r for r in bench.rows if r["what"] == operator and setting.columns().items() <= r.items()), None)
    if row is None:
        row = {"what": operator, **setting.columns(), "variant": variant, "peak_mb": bench.peak(ours)}
        times = bench.times({"ours": ours})["ours"]
        work = Work.of(operator, setting.case, setting.dtype)
        floor, seconds = bench.limits.floor(work, setting.dtype), statistics.median(times)
        row.update(spread(times))
        row["gb_per_s"], row["gfma_per_s"] = work.bytes / seconds / 1e9, work.fma / seconds / 1e9
        row["copy_share"] = row["gb_per_s"] / bench.limits.copy_gb_per_s
        row["fma_share"] = row["gfma_per_s"] / bench.limits.gfma[setting.dtype]
        row["floor_bytes_ms"], row["floor_fma_ms"], row["floor_ms"] = floor.bytes_ms, floor.fma_ms, floor.ms
        gpu = Gpu.of(bench.limits)
        row["predicted_ms"] = None if gpu is None else predicted_ms(operator, setting, gpu)
        bench.rows.append(row)
    for contender in contenders:
        with bench.tolerant(row, contender.name, contender.own):
            contend(bench, row, f"{operator}, {setting}", ours, expected, contender)
    share = f"{row['copy_share']:.0%} of the copy's rate, {row['ms'] / row['floor_ms']:.2f} x the floor"
    print(f"{operator}, {setting}: {row['ms']:.4f} ms, {share}, {row['variant']}; {ratios_text(row)}", flush=True)


def contend(bench: Bench, row: dict[str, Any], where: str, ours: Function, expected: Any, contender: Contender) -> None:
    name, function = contender.name, contender.prepare()
    result = function()
    if contender.same:
        check_alike(result, expected, f"{where}: {name}")
    del result
    row[f"{name}: peak_mb"] = bench.peak(function)
    times = bench.times({"ours": ours, "other": function})
    row[f"{name}: ms"] = statistics.median(times["other"]) * 1e3
    row.update(Ratio.between(times["ours"], times["other"]).columns(name))


# --- contenders -------------------------------------------------------------------------------------------------------


def _prepared(function: Function) -> Function:
    return function


def forced(name: str, function: Function) -> Callable[[], Function]:
    def call() -> Any:
        with force_variant(name):
            return function()

    return lambda: call


def others(operator: str, device: str, explanations: Sequence[Explanation]) -> list[str]:
    """The variants that could run every pass but are not chosen for it."""
    names = [v for v in variants(operator) if v.startswith(device + "/")]
    verdicts = [{f"{device}/{v.variant}": v for v in e.verdicts} for e in explanations]
    return [
        name for name in names
        if all(v[name].refusal is None for v in verdicts) and not all(v[name].chosen for v in verdicts)
    ]  # fmt: skip


def chosen(explanations: Sequence[Explanation]) -> str:
    names = dict.fromkeys(str(e.chosen) for e in explanations)
    return " + ".join(names)


def backward_of(function: Involution, leaves: Sequence[Tensor], gy: Tensor) -> Callable[[], Function]:
    """The backward pass alone, through autograd, of what ``function`` keeps of its forward pass."""

    def prepare() -> Function:
        mine = [t.detach().clone().requires_grad_() for t in leaves]
        kept = function(*mine)
        return lambda: torch.autograd.grad(kept, mine, gy, retain_graph=True)

    return prepare


def load_official(path: Path) -> Involution | str:
    """The authors' operator from their checkout (or its file), or why there is none.

    Its file also defines a layer on mmcv's ConvModule, which is not needed here and stands in empty where there is no
    mmcv; ``cupy.cuda.compile_with_cache``, which newer releases of CuPy no longer have, is given back to it.
    """
    files = [path] if path.is_file() else sorted(path.rglob("involution_cuda.py"))
    if not files:
        return f"no involution_cuda.py under {path}"
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    try:
        import cupy

        if not hasattr(cupy.cuda, "compile_with_cache"):
            cupy.cuda.compile_with_cache = lambda code: cupy.RawModule(code=code).module
        if importlib.util.find_spec("mmcv") is None:
            cnn = ModuleType("mmcv.cnn")
            cnn.ConvModule = nn.Module  # type: ignore[attr-defined]
            sys.modules.update({"mmcv": ModuleType("mmcv"), "mmcv.cnn": cnn})
        spec = importlib.util.spec_from_file_location("official_involution", files[0])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        operator = module._involution_cuda
    except Exception as error:
        return f"{files[0].name} does not load: {type(error).__name__}: {error}"

    def involution(x: Tensor, w: Tensor, bias: None, stride: Any, padding: Any, dilation: Any) -> Tensor:
        return operator(x, w, bias, stride[0], padding[0], dilation[0])

    return involution


# --- operators --------------------------------------------------------------------------------------------------------


def involution(bench: Bench, setting: Setting, compiled: bool = False) -> None:
    """`involution2d`, forward and backward. ``compiled`` adds the compiled reference, and nothing else."""
    case, dtype = setting.case, getattr(torch, setting.dtype)
    x, w, gy = involution_tensors(case, dtype, LAYOUTS[setting.layout], setting.device)
    y, *grads = check_involution(case, x, w, gy)
    geometry = case.geometry
    explanations = [explain(x, w, *geometry, pass_=p) for p in PASSES]

    def forward() -> Tensor:
        return ops.involution2d(x, w, *geometry)

    def backward() -> tuple[Tensor, ...]:
        return ops.involution2d_backward(gy, x, w, *geometry, (True, True))

    def unfold(x: Tensor, w: Tensor) -> Tensor:
        return reference.involution2d(x, w, None, *geometry)

    ahead: list[Contender] = []
    back: list[Contender] = []
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(unfold, dynamic=False, backend=bench.compiler)
        ahead.append(Contender("unfold, compiled", lambda: lambda: function(x, w)))
        back.append(Contender("unfold, compiled", backward_of(function, (x, w), gy)))
    else:
        ahead.append(Contender("unfold", lambda: lambda: unfold(x, w)))
        back.append(Contender("unfold", backward_of(unfold, (x, w), gy)))
        for passes, call, into in ((explanations[:1], forward, ahead), (explanations[1:], backward, back)):
            for name in others("involution2d", setting.device, passes):
                into.append(Contender(f"variant {name.split('/')[1]}", forced(name, call), own=True))
        if callable(bench.official) and setting.dtype == "float32" and setting.layout == "NCHW":
            ahead.append(Contender("official", lambda: lambda: without_bias(x, w)))

            def without_bias(x: Tensor, w: Tensor, official: Involution = bench.official) -> Tensor:
                return official(x, w, None, *geometry)

            back.append(Contender("official", backward_of(without_bias, (x, w), gy)))
        for title, kernel, groups in (("3x3 convolution", 3, 1), ("depthwise 7x7", 7, case.input[1])):
            one, other = convolution(case, x, gy, kernel, groups)
            ahead.append(Contender(title, partial(_prepared, one), same=False))
            back.append(Contender(title, partial(_prepared, other), same=False))
    measure(bench, setting, "involution2d", chosen(explanations[:1]), forward, y, ahead)
    measure(bench, setting, "involution2d backward", chosen(explanations[1:]), backward, grads, back)


def span_involution(bench: Bench, setting: Setting) -> None:
    """`span_involution2d`, forward, backward, both through autograd, and the whole layer that has it inside."""
    case, dtype, layout = setting.case, getattr(torch, setting.dtype), LAYOUTS[setting.layout]
    x, _, gy = involution_tensors(case, dtype, layout, setting.device)
    r, s, b = span_tensors(case, dtype, layout, setting.device)
    y, *grads = check_span(case, x, r, s, b, gy)
    geometry, mask = (case.kernel, *case.geometry), (True,) * 4
    explanations = [explain_span(x, r, s, b, *geometry, pass_=p) for p in SPAN_PASSES]
    ahead, back = chosen(explanations[:1]), chosen(explanations[1:])

    def forward() -> Tensor:
        return ops.span_involution2d(x, r, s, b, None, None, False, *geometry)

    def backward() -> tuple[Tensor, ...]:
        return ops.span_involution2d_backward(gy, x, r, s, b, *geometry, mask)

    def library(x: Tensor, r: Tensor, s: Tensor, b: Tensor) -> Tensor:
        return functional.involution2d(x, ops.span(r, s, b, case.kernel), None, *case.geometry)

    def unfold(x: Tensor, r: Tensor, s: Tensor, b: Tensor) -> Tensor:
        return reference.involution2d(x, ops.span(r, s, b, case.kernel), None, *case.geometry)

    def fused(x: Tensor, r: Tensor, s: Tensor, b: Tensor) -> Tensor:
        return functional.span_involution2d(x, r, s, b, *geometry)

    def training(function: Involution) -> Callable[[], Function]:
        leaves = [t.clone().requires_grad_() for t in (x, r, s, b)]
        return lambda: lambda: torch.autograd.grad(function(*leaves), leaves, gy)

    one, other = convolution(case, x, gy, 3)
    name = "library span + involution2d"
    measure(bench, setting, "span_involution2d", ahead, forward, y, [
        Contender(name, lambda: lambda: library(x, r, s, b), own=True),
        Contender("unfold", lambda: lambda: unfold(x, r, s, b)),
        *(Contender(f"variant {v.split('/')[1]}", forced(v, forward), own=True)
          for v in others("span_involution2d", setting.device, explanations[:1])),
        Contender("3x3 convolution", lambda: one, same=False),
    ])  # fmt: skip
    measure(bench, setting, "span_involution2d backward", back, backward, grads, [
        Contender(name, backward_of(library, (x, r, s, b), gy), own=True),
        Contender("unfold", backward_of(unfold, (x, r, s, b), gy)),
        *(Contender(f"variant {v.split('/')[1]}", forced(v, backward), own=True)
          for v in others("span_involution2d", setting.device, explanations[1:])),
        Contender("3x3 convolution", lambda: other, same=False),
    ])  # fmt: skip
    measure(bench, setting, "span_involution2d forward + backward", f"{ahead}, {back}", training(fused)(), grads, [
        Contender(name, training(library), own=True),
    ])  # fmt: skip

    reduce = torch.randn(r.shape[1], x.shape[1], 1, 1, dtype=dtype, device=setting.device) / x.shape[1] ** 0.5

    def layer(span: Involution) -> Tensor:
        pooled = x if case.stride == (1, 1) else avg_pool2d(x, case.stride)
        return span(x, conv2d(pooled, reduce).relu_(), s, b)

    def folded(x: Tensor, r: Tensor, s: Tensor, b: Tensor) -> Tensor:
        return ops.span_involution2d(x, r, s, b, None, None, True, *geometry)

    measure(bench, setting, "whole layer", ahead, lambda: layer(folded), layer(folded), [
        Contender(name, lambda: lambda: layer(library).relu_(), own=True),
        Contender("3x3 convolution", lambda: one, same=False),
    ])  # fmt: skip
