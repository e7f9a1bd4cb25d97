"""The extension of OpenVINO: built as docs/openvino.md says, then run with ONNX files of this library."""

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from documents import BLOCKS
from onnx_support import Operators, operator_inputs, small_rednet
from tolerance import assert_accurate
from torch import nn
from torch.utils._pytree import tree_leaves

from pyinvolution import Involution2d, cli, openvino
from pyinvolution.export import export

ov = pytest.importorskip("openvino")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
PAGE = [block for block in BLOCKS if block.name.startswith("docs/openvino.md")]
COMMANDS = [line for block in PAGE if block.language == "bash" for line in block.commands()]
LIBRARIES = {torch.float32: "libpyinvolution_openvino.so", torch.bfloat16: "libpyinvolution_openvino_bf16.so"}
OPERATIONS = {"involution2d", "span_involution2d", "involution_layer2d"}
HINTS = {torch.float32: "f32", torch.bfloat16: "bf16"}
pytestmark = pytest.mark.skipif(
    None in [shutil.which(name, path=PATH) for name in ("cmake", "ninja", "g++")], reason="needs cmake, ninja and g++"
)


def run(command: str, folder: Path) -> str:
    settings = {"PATH": PATH, "CMAKE_GENERATOR": "Ninja", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=os.environ | settings, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def code(language: str) -> str:
    (block,) = [block for block in PAGE if block.language == language]
    return block.code


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands of the page have been executed that build the extension and the program."""
    place = tmp_path_factory.mktemp("openvino")
    (place / "classify").mkdir()
    (place / "classify/CMakeLists.txt").write_text(code("cmake"))
    (place / "classify/classify.cpp").write_text(code("cpp"))
    commands = [line for line in COMMANDS if line.startswith("cmake ")]
    assert len(commands) == 4
    for command in commands:
        run(command, place)
    return place


CORES = []
"""All of this process. Each core's CPU plugin sets a stack for signals and frees it with the core, also where another
has taken its place; the next signal would then end the process (OpenVINO 2026.4)."""


def core_with(place: Path, dtype: torch.dtype = torch.float32):
    core = ov.Core()
    CORES.append(core)
    core.add_extension(place / "build/openvino" / LIBRARIES[dtype])
    return core


def results(core, model, inputs: list[torch.Tensor], **properties) -> list[torch.Tensor]:
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", **properties})
    found = compiled([tensor.numpy() for tensor in inputs])
    return [torch.from_numpy(np.array(found[output])) for output in compiled.outputs]


def kinds(model) -> set[str]:
    return {node.get_type_name() for node in model.get_ops()}


def operator_arguments(given: list[torch.Tensor], dtype: torch.dtype) -> tuple:
    x, *lists, scale, shift = [tensor.to(dtype) for tensor in given]
    wide, count = torch.promote_types(dtype, torch.float32), len(Operators.CASES)
    return x, *(lists[i : i + count] for i in range(0, 4 * count, count)), scale.to(wide), shift.to(wide)


@pytest.fixture(scope="module", params=[6, 32])
def operators(request: pytest.FixtureRequest, place: Path) -> tuple[Path, list[torch.Tensor]]:
    """A file with the operators, and their inputs: groups of 3 channels, a part of a vector, and 16."""
    from pyinvolution._onnx_functions import translate

    given = tree_leaves(operator_inputs(torch.float32, request.param))
    path = place / f"operators{request.param}.onnx"
    onnx.save(translate(torch.export.export(Operators(), operator_arguments(given, torch.float32)), 18), path)
    return path, given


@pytest.mark.parametrize("dtype", LIBRARIES, ids=str)
def test_operators(place: Path, operators: tuple[Path, list[torch.Tensor]], dtype: torch.dtype) -> None:
    path, given = operators
    # In bfloat16 of inputs that are bfloat16 already: OpenVINO's are float32.
    given = [tensor.to(dtype).float() for tensor in given]
    core = core_with(place, dtype)
    model = core.read_model(path)
    assert kinds(model) & OPERATIONS == OPERATIONS
    assert_operators(results(core, model, given), given, dtype)


def assert_operators(found: list[torch.Tensor], given: list[torch.Tensor], dtype: torch.dtype) -> None:
    oracles, references = (Operators()(*operator_arguments(given, of)) for of in (torch.float64, dtype))
    for number, (result, oracle, reference) in enumerate(zip(found, oracles, references, strict=True)):
        assert_accurate(result.to(dtype), oracle, reference, f"result {number}")


WITHOUT_FUSED_KERNELS = """
import sys
import numpy, openvino
library, path, inputs, outputs = sys.argv[1:]
core = openvino.Core()
core.add_extension(library)
model = core.read_model(path)
assert "involution2d" in {node.get_type_name() for node in model.get_ops()}
assert not {"span_involution2d", "involution_layer2d"} & {node.get_type_name() for node in model.get_ops()}
compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
found = compiled([*numpy.load(inputs).values()])
numpy.savez(outputs, *(found[output] for output in compiled.outputs))
"""


@pytest.mark.parametrize("dtype", LIBRARIES, ids=str)
def test_operators_without_fused_kernels(
    place: Path, operators: tuple[Path, list[torch.Tensor]], dtype: torch.dtype, tmp_path: Path
) -> None:
    """Then OpenVINO's own convolutions make the kernels."""
    path, given = operators
    given = [tensor.to(dtype).float() for tensor in given]
    np.savez(tmp_path / "in.npz", *given)
    files = [place / "build/openvino" / LIBRARIES[dtype], path, tmp_path / "in.npz", tmp_path / "out.npz"]
    subprocess.run(
        [sys.executable, "-c", WITHOUT_FUSED_KERNELS, *map(str, files)], check=True,
        env=os.environ | {"PYINVOLUTION_DISABLE": "cpu/fused"},
    )  # fmt: skip
    assert_operators([torch.from_numpy(value) for value in np.load(tmp_path / "out.npz").values()], given, dtype)


@pytest.fixture(scope="module")
def rednet(place: Path) -> nn.Module:
    """Exported to the file that the page names."""
    model = small_rednet().eval()
    nn.init.normal_(model.head.weight)
    export(model, place / "rednet50.onnx", "onnx", torch.rand(2, 3, 64, 96), custom_ops=True)
    return model


@pytest.mark.parametrize("dtype", LIBRARIES, ids=str)
def test_any_batch_and_size(place: Path, rednet: nn.Module, dtype: torch.dtype) -> None:
    core = core_with(place, dtype)
    model = core.read_model(place / "rednet50.onnx")
    assert "involution_layer2d" in kinds(model)
    for shape in ((2, 3, 64, 96), (1, 3, 33, 33), (3, 3, 75, 41)):
        images = torch.rand(shape)
        with torch.no_grad():
            expected = rednet(images)
        (found,) = results(core, model, [images], INFERENCE_PRECISION_HINT=HINTS[dtype])
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype] * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_float16(place: Path, rednet: nn.Module, tmp_path: Path) -> None:
    """Of which the CPU device makes float32, also where OpenVINO's own constants and ours were float32 already."""
    half, images = copy.deepcopy(rednet).half(), torch.rand(2, 3, 64, 96).half()
    export(half, tmp_path / "half.onnx", "onnx", images, custom_ops=True)
    core = core_with(place)
    (found,) = results(core, core.read_model(tmp_path / "half.onnx"), [images])
    with torch.no_grad():
        reference, exact = half(images), half.double()(images.double())
    assert_accurate(found, exact, reference)


@pytest.mark.parametrize("dtype", LIBRARIES, ids=str)
def test_the_format_of_openvino(place: Path, rednet: nn.Module, dtype: torch.dtype, tmp_path: Path) -> None:
    core = core_with(place, dtype)
    model = core.read_model(place / "rednet50.onnx")
    ov.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)
    with pytest.raises(RuntimeError, match="involution_layer2d"):
        ov.Core().read_model(tmp_path / "model.xml")
    images = [torch.rand(2, 3, 64, 96)]
    (expected,) = results(core, model, images)
    # What was converted for one library is the same in the other.
    for other in LIBRARIES:
        again = core_with(place, other)
        assert torch.equal(results(again, again.read_model(tmp_path / "model.xml"), images)[0], expected)


def test_threads_give_the_same_bits(place: Path, rednet: nn.Module) -> None:
    core = core_with(place)
    model, images = core.read_model(place / "rednet50.onnx"), [torch.rand(3, 3, 96, 96)]
    one, two = (results(core, model, images, INFERENCE_NUM_THREADS=threads)[0] for threads in (1, 2))
    assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", LIBRARIES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_an_image_too_wide_for_the_kernels(place: Path, stride: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """A row of it does not fit into the cache, which only the image tells."""
    torch.manual_seed(0)
    layer = Involution2d(16, 7, stride, reduction=8).eval()
    nn.init.uniform_(layer.reduce.norm.running_mean, -0.2, 0.2)
    images = torch.randn(1, 16, 2, 20000)
    export(layer, tmp_path / "layer.onnx", "onnx", torch.randn(2, 16, 33, 34), custom_ops=True)
    core = core_with(place, dtype)
    model = core.read_model(tmp_path / "layer.onnx")
    assert kinds(model) & OPERATIONS == {"involution_layer2d"}
    (found,) = results(core, model, [images])
    with torch.no_grad():
        reference, exact = layer(images), layer.double()(images.double())
    if dtype == torch.float32:
        assert_accurate(found, exact, reference)
    else:  # of which the weights are rounded, too
        torch.testing.assert_close(found, exact.float(), rtol=0, atol=2e-2 * exact.abs().max().item())


def test_what_does_not_fit_is_named(place: Path, tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    def model(**sizes: list[int]) -> bytes:
        shapes = {"input": [1, 16, 8, 8], "weight": [1, 2, 3, 3, 8, 8]} | sizes
        node = helper.make_node("involution2d", ["input", "weight"], ["output"], domain="pyinvolution",
                                kernel_size=[3, 3], stride=[1, 1], padding=[1, 1], dilation=[1, 1])  # fmt: skip
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
        output = helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 16, None, None])
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("pyinvolution", 1)]
        return helper.make_model(helper.make_graph([node], "g", values, [output]), opset_imports=opsets)

    core = core_with(place)
    for sizes, message in (
        ({}, ""),
        ({"weight": [1, 2, 3, 3, 8, 7]}, "weight has shape .1,2,3,3,8,7., expected .1,2,3,3,8,8."),
        ({"weight": [1, 3, 3, 3, 8, 8]}, "groups is 3, expected a divisor of channels, 16"),
        ({"weight": [1, 2, 9, 8, 8]}, "weight has shape .1,2,9,8,8., expected"),
    ):
        onnx.save(model(**sizes), tmp_path / "model.onnx")
        inputs = [torch.rand(shape) for shape in ([1, 16, 8, 8], sizes.get("weight", [1, 2, 3, 3, 8, 8]))]
        if message:
            with pytest.raises(RuntimeError, match=message):
                results(core, core.read_model(tmp_path / "model.onnx"), inputs)
        else:
            assert results(core, core.read_model(tmp_path / "model.onnx"), inputs)[0].shape == (1, 16, 8, 8)


def test_the_programs_of_the_page(place: Path, rednet: nn.Module, tmp_path: Path) -> None:
    (place / "program.py").write_text(code("python"))
    python = torch.from_numpy(np.random.default_rng(0).random((2, 3, 224, 224), dtype=np.float32))
    cpp = (torch.arange(2 * 3 * 224 * 224) % 255 / 255).reshape(2, 3, 224, 224)
    for command, images in (("python program.py", python), ("build/classify/classify", cpp)):
        lines = run(command, place).splitlines()
        with torch.no_grad():
            logits = rednet(images)
        assert len(lines) == len(logits)
        for line, image in zip(lines, logits, strict=True):
            best, value = line.split()
            assert int(best) == image.argmax().item()
            assert float(value) == pytest.approx(image.max().item(), rel=1e-4)
    assert not re.search("libtorch|libpython", run("ldd build/openvino/*.so build/classify/classify", place))
    # The core lies beside the extension, as on another machine.
    core = re.search(r"libpyinvolution_core\S* => (\S+)", run(f"ldd build/openvino/{LIBRARIES[torch.float32]}", place))[
        1
    ]
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in (core, place / "build/openvino" / LIBRARIES[torch.float32]):
        shutil.copy(file, moved)
    assert f"=> {moved}/libpyinvolution_core" in run(f"ldd {moved / LIBRARIES[torch.float32]}", place)


def test_the_command_tells_how(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def printed() -> str:
        with pytest.raises(SystemExit, match="0"):
            cli.main(["--openvino-extension"])
        return capsys.readouterr().out

    folder = printed().removesuffix("\n")
    assert folder == openvino.source_path()
    assert (Path(folder) / "CMakeLists.txt").is_file()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    told = [line.strip() for line in printed().splitlines()]
    asked = '"$(python -m pyinvolution --openvino-extension)"'
    assert [line for line in told if line.startswith(("pip", "cmake"))] == [
        line.replace(asked, folder) for line in COMMANDS[1:4]
    ]
