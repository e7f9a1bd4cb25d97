"""Involution2d with normed kernels, a guide or a generator of one's own, and Involution1d."""

import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pyinvolution import Involution1d, Involution2d, convert, optimize_for_inference, reference
from pyinvolution.studies.learned_kernels import involution_kernels


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def layer(*args, cls=Involution2d, **options):
    torch.manual_seed(0)
    made = cls(*args, dtype=torch.float64, **options).eval()
    for name, value in made.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if "norm" in name else torch.randn_like(value) / 2)
    return made


def raw_kernels(made: Involution2d, source: Tensor) -> Tensor:
    pooled = source if made.stride == (1, 1) else nn.functional.avg_pool2d(source, made.stride, ceil_mode=True)
    return made.span(made.reduce(pooled)).unflatten(1, (made.groups, *made.kernel_size))


NORMS = {
    "softmax": ("softmax", lambda k: k.exp() / k.exp().sum((2, 3), keepdim=True)),
    "l2": ("l2", lambda k: k / k.square().sum((2, 3), keepdim=True).sqrt()),
    "function": (lambda k: k - k.mean(2, keepdim=True), lambda k: k - k.mean((2, 3), keepdim=True)),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("stride", [1, 2])
def test_kernels_are_normed_over_their_taps(name, stride):
    norm, written = NORMS[name]
    made, x = layer(16, (3, 5), stride, group_channels=4, kernel_norm=norm), random(2, 16, 6, 8)
    kernels = written(raw_kernels(made, x))
    torch.testing.assert_close(made.kernels(x), kernels)
    expected = reference.involution2d(x, kernels, None, stride, (1, 2))
    torch.testing.assert_close(made(x), expected)
    torch.testing.assert_close(made(x[0]), expected[0])
    torch.testing.assert_close(made.kernels(x[0]), kernels[0])
    assert torch.autograd.gradcheck(lambda t: made(t).square().mean(), x[:1].requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_lengths_are_known_without_the_kernels(dtype, bias, format):
    made = layer(32, 3, group_channels=16, kernel_norm="l2")
    if not bias:
        made.span = nn.Conv2d(8, 18, 1, bias=False, dtype=torch.float64)
    x = random(2, 32, 6, 8)
    kernels = nn.functional.normalize(raw_kernels(made, x).flatten(2, 3), dim=2).unflatten(2, (3, 3))
    expected = reference.involution2d(x, kernels, None, 1, 1)
    output = made.to(dtype)(x.to(dtype).to(memory_format=format))
    assert output.dtype == dtype
    assert output.is_contiguous(memory_format=format)
    error = (output.double() - expected).abs().max() / expected.abs().max()
    assert error < 8 * torch.finfo(dtype).eps
    code = torch.export.export(made, (x.to(dtype).to(memory_format=format),)).graph_module.code
    assert "linalg_vector_norm" not in code


def test_more_reduced_channels_than_taps_take_the_kernels():
    made, x = layer(32, 2, group_channels=8, kernel_norm="l2"), random(2, 32, 6, 8)
    assert "linalg_vector_norm" in torch.export.export(made, (x,)).graph_module.code
    expected = reference.involution2d(pad(x, (0, 1, 0, 1)), NORMS["l2"][1](raw_kernels(made, x)), None, 1, 0)
    torch.testing.assert_close(made(x), expected)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_kernels_of_length_zero_stay_zero(dtype, fused):
    made = layer(16, 3, group_channels=4, kernel_norm="l2", fused=fused).to(dtype)
    x = random(1, 16, 4, 5).to(dtype)
    with torch.no_grad():
        made.span.bias.zero_()
        made.reduce.norm.bias.fill_(-100)
        made.reduce.norm.bias[0] = 0
    reduced = made.reduce(x)
    silent = (reduced == 0).all(1).expand(16, -1, -1)
    assert silent.any()
    assert not silent.all()
    output = made(x.requires_grad_())[0]
    assert (output[silent] == 0).all()
    output.square().sum().backward()
    for tensor in (x, *made.parameters()):
        assert tensor.grad.isfinite().all()


def test_softmax_kernels_average():
    made = layer(8, 3, group_channels=4, kernel_norm="softmax")
    assert made.kernels(random(1, 8, 5, 6)).sum((2, 3)).allclose(torch.ones(1, 2, 5, 6, dtype=torch.float64))
    inside = made(torch.ones(1, 8, 5, 6, dtype=torch.float64))[..., 1:-1, 1:-1]
    torch.testing.assert_close(inside, torch.ones_like(inside))


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("channels", [None, 3])
def test_kernels_come_from_the_guide(fused, channels):
    made = layer(16, 3, 2, group_channels=8, reduction=2, guide_channels=channels, fused=fused)
    x, guide = random(2, 16, 7, 6), random(2, channels or 16, 7, 6)
    kernels = raw_kernels(made, guide)
    torch.testing.assert_close(made.kernels(x, guide), kernels)
    torch.testing.assert_close(made(x, guide), reference.involution2d(x, kernels, None, 2, 1))
    torch.testing.assert_close(made(x[0], guide[0]), made(x, guide)[0])
    gradient = torch.autograd.grad(made(x, guide.requires_grad_()).sum(), guide)[0]
    assert gradient.abs().sum() > 0
    if channels is None:
        torch.testing.assert_close(made(x), made(x, x))


class Generator(nn.Module):
    """Kernels from a 3x3 convolution."""

    def __init__(self, channels, groups, kernel, stride=1, split=False):
        super().__init__()
        self.conv = nn.Conv2d(channels, groups * kernel * kernel, 3, stride, padding=1, dtype=torch.float64)
        self.shape = (groups, kernel, kernel) if split else None

    def forward(self, x):
        kernels = self.conv(x)
        return kernels if self.shape is None else kernels.unflatten(1, self.shape)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_generator_makes_the_kernels(split, stride):
    generator = Generator(5, 2, 3, stride, split)
    before = generator.conv.weight.clone()
    made = Involution2d(8, 3, stride, group_channels=4, guide_channels=5, generator=generator, dtype=torch.float64)
    assert torch.equal(generator.conv.weight, before)  # its initialisation is its own
    assert {name.split(".")[0] for name in made.state_dict()} == {"generator"}
    x, guide = random(2, 8, 6, 7), random(2, 5, 6, 7)
    kernels = generator.conv(guide).unflatten(1, (2, 3, 3))
    torch.testing.assert_close(made(x, guide), reference.involution2d(x, kernels, None, stride, 1))
    assert "reduction" not in repr(made)


@pytest.mark.parametrize("option", [{"kernel_norm": "softmax"}, {"generator": Generator(16, 2, 3)}, {}], ids=str)
def test_optimized_networks_keep_the_options(option):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = layer(16, 3, group_channels=8, **option)
            self.second = layer(16, 3, group_channels=8)
            self.norm, self.causal = (
                nn.BatchNorm2d(16, dtype=torch.float64),
                layer(16, 3, cls=Involution1d, causal=True),
            )

        def forward(self, x):
            y = self.norm(self.first(x)).relu()
            return self.causal(self.second(y, x).flatten(2))

    net = Net().eval()
    net.norm.running_mean.normal_()
    optimized = optimize_for_inference(net, random(2, 16, 5, 6))
    x = random(1, 16, 7, 4)
    torch.testing.assert_close(optimized(x), net(x))


def test_compiled_and_exported_layers_keep_the_options():
    made = layer(16, 3, group_channels=8, kernel_norm="softmax", guide_channels=4)
    x, guide = random(2, 16, 6, 7), random(2, 4, 6, 7)
    expected = made(x, guide)
    torch.testing.assert_close(torch.compile(made, fullgraph=True, backend="aot_eager")(x, guide), expected)
    sizes = {2: torch.export.Dim("height", min=3, max=64), 3: torch.export.Dim("width", min=3, max=64)}
    program = torch.export.export(made, (x, guide), dynamic_shapes=(sizes, sizes)).module()
    for size in ((6, 7), (9, 4)):
        inputs = random(2, 16, *size), random(2, 4, *size)
        torch.testing.assert_close(program(*inputs), made(*inputs))
    torch.testing.assert_close(torch.jit.trace(made, (x, guide))(x, guide), expected)


def test_symbolic_traces_keep_the_options():
    x, guide = random(2, 16, 6, 7), random(2, 4, 6, 7)
    plain, joint, causal = layer(16, 3), layer(16, 3, guide_channels=4), layer(16, 3, cls=Involution1d, causal=True)
    torch.testing.assert_close(torch.fx.symbolic_trace(plain)(x), plain(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(plain)(x, x + 1), plain(x, x + 1))
    torch.testing.assert_close(torch.fx.symbolic_trace(joint)(x, guide), joint(x, guide))
    torch.testing.assert_close(torch.fx.symbolic_trace(causal)(x.flatten(2)), causal(x.flatten(2)))
    own = layer(16, 3, group_channels=8, kernel_norm="l2", generator=Generator(16, 2, 3))
    torch.testing.assert_close(torch.fx.symbolic_trace(own)(x), own(x))


def test_networks_are_converted_with_normed_kernels_but_with_no_generator():
    net = convert(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1)), kernel_norm="l2")
    assert net[0].kernel_norm == "l2"
    for option in ({"generator": Generator(16, 1, 7)}, {"guide_channels": 3}):
        with pytest.raises(TypeError, match=f"{next(iter(option))} cannot be given"):
            convert(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1)), **option)


def test_the_kernels_of_a_network_are_those_it_applies():
    net = nn.Sequential(layer(16, 3, kernel_norm="softmax"), layer(16, 3, generator=Generator(16, 1, 3)))
    x = random(1, 16, 5, 4)
    kernels = involution_kernels(net, x)
    torch.testing.assert_close(torch.from_numpy(kernels["0"]), net[0].kernels(x))
    torch.testing.assert_close(torch.from_numpy(kernels["1"]), net[1].kernels(net[0](x)))


def test_layers_of_before_there_were_options_are_unpickled():
    made = layer(16, 3)
    state = made.__getstate__() if hasattr(made, "__getstate__") else made.__dict__
    old = {name: value for name, value in state.items() if name not in ("kernel_norm", "guide_channels", "generator")}
    again = Involution2d.__new__(Involution2d)
    again.__setstate__(old)
    x = random(1, 16, 4, 5)
    torch.testing.assert_close(again(x), made(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(made))(x), made(x))


X = random(1, 16, 5, 6)
WRONG = [
    (lambda: Involution2d(64, group_channels=24), ValueError, "channels=64: the nearest are 16 and 32"),
    (lambda: Involution2d(24), ValueError, "expected a divisor of channels=24: the nearest are 12"),
    (lambda: Involution2d(8), ValueError, "the nearest is 8"),
    (lambda: Involution2d(16, kernel_norm="l1"), ValueError, "kernel_norm is 'l1', expected one of softmax, l2"),
    (lambda: Involution2d(16, kernel_norm=2), TypeError, "kernel_norm is 2"),
    (lambda: Involution2d(16, generator=torch.relu), TypeError, "generator is a builtin_function_or_method"),
    (lambda: Involution2d(16, guide_channels=0), ValueError, "guide_channels is 0"),
    (lambda: Involution2d(16, guide_channels=2), ValueError, "reduction is 4, expected at most guide_channels=2"),
    (lambda: layer(16, 3, guide_channels=4)(X), ValueError, "guide is None, expected a tensor with 4 channels"),
    (lambda: layer(16, 3)(X, X[:, :8]), ValueError, "guide has shape (1, 8, 5, 6), expected (1, 16, 5, 6)"),
    (lambda: layer(16, 3)(X, X[..., :5]), ValueError, "guide has shape (1, 16, 5, 5)"),
    (lambda: layer(16, 3)(X, 3), TypeError, "guide is a int"),
    (lambda: layer(16, 3, generator=nn.Identity())(X), ValueError, "(1, 16, 5, 6), expected (N, 9, 5, 6) or (N, 1"),
    (lambda: layer(16, 3, generator=Generator(16, 1, 3, 2))(X), ValueError, "of shape (1, 9, 3, 3)"),
    (lambda: Involution1d(16, (1, 3)), TypeError, "kernel_size is (1, 3)"),
    (lambda: Involution1d(16, 3, 2, causal=True), ValueError, "stride is 2, expected 1 with causal=True"),
    (lambda: Involution1d(16, 3, causal=1), TypeError, "causal is 1"),
    (lambda: layer(16, 3, cls=Involution1d)(X), ValueError, "(1, 16, 5, 6), expected (N, C, L) or (C, L)"),
    (lambda: layer(16, 3, cls=Involution1d)(X[0, 1:]), ValueError, "input has shape"),
    (lambda: layer(16, 3, cls=Involution1d)(None), TypeError, "input is a NoneType"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_what_does_not_fit_is_named(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)


# --- sequences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"dilation": 3}, {"causal": True, "dilation": 2}], ids=str)
def test_a_sequence_is_filtered_by_the_equation(options):
    made, x = layer(8, 5, cls=Involution1d, group_channels=4, **options), random(2, 8, 13)
    stride, dilation = options.get("stride", 1), options.get("dilation", 1)
    kernels = made.kernels(x)
    length = -(-13 // stride)
    assert kernels.shape == (2, 2, 5, length)
    reach = dilation * 4
    padded = pad(x, (reach, 0) if made.causal else (reach // 2, reach // 2))
    expected = torch.zeros(2, 8, length, dtype=torch.float64)
    for p in range(length):
        for k in range(5):
            weights = kernels[:, :, k, p].repeat_interleave(4, 1)
            expected[:, :, p] += weights * padded[:, :, p * stride + k * dilation]
    torch.testing.assert_close(made(x), expected)
    torch.testing.assert_close(made(x[0]), expected[0])


def test_a_causal_layer_sees_nothing_of_the_future():
    x, later = random(1, 16, 12), 7
    changed = x.clone()
    changed[..., later:] += 5
    for causal in (True, False):
        made = layer(16, 4, cls=Involution1d, dilation=2, causal=causal)
        same = (made(changed) == made(x)).all(1)[0]
        assert same[:later].all().item() == causal
        assert not same[later:].any()


def test_sequences_are_compiled_and_exported():
    made = layer(16, 3, cls=Involution1d, causal=True)
    length = torch.export.Dim("length", min=4, max=64)
    program = torch.export.export(made, (random(2, 16, 9),), dynamic_shapes=({2: length},)).module()
    compiled = torch.compile(made, fullgraph=True, dynamic=True, backend="aot_eager")
    for x in (random(2, 16, 9), random(2, 16, 17)):
        torch.testing.assert_close(program(x), made(x))
        torch.testing.assert_close(compiled(x), made(x))
