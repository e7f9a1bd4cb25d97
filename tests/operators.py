"""What the tests know of each operator. They loop over OPERATORS and their kernel variants, so that none lacks a check.

``takes`` is the table of which variant must run which problem; what it does not name must be refused. The variants are
in the order of preference, and the conditions are those of the headers that declare them (cpp/core, cuda).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import product
from typing import Any

import pytest
import torch
from cases import (
    CASES,
    EMPTY_CASES,
    LAYER_CASES,
    SHIFTED_CASES,
    SPAN_CASES,
    UPSAMPLED_CASES,
    Case,
    in_layout,
    random_like,
    same,
    shifted,
    with_gradients,
)
from tolerance import assert_accurate
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, pad

from pyinvolution import explain, explain_correlation, explain_span, force_variant, functional, ops, reference
from pyinvolution._library import _C

ISAS = _C.available_isas()
WITH_VECTORS = ("cpu/columns", "cpu/channels", "cpu/fused")
"""The variants that are compiled for each instruction set."""
PAIRS_ISA = "avx512_bf16"
"""The instruction set that multiplies pairs of bfloat16."""

# --- who takes what ---------------------------------------------------------------------------------------------------

Takes = Callable[[str, Case, torch.dtype, str], bool]

# Problems beyond what the CPU kernels along channels keep in the cache, and the passes in which they are.
TOO_LARGE = {
    Case((1, 8, 3, 3), 1, (3, 3), padding=(300, 60), dilation=(300, 60), reduced=2): (
        "forward", "grad_input", "grad_weight", "backward"
    ),  # an output row reads more than 4 MB
    Case((1, 8, 2, 2), 1, (33, 33), padding=(16, 16), reduced=2): (
        "forward", "grad_input", "grad_weight", "backward"
    ),  # more than 1024 taps
    Case((1, 8, 3, 3), 1, (1, 1), (1, 40000), (0, 0), reduced=2): (
        "grad_input", "grad_weight", "backward"
    ),  # an output row needs more than 64 MB
    Case((1, 8, 3, 4), 1, (3, 3), reduced=4097): ("forward", "backward"),
    Case((1, 8200, 2, 2), 1, (1, 1), padding=(0, 0), reduced=2): ("forward",),
}  # fmt: skip
WIDE_ROW, MANY_TAPS, FAR_COLUMNS, MANY_REDUCED, MANY_CHANNELS = TOO_LARGE


def everything(pass_: str, case: Case, dtype: torch.dtype, layout: str) -> bool:
    return True


def cpu_fused(pass_: str, case: Case, dtype: torch.dtype, layout: str) -> bool:
    """Sums in float32, with what they read in the cache."""
    if case.border == "shift" and case.stride[1] != 1 and pass_ != "forward":
        return False  # gradients of windows that shift are those of neighbours
    return dtype != torch.float64 and pass_ not in TOO_LARGE.get(case, ())


def cpu_channels(pass_: str, case: Case, dtype: torch.dtype, layout: str) -> bool:
    """Over at least half a vector of channels besides."""
    return case.group_channels >= 8 and cpu_fused(pass_, case, dtype, layout)


def in_phases(pass_: str, case: Case, layout: str, strided: bool = False, shifts: bool = False) -> bool:
    """Whether a CUDA kernel that does not know an upsampling is run for each phase of one, or once.

    ``strided``: the kernel takes rows that are not dense, which those of a phase are not unless channels are.
    ``shifts``: it knows a border that shifts.
    """
    factor = case.upsample[0] * case.upsample[1]
    phases = pass_ != "grad_input" and factor <= 16 and (strided or layout == "channels_last")
    return (case.border == "zeros" or shifts) and (factor == 1 or phases)


def in_tiles(case: Case) -> bool:
    square = case.kernel in ((3, 3), (5, 5), (7, 7))
    return square and case.dilation == (1, 1) and case.stride in ((1, 1), (2, 2))


def cuda_tiled(pass_: str, case: Case, dtype: torch.dtype, layout: str) -> bool:
    dense = layout != "strided" and in_phases(pass_, case, layout)
    return in_tiles(case) and dtype != torch.float64 and dense and case.group_channels in (8, 16, 24, 32)


def cuda_sliding(pass_: str, case: Case, dtype: torch.dtype, layout: str) -> bool:
    if not in_phases(pass_, case, layout, strided=True, shifts=True):
        return False
    if case.border == "shift":
        return all(
            s == 1 or (d == 1 and pass_ != "grad_input") for s, d in zip(case.stride, case.dilation, strict=True)
        )
    return case != FAR_COLUMNS and (pass_ != "grad_input" or max(case.stride) <= 4)


def cuda_mma(pass_: str, case: Case, dtype: torch.dtype, layout: str) -> bool:
    # Expanded weights are those of one group; their gradient is a dense tensor.
    dense = layout != "strided" and (layout != "expanded" or case.groups == 1 or pass_ == "grad_weight")
    able = in_tiles(case) and in_phases(pass_, case, layout) and dtype.itemsize == 2
    return able and dense and case.group_channels == 16


def cuda_fused(pass_: str, case: Case, dtype: torch.dtype, layout: str) -> bool:
    small = case.reduced > 64 and case.output[0] * case.output[1] <= 64
    most = 96 if case.stride == (2, 2) else 128
    return (
        in_tiles(case) and case.kernel == (7, 7) and dtype.itemsize == 2 and layout == "channels_last"
        and case.group_channels == 16 and case.reduced in range(16, most + 1, 16) and not small
    )  # fmt: skip


def cuda_fused_layer(pass_: str, case: Case, dtype: torch.dtype, layout: str) -> bool:
    one_chunk = case.stride == (1, 1) and case.input[1] <= 64 and case.reduced <= 96
    return one_chunk and max(case.padding) <= 4 and cuda_fused(pass_, case, dtype, layout)


def rounds_kernels(variant: str, dtype: torch.dtype, isa: str = "") -> bool:
    """Whether a variant rounds the kernels that it computes (and in a layer the reduced channels) to ``dtype``.

    What lies in memory is rounded, and so is what an instruction reads in that dtype: those for bfloat16 do. ``isa`` is
    the current one if it is not given.
    """
    in_registers = variant == "cpu/fused" and not (dtype == torch.bfloat16 and (isa or _C.current_isa()) == PAIRS_ISA)
    return not in_registers


# --- the operators ----------------------------------------------------------------------------------------------------


def stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """What is left of an intermediate result, and of its gradient, that is kept in ``dtype``."""
    return tensor if dtype is None else tensor.to(dtype).to(tensor.dtype)


class Operator:
    """An operator in the way of torch's OpInfo; tensors are lists in the order of ``names``. It has

    - kernels: the name of the operator whose kernels compute it,
    - names: of the tensors; the last one is grad_output where there is a backward operator,
    - passes: the output_mask with which the backward operator runs a pass, None for the forward operator,
    - takes: for each variant, "device/name", the problems that it must run,
    - cases, cuda_cases (only on a GPU), empty, small (for whatever takes long),
    - spoiled: tensors, and where to put a value that is not finite,
    - vmapped: dimensions that vmap takes from the tensors,
    - roundings: how many epsilons of the sum of absolute terms a result may be off,
    - shapes(case), output(case), explain(case, *tensors, pass_),
    - forward(case, *tensors), backward(case, *tensors, mask): the operator to call, and its arguments,
    - function(case, *tensors): the public function, which autograd differentiates, or None,
    - composed(case, *tensors, store): the equation in torch's functions, keeping in ``store`` what is kept in memory.
    """

    cuda_cases: Sequence[Case] = ()
    function: Callable[..., Tensor] | None = None
    roundings = 16

    def __str__(self) -> str:
        return self.name

    @property
    def kernels(self) -> str:
        return self.name

    def output(self, case: Case) -> tuple[int, ...]:
        return *case.input[:2], *case.output

    @property
    def differentiable(self) -> bool:
        return len(self.passes) > 1

    @property
    def leaves(self) -> int:
        return len(self.names) - self.differentiable

    @property
    def results(self) -> list[str]:
        return ["output", *(f"grad_{name}" for name in self.names[: self.leaves] if self.differentiable)]

    def tensors(self, case: Case, dtype: torch.dtype, layout: str = "contiguous", device: str = "cpu") -> list[Tensor]:
        """Random ones; parameters are dense, and scaled by their fan-in."""
        generator = torch.Generator().manual_seed(0)
        made = []
        for shape in self.shapes(case):
            tensor = random_like(shape, torch.float64, "cpu", generator) / (shape[1] ** 0.5 if len(shape) == 2 else 1)
            if dtype == torch.float64:
                # Sums of products of three are then exact, but not in float32: no oracle is better than float64.
                tensor = (tensor * 4096).round() / 4096
            tensor = tensor.to(device, dtype)
            made.append(in_layout(tensor, layout) if len(shape) > 2 else tensor)
        return made

    def run(self, case: Case, tensors: Sequence[Tensor], passes: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The results of passes, or of all."""
        results = {}
        for pass_ in self.passes if passes is None else passes:
            mask = self.passes[pass_]
            if mask is None:
                operator, arguments = self.forward(case, *tensors[: self.leaves])
                results["output"] = operator(*arguments)
            else:
                operator, arguments = self.backward(case, *tensors, mask=mask)
                grads = zip(self.results[1:], operator(*arguments), mask, strict=True)
                results |= {name: grad for name, grad, wanted in grads if wanted}
        return results

    def expected(
        self, case: Case, tensors: Sequence[Tensor], work: torch.dtype | None = None, rounded: bool = True
    ) -> dict[str, Tensor]:
        """All results by composition on the CPU: in the dtype ``work``, or in the tensors' own with float32 sums.

        ``rounded``: intermediate results are kept in the tensors' dtype, see ``rounds_kernels``.
        """
        dtype = tensors[0].dtype
        inner = work or (torch.float32 if dtype.itemsize == 2 else dtype)
        store = dtype if work is None and rounded else None
        function = partial(self.composed, case, store=store)
        tensors = [t.cpu() for t in tensors]
        results = (
            with_gradients(function, tensors, inner) if self.differentiable
            else [function(*(t.to(inner) for t in tensors))]
        )  # fmt: skip
        return {name: t.to(work or dtype) for name, t in zip(self.results, results, strict=True)}

    def assert_accurate(self, case: Case, tensors: Sequence[Tensor], actual: dict[str, Tensor], variant: str) -> None:
        rounded = rounds_kernels(variant, tensors[0].dtype)
        exact, same = self.expected(case, tensors, torch.float64), self.expected(case, tensors, rounded=rounded)
        self.compare(case, actual, exact, same, f"{variant}, strides {[t.stride() for t in tensors]}")

    def compare(
        self, case: Case, actual: dict[str, Tensor], exact: dict[str, Tensor], same: dict[str, Tensor], what: str
    ) -> None:
        for name, result in actual.items():
            assert_accurate(result.cpu(), exact[name], same[name], f"{self} {name} of {case}, {result.dtype}, {what}")

    @lru_cache(maxsize=64)  # noqa: B019
    def problem(
        self, case: Case, dtype: torch.dtype, layout: str, device: str, rounded: bool = True
    ) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Tensors, and what is expected in float64 and in their dtype; once for variants that are tested in turn."""
        tensors = self.tensors(case, dtype, layout, device)
        return tensors, self.expected(case, tensors, torch.float64), self.expected(case, tensors, rounded=rounded)

    def cases_on(self, device: str) -> Sequence[Case]:
        return self.cases if device == "cpu" else (*self.cases, *self.cuda_cases)

    def taken(self, variant: str, case: Case, dtype: torch.dtype, layout: str) -> list[str]:
        """The passes that a variant must take."""
        return [pass_ for pass_ in self.passes if self.takes[variant](pass_, case, dtype, layout)]


class Involution(Operator):
    name = "involution2d"
    names = ("input", "weight", "grad_output")
    passes = {"forward": None, "grad_input": (True, False), "grad_weight": (False, True)}  # noqa: RUF012
    takes = {  # noqa: RUF012
        "cuda/mma": cuda_mma,
        "cuda/sliding": cuda_sliding,
        "cuda/tiled": cuda_tiled,
        "cuda/generic": everything,
        "cpu/channels": cpu_channels,
        "cpu/columns": everything,
        "cpu/scalar": everything,
    }
    cases = (*CASES, *SHIFTED_CASES, *UPSAMPLED_CASES, WIDE_ROW, MANY_TAPS, FAR_COLUMNS)
    # Narrow and wide tiles, whole and partial chunks of groups.
    cuda_cases = tuple(
        Case((batch, groups * width, *size), groups, (k, k), (stride, stride), (k // 2, k // 2))
        for batch, groups, *size in ((2, 1, 7, 7), (1, 4, 9, 20), (1, 6, 18, 34))
        for width, k, stride in product((3, 8, 16, 24, 32), (3, 5, 7), (1, 2))
    )
    empty = EMPTY_CASES
    small = (
        Case((2, 4, 3, 4), 2, (3, 3)),
        Case((1, 3, 5, 3), 3, (2, 4), (2, 1), (1, 2), (1, 1)),
        Case((1, 4, 5, 5), 1, (3, 3), (2, 2), (2, 2), (2, 2)),
        shifted((1, 4, 5, 6), 2, (3, 2), dilation=(1, 2)),
        Case((1, 2, 3, 2), 1, (3, 3), upsample=(2, 3)),
    )
    spoiled = (
        ("input", ((0, 17, 2, 9),)),
        ("weight", ((0, 1, 6, 6, -1, -1), (0, 1, 0, 3, 5, 5))),  # the first is a tap on padding: 0 * value
        ("grad_output", ((0, 17, 2, 9),)),
    )
    vmapped = ((0, 0), (1, 2), (0, None), (None, 1))

    def shapes(self, case: Case) -> tuple[tuple[int, ...], ...]:
        return case.input, case.weight, (*case.input[:2], *case.output)

    def forward(self, case: Case, x: Tensor, w: Tensor) -> tuple[Any, tuple]:
        return ops.involution2d, (x, w, *case.geometry, *case.trailing)

    def backward(self, case: Case, x: Tensor, w: Tensor, gy: Tensor, *, mask: Sequence[bool]) -> tuple[Any, tuple]:
        return ops.involution2d_backward, (gy, x, w, *case.geometry, mask, *case.trailing)

    def composed(self, case: Case, x: Tensor, w: Tensor, *, store: torch.dtype | None = None) -> Tensor:
        return reference.involution2d(x, w, None, *case.geometry, **case.options)

    def function(self, case: Case, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.involution2d(x, w, bias, *case.geometry, **case.options)

    def explain(self, case: Case, x: Tensor, w: Tensor, gy: Tensor, *, pass_: str) -> Any:
        return explain(x, w, *case.geometry, **case.options, pass_=pass_)


def as_grad_weight(takes: Takes) -> Takes:
    """Who takes a correlation: who takes the pass that it is."""
    return lambda pass_, case, dtype, layout: takes("grad_weight", case, dtype, layout)


class LocalCorrelation(Operator):
    name = "local_correlation2d"
    kernels = "involution2d"
    names = ("query", "key")
    passes = {"forward": None}  # noqa: RUF012
    takes = {variant: as_grad_weight(takes) for variant, takes in Involution.takes.items()}  # noqa: RUF012
    cases = Involution.cases
    cuda_cases = Involution.cuda_cases
    empty = EMPTY_CASES
    small = Involution.small
    spoiled = (
        ("query", ((0, 17, 2, 9),)),
        ("key", ((0, 17, 2, 9),)),
    )
    vmapped = Involution.vmapped

    def shapes(self, case: Case) -> tuple[tuple[int, ...], ...]:
        return (*case.input[:2], *case.output), case.input

    def output(self, case: Case) -> tuple[int, ...]:
        return case.weight

    def forward(self, case: Case, q: Tensor, k: Tensor) -> tuple[Any, tuple]:
        return ops.local_correlation2d, (q, k, case.kernel, *case.geometry, case.groups, *case.trailing)

    def composed(self, case: Case, q: Tensor, k: Tensor, *, store: torch.dtype | None = None) -> Tensor:
        return reference.local_correlation2d(q, k, case.kernel, *case.geometry, case.groups, **case.options)

    def explain(self, case: Case, q: Tensor, k: Tensor, *, pass_: str) -> Any:
        return explain_correlation(q, k, case.kernel, *case.geometry, case.groups, **case.options)


class SpanInvolution(Operator):
    name = "span_involution2d"
    names = ("input", "reduced", "span_weight", "span_bias", "grad_output")
    passes = {"forward": None, "backward": (True,) * 4}  # noqa: RUF012
    takes = {  # noqa: RUF012
        "cuda/fused": cuda_fused,
        "cuda/composed": everything,
        "cpu/fused": cpu_fused,
        "cpu/composed": everything,
    }
    cases = (*SPAN_CASES, WIDE_ROW, MANY_TAPS, FAR_COLUMNS, MANY_REDUCED)
    cuda_cases = (
        replace(same(64, 14, 7, batch=2), reduced=16),
        replace(same(64, 28, 7, 2), reduced=16),
        replace(same(128, 28, 7), reduced=32),
        replace(same(256, 14, 7, batch=2), reduced=64),
        Case((1, 96, 17, 18), 6, (7, 7), padding=(2, 4), reduced=48),
    )
    empty = tuple(replace(case, reduced=4) for case in EMPTY_CASES)
    small = (
        Case((2, 8, 4, 5), 1, (3, 3), reduced=3),
        Case((1, 16, 5, 4), 2, (2, 3), (2, 1), (1, 1), reduced=2),
    )
    spoiled = (
        ("input", ((0, 17, 2, 9),)),
        ("reduced", ((0, 3, 5, 5),)),
        ("reduced", ((0, 0, 0, 8),)),
        ("span_weight", ((60, 3),)),
        ("grad_output", ((0, 17, 2, 8),)),
    )
    vmapped = ((0, 1, None, None), (None, 0, None, None), (0, 0, 0, None), (0, None, None, 1))

    def shapes(self, case: Case) -> tuple[tuple[int, ...], ...]:
        rows = case.groups * case.kernel[0] * case.kernel[1]
        reduced = (case.input[0], case.reduced, *case.output)
        return case.input, reduced, (rows, case.reduced), (rows,), (*case.input[:2], *case.output)

    def forward(
        self, case: Case, *tensors: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, relu: bool = False
    ) -> tuple[Any, tuple]:
        return ops.span_involution2d, (*tensors, scale, shift, relu, case.kernel, *case.geometry)

    def backward(self, case: Case, *tensors: Tensor, mask: Sequence[bool]) -> tuple[Any, tuple]:
        *leaves, gy = tensors
        return ops.span_involution2d_backward, (gy, *leaves, case.kernel, *case.geometry, mask)

    def composed(
        self, case: Case, x: Tensor, r: Tensor, s: Tensor, b: Tensor | None, *, store: torch.dtype | None = None
    ) -> Tensor:
        weight = stored(conv2d(r, s[..., None, None], b), store).unflatten(1, (case.groups, *case.kernel))
        return reference.involution2d(x, weight, None, *case.geometry)

    def function(self, case: Case, *tensors: Tensor) -> Tensor:
        x, r, s, b = (*tensors, None)[:4]
        return functional.span_involution2d(x, r, s, b, case.kernel, *case.geometry)

    def explain(self, case: Case, *tensors: Tensor, pass_: str) -> Any:
        return explain_span(*tensors[:4], case.kernel, *case.geometry, pass_=pass_)


class Layer(Operator):
    name = "involution_layer2d"
    kernels = "span_involution2d"
    names = ("input", "reduce_weight", "reduce_bias", "span_weight", "span_bias")
    passes = {"forward": None}  # noqa: RUF012
    takes = {  # noqa: RUF012
        "cuda/fused": cuda_fused_layer,
        "cuda/composed": everything,
        "cpu/fused": cpu_fused,
        "cpu/composed": everything,
    }
    cases = (*LAYER_CASES, WIDE_ROW, MANY_TAPS, MANY_REDUCED, MANY_CHANNELS)
    cuda_cases = (
        replace(same(64, 14, 7, batch=2), reduced=16),
        replace(same(32, 9, 7, batch=2), reduced=32),
        replace(same(48, 17, 7), reduced=48),
        replace(same(64, 12, 7), reduced=96),
    )
    empty = tuple(replace(case, reduced=4) for case in EMPTY_CASES[:3])
    small = LAYER_CASES[3:4]
    spoiled = (
        ("input", ((0, 17, 2, 9),)),
        ("reduce_weight", ((2, 3),)),
        ("span_weight", ((60, 1),)),
    )
    vmapped = ((0, None, None, None, None), (2, None, None, None, None))
    roundings = 64  # three sums, one of the other

    def shapes(self, case: Case) -> tuple[tuple[int, ...], ...]:
        rows, channels = case.groups * case.kernel[0] * case.kernel[1], case.input[1]
        return case.input, (case.reduced, channels), (case.reduced,), (rows, case.reduced), (rows,)

    def forward(
        self, case: Case, *tensors: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, relu: bool = False
    ) -> tuple[Any, tuple]:
        return ops.involution_layer2d, (*tensors, scale, shift, relu, case.kernel, *case.geometry)

    def composed(self, case: Case, *tensors: Tensor, store: torch.dtype | None = None) -> Tensor:
        x, a, ab, s, sb = tensors
        pooled = stored(avg_pool2d(x, case.stride, ceil_mode=True), store)
        reduced = stored(conv2d(pooled, a[..., None, None], ab).relu(), store)
        odd = [d * (k - 1) % 2 for k, d in zip(case.kernel, case.dilation, strict=True)]
        return SPAN.composed(case, pad(x, (0, odd[1], 0, odd[0])), reduced, s, sb, store=store)


INVOLUTION, SPAN, LAYER, CORRELATION = OPERATORS = (Involution(), SpanInvolution(), Layer(), LocalCorrelation())

# --- over what tests loop ---------------------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
over_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
over_operators = pytest.mark.parametrize("op", OPERATORS, ids=str)
over_functions = pytest.mark.parametrize("op", [op for op in OPERATORS if op.function], ids=str)


def over_variants(
    names: Sequence[str] = (), operators: Sequence[Operator] = OPERATORS, *, each_isa: bool = False
) -> pytest.MarkDecorator:
    """Every variant of the operators, or those whose "device/name" begins with one of ``names``."""
    rows = [(op, variant) for op in operators for variant in op.takes if variant.startswith(tuple(names) or "")]
    if each_isa:
        rows = [(*row, isa) for row in rows for isa in (ISAS if row[1] in WITH_VECTORS else ISAS[-1:])]
    marks = [needs_cuda if row[1].startswith("cuda") else () for row in rows]
    return pytest.mark.parametrize(
        ("op", "variant", "isa") if each_isa else ("op", "variant"),
        [pytest.param(*row, marks=mark) for row, mark in zip(rows, marks, strict=True)],
        ids=str,
    )


def run_taken(op: Operator, variant: str, case: Case, tensors: Sequence[Tensor]) -> tuple[list[str], dict[str, Tensor]]:
    """The passes that a forced variant does not refuse, and their results."""
    taken, results = [], {}
    with force_variant(variant):
        for pass_ in op.passes:
            try:
                results |= op.run(case, tensors, [pass_])
            except (RuntimeError, ValueError) as error:
                if f"forced variant {variant} cannot run" not in str(error):
                    raise
            else:
                taken.append(pass_)
    return taken, results
