"""RedNet in training: what it does not keep for backward changes neither gradients nor buffers."""

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from types import MethodType

import pytest
import torch
from surgeries import FORWARDS, in_order
from torch import nn
from torch.nn.utils import parametrizations
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from pyinvolution import normalization
from pyinvolution.models import create_model
from pyinvolution.models._memory import forget_activations
from pyinvolution.models.rednet import Bottleneck, Stem
from pyinvolution.normalization import conv_norm, norm_relu

SMALL = {"layers": [2, 1], "stem": "small", "stem_channels": 32, "base_channels": 16, "num_classes": 3}


def stem_by_operator(self, x):
    for norm, act, layer in (("norm1", "act1", "conv1"), ("norm2", "act2", "involution"), ("norm3", "act3", "conv2")):
        x = norm_relu(getattr(self, norm), getattr(self, act), getattr(self, layer)(x))
    return x


def block_by_operator(self, x):
    y = norm_relu(self.norm1, self.act, self.conv1(x))
    y = norm_relu(self.norm2, self.act, self.involution(y))
    shortcut = x if self.downsample is None else conv_norm(self.downsample, x)
    return norm_relu(self.norm3, self.act, self.conv3(y), shortcut)


@pytest.fixture(autouse=True, params=["modules", "operator"])
def _norms(request, monkeypatch):
    """Norms and ReLUs as modules, with which `in_order` agrees to the bit, or in one; the second has tests of its own
    (test_normalization.py), and here `in_order` uses it too."""
    if request.param == "modules":
        monkeypatch.setattr(normalization, "_is_one", lambda *_: False)
    else:
        monkeypatch.setitem(FORWARDS, Stem, stem_by_operator)
        monkeypatch.setitem(FORWARDS, Bottleneck, block_by_operator)


def pair(dtype=torch.float32, **kwargs):
    """A network without a zero weight, and a copy of it for `in_order`."""
    torch.manual_seed(0)
    model = create_model("rednet", zero_init_residual=False, dtype=dtype, **{**SMALL, **kwargs})
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(-1.5, 1.5)
                module.bias.normal_()
    return model, copy.deepcopy(model)


def image(dtype=torch.float32, seed=1, size=16):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def penalty(output):
    return (output.double() * torch.arange(1.0, output.shape[1] + 1)).square().sum()


def step(model, x, between=lambda model: None, steps=2):
    """Two training steps without an optimizer: outputs, gradients and buffers."""
    torch.manual_seed(2)
    outputs = []
    for _ in range(steps):
        outputs.append(model(x))
        loss = penalty(outputs[-1])
        between(model)
        loss.backward()
    return state(model, outputs)


def state(model, outputs=()):
    return {
        **{f"output {index}": output.detach() for index, output in enumerate(outputs)},
        **{f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()},
        **dict(model.named_buffers()),
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        assert value is None or torch.equal(found[name], value), name
    assert any(value is not None and value.abs().sum() > 0 for name, value in expected.items() if "gradient" in name)


def kept_bytes(model, x):
    """What a forward pass has allocated and not freed, the graph that it has made being alive."""
    model(x)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as memory:
        output = model(x)
    assert output.requires_grad
    return sum(event.self_cpu_memory_usage for event in memory.events())


# --- surgeries --------------------------------------------------------------------------------------------------------


class Noise(nn.Module):
    def forward(self, x):
        return x.relu() + 0.1 * torch.randn_like(x)


class Counting(nn.Module):
    """An activation with a buffer and an attribute, both of which change its result."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(()))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        with torch.no_grad():
            self.average.lerp_(x.abs().mean().to(self.average), 0.5)
        return (x - self.average.to(x)).relu() * (1 + 0.1 * self.calls)


class StochasticDepth(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) * (torch.rand(()) < 0.5)


class OtherNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 1.5


class Wrapped(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x).clamp(max=1.0)


class Scribbling(nn.Module):
    """Changes its input behind autograd's back."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        x.data.mul_(0.5)
        return self.layer(x)


def replace(name, make, stem=None):
    def surgery(model):
        for block in [*model.layer1, model.stem]:
            if (own := name if block is not model.stem else stem) is not None:
                setattr(block, own, make(getattr(block, own)))
        return model

    return surgery


def norms(model):
    return [module for module in model.modules() if type(module) is nn.BatchNorm2d]


def halved(grads):
    return tuple(None if grad is None else grad * 0.5 for grad in grads)


def hooked(register):
    def surgery(model):
        for block in model.layer1:
            for module in (block.conv1, block.norm1, block.act, block.involution, block.conv3):
                register(module)
        return model

    return surgery


def patched(model):
    def forward(self, x):
        y = nn.functional.relu_(x)
        y.data.mul_(0.5)
        return y

    for block in model.layer1:
        block.act.forward = MethodType(forward, block.act)
    return model


def scribbling_hook(model):
    """Changes an activation behind autograd's back."""

    def hook(module, inputs, output):
        output.data.mul_(0.5)

    model.layer1[0].act.register_forward_hook(hook)
    return model


def frozen(model, names=("weight", "bias")):
    for norm in norms(model):
        for name in names:
            getattr(norm, name).requires_grad_(False)
    return model


def without(model, names=("weight", "bias")):
    for norm in norms(model.layer1):
        for name in names:
            setattr(norm, name, None)
        if norm.bias is not None:
            norm.bias.requires_grad_(False)
    return model


def some_in_eval(model):
    model.layer1[0].norm1.eval()
    model.layer1[1].norm2.eval()
    return model


def settings(model):
    for norm in norms(model):
        norm.momentum, norm.eps = None, 0.1
    for norm in norms(model.layer1):
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    return model


def strided_parameters(model):
    for norm in norms(model):
        norm.weight = nn.Parameter(norm.weight.detach().repeat_interleave(2)[::2])
    return model


SURGERIES = {
    "none": lambda model: model,
    "dropout": replace("act", lambda act: nn.Sequential(act, nn.Dropout(0.3)), "act1"),
    "dropout in place": replace("conv3", lambda conv: nn.Sequential(nn.Conv2d(16, 16, 1), nn.Dropout(0.3, True), conv)),
    "RReLU": replace("act", lambda act: nn.RReLU(), "act2"),
    "GELU": replace("act", lambda act: nn.GELU(), "act2"),
    "ReLU, not in place": replace("act", lambda act: nn.ReLU(), "act2"),
    "noise": replace("act", lambda act: Noise(), "act1"),
    "buffer and counter": replace("act", lambda act: Counting(), "act1"),
    "stochastic depth": replace("involution", StochasticDepth, "involution"),
    "subclass of the norm": replace("norm1", lambda norm: OtherNorm(16)),
    "wrapped norm": replace("norm1", Wrapped, "norm2"),
    "wrapped layer": replace("conv3", Wrapped, "conv2"),
    "scribbling layer": replace("conv3", Scribbling, "conv2"),
    "two norms": replace("norm1", lambda norm: nn.Sequential(norm, nn.BatchNorm2d(16)), None),
    "ReLU before the layer": replace("conv3", lambda conv: nn.Sequential(nn.ReLU(), conv), "conv2"),
    "scribbling pool": lambda model: setattr(model, "pool", Scribbling(model.pool)) or model,
    "group norm": replace("norm2", lambda norm: nn.GroupNorm(4, 16)),
    "instance norm": replace("norm2", lambda norm: nn.InstanceNorm2d(16, affine=True)),
    "sequence of layers": replace("involution", lambda layer: nn.Sequential(layer, nn.Conv2d(16, 16, 3, padding=1))),
    "spectral_norm": replace("conv3", lambda conv: nn.utils.spectral_norm(conv), "conv2"),
    "spectral_norm, parametrized": replace("conv3", lambda conv: parametrizations.spectral_norm(conv), "conv2"),
    "weight_norm": replace("conv3", lambda conv: parametrizations.weight_norm(conv), "conv2"),
    "parametrized norm": replace(
        "norm1", lambda norm: nn.utils.parametrize.register_parametrization(norm, "weight", nn.Tanh()), "norm2"
    ),
    "forward hook": hooked(lambda module: module.register_forward_hook(lambda m, x, y: y * 0.9)),
    "forward pre-hook": hooked(lambda module: module.register_forward_pre_hook(lambda m, x: (x[0] * 0.9,))),
    "backward hook": lambda model: (
        [
            module.register_full_backward_hook(lambda m, gx, gy: halved(gx))
            for module in (model.layer1[0].conv1, model.layer1[0].involution, model.layer1[1], model.stem.conv2)
        ]
        and model
    ),
    "hook that scribbles": scribbling_hook,
    "patched forward": patched,
    "frozen norms": frozen,
    "frozen biases": lambda model: frozen(model, ["bias"]),
    "norms without parameters": without,
    "norms without a weight": lambda model: without(model, ["weight"]),
    "norms without a bias": lambda model: without(model, ["bias"]),
    "some norms in eval mode": some_in_eval,
    "momentum, eps and no statistics": settings,
    "strided parameters": strided_parameters,
    "frozen convolutions": lambda model: (
        model.requires_grad_(False)
        and frozen(model, [])
        and [norm.requires_grad_(True) for norm in norms(model)]
        and model
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SURGERIES)
def test_surgeries(name, dtype):
    results = []
    for model, prepare in zip(pair(dtype), (lambda model: model, in_order), strict=True):
        torch.manual_seed(3)
        results.append(step(prepare(SURGERIES[name](model).to(dtype)), image(dtype)))
    assert_same(*results)


# --- circumstances ----------------------------------------------------------------------------------------------------


def change_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(0.9)


def replace_data(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.9


def double_biases(model):
    for norm in norms(model):
        norm.bias.data.mul_(2)
        norm.running_mean.data.fill_(7)


@pytest.mark.parametrize(
    "between", [nn.Module.eval, nn.Module.float, change_data, replace_data, double_biases], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_between_forward_and_backward(between, dtype):
    model, twin = pair(dtype)
    if between is nn.Module.float:
        between, dtype = (lambda model: None), torch.float32
        model, twin = model.float(), twin.float()
    assert_same(step(model, image(dtype), between), step(in_order(twin), image(dtype), between))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [16, 17, 40])
def test_layouts(channels_last, size):
    results = []
    for model, prepare in zip(pair(), (lambda model: model, in_order), strict=True):
        x = image(size=size)
        if channels_last:
            model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        results.append(step(prepare(model), x.requires_grad_()) | {"gradient of x": x.grad})
    assert_same(*results)


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast(backward_inside):
    results = []
    for model, prepare in zip(pair(), (lambda model: model, in_order), strict=True):
        model = prepare(model)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(image())
            if backward_inside:
                penalty(output).backward()
        if not backward_inside:
            penalty(output).backward()
        results.append(state(model, [output]))
    assert_same(*results)


def test_half_precision_network():
    model, twin = pair(torch.bfloat16)
    assert_same(step(model, image(torch.bfloat16)), step(in_order(twin), image(torch.bfloat16)))


def test_backward_twice():
    """With a graph that is kept, then with gradients that are differentiated again."""
    results = []
    for model, prepare in zip(pair(torch.float64), (lambda model: model, in_order), strict=True):
        model = prepare(model)
        x = image(torch.float64).requires_grad_()
        loss = penalty(model(x))
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        slope.square().sum().backward()
        results.append(state(model) | {"gradient of x": x.grad})
    assert_same(*results)


def test_gradients_of_some_parameters():
    results = []
    for model, prepare in zip(pair(), (lambda model: model, in_order), strict=True):
        chosen = [model.layer1[0].conv3.weight, model.stem.conv2.weight]
        output = prepare(model)(image())
        first = torch.autograd.grad(penalty(output), chosen, retain_graph=True)
        second = torch.autograd.grad(output.sum(), [*chosen, model.stem.norm1.weight])
        results.append({f"gradient {index}": grad for index, grad in enumerate([*first, *second])})
    assert_same(*results)


@contextmanager
def global_hook():
    def hook(module, inputs, output):
        if isinstance(module, nn.ReLU):
            output.data.mul_(0.5)

    handle = nn.modules.module.register_module_forward_hook(hook)
    yield
    handle.remove()


class Doubling(TorchDispatchMode):
    """Replaces the kernel of batch norms."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if func is torch.ops.aten.native_batch_norm.default:
            self.used = True
            return 2 * result[0], *result[1:]
        return result


def test_other_kernels():
    results = []
    for model, prepare in zip(pair(), (lambda model: model, in_order), strict=True):
        with Doubling() as mode:
            output = prepare(model)(image())
        assert mode.used
        penalty(output).backward()
        results.append(state(model, [output]))
    assert_same(*results)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize(
    "context",
    [
        global_hook,
        torch.autograd.graph.save_on_cpu,
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
        lambda: torch.autograd.graph.disable_saved_tensors_hooks("none"),
        torch.autograd.graph.allow_mutation_on_saved_tensors,
        torch.autograd.detect_anomaly,
        torch.autograd.forward_ad.dual_level,
        lambda: torch.device("cpu"),
    ],
)
def test_contexts(context):
    results = []
    for model, prepare in zip(pair(), (lambda model: model, in_order), strict=True):
        with context():
            results.append(step(prepare(model), image()))
    assert_same(*results)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_around_a_stage(use_reentrant):
    results = []
    for model, prepare in zip(pair(), (lambda model: model, in_order), strict=True):
        stage = prepare(model).layer1
        forward = stage.forward
        stage.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=use_reentrant)
        results.append(step(model, image()))
    assert_same(*results)


def test_copies():
    model, twin = pair()
    before = step(model, image(), steps=1)
    assert_same(step(copy.deepcopy(model), image()), step(in_order(copy.deepcopy(model)), image()))
    assert_same(before, step(in_order(twin), image(), steps=1))


@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_functional_call(grad_checkpointing):
    model, twin = pair(grad_checkpointing=grad_checkpointing)
    given = {name: (value * 1.1).detach().requires_grad_() for name, value in model.named_parameters()}
    penalty(torch.func.functional_call(model, given, (image(),))).backward()
    twin.load_state_dict(given | dict(twin.named_buffers()))
    penalty(in_order(twin)(image())).backward()
    for name, parameter in twin.named_parameters():
        assert torch.equal(given[name].grad, parameter.grad), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_checkpointed_blocks_run_twice(monkeypatch):
    """Once forward and once in the backward pass: looking at what a block has saved would run it again."""
    model, _ = pair(grad_checkpointing=True)
    blocks = [block for stage in model.stages for block in stage]
    calls = []
    forward = Bottleneck.forward
    monkeypatch.setattr(Bottleneck, "forward", lambda self, x: calls.append(self) or forward(self, x))
    loss = penalty(model(image()))
    assert calls == blocks
    loss.backward()
    assert sorted(map(blocks.index, calls)) == sorted([*range(len(blocks))] * 2)


def test_function_transforms():
    model, twin = pair(torch.float64, norm_layer=partial(nn.BatchNorm2d, track_running_stats=False))

    def gradients(model):
        parameters = {name: value.detach() for name, value in model.named_parameters()}

        def loss(parameters, x):
            return penalty(torch.func.functional_call(model, parameters, (x,)))

        return torch.func.grad(loss)(parameters, image(torch.float64))

    found, expected = gradients(model), gradients(in_order(twin))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_compiled():
    model, twin = pair()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for one, call in ((model, compiled), (in_order(twin), twin)):
        penalty(call(image())).backward()
        assert one.layer1[0].conv1.weight.grad.any()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_threads(grad_checkpointing):
    """Two threads with a network: gradients are those of one thread, every batch is counted, momentum is as it was."""
    model, twin = pair(torch.float64, grad_checkpointing=grad_checkpointing)
    images = [image(torch.float64, seed) for seed in range(12)]

    def gradients(model, x):
        return torch.autograd.grad(penalty(model(x)), list(model.parameters()))

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda x: gradients(model, x), images))
    twin = in_order(twin)
    for x, grads in zip(images, found, strict=True):
        assert all(map(torch.equal, grads, gradients(twin, x)))
    assert all(norm.momentum == 0.1 and norm.training for norm in norms(model))
    assert all(norm.num_batches_tracked == len(images) for norm in norms(model))


# --- checkpointing ----------------------------------------------------------------------------------------------------

# What these have besides buffers and random numbers, they would count twice; the authors of hooks and modules know.
TWICE = {"buffer and counter"}


@pytest.mark.parametrize("name", [name for name in SURGERIES if name not in TWICE])
def test_grad_checkpointing(name):
    results = []
    for model, prepare in zip(pair(), (lambda model: model, in_order), strict=True):
        torch.manual_seed(3)
        model = SURGERIES[name](model)
        if prepare is in_order:
            in_order(model)
        else:
            model.set_grad_checkpointing()
        results.append(step(model, image(), nn.Module.train))
    assert_same(*results)


@pytest.mark.parametrize("name", ["spectral_norm", "spectral_norm, parametrized", "dropout"])
def test_grad_checkpointing_backward_twice(name):
    """Each recomputation begins with the buffers and random numbers that the forward pass had."""
    results = []
    for model, prepare in zip(pair(), (lambda model: model, in_order), strict=True):
        torch.manual_seed(3)
        model = prepare(SURGERIES[name](model))
        model.set_grad_checkpointing(prepare is not in_order)
        loss = penalty(model(image()))
        for _ in range(3):
            loss.backward(retain_graph=True)
        results.append(state(model))
    assert_same(*results)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prepare", [lambda m: m, copy.deepcopy, lambda m: m.to(memory_format=torch.channels_last)])
def test_activations_are_not_kept(prepare):
    model, twin = pair()
    x = image(size=64)
    assert kept_bytes(prepare(model), x) < 0.85 * kept_bytes(in_order(twin), x)


def test_activations_are_kept_where_others_see_them():
    """One hook costs the memory of its block, and of no other."""
    model, twin = pair()
    x = image(size=64)
    least, most = kept_bytes(model, x), kept_bytes(in_order(twin), x)
    model.layer1[0].act.register_forward_hook(lambda module, inputs, output: None)
    assert least < kept_bytes(model, x) < most


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(2, 7, 5, 3), (4, 64, 9, 9), (3, 33, 1, 1), (2, 1, 4, 4), (1, 16, 30, 30)])
@pytest.mark.parametrize(
    ("parameters", "dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
)
def test_bits_of_an_activation(shape, channels_last, parameters, dtype):
    """What backward is given is what forward computed, with the strides that it had."""
    torch.manual_seed(0)
    channels = shape[1]
    layers = [nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels), nn.ReLU(True), nn.Conv2d(channels, 2, 1)]
    block = nn.Sequential(*layers).to(parameters)
    nn.init.normal_(block[1].weight)
    nn.init.normal_(block[1].bias)
    block[0].to(dtype)
    block[3].to(dtype)
    x = (3 * torch.randn(shape) + 2).to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    activation = block[:3](x)
    expected = activation.detach().clone(memory_format=torch.preserve_format)
    output = block[3](activation)
    storage = activation.untyped_storage()
    del activation
    forget_activations(block, x, output)
    convolution, relu = output.grad_fn, output.grad_fn.next_functions[0][0]
    for found in (convolution._saved_input, relu._saved_result):
        assert found.data_ptr() != storage.data_ptr()
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()
        assert found.grad_fn is relu
    assert expected.any()


def test_strided_inputs():
    """torch normalises them by another formula, and rounds otherwise."""
    block = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(True), nn.Conv2d(3, 2, 1))
    nn.init.normal_(block[0].weight)
    nn.init.normal_(block[0].bias)
    x = (3 * image(size=32))[..., ::2]
    assert not x.is_contiguous()
    activation = block[:2](x)
    expected = activation.detach().clone()
    output = block[2](activation)
    forget_activations(block, x, output)
    assert torch.equal(output.grad_fn._saved_input, expected)


def test_changed_inputs_are_noticed():
    """As autograd notices that what it has saved was changed: in an activation's source, and in an activation."""
    block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(True), nn.Conv2d(4, 2, 1))
    x = image()
    output = block(x)
    forget_activations(block, x, output)
    output.grad_fn.next_functions[0][0].next_functions[0][0]._saved_input.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(output.sum(), block[3].weight)

    for call in (block, nn.Sequential(*block[:3], nn.ReLU(True), block[3])):
        output = call(x)
        forget_activations(call, x, output)
        with nullcontext() if call is block else pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
