"""The stand-ins for the correlations of optical flow, against their loops written out, and in a file of a user."""

from functools import partial
from itertools import product

import pytest
import torch
from tolerance import assert_accurate
from torch.nn import functional as F

from pyinvolution.compat import spatial_correlation_sampler as module
from pyinvolution.compat.spatial_correlation_sampler import (
    Correlation,
    FunctionCorrelation,
    ModuleCorrelation,
    SpatialCorrelationSampler,
    spatial_correlation_sample,
)

draw = partial(torch.randn, dtype=torch.float64)


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


def written_out(input1, input2, kernel=1, patch=1, stride=1, padding=0, dilation=1, dilation_patch=1):
    """The loops of correlation.cpp, vectorised over the batch: a product counts if both pixels are in the images."""
    (kernel, patch, stride, padding, dilation, spacing) = map(
        pair, (kernel, patch, stride, padding, dilation, dilation_patch)
    )
    n, _, *size = input1.shape
    rows, columns = (
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, p, d, k, t in zip(size, padding, dilation, kernel, stride, strict=True)
    )
    entries = {}
    for u, v, y, x in product(range(patch[0]), range(patch[1]), range(rows), range(columns)):
        total = input1.new_zeros(n)
        for i, j in product(range(kernel[0]), range(kernel[1])):
            row, column = y * stride[0] - padding[0] + i * dilation[0], x * stride[1] - padding[1] + j * dilation[1]
            other_row = row + (u - (patch[0] - 1) // 2) * spacing[0]
            other_column = column + (v - (patch[1] - 1) // 2) * spacing[1]
            inside = (0 <= row < size[0], 0 <= other_row < size[0], 0 <= column < size[1], 0 <= other_column < size[1])
            if all(inside):
                total = total + (input1[:, :, row, column] * input2[:, :, other_row, other_column]).sum(1)
        entries[u, v, y, x] = total
    return torch.stack(list(entries.values()), 1).view(n, *patch, rows, columns)


# kernel_size, patch_size, stride, padding, dilation, dilation_patch
SETTINGS = {
    "defaults": (),
    "FlowNetC": (1, 5, 1, 0, 1, 2),
    "strides": (1, 3, 2, 0, 1, 1),
    "padding": (1, 3, 1, 2, 1, 1),
    "strides and padding": (1, 5, 3, 1, 1, 2),
    "even patch": (1, 4, 1, 1, 1, 1),
    "even patch, spaced": (1, 2, 2, 0, 1, 3),
    "kernel": (3, 3, 1, 1, 1, 1),
    "even kernel": (2, 3, 1, 0, 1, 1),
    "kernel, dilated": (3, 3, 2, 2, 2, 2),
    "pairs": ((1, 3), (3, 4), (2, 1), (1, 0), (1, 2), (1, 2)),
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_samples(setting):
    torch.manual_seed(0)
    input1, input2 = (draw(2, 3, 6, 8).requires_grad_() for _ in range(2))
    actual, expected = spatial_correlation_sample(input1, input2, *setting), written_out(input1, input2, *setting)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(SpatialCorrelationSampler(*setting)(input1, input2), expected)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, (input1, input2), upstream),
        torch.autograd.grad(expected, (input1, input2), upstream),
    )


def test_mmcv():
    torch.manual_seed(0)
    input1, input2 = draw(2, 3, 6, 7), draw(2, 3, 6, 7)
    for options in ({}, {"max_displacement": 2, "stride": 2, "dilation_patch": 2}, {"kernel_size": 3, "padding": 1}):
        theirs = {name: size for name, size in options.items() if name not in ("max_displacement", "kernel_size")}
        patch = 2 * options.get("max_displacement", 1) + 1
        expected = written_out(input1, input2, options.get("kernel_size", 1), patch, **theirs)
        torch.testing.assert_close(Correlation(**options)(input1, input2), expected)
    assert "max_displacement=2" in repr(Correlation(max_displacement=2))


def test_pwc():
    torch.manual_seed(0)
    one, two = draw(2, 3, 5, 6), draw(2, 3, 5, 6)
    expected = written_out(one, two, 1, 9).flatten(1, 2) / 3
    assert expected.shape == (2, 81, 5, 6)
    torch.testing.assert_close(FunctionCorrelation(tenOne=one, tenTwo=two), expected)
    torch.testing.assert_close(ModuleCorrelation()(one, two), expected)


def test_layers_are_followed_by_fx():
    input1, input2 = torch.randn(1, 3, 5, 6), torch.randn(1, 3, 5, 6)
    for layer in (SpatialCorrelationSampler(3, 3, padding=1), Correlation(max_displacement=2), ModuleCorrelation()):
        torch.testing.assert_close(torch.fx.symbolic_trace(layer)(input1, input2), layer(input1, input2))


def test_second_derivatives():
    torch.manual_seed(0)
    tensors = [draw(1, 2, 4, 3).requires_grad_() for _ in range(2)]
    sample = partial(spatial_correlation_sample, kernel_size=2, patch_size=3, padding=1)
    assert torch.autograd.gradgradcheck(sample, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    torch.manual_seed(0)
    input1, input2 = (torch.randn(1, 32, 6, 7, dtype=dtype) for _ in range(2))
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    oracle, reference = (written_out(input1.to(kind), input2.to(kind), 1, 5) for kind in (torch.double, wide))
    actual = spatial_correlation_sample(input1, input2, patch_size=5)
    assert_accurate(actual, oracle, reference.to(dtype), "the correlation")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_on_a_gpu(setting):
    torch.manual_seed(0)
    input1, input2 = draw(2, 3, 6, 8), draw(2, 3, 6, 8)
    actual = spatial_correlation_sample(input1.cuda(), input2.cuda(), *setting)
    torch.testing.assert_close(actual.cpu(), written_out(input1, input2, *setting))


X = torch.randn(1, 3, 6, 7)
REFUSED = {
    "shape": (
        lambda: spatial_correlation_sample(X, X[..., :6]),
        ValueError,
        r"input2 has shape .* expected \(1, 3, 6, 7\)",
    ),
    "rank": (
        lambda: spatial_correlation_sample(X[0], X[0]),
        ValueError,
        r"input1 has shape \(3, 6, 7\), expected \(N, C",
    ),
    "type": (lambda: spatial_correlation_sample(X, 1), TypeError, "input2 is a int, expected a Tensor"),
    "dtype": (lambda: spatial_correlation_sample(X, X.double()), TypeError, "input2 has dtype torch.float64"),
    "kernel": (lambda: spatial_correlation_sample(X, X, 0), ValueError, "kernel_size is 0, expected at least 1"),
    "padding": (lambda: spatial_correlation_sample(X, X, padding=-1), ValueError, "padding is -1, expected at least 0"),
    "patch": (
        lambda: spatial_correlation_sample(X, X, 1, 2.5),
        TypeError,
        "patch_size is 2.5, expected an int or a pair",
    ),
    "large kernel": (
        lambda: SpatialCorrelationSampler(4, dilation=2)(X, X),
        ValueError,
        r"kernel_size is \(4, 4\) and dilation \(2, 2\), expected a window of at most the padded height 6",
    ),
    "mmcv": (lambda: Correlation(max_displacement=-1), ValueError, "max_displacement is -1, expected at least 0"),
    "pwc": (lambda: FunctionCorrelation(X, X[:, :2]), ValueError, r"tenTwo has shape \(1, 2, 6, 7\)"),
}


@pytest.mark.parametrize(("call", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_refusals(call, error, text):
    with pytest.raises(error, match=text):
        call()


# As in the networks that use it; nothing is changed but the import.
FILE = """
import torch
import torch.nn.functional as F
from spatial_correlation_sampler import spatial_correlation_sample


def correlate(input1, input2):
    out_corr = spatial_correlation_sample(input1, input2, kernel_size=1, patch_size=21, stride=1, padding=0,
                                          dilation_patch=2)
    b, ph, pw, h, w = out_corr.size()
    out_corr = out_corr.view(b, ph * pw, h, w) / input1.size(1)
    return F.leaky_relu_(out_corr, 0.1)
"""


def test_a_file_with_one_import_changed():
    torch.manual_seed(0)
    names = {}
    text = FILE.replace("from spatial_correlation_sampler", "from pyinvolution.compat.spatial_correlation_sampler")
    exec(compile(text, "theirs.py", "exec"), names)
    input1, input2 = draw(2, 4, 5, 6), draw(2, 4, 5, 6)
    expected = F.leaky_relu(written_out(input1, input2, 1, 21, dilation_patch=2).flatten(1, 2) / 4, 0.1)
    torch.testing.assert_close(names["correlate"](input1, input2), expected)
    assert module.__all__ == sorted(module.__all__)
