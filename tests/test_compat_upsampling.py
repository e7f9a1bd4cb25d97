"""The stand-ins for CARAFE, SAPA and FeatUp, against their definitions written out, and in files as users have them."""

import sys
from functools import partial
from itertools import product

import pytest
import torch
from tolerance import assert_accurate
from torch import nn
from torch.nn import functional as F

from pyinvolution.compat import featup, sapa
from pyinvolution.compat.carafe import CARAFE, CARAFENaive, CARAFEPack, carafe, carafe_naive
from pyinvolution.compat.featup import AdaptiveConv

draw = partial(torch.randn, dtype=torch.float64)


def agree(actual, expected, tensors):
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, tensors, upstream), torch.autograd.grad(expected, tensors, upstream)
    )


def reassembled(features, masks, kernel, groups, scale):
    """The loops of CARAFE's naive CUDA kernel, vectorised over the batch and the channels of a group."""
    n, channels, height, width = features.shape
    width_of_group = channels // groups
    rows = []
    for group, y, x in product(range(groups), range(scale * height), range(scale * width)):
        members = features[:, group * width_of_group : (group + 1) * width_of_group]
        total = features.new_zeros(n, width_of_group)
        for i, j in product(range(kernel), range(kernel)):
            row, column = y // scale + i - (kernel - 1) // 2, x // scale + j - (kernel - 1) // 2
            if 0 <= row < height and 0 <= column < width:
                mask = masks[:, group * kernel**2 + i * kernel + j, y, x]
                total = total + mask[:, None] * members[:, :, row, column]
        rows.append(total)
    found = torch.stack(rows, -1).view(n, width_of_group, groups, scale * height, scale * width)
    return found.transpose(1, 2).flatten(1, 2)


# --- CARAFE -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "groups", "scale"), [(5, 1, 2), (3, 2, 2), (3, 4, 3), (1, 1, 2), (5, 2, 1)])
def test_carafe(kernel, groups, scale):
    torch.manual_seed(0)
    features = draw(2, 4, 3, 4).requires_grad_()
    masks = draw(2, groups * kernel**2, scale * 3, scale * 4).requires_grad_()
    sizes = (kernel, groups, scale)
    agree(carafe(features, masks, *sizes), reassembled(features, masks, *sizes), (features, masks))
    for other in (partial(carafe_naive, kernel_size=kernel, group_size=groups, scale_factor=scale), CARAFE(*sizes),
                  CARAFENaive(*sizes)):  # fmt: skip
        torch.testing.assert_close(other(features, masks), carafe(features, masks, *sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    torch.manual_seed(0)
    features, masks = torch.randn(1, 32, 3, 4, dtype=dtype), torch.randn(1, 25, 6, 8).softmax(1).to(dtype)
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    oracle, reference = (reassembled(features.to(t), masks.to(t), 5, 1, 2) for t in (torch.double, wide))
    assert_accurate(carafe(features, masks, 5, 1, 2), oracle, reference.to(dtype), "carafe")


def their_pack(entries, x, scale, kernel, groups, padding, dilation):
    """The forward pass of mmcv's layer, from a state dict under its names."""
    small = F.conv2d(x, entries["channel_compressor.weight"], entries["channel_compressor.bias"])
    weight, bias = entries["content_encoder.weight"], entries["content_encoder.bias"]
    mask = F.pixel_shuffle(F.conv2d(small, weight, bias, 1, padding, dilation), scale)
    n, _, height, width = mask.shape
    mask = mask.view(n, groups, kernel**2, height, width).softmax(2).view(n, -1, height, width)
    return reassembled(x, mask, kernel, groups, scale)


def test_carafe_pack():
    torch.manual_seed(0)
    layer = CARAFEPack(
        8, 2, up_kernel=3, up_group=2, encoder_kernel=3, encoder_dilation=2, compressed_channels=6
    ).double()
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "channel_compressor.weight": (6, 8, 1, 1),
        "channel_compressor.bias": (6,),
        "content_encoder.weight": (72, 6, 3, 3),
        "content_encoder.bias": (72,),
    }
    entries = {name: draw(value.shape) for name, value in layer.state_dict().items()}
    layer.load_state_dict(entries, strict=True)
    x = draw(2, 8, 5, 4)
    torch.testing.assert_close(layer(x), their_pack(entries, x, 2, 3, 2, 2, 2))
    # As mmcv starts: the kernels are almost means, the biases zero.
    layer = CARAFEPack(64, 2)
    assert layer.content_encoder.weight.std().item() == pytest.approx(0.001, rel=0.1)
    bound = (6 / (64 + 64)) ** 0.5
    assert 0.9 * bound < layer.channel_compressor.weight.abs().max() <= bound
    assert not layer.channel_compressor.bias.any()
    assert not layer.content_encoder.bias.any()


# --- SAPA -------------------------------------------------------------------------------------------------------------


def windows(key, kernel, scale):
    """(B, s H, s W, K K, C): the pixels around the one in which each pixel of the large image lies, by unfolding."""
    n, height, width, channels = key.shape
    columns = F.unfold(key.permute(0, 3, 1, 2), kernel, padding=kernel // 2)
    columns = columns.view(n, channels, kernel**2, height, width).permute(0, 3, 4, 2, 1)
    return columns.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


@pytest.mark.parametrize(("kernel", "scale"), [(5, 2), (3, 3), (1, 2), (3, 1)])
def test_sapa(kernel, scale):
    torch.manual_seed(0)
    query, key = draw(2, scale * 4, scale * 3, 6).requires_grad_(), draw(2, 4, 3, 6).requires_grad_()
    expected = torch.einsum("bhwc,bhwkc->bhwk", query, windows(key, kernel, scale))
    agree(sapa.sim(query, key, kernel, scale), expected, (query, key))
    attn, value = draw(2, scale * 4, scale * 3, kernel**2).requires_grad_(), draw(2, 4, 3, 5).requires_grad_()
    expected = torch.einsum("bhwk,bhwkc->bhwc", attn, windows(value, kernel, scale))
    agree(sapa.atn(attn, value, kernel, scale), expected, (attn, value))


SAPA_FILE = """
import torch.nn.functional as F
from sapa import sim, atn


def attention(q, k, v, up_kernel_size=5, up_factor=2):
    attn = F.softmax(sim(q, k, up_kernel_size, up_factor), dim=-1)
    return atn(attn, v, up_kernel_size, up_factor)
"""


# --- FeatUp -----------------------------------------------------------------------------------------------------------


def filtered(input, filters):
    _, height, width, rows, columns = filters.shape
    taps = (
        input[:, :, i : i + height, j : j + width] * filters[:, None, :, :, i, j]
        for i, j in product(range(rows), range(columns))
    )
    return sum(taps)


@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (7, 7), (3, 5)])
def test_adaptive_conv(rows, columns):
    torch.manual_seed(0)
    input = draw(2, 3, 5 + rows - 1, 6 + columns - 1).requires_grad_()
    filters = draw(2, 5, 6, rows, columns).requires_grad_()
    agree(AdaptiveConv.apply(input, filters), filtered(input, filters), (input, filters))


FEATUP_FILE = """
import torch
import torch.nn.functional as F
from featup.adaptive_conv_cuda.adaptive_conv import AdaptiveConv


def upsample(source, kernel, radius=3):
    GB, _, GH, GW = kernel.shape
    combined_kernel = kernel.permute(0, 2, 3, 1).reshape(GB, GH, GW, 2 * radius + 1, 2 * radius + 1)
    hr_source = torch.nn.Upsample((GH, GW), mode='bicubic', align_corners=False)(source)
    hr_source_padded = F.pad(hr_source, pad=[radius] * 4, mode='reflect')
    return AdaptiveConv.apply(hr_source_padded, combined_kernel)
"""


# --- all --------------------------------------------------------------------------------------------------------------


def run_file(text):
    names = {}
    exec(compile(text, "theirs.py", "exec"), names)
    return names


def test_files_with_one_import_changed():
    torch.manual_seed(0)
    attention = run_file(SAPA_FILE.replace("from sapa", "from pyinvolution.compat.sapa"))["attention"]
    q, k, v = draw(2, 8, 6, 4), draw(2, 4, 3, 4), draw(2, 4, 3, 7)
    attn = torch.einsum("bhwc,bhwkc->bhwk", q, windows(k, 5, 2)).softmax(-1)
    torch.testing.assert_close(attention(q, k, v), torch.einsum("bhwk,bhwkc->bhwc", attn, windows(v, 5, 2)))

    theirs = "from featup.adaptive_conv_cuda.adaptive_conv"
    upsample = run_file(FEATUP_FILE.replace(theirs, "from pyinvolution.compat.featup"))["upsample"]
    source, kernel = draw(1, 3, 4, 5), draw(1, 49, 8, 10)
    padded = F.pad(F.interpolate(source, (8, 10), mode="bicubic", align_corners=False), [3] * 4, mode="reflect")
    torch.testing.assert_close(upsample(source, kernel), filtered(padded, kernel.movedim(1, 3).unflatten(3, (7, 7))))

    pack = run_file("from pyinvolution.compat.carafe import CARAFEPack\nup = CARAFEPack(16, scale_factor=2)")["up"]
    assert pack(torch.randn(1, 16, 5, 6)).shape == (1, 16, 10, 12)


def test_install_in_place_of_featup(monkeypatch):
    name = "featup.adaptive_conv_cuda.adaptive_conv"
    monkeypatch.delitem(sys.modules, name, raising=False)
    featup.install()
    try:
        assert run_file(FEATUP_FILE)["AdaptiveConv"] is AdaptiveConv
    finally:
        del sys.modules[name]
    monkeypatch.setitem(sys.modules, name, type(sys)(name))
    with pytest.raises(ImportError, match="already imported"):
        featup.install()


def test_second_derivatives():
    torch.manual_seed(0)
    features, masks = draw(1, 2, 2, 3).requires_grad_(), draw(1, 9, 4, 6).requires_grad_()
    assert torch.autograd.gradgradcheck(partial(carafe, kernel_size=3, group_size=1, scale_factor=2), (features, masks))
    query, key = draw(1, 4, 6, 2).requires_grad_(), draw(1, 2, 3, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(partial(sapa.sim, kernel_size=3, scale_factor=2), (query, key))


X, M = torch.randn(1, 4, 3, 3), torch.randn(1, 9, 6, 6)
Q, K, V = torch.randn(1, 6, 6, 4), torch.randn(1, 3, 3, 4), torch.randn(1, 3, 3, 5)
REFUSED = {
    "carafe, masks": (lambda: carafe(X, M, 5, 1, 2), ValueError, r"carafe: masks has .* expected \(1, 25, 6, 6\)"),
    "carafe, even": (lambda: carafe_naive(X, M, 2, 1, 2), ValueError, "carafe_naive: kernel_size is 2, expected an"),
    "carafe, groups": (lambda: carafe(X, M, 3, 3, 2), ValueError, "group_size is 3, expected a divisor of the 4"),
    "carafe, scale": (lambda: carafe(X, M, 3, 1, 2.0), TypeError, "scale_factor is 2.0, expected an int"),
    "carafe, pair": (lambda: CARAFE((3, 3), 1, 2), TypeError, r"CARAFE: kernel_size is \(3, 3\), expected an int"),
    "carafe, dtype": (lambda: carafe(X, M.double(), 3, 1, 2), TypeError, "masks has dtype torch.float64, expected"),
    "pack": (lambda: CARAFEPack(16, 2, up_kernel=4), ValueError, "CARAFEPack: up_kernel is 4, expected an odd number"),
    "pack, groups": (lambda: CARAFEPack(16, 2, up_group=3), ValueError, "up_group is 3, expected a divisor of the 16"),
    "pack, input": (lambda: CARAFEPack(16, 2)(X[0]), ValueError, r"CARAFEPack: input .* expected \(N, 16, H, W\)"),
    "sim": (lambda: sapa.sim(Q, K, 3, 3), ValueError, r"sim: query has shape .* expected \(1, 9, 9, 4\)"),
    "sim, even": (lambda: sapa.sim(Q, K, 4, 2), ValueError, "sim: kernel_size is 4, expected an odd number"),
    "atn": (lambda: sapa.atn(Q, V, 3, 2), ValueError, r"atn: attn has shape .* expected \(1, 6, 6, 9\)"),
    "atn, type": (lambda: sapa.atn(Q, None, 3, 2), TypeError, "atn: value is a NoneType, expected a Tensor"),
    "filters": (
        lambda: AdaptiveConv.apply(X, torch.randn(1, 3, 3, 3, 3)),
        ValueError,
        r"AdaptiveConv: input has shape \(1, 4, 3, 3\), expected \(1, 4, 5, 5\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_refusals(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_layers_are_followed_by_fx():
    x = torch.randn(1, 16, 5, 4)
    pack = CARAFEPack(16, 2)
    torch.testing.assert_close(torch.fx.symbolic_trace(pack)(x), pack(x))
    layer = CARAFE(3, 1, 2)
    torch.testing.assert_close(torch.fx.symbolic_trace(layer)(X, M), layer(X, M))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    torch.manual_seed(0)
    pack = CARAFEPack(16, 2).double()
    sizes = {"kernel_size": 3, "scale_factor": 2}
    cases = [
        (pack, (draw(2, 16, 5, 6),)),
        (partial(sapa.sim, **sizes), (draw(1, 8, 6, 4), draw(1, 4, 3, 4))),
        (partial(sapa.atn, **sizes), (draw(1, 8, 6, 9), draw(1, 4, 3, 5))),
        (AdaptiveConv.apply, (draw(2, 3, 9, 10), draw(2, 5, 6, 5, 5))),
    ]
    wanted = [function(*tensors) for function, tensors in cases]
    pack.cuda()
    for (function, tensors), expected in zip(cases, wanted, strict=True):
        torch.testing.assert_close(function(*(tensor.cuda() for tensor in tensors)).cpu(), expected)


def test_modules_without_parameters():
    for layer in (CARAFE(5, 1, 2), CARAFENaive(3, 1, 2)):
        assert isinstance(layer, nn.Module)
        assert not layer.state_dict()
        assert "scale_factor=2" in repr(layer)
