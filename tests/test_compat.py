"""The stand-in for the authors' CuPy file, against their equations written out and under their names."""

import copy
import sys
import types
from itertools import product

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from pyinvolution import Involution2d, optimize_for_inference
from pyinvolution.compat import involution as module
from pyinvolution.compat.involution import _involution_cuda, involution

KEYS = {
    "conv1.conv.weight", "conv1.bn.weight", "conv1.bn.bias", "conv1.bn.running_mean", "conv1.bn.running_var",
    "conv1.bn.num_batches_tracked", "conv2.conv.weight", "conv2.conv.bias",
}  # fmt: skip


def theirs(x, weight, bias=None, stride=1, padding=0, dilation=1):
    """The loops of their CUDA kernel, with its group c // (channels / groups)."""
    (n, channels, height, width), (groups, kh, kw, rows, columns) = x.shape, weight.shape[1:]
    output = x.new_zeros(n, channels, rows, columns)
    for c, p, q, i, j in product(range(channels), range(rows), range(columns), range(kh), range(kw)):
        row, column = p * stride + i * dilation - padding, q * stride + j * dilation - padding
        if 0 <= row < height and 0 <= column < width:
            output[:, c, p, q] += weight[:, c // (channels // groups), i, j, p, q] * x[:, c, row, column]
    return output if bias is None else output + bias.view(1, -1, 1, 1)


def their_layer(entries, x, kernel, stride, training=False):
    """Their module's forward pass, from a state dict under their keys."""
    pooled = F.avg_pool2d(x, stride, stride) if stride > 1 else x
    hidden = F.conv2d(pooled, entries["conv1.conv.weight"])
    norm = [entries[f"conv1.bn.{name}"].clone() for name in ("running_mean", "running_var", "weight", "bias")]
    hidden = F.batch_norm(hidden, *norm, training=training).relu()
    weight = F.conv2d(hidden, entries["conv2.conv.weight"], entries["conv2.conv.bias"])
    weight = weight.view(len(x), x.shape[1] // 16, kernel, kernel, *weight.shape[2:])
    return theirs(x, weight, None, stride, (kernel - 1) // 2)


def their_entries(channels, kernel, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    reduced, taps = channels // 4, kernel**2 * (channels // 16)
    shapes = {
        "conv1.conv.weight": (reduced, channels, 1, 1), "conv1.bn.weight": (reduced,), "conv1.bn.bias": (reduced,),
        "conv1.bn.running_mean": (reduced,), "conv1.bn.running_var": (reduced,),
        "conv2.conv.weight": (taps, reduced, 1, 1), "conv2.conv.bias": (taps,),
    }  # fmt: skip
    entries = {name: torch.randn(shape, generator=draw, dtype=dtype) for name, shape in shapes.items()}
    entries["conv1.bn.running_var"] = entries["conv1.bn.running_var"].abs() + 0.5
    return entries | {"conv1.bn.num_batches_tracked": torch.tensor(7)}


def build(channels, kernel, stride):
    entries = their_entries(channels, kernel)
    layer = involution(channels, kernel, stride).double().eval()
    layer.load_state_dict(entries, strict=True)
    return layer, entries


@pytest.mark.parametrize(
    ("groups", "kernel", "stride", "padding", "dilation"),
    [(2, 3, 1, 1, 1), (4, 3, 2, 1, 1), (1, 5, 1, 2, 1), (2, 3, 1, 2, 2), (2, 1, 1, 0, 1), (2, 2, 2, 0, 1)],
)
@pytest.mark.parametrize("bias", [None, (8,), (1, 8, 1, 1)])
def test_function(groups, kernel, stride, padding, dilation, bias):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, groups, kernel, kernel, 6 // stride, 8 // stride, dtype=torch.float64, requires_grad=True)
    tensors = [x, weight]
    if bias is not None:
        bias = torch.randn(bias, dtype=torch.float64, requires_grad=True)
        tensors.append(bias)
    # As their own layer calls it.
    actual = _involution_cuda(x, weight, bias, stride=stride, padding=padding, dilation=dilation)
    expected = theirs(x, weight, bias, stride, padding, dilation)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(_involution_cuda(x, weight, bias, stride, padding, dilation), expected)
    upstream = torch.randn_like(expected)
    for ours, their in zip(
        torch.autograd.grad(actual, tensors, upstream), torch.autograd.grad(expected, tensors, upstream), strict=True
    ):
        torch.testing.assert_close(ours, their)


def test_function_refuses_what_theirs_reads_wrongly():
    # Their assertions hold, but the output is 4 x 4 and the kernels are 6 x 6.
    with pytest.raises(ValueError, match="weight"):
        _involution_cuda(torch.randn(1, 8, 6, 6), torch.randn(1, 2, 3, 3, 6, 6))
    with pytest.raises(ValueError, match="bias"):
        _involution_cuda(torch.randn(1, 8, 6, 6), torch.randn(1, 2, 3, 3, 6, 6), torch.randn(4), padding=1)
    with pytest.raises(TypeError, match="bias is a float"):
        _involution_cuda(torch.randn(1, 8, 6, 6), torch.randn(1, 2, 3, 3, 6, 6), 1.0, padding=1)


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "size"),
    [
        (32, 3, 1, (5, 6)),
        (32, 7, 2, (4, 6)),
        (48, 3, 3, (6, 3)),
        (16, 1, 1, (3, 4)),
        (40, 3, 1, (4, 4)),
        (32, 4, 2, (4, 6)),
        (16, 2, 2, (5, 7)),
        (16, 4, 3, (4, 6)),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_layer(channels, kernel, stride, size, training):
    layer, entries = build(channels, kernel, stride)
    layer.train(training)
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    torch.testing.assert_close(layer(x), their_layer(entries, x, kernel, stride, training))


def test_keys_and_attributes():
    layer = involution(64, 7, 2)
    assert set(layer.state_dict()) == KEYS
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        name: tuple(value.shape) for name, value in their_entries(64, 7).items()
    }
    attributes = {"channels": 64, "kernel_size": 7, "stride": 2, "group_channels": 16, "groups": 4}
    assert {name: getattr(layer, name) for name in attributes} == attributes
    assert [name for name, _ in layer.named_children()] == ["conv1", "conv2", "avgpool"]
    assert not hasattr(involution(64, 7, 1), "avgpool")
    with pytest.raises(TypeError):
        involution(64, 7)  # They have no default either.
    # Kaiming's standard deviation for ReLU is sqrt(2 / fan out), here of the 16 reduced channels.
    assert layer.conv1.conv.weight.std().item() == pytest.approx((2 / 16) ** 0.5, rel=0.1)
    assert not layer.conv2.conv.bias.any()


def test_a_size_for_which_theirs_has_too_few_kernels():
    # Windows of 4 with padding 1 and stride 3 have 2 positions in 5 rows, which have 1 cell.
    with pytest.raises(ValueError, match="expected"):
        involution(16, 4, 3)(torch.randn(1, 16, 5, 6))


@pytest.mark.parametrize("stride", [2, 3])
def test_odd_sizes_are_those_of_our_layer(stride):
    layer, entries = build(32, 3, stride)
    ours = Involution2d(32, 3, stride).double().eval()
    renamed = {"conv1.conv": "reduce.conv", "conv1.bn": "reduce.norm", "conv2.conv": "span"}
    ours.load_state_dict(
        {f"{renamed[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": v for name, v in entries.items()}
    )
    x = torch.randn(2, 32, 7, 5, dtype=torch.float64)
    assert layer(x).shape == (2, 32, -(-7 // stride), -(-5 // stride))
    torch.testing.assert_close(layer(x), ours(x))


class Doubled(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize("change", ["replaced", "appended", "inner", "hook"])
def test_conv2_is_called_where_it_is_not_theirs(change):
    layer, entries = build(32, 3, 1)
    x = torch.randn(2, 32, 4, 5, dtype=torch.float64)
    doubled = Doubled(8, 18, 1, dtype=torch.float64)
    doubled.load_state_dict(layer.conv2.conv.state_dict())
    if change == "replaced":
        layer.conv2 = doubled
    elif change == "appended":
        layer.conv2.add_module("norm", nn.Conv2d(18, 18, 1, bias=False).double())
        layer.conv2.norm.weight.data.copy_(2 * torch.eye(18)[..., None, None])
    elif change == "inner":
        layer.conv2.conv = doubled
    else:
        layer.conv2.register_forward_hook(lambda module, arguments, output: 2 * output)
    torch.testing.assert_close(layer(x), 2 * their_layer(entries, x, 3, 1))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((8, 3, 1), ValueError, "channels is 8, expected at least 16"),
        ((56, 3, 1), ValueError, "channels is 56, expected a multiple"),
        ((32, 4, 1), ValueError, "kernel_size is 4, expected an odd number with stride 1"),
        ((32, (3, 3), 1), TypeError, "kernel_size"),
        ((32, 3, 0), ValueError, "stride"),
        ((32.0, 3, 1), TypeError, "channels"),
    ],
)
def test_arguments_are_checked(arguments, error, text):
    with pytest.raises(error, match=text):
        involution(*arguments)


def test_input_is_checked():
    with pytest.raises(ValueError, match=r"involution: .*\(2, 16, 5, 5\).*\(N, 32, H, W\)"):
        involution(32, 3, 1)(torch.randn(2, 16, 5, 5))


USER_FILE = '''
import torch
from torch import nn
from utils.involution_cuda import involution, _involution_cuda


class Bottleneck(nn.Module):
    def __init__(self, channels, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 1, bias=False)
        self.conv2 = involution(32, 7, stride)
        self.bn = nn.BatchNorm2d(32)

    def forward(self, x):
        return self.bn(self.conv2(self.conv1(x))).relu()


class Dilated(involution):
    """A layer of the user's, built on theirs: their attributes, submodules and function."""

    def __init__(self, channels, kernel_size, stride=1):
        super(Dilated, self).__init__(channels, kernel_size, stride)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        weight = self.conv2(self.conv1(x if self.stride == 1 else self.avgpool(x)))
        b, c, h, w = weight.shape
        weight = weight.view(b, self.groups, self.kernel_size, self.kernel_size, h, w)
        return _involution_cuda(x, weight, self.bias, stride=self.stride, padding=self.kernel_size - 1, dilation=2)
'''


def test_a_users_file_with_one_line_changed():
    before, after = "from utils.involution_cuda import", "from pyinvolution.compat.involution import"
    assert USER_FILE.count(before) == 1
    user = types.ModuleType("user")
    exec(compile(USER_FILE.replace(before, after), "user.py", "exec"), user.__dict__)
    torch.manual_seed(0)

    block = user.Bottleneck(24, stride=2).double().eval()
    entries = their_entries(32, 7)
    saved = block.state_dict() | {f"conv2.{name}": value for name, value in entries.items()}
    block.load_state_dict(saved, strict=True)
    x = torch.randn(1, 24, 4, 6, dtype=torch.float64)
    expected = block.bn(their_layer(entries, F.conv2d(x, block.conv1.weight), 7, 2)).relu()
    torch.testing.assert_close(block(x), expected)

    layer = user.Dilated(32, 3).double().eval()
    entries = their_entries(32, 3)
    layer.load_state_dict(entries | {"bias": torch.randn(32).double()}, strict=True)
    x = torch.randn(1, 32, 4, 5, dtype=torch.float64)
    weight = layer.conv2(layer.conv1(x)).view(1, 2, 3, 3, 4, 5)
    torch.testing.assert_close(layer(x), theirs(x, weight, layer.bias, padding=2, dilation=2))


def test_a_file_that_imports_the_module_by_their_name(monkeypatch):
    # A package of the user's own may also lead to it: sys.modules["involution_cuda"] = pyinvolution.compat.involution.
    monkeypatch.setitem(sys.modules, "involution_cuda", module)
    names: dict = {}
    exec("from involution_cuda import involution, _involution_cuda", names)
    assert names["involution"] is involution
    assert names["_involution_cuda"] is _involution_cuda


def test_traced_optimized_and_copied():
    layer, entries = build(32, 3, 2)
    x = torch.randn(2, 32, 6, 4, dtype=torch.float64)
    expected = their_layer(entries, x, 3, 2)
    torch.testing.assert_close(fx.symbolic_trace(layer)(x), expected)
    torch.testing.assert_close(copy.deepcopy(layer)(x), expected)
    torch.testing.assert_close(optimize_for_inference(layer, x)(x), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    layer, entries = build(32, 7, 2)
    x = torch.randn(2, 32, 8, 6, dtype=torch.float64)
    torch.testing.assert_close(layer.cuda()(x.cuda()).cpu(), their_layer(entries, x, 7, 2))
