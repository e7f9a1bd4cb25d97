"""What the CUDA kernels should take on a GPU, from what they execute: `python -m benchmarks.gpu --predict`.

`python -m benchmarks.predict` writes the same into benchmarks/README.md.

Nothing here was measured on a GPU, except the rates that say so. A kernel takes at least the longest of four times:

- DRAM: the bytes of its operands, each once, and of its scratch memory, at the rate of a large copy;
- issue: the warp instructions that its blocks execute, counted by running nvcc's output (``tests/ptx``), over four a
  clock and multiprocessor;
- shared memory: the 128-byte wavefronts of its loads, stores, ldmatrix and copies, counted in the same run, one a clock
  and multiprocessor;
- tensor: its mma instructions at the rate of a large matrix product.

Issue and shared memory are divided by ``REACHED``, as no kernel fills every slot. A convolution, norm, activation,
addition or pooling is counted by bytes and, where it multiplies, by the rate that cuDNN reaches. The end to end table
adds up all operations of RedNet-50 and ResNet-50, layer by layer, on both sides by the same rules.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

import torch
from cases import REDNET50, Case
from torch import nn

from benchmarks import ROOT
from benchmarks.counts import Count, counts_of
from benchmarks.roofline import WIDTH, Limits, Work, batched, multiply_adds
from pyinvolution import Involution2d
from pyinvolution.models import create_model


class Problem(Protocol):
    """What `benchmarks.operators.Setting` says of a measured problem."""

    @property
    def shape(self) -> str: ...
    @property
    def case(self) -> Case: ...
    @property
    def dtype(self) -> str: ...
    @property
    def layout(self) -> str: ...


BATCH = 256
DTYPE = "bfloat16"
REACHED = 0.85
"""Of the issue slots and of the shared-memory clocks: the share that a well-written kernel reaches (assumed)."""
CONVOLUTION = 0.65
"""Of a large matrix product's rate, what cuDNN's convolutions reach: 420 to 620 of 788 TFLOP/s (assumed)."""


@dataclass(frozen=True)
class Gpu:
    name: str
    source: str
    multiprocessors: int
    ghz: float
    copy_gb_per_s: float
    tensor_tflops: float

    @staticmethod
    def of(limits: Limits) -> "Gpu | None":
        """The GPU whose rates were measured; None for a CPU."""
        if limits.issue_gfma is None:
            return None
        # Only the product of the number of multiprocessors and the clock counts.
        return Gpu(limits.device, limits.source, 1, limits.issue_gfma / 128, limits.copy_gb_per_s,
                   2e-3 * limits.gfma[DTYPE])  # fmt: skip

    def dram_us(self, bytes_: float) -> float:
        return bytes_ / self.copy_gb_per_s / 1e3

    def tensor_us(self, flop: float) -> float:
        return flop / self.tensor_tflops / 1e6

    def clocks_us(self, clocks: float) -> float:
        """Of work that spreads over all multiprocessors, at the share that is reached."""
        return clocks / self.multiprocessors / self.ghz / 1e3 / REACHED


GPUS = {
    "h200": Gpu(
        "NVIDIA H200 SXM",
        "a copy (4.3 TB/s) and bfloat16 products (788 TFLOP/s) measured on one, at 1.755 GHz",
        132, 1.755, 4300.0, 788.0,
    ),
    "h100": Gpu(
        "NVIDIA H100 SXM",
        "the datasheet: 3.35 TB/s and 989 TFLOP/s, of which 90% and 80% are assumed; 1.755 GHz",
        132, 1.755, 3015.0, 791.0,
    ),
    "a100": Gpu(
        "NVIDIA A100 SXM 80 GB",
        "the datasheet: 2.04 TB/s and 312 TFLOP/s, of which 90% and 85% are assumed; 1.41 GHz",
        108, 1.41, 1835.0, 265.0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Time:
    """Microseconds by resource; the longest one is the prediction."""

    dram: float
    issue: float = 0.0
    shared: float = 0.0
    tensor: float = 0.0

    @property
    def us(self) -> float:
        return max(self.dram, self.issue, self.shared, self.tensor)

    @property
    def bound(self) -> str:
        times = {"DRAM": self.dram, "issue": self.issue, "shared": self.shared, "tensor": self.tensor}
        return max(times, key=lambda name: times[name])


def kernel_time(gpu: Gpu, count: Count, bytes_: float) -> Time:
    return Time(
        gpu.dram_us(bytes_ + count.scratch_bytes),
        gpu.clocks_us(count.instructions / 4),
        gpu.clocks_us(count.wavefronts),
        gpu.tensor_us(count.tensor_flop),
    )


def convolution_time(gpu: Gpu, elements: float, multiply_adds: float) -> Time:
    """Forward, in 16 bits."""
    return Time(gpu.dram_us(elements * WIDTH[DTYPE]), tensor=gpu.tensor_us(2 * multiply_adds) / CONVOLUTION)


# --- an operator ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """One way to compute an operator: its kernels, one after another."""

    name: str
    kernels: dict[str, Time]

    @property
    def us(self) -> float:
        return sum(time.us for time in self.kernels.values())


def work(operator: str, case: Case) -> float:
    return float(Work.of(operator, case, DTYPE).bytes)


def span_product(gpu: Gpu, case: Case, passes: int) -> Time:
    """W = S R + b as a convolution, or the products of its gradients: R and W moved once, twice with both gradients."""
    pixels, rows = case.input[0] * case.output[0] * case.output[1], case.groups * case.kernel[0] * case.kernel[1]
    reduced = max(case.input[1] // 4, 1)
    return convolution_time(gpu, passes * pixels * (rows + reduced), passes * pixels * rows * reduced)


def forward_ways(gpu: Gpu, shape: str, batch: int = BATCH) -> list[Way]:
    """How span_involution2d can run."""
    case, ways = batched(REDNET50[shape], batch), []
    involution = counts_of("mma", ("forward",), shape, batch)
    if involution is not None:
        kernels = {
            "span": span_product(gpu, case, 1),
            "involution": kernel_time(gpu, involution, work("involution2d", case)),
        }
        ways.append(Way("composed", kernels))
    fused = counts_of("fused", ("forward",), shape, batch)
    if fused is not None:
        ways.append(Way("fused", {"forward": kernel_time(gpu, fused, work("span_involution2d", case))}))
    return ways


def backward_ways(gpu: Gpu, shape: str, batch: int = BATCH) -> list[Way]:
    case, ways = batched(REDNET50[shape], batch), []
    x, w, pixels = math.prod(case.input), math.prod(case.weight), case.input[0] * math.prod(case.output)
    y, r = pixels * case.input[1], pixels * case.input[1] // 4
    size = WIDTH[DTYPE]
    grad_input, grad_weight = (counts_of("mma", (name,), shape, batch) for name in ("grad_input", "grad_weight"))
    if grad_input is not None and grad_weight is not None:
        kernels = {
            "span": span_product(gpu, case, 1),
            "grad_input": kernel_time(gpu, grad_input, (x + w + y) * size),
            "grad_weight": kernel_time(gpu, grad_weight, (x + w + y) * size),
            "gradients of the span": span_product(gpu, case, 2),
        }
        ways.append(Way("composed", kernels))
    fused = [
        counts_of("fused", names, shape, batch)
        for names in (("grad_input", "grad_input_strided"), ("grad_span", "sum_partials"))
    ]
    if fused[0] is not None and fused[1] is not None:
        kernels = {
            "grad_input": kernel_time(gpu, fused[0], (x + y + r) * size),
            "grad_span": kernel_time(gpu, fused[1], (x + y + 2 * r) * size),
        }
        ways.append(Way("fused", kernels))
    return ways


# --- a network --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """A convolution, an involution, a pooling or a linear layer, with what follows it."""

    name: str
    case: Case | None
    read: int
    written: int
    parameters: int
    multiply_adds: int
    normed: bool
    activated: bool
    added: bool  # the block's input is added to the result, and an activation follows


def operations(model: nn.Module, batch: int, size: int = 224) -> list[Operation]:
    """Of one forward pass, found by running the model without data."""
    found: list[Operation] = []
    inside: set[str] = set()
    kinds = (nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.AdaptiveAvgPool2d, Involution2d)
    for name, module in model.named_modules():
        if not isinstance(module, kinds) or any(name.startswith(f"{other}.") for other in inside):
            continue
        if isinstance(module, Involution2d):
            inside.add(name)

        def record(module: nn.Module, inputs: Any, output: torch.Tensor, name: str = name) -> None:
            last, shortcut = name.endswith("conv3"), "downsample" in name
            operator = isinstance(module, (nn.Conv2d, Involution2d))
            x, case = inputs[0], None
            macs = 0
            if isinstance(module, nn.Conv2d):
                macs = output.numel() * module.weight[0].numel()
            elif isinstance(module, nn.Linear):
                macs = output.numel() * module.in_features
            elif isinstance(module, Involution2d):
                case = Case(
                    tuple(x.shape), module.groups, module.kernel_size, module.stride,
                    (module.kernel_size[0] // 2, module.kernel_size[1] // 2),
                )  # fmt: skip
                macs = multiply_adds(case, case.input[1] // 4)
            parameters = sum(p.numel() for p in module.parameters())
            found.append(
                Operation(
                    name,
                    case,
                    read=x.numel(),
                    written=output.numel(),
                    parameters=parameters,
                    multiply_adds=macs,
                    normed=operator,
                    activated=operator and not last and not shortcut,
                    added=last,
                )
            )

        module.register_forward_hook(record)
    with torch.no_grad():
        model(torch.empty(batch, 3, size, size, device="meta"))
    return found


@cache
def network(name: str, batch: int) -> list[Operation]:
    from torchvision.models import resnet50

    with torch.device("meta"):
        model = create_model("rednet50") if name == "RedNet-50" else resnet50()
    return operations(model.eval(), batch)


SHAPE_OF = {replace(case, reduced=0): shape for shape, case in REDNET50.items()}
COUNTED, COMPOSED, OPERATOR, LAYER, BLOCK, FREE = LAYERS = (
    "the kernels as counted",
    "the kernels without fusion",
    "the fused operator at its bytes",
    "the layer at its bytes",
    "the block at its bytes",
    "nothing",
)
"""What the involutions take. A layer is the operator with its pooling and reduction in one kernel; a block a bottleneck
with its 1x1 convolutions in one kernel, which moves only its input, output and weights."""


@dataclass(frozen=True)
class Mode:
    """Elements that are moved for each element of a result, besides those of the convolutions."""

    name: str
    norm: int
    activation: int
    addition: int
    norm_backward: int = 0
    activation_backward: int = 0
    addition_backward: int = 0
    again: int = 0  # the norms and activations around an involution, computed again in the backward pass

    @property
    def training(self) -> bool:
        return self.norm_backward > 0

    @property
    def folded(self) -> bool:
        return self.norm == 0


MODES = (
    Mode("inference, norms folded, activations and additions in epilogues", 0, 0, 1),
    Mode("inference, norms and activations as passes", 2, 2, 3),
    Mode("training step, norms and activations as passes", 3, 2, 3, 5, 3, 1, again=4),
    Mode("training step, a norm and its activation in one pass", 3, 0, 3, 5, 0, 1, again=2),
)


def involution_us(gpu: Gpu, case: Case, layer: str, mode: Mode) -> float:
    """A layer with its pooling and reduction, as one of ``LAYERS``; both passes in training."""
    if layer == FREE:
        return 0.0
    batch, channels = case.input[:2]
    shape = SHAPE_OF[batched(case, 1)]
    pixels, reduced = batch * math.prod(case.output), channels // 4
    size = WIDTH[DTYPE]
    backward = gpu.dram_us(work("span_involution2d backward", case)) if mode.training else 0.0
    if layer == LAYER:
        kept = 3 * pixels * reduced * size if mode.training else 0  # the reduced tensor, for the backward pass
        return gpu.dram_us(work("whole layer", case) + kept) + backward
    reduce = convolution_time(gpu, math.prod(case.input) + pixels * reduced, pixels * channels * reduced).us
    if case.stride[0] == 2:
        reduce += gpu.dram_us(pixels * channels * 2 * size)  # the pooled input, written and read
    if mode.training:
        passes = mode.norm + mode.activation + mode.norm_backward + mode.activation_backward
        reduce = 3 * reduce + gpu.dram_us(passes * pixels * reduced * size)
    if layer == OPERATOR:
        return reduce + gpu.dram_us(work("span_involution2d", case)) + backward
    for ways in (forward_ways, backward_ways) if mode.training else (forward_ways,):
        reduce += min(way.us for way in ways(gpu, shape, batch) if layer == COUNTED or way.name == "composed")
    return reduce


def network_us(gpu: Gpu, name: str, mode: Mode, batch: int = BATCH, layer: str = COUNTED) -> float:
    total = 0.0
    for op in network(name, batch):
        in_block = op.name.startswith("layer") and "downsample" not in op.name
        if layer == BLOCK and in_block:
            if op.case is not None:
                total += convolution_time(gpu, op.parameters, op.multiply_adds).us
            else:
                total += convolution_time(
                    gpu, (op.written if op.added else op.read) + op.parameters, op.multiply_adds
                ).us
            continue
        if op.case is not None:
            total += involution_us(gpu, op.case, layer, mode)
        else:
            elements = op.read + op.written + op.parameters
            if op.added and mode.folded:
                elements += mode.addition * op.written
            time = convolution_time(gpu, elements, op.multiply_adds).us
            total += time * (3 if mode.training and op.multiply_adds else 1)
        passes = 0
        if op.normed:
            passes += mode.norm + mode.norm_backward
        if op.activated or op.added:
            passes += mode.activation + mode.activation_backward
        if op.added and not mode.folded:
            passes += mode.addition + mode.addition_backward
        if op.case is not None:
            passes += 2 * mode.again
        total += gpu.dram_us(passes * op.written * WIDTH[DTYPE])
    return total


# --- tables -----------------------------------------------------------------------------------------------------------


def operator_rows(gpu: Gpu, batch: int = BATCH) -> Iterator[dict[str, Any]]:
    """Each way of each layer: microseconds by resource, what bounds it, and whether the library takes it."""
    for shape in REDNET50:
        for operator, ways in (("span_involution2d", forward_ways), ("span_involution2d backward", backward_ways)):
            candidates = ways(gpu, shape, batch)
            fastest = min((way.us for way in candidates), default=0.0)
            for way in candidates:
                for kernel, time in way.kernels.items():
                    yield {
                        "shape": shape, "operator": operator, "way": way.name, "kernel": kernel, "time": time,
                        "us": way.us, "fastest": way.us == fastest,
                    }  # fmt: skip


def operators_table(gpu: Gpu, batch: int = BATCH) -> str:
    lines = [
        "| shape | pass | way | kernel | DRAM | issue | shared | tensor | us | bound by |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in operator_rows(gpu, batch):
        time: Time = row["time"]
        name = f"**{row['way']}**" if row["fastest"] else row["way"]
        which = "backward" if "backward" in row["operator"] else "forward"
        cells = [row["shape"], which, name, row["kernel"]]
        cells += [f"{value:.0f}" for value in (time.dram, time.issue, time.shared, time.tensor, time.us)]
        lines.append(f"| {' | '.join([*cells, time.bound])} |")
    return "\n".join(lines) + "\n"


def networks_table(gpu: Gpu, batch: int = BATCH) -> str:
    lines = [f"| mode | ResNet-50, ms | {' | '.join(LAYERS)} |", f"| --- | ---: |{' ---: |' * len(LAYERS)}"]
    for mode in MODES:
        other = network_us(gpu, "ResNet-50", mode, batch)
        cells = [mode.name, f"{other / 1e3:.1f}"]
        for layer in LAYERS:
            fits = layer != BLOCK or mode.folded
            cells.append(f"{other / network_us(gpu, 'RedNet-50', mode, batch, layer):.2f}" if fits else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def text(gpu: Gpu, batch: int = BATCH) -> str:
    return "\n".join(
        [
            f"Predicted, not measured: {gpu.name}, {DTYPE}, channels_last, N = {batch}. Rates: {gpu.source}.",
            f"Assumed: {REACHED:.0%} of the issue slots and shared-memory clocks are reached, convolutions reach",
            f"{CONVOLUTION:.0%} of a matrix product's rate, and the four resources overlap within a kernel, not",
            "between kernels. Not counted: launches, latency, partly filled last waves, the second level of cache.",
            "",
            "The span and the involution of each layer, in microseconds; of two ways the faster one is bold:",
            "",
            operators_table(gpu, batch),
            "RedNet-50 end to end: how many times faster than ResNet-50 it should be if its involutions take",
            "",
            networks_table(gpu, batch),
        ]
    )


def predicted_ms(operator: str, setting: Problem, gpu: Gpu) -> float | None:
    """Of the fastest way; None where its kernels were not counted."""
    if setting.shape not in REDNET50 or (setting.dtype, setting.layout) != (DTYPE, "channels_last"):
        return None
    batch = setting.case.input[0]
    if operator == "involution2d":
        count = counts_of("mma", ("forward",), setting.shape, batch)
        return None if count is None else kernel_time(gpu, count, work(operator, setting.case)).us / 1e3
    ways = {"span_involution2d": forward_ways, "span_involution2d backward": backward_ways}.get(operator)
    if ways is None:
        return None
    return min((way.us / 1e3 for way in ways(gpu, setting.shape, batch)), default=None)


def comparison(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown: the rows of `benchmarks.gpu` that have a prediction beside the measurement; empty without any."""
    found = [row for row in rows if row.get("predicted_ms")]
    if not found:
        return ""
    lines = [
        "Measured against predicted (`python -m benchmarks.gpu --predict`), microseconds:",
        "",
        "| operator | shape | N | measured | predicted | measured / predicted |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in found:
        measured, predicted = row["ms"] * 1e3, row["predicted_ms"] * 1e3
        cells = [row["what"], row["shape"], str(row["batch"]), f"{measured:.0f}", f"{predicted:.0f}"]
        lines.append(f"| {' | '.join([*cells, format(measured / predicted, '.2f')])} |")
    return "\n".join(lines) + "\n"


README = ROOT / "benchmarks" / "README.md"
BEGIN, END = "<!-- python -m benchmarks.gpu --predict -->\n", "<!-- the end of the predictions -->"


def write() -> None:
    before, rest = README.read_text().split(BEGIN)
    README.write_text(f"{before}{BEGIN}{text(GPUS['h200'])}{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    write()
