"""Problems for the kernels, what they should compute (in float64), and running all launches of one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .launches import Launch, recorder
from .machine import Counts, Machine
from .memory import Fault, Memory
from .opcodes import bf16_of_float, float_of_bf16
from .program import Kernel

Array = NDArray[Any]
DTYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}
PASSES = {"forward": 0, "grad_input": 1, "grad_weight": 2}
SPAN_OPS = {"forward": 0, "backward": 1, "layer": 2}
SPAN_STRATEGIES = ("fused",)
STORAGE: dict[str, Any] = {
    "float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": np.uint16
}  # fmt: skip
EPSILON = {"float32": 2.0**-23, "float64": 2.0**-52, "float16": 2.0**-10, "bfloat16": 2.0**-7}
READS_UNWRITTEN = {
    "5tiled5apply": "threads compute with the tile's pixels outside of the image, too, and store none of it",
    "5fused7forward": "a lane reads one bias past the last and masks the weight that it makes",
}
"""Kernels that may read shared memory that nobody wrote: a part of the mangled name, and why. It holds NaN."""
MOST_LANES = 1 << 13


def encode(values: Array, dtype: str) -> Array:
    return bf16_of_float(values.astype(np.float32)) if dtype == "bfloat16" else values.astype(STORAGE[dtype])


def decode(stored: Array, dtype: str) -> Array:
    return (float_of_bf16(stored) if dtype == "bfloat16" else stored).astype(np.float64)


@dataclass(frozen=True)
class Problem:
    """One pass of a strategy; sizes as in cpp/include/pyinvolution/problem.h.

    ``layout`` is nhwc (channels and taps inside), nchw, or mixed (X and Y are nhwc, W has columns inside); ``offset``
    elements precede each tensor, so that it is less aligned; ``spoil`` puts an infinity into the inputs.
    """

    strategy: str
    pass_: str
    dtype: str
    layout: str
    batch: int
    channels: int
    height: int
    width: int
    groups: int
    kernel: int
    stride: int = 1
    padding: int = -1  # -1: kernel // 2
    reduced: int = 0
    dilation: int = 1
    epilogue: bool = False
    offset: int = 0
    spoil: bool = False
    expanded: bool = False  # W has the same values in all groups
    huge: bool = False  # a stride of N that needs 64-bit indices
    multiprocessors: int = 2

    @property
    def pad(self) -> int:
        return self.kernel // 2 if self.padding < 0 else self.padding

    def out(self, size: int) -> int:
        return (size + 2 * self.pad - self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    @property
    def output(self) -> tuple[int, int]:
        return self.out(self.height), self.out(self.width)

    @property
    def span(self) -> bool:
        return self.strategy in SPAN_STRATEGIES

    def __str__(self) -> str:
        parts = [self.strategy, self.pass_, self.dtype, self.layout]
        parts += [f"{self.batch}x{self.channels}x{self.height}x{self.width}", f"g{self.groups}k{self.kernel}"]
        parts += [f"s{self.stride}"] * (self.stride > 1) + [f"p{self.pad}"] * (self.padding >= 0)
        parts += [f"d{self.dilation}"] * (self.dilation > 1) + [f"r{self.reduced}"] * (self.reduced > 0)
        parts += [f"offset{self.offset}"] * (self.offset > 0)
        parts += [name for name in ("epilogue", "spoil", "expanded", "huge") if getattr(self, name)]
        return "-".join(parts)


def dense_strides(sizes: Sequence[int], order: Sequence[int]) -> list[int]:
    """Elements between neighbours along each axis; ``order`` lists the axes, the last one fastest."""
    strides, step = [0] * len(sizes), 1
    for axis in reversed(order):
        strides[axis] = step
        step *= sizes[axis]
    return strides


NCHW, NHWC = (0, 1, 2, 3), (0, 2, 3, 1)
COLUMNS_INSIDE, TAPS_INSIDE = (0, 1, 2, 3, 4, 5), (0, 4, 5, 1, 2, 3)


@dataclass
class Tensor:
    """Sizes, order of the axes in memory, strides, and where it is."""

    name: str
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    strides: list[int] = field(default_factory=list)
    address: int = 0

    def __post_init__(self) -> None:
        self.strides = dense_strides(self.sizes, self.order)

    def arranged(self, values: Array) -> Array:
        return np.ascontiguousarray(values.transpose(self.order))

    def restored(self, stored: Array) -> Array:
        shape = [self.sizes[axis] for axis in self.order]
        return stored.reshape(shape).transpose(np.argsort(self.order))


def tensors_of(p: Problem) -> dict[str, Tensor]:
    out_h, out_w = p.output
    images = NCHW if p.layout == "nchw" else NHWC
    weights = TAPS_INSIDE if p.layout == "nhwc" else COLUMNS_INSIDE
    x, y = (p.batch, p.channels, p.height, p.width), (p.batch, p.channels, out_h, out_w)
    made = [Tensor("x", x, images), Tensor("y", y, images)]
    if not p.span:
        made += [Tensor("w", (p.batch, p.groups, p.kernel, p.kernel, out_h, out_w), weights)]
    else:
        rows = p.groups * p.kernel**2
        reduced = (p.batch, p.reduced, out_h, out_w)
        made += [Tensor("reduced", reduced, images), Tensor("span", (rows, p.reduced), (0, 1))]
        made += [Tensor("bias", (rows,), (0,))]
        if p.pass_ == "backward":
            made += [Tensor("grad_x", x, images), Tensor("grad_reduced", reduced, images)]
            made += [Tensor("grad_span", (rows, p.reduced), (0, 1)), Tensor("grad_bias", (rows,), (0,))]
    return {tensor.name: tensor for tensor in made}


# --- the equations of problem.h


def windows(x: Array, p: Problem) -> Array:
    """[N, C, K, K, Ho, Wo]"""
    (out_h, out_w), k, s, d = p.output, p.kernel, p.stride, p.dilation
    padded = np.pad(x, ((0, 0), (0, 0), (p.pad, p.pad), (p.pad, p.pad)))
    result = np.empty((p.batch, p.channels, k, k, out_h, out_w))
    for i in range(k):
        for j in range(k):
            result[:, :, i, j] = padded[:, :, i * d : i * d + s * out_h : s, j * d : j * d + s * out_w : s]
    return result


def add_windows(values: Array, p: Problem) -> Array:
    """The transpose of ``windows``."""
    (out_h, out_w), s, d = p.output, p.stride, p.dilation
    padded = np.zeros((p.batch, p.channels, p.height + 2 * p.pad, p.width + 2 * p.pad))
    for i in range(p.kernel):
        for j in range(p.kernel):
            padded[:, :, i * d : i * d + s * out_h : s, j * d : j * d + s * out_w : s] += values[:, :, i, j]
    return padded[:, :, p.pad : p.pad + p.height, p.pad : p.pad + p.width]


def make_inputs(p: Problem, seed: int = 0) -> dict[str, Array]:
    """Random numbers of the dtype, in float64. ``y`` is grad_output."""
    rng = np.random.default_rng(seed)

    def numbers(tensor: Tensor, scale: float = 1.0) -> Array:
        values = rng.standard_normal(tensor.sizes, np.float32).astype(np.float64) * scale
        if p.dtype == "float64":  # so that a float32 sum would be seen
            values = values + rng.standard_normal(tensor.sizes) * 2.0**-30
        return decode(encode(values, p.dtype), p.dtype)

    made = {
        name: numbers(tensor, p.reduced**-0.5 if name == "span" else 1.0)
        for name, tensor in tensors_of(p).items()
        if not name.startswith("grad_")
    }
    if p.spoil:
        made["x"][0, p.channels // 2, p.height // 2, p.width // 3] = np.inf
        made["y"][0, p.channels // 2, p.output[0] // 2, p.output[1] // 3] = -np.inf
    if p.expanded and "w" in made:
        made["w"][:] = made["w"][:, :1]
    if p.epilogue:
        made["scale"], made["shift"] = (rng.standard_normal(p.channels, np.float32) for _ in range(2))
    return made


def expected(p: Problem, inputs: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Results in float64, and the sums of their terms' absolute values, to which errors are compared."""
    with np.errstate(all="ignore"):
        exact = _results(p, inputs, stored=True)
        sums = _results(p, {n: np.abs(np.where(np.isfinite(v), v, 0)) for n, v in inputs.items()}, stored=False)
    return exact, sums


def _results(p: Problem, inputs: dict[str, Array], *, stored: bool) -> dict[str, Array]:
    per_group = p.channels // p.groups
    x, y = inputs["x"], inputs["y"]
    keep = (lambda v: decode(encode(v, p.dtype), p.dtype)) if stored else (lambda v: v)
    if p.span:
        w = np.einsum("kr,nrhw->nkhw", inputs["span"], inputs["reduced"]) + inputs["bias"][None, :, None, None]
        w = keep(w).reshape(p.batch, p.groups, p.kernel, p.kernel, *p.output)
    else:
        w = inputs["w"]
    if p.pass_ == "forward":
        result = np.einsum(
            "ngcijhw,ngijhw->ngchw",
            windows(x, p).reshape(p.batch, p.groups, per_group, p.kernel, p.kernel, *p.output), w,
        ).reshape(y.shape)  # fmt: skip
        if p.epilogue:
            result = result * inputs["scale"][:, None, None] + inputs["shift"][:, None, None]
            result = np.maximum(result, 0)
        return {"y": result}
    results = {}
    if p.pass_ in ("grad_input", "backward"):
        products = np.repeat(w, per_group, 1) * y[:, :, None, None]
        results["x" if p.pass_ == "grad_input" else "grad_x"] = add_windows(products, p)
    if p.pass_ in ("grad_weight", "backward"):
        products = windows(x, p) * y[:, :, None, None]
        grad_w = products.reshape(p.batch, p.groups, per_group, *products.shape[2:]).sum(2)
        if p.pass_ == "grad_weight":
            results["w"] = grad_w
        else:
            rows = keep(grad_w).reshape(p.batch, -1, *p.output)
            results["grad_reduced"] = np.einsum("kr,nkhw->nrhw", inputs["span"], rows)
            results["grad_span"] = np.einsum("nkhw,nrhw->kr", rows, inputs["reduced"])
            results["grad_bias"] = rows.sum((0, 2, 3))
    return results


# --- running


@dataclass
class Prepared:
    """A problem in memory, with its launches."""

    problem: Problem
    memory: Memory
    tensors: dict[str, Tensor]
    launches: list[Launch]
    outputs: tuple[str, ...]


def outputs_of(p: Problem) -> tuple[str, ...]:
    if p.span and p.pass_ == "backward":
        return "grad_x", "grad_reduced", "grad_span", "grad_bias"
    return ({"forward": "y", "grad_input": "x", "grad_weight": "w"}[p.pass_],)


def prepare(p: Problem, inputs: dict[str, Array] | None, *, count_writes: bool = True) -> Prepared:
    """Puts the tensors into memory and gets the launches; without inputs they are zeros that take no memory."""
    tensors, outputs = tensors_of(p), outputs_of(p)
    dtype = STORAGE[p.dtype]
    size = np.dtype(dtype).itemsize
    numbers, scratch = [], 0
    if p.expanded:
        tensors["w"].sizes = (p.batch, 1, *tensors["w"].sizes[2:])
        tensors["w"].strides = dense_strides(tensors["w"].sizes, tensors["w"].order)
        tensors["w"].strides[1] = 0
    if p.huge:
        for tensor in tensors.values():
            tensor.strides[0] = max(tensor.strides[0], 1 << 31) if p.batch == 1 else tensor.strides[0]
    numbers += [DTYPES[p.dtype], p.batch, p.channels, p.groups, p.height, p.width, *p.output, p.kernel, p.kernel]
    numbers += [p.stride, p.stride, p.pad, p.pad, p.dilation, p.dilation]
    if not p.span:
        for name in "xwy":
            numbers += tensors[name].strides
    else:
        nothing = [0, 0, 0, 0]
        numbers += [*tensors["x"].strides, *tensors["y"].strides, p.reduced, p.epilogue, p.epilogue]
        numbers += [*tensors["reduced"].strides, *tensors["span"].strides, 0, 0]
        for name in ("grad_x", "grad_reduced"):
            numbers += tensors[name].strides if name in tensors else nothing
        scratch = recorder().scratch_bytes(p.strategy, SPAN_OPS[p.pass_], numbers, p.multiprocessors)
    capacity = sum(int(np.prod(tensor.sizes)) * size for tensor in tensors.values()) + scratch + 8 * p.channels
    memory = Memory(-(-(capacity + 8192 * (len(tensors) + 4)) // 4096) * 4096, count_writes=count_writes)
    for name, tensor in tensors.items():
        bytes_ = int(np.prod(tensor.sizes)) * size
        output = name in outputs
        tensor.address = memory.reserve(name, bytes_, offset=p.offset * size, output=output)
        if inputs is not None and not output:
            values = inputs[name][:, :1] if p.expanded and name == "w" else inputs[name]
            memory.get(name)[:] = encode(tensor.arranged(values), p.dtype).reshape(-1).view(np.uint8)
        elif inputs is not None:
            memory.get(name)[:] = 0xFF
    if not p.span:
        addresses = [tensors[name].address for name in "xwy"]
        launches = recorder().launches(
            p.strategy, PASSES[p.pass_], numbers, addresses, multiprocessors=p.multiprocessors, span=False
        )
    else:
        at = {name: tensor.address for name, tensor in tensors.items()}
        if p.epilogue:
            for name in ("scale", "shift"):
                values = np.zeros(p.channels, np.float32) if inputs is None else inputs[name].astype(np.float32)
                at[name] = memory.put(name, values)
        if scratch:
            at["scratch"] = memory.reserve("scratch", scratch, writable=True)
            if inputs is not None:
                memory.get("scratch")[:] = 0xFF
        fields = ("x", "reduced", "reduce", "reduce_bias", "span", "bias", "scale", "shift", "y")
        fields += ("grad_x", "grad_reduced", "grad_span", "grad_bias", "scratch")
        addresses = [at.get(name, 0) for name in fields]
        launches = recorder().launches(
            p.strategy, SPAN_OPS[p.pass_], numbers, addresses, multiprocessors=p.multiprocessors, span=True
        )
    return Prepared(p, memory, tensors, launches, outputs)


def run_launch(
    launch: Launch, memory: Memory, blocks: Sequence[int] | None = None, *, check: bool = True, count: bool = False,
    kernel: Kernel | None = None,
) -> Machine:  # fmt: skip
    numbers = range(launch.blocks) if blocks is None else blocks
    together = max(1, min(len(numbers), MOST_LANES // launch.threads))
    machine = Machine(
        kernel or launch.kernel, launch.threads, together, launch.shared_bytes, memory, check=check, count=count,
        reads_unwritten=any(part in launch.kernel.name for part in READS_UNWRITTEN),
    )  # fmt: skip
    machine.run(launch.arguments, launch.blocks, numbers)
    return machine


def check_problem(p: Problem, kernels: dict[str, Kernel] | None = None, seed: int = 0) -> Counts:
    """Runs every launch of a problem with all checks, and compares the results with float64. Raises Fault.

    ``kernels`` replaces kernels by others (mutants).
    """
    inputs = make_inputs(p, seed)
    prepared = prepare(p, inputs)
    counts = Counts()
    for launch in prepared.launches:
        machine = run_launch(launch, prepared.memory, kernel=(kernels or {}).get(launch.kernel.name))
        counts.add(machine.counts)
    prepared.memory.check_written()
    exact, sums = expected(p, inputs)
    for name in prepared.outputs:
        stored = prepared.memory.get(name).view(STORAGE[p.dtype])
        actual = prepared.tensors[name].restored(decode(stored, p.dtype))
        compare(p, name, actual, exact[name], sums[name])
    return counts


def compare(p: Problem, name: str, actual: Array, exact: Array, sums: Array) -> None:
    """NaN and infinities where float64 has them; else the error is small beside the sum of the terms' magnitudes.

    A result is rounded once, from a float sum (for float64 a double one) of at most some thousand terms; weights that
    the fused strategy computes may be rounded to a neighbour of the exact rounding.
    """
    with np.errstate(all="ignore"):
        narrowed = decode(encode(exact, p.dtype), p.dtype)
    finite = np.isfinite(narrowed)
    wrong = np.where(finite, np.isfinite(actual), (actual == narrowed) | (np.isnan(actual) & np.isnan(narrowed)))
    if not wrong.all():
        raise Fault(f"{name} has {int((~wrong).sum())} NaN or infinities at wrong places in {p}")
    rounding = EPSILON[p.dtype] / 2
    allowed = (
        np.abs(exact) * rounding * 1.01
        + sums * (max(EPSILON["float32"], 0) if p.dtype != "float64" else EPSILON["float64"]) * 16
    )
    if p.span:
        allowed = allowed + sums * rounding * 0.5
    error = np.where(finite, np.abs(actual - np.where(finite, exact, 0)), 0)
    if (error > np.where(finite, allowed, 0)).any():
        at = np.unravel_index(int(np.argmax(error - np.where(finite, allowed, 0))), error.shape)
        where = tuple(int(i) for i in at)
        raise Fault(f"{name}{list(where)} is {actual[at]}, expected {exact[at]} +- {allowed[at]} in {p}")
