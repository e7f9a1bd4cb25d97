"""The pages about other frameworks and papers: their code where its packages are installed, and what it computes."""

import math
from functools import partial

import pytest
import torch
from documents import defined
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pyinvolution import Involution2d
from pyinvolution.models import create_model

draw = partial(torch.randn, dtype=torch.float64)


# --- frameworks -------------------------------------------------------------------------------------------------------


def test_ultralytics():
    tasks = pytest.importorskip("ultralytics.nn.tasks")
    try:
        model = defined("frameworks", "DetectionModel")["model"]
    finally:
        del tasks.Involution2d
    assert (model.model[2].channels, model.model[2].kernel_size) == (32, (7, 7))


def test_mmengine():
    registry = pytest.importorskip("mmengine.registry")
    names = defined("frameworks", "MODELS.build")
    assert type(names["layer"]) is Involution2d
    assert registry.MODELS.get("carafe") is names["CARAFEPack"]


def counted(model, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return {str(operator): flops // 2 for operator, flops in counter.get_flop_counts()["Global"].items()}


def test_fvcore():
    pytest.importorskip("fvcore")
    names = defined("frameworks", "FlopCountAnalysis")
    expected = counted(names["model"], torch.randn(1, 3, 64, 64))
    found = names["counts"].by_operator()
    ours = [flops for operator, flops in found.items() if "involution" in operator]
    assert sum(ours) == sum(flops for operator, flops in expected.items() if "involution" in operator) > 0
    assert found["conv"] == expected["aten.convolution"]


def test_ptflops():
    pytest.importorskip("ptflops")
    names = defined("frameworks", "get_model_complexity_info")
    expected = counted(names["model"], torch.randn(1, 3, 64, 64))
    # Its product of the classifier counts the bias, too.
    assert names["macs"] == sum(expected.values()) + names["model"].head.out_features


def test_thop():
    thop = pytest.importorskip("thop")
    names = defined("frameworks", "thop.profile")
    model, x = names["model"], names["x"]
    expected = counted(model, x)
    ours = sum(flops for operator, flops in expected.items() if "involution" in operator)
    assert names["operators"](model, x) == ours > 0
    theirs = thop.profile(model, (x,), verbose=False)[0]
    assert names["macs"] - theirs == ours
    # Its own count has every convolution once, and norms and poolings beside them.
    assert expected["aten.convolution"] < theirs < 1.1 * expected["aten.convolution"]


# --- papers -----------------------------------------------------------------------------------------------------------


def test_raft():
    _utils = pytest.importorskip("torchvision.models.optical_flow._utils")
    upsample_flow = defined("family", "def upsample_flow")["upsample_flow"]
    torch.manual_seed(0)
    for channels, factor, size in ((2, 8, (3, 5)), (3, 4, (4, 3)), (1, 1, (4, 4))):
        flow, mask = draw(2, channels, *size).requires_grad_(), draw(2, 9 * factor**2, *size).requires_grad_()
        actual, expected = upsample_flow(flow, mask, factor), _utils.upsample_flow(flow, mask, factor)
        torch.testing.assert_close(actual, expected)
        upstream = torch.randn_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, (flow, mask), upstream), torch.autograd.grad(expected, (flow, mask), upstream)
        )


# As CSPN's class pads them: where the gates of each direction, from the top left to the bottom right, are placed in an
# image that is larger by one pixel on each side (left, right, top, bottom).
PADS = [
    (0, 2, 0, 2), (1, 1, 0, 2), (2, 0, 0, 2), (0, 2, 1, 1), (2, 0, 1, 1), (0, 2, 2, 0), (1, 1, 2, 0), (2, 0, 2, 0),
]  # fmt: skip


def test_cspn():
    propagate = defined("family", "def propagate")["propagate"]
    torch.manual_seed(0)
    guidance, depth = draw(2, 8, 6, 7), draw(2, 1, 6, 7)
    gates = torch.stack([F.pad(guidance[:, k], pads) for k, pads in enumerate(PADS)], 1)
    gates = gates / gates.abs().sum(1, keepdim=True)
    rest = 1 - gates.sum(1, keepdim=True)[:, :, 1:-1, 1:-1]
    result = depth
    for _ in range(4):
        moved = torch.stack([F.pad(result[:, 0], pads) for pads in PADS], 1)
        result = rest * depth + (gates * moved).sum(1, keepdim=True)[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(propagate(guidance, depth), result)


@pytest.mark.parametrize(("frames", "colours", "size"), [(4, 1, 5), (2, 3, 3)])
def test_kpn(frames, colours, size):
    predict = defined("family", "def predict")["predict"]
    torch.manual_seed(0)
    burst, core = draw(2, frames, colours, 6, 7), draw(2, frames * size**2 * colours, 6, 7)
    kernels = core.view(2, frames, size**2, colours, 6, 7)
    padded = F.pad(burst, [size // 2] * 4)
    taps = [padded[..., i : i + 6, j : j + 7] for i in range(size) for j in range(size)]
    expected = (torch.stack(taps, 2) * kernels).sum(2).mean(1)
    torch.testing.assert_close(predict(burst, core, size), expected)


def test_the_count_has_each_operator_of_a_network():
    """The tests of the counters rest on this count."""
    model = create_model("rednet26").eval()
    layers = [module for module in model.modules() if isinstance(module, Involution2d)]
    sizes = {}
    for layer in layers:
        layer.register_forward_hook(lambda layer, _, output: sizes.update({layer: output.shape[2:]}))
    found = counted(model, torch.randn(1, 3, 64, 64))
    expected = sum(layer.channels * math.prod((*layer.kernel_size, *sizes[layer])) for layer in layers)
    assert sum(flops for operator, flops in found.items() if operator.startswith("pyinvolution.")) == expected > 0
