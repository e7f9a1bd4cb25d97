"""Bad arguments: each is refused with a message that names the argument, its value and what was expected."""

from typing import Any

import pytest
import torch
from torch import Tensor, empty, randn

from pyinvolution import ops
from pyinvolution.functional import involution2d

X = randn(2, 4, 5, 6)
W = randn(2, 2, 3, 3, 5, 6)
F8 = torch.float8_e4m3fn


def call(input: Any = X, weight: Any = W, padding: Any = 1, **kwargs: Any) -> Tensor:
    return involution2d(input, weight, padding=padding, **kwargs)


# What is wrong, the arguments, the exception, and what its message must hold.
BAD = [
    ("input no tensor", {"input": [1.0]}, TypeError, ["input", "list", "Tensor"]),
    ("weight no tensor", {"weight": None}, TypeError, ["weight", "NoneType", "Tensor"]),
    ("input of 2 dimensions", {"input": randn(5, 6)}, ValueError, ["input", "(5, 6)", "(N, C, H, W)"]),
    ("input of 5 dimensions", {"input": randn(1, 2, 4, 5, 6)}, ValueError, ["input", "(1, 2, 4, 5, 6)"]),
    ("input without N only", {"input": X[0]}, ValueError, ["input", "(4, 5, 6)"]),
    ("weight of 4 dimensions", {"weight": randn(2, 2, 3, 3)}, ValueError, ["weight", "(2, 2, 3, 3)", "Kh, Kw"]),
    ("weight without N only", {"weight": W[0]}, ValueError, ["weight", "(2, 3, 3, 5, 6)"]),
    ("G does not divide C", {"weight": randn(2, 3, 3, 3, 5, 6)}, ValueError, ["weight", "3 groups", "4 channels"]),
    ("no group", {"weight": randn(2, 0, 3, 3, 5, 6)}, ValueError, ["weight", "0 groups", "4 channels"]),
    ("more groups than channels", {"weight": randn(2, 8, 3, 3, 5, 6)}, ValueError, ["8 groups", "4 channels"]),
    ("weight of another batch", {"weight": randn(3, 2, 3, 3, 5, 6)}, ValueError, ["weight", "batch size 3", "2"]),
    ("weight of another height", {"weight": randn(2, 2, 3, 3, 4, 6)}, ValueError, ["weight", "4 x 6", "5 x 6"]),
    ("weight of another width", {"weight": randn(2, 2, 3, 3, 5, 7)}, ValueError, ["weight", "5 x 7", "5 x 6"]),
    ("a kernel without taps", {"weight": randn(2, 2, 0, 3, 5, 6)}, ValueError, ["weight", "0 x 3", "at least 1 x 1"]),
    ("weight of another dtype", {"weight": W.double()}, TypeError, ["weight", "float64", "float32"]),
    ("input of another dtype", {"input": X.half()}, TypeError, ["weight", "float32", "float16"]),
    ("weight on another device", {"weight": W.to("meta")}, ValueError, ["weight", "meta", "cpu"]),
    ("integers", {"input": X.int(), "weight": W.int()}, TypeError, ["input", "int32", "float32"]),
    ("booleans", {"input": X > 0, "weight": W > 0}, TypeError, ["input", "bool", "float32"]),
    ("complex", {"input": X + 0j, "weight": W + 0j}, TypeError, ["input", "complex64", "float32"]),
    ("float8", {"input": X.to(F8), "weight": W.to(F8)}, TypeError, ["input", "float8"]),
    ("sparse input", {"input": X.to_sparse()}, ValueError, ["input", "sparse_coo", "strided"]),
    ("sparse weight", {"weight": W.to_sparse()}, ValueError, ["weight", "sparse_coo", "strided"]),
    ("negative padding", {"padding": -1}, ValueError, ["padding", "(-1, -1)", "at least 0"]),
    ("zero stride", {"stride": 0}, ValueError, ["stride", "(0, 0)", "at least 1"]),
    ("negative stride", {"stride": (1, -2)}, ValueError, ["stride", "(1, -2)", "at least 1"]),
    ("zero dilation", {"dilation": (0, 1)}, ValueError, ["dilation", "(0, 1)", "at least 1"]),
    ("enormous padding", {"padding": 2**40}, ValueError, ["padding", "1099511627776", "2^31"]),
    ("fractional stride", {"stride": 1.5}, TypeError, ["stride", "1.5", "int"]),
    ("a bool for an int", {"stride": True}, TypeError, ["stride", "True", "int"]),
    ("text for padding", {"padding": "same"}, TypeError, ["padding", "'same'", "int"]),
    ("three strides", {"stride": (1, 1, 1)}, ValueError, ["stride", "(1, 1, 1)", "pair"]),
    ("kernel larger than the padded input", {"padding": 0, "input": X[..., :2, :2]}, ValueError,
     ["weight", "5 x 6", "0 x 0", "2 x 2", "larger than the padded input"]),
    ("stride forgotten in weight", {"stride": 2}, ValueError, ["weight", "5 x 6", "3 x 3", "stride (2, 2)"]),
    ("padding forgotten", {"padding": 0}, ValueError, ["weight", "5 x 6", "3 x 4", "padding (0, 0)"]),
    ("bias of another length", {"bias": randn(3)}, ValueError, ["bias", "(3,)", "(4,)"]),
    ("bias of a shape", {"bias": randn(4, 1, 1)}, ValueError, ["bias", "(4, 1, 1)", "(4,)"]),
    ("bias no tensor", {"bias": 1.0}, TypeError, ["bias", "float", "Tensor"]),
    ("bias of another dtype", {"bias": randn(4).double()}, TypeError, ["bias", "float64", "float32"]),
    ("bias on another device", {"bias": randn(4, device="meta")}, ValueError, ["bias", "meta", "cpu"]),
]  # fmt: skip


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(("arguments", "error", "words"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_argument(arguments: dict, error: type[Exception], words: list[str], requires_grad: bool) -> None:
    if requires_grad:
        arguments = {
            k: v.clone().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in arguments.items()
        }
    with pytest.raises(error) as caught:
        call(**arguments)
    assert type(caught.value) is error
    message = str(caught.value)
    assert message.startswith("involution2d: ")
    assert all(word in message for word in words), message


def test_the_table_is_long_enough_and_the_good_call_passes() -> None:
    assert len(BAD) >= 25
    assert call().shape == X.shape


RAW = [b for b in BAD if "bias" not in b[1] and "no tensor" not in b[0]]


@pytest.mark.parametrize(("arguments", "words"), [(b[1], b[3]) for b in RAW], ids=[b[0] for b in RAW])
def test_the_kernel_refuses_what_python_refuses(arguments: dict, words: list[str]) -> None:
    """C++ callers reach the operator without the Python function."""
    geometry = [arguments.get(name, default) for name, default in (("stride", 1), ("padding", 1), ("dilation", 1))]
    if any(not isinstance(v, int | tuple) or isinstance(v, bool) for v in geometry):
        pytest.skip("the dispatcher's own check of an int")
    pairs = [v if isinstance(v, tuple) else (v, v) for v in geometry]
    arguments = {"input": X, "weight": W, **arguments}
    # A meta tensor is dispatched to the shape function, a sparse one to nothing.
    with pytest.raises((RuntimeError, ValueError)) as caught:
        ops.involution2d(arguments["input"], arguments["weight"], *pairs)
    assert "Sparse" in str(caught.value) or words[0] in str(caught.value)


@pytest.mark.parametrize(("arguments", "error"), [b[1:3] for b in RAW], ids=[b[0] for b in RAW])
def test_a_traced_call_refuses_it_too(arguments: dict, error: type[Exception]) -> None:
    if isinstance(arguments.get("weight"), Tensor) and arguments["weight"].is_meta:
        pytest.skip("everything is on one device here")
    tensors = {
        name: value.to("meta") if isinstance(value, Tensor) else value
        for name, value in {"input": X, "weight": W, **arguments}.items()
    }
    with pytest.raises(error):
        call(**tensors)


def test_bad_grad_output() -> None:
    geometry = ((1, 1), (1, 1), (1, 1), (True, True))
    for grad, words in (
        (empty(2, 4, 5, 5), ["grad_output", "(2, 4, 5, 5)", "(2, 4, 5, 6)"]),
        (empty(4, 5, 6), ["grad_output", "(4, 5, 6)"]),
        (empty(2, 4, 5, 6).double(), ["grad_output", "Double", "Float"]),
    ):
        with pytest.raises(RuntimeError) as caught:
            ops.involution2d_backward(grad, X, W, *geometry)
        assert all(word in str(caught.value) for word in words), caught.value


def test_nan_passes_through() -> None:
    x = X.clone()
    x[0, 0, 2, 2] = float("nan")
    assert torch.isnan(involution2d(x, W, padding=1)).sum() == 9
