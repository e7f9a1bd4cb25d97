"""Involution2d against the equations of its docstring, written out by hand."""

import copy
import io
from itertools import product

import pytest
import torch
from torch import nn

from pyinvolution import Involution2d

CASES = {
    "plain": ((32,), {}, (9, 8)),
    "kernel3": ((32, 3), {}, (5, 7)),
    "one_tap": ((16, 1), {}, (3, 4)),
    "larger_than_image": ((16, 7), {}, (2, 3)),
    "rectangular": ((16, (3, 5)), {}, (6, 7)),
    "even": ((16, 2), {}, (5, 6)),
    "even_by_odd": ((16, (4, 3)), {}, (6, 5)),
    "even_dilated": ((16, 4), {"dilation": 3}, (9, 8)),
    "stride2": ((32, 7, 2), {}, (8, 10)),
    "stride2_odd": ((32, 7, 2), {}, (7, 9)),
    "stride2_one_pixel": ((16, 3, 2), {}, (1, 3)),
    "stride3": ((16, 3, 3), {}, (7, 8)),
    "stride_pair": ((16, 5, (1, 2)), {}, (5, 7)),
    "even_stride2": ((16, 4, 2), {}, (7, 8)),
    "dilated": ((16, 3), {"dilation": (2, 3)}, (8, 9)),
    "dilated_stride2": ((16, 3, 2), {"dilation": 2}, (9, 6)),
    "groups": ((12, 3), {"group_channels": 3, "reduction": 5}, (5, 5)),
    "depthwise": ((6, 3), {"group_channels": 1, "reduction": 1}, (5, 4)),
    "bias": ((16, 3), {"bias": True}, (4, 5)),
    "wider": ((16, 3, 2), {"out_channels": 24}, (5, 5)),
    "narrower_bias": ((32, 3), {"out_channels": 8, "bias": True}, (4, 4)),
    "group_norm": ((32, 3), {"norm_layer": lambda c: nn.GroupNorm(2, c), "activation": nn.SiLU}, (4, 5)),
    "no_norm": ((32, 3), {"norm_layer": None, "activation": nn.Identity}, (4, 5)),
}


def build(case, **kwargs):
    args, options, size = CASES[case]
    torch.manual_seed(0)
    layer = Involution2d(*args, **options, dtype=torch.float64, **kwargs)
    for name, value in layer.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if "norm" in name else torch.randn_like(value) / 3)
    return layer, torch.randn(2, args[0], *size, dtype=torch.float64)


def written_out(layer, x):
    """The layer's equations with nothing of its code: means of cells, matrix products, loops over pixels."""
    n, channels, height, width = x.shape
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    rows, columns = -(-height // sh), -(-width // sw)
    cells = [
        x[:, :, p * sh : (p + 1) * sh, q * sw : (q + 1) * sw].mean((2, 3))
        for p, q in product(range(rows), range(columns))
    ]
    pooled = torch.stack(cells, -1).unflatten(-1, (rows, columns))
    reduce = dict(layer.reduce.named_children())
    hidden = torch.einsum("oc,nchw->nohw", reduce["conv"].weight[:, :, 0, 0], pooled)
    if reduce["conv"].bias is not None:
        hidden = hidden + reduce["conv"].bias[:, None, None]
    norm = reduce.get("norm")
    if isinstance(norm, nn.BatchNorm2d):
        mean, var = norm.running_mean, norm.running_var
        if layer.training:
            mean, var = hidden.mean((0, 2, 3)), hidden.var((0, 2, 3), correction=0)
        scale = norm.weight / torch.sqrt(var + norm.eps)
        hidden = hidden * scale[:, None, None] + (norm.bias - mean * scale)[:, None, None]
    elif norm is not None:
        hidden = norm(hidden)
    hidden = reduce["act"](hidden)
    kernels = torch.einsum("oc,nchw->nohw", layer.span.weight[:, :, 0, 0], hidden)
    kernels = kernels + layer.span.bias[:, None, None]

    first = torch.arange(channels) // layer.group_channels * kh * kw
    top, left = dh * (kh - 1) // 2, dw * (kw - 1) // 2
    output = x.new_zeros(n, channels, rows, columns)
    for p, q, i, j in product(range(rows), range(columns), range(kh), range(kw)):
        y, z = p * sh + i * dh - top, q * sw + j * dw - left
        if 0 <= y < height and 0 <= z < width:
            output[:, :, p, q] = output[:, :, p, q] + kernels[:, first + i * kw + j, p, q] * x[:, :, y, z]
    if layer.project is not None:
        output = torch.einsum("oc,nchw->nohw", layer.project.weight[:, :, 0, 0], output)
    bias = layer.bias if layer.project is None else layer.project.bias
    return output if bias is None else output + bias[:, None, None]


@pytest.mark.parametrize("case", CASES)
def test_equations(case):
    layer, x = build(case)
    layer.eval()
    with torch.no_grad():
        expected = written_out(layer, x)
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(layer(x[0]), expected[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", ["stride2_odd", "even", "narrower_bias"])
def test_gradients_in_training(case):
    layer, x = build(case)
    x = x[:, :, :5, :5].requires_grad_()
    inputs = (x, *layer.parameters())
    expected = written_out(layer, x)
    seed = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * seed).sum(), inputs)
    output = layer(x)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    for grad, want in zip(torch.autograd.grad((output * seed).sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-8, atol=1e-9)


def test_fresh_layer_keeps_the_scale():
    torch.manual_seed(0)
    layer = Involution2d(64, bias=True)
    assert not layer.span.bias.any()
    assert not layer.bias.any()
    assert 0.5 < layer(torch.randn(4, 64, 16, 16)).std() < 5
    assert sum(p.numel() for p in layer.parameters()) == 64 * 16 + 2 * 16 + (16 + 1) * 4 * 49 + 64


@pytest.mark.parametrize("size", [(32, 32), (31, 33)])
def test_replaces_every_3x3_convolution(size):
    """A network keeps its shapes, and every parameter of the new layers learns."""

    def replace(module):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d) and child.kernel_size == (3, 3) and child.in_channels > 3:
                layer = Involution2d(child.in_channels, 3, child.stride, out_channels=child.out_channels)
                setattr(module, name, layer)
            replace(child)

    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1),
        nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1)),
        nn.Conv2d(64, 16, 3, 2, 1),
    )
    x = torch.randn(2, 3, *size)
    shape = net(x).shape
    replace(net)
    assert sum(isinstance(module, Involution2d) for module in net.modules()) == 3
    output = net(x)
    assert output.shape == shape
    output.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("kernel_size", [3, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_channels_last(kernel_size, stride):
    layer = Involution2d(32, kernel_size, stride).to(memory_format=torch.channels_last).eval()
    x = torch.randn(2, 32, 9, 8)
    output = layer(x.to(memory_format=torch.channels_last))
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, layer(x))


def test_autocast():
    layer = Involution2d(32, 3)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(torch.randn(2, 32, 6, 6))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_copies():
    layer, x = build("stride2_odd")
    layer(x)
    expected = layer.eval()(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = Involution2d(32, 7, 2, dtype=torch.float64)
    loaded.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), torch.load(buffer, weights_only=False), loaded.eval()):
        torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
    assert list(layer.state_dict()) == [
        "reduce.conv.weight",
        *(f"reduce.norm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        "span.weight",
        "span.bias",
    ]
    assert "32, 32, kernel_size=(7, 7), stride=(2, 2), group_channels=16, reduction=4" in repr(layer)


def test_factory_arguments():
    layer = Involution2d(16, out_channels=8, bias=True, device="meta", dtype=torch.bfloat16)
    floating = [value for value in layer.state_dict().values() if value.is_floating_point()]
    assert all(value.device.type == "meta" for value in layer.state_dict().values())
    assert all(value.dtype == torch.bfloat16 for value in floating)
    assert layer(torch.empty(2, 16, 5, 5, device="meta", dtype=torch.bfloat16)).shape == (2, 8, 5, 5)


@pytest.mark.parametrize("case", ["plain", "stride2_odd", "even_stride2", "wider"])
def test_compiles_and_exports(case):
    layer, x = build(case)
    layer.eval()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    sizes = {2: torch.export.Dim("height", min=3), 3: torch.export.Dim("width", min=3)}
    exported = torch.export.export(layer, (x,), dynamic_shapes=(sizes,)).module()
    for image in (x, torch.nn.functional.pad(x, (0, 4, 0, 7))):
        torch.testing.assert_close(compiled(image), layer(image))
        torch.testing.assert_close(exported(image), layer(image))


def test_symbolic_trace():
    layer, x = build("even")
    torch.testing.assert_close(torch.fx.symbolic_trace(layer.eval())(x), layer(x))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"channels": 0}, ValueError, "channels is 0, expected at least 1"),
        ({"channels": 32.0}, TypeError, r"channels is 32\.0, expected an int"),
        ({"channels": 24}, ValueError, "group_channels is 16, expected a divisor of channels=24"),
        ({"group_channels": 0}, ValueError, "group_channels is 0, expected at least 1"),
        ({"group_channels": "16"}, TypeError, "group_channels is '16', expected an int"),
        ({"reduction": 33}, ValueError, "reduction is 33, expected at most channels=32"),
        ({"reduction": 0}, ValueError, "reduction is 0, expected at least 1"),
        ({"kernel_size": 0}, ValueError, "kernel_size is 0, expected at least 1"),
        ({"kernel_size": (3, 0)}, ValueError, r"kernel_size\[1\] is 0, expected at least 1"),
        (
            {"kernel_size": (3, 3, 3)},
            ValueError,
            r"kernel_size is \(3, 3, 3\), expected an int or a pair of ints",
        ),
        ({"kernel_size": 3.5}, TypeError, r"kernel_size is 3\.5, expected an int or a pair of ints"),
        ({"stride": -1}, ValueError, "stride is -1, expected at least 1"),
        ({"stride": (1, 1.5)}, TypeError, r"stride\[1\] is 1\.5, expected an int"),
        ({"dilation": 0}, ValueError, "dilation is 0, expected at least 1"),
        ({"dilation": None}, TypeError, "dilation is None, expected an int or a pair of ints"),
        ({"out_channels": 0}, ValueError, "out_channels is 0, expected at least 1"),
        ({"out_channels": True}, TypeError, "out_channels is True, expected an int"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Involution2d(**{"channels": 32, **arguments})


@pytest.mark.parametrize(
    ("input", "error", "message"),
    [
        (torch.zeros(2, 16, 4, 4), ValueError, r" has shape \(2, 16, 4, 4\), expected \(N, 32, H, W\) or \(32, H, W\)"),
        (torch.zeros(16, 4, 4), ValueError, r" has shape \(16, 4, 4\), expected \(N, 32, H, W\) or \(32, H, W\)"),
        (torch.zeros(32, 4), ValueError, r" has shape \(32, 4\), expected "),
        (torch.zeros(1, 2, 32, 4, 4), ValueError, r" has shape \(1, 2, 32, 4, 4\), expected "),
        (
            torch.zeros(2, 32, 4, 4, dtype=torch.uint8),
            TypeError,
            r" has dtype torch\.uint8, expected a floating-point dtype",
        ),
        ([[1.0]], TypeError, " is a list, expected a Tensor"),
    ],
)
def test_bad_input(input, error, message):
    with pytest.raises(error, match=f"Involution2d: input.*{message}"):
        Involution2d(32)(input)


def test_fused_and_unfused_agree_and_are_selectable():
    torch.manual_seed(0)
    x = torch.randn(2, 32, 9, 8)
    results = {}
    for fused in (None, True, False):
        torch.manual_seed(1)
        layer = Involution2d(32, 7, 2, fused=fused)
        with torch.profiler.profile() as profile:
            loss = layer(x).square().sum()
        names = {event.name for event in profile.events()}
        assert ("pyinvolution::span_involution2d" in names) == (fused is not False)
        loss.backward()
        results[fused] = [loss, *(p.grad for p in layer.parameters())]
    for other in (None, True):
        torch.testing.assert_close(results[other], results[False], rtol=1e-3, atol=1e-4)
    with pytest.raises(TypeError, match="fused is 1, expected a bool or None"):
        Involution2d(32, fused=1)


def test_a_hook_on_span_sees_the_kernels():
    layer, seen = Involution2d(32, 7), []
    layer.span.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    layer(torch.randn(1, 32, 5, 6))
    assert seen == [(1, 2 * 49, 5, 6)]


def test_float64_is_not_fused():
    with torch.profiler.profile() as profile:
        Involution2d(32, 7).double()(torch.randn(1, 32, 5, 6).double())
    assert "pyinvolution::involution2d" in {event.name for event in profile.events()}
