"""Models for programs without Python: torch.export archives, AOTInductor packages and ONNX.

Batch, height and width stay free. Each file is loaded again and compared with the model on random input.
"""

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.functional import pad
from torch.utils._pytree import tree_leaves

from pyinvolution import ops
from pyinvolution._files import replacing
from pyinvolution.inference import TOLERANCE, optimize_for_inference
from pyinvolution.models import create_model, from_pretrained, list_models
from pyinvolution.models.checkpoint import read, reason_of
from pyinvolution.models.loading import load
from pyinvolution.models.pretrained import CONFIG

__all__ = ["FORMATS", "Export", "export", "load_model", "onnx_decompositions", "onnx_translations"]

SMALLEST = 33
"""Pixels of the smallest image that an exported model takes, each way: two of the last feature map, at stride 32."""


ONNX_DTYPES = (torch.float32, torch.float16)
"""What ONNX Runtime has convolutions for."""

Runner = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Export:
    """What `export` wrote.

    Attributes:
        path: of the file.
        difference: the largest absolute difference between the outputs of file and model on random input.
        scale: the model's largest absolute output there.
        dynamic: names of the free dimensions of the input.
    """

    path: Path
    difference: float
    scale: float
    dynamic: tuple[str, ...]

    def __str__(self) -> str:
        free = f"free {', '.join(self.dynamic)}" if self.dynamic else "fixed size"
        return f"{self.path}: {free}; largest difference {self.difference:.3g} where outputs reach {self.scale:.3g}"


def load_model(
    model: str | os.PathLike[str],
    weights: str | None = None,
    num_classes: int | None = None,
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """A model by its name or from files.

    Args:
        model: a name of `create_model`; or a folder of `save_pretrained` or a recipe's checkpoint, which know their
            model.
        weights: a file with weights for a name: a checkpoint of this library, of the authors' code or a state dict.
        num_classes, options: of `create_model`, for a name.

    Raises:
        ValueError: there is no such name, folder or file, or the weights are another model's.
    """
    model = os.fspath(model)
    folder = model != "" and Path(model).is_dir() and (model not in list_models() or (Path(model) / CONFIG).is_file())
    if not folder and not Path(model).is_file():
        try:
            net = create_model(model, num_classes, **(options or {}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"model is {model}, expected a file, a folder or the name of a model: {error}") from error
        return net if weights is None else _with_weights(net, weights, weights)
    for name, value in (("weights", weights), ("num_classes", num_classes), ("options", options)):
        if value is not None:
            raise ValueError(f"{name} is {value!r}, expected None, because {model} has its own")
    if folder:
        try:
            return from_pretrained(model)
        except FileNotFoundError as error:
            raise ValueError(f"{model} is not a folder of save_pretrained: {error}") from None
    checkpoint = read(model)
    arguments = checkpoint.get("hyper_parameters")
    if not isinstance(arguments, dict) or "name" not in arguments:
        raise ValueError(
            f"{model} does not say which model it is of: give the name of the model, and the file as weights"
        )
    try:
        net = create_model(arguments["name"], arguments.get("num_classes"), **(arguments.get("options") or {}))
    except Exception as error:
        raise ValueError(f"{model} was not saved from a model of this library: {reason_of(error)}") from error
    return _with_weights(net, checkpoint, model)


def _with_weights(net: nn.Module, source: str | dict[str, Any], path: str) -> nn.Module:
    try:
        return load(net, source)
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be loaded into the model: {reason_of(error)}") from error


def export(
    model: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    format: str = "pt2",
    example_input: Tensor | None = None,
    *,
    dynamic: bool = True,
    optimize: bool = True,
    opset: int = 20,
    custom_ops: bool = False,
) -> Export:
    """Write a model for deployment, load it again and compare.

    A torchvision detector becomes a function of one image (1, 3, H, W) in [0, 1] of a fixed size; it returns boxes,
    labels and scores, and the masks of a Mask R-CNN inside their boxes, not pasted into the image.

    Args:
        model: from images (N, C, H, W) to tensors, in any structure, or a torchvision detector; exported in evaluation
            mode, not changed. Or what `load_model` takes: a name, a folder of `save_pretrained`, a checkpoint.
        path: of the file, which ends in .pt2 for "pt2" and "aoti".
        format: "pt2", an archive for `torch.export.load` (after ``import pyinvolution``); "aoti", code compiled by
            AOTInductor for this kind of machine, which C++ and Python load; "onnx", of standard operations only, so
            that every runtime takes it, or with ``custom_ops``.
        example_input: images (of a detector one); device and type are the model's. Default: 2 random ones of
            224 x 224.
        dynamic: leave batch, height and width free.
        optimize: fold norms and epilogues first (`optimize_for_inference`), where the model can be traced for that.
        opset: version of ONNX's operations, 18 or newer.
        custom_ops: of "onnx": the involutions are calls of functions in the domain "pyinvolution", for which an engine
            can have a kernel; their bodies are standard operations.

    Raises:
        TypeError: ``example_input`` is not a tensor.
        ValueError: ``format`` or ``opset`` is not one of these, ``custom_ops`` is set for another format,
            ``example_input`` holds no images or too small ones, or torch cannot export the model.
        RuntimeError: the file's outputs differ from the model's by more than rounding; ``path`` is left as it was.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}, expected one of {', '.join(FORMATS)}")
    if opset < 18:
        raise ValueError(f"opset is {opset}, expected at least 18")
    if custom_ops and format != "onnx":
        raise ValueError(f"custom_ops is {custom_ops}, expected False for format {format}")
    model = copy.deepcopy(model) if isinstance(model, nn.Module) else load_model(model)
    model.eval().requires_grad_(False)
    parameter = next(model.parameters(), torch.empty(0))
    detector = hasattr(model, "transform") and hasattr(model, "backbone")
    if detector:
        model, dynamic, optimize = _Detector(model), False, False
    if example_input is None:
        size = (1 if detector else 2, 3, 224, 224)
        example_input = torch.rand(size, dtype=parameter.dtype, device=parameter.device)
    _check_example(example_input, dynamic)
    if dynamic and len(example_input) == 1:  # which torch.export would take for a constant
        example_input = example_input.repeat(2, 1, 1, 1)
    path = Path(path)
    if FORMATS[format].suffix.endswith(".pt2") and path.suffix != ".pt2":
        raise ValueError(f"path is {path}, expected one that ends in .pt2 for format {format}")
    if format == "onnx" and example_input.dtype not in ONNX_DTYPES:
        raise ValueError(
            f"the model is in {example_input.dtype}, expected {' or '.join(map(str, ONNX_DTYPES))} for format onnx"
        )
    with _traceable_nms() if detector else nullcontext():
        program, names = _program(model, example_input, dynamic, optimize)
    # The file gets its name once its outputs are known to be right.
    with replacing(path, path.suffix) as part:
        write = partial(_write_onnx, custom_ops=True) if custom_ops else FORMATS[format].write
        run = write(program, part, opset)
        difference, scale = _compare(model, run, _check_inputs(example_input, bool(names)), detector)
    return Export(path, difference, scale, names)


def _compare(model: nn.Module, run: Runner, images: list[Tensor], detector: bool) -> tuple[float, float]:
    """The largest difference, and the largest output."""
    difference = scale = 0.0
    for image in images:
        with torch.no_grad():
            expected = tree_leaves(model(image))
        for a, b in zip(expected, run(image), strict=True):
            if a.shape != b.shape:
                raise RuntimeError(f"an output of the file has shape {tuple(b.shape)}, the model's {tuple(a.shape)}")
            if detector and a is not expected[2]:
                settled = _settled(expected[2])
                a, b = a[settled], b[settled.to(b.device)]
            if a.numel():
                difference = max(difference, (a.double() - b.to(a.device).double()).abs().max().item())
                scale = max(scale, a.double().abs().max().item())
    if not difference <= TOLERANCE.get(images[0].dtype, 1e-3) * max(scale, 1e-6):
        raise RuntimeError(
            f"the file's outputs differ from the model's by {difference:.3g}, where they reach {scale:.3g}"
        )
    return difference, scale


def _program(
    model: nn.Module, example: Tensor, dynamic: bool, optimize: bool
) -> tuple[ExportedProgram, tuple[str, ...]]:
    prepared: nn.Module = model
    if optimize:
        try:
            prepared = optimize_for_inference(model, example)
        except ValueError as error:
            warnings.warn(f"exported as it is, not optimized: {error}", stacklevel=3)
    dims = {0: Dim("batch", min=1), 2: Dim("height", min=SMALLEST), 3: Dim("width", min=SMALLEST)} if dynamic else {}
    try:
        with torch.no_grad():
            program = torch.export.export(prepared, (example,), dynamic_shapes=(dims or None,))
    except Exception as error:
        hint = "; a fixed size may work (dynamic=False)" if dynamic else ""
        raise ValueError(f"torch.export cannot export {type(model).__name__}: {reason_of(error)}{hint}") from error
    return program, tuple(dim.__name__ for dim in dims.values())


def _check_example(example: Tensor, dynamic: bool) -> None:
    if not isinstance(example, Tensor):
        raise TypeError(f"example_input is a {type(example).__name__}, expected a tensor")
    if example.dim() != 4 or not example.numel():
        raise ValueError(f"example_input has shape {tuple(example.shape)}, expected (N, C, H, W)")
    if dynamic and min(example.shape[2:]) < SMALLEST:
        raise ValueError(
            f"example_input is {example.shape[2]} x {example.shape[3]}, expected at least {SMALLEST} x {SMALLEST}; "
            "only a fixed size (dynamic=False) may be smaller"
        )


def _check_inputs(example: Tensor, dynamic: bool) -> list[Tensor]:
    inputs = [torch.rand_like(example)]
    if dynamic:
        channels, height, width = example.shape[1:]
        inputs.append(example.new_empty(1, channels, height + 33, width + 7).uniform_())
    return inputs


class _Detector(nn.Module):
    """A detector of torchvision as a function of one image."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector
        transform: Any = detector.transform
        resize_boxes = transform.postprocess

        def postprocess(found: list[dict[str, Tensor]], *sizes: Any) -> list[dict[str, Tensor]]:
            masks = [image.pop("masks", None) for image in found]
            found = resize_boxes(found, *sizes)
            return [i if m is None else {**i, "masks": m} for i, m in zip(found, masks, strict=True)]

        transform.postprocess = postprocess

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        (found,) = self.detector([images[0]])
        return tuple(found[name] for name in ("boxes", "labels", "scores", "masks") if name in found)


def _settled(scores: Tensor) -> Tensor:
    """Which detections have the same place in the order whatever the rounding: equal scores may come in any order."""
    apart = -scores.diff() > 1e-5
    return pad(apart, (1, 0), value=True) & pad(apart, (0, 1), value=True) if len(scores) else apart.new_empty(0)


@contextmanager
def _traceable_nms() -> Iterator[None]:
    """torchvision's non-maximum suppression by class, without its branches on the number of boxes."""
    from torchvision.ops import boxes as box_ops

    def batched_nms(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
        beyond = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max() + 1
        return torch.ops.torchvision.nms(boxes + (classes.to(boxes) * beyond)[:, None], scores, threshold)

    before, box_ops.batched_nms = box_ops.batched_nms, batched_nms
    try:
        yield
    finally:
        box_ops.batched_nms = before


def _write_pt2(program: ExportedProgram, path: Path, opset: int) -> Runner:
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()
    return lambda image: tree_leaves(loaded(image))


def _write_aoti(program: ExportedProgram, path: Path, opset: int) -> Runner:
    # Constants let convolutions on a CPU have their weights reordered once; inductor sees them only without gradients.
    constant = all(tensor.device.type == "cpu" for tensor in program.state_dict.values())
    with torch.no_grad(), torch._inductor.config.patch(freezing=constant):
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    loaded = torch._inductor.aoti_load_package(str(path))
    return lambda image: tree_leaves(loaded(image))


def _write_onnx(program: ExportedProgram, path: Path, opset: int, custom_ops: bool = False) -> Runner:
    import onnx
    import onnxruntime

    from pyinvolution._onnx_functions import translate

    names: dict[str, Any] = {"input_names": ["input"]}
    if len(program.graph_signature.user_outputs) == 1:
        names["output_names"] = ["output"]
    if custom_ops:
        model = translate(program, opset, **names)
    else:
        exported = torch.onnx.export(
            program.run_decompositions(onnx_decompositions()),
            (),
            opset_version=opset,
            dynamo=True,
            verbose=False,
            **names,
        )
        assert exported is not None
        model = exported.model_proto
    onnx.checker.check_model(model)
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: [torch.from_numpy(array) for array in session.run(None, {name: image.cpu().numpy()})]


class Format(NamedTuple):
    """A kind of file.

    Attributes:
        suffix: what the names of such files end in by default.
        write: writes a program to a path (with a version of ONNX's operations) and returns what runs the file.
    """

    suffix: str
    write: Callable[[ExportedProgram, Path, int], Runner]


FORMATS = {
    "pt2": Format(".pt2", _write_pt2),
    "aoti": Format(".aoti.pt2", _write_aoti),
    "onnx": Format(".onnx", _write_onnx),
}


def onnx_decompositions() -> dict[Any, Callable]:
    """The operators in operations that ONNX has, for ``program.run_decompositions`` of an `ExportedProgram`.

    `torch.onnx.export` of a module needs no help; a program that `torch.export` made has the operators in it.
    """
    return dict(ops.PLAIN)


def onnx_translations() -> dict[Callable, Callable]:
    """Deprecated: an empty table. `torch.onnx.export` of a module needs no help; see `onnx_decompositions`."""
    warnings.warn(
        "onnx_translations is deprecated: torch.onnx.export of a module needs no custom_translation_table for these "
        "operators; for an ExportedProgram pass program.run_decompositions(onnx_decompositions())",
        DeprecationWarning,
        stacklevel=2,
    )
    return {}
