"""Problems for the kernels, what they should compute (in float64), and running all launches of one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tolerance import assert_accurate

from .launches import Launch, Occupancy, recorder, two_blocks
from .machine import Counts, Machine
from .memory import Memory
from .opcodes import bf16_of_float, float_of_bf16
from .program import Kernel

Array = NDArray[Any]
DTYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}
PASSES = {"forward": 0, "grad_input": 1, "grad_weight": 2}
SPAN_OPS = {"forward": 0, "backward": 1, "layer": 2}
STORAGE: dict[str, Any] = {
    "float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": np.uint16
}  # fmt: skip
READS_UNWRITTEN = {
    "5fused9grad_span": "of two units at once, one may be outside of the image; nothing of it is stored",
    "5tiled5apply": "threads compute with the tile's pixels outside of the image, too, and store none of it",
    "5fused10grad_input": "whole vectors of biases are read where the taps of a group end, and the rest is not used",
    "7sliding": "whole vectors are read where a tile ends, and the rest is not used",
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
    multiprocessors: int = 2
    shift: bool = False  # the border moves windows inside
    upsample: int = 1

    @property
    def pad(self) -> int:
        if self.shift:
            return 0
        return self.kernel // 2 if self.padding < 0 else self.padding

    def out(self, size: int) -> int:
        if self.pass_ == "layer":
            return -(-size // self.stride)
        if self.shift:
            return self.upsample * -(-size // self.stride)
        return self.upsample * ((size + 2 * self.pad - self.dilation * (self.kernel - 1) - 1) // self.stride + 1)

    @property
    def output(self) -> tuple[int, int]:
        return self.out(self.height), self.out(self.width)

    @property
    def span(self) -> bool:
        return self.reduced > 0

    def __str__(self) -> str:
        parts = [self.strategy, self.pass_, self.dtype, self.layout]
        parts += [f"{self.batch}x{self.channels}x{self.height}x{self.width}", f"g{self.groups}k{self.kernel}"]
        parts += [f"s{self.stride}"] * (self.stride > 1) + [f"p{self.pad}"] * (self.padding >= 0)
        parts += [f"d{self.dilation}"] * (self.dilation > 1) + [f"r{self.reduced}"] * (self.reduced > 0)
        parts += [f"offset{self.offset}"] * (self.offset > 0)
        parts += [f"u{self.upsample}"] * (self.upsample > 1)
        parts += [name for name in ("epilogue", "spoil", "expanded", "shift") if getattr(self, name)]
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
        if p.pass_ == "layer":
            made += [Tensor("reduce", (p.reduced, p.channels), (0, 1)), Tensor("reduce_bias", (p.reduced,), (0,))]
        else:
            made += [Tensor("reduced", reduced, images)]
        made += [Tensor("span", (rows, p.reduced), (0, 1)), Tensor("bias", (rows,), (0,))]
        if p.pass_ == "backward":
            made += [Tensor("grad_x", x, images), Tensor("grad_reduced", reduced, images)]
            made += [Tensor("grad_span", (rows, p.reduced), (0, 1)), Tensor("grad_bias", (rows,), (0,))]
    return {tensor.name: tensor for tensor in made}


# --- the equations of cpp/include/pyinvolution/problem.h


def taps(p: Problem, size: int, out: int) -> tuple[Array, Array]:
    """[K, out]: the position that a tap of an output position reads, and whether that is inside."""
    position = np.arange(out) * p.stride // p.upsample
    if p.shift:
        residue, step = position % p.dilation, position // p.dilation
        last = -((residue - size) // p.dilation) - p.kernel
        first = residue + p.dilation * np.clip(step - p.kernel // 2, 0, last)
    else:
        first = position - p.pad
    at = np.arange(p.kernel)[:, None] * p.dilation + first
    inside = (at >= 0) & (at < size)
    return np.where(inside, at, 0), inside


def windows(x: Array, p: Problem) -> Array:
    """[N, C, K, K, Ho, Wo]"""
    (rows, row_inside), (columns, column_inside) = taps(p, p.height, p.output[0]), taps(p, p.width, p.output[1])
    values = x[:, :, rows[:, None, :, None], columns[None, :, None, :]]
    return np.where(row_inside[:, None, :, None] & column_inside[None, :, None, :], values, 0)


def add_windows(values: Array, p: Problem) -> Array:
    """The transpose of ``windows``."""
    (rows, row_inside), (columns, column_inside) = taps(p, p.height, p.output[0]), taps(p, p.width, p.output[1])
    inside = row_inside[:, None, :, None] & column_inside[None, :, None, :]
    at = np.broadcast_to(rows[:, None, :, None] * p.width + columns[None, :, None, :], inside.shape)[inside]
    result = np.zeros((p.height * p.width, p.batch, p.channels), values.dtype)
    np.add.at(result, at, values.transpose(2, 3, 4, 5, 0, 1)[inside])
    return result.transpose(1, 2, 0).reshape(p.batch, p.channels, p.height, p.width)


def make_inputs(p: Problem, seed: int = 0) -> dict[str, Array]:
    """Random numbers of the dtype, in float64. ``y`` is grad_output."""
    rng = np.random.default_rng(seed)

    def numbers(name: str, sizes: Sequence[int]) -> Array:
        values = rng.standard_normal(sizes)
        if p.dtype == "float64":
            # Sums of products are then exact, but not in float32: no oracle is better than float64.
            return np.round(values * 2.0**14) / 2.0**14
        scale = {"span": p.reduced, "reduce": p.channels}.get(name, 1) ** -0.5
        return decode(encode(values * scale, p.dtype), p.dtype)

    made = {name: numbers(name, tensor.sizes) for name, tensor in tensors_of(p).items() if not name.startswith("grad_")}
    if p.spoil:
        made["x"][0, p.channels // 2, p.height // 2, p.width // 3] = np.inf
        made["y"][0, p.channels // 2, p.output[0] // 2, p.output[1] // 3] = -np.inf
    if p.expanded:
        made["w"][:] = made["w"][:, :1]
    if p.epilogue:
        made["scale"], made["shift"] = (rng.standard_normal(p.channels, np.float32) for _ in range(2))
    return made


def results(p: Problem, inputs: dict[str, Array], work: Any, *, store: bool) -> dict[str, Array]:
    """The equations with numbers of the type ``work``, ``store``: with the weights of a span rounded to the dtype."""
    per_group, k = p.channels // p.groups, p.kernel
    given = {name: values.astype(work) for name, values in inputs.items()}
    x, y = given["x"], given["y"]

    def kept(values: Array) -> Array:
        return decode(encode(values, p.dtype), p.dtype).astype(work) if store else values

    if p.span:
        if p.pass_ == "layer":  # of stride 1
            sums = np.einsum("rc,nchw->nrhw", given["reduce"], x) + given["reduce_bias"][:, None, None]
            given["reduced"] = kept(np.maximum(sums, 0))
        w = np.einsum("kr,nrhw->nkhw", given["span"], given["reduced"]) + given["bias"][:, None, None]
        w = kept(w).reshape(p.batch, p.groups, k, k, *p.output)
    else:
        w = given["w"]
    if p.pass_ in ("forward", "layer"):
        grouped = windows(x, p).reshape(p.batch, p.groups, per_group, k, k, *p.output)
        result = np.einsum("ngcijhw,ngijhw->ngchw", grouped, w).reshape(y.shape)
        if p.epilogue:
            result = np.maximum(result * given["scale"][:, None, None] + given["shift"][:, None, None], 0)
        return {"y": result}
    found = {}
    if p.pass_ in ("grad_input", "backward"):
        products = np.repeat(w, per_group, 1) * y[:, :, None, None]
        found["x" if p.pass_ == "grad_input" else "grad_x"] = add_windows(products, p)
    if p.pass_ in ("grad_weight", "backward"):
        products = windows(x, p) * y[:, :, None, None]
        grad_w = products.reshape(p.batch, p.groups, per_group, *products.shape[2:]).sum(2)
        if p.pass_ == "grad_weight":
            found["w"] = grad_w
        else:
            rows = kept(grad_w).reshape(p.batch, -1, *p.output)
            found["grad_reduced"] = np.einsum("kr,nkhw->nrhw", given["span"], rows)
            found["grad_span"] = np.einsum("nkhw,nrhw->kr", rows, given["reduced"])
            found["grad_bias"] = rows.sum((0, 2, 3))
    return found


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
    return ({"forward": "y", "layer": "y", "grad_input": "x", "grad_weight": "w"}[p.pass_],)


def prepare(
    p: Problem, inputs: dict[str, Array] | None, *, count_writes: bool = True, occupancy: Occupancy = two_blocks
) -> Prepared:
    """Puts the tensors into memory and gets the launches; without inputs they are zeros that take no memory."""
    tensors, outputs = tensors_of(p), outputs_of(p)
    dtype = STORAGE[p.dtype]
    size = np.dtype(dtype).itemsize
    numbers, scratch = [], 0
    if p.expanded:
        tensors["w"].sizes = (p.batch, 1, *tensors["w"].sizes[2:])
        tensors["w"].strides = dense_strides(tensors["w"].sizes, tensors["w"].order)
        tensors["w"].strides[1] = 0
    numbers += [DTYPES[p.dtype], p.batch, p.channels, p.groups, p.height, p.width, *p.output, p.kernel, p.kernel]
    numbers += [p.stride, p.stride, p.pad, p.pad, p.dilation, p.dilation]
    if not p.span:
        numbers += [p.shift, p.upsample, p.upsample]
        for name in "xwy":
            numbers += tensors[name].strides
    else:
        nothing = [0, 0, 0, 0]
        numbers += [*tensors["x"].strides, *tensors["y"].strides, p.reduced, p.epilogue, p.epilogue]
        for name, absent in (
            ("reduced", nothing), ("span", []), ("reduce", [0, 0]), ("grad_x", nothing), ("grad_reduced", nothing)
        ):  # fmt: skip
            numbers += tensors[name].strides if name in tensors else absent
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
        fields: tuple[str, ...] = ("x", "reduced", "reduce", "reduce_bias", "span", "bias", "scale", "shift", "y")
        fields += ("grad_x", "grad_reduced", "grad_span", "grad_bias", "scratch")
        addresses = [at.get(name, 0) for name in fields]
    operation = SPAN_OPS[p.pass_] if p.span else PASSES[p.pass_]
    launches = recorder().launches(
        p.strategy, operation, numbers, addresses, multiprocessors=p.multiprocessors, span=p.span, occupancy=occupancy
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
    with np.errstate(all="ignore"):
        exact = results(p, inputs, np.float64, store=False)
        same = results(p, inputs, np.float64 if p.dtype == "float64" else np.float32, store=True)
    for name in prepared.outputs:
        stored = prepared.memory.get(name).view(STORAGE[p.dtype])
        actual = prepared.tensors[name].restored(decode(stored, p.dtype))
        assert_accurate(
            as_tensor(actual, p.dtype), torch.from_numpy(exact[name]), as_tensor(same[name], p.dtype), f"{name} of {p}"
        )
    return counts


def as_tensor(values: Array, dtype: str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(getattr(torch, dtype))
