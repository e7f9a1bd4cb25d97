"""A layer of a training step in one operator: results, gradients, buffers, and where the modules run instead."""

import copy
from contextlib import nullcontext

import pytest
import torch
from tolerance import assert_accurate
from torch import nn

from pyinvolution import Involution2d, modules

ops = torch.ops.pyinvolution
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Input; window, stride, channels of a group, reduction, dilation. Whole vectors of channels, parts of one, more groups
# than one, an odd last row or column, a vector of reduced channels, one of them, more tasks than one, few pixels.
LAYERS = {
    "16": ((3, 16, 9, 7), (3, 1, 16, 4)),
    "32, stride 2": ((2, 32, 9, 12), (5, 2, 16, 4)),
    "two strides": ((2, 16, 7, 11), ((3, 5), (3, 2), 8, 2)),
    "groups of 8": ((2, 24, 6, 5), (3, 1, 8, 4)),
    "groups of 12": ((2, 36, 8, 8), (3, 2, 12, 5)),
    "groups of 4": ((2, 16, 9, 7), (5, 1, 4, 4)),
    "groups of 3": ((2, 15, 8, 5), (3, 2, 3, 2)),
    "groups of 1": ((2, 20, 7, 6), (3, 1, 1, 4)),
    "R of 16": ((2, 64, 5, 6), (5, 1, 16, 4)),
    "more reduced channels than taps": ((2, 128, 5, 6), (5, 1, 16, 4)),
    "groups of 4 among 3 vectors": ((3, 36, 9, 9), (3, 1, 4, 6)),
    "groups of 24": ((2, 48, 7, 9), (3, 1, 24, 4)),
    "R of 1": ((2, 16, 8, 8), (3, 1, 16, 16)),
    "dilated": ((2, 16, 10, 10), ((3, 3), 1, 16, 4, 2)),
    "tasks": ((9, 16, 33, 31), (3, 1, 16, 4)),
    "two pixels": ((2, 16, 1, 1), (3, 1, 16, 4)),
}


@pytest.fixture
def calls(monkeypatch):
    """The layers that ran in one."""
    found, run = [], modules.run_as_one

    def counted(layer, x):
        found.append(layer)
        return run(layer, x)

    monkeypatch.setattr(modules, "run_as_one", counted)
    return found


@pytest.fixture
def by_modules(monkeypatch):
    """Makes layers call their modules."""
    return lambda: monkeypatch.setattr(modules, "trains_as_one", lambda *_: False)


def problem(name, kernel_norm=None, dtype=torch.float32):
    torch.manual_seed(0)
    shape, (kernel, stride, group, reduction, *dilation) = LAYERS[name]
    layer = Involution2d(shape[1], kernel, stride, *dilation, group_channels=group, reduction=reduction,
                         kernel_norm=kernel_norm)  # fmt: skip
    nn.init.uniform_(layer.reduce.norm.weight, 0.5, 1.5)
    nn.init.normal_(layer.reduce.norm.bias)
    nn.init.normal_(layer.span.bias)
    x = torch.randn(shape, dtype=dtype).to(memory_format=torch.channels_last)
    gy = torch.randn(layer.eval()(x.float()).shape, dtype=dtype).to(memory_format=torch.channels_last)
    return layer.train(), x, gy


def results(layer, x, gy, autocast=None):
    """Output, gradients of the input and all parameters, and buffers."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", autocast) if autocast else nullcontext():
        output = layer(x)
    output.backward(gy)
    return [output.detach(), x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]


@pytest.mark.parametrize("kernel_norm", [None, "l2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_results(name, dtype, kernel_norm, calls, by_modules):
    layer, x, gy = problem(name, kernel_norm, dtype)
    autocast = None if dtype == torch.float32 else dtype
    found = results(copy.deepcopy(layer), x, gy, autocast)
    assert len(calls) == 1
    by_modules()
    reference = results(copy.deepcopy(layer), x, gy, autocast)
    oracle = results(layer.double(), x.double(), gy.double())
    assert found[0].dtype == dtype
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    for value, exact, other in zip(found, oracle, reference, strict=True):
        assert value.dtype == other.dtype
        assert value.shape == other.shape
        if value.is_floating_point():
            assert_accurate(value, exact, other)
        else:
            assert torch.equal(value, exact)


@pytest.mark.parametrize("kernel_norm", [None, "l2"])
def test_any_number_of_threads(kernel_norm):
    layer, x, gy = problem("tasks", kernel_norm)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(copy.deepcopy(layer), x, gy))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("kernel_norm", [None, "l2"])
def test_second_derivatives(kernel_norm, calls, by_modules):
    def gradients(layer):
        leaf = x.clone().requires_grad_()
        first = torch.autograd.grad(layer(leaf).square().sum(), [leaf, *layer.parameters()], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [leaf, *layer.parameters()])

    layer, x, _ = problem("32, stride 2", kernel_norm)
    found = gradients(copy.deepcopy(layer))
    assert len(calls) == 1
    by_modules()
    reference = gradients(copy.deepcopy(layer))
    layer, x = layer.double(), x.double()
    for value, exact, other in zip(found, gradients(layer), reference, strict=True):
        assert_accurate(value, exact, other)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_kernels_of_zeros(autocast, calls, by_modules):
    """They stay zeros, and pass a finite gradient: that of the modules."""
    layer, x, gy = problem("R of 16", "l2", autocast or torch.float32)
    nn.init.zeros_(layer.span.weight[:25])
    nn.init.zeros_(layer.span.bias[:25])
    gy = gy * 1e-20 if autocast is None else torch.zeros_like(gy)
    found = results(copy.deepcopy(layer), x, gy, autocast)
    assert len(calls) == 1
    assert not found[0][:, :16].any()
    by_modules()
    for value, other in zip(found, results(layer, x, gy, autocast), strict=True):
        assert value.isfinite().all()
        torch.testing.assert_close(value, other, rtol=1e-2, atol=1e-2 * float(other.abs().max()))


@pytest.mark.parametrize("kernel_norm", [None, "l2"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(value, kernel_norm, calls, by_modules):
    layer, x, gy = problem("16", kernel_norm)
    x[1, 3, 4, 4] = value
    gy[0, 2, 3, 3] = value
    found = results(copy.deepcopy(layer), x, gy)
    assert len(calls) == 1
    by_modules()
    for one, other in zip(found, results(layer, x, gy), strict=True):
        assert torch.equal(one.isfinite(), other.isfinite())


@pytest.mark.parametrize("kernel_norm", [None, "l2"])
def test_any_gradient(kernel_norm, calls, by_modules):
    """An expanded one, in another order, and of few of the tensors."""
    layer, x, gy = problem("32, stride 2", kernel_norm)

    def gradients(layer):
        leaf = x.clone().requires_grad_()
        sources = [leaf, layer.span.bias]
        return [
            *torch.autograd.grad(layer(leaf).sum(), sources),
            *torch.autograd.grad(layer(leaf), sources, gy.contiguous()),
        ]

    layer.reduce.requires_grad_(False)
    found = gradients(layer)
    assert len(calls) == 2
    by_modules()
    torch.testing.assert_close(found, gradients(layer), rtol=1e-4, atol=1e-3)


def hook(*_):
    return None


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Sum(nn.Module):
    def forward(self, x):
        return 4 * nn.functional.avg_pool2d(x, 2)


OTHERS = {
    "NCHW": lambda layer, x: x.contiguous(),
    "float64": lambda layer, x: layer.double() and x.double(),
    "evaluation": lambda layer, x: layer.eval() and x,
    "a norm with its own statistics": lambda layer, x: layer.reduce.norm.eval() and x,
    "another norm": lambda layer, x: setattr(layer.reduce, "norm", nn.GroupNorm(1, 8)) or x,
    "another activation": lambda layer, x: setattr(layer.reduce, "act", nn.SiLU()) or x,
    "another convolution": lambda layer, x: setattr(layer.reduce, "conv", Doubled(32, 8, 1, bias=False)) or x,
    "another span": lambda layer, x: setattr(layer, "span", Doubled(8, 50, 1)) or x,
    "another pooling": lambda layer, x: setattr(layer, "pool", nn.AvgPool2d(2, 2)) or x,
    "a pooling of one's own": lambda layer, x: setattr(layer, "pool", Sum()) or x,
    "a hook on the pooling": lambda layer, x: layer.pool.register_forward_hook(hook) and x,
    "a hook": lambda layer, x: layer.reduce.norm.register_forward_hook(hook) and x,
    "a hook on the span": lambda layer, x: layer.span.register_forward_hook(hook) and x,
    "kernels in memory": lambda layer, x: setattr(layer, "fused", False) or x,
    "softmax": lambda layer, x: setattr(layer, "kernel_norm", "softmax") or x,
    "parameters of bfloat16": lambda layer, x: layer.span.to(torch.bfloat16) and x,
}


@pytest.mark.parametrize("name", OTHERS)
def test_modules_run(name, calls):
    layer, x, _ = problem("32, stride 2")
    x = x[:, :, :8].contiguous(memory_format=torch.channels_last)
    layer(x)
    assert len(calls) == 1
    x = OTHERS[name](layer, x)
    if name == "parameters of bfloat16":
        with pytest.raises((TypeError, RuntimeError)):
            layer(x)
    else:
        layer(x)
    assert len(calls) == 1


def test_many_reduced_channels(calls):
    """33 of them, and 25 taps."""
    x = torch.randn(2, 132, 5, 6).to(memory_format=torch.channels_last)
    layer = Involution2d(132, 5, group_channels=12, reduction=4, kernel_norm="l2")
    layer(x)
    assert not calls
    layer.kernel_norm = None
    layer(x)
    assert len(calls) == 1


def test_modules_run_under_transforms(calls):
    layer, x, _ = problem("16")
    layer.reduce.norm = nn.BatchNorm2d(4, track_running_stats=False)  # functorch lets no buffer change
    parameters = dict(layer.named_parameters())
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)  # which autocast casts
    torch.func.functional_call(layer, parameters, x)
    assert len(calls) == 1
    torch.func.vjp(layer, x)
    torch.func.jvp(layer.eval(), (x,), (x,))
    layer.train()(x, x)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        layer(x)
    assert len(calls) == 1


def arguments(layer, x):
    norm = layer.reduce.norm
    window = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return [x, layer.reduce.conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var,
            norm.num_batches_tracked, 0.1, 1e-5, layer.span.weight, layer.span.bias, 1e-12, *window]  # fmt: skip


def test_operators():
    layer, x, gy = problem("32, stride 2", "l2", torch.bfloat16)
    with torch.no_grad():
        given = arguments(layer, x)
        y, z, mean, invstd = ops.training_layer2d(*given)
        backward = [gy, *given[:4], *given[9:11], z, mean, invstd, y, *given[11:]]
        for operator, tensors in (("training_layer2d", given), ("training_layer2d_backward", backward)):
            torch.library.opcheck(
                getattr(ops, operator).default, tensors, test_utils=("test_schema", "test_faketensor")
            )


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(2, 16, 4, 4), r"input has strides \(256, 16, 4, 1\), expected those of a dense tensor in chan"),
        (0, torch.zeros(2, 16, 4, 4).double(), "input has dtype Double, expected float32, float16 or bfloat16"),
        (1, torch.zeros(4, 15), r"reduce_weight has shape \(4, 15\), expected \(R, C\) or \(R, C, 1, 1\) with C = 16"),
        (1, torch.zeros(4, 16).double(), "reduce_weight has dtype Double, expected Float or input's dtype Float"),
        (3, torch.zeros(5), r"bias has shape \(5\), expected \(4\)"),
        (9, torch.zeros(9, 5), r"span_weight has shape \(9, 5\), expected .* with R = 4"),
        (10, torch.zeros(8), r"span_bias has shape \(8\), expected \(9\)"),
        (11, 0.0, "least_length is 0, expected more than 0"),
    ],
    ids=str,
)
def test_errors(place, value, message):
    layer, x, _ = problem("16")
    given = arguments(layer, x)
    given[place] = value
    before = [buffer.clone() for buffer in layer.buffers()]
    with pytest.raises(RuntimeError, match=message):
        ops.training_layer2d(*given)
    assert all(map(torch.equal, before, layer.buffers()))
