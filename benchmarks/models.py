"""RedNet end to end against ResNet-50 and ConvNeXt, with the same tooling on every side.

Inference: `pyinvolution.optimize_for_inference` (norms folded, channels_last, constants) of all, under AMP in bfloat16.
Training: a step of SGD with momentum under the same AMP. Modes: eager, CUDA graph (of the whole call or step), and
torch.compile (for inference with frozen weights).

An inference is timed after its output was compared with the model's own in float32, involutions by the simplest
kernels; a training step after its fourth loss was compared with that of the eager model in float32.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.harness import check_alike, ratios_text
from benchmarks.operators import Bench, spread
from pyinvolution import force_variant, optimize_for_inference
from pyinvolution.explain import variants
from pyinvolution.models import create_model
from pyinvolution.studies.timing import Function, Ratio

MODES = ("eager", "CUDA graph", "torch.compile")
RIVALS = ("ResNet-50", "ConvNeXt-nano")
STEPS = 4
"""Steps before a training step is timed, and whose last loss is compared."""
AMP = torch.bfloat16


def resnet50() -> nn.Module:
    from torchvision.models import resnet50

    return resnet50()


def convnext_nano() -> nn.Module:
    import timm

    return timm.create_model("convnext_nano")


MODELS: dict[str, Callable[[], nn.Module]] = {
    "RedNet-50": lambda: create_model("rednet50"),
    "RedNet-26": lambda: create_model("rednet26"),
    "ResNet-50": resnet50,
    "ConvNeXt-nano": convnext_nano,
}


def images(device: str, batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)


def simplest(device: str) -> str:
    """The last variant of each table, which takes everything."""
    tables = ([v for v in variants(op) if v.startswith(device)] for op in ("involution2d", "span_involution2d"))
    return ",".join(table[-1] for table in tables)


def graphed(function: Function) -> Function:
    """Replays what ``function`` does, after warm-up on a stream of its own. Gives the captured call's result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(STEPS - 1):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def require_mode(mode: str, device: str) -> None:
    if mode == "CUDA graph" and device != "cuda":
        raise RuntimeError("a CUDA graph needs a GPU")


def measure(
    bench: Bench,
    what: str,
    batch: int,
    mode: str,
    functions: dict[str, Function],
    rows: dict[str, dict],
    seconds: float,
) -> None:
    """Rows of all models that run, timed by turns."""
    times = bench.times(functions, seconds) if functions else {}
    for name, mine in times.items():
        row = rows[name]
        row.update(spread(mine), images_per_s=batch / statistics.median(mine))
        for rival in RIVALS:
            if rival in times and rival != name:
                row[f"{rival}: ms"] = statistics.median(times[rival]) * 1e3
                row.update(Ratio.between(mine, times[rival]).columns(rival))
    for name, row in rows.items():
        bench.rows.append(row)
        memory = f", {row['peak_mb']:.0f} MB" if row.get("peak_mb") is not None else ""
        found = f"{row['images_per_s']:.0f} images/s{memory}; {ratios_text(row)}" if "ms" in row else row["model: note"]
        print(f"{what}, {mode}, N={batch}: {name}: {found}", flush=True)
    bench.release()


def row_of(what: str, name: str, batch: int, mode: str) -> dict[str, Any]:
    return {"what": what, "model": name, "batch": batch, "mode": mode, "dtype": "AMP bfloat16"}


class Inference:
    """The models, made ready once for all batches and modes of a run."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.ready: dict[str, tuple[nn.Module, nn.Module]] = {}

    def models(self, device: str, name: str) -> tuple[nn.Module, nn.Module]:
        """The model as it is, and prepared for inference."""
        if name not in self.ready:
            torch.manual_seed(0)
            plain = MODELS[name]().eval().to(device)
            self.ready[name] = plain, optimize_for_inference(plain)
        return self.ready[name]

    def __call__(self, bench: Bench, batch: int, mode: str, names: Sequence[str], seconds: float) -> None:
        what, rows, functions = "inference", {}, {}
        x = images(bench.device, batch, self.size)
        with torch.no_grad(), frozen():
            torch._dynamo.reset()
            for name in names:
                row = rows[name] = row_of(what, name, batch, mode)
                with bench.tolerant(row, "model", own=name.startswith("RedNet")):
                    require_mode(mode, bench.device)
                    plain, model = self.models(bench.device, name)
                    with force_variant(simplest(bench.device)):
                        expected = plain(x[:8])

                    def call(model: Callable[[Tensor], Tensor] = model) -> Tensor:
                        with torch.autocast(bench.device, AMP):
                            return model(x)

                    row["peak_mb"] = bench.peak(call)
                    function: Function = call
                    if mode == "CUDA graph":
                        function = graphed(call)
                    elif mode == "torch.compile":
                        fast = torch.compile(model, fullgraph=True, dynamic=False, backend=bench.compiler)
                        function = partial(call, fast)
                    check_alike(function()[:8].float(), expected, f"{what} of {name}, {mode}, N={batch}", 5e-2)
                    functions[name] = function
            measure(bench, what, batch, mode, functions, rows, seconds)


@contextmanager
def frozen() -> Iterator[None]:
    import torch._inductor.config

    with torch._inductor.config.patch(freezing=True):
        yield


def training_step(name: str, device: str, batch: int, size: int, compiler: str | None, amp: bool = True) -> Function:
    """A step which gives its loss."""
    torch.manual_seed(0)
    model: Any = MODELS[name]().to(device=device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, 0.9)
    x, y = images(device, batch, size), torch.randint(0, 1000, (batch,), device=device)
    run = model if compiler is None else torch.compile(model, dynamic=False, backend=compiler)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, AMP, enabled=amp):
            loss = cross_entropy(run(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _append_result(made: list[tuple[Function, float]], begin: Callable[[], tuple[Function, float]]) -> None:
    made.append(begin())


def first_losses(step: Function) -> float:
    for _ in range(STEPS):
        loss = step()
    return loss.item()


def training(bench: Bench, batch: int, size: int, mode: str, names: Sequence[str], seconds: float) -> None:
    """Peak memory is that of four steps, parameters and the optimizer's state included."""
    what, rows, functions = "training step", {}, {}
    torch._dynamo.reset()
    for name in names:
        row = rows[name] = row_of(what, name, batch, mode)
        with bench.tolerant(row, "model", own=name.startswith("RedNet")):
            require_mode(mode, bench.device)
            with force_variant(simplest(bench.device)):
                expected = first_losses(training_step(name, bench.device, batch, size, None, amp=False))
            bench.release()

            def begin(name: str = name) -> tuple[Function, float]:
                compiler = bench.compiler if mode == "torch.compile" else None
                step = training_step(name, bench.device, batch, size, compiler)
                if mode == "CUDA graph":
                    step = graphed(step)
                    return step, step().item()
                return step, first_losses(step)

            made: list[tuple[Function, float]] = []
            row["peak_mb"] = bench.peak(partial(_append_result, made, begin))
            function, loss = made.pop()
            assert abs(loss - expected) <= 5e-2 * abs(expected), (
                f"training of {name}, {mode}: loss {loss:.4f} at step {STEPS}, in float32 {expected:.4f}"
            )
            functions[name] = function
    measure(bench, what, batch, mode, functions, rows, seconds)
