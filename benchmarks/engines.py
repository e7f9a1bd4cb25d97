"""RedNet-50 against ResNet-50 where models are deployed: `python -m benchmarks.engines` (about 8 minutes).

ONNX Runtime and OpenVINO on exported files, AOTInductor, torch.compile with frozen weights, and eager; then int8, by
ONNX Runtime's static quantization and by PyTorch's (x86 inductor; needs torchao). All models run in one process, by
turns. A ratio is the median of the ratios of neighbouring runs, with their quartiles. Every output is compared with
the model's own before it is timed; of int8, the error is a column. Written to benchmarks/results: JSON, CSV, Markdown.

The norms have the statistics of random images, the weights are random.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, fx, nn

from benchmarks.cpu import MODELS, Report
from benchmarks.harness import RESULTS, about, check_alike, relative_error, slug, write_rows
from benchmarks.models import frozen
from pyinvolution import optimize_for_inference
from pyinvolution.export import export
from pyinvolution.onnxruntime import library_path
from pyinvolution.studies.timing import Function, Ratio, interleaved

PARTS = ("onnxruntime", "openvino", "openvino-bf16", "aoti", "eager", "int8-onnxruntime", "int8-pytorch")
STANDARD = "RedNet-50, standard operations"
SIZE = 224


class Bench:
    """The models of a run and their files, each made once."""

    def __init__(self, folder: Path, threads: Sequence[int], batches: Sequence[int], seconds: float) -> None:
        self.folder, self.threads, self.batches, self.seconds = folder, threads, batches, seconds
        self.report = Report({})
        self.notes: dict[str, str] = {}
        torch.manual_seed(0)
        self.images = torch.randn(max(batches), 3, SIZE, SIZE)
        self.models = {name: calibrated(make(), self.images) for name, make in MODELS.items()}
        with torch.no_grad():
            self.expected = {name: model(self.images) for name, model in self.models.items()}

    def bfloat16_error(self, name: str) -> float:
        """How far the logits of the model in bfloat16 are from float32's, in PyTorch, relative in norm."""
        with torch.no_grad():
            return relative_error(deepcopy(self.models[name]).bfloat16()(self.images.bfloat16()), self.expected[name])

    def file(self, name: str) -> Path:
        """The model in ONNX; a RedNet with calls of its operators, "standard operations" without."""
        path = self.folder / f"{slug(name.replace(',', ''))}.onnx"
        if path.exists():
            return path
        if name == STANDARD:
            import onnx
            from onnx.inliner import inline_local_functions

            onnx.save(inline_local_functions(onnx.load(self.file("RedNet-50"))), path)
        else:
            export(self.models[name], path, "onnx", self.images[:2], custom_ops=name.startswith("RedNet"))
        return path

    def measure(
        self,
        what: str,
        make: Callable[[str, Tensor, int], Callable[[], Tensor]],
        names: Iterable[str],
        tolerance: float | Mapping[str, float] = 1e-3,
        columns: Mapping[str, float] | None = None,
    ) -> None:
        """A row for each number of threads and each batch.

        Args:
            what: is measured.
            make: of a model's name, images and a number of threads a function that gives the logits.
            names: of the models, RedNet-50 first.
            tolerance: of the outputs, relative in norm, of all models or of each in `models`.
            columns: of every row besides.
        """
        for threads, batch in product(self.threads, self.batches):
            torch.set_num_threads(threads)
            functions: dict[str, Function] = {}
            images = self.images[:batch].contiguous()
            for name in names:
                function = make(name, images, threads)
                model = name.partition(",")[0]
                allowed = tolerance if isinstance(tolerance, float) else tolerance[model]
                check_alike(function().float(), self.expected[model][:batch], f"{what}: {name}, N={batch}", allowed)
                functions[name] = function
            times = interleaved(functions, self.seconds)
            self.report.add(what, f"N={batch}", threads, "RedNet-50", times)
            self.report.rows[-1].update(columns or {})


def calibrated(model: nn.Module, images: Tensor) -> nn.Module:
    """In evaluation mode, with norms that have the statistics of the images."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean of all batches
        norm.reset_running_stats()
    with torch.no_grad():
        model.train()(images)
    return model.eval().requires_grad_(False)


# --- engines ----------------------------------------------------------------------------------------------------------


def onnxruntime_session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Threads that wait by spinning would disturb the models that run in between.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if path.name.startswith("rednet-50."):
        options.register_custom_ops_library(library_path())
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run_session(session: Any, images: Tensor) -> Callable[[], Tensor]:
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def onnxruntime_part(bench: Bench) -> None:
    def make(name: str, images: Tensor, threads: int) -> Callable[[], Tensor]:
        return run_session(onnxruntime_session(bench.file(name), threads), images)

    bench.measure("ONNX Runtime, float32", make, ("RedNet-50", "ResNet-50", STANDARD))


def openvino_part(bench: Bench, precision: str, extension: Path | None) -> None:
    import openvino

    # They stay until the end: a core that goes frees the stack for signals of the one that was made after it.
    cores = []

    def make(name: str, images: Tensor, threads: int) -> Callable[[], Tensor]:
        core = openvino.Core()
        cores.append(core)
        if name == "RedNet-50" and extension is not None:
            core.add_extension(extension / f"libpyinvolution_openvino{'_bf16' if precision == 'bf16' else ''}.so")
        settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        given = images.numpy()
        model = core.read_model(bench.file(name))
        # Of free sizes, the transpositions around an involution would be copies.
        model.reshape(given.shape)
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        return lambda: torch.from_numpy(next(iter(request.infer([given], share_inputs=True).values())))

    names = ("RedNet-50", "ResNet-50", STANDARD)
    if precision == "f32":
        bench.measure("OpenVINO, float32", make, names)
    else:
        # An engine rounds in other places than PyTorch, but not more often.
        bench.measure(
            "OpenVINO, bfloat16", make, names, {name: 2 * bench.bfloat16_error(name) for name in bench.models}
        )


def compiled(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """By torch.compile, with weights that `frozen` makes constant: also the calls must be inside it."""
    function = torch.compile(model, fullgraph=True, dynamic=False)

    def call() -> Tensor:
        with torch.no_grad():
            return function(images)

    return call


def aoti_part(bench: Bench) -> None:
    with_compile = "RedNet-50, torch.compile with freezing"

    def make(name: str, images: Tensor, threads: int) -> Callable[[], Tensor]:
        model = bench.models[name.partition(",")[0]]
        if name == with_compile:
            layout = images.to(memory_format=torch.channels_last)
            return compiled(optimize_for_inference(model), layout)
        # Compiled for a number of threads and a batch.
        path = bench.folder / f"{slug(name)}-{len(images)}-{threads}.pt2"
        export(model, path, "aoti", images, dynamic=False)
        package = torch._inductor.aoti_load_package(str(path))
        return lambda: package(images)

    torch._dynamo.reset()
    with frozen():
        bench.measure("AOTInductor, float32", make, ("RedNet-50", "ResNet-50", with_compile))


def eager_part(bench: Bench) -> None:
    models = {name: optimize_for_inference(model) for name, model in bench.models.items()}

    def make(name: str, images: Tensor, threads: int) -> Callable[[], Tensor]:
        model, layout = models[name], images.to(memory_format=torch.channels_last)

        def call() -> Tensor:
            with torch.no_grad():
                return model(layout)

        return call

    bench.measure("eager, float32", make, models)


# --- int8 -------------------------------------------------------------------------------------------------------------

INT8_TOLERANCE = 0.5
"""A quantized model that differs by more, relative in norm, computes something else."""


def error_columns(bench: Bench, run: Callable[[str], Tensor], what: str) -> dict[str, float]:
    """How far the logits are from float32's, relative in norm."""
    columns = {}
    for name, expected in bench.expected.items():
        columns[f"{name}: logit error"] = relative_error(run(name), expected)
    print(f"{what}: " + ", ".join(f"{key} {value:.3f}" for key, value in columns.items()), flush=True)
    return columns


def quantize_onnx(source: Path, target: Path, images: Tensor) -> None:
    """Convolutions and the classifier in int8, as the documentation shows; a call of an involution stays as it is."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter([{"input": image[None].numpy()} for image in images])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    quantize_static(
        source, target, Images(), quant_format=QuantFormat.QDQ, op_types_to_quantize=["Conv", "Gemm"],
        per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip


def int8_onnxruntime_part(bench: Bench) -> None:
    def file(name: str) -> Path:
        # Found by its name, so that the kernels are registered for it.
        folder = bench.folder / "int8"
        folder.mkdir(exist_ok=True)
        path = folder / bench.file(name).name
        if not path.exists():
            quantize_onnx(bench.file(name), path, bench.images)
        return path

    def make(name: str, images: Tensor, threads: int) -> Callable[[], Tensor]:
        float_name, _, kind = name.partition(", ")
        path = bench.file(float_name) if kind == "float32" else file(float_name)
        return run_session(onnxruntime_session(path, threads), images)

    what = "int8, ONNX Runtime"
    columns = error_columns(bench, lambda name: make(name, bench.images, bench.threads[0])(), what)
    bench.measure(what, make, ("RedNet-50", "ResNet-50", "RedNet-50, float32"), INT8_TOLERANCE, columns)


def unshared(model: fx.GraphModule) -> fx.GraphModule:
    """A ReLU of its own for each call: the quantizer refuses a module that is called twice."""
    for number, node in enumerate(model.graph.nodes):
        node.meta.pop("nn_module_stack", None)  # of the module before
        if node.op == "call_module" and isinstance(model.get_submodule(node.target), nn.ReLU):
            node.target = f"relu{number}"
            model.add_submodule(node.target, nn.ReLU())
    model.recompile()
    return model


def quantize_pytorch(model: nn.Module, images: Tensor) -> nn.Module:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        program = torch.export.export(unshared(optimize_for_inference(model)), (images,))
        prepared = prepare_pt2e(program.module(), quantizer)
        for _ in range(2):
            prepared(images)
        return convert_pt2e(prepared)


def int8_pytorch_part(bench: Bench) -> None:
    quantized: dict[tuple[str, int], nn.Module] = {}

    def model(name: str, images: Tensor) -> nn.Module:
        key = name, len(images)
        if key not in quantized:
            quantized[key] = quantize_pytorch(bench.models[name], images)
        return quantized[key]

    def make(name: str, images: Tensor, threads: int) -> Callable[[], Tensor]:
        float_name, _, kind = name.partition(", ")
        layout = images.to(memory_format=torch.channels_last)
        if kind == "float32":
            return compiled(optimize_for_inference(bench.models[float_name]), layout)
        return compiled(model(name, images), layout)

    what = "int8, PyTorch (x86 inductor)"
    columns = error_columns(bench, lambda name: model(name, bench.images)(bench.images), what)
    torch._dynamo.reset()
    with frozen():
        bench.measure(what, make, ("RedNet-50", "ResNet-50", "RedNet-50, float32"), INT8_TOLERANCE, columns)


# --- output -----------------------------------------------------------------------------------------------------------


def summary(bench: Bench, about: dict[str, Any]) -> str:
    head = f"{about['machine']['Model name']}, torch {about['build']['torch_running']}, {about['date']}.\n"
    head += "How many times faster RedNet-50 is: median (quartiles) of neighbouring runs."
    lines = ["| engine | N | threads | RedNet-50, ms | ResNet-50, ms | ResNet-50 | others |", "| --- " * 7 + "|"]
    for row in bench.report.rows:
        others = [
            f"{key.removesuffix(': ratio')}: {Ratio.from_row(row, key.removesuffix(': ratio'))}"
            for key in row
            if key.endswith(": ratio") and not key.startswith("ResNet-50")
        ]
        others += [f"{key} {value:.3g}" for key, value in row.items() if key.endswith("error")]
        cells = (
            row["what"], row["name"].removeprefix("N="), row["threads"], f"{row['ms']:.1f}",
            f"{row['ResNet-50: ms']:.1f}", Ratio.from_row(row, "ResNet-50"), "; ".join(others),
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    notes = [f"Not measured: {part}: {note}." for part, note in bench.notes.items()]
    return "\n\n".join([head, "\n".join(lines), *notes]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=4.0, help="of turns for each row")
    parser.add_argument("--openvino-extension", type=Path, help="folder in which it was built, docs/openvino.md")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a directory")
    arguments = parser.parse_args()
    extension = arguments.openvino_extension
    parts: dict[str, tuple[Callable[[Bench], None], tuple[str, ...]]] = {
        "onnxruntime": (onnxruntime_part, ("onnxruntime", "onnxscript")),
        "openvino": (partial(openvino_part, precision="f32", extension=extension), ("openvino", "onnxscript")),
        "openvino-bf16": (partial(openvino_part, precision="bf16", extension=extension), ("openvino", "onnxscript")),
        "aoti": (aoti_part, ()),
        "eager": (eager_part, ()),
        "int8-onnxruntime": (int8_onnxruntime_part, ("onnxruntime", "onnxscript")),
        "int8-pytorch": (int8_pytorch_part, ("torchao",)),
    }
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.threads, arguments.batches, arguments.seconds)
        for part in arguments.only or PARTS:
            run, packages = parts[part]
            missing = [package for package in packages if find_spec(package) is None]
            if missing:
                bench.notes[part] = f"needs {', '.join(missing)}"
            elif part.startswith("openvino") and extension is None:
                bench.notes[part] = "needs --openvino-extension"
            else:
                run(bench)
                continue
            print(f"{part}: {bench.notes[part]}", flush=True)
    run_about = about(notes=bench.notes, packages=versions())
    isa = run_about["build"]["isa"].split()[0]
    stem = arguments.output / f"{run_about['date']}-engines-{slug(run_about['machine']['Model name'])}-{isa}"
    write_rows(stem, bench.report.rows, about=run_about)
    text = summary(bench, run_about)
    stem.with_suffix(".md").write_text(text)
    print(f"\n{text}")


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("torch", "torchao", "onnxruntime", "openvino", "onnxscript"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
