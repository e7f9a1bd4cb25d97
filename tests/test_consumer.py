"""What people install: the wheel in a fresh environment, and C++ projects outside the tree that use it."""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from documents import BLOCKS
from onnx_support import onnxruntime_library
from torch import nn

import pyinvolution
from pyinvolution import Involution2d, involution2d, local_correlation2d, span_involution2d

ROOT = Path(__file__).parents[1]
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
TOOLS = {name: shutil.which(name, path=PATH) for name in ("cmake", "ninja")}
pytestmark = pytest.mark.skipif(
    None in TOOLS.values() or shutil.which("g++") is None, reason="needs cmake, ninja and g++"
)


def run(*command: str | Path, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command], env=os.environ | {"PATH": PATH, "OMP_NUM_THREADS": "2"} | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def fails(*command: str | Path) -> str:
    """What a program says of its wrong input."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    return result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PYINVOLUTION_WHEEL, or one built here without CUDA, which is what takes long."""
    if given := os.environ.get("PYINVOLUTION_WHEEL"):
        return Path(given)
    folder = tmp_path_factory.mktemp("wheel")
    pytest.importorskip("scikit_build_core")
    run(
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", folder,
        "--config-settings", f"build-dir={ROOT}/build/consumer", ROOT, PYINVOLUTION_CUDA="OFF",
    )  # fmt: skip
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment's interpreter. Its torch is this environment's, to save a download of gigabytes."""
    root = tmp_path_factory.mktemp("fresh")
    venv.create(root, with_pip=False)
    interpreter = root / "bin/python"
    run(sys.executable, "-m", "pip", "--python", interpreter, "install", "--quiet", "--no-deps", "--no-index", wheel)
    (site,) = root.glob("lib/python*/site-packages")
    (site / "host.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return interpreter


def test_onnx_runtime_needs_no_torch(wheel: Path, tmp_path: Path) -> None:
    """The lines of docs/onnx.md, where there is nothing but NumPy, ONNX Runtime and the wheel."""
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    from onnx_support import small_rednet

    from pyinvolution.export import export

    root, host = tmp_path / "fresh", tmp_path / "host"
    venv.create(root, with_pip=False)
    interpreter = root / "bin/python"
    run(sys.executable, "-m", "pip", "--python", interpreter, "install", "--quiet", "--no-deps", "--no-index", wheel)
    host.mkdir()
    for name in ("numpy", "numpy.libs", "onnxruntime", "flatbuffers", "google", "packaging"):
        for folder in map(Path, sys.path):
            if (folder / name).is_dir() and not (host / name).exists():
                (host / name).symlink_to(folder / name)
    (site,) = root.glob("lib/python*/site-packages")
    (site / "host.pth").write_text(f"{host}\n")

    model = small_rednet()
    export(model, tmp_path / "rednet50.onnx", "onnx", torch.rand(2, 3, 64, 96), custom_ops=True)
    (code,) = [b.code for b in BLOCKS if b.name.startswith("docs/onnx.md") and "register_custom_ops_library" in b.code]
    program = tmp_path / "documented.py"
    program.write_text(f"{code}\nnp.save('logits.npy', logits)\nimport sys\nassert 'torch' not in sys.modules\n")
    run("bash", "-c", f"cd {tmp_path} && {interpreter} -I {program}")
    found = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    torch.testing.assert_close(found, model.eval()(torch.zeros(1, 3, 224, 224)).detach(), rtol=1e-4, atol=1e-5)
    assert Path(run(interpreter, "-I", "-m", "pyinvolution.onnxruntime").strip()).is_relative_to(root)
    wrong = subprocess.run(
        [interpreter, "-I", "-c", "from pyinvolution import involution2d"], capture_output=True, text=True, check=False
    )
    assert "pyinvolution.involution2d needs torch, which is not installed" in wrong.stderr


@pytest.fixture(scope="module")
def programs(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build folder of tests/consumer, the examples and the blocks of docs/cpp.md, all copied out of the tree."""
    folder = tmp_path_factory.mktemp("consumer") / "consumer"
    shutil.copytree(ROOT / "tests/consumer", folder)
    shutil.copytree(ROOT / "cpp/examples", folder / "examples")
    guide = [block for block in BLOCKS if block.name.startswith("docs/cpp.md") and not block.reason]
    for language in ("cmake", "cpp"):
        for number, block in enumerate(block for block in guide if block.language == language):
            (folder / f"documented{number}.{language}").write_text(block.code)
    # Quick to compile rather than quick.
    settings = {"PATH": f"{python.parent}:{PATH}", "CMAKE_GENERATOR": "Ninja", "CXXFLAGS": "-O0 -Wall -Wextra -Werror"}
    if library := onnxruntime_library():
        # As a release has it; its header is a part of that of the release (tests/onnxruntime_api).
        release = folder.parent / "onnxruntime"
        shutil.copytree(ROOT / "tests/onnxruntime_api", release)
        shutil.copy(ROOT / "cpp/onnxruntime/abi.h", release)
        for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
            (release / name).symlink_to(library)
        settings |= {"CMAKE_INCLUDE_PATH": str(release), "CMAKE_LIBRARY_PATH": str(release)}
    commands = [line for b in guide if b.language == "bash" for line in b.commands() if line.startswith("cmake ")]
    assert len(commands) == 2
    for command in commands:
        run("bash", "-c", f"cd {folder} && {command}", **settings)
    return folder / "build"


def test_the_wheel_has_what_it_needs_and_no_more(wheel: Path) -> None:
    assert wheel.stat().st_size < 20e6
    names = zipfile.ZipFile(wheel).namelist()
    extension = "pyinvolution/share/pyinvolution/openvino/"
    for name in ("libpyinvolution.so", "libpyinvolution_core.so", "libpyinvolution_ort.so",
                 "include/pyinvolution/torch.h", "cli.py", "py.typed",
                 "share/cmake/pyinvolution/pyinvolutionConfig.cmake"):  # fmt: skip
        assert f"pyinvolution/{name}" in names
    sources = {path.name for path in (ROOT / "cpp/openvino").iterdir()}
    assert {name.removeprefix(extension) for name in names if name.startswith(extension)} == sources
    assert all(name.startswith(("pyinvolution/", "pyinvolution-")) for name in names)
    others = [name for name in names if not name.startswith(extension)]
    assert not [name for name in others if name.endswith((".cu", ".cpp", ".o", ".a"))]


def test_the_wheel_is_stripped_and_bound_to_no_torch(wheel: Path, tmp_path: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    for library in tmp_path.rglob("*.so"):
        assert ".symtab" not in run("readelf", "--section-headers", "--wide", library)
        dynamic = run("readelf", "--dynamic", library)
        assert not re.search("RPATH|RUNPATH|libtorch_cuda|libtorch_python|libc10|libcudart", dynamic)
        assert ("libtorch" in dynamic) == (library.name == "libpyinvolution.so")


def test_metadata_is_fit_for_the_index(wheel: Path) -> None:
    pytest.importorskip("twine")
    assert "PASSED" in run(sys.executable, "-m", "twine", "check", "--strict", wheel)


def test_auditwheel_sees_no_other_library_than_torch(wheel: Path) -> None:
    pytest.importorskip("auditwheel")
    text = " ".join(run(sys.executable, "-m", "auditwheel", "show", wheel).split())
    # Its verdict itself depends on the machine that compiled.
    assert re.search("manylinux_2_[0-9]+_x86_64|linux_x86_64|aarch64", text)
    external = set(re.findall(r"lib[\w+.-]+\.so[\w.]*", text)) - {"libtorch_cpu.so", "libpyinvolution.so"}
    assert external <= {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "libdl.so.2", "libpthread.so.0",
                        "librt.so.1", "ld-linux-x86-64.so.2"}, text  # fmt: skip


def test_a_fresh_environment_runs_the_wheel(python: Path) -> None:
    code = "import torch, pyinvolution as p; x, w = torch.ones(1, 2, 4, 4), torch.ones(1, 1, 3, 3, 4, 4); "
    code += "print(p.__file__, p.__version__, p.involution2d(x, w, padding=1).sum().item())"
    file, version, total = run(python, "-c", code).split()
    assert Path(file).is_relative_to(python.parents[1])
    assert version == pyinvolution.__version__
    assert float(total) == 200  # 2 channels x (4 corners of 4 taps, 8 edges of 6, 4 inner pixels of 9)


def test_cmake_needs_no_cuda_toolkit(programs: Path) -> None:
    cache = (programs / "CMakeCache.txt").read_text()
    assert "CUDAToolkit" not in cache
    assert "Torch_DIR" not in cache


def test_raw_pointers(programs: Path, tmp_path: Path) -> None:
    program = programs / "raw_pointers/raw_pointers"
    assert "libtorch" not in run("ldd", program)
    x, weight = torch.randn(1, 56, 56, 64), torch.randn(1, 56, 56, 4, 7, 7)
    (tmp_path / "in").write_bytes(x.numpy().tobytes() + weight.numpy().tobytes())
    text = run(program, tmp_path / "in", tmp_path / "out")
    assert f"pyinvolution {pyinvolution.__version__}:" in text
    found = torch.frombuffer(bytearray((tmp_path / "out").read_bytes()), dtype=torch.float32).view(1, 56, 56, 64)
    expected = involution2d(x.permute(0, 3, 1, 2), weight.permute(0, 3, 4, 5, 1, 2), padding=3)
    torch.testing.assert_close(found.permute(0, 3, 1, 2), expected)
    assert (
        subprocess.run([program, tmp_path / "none", tmp_path / "out"], check=False, capture_output=True).returncode == 1
    )


LAYERS = [
    lambda: Involution2d(32),
    lambda: Involution2d(32, 3, stride=2, bias=True, reduction=2),
    lambda: Involution2d(32, (4, 2), (1, 3), 2, group_channels=8, out_channels=8, bias=True),
    lambda: Involution2d(16, 5, norm_layer=None, activation=nn.GELU),
    lambda: Involution2d(32, 7, fused=False),
    lambda: Involution2d(32, 7, fused=True),
]
"""In the order of layers() in consumer/main.cpp."""


def test_torch_h_computes_what_python_does(programs: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shapes = {"x": (2, 8, 7, 6), "w": (2, 2, 3, 3, 4, 6), "bias": (8,), "reduced": (2, 4, 4, 6), "span": (18, 4, 1, 1),
              "span_bias": (18,), "shifted": (2, 2, 3, 3, 7, 6), "enlarged": (2, 4, 3, 3, 14, 18),
              "query": (2, 8, 7, 6), "large": (2, 8, 14, 15)}  # fmt: skip
    given = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    expected: dict[str, torch.Tensor] = {}

    def differentiate(name: str, function, *leaves: str) -> None:
        inputs = [given[leaf].clone().requires_grad_() for leaf in leaves]
        output = function(*inputs)
        first = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), inputs)
        expected[name] = output.detach()
        for order, grads in (("grad", first), ("grad_grad", second)):
            expected.update({f"{name}/{order}{i}": grad.detach() for i, grad in enumerate(grads)})

    window = {"stride": (2, 1), "padding": 1}
    differentiate("involution", lambda *inputs: involution2d(*inputs, **window), "x", "w", "bias")
    span = lambda *inputs: span_involution2d(*inputs, kernel_size=3, **window)  # noqa: E731
    differentiate("span", span, "x", "reduced", "span", "span_bias")
    differentiate("span_without_bias", span, "x", "reduced", "span")
    shift = {"border": "shift", "dilation": (2, 1)}
    differentiate("shifted", lambda *t: involution2d(*t, **shift), "x", "shifted", "bias")
    differentiate("enlarged", lambda *t: involution2d(*t, padding=1, upsample=(2, 3)), "x", "enlarged")
    differentiate("scores", lambda *t: local_correlation2d(*t, 3, groups=2, **shift), "query", "x")
    large = {"padding": (1, 0), "groups": 4, "upsample": (2, 3)}
    differentiate("large_scores", lambda *t: local_correlation2d(*t, (3, 2), **large), "large", "x")
    unbatched = (given["query"][0], given["x"][0], 3)
    expected["unbatched_scores"] = local_correlation2d(*unbatched, groups=2, border="shift")
    given["image"], given["kernels"] = torch.randn(2, 64, 9, 8), torch.randn(2, 4, 7, 7, 9, 8)
    documented = expected["documented"] = involution2d(given["image"], given["kernels"], padding=3)
    expected["documented/raw"] = documented.permute(0, 2, 3, 1)
    expected["unbatched"] = involution2d(given["x"][0], given["w"][0], **window)
    x = given["x"].clone().requires_grad_()
    (expected["only_input"],) = torch.autograd.grad(involution2d(x, given["w"], **window).sum(), x)

    for number, build in enumerate(LAYERS):
        name, layer = f"layer{number}", build()
        for norm in (m for m in layer.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
        torch.save(dict(layer.state_dict()), tmp_path / f"{name}.pt")
        image = given[name] = torch.randn(2, layer.channels, 13, 10)
        image = image.clone().requires_grad_()
        output = layer(image)
        output.square().mean().backward()
        expected |= {f"{name}/train": output.detach(), f"{name}/grad": image.grad}
        expected |= {f"{name}/grad/{key}": value.grad for key, value in layer.named_parameters()}
        expected |= {f"{name}/after/{key}": value for key, value in layer.named_buffers()}
        with torch.no_grad():
            expected |= {f"{name}/eval": layer.eval()(image[0]), f"{name}/clone": layer(image)}

    torch.save(given, tmp_path / "in.pt")
    run(programs / "app", tmp_path / "in.pt", tmp_path / "out.pt")
    found = dict(torch.load(tmp_path / "out.pt", weights_only=True))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


class Net(nn.Module):
    """The network of cpp/examples/train_step."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2, 1)
        self.first = Involution2d(32)
        self.norm = nn.BatchNorm2d(32)
        self.second = Involution2d(32, 5, 2, out_channels=64, bias=True)
        self.head = nn.Linear(64, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(self.stem(images))).relu()
        return self.head(self.second(x).relu().mean((2, 3)))


def test_train_step(programs: Path, tmp_path: Path) -> None:
    program = programs / "train_step/train_step"
    alone = [float(line.split()[-1]) for line in run(program).splitlines()]
    assert len(alone) == 5
    assert alone[-1] < alone[0]

    torch.manual_seed(0)
    net, images, labels = Net(10), torch.randn(8, 3, 33, 32), torch.randint(10, (8,))
    torch.save((images, labels), tmp_path / "data.pt")
    torch.save(dict(net.state_dict()), tmp_path / "state.pt")
    lines = run(program, tmp_path / "data.pt", tmp_path / "state.pt", tmp_path / "out.pt").splitlines()
    assert len(lines) == 5
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    for line in lines:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        assert float(line.split()[-1]) == pytest.approx(loss.item(), abs=1e-4)
    trained = dict(torch.load(tmp_path / "out.pt", weights_only=True))
    torch.testing.assert_close(trained, dict(net.state_dict()), rtol=1e-3, atol=1e-3)
    assert "there is no file" in fails(program, tmp_path / "none", tmp_path / "state.pt", tmp_path / "out.pt")
    for damaged in (b"noise", (tmp_path / "state.pt").read_bytes()[:500]):
        (tmp_path / "damaged.pt").write_bytes(damaged)
        error = fails(program, tmp_path / "data.pt", tmp_path / "damaged.pt", tmp_path / "out.pt")
        assert "damaged.pt is damaged, or not of torch.save" in error
    torch.save({**net.state_dict(), "more": labels}, tmp_path / "other.pt")
    assert "has more, which" in fails(program, tmp_path / "data.pt", tmp_path / "other.pt", tmp_path / "out.pt")


def test_infer_classifies_image_files_as_python_does(python: Path, programs: Path, tmp_path: Path) -> None:
    transforms, Image = pytest.importorskip("torchvision.transforms.v2"), pytest.importorskip("PIL.Image")
    torch.manual_seed(0)
    options = {"layers": [1], "stem": "small", "stem_channels": 32, "base_channels": 16}
    net = pyinvolution.models.create_model("rednet", num_classes=10, **options).eval()
    nn.init.normal_(net.head.weight)
    checkpoint = {
        "hyper_parameters": {"name": "rednet", "num_classes": 10, "options": options},
        "state_dict": {f"net.{key}": value for key, value in net.state_dict().items()},
    }
    torch.save(checkpoint, tmp_path / "model.ckpt")
    package = tmp_path / "model.pt2"
    # Loads the package in Python too, and compares.
    text = run(python, "-m", "pyinvolution", "export", tmp_path / "model.ckpt", "--format", "aoti",
               "--size", "64", "64", "--output", package)  # fmt: skip
    assert "free batch, height, width; largest difference" in text

    yy, xx = torch.meshgrid(torch.linspace(0, 255, 90), torch.linspace(0, 255, 120), indexing="ij")
    pixels = torch.stack([xx, yy, 255 - xx], -1).round().byte()
    image = Image.fromarray(pixels.numpy())
    (tmp_path / "labels.txt").write_text("\n".join(f"class {i}" for i in range(10)))
    cache = (programs / "CMakeCache.txt").read_text()
    kinds = ["ppm"] + [kind for kind, name in (("png", "PNG_LIBRARY"), ("jpg", "JPEG_LIBRARY"))
                       if re.search(rf"^{name}_RELEASE:FILEPATH=/", cache, re.MULTILINE)]  # fmt: skip
    prepare = transforms.Compose([
        transforms.ToImage(), transforms.Resize(73, antialias=True), transforms.CenterCrop(64),
        transforms.ToDtype(torch.float32, scale=True),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
    for kind in kinds:
        file = tmp_path / f"image.{kind}"
        image.save(file)
        expected = net(prepare(Image.open(file))[None]).softmax(1)[0]
        # No interpreter, also not one that a library would start.
        lines = run(programs / "infer/infer", package, file, "--size", "64", "--labels", tmp_path / "labels.txt",
                    PYTHONHOME="/nowhere").splitlines()  # fmt: skip
        assert len(lines) == 5
        for line, (probability, index) in zip(lines, zip(*expected.topk(5), strict=True), strict=True):
            # JPEG decoders may differ by a level.
            assert abs(float(line.split()[1]) - probability) < (2e-2 if kind == "jpg" else 1e-4), kind
            assert kind == "jpg" or line.split(maxsplit=2)[::2] == [str(index.item()), f"class {index}"]
    assert "libpython" not in run("ldd", programs / "infer/infer")

    if onnxruntime_library() and find_spec("onnxscript"):
        onnx = tmp_path / "model.onnx"
        run(python, "-m", "pyinvolution", "export", tmp_path / "model.ckpt", "--format", "onnx", "--custom-ops",
            "--size", "64", "64", "--output", onnx)  # fmt: skip
        kernels = run(python, "-m", "pyinvolution.onnxruntime").strip()
        for more in ([], ["--kernels", kernels]):
            lines = run(programs / "infer/infer", onnx, tmp_path / "image.ppm", "--size", "64", *more).splitlines()
            expected = net(prepare(Image.open(tmp_path / "image.ppm"))[None]).softmax(1)[0]
            for line, (probability, index) in zip(lines, zip(*expected.topk(5), strict=True), strict=True):
                assert abs(float(line.split()[1]) - probability) < 1e-4
                assert line.split()[0] == str(index.item())
        wrong = [programs / "infer/infer", onnx, tmp_path / "image.ppm", "--kernels", tmp_path / "labels.txt"]
        result = subprocess.run(wrong, capture_output=True, text=True, check=False)
        assert result.returncode == 1
        assert "labels.txt" in result.stderr

    (tmp_path / "broken.ppm").write_bytes(b"P6 120 90 255\n" + bytes(100))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff" + bytes(100))
    for name in ("broken.ppm", "broken.png", "broken.jpg", "labels.txt", "none.ppm"):
        result = subprocess.run(
            [programs / "infer/infer", package, tmp_path / name], capture_output=True, text=True, check=False
        )
        assert result.returncode == 1
        assert name in result.stderr
