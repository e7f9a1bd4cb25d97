"""The kernels as custom operators of ONNX Runtime, in the oldest version that they support and in the installed one.

A file without the functions' bodies runs only where the kernels are registered: that shows that they ran.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from documents import BLOCKS, ROOT
from onnx_support import Operators, onnxruntime_library, operator_inputs, small_rednet
from tolerance import assert_accurate
from torch import Tensor, nn

from pyinvolution import involution2d, local_correlation2d, ops
from pyinvolution.export import export
from pyinvolution.onnxruntime import library_path

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

OLDEST = ("1.17.0", "1.18.0", "1.19.2", "1.20.1", "1.21.1", "1.22.1", "1.23.2")
"""The first of these that there is for a Python is the oldest that is tested with it."""
CPU = ["CPUExecutionProvider"]
ELEMENTS = {torch.float32: "FLOAT", torch.float64: "DOUBLE", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}
ELEMENTS[torch.int32] = "INT32"


def session(model: Path | Any, threads: int = 1, registered: bool = True) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if registered:
        options.register_custom_ops_library(library_path())
    source = model if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=CPU)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small RedNet with calls; beside it, calls.onnx is the same without the functions' bodies."""
    path = tmp_path_factory.mktemp("models") / "rednet50.onnx"
    export(small_rednet(), path, "onnx", torch.rand(2, 3, 64, 96), custom_ops=True)
    model = onnx.load(path)
    assert model.functions
    del model.functions[:]
    onnx.save(model, path.with_name("calls.onnx"))
    return path


@pytest.mark.parametrize("threads", [1, 3])
def test_a_model_runs_on_the_kernels(file: Path, threads: int) -> None:
    with pytest.raises(Exception, match="involution_layer2d"):
        session(file.with_name("calls.onnx"), registered=False)
    model = small_rednet().eval()
    runs = [session(path, threads) for path in (file, file.with_name("calls.onnx"))]
    without = session(file, threads, registered=False)
    for shape in ((2, 3, 64, 96), (1, 3, 41, 75), (3, 3, 224, 224)):
        images = torch.randn(shape)
        expected = model(images).detach()
        found = [run.run(None, {"input": images.numpy()})[0] for run in (*runs, without)]
        np.testing.assert_array_equal(found[0], found[1])  # the kernels win over the bodies
        for logits in found:
            torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)


def test_any_number_of_threads_gives_the_same(file: Path) -> None:
    """Also after the session has found out how many it has, and for calls at the same time."""
    images = torch.randn(4, 3, 64, 96).numpy()
    calls = [session(file.with_name("calls.onnx"), threads) for threads in (1, 4)]
    expected = calls[0].run(None, {"input": images})[0]
    for _ in range(20):
        np.testing.assert_array_equal(calls[1].run(None, {"input": images})[0], expected)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: calls[1].run(None, {"input": images})[0], range(20)):
            np.testing.assert_array_equal(found, expected)


def test_float16(tmp_path: Path) -> None:
    model, path = small_rednet().half(), tmp_path / "half.onnx"
    export(model, path, "onnx", torch.rand(2, 3, 64, 96).half(), custom_ops=True)
    images = torch.rand(1, 3, 41, 75).half()
    (found,) = session(path).run(None, {"input": images.numpy()})
    expected = small_rednet().eval()(images.float()).detach()
    torch.testing.assert_close(torch.from_numpy(found).float(), expected, rtol=5e-2, atol=5e-3 * expected.abs().max())


@pytest.mark.parametrize("name", ["semantic_fpn", "retinanet"])
def test_segmentation_and_detection(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    from pyinvolution.models import create_model

    torch.manual_seed(0)
    small = {"layers": (1, 1, 1, 1), "stem_channels": 32, "base_channels": 16}
    backbone = create_model("rednet", **small, num_classes=0, global_pool="")
    options = {} if name == "semantic_fpn" else {"channels": 32, "min_size": 64, "max_size": 96}
    model = create_model(name, backbone=backbone, num_classes=5, **options).eval()
    example = torch.rand(1 if options else 2, 3, 64, 96)
    export(model, tmp_path / "m.onnx", "onnx", example, custom_ops=True, dynamic=not options)
    found = [session(tmp_path / "m.onnx", registered=on).run(None, {"input": example.numpy()}) for on in (True, False)]
    for kernel, body in zip(*found, strict=True):
        np.testing.assert_allclose(kernel, body, rtol=1e-3, atol=1e-4)


# --- operators --------------------------------------------------------------------------------------------------------


def test_the_operators_in_a_file(tmp_path: Path) -> None:
    """Every argument that the exporter writes arrives at the kernels."""
    from pyinvolution._onnx_functions import translate

    inputs = operator_inputs(torch.float32)
    model = translate(torch.export.export(Operators(), inputs), 18)
    del model.functions[:]
    run = session(model)
    flat = torch.utils._pytree.tree_leaves(inputs)
    feed = {i.name: value.numpy() for i, value in zip(run.get_inputs(), flat, strict=True)}
    for found, expected in zip(run.run(None, feed), Operators()(*inputs), strict=True):
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=2e-5, atol=2e-5)


class Family(nn.Module):
    """The operators that have no functions."""

    def forward(self, x: Tensor, weight: Tensor, larger: Tensor) -> tuple[Tensor, ...]:
        return (
            involution2d(x, weight, border="shift", dilation=2),
            involution2d(x, larger, padding=1, upsample=2),
            local_correlation2d(x, x, 3, padding=1, groups=2),
        )


def test_borders_upsampling_and_correlation_become_standard_operations() -> None:
    from pyinvolution._onnx_functions import translate

    torch.manual_seed(0)
    inputs = (torch.randn(2, 4, 8, 9), torch.randn(2, 2, 3, 3, 8, 9), torch.randn(2, 2, 3, 3, 16, 18))
    model = translate(torch.export.export(Family(), inputs), 18)
    assert not model.functions
    run = session(model, registered=False)
    feed = {i.name: value.numpy() for i, value in zip(run.get_inputs(), inputs, strict=True)}
    for found, expected in zip(run.run(None, feed), Family()(*inputs), strict=True):
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=2e-5, atol=2e-5)


def call(operator: str, tensors: Sequence[Tensor | None], **attributes: Any) -> Any:
    """A model of one call, whose tensors are constants; the result comes as float64, which every dtype fits."""
    made, names = [], []
    for number, tensor in enumerate(tensors):
        names.append("" if tensor is None else f"t{number}")
        if tensor is not None:
            kind = onnx.TensorProto.DataType.Value(ELEMENTS[tensor.dtype])
            raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            made.append(onnx.helper.make_tensor(names[-1], kind, tensor.shape, raw, raw=True))
    nodes = [
        onnx.helper.make_node(operator, names, ["y"], domain="pyinvolution", **attributes),
        onnx.helper.make_node("Cast", ["y"], ["output"], to=onnx.TensorProto.DOUBLE),
    ]
    output = onnx.helper.make_tensor_value_info("output", onnx.TensorProto.DOUBLE, None)
    graph = onnx.helper.make_graph(nodes, "call", [], [output], made)
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("pyinvolution", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)


def result(operator: str, tensors: Sequence[Tensor | None], **attributes: Any) -> Tensor:
    return torch.from_numpy(session(call(operator, tensors, **attributes)).run(None, {})[0])


WINDOWS = (
    {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)},
    {"kernel_size": (2, 5), "stride": (2, 1), "padding": (0, 3), "dilation": (1, 2)},
)


@pytest.mark.parametrize("group_channels", [16, 3])  # whole vectors and parts; float64 has no kernel for the whole
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
def test_operators(dtype: torch.dtype, group_channels: int) -> None:
    torch.manual_seed(0)
    groups, reduced, size = 2, 4, (9, 11)
    channels = groups * group_channels
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(2, channels, *size, dtype=dtype)
    scale, shift = (torch.randn(channels, dtype=sums) for _ in range(2))
    for window in WINDOWS:
        kernel, stride, padding, dilation = window.values()
        out = [ops.output_size(*axis) for axis in zip(size, kernel, stride, padding, dilation, strict=True)]
        rows = groups * kernel[0] * kernel[1]
        w = torch.randn(2, groups, *kernel, *out, dtype=dtype)
        r = torch.randn(2, reduced, *out, dtype=dtype)
        span, bias = torch.randn(rows, reduced, 1, 1, dtype=dtype), torch.randn(rows, dtype=dtype)
        reduce, reduce_bias = torch.randn(reduced, channels, 1, 1, dtype=dtype), torch.randn(reduced, dtype=dtype)
        halo = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
        geometry = (kernel, stride, padding, dilation)
        layer = {**window, "padding": halo}
        cases: list[tuple[Any, list[Tensor | None], dict, tuple]] = [
            (ops.involution2d, [x, w], window, geometry[1:]),
            (ops.span_involution2d, [x, r, span, bias, scale, shift], {**window, "relu": 1}, (True, *geometry)),
            (ops.span_involution2d, [x, r, span, None, None, None], {**window, "relu": 0}, (False, *geometry)),
            (ops.involution_layer2d, [x, reduce, reduce_bias, span, bias, scale, shift], {**layer, "relu": 0},
             (False, kernel, stride, halo, dilation)),
            (ops.involution_layer2d, [x, reduce, None, span[:, :, 0, 0], None, None, None], {**layer, "relu": 1},
             (True, kernel, stride, halo, dilation)),
        ]  # fmt: skip
        for operator, tensors, attributes, rest in cases:
            name = operator._schema.name.partition("::")[2]
            given = list(tensors)
            while given[-1] is None:  # which a call may leave out
                del given[-1]
            found = result(name, given, **attributes)
            assert torch.equal(found, result(f"{name}_32", tensors, **attributes))
            exact = ops.PLAIN[operator](*(None if t is None else t.double() for t in tensors), *rest)
            same = ops.PLAIN[operator](*tensors, *rest)
            assert torch.equal(found.to(dtype).double(), found)
            assert_accurate(found.to(dtype), exact, same, f"{name} of {dtype}, {attributes}")


def test_images_without_pixels_or_batch() -> None:
    window = {**WINDOWS[0], "relu": 0}
    span, reduce = torch.randn(18, 4, 1, 1), torch.randn(4, 32, 1, 1)
    assert result("involution_layer2d", [torch.randn(0, 32, 5, 5), reduce, None, span], **window).shape == (0, 32, 5, 5)
    assert result("involution_layer2d", [torch.randn(1, 32, 0, 5), reduce, None, span], **window).shape == (1, 32, 0, 5)


X, W = torch.randn(1, 32, 5, 6), torch.randn(1, 2, 3, 3, 5, 6)
R, S, A = torch.randn(1, 4, 5, 6), torch.randn(18, 4, 1, 1), torch.randn(4, 32, 1, 1)
ONES = torch.ones(32)


@pytest.mark.parametrize(
    ("operator", "tensors", "changes", "words"),
    [
        ("involution2d", [X[0], W], {}, r"input has shape \(32, 5, 6\), expected 4 dimensions"),
        ("involution2d", [X, W[0]], {}, "weight has shape .* expected 6 dimensions"),
        ("involution2d", [X, W[:, :, :, :, 1:]], {}, r"weight has shape \(1, 2, 3, 3, 4, 6\), expected"),
        ("involution2d", [X, W], {"kernel_size": (5, 3), "padding": (2, 1)}, "weight has shape .* expected .* 5, 3, 5"),
        ("involution2d", [X[:, :31], W], {}, "groups is 2, expected a divisor of channels, 31"),
        ("involution2d", [X, W], {"stride": (0, 1)}, "stride_h is 0, expected at least 1"),
        ("involution2d", [X, W], {"dilation": (1, 1, 1)}, "dilation has 3 values, expected 2"),
        ("involution2d", [X, W.double()], {}, "[Tt]ype"),
        ("involution2d", [X.int(), W.int()], {}, "[Tt]ype"),
        ("span_involution2d", [X, R[0], S], {}, "reduced has shape .* expected 4 dimensions"),
        ("span_involution2d", [X, R[:, :3], S], {}, "span_weight has shape .* with R = 3"),
        ("span_involution2d", [X, R[..., 1:], S], {}, r"reduced has shape \(1, 4, 5, 5\), expected \(1, 4, 5, 6\)"),
        ("span_involution2d", [X, R, S[:17]], {}, "span_weight has 17 rows, expected a multiple of the 9 taps"),
        ("span_involution2d", [X, R, S, ONES], {}, r"span_bias has shape \(32\), expected \(18\)"),
        ("span_involution2d", [X, R, S, None, ONES], {}, "shift is absent, expected it with scale"),
        ("span_involution2d", [X, R, S], {"kernel_size": (0, 3)}, "expected"),
        ("involution_layer2d", [X, A[:, :31], None, S], {}, r"reduce_weight has shape .* with C = 32"),
        ("involution_layer2d", [X, A, ONES, S], {}, r"reduce_bias has shape \(32\), expected \(4\)"),
        ("involution_layer2d", [X, A, None, S, None, ONES, ONES[1:]], {}, r"shift has shape \(31\), expected \(32\)"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_errors_of_the_session(operator: str, tensors: list, changes: dict, words: str) -> None:
    attributes = WINDOWS[0] | ({} if operator == "involution2d" else {"relu": 0}) | changes
    with pytest.raises(Exception, match=words) as raised:
        result(operator, tensors, **attributes)
    assert "ONNXRuntimeError" in str(raised.value)


# --- other versions, C++, and the documentation -----------------------------------------------------------------------

RUN = """
import sys
import numpy as np
import onnxruntime
file, library, output = sys.argv[1:]
options = onnxruntime.SessionOptions()
if library:
    options.register_custom_ops_library(library)
session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
images = np.linspace(-1, 1, 2 * 3 * 41 * 75, dtype=np.float32).reshape(2, 3, 41, 75)
np.save(output, session.run(None, {"input": images})[0])
print(onnxruntime.__version__)
"""


@pytest.fixture(scope="module")
def oldest() -> tuple[str, str]:
    """The oldest version that the package index has for this Python, and the PYTHONPATH on which it is."""
    for version in OLDEST:
        folder = ROOT / "build" / "onnxruntime" / f"{version}-{sys.implementation.cache_tag}"
        # Older ones are built for NumPy 1.
        packages = [f"onnxruntime=={version}", *(["numpy<2"] if version < "1.19" else [])]
        if not folder.is_dir():
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--only-binary",
                ":all:",
                "--dest",
            ]
            done = subprocess.run([*command, part, *packages], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                continue
            for wheel in part.glob("*.whl"):
                zipfile.ZipFile(wheel).extractall(part)
                wheel.unlink()
            part.rename(folder)
        return version, str(folder)
    pytest.skip("the package index is not reachable, or has no old onnxruntime for this Python")


def test_the_oldest_version(oldest: tuple[str, str], file: Path, tmp_path: Path) -> None:
    version, path = oldest

    def logits(number: int, file: Path, library: str, **environment: str) -> tuple[str, np.ndarray]:
        output = tmp_path / f"{number}.npy"
        command = [sys.executable, "-c", RUN, file, library, output]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), np.load(output)

    _, expected = logits(0, file, library_path())
    for number, (file_, library) in enumerate(
        ((file, library_path()), (file.with_name("calls.onnx"), library_path()), (file, "")), 1
    ):
        used, found = logits(number, file_, library, PYTHONPATH=path)
        assert used == version
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * abs(expected).max())


def documented(language: str, words: str) -> str:
    (code,) = [
        b.code for b in BLOCKS if b.name.startswith("docs/onnx.md") and b.language == language and words in b.code
    ]
    return code


def test_the_documented_python(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(file, tmp_path / "rednet50.onnx")
    exec(documented("python", "inliner"), {})
    inlined = onnx.load("inlined.onnx")
    assert not inlined.functions
    assert {node.domain for node in inlined.graph.node} == {""}
    names: dict[str, Any] = {}
    exec(documented("python", "library_path"), names)
    expected = session(tmp_path / "inlined.onnx", registered=False).run(None, {"input": names["images"]})[0]
    np.testing.assert_allclose(names["logits"], expected, rtol=1e-4, atol=1e-6)


def test_the_documented_program(file: Path, tmp_path: Path) -> None:
    """With the installed wheel's library; a release's headers where ONNXRUNTIME_INCLUDE names them."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    library = onnxruntime_library()
    if library is None:
        pytest.skip(f"onnxruntime {onnxruntime.__version__} comes without a library for C++")
    (tmp_path / "classify.cpp").write_text(documented("cpp", "main"))
    headers = os.environ.get("ONNXRUNTIME_INCLUDE")
    folders = [headers] if headers else [ROOT / "tests/onnxruntime_api", ROOT / "cpp/onnxruntime"]
    program = tmp_path / "classify"
    command = [
        "g++",
        "-std=c++20",
        "-Wall",
        "-Wextra",
        *(f"-I{folder}" for folder in folders),
        tmp_path / "classify.cpp",
        library,
        "-o",
        program,
    ]
    # The library is known by a name without its last numbers.
    link = tmp_path / "libonnxruntime.so.1"
    link.symlink_to(library)
    subprocess.run(command, check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([program, file, library_path()], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (expected,) = session(file).run(None, {"input": np.full((1, 3, 224, 224), 0.5, np.float32)})
    np.testing.assert_allclose([float(line) for line in done.stdout.split()], expected[0, :5], atol=1e-5)
    wrong = subprocess.run([program, file, file], env=environment, capture_output=True, text=True, check=False)
    assert wrong.returncode == 1
    assert "rednet50.onnx" in wrong.stderr


def test_the_documented_quantization(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime.quantization")
    monkeypatch.chdir(tmp_path)
    shutil.copy(file, tmp_path / "rednet50.onnx")
    names: dict[str, Any] = {}
    exec(documented("python", "quantize_static"), names)
    kinds = [node.op_type for node in onnx.load("int8.onnx").graph.node]
    assert sum(kind.startswith("involution_layer2d") for kind in kinds) == 3
    assert "QuantizeLinear" in kinds
    images = names["images"][:1]
    expected, found, without = (
        session(tmp_path / name, registered=on).run(None, {"input": images})[0]
        for name, on in (("rednet50.onnx", True), ("int8.onnx", True), ("int8.onnx", False))
    )
    assert 0 < np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)
    assert np.linalg.norm(found - without) < 0.05 * np.linalg.norm(expected)
