"""Batch norm, addition and ReLU in one operator: results, gradients, buffers, and where the modules run instead."""

import copy
import itertools

import pytest
import torch
from surgeries import in_order
from tolerance import assert_accurate, assert_step_accurate
from torch import nn

from pyinvolution import modules, normalization
from pyinvolution.models import create_model
from pyinvolution.normalization import norm_relu

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPES = [(2, 64, 9, 11), (3, 17, 5, 7), (2, 5, 40, 41), (4, 130, 14, 14), (1, 3, 97, 301), (2, 1, 6, 6), (5, 40, 1, 1)]
# In channels_last, few channels are folded: 16 pixels count as one here, then 2, and none where pixels are odd.
SHAPES += [(16, 4, 6, 6), (3, 24, 4, 5), (1, 8, 7, 9)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = {"norm": (False, False), "norm + relu": (False, True), "norm + sum + relu": (True, True)}
"""Whether there is a residual, and an activation."""
ops = torch.ops.pyinvolution


class Calls:
    """How often the operator ran, by itself or in that of a whole layer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        run = normalization._run

        def counted(*arguments):
            self.count += 1
            return run(*arguments)

        def counted_layer(*arguments):
            self.count += 1
            return run_layer(*arguments)

        run_layer = modules.run_as_one
        monkeypatch.setattr(normalization, "_run", counted)
        monkeypatch.setattr(modules, "run_as_one", counted_layer)


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


def problem(shape, dtype, layout, adds, seed=0):
    torch.manual_seed(seed)
    x, residual, gy = (torch.randn(shape).mul(2).add(3 * (i == 0)).to(dtype) for i in range(3))
    x, residual, gy = (t.to(memory_format=LAYOUTS[layout]) for t in (x, residual, gy))
    norm = nn.BatchNorm2d(shape[1])
    nn.init.uniform_(norm.weight, -1.5, 1.5)
    nn.init.normal_(norm.bias)
    return norm.train(), x, residual if adds else None, gy


def results(norm, x, residual, gy, function, dtype=None, relu=True):
    """Output, gradients and buffers, computed in ``dtype``."""
    if dtype is not None:
        norm, x, gy = copy.deepcopy(norm).to(dtype), x.to(dtype), gy.to(dtype)
        residual = None if residual is None else residual.to(dtype)
    leaves = [t.clone().requires_grad_() for t in (x, residual) if t is not None]
    output = function(norm, nn.ReLU() if relu else None, *leaves)
    output.backward(gy)
    return [output.detach(), *(leaf.grad for leaf in leaves), norm.weight.grad, norm.bias.grad, *norm.buffers()]


def by_modules(norm, activation, x, residual=None):
    x = norm(x)
    x = x if residual is None else x + residual
    return x if activation is None else activation(x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results(shape, dtype, layout, form, calls):
    adds, relu = FORMS[form]
    norm, x, residual, gy = problem(shape, dtype, layout, adds)
    found = results(copy.deepcopy(norm), x, residual, gy, norm_relu, relu=relu)
    assert calls.count == 1
    twin = copy.deepcopy(norm)
    reference = results(twin, x, residual, gy, by_modules, relu=relu)
    exact = results(norm, x, residual, gy, by_modules, torch.float64, relu)
    assert found[0].is_contiguous(memory_format=LAYOUTS[layout])
    # Where a sum is next to zero, rounding decides whether the ReLU lets it through.
    z = torch.nn.functional.batch_norm(x.double(), None, None, norm.weight.double(), norm.bias.double(), True)
    near = relu & ((z if residual is None else z + residual.double()).abs() < 1e-2)
    for value, other, oracle in zip(found[: 1 + 1 + adds], reference, exact, strict=False):
        assert_accurate(value.masked_fill(near, 0), oracle.masked_fill(near, 0), other.masked_fill(near, 0))
    for value, other in zip(found[2 + adds :], exact[2 + adds :], strict=True):
        scale = gy.double().abs().sum() / shape[1]
        torch.testing.assert_close(value.double(), other.double(), rtol=1e-4, atol=float(2e-3 * scale))


def test_statistics_do_not_cancel():
    """A mean that is a thousand deviations away; and gradients are of the definition."""
    torch.manual_seed(0)
    for layout in LAYOUTS.values():
        x = (torch.randn(4, 20, 31, 33) + 1000).to(memory_format=layout)
        mean, invstd = ops.batch_norm_statistics(x, None, None, None, 0.1, 1e-5)
        torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)
        expected = (x.double().var((0, 2, 3), unbiased=False) + 1e-5).rsqrt()
        # Floats around 1000 are 6e-5 apart.
        torch.testing.assert_close(invstd.double(), expected, rtol=6e-5, atol=0)


@pytest.mark.parametrize("shape", [(3, 70, 21, 23), (4, 4, 80, 81)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_again_and_with_any_number_of_threads(dtype, layout, shape):
    norm, x, residual, gy = problem(shape, dtype, layout, True)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, mean, invstd = ops.batch_norm(x, residual, norm.weight, norm.bias, None, None, None, 0.1, 1e-5, True)
            again = ops.batch_norm_output(x, residual, norm.weight, norm.bias, mean, invstd, True)
            assert torch.equal(again, y)
            found.append((y, *ops.batch_norm_backward(gy, x, y, norm.weight, norm.bias, mean, invstd, True)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(value, layout):
    """A NaN or an infinity in a channel makes all of that channel NaN, and no other."""
    norm, x, residual, _ = problem((2, 20, 6, 7), torch.float32, layout, True)
    x[1, 3, 2, 2] = value
    residual[0, 5, 1, 1] = value
    found, expected = norm_relu(norm, nn.ReLU(), x, residual), by_modules(copy.deepcopy(norm), nn.ReLU(), x, residual)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())
    assert found[:, 3].isnan().all()


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("track", [True, False])
def test_buffers(momentum, track, calls):
    norms = [nn.BatchNorm2d(6, momentum=momentum, track_running_stats=track) for _ in range(2)]
    for seed in range(3):
        x = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(seed))
        norm_relu(norms[0], nn.ReLU(), x)
        norms[1](x)
    assert calls.count == 3
    for (name, found), (_, expected) in zip(norms[0].named_buffers(), norms[1].named_buffers(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("frozen", ["none", "weight", "bias", "input"])
def test_second_derivatives(form, frozen):
    adds, relu = FORMS[form]
    norm, x, residual, gy = problem((2, 5, 4, 4), torch.float32, "contiguous", adds)
    norm.weight.requires_grad_(frozen != "weight")
    norm.bias.requires_grad_(frozen != "bias")
    found = []
    for function in (norm_relu, by_modules):
        leaves = [t.clone().requires_grad_(frozen != "input" or t is residual) for t in (x, residual) if t is not None]
        sources = [t for t in (*leaves, norm.weight, norm.bias) if t.requires_grad]
        output = function(norm, nn.ReLU() if relu else None, *leaves)
        first = torch.autograd.grad(output, sources, gy, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(penalty, sources, allow_unused=True)
        found.append([*first, *(torch.zeros_like(s) if g is None else g for s, g in zip(sources, second, strict=True))])
    for value, other in zip(*found, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-3)
    assert frozen == "input" or any(value.abs().sum() > 0 for value in found[0][len(sources) :])


def test_gradients_by_differences():
    """Of the operator's own backward pass, in float32, away from the ReLU's corner."""
    torch.manual_seed(0)
    x, residual = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    weight, bias, gy = torch.rand(4) + 0.5, torch.randn(4), torch.randn(3, 4, 5, 5)
    y, mean, invstd = ops.batch_norm(x, residual, weight, bias, None, None, None, 0.0, 1e-5, True)
    found = ops.batch_norm_backward(gy, x, y, weight, bias, mean, invstd, True)
    leaves = [t.double().requires_grad_() for t in (x, residual, weight, bias)]
    z = torch.nn.functional.batch_norm(leaves[0], None, None, leaves[2], leaves[3], True, 0.0, 1e-5) + leaves[1]
    expected = torch.autograd.grad(z, leaves, gy.double() * (y > 0))
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value.double(), other, rtol=1e-4, atol=1e-4)


def subclassed():
    class Louder(nn.BatchNorm2d):
        def forward(self, input):
            return 2 * super().forward(input)

    return Louder(8)


def hooked():
    norm = nn.BatchNorm2d(8)
    norm.register_forward_hook(lambda module, inputs, output: output + 1)
    return norm


MODULES = {
    "a subclass": (subclassed, nn.ReLU),
    "a hook": (hooked, nn.ReLU),
    "another norm": (lambda: nn.GroupNorm(2, 8), nn.ReLU),
    "another activation": (lambda: nn.BatchNorm2d(8), nn.SiLU),
    "no parameters": (lambda: nn.BatchNorm2d(8, affine=False), nn.ReLU),
    "evaluation": (lambda: nn.BatchNorm2d(8).eval(), nn.ReLU),
    "float64": (lambda: nn.BatchNorm2d(8, dtype=torch.float64), nn.ReLU),
    "parameters in bfloat16": (lambda: nn.BatchNorm2d(8, dtype=torch.bfloat16), nn.ReLU),
}


@pytest.mark.parametrize("name", MODULES)
def test_where_the_modules_run(name, calls):
    norm, activation = (make() for make in MODULES[name])
    x = torch.randn(3, 8, 6, 6, dtype=next(iter(norm.parameters()), torch.empty(0)).dtype)
    twin = copy.deepcopy(norm)
    assert torch.equal(norm_relu(norm, activation, x, x), activation(twin(x) + x))
    assert calls.count == 0
    for (key, found), expected in zip(norm.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(found, expected), key


def test_other_strides_and_dtypes(calls):
    norm, x, residual, _ = problem((2, 8, 6, 10), torch.float32, "contiguous", True)
    for inputs in ((x[..., ::2], None), (x, residual.to(memory_format=torch.channels_last)), (x, residual.bfloat16())):
        expected = by_modules(copy.deepcopy(norm), nn.ReLU(), *(t for t in inputs if t is not None))
        torch.testing.assert_close(norm_relu(copy.deepcopy(norm), nn.ReLU(), *inputs), expected)
    assert calls.count == 0
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm_relu(norm, nn.ReLU(), x[:1, :, :1, :1])


def test_gradients_in_another_layout():
    for first, second in itertools.permutations(LAYOUTS):
        norm, x, residual, gy = problem((2, 8, 6, 10), torch.float32, first, True)
        other = results(copy.deepcopy(norm), x, residual, gy.to(memory_format=LAYOUTS[second]), norm_relu)
        for found, expected in zip(other, results(norm, x, residual, gy, norm_relu), strict=True):
            assert torch.equal(found, expected)
        expanded = torch.ones(1, 8, 1, 1).expand(2, 8, 6, 10)
        assert results(norm, x, residual, expanded, norm_relu)[1].isfinite().all()


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_network(layout, amp, calls):
    """A step of a RedNet, against one whose modules are called one by one in float64."""
    torch.manual_seed(0)
    model = create_model("rednet", layers=[2, 1], stem_channels=32, base_channels=16, zero_init_residual=False)
    model = model.to(memory_format=LAYOUTS[layout])
    x = torch.randn(4, 3, 64, 64).to(memory_format=LAYOUTS[layout])
    found, counts = [], []
    for network, image in ((copy.deepcopy(model), x), (in_order(copy.deepcopy(model)), x),
                           (in_order(copy.deepcopy(model).double()), x.double())):  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16, enabled=amp and image.dtype is torch.float32):
            output = network(image)
        counts.append(calls.count)
        output.double().square().sum().backward()
        found.append({"output": output.detach(), **{n: p.grad for n, p in network.named_parameters()}})
    # 3 of the stem, and in each of 3 blocks 3 and that of the kernels' generation, which the stem has too; and of the
    # shortcuts of each stage's first block.
    assert counts[0] == 3 + 1 + 3 * 4 + 2
    actual, reference, oracle = found
    assert_step_accurate(actual, oracle, reference)


@pytest.mark.parametrize("operator", ["batch_norm", "batch_norm_output", "batch_norm_backward"])
def test_bad_arguments(operator):
    x, one = torch.randn(2, 4, 5, 5), torch.ones(4)
    rest = {"batch_norm": (None, None, None, 0.1, 1e-5, True)}.get(operator, (one, one, True))
    lead = (x,) if operator == "batch_norm_backward" else ()

    def call(input=x, second=None, weight=one, bias=one):
        return getattr(ops, operator)(*lead, input, second, weight, bias, *rest)

    call()
    for arguments, words in (
        ({"input": x[0]}, "input has shape (4, 5, 5), expected 4 dimensions"),
        ({"input": x.double()}, "input has dtype Double, expected float32, float16 or bfloat16"),
        ({"input": x[:1, :, :1, :1]}, "expected more than 1 value per channel"),
        ({"input": x.expand(2, 4, 5, 5)[:, :, ::2]}, "input has strides"),
        ({"weight": one[:3]}, "weight has shape (3), expected (4)"),
        ({"bias": one.double()}, "bias has dtype"),
        ({"second": x.to(memory_format=torch.channels_last)}, "expected those of input"),
        ({"second": x.half()}, "has dtype"),
    ):
        with pytest.raises(RuntimeError) as error:
            call(**arguments)
        assert words in str(error.value)
