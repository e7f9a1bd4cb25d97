"""torch.jit.trace of what people write: saved, loaded in a fresh process, the same results and gradients as eager."""

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pyinvolution import (
    Involution2d,
    _native,
    convert,
    involution2d,
    normalization,
    optimize_for_inference,
    span_involution2d,
)
from pyinvolution.models import create_model

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
SMALL = {"layers": (1, 1), "stem": "small", "stem_channels": 32, "base_channels": 16}
OTHER_SHAPES = ((1, 41, 55), (3, 64, 32))


class Functions(nn.Module):
    """Both functions in a module of a user, with a bias and with a kernel of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.Conv2d(3, 9, 3, padding=1, stride=2)
        self.reduce = nn.Conv2d(3, 4, 1)
        self.span = nn.Conv2d(4, 9, 1)
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        y = involution2d(x, self.kernels(x).unflatten(1, (1, 3, 3)), self.bias, 2, 1)
        z = span_involution2d(x, self.reduce(x), self.span.weight, self.span.bias, 3, padding=1)
        return nn.functional.avg_pool2d(z, 2, ceil_mode=True) + y


def layers() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        Involution2d(32, bias=True),
        Involution2d(32, (4, 2), 2, 2, group_channels=8, out_channels=16),
        Involution2d(16, 3, norm_layer=None, fused=False),
    )


def rednet() -> nn.Module:
    return create_model("rednet", num_classes=5, **SMALL)


def detection_backbone() -> nn.Module:
    backbone = create_model("rednet", **{**SMALL, "layers": (1, 1, 1, 1)}, num_classes=0, global_pool="")
    return create_model("retinanet", backbone=backbone, num_classes=5, channels=32).backbone


def converted_resnet() -> nn.Module:
    return convert(pytest.importorskip("torchvision").models.resnet18(num_classes=5))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "functions": Functions,
    "layers": layers,
    "rednet": rednet,
    "converted": converted_resnet,
    "backbone": detection_backbone,
    "optimized": lambda: optimize_for_inference(rednet()),
}
LOADED = """
import sys, torch, pyinvolution
for name in sys.argv[1:]:
    net, images = torch.jit.load(name + ".pt"), torch.load(name + ".in")
    with torch.no_grad():
        torch.save([net(x) for x in images], name + ".out")
"""


def make(name: str) -> nn.Module:
    """A model whose norms have seen images, so that its outputs are of ordinary size in evaluation mode."""
    torch.manual_seed(0)
    net = MODELS[name]()
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.9
    with torch.no_grad():
        net.train()(torch.randn(4, 3, 64, 64))
    return net


def traced(net: nn.Module, *inputs: Tensor) -> torch.jit.ScriptModule:
    """The trace, in which this package lets no value that belongs to the example decide."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program = torch.jit.trace(net, inputs)
    assert not [w for w in caught if issubclass(w.category, torch.jit.TracerWarning) and "pyinvolution" in w.filename]
    return program


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "backbone"])
def test_a_trace_computes_what_eager_does_in_any_size(
    name: str, training: bool, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A trace has the norms' modules, whose results are rounded in another way than those of the one operator.
    monkeypatch.setattr(normalization, "_is_one", lambda *_: False)
    net = make(name).train(training)
    with torch.set_grad_enabled(grad):
        program = traced(net, torch.randn(2, 3, 40, 48))
    for batch, *size in OTHER_SHAPES:
        image = torch.randn(batch, 3, *size)
        torch.testing.assert_close(program(image), net(image))


def test_a_saved_trace_runs_in_a_fresh_process(tmp_path: Path) -> None:
    expected = {}
    for name in MODELS:
        net = make(name).eval()
        images = [torch.randn(batch, 3, *size) for batch, *size in OTHER_SHAPES]
        if name == "backbone":  # a feature pyramid adds maps of even sizes
            images = [torch.randn(batch, 3, 64, 96) for batch in (1, 3)]
        torch.jit.save(torch.jit.trace(net, torch.randn(2, 3, 64, 64), strict=False), tmp_path / f"{name}.pt")
        torch.save(images, tmp_path / f"{name}.in")
        expected[name] = [net(image) for image in images]
    subprocess.run([sys.executable, "-W", "ignore", "-c", LOADED, *MODELS], cwd=tmp_path, check=True)
    found = {name: torch.load(tmp_path / f"{name}.out") for name in MODELS}
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["functions", "layers", "converted"])
def test_a_loaded_trace_has_all_gradients(name: str, tmp_path: Path) -> None:
    net = make(name).double().train()
    torch.jit.save(traced(net, torch.randn(2, 3, 32, 40).double()), tmp_path / "net.pt")
    program = torch.jit.load(tmp_path / "net.pt")
    image = torch.randn(3, 3, 64, 48).double().requires_grad_()

    def gradients(module: nn.Module) -> dict[str, Tensor]:
        leaves = {"input": image, **dict(module.named_parameters())}
        return dict(zip(leaves, torch.autograd.grad(module(image).square().mean(), list(leaves.values())), strict=True))

    torch.testing.assert_close(gradients(program), gradients(net))


def test_what_has_no_derivative_says_so() -> None:
    program = traced(optimize_for_inference(rednet()), torch.randn(2, 3, 40, 48))
    image = torch.randn(1, 3, 40, 48, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"involution_layer2d has no derivative|scale, shift and relu have no"):
        program(image).sum().backward()


def test_wrong_arguments_are_found_while_tracing() -> None:
    for module, shape, words in (
        (Involution2d(32), (1, 16, 8, 8), r"input has shape \(1, 16, 8, 8\), expected "),
        (Functions(), (1, 3, 8, 8), r"bias has shape \(1,\), expected \(3,\)"),
    ):
        if isinstance(module, Functions):
            module.bias = nn.Parameter(torch.randn(1))
        with pytest.raises(ValueError, match=words):
            torch.jit.trace(module, torch.randn(shape))


PROGRAM = """
#include <torch/script.h>

int main(int, char** argv) {
  c10::InferenceMode inference;
  torch::jit::Module net = torch::jit::load(argv[1]);
  torch::jit::Module data = torch::jit::load(argv[2]);
  torch::Tensor found = net.forward({data.attr("image").toTensor()}).toTensor();
  const float difference = (found - data.attr("expected").toTensor()).abs().max().item<float>();
  return difference < 1e-5f ? 0 : 1;
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_saved_trace_runs_in_cpp(tmp_path: Path) -> None:
    net = make("rednet").eval()
    torch.jit.save(traced(net, torch.randn(2, 3, 40, 48)), tmp_path / "net.pt")
    image = torch.randn(3, 3, 33, 64)
    holder = nn.Module()
    holder.register_buffer("image", image)
    holder.register_buffer("expected", net(image).detach())
    torch.jit.save(torch.jit.script(holder), tmp_path / "data.pt")
    (tmp_path / "main.cpp").write_text(PROGRAM)
    base, package = Path(torch.__file__).parent, _native.folder()
    libraries = [f"-L{base / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{base / 'lib'}:{package}"]
    includes = [f"-I{base / 'include'}", f"-I{base / 'include/torch/csrc/api/include'}"]
    command = ["g++", "-O0", "-std=c++20", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    program = tmp_path / "main"
    subprocess.run(
        [*command, *includes, tmp_path / "main.cpp", "-Wl,--no-as-needed", package / "libpyinvolution.so", *libraries,
         "-o", program], check=True,
    )  # fmt: skip
    arguments = [program, tmp_path / "net.pt", tmp_path / "data.pt"]
    subprocess.run(arguments, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
