"""The conversions of docs/migration.md at other sizes than its examples, against the other side's equations."""

import pickle
from functools import partial
from itertools import product

import pytest
import torch
from documents import BLOCKS, spans
from test_official import NARROW, checkpoint
from test_official import forward as official_forward
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

from pyinvolution import involution2d, optimize_for_inference
from pyinvolution.models import RedNet, load_official

draw = partial(torch.randn, dtype=torch.float64)


def defined(name):
    """What the block of the page with ``def name`` defines."""
    (block,) = [b for b in BLOCKS if b.name.startswith("docs/migration.md") and f"def {name}(" in b.code]
    names = {"__name__": "__main__"}
    exec(compile(block.code, block.name, "exec"), names)
    return names


def apply(x, kernels, stride, before, group_of):
    """(N, C, H, W) and kernels (N, G, K, K, Ho, Wo) -> output; ``before``: padding at the top and left."""
    kernel, rows, columns = kernels.shape[-3:]
    output = x.new_zeros(*x.shape[:2], rows, columns)
    for c, p, q, i, j in product(range(x.shape[1]), range(rows), range(columns), range(kernel), range(kernel)):
        row, column = p * stride + i - before[0], q * stride + j - before[1]
        if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
            output[:, c, p, q] += kernels[:, group_of(c), i, j, p, q] * x[:, c, row, column]
    return output


def cells(x, stride):
    return x.unflatten(3, (-1, stride)).unflatten(2, (-1, stride)).mean((3, 5))


def normed(x, scale, shift, mean, variance, eps):
    scale = scale / (variance + eps).sqrt()
    return x * scale[:, None, None] + (shift - mean * scale)[:, None, None]


@pytest.mark.parametrize(
    ("channels", "groups", "kernel", "stride", "size"),
    [(8, 4, 3, 1, (5, 6)), (6, 3, 7, 2, (4, 8)), (8, 2, 4, 2, (6, 4)), (4, 1, 3, 3, (6, 3)), (4, 4, 2, 1, (3, 4)),
     (4, 2, 1, 2, (4, 6))],
)  # fmt: skip
def test_keras(channels, groups, kernel, stride, size):
    torch.manual_seed(0)
    reduced = channels // 2
    conv, norm = (
        [draw(1, 1, channels, reduced), draw(reduced)],
        [draw(reduced) for _ in range(3)] + [draw(reduced) ** 2],
    )
    span = [draw(1, 1, reduced, kernel**2 * groups), draw(kernel**2 * groups)]
    layer = defined("from_keras")["from_keras"](conv, norm, span, kernel, groups, stride)

    x = draw(2, channels, *size)
    hidden = torch.einsum("io,nihw->nohw", conv[0][0, 0], cells(x, stride)) + conv[1][:, None, None]
    generated = torch.einsum("io,nihw->nohw", span[0][0, 0], normed(hidden, *norm, 1e-3).relu())
    generated = (generated + span[1][:, None, None]).unflatten(1, (kernel, kernel, groups)).movedim(3, 1)
    # SAME: as many rows as the last window needs, the smaller half before the first.
    before = [max((-(-n // stride) - 1) * stride + kernel - n, 0) // 2 for n in size]
    expected = apply(x, generated, stride, before, lambda c: c % groups)
    torch.testing.assert_close(layer.eval()(x), expected)
    torch.testing.assert_close(optimize_for_inference(layer, x)(x), expected)
    channels_last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(channels_last), expected)

    # In training, the norm removes the bias of the convolution.
    mean, variance = hidden.mean((0, 2, 3)), hidden.var((0, 2, 3), correction=0)
    reduced_output = normed(hidden, norm[0], norm[1], mean, variance, 1e-3).relu()
    torch.testing.assert_close(layer.train().reduce(cells(x, stride)), reduced_output)
    # Keras's momentum of 0.99.
    torch.testing.assert_close(layer.reduce.norm.running_mean, 0.99 * norm[2] + 0.01 * mean - conv[1])
    layer(x).square().sum().backward()
    assert all(parameter.grad.any() for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("channels", "out_channels", "groups", "ratio", "kernel", "stride", "padding", "bias"),
    [(6, 8, 2, 2, 3, 1, 1, True), (4, 12, 3, 5, 5, 2, 2, False), (6, 6, 1, 1, 3, 2, 1, False),
     (8, 8, 4, 2, 1, 1, 0, True), (8, 4, 2, 1, 7, 2, 3, True), (4, 8, 2, 2, 7, 3, (2, 2), False),
     (4, 6, 2, 1, 4, 2, 1, True)],
)  # fmt: skip
def test_reich(channels, out_channels, groups, ratio, kernel, stride, padding, bias):
    torch.manual_seed(0)
    reduced = out_channels // ratio
    shapes = {"reduce_mapping": (reduced, channels), "span_mapping": (kernel**2 * groups, reduced)}
    if channels != out_channels:
        shapes["initial_mapping"] = (out_channels, channels)
    entries = {f"{name}.weight": draw(*shape, 1, 1) for name, shape in shapes.items()}
    entries |= {f"{name}.bias": draw(shape[0]) for name, shape in shapes.items() if bias}
    norm = [draw(reduced) for _ in range(3)] + [draw(reduced) ** 2]
    names = ("weight", "bias", "running_mean", "running_var")
    entries |= {f"sigma_mapping.0.{name}": value for name, value in zip(names, norm, strict=True)}
    entries["sigma_mapping.0.num_batches_tracked"] = torch.tensor(3)
    layer = defined("from_reich")["from_reich"](entries, kernel, groups, stride, padding).eval()

    def conv(name, x):
        y = torch.einsum("oi,nihw->nohw", entries[f"{name}.weight"][:, :, 0, 0], x)
        return y + entries[f"{name}.bias"][:, None, None] if bias else y

    x = draw(2, channels, 2 * stride, 3 * stride)
    hidden = normed(conv("reduce_mapping", cells(x, stride)), *norm, 1e-5).relu()
    generated = conv("span_mapping", hidden).unflatten(1, (groups, kernel, kernel))
    mapped = x if channels == out_channels else conv("initial_mapping", x)
    expected = apply(mapped, generated, stride, _pair(padding), lambda c: c // (out_channels // groups))
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(optimize_for_inference(layer, x)(x), expected)


@pytest.mark.parametrize(("channels", "kernel", "stride"), [(32, 3, 1), (16, 7, 2), (48, 1, 2)])
@pytest.mark.parametrize(("eps", "activation"), [(1e-3, torch.nn.SiLU), (1e-5, torch.nn.ReLU)])
def test_yolo(channels, kernel, stride, eps, activation):
    torch.manual_seed(0)
    reduced, taps = channels // 4, kernel**2 * (channels // 16)
    entries = {"conv1.conv.weight": draw(reduced, channels, 1, 1), "conv2.conv.weight": draw(taps, reduced, 1, 1)}
    norms = {name: [draw(n), draw(n), draw(n), draw(n) ** 2] for name, n in (("conv1", reduced), ("conv2", taps))}
    names = ("weight", "bias", "running_mean", "running_var")
    for conv, values in norms.items():
        entries |= {f"{conv}.bn.{name}": value for name, value in zip(names, values, strict=True)}
        entries[f"{conv}.bn.num_batches_tracked"] = torch.tensor(3)
    layer = defined("from_yolo")["from_yolo"](entries, kernel, stride, eps, activation).eval()

    def block(name, x):
        y = torch.einsum("oi,nihw->nohw", entries[f"{name}.conv.weight"][:, :, 0, 0], x)
        y = normed(y, *norms[name], eps)
        return y * torch.sigmoid(y) if activation is torch.nn.SiLU else y.clamp(min=0)

    x = draw(2, channels, 4, 6)
    generated = block("conv2", block("conv1", cells(x, stride))).unflatten(1, (-1, kernel, kernel))
    expected = apply(x, generated, stride, [kernel // 2] * 2, lambda c: c // 16)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(optimize_for_inference(layer, x)(x), expected)


def test_paddle(tmp_path, monkeypatch):
    layers = (1, 2)
    entries = checkpoint(layers)
    arrays = {"StructuredToParameterName@@": {"fc.weight": "linear_0.w_0"}}
    for name, value in entries.items():
        name = name.removeprefix("backbone.").removeprefix("head.")
        if name == "fc.weight":
            value = value.T.contiguous()
        if not name.endswith("num_batches_tracked"):
            arrays[name.replace("running_mean", "_mean").replace("running_var", "_variance")] = value.numpy()
    path = tmp_path / "RedNet_pretrained.pdparams"
    path.write_bytes(pickle.dumps(arrays, 4))
    model = RedNet(layers, **NARROW).eval()
    assert load_official(model, path) is model
    x = draw(1, 3, 64, 32)
    logits = official_forward(entries, layers, x)[0]
    torch.testing.assert_close(model(x), logits)
    monkeypatch.chdir(tmp_path)  # the page writes a file
    back = defined("as_paddle")["as_paddle"](model)
    assert back.keys() == arrays.keys() - {"StructuredToParameterName@@"}
    assert all((back[name] == arrays[name]).all() for name in back)


def test_keras_kernels_with_groups_last():
    """The expression of the page for kernels that someone else generated."""
    n, channels, groups, k, stride, size = 2, 8, 4, 3, 2, 6
    torch.manual_seed(0)
    (text,) = spans(r"channel_shuffle\(involution2d\(.*\)")
    x, kernels = draw(n, channels, size, size), draw(n, 3, 3, k * k, groups)
    expected = apply(x, kernels.permute(0, 4, 3, 1, 2).unflatten(2, (k, k)), stride, [0, 0], lambda c: c % groups)
    names = {"channel_shuffle": F.channel_shuffle, "involution2d": involution2d, "kernels": kernels, "s": stride}
    names |= {"C": channels, "G": groups, "K": k, "x": F.pad(x, (0, 1, 0, 1))}
    torch.testing.assert_close(eval(text, names), expected)


def test_reich_with_a_padding_that_does_not_suit_the_window():
    entries = {"reduce_mapping.weight": draw(4, 4, 1, 1), "span_mapping.weight": draw(9, 4, 1, 1)}
    entries |= {f"sigma_mapping.0.{name}": draw(4) for name in ("weight", "bias", "running_mean")}
    entries |= {"sigma_mapping.0.running_var": draw(4) ** 2, "sigma_mapping.0.num_batches_tracked": torch.tensor(1)}
    layer = defined("from_reich")["from_reich"](entries, kernel_size=3).eval()
    with pytest.raises(ValueError, match="expected"):
        layer(draw(1, 4, 6, 6))
