"""Modules that were replaced, wrapped, hooked or patched compute what they say, as their twin does, everywhere."""

import copy

import pytest
import torch
from surgeries import (
    ANYWHERE,
    HOOKS,
    ON_CONVOLUTIONS,
    Adapter,
    Residual,
    assert_same,
    operate,
    patched,
    plain,
    spread,
    trained,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.testing._internal.two_tensor import TwoTensor

from pyinvolution import Involution2d, convert, optimize_for_inference, reference
from pyinvolution.models import create_model

IN_LAYER = [
    *((name, surgery) for surgery in ON_CONVOLUTIONS for name in ("span", "reduce.conv", "project")),
    *((name, surgery) for surgery in ANYWHERE for name in ("reduce", "reduce.norm", "reduce.act", "pool", "")),
]


def pair(dtype=torch.float64, **options):
    """A layer and its twin."""
    torch.manual_seed(0)
    options = {"kernel_size": 3, "stride": 2, "group_channels": 4, "out_channels": 6, **options}
    layer = spread(Involution2d(8, dtype=dtype, **options))
    return layer, plain(layer)


def networks():
    torch.manual_seed(0)
    model = create_model(
        "rednet", layers=[1], stem="small", stem_channels=16, base_channels=8, group_channels=4, num_classes=3
    )
    model = spread(model.double())
    return model, plain(model)


IN_NETWORK = [
    *((f"{layer}.span", name) for layer in ("stem.involution", "layer1.0.involution") for name in ON_CONVOLUTIONS),
    *(
        (name, surgery)
        for surgery in ANYWHERE
        for name in ("layer1.0.involution", "layer1.0.norm3", "layer1.0", "stem")
    ),
    *((name, surgery) for surgery in ANYWHERE for name in ("layer1", "head", "")),
]


def operated(models, name, surgery):
    return [operate(model, name, {**ANYWHERE, **ON_CONVOLUTIONS}[surgery]) for model in models]


def image(channels=8, size=7, dtype=torch.float64):
    return torch.randn(2, channels, size, 6, generator=torch.Generator().manual_seed(1), dtype=dtype)


def outputs(models, x):
    with torch.no_grad():
        return [model(x) for model in models]


@pytest.mark.parametrize(("name", "surgery"), IN_LAYER)
def test_layer(name, surgery):
    untouched, twin = pair()
    models = operated((copy.deepcopy(untouched), twin), name, surgery)
    for mode in (True, False):
        found, expected = (trained(model.train(mode), image()) for model in models)
        assert_same(found, expected)
    if "backward" not in surgery:
        assert not torch.allclose(trained(untouched.eval(), image())["output"], expected["output"])


@pytest.mark.parametrize(("name", "surgery"), IN_NETWORK)
def test_network(name, surgery):
    models = operated(networks(), name, surgery)
    results = []
    for model in models:
        try:
            results.append(trained(model, image(3, 16)))
        except RuntimeError as error:
            # Backward hooks and operators in place do not go together.
            if "backward" not in surgery or "modified inplace" not in str(error):
                raise
            results.append(None)
    assert (results[0] is None) == (results[1] is None)
    if results[0] is not None:
        assert_same(*results)


@pytest.mark.parametrize(("name", "surgery"), IN_LAYER)
def test_functional_call(name, surgery):
    models = operated(pair(), name, surgery)

    def call(model, x):
        parameters = {key: 0.5 * value + 0.1 for key, value in model.named_parameters()}
        return functional_call(model, parameters, (x,))

    assert_same(*(trained(model, image(), call) for model in models))


@pytest.mark.parametrize(("name", "surgery"), IN_LAYER)
def test_optimized_layer(name, surgery):
    layer, twin = (model.eval() for model in operated(pair(), name, surgery))
    norm = spread(nn.BatchNorm2d(6).double()).eval()
    optimized = optimize_for_inference(nn.Sequential(layer, norm), image())
    found, expected = outputs((optimized, nn.Sequential(twin, norm)), image())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*outputs((optimize_for_inference(layer, image()), twin), image()))


@pytest.mark.parametrize(("name", "surgery"), IN_NETWORK)
def test_optimized_network(name, surgery):
    model, twin = (model.eval() for model in operated(networks(), name, surgery))
    found, expected = outputs((optimize_for_inference(model, image(3, 16)), twin), image(3, 16))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("surgery", ON_CONVOLUTIONS)
def test_surgery_after_optimizing(surgery):
    """On the constant layer that computes in one operator."""
    torch.manual_seed(0)
    layer = spread(Involution2d(16, 3, 2)).eval()
    optimized = optimize_for_inference(nn.Sequential(layer, nn.ReLU()))
    before, (expected,) = optimized(image(16, dtype=torch.float32)), outputs([layer], image(16, dtype=torch.float32))
    torch.testing.assert_close(before, expected.relu(), rtol=1e-4, atol=1e-5)
    for name in ("span", "reduce.conv"):
        changed, same = copy.deepcopy(optimized), copy.deepcopy(optimized)
        for model in (changed, same):
            operate(model, f"0.{name}", ON_CONVOLUTIONS[surgery]).eval()
        folded = same.get_submodule("0")
        x = image(16, dtype=torch.float32)
        with torch.no_grad():
            kernels = folded.span(folded.reduce(folded.pool(x))).double().unflatten(1, (1, 3, 3))
            expected = reference.involution2d(x.double(), kernels, None, 2, 1).relu()
            torch.testing.assert_close(changed(x).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("surgery", ["sequence", "adapter", "parametrization", "patched", "forward hook", "subclass"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_traced_and_exported(surgery, dtype):
    layer, twin = (model.eval() for model in operated(pair(dtype), "span", surgery))
    x = image(dtype=dtype)
    (expected,) = outputs([twin], x)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {}
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(*outputs([program.module()], x), expected, **tolerance)
    torch._dynamo.reset()
    torch.testing.assert_close(*outputs([torch.compile(layer, backend="aot_eager")], x), expected, **tolerance)
    traced = torch.fx.symbolic_trace(nn.Sequential(layer))
    torch.testing.assert_close(*outputs([traced], x), expected, **tolerance)


@pytest.mark.parametrize("surgery", ON_CONVOLUTIONS)
def test_feature_extraction(surgery):
    """timm's, and torchvision's through torch.fx."""
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    features = pytest.importorskip("timm.models._features")
    model, twin = (model.eval() for model in operated(networks(), "layer1.0.involution.span", surgery))
    (expected,) = outputs([nn.Sequential(twin.stem, twin.pool, twin.layer1)], image(3, 16))
    kept = features.FeatureListNet(model, out_indices=(0, 1), output_fmt="NCHW", flatten_sequential=False)
    torch.testing.assert_close(outputs([kept], image(3, 16))[0][-1], expected)
    extracted = feature_extraction.create_feature_extractor(model, {"layer1": "out"}) if surgery != "patched" else None
    if extracted is not None:
        torch.testing.assert_close(outputs([extracted], image(3, 16))[0]["out"], expected)


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_global_hooks(register):
    """They see every module, so that every module is called."""
    model, twin = networks()
    optimized = optimize_for_inference(copy.deepcopy(model), image(3, 16))

    def calls_of(model, run):
        calls, names = [], {module: name for name, module in model.named_modules()}
        handle = register(lambda module, *rest: calls.append(names.get(module)))
        try:
            return run(model, image(3, 16)), calls
        finally:
            handle.remove()

    (found, calls), (expected, expected_calls) = (calls_of(network, trained) for network in (model, twin))
    assert calls == expected_calls
    assert_same(found, expected)
    for seen in (calls, calls_of(optimized, lambda network, x: outputs([network], x))[1]):
        assert {"stem.involution.span", "layer1.0.involution.span", "layer1.0.involution.reduce.conv"} <= {*seen}


def test_parts_of_reduce_in_another_order():
    """Neither is a norm folded into a convolution that it does not follow."""
    layers = pair()
    for layer in layers:
        layer.reduce = nn.Sequential()
        torch.manual_seed(3)
        layer.reduce.add_module("conv", nn.Conv2d(8, 2, 1).double())
        layer.reduce.add_module("act", nn.ReLU())
        layer.reduce.add_module("norm", spread(nn.BatchNorm2d(2).double()))
    assert_same(*(trained(layer, image()) for layer in layers))
    layer, twin = (layer.eval() for layer in layers)
    torch.testing.assert_close(*outputs((optimize_for_inference(layer, image()), twin), image()))
    layer, twin = (operate(layer, "reduce", Residual).eval() for layer in pair())
    torch.testing.assert_close(*outputs((optimize_for_inference(layer, image()), twin), image()))


def test_another_pool():
    layer, twin = pair()
    for model in (layer, twin):
        model.pool = nn.MaxPool2d(2, 2, ceil_mode=True)
    assert_same(trained(layer, image()), trained(twin, image()))
    layer, twin = layer.eval(), twin.eval()
    torch.testing.assert_close(*outputs((optimize_for_inference(layer, image()), twin), image()))


def test_tied_weights():
    layers = pair(stride=1, out_channels=None, kernel_size=1, group_channels=4, reduction=4)
    networks = []
    for layer in layers:
        other = copy.deepcopy(layer)
        if "forward" in vars(other):
            other = plain(copy.deepcopy(layer))
        other.span.weight = layer.span.weight
        other.reduce.conv.weight = layer.reduce.conv.weight
        networks.append(nn.Sequential(layer, other))
    assert_same(*(trained(network, image()) for network in networks))
    found, expected = (network.eval() for network in networks)
    torch.testing.assert_close(*outputs((optimize_for_inference(found, image()), expected), image()))


def test_tensor_subclasses():
    """Two tensors that are computed with one beside the other."""
    layer, twin = pair()
    for model in (layer, twin):
        weight = model.span.weight.detach()
        model.span.weight = nn.Parameter(TwoTensor(weight, 2 * weight))
    found, expected = outputs((layer.eval(), twin.eval()), image())
    assert isinstance(expected, TwoTensor)
    torch.testing.assert_close(found.a, expected.a)
    torch.testing.assert_close(found.b, expected.b)
    assert not torch.equal(found.a, found.b)


def test_quantized_weights():
    quantized = pytest.importorskip("torch.ao.nn.quantized.dynamic")
    assert quantized  # Linear layers are what it has for a 1x1 convolution.

    class Int8(nn.Module):
        """The weight in 8 bits, of which the convolution's own is the rounded one."""

        def __init__(self, conv: nn.Conv2d) -> None:
            super().__init__()
            self.weight, self.bias = conv.weight, conv.bias
            self.linear = quantized.Linear.from_float(linear(conv))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.movedim(1, -1)).movedim(-1, 1)

    def linear(conv: nn.Conv2d) -> nn.Linear:
        made = nn.Linear(conv.in_channels, conv.out_channels)
        made.weight, made.bias = nn.Parameter(conv.weight.detach().flatten(1)), conv.bias
        made.qconfig = torch.ao.quantization.default_dynamic_qconfig
        return made

    layer, twin = (operate(model, "span", Int8).eval() for model in pair(torch.float32))
    torch.testing.assert_close(*outputs((layer, twin), image(dtype=torch.float32)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("surgery", [*HOOKS, "patched", "old weight_norm", "old spectral_norm"])
def test_convert_refuses_by_name(surgery):
    make = {**ANYWHERE, **ON_CONVOLUTIONS}[surgery]
    conv = nn.Sequential()
    conv.add_module("free", nn.Conv2d(16, 16, 3, padding=1))
    conv.add_module("held", make(nn.Conv2d(16, 16, 3, padding=1)))
    with pytest.raises(ValueError, match="match picks held, which no involution can replace: it has hooks"):
        convert(copy.deepcopy(conv), "held")
    converted = convert(conv)
    assert [type(module) for module in converted] == [Involution2d, nn.Conv2d]
    assert not any(isinstance(module, Involution2d) for module in converted.held.modules())


@pytest.mark.parametrize("surgery", ["parametrization", "weight_norm", "spectral_norm", "subclass"])
def test_convert_leaves_other_classes(surgery):
    held = ON_CONVOLUTIONS[surgery](nn.Conv2d(16, 16, 3, padding=1))
    converted = convert(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), held))
    assert isinstance(converted[0], Involution2d)
    assert converted[1] is held
    with pytest.raises(ValueError, match="picks no convolution"):
        convert(nn.Sequential(held))


def test_the_cases_are_not_empty():
    """What a surgery does changes the result, of the convolution that it is done to."""
    conv = nn.Conv2d(4, 4, 1).double()
    x = image(4)
    for name, surgery in ON_CONVOLUTIONS.items():
        if "backward" not in name and "weight_norm" not in name:
            assert not torch.equal(operate(copy.deepcopy(conv), "", surgery)(x), conv(x)), name
    assert Adapter(conv).weight is conv.weight
    assert not torch.equal(patched(copy.deepcopy(conv))(x), conv(x))
