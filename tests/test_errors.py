"""Bad arguments: each is refused with a message that names the argument, its value and what was expected."""

from collections.abc import Callable

import pytest
import torch
from operators import LAYER
from torch import Tensor, empty, randn

from pyinvolution import ops
from pyinvolution.functional import involution2d, span_involution2d

X, W = randn(2, 4, 5, 6), randn(2, 2, 3, 3, 5, 6)
U, R, S, B = randn(2, 16, 5, 6), randn(2, 4, 5, 6), randn(18, 4), randn(18)
F8 = torch.float8_e4m3fn

GOOD = {
    involution2d: {"input": X, "weight": W, "padding": 1},
    span_involution2d: {"input": U, "reduced": R, "span_weight": S, "span_bias": B, "kernel_size": 3, "padding": 1},
}

# What is wrong, the arguments, the exception, and what its message must hold.
BAD_INVOLUTION = [
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


BAD_SPAN = [
    ("reduced no tensor", {"reduced": None}, TypeError, ["reduced", "NoneType"]),
    ("span_bias no tensor", {"span_bias": 1.0}, TypeError, ["span_bias", "float"]),
    ("input of 2 dimensions", {"input": U[0, 0]}, ValueError, ["input", "(5, 6)"]),
    ("reduced of 2 dimensions", {"reduced": R[0, 0]}, ValueError, ["reduced", "(5, 6)"]),
    ("reduced of another batch", {"reduced": R[:1]}, ValueError, ["reduced", "batch size 1", "2"]),
    ("reduced of another size", {"reduced": R[..., :4]}, ValueError, ["reduced", "5 x 4", "5 x 6"]),
    ("reduced of another dtype", {"reduced": R.double()}, TypeError, ["reduced", "float64", "float32"]),
    ("span_weight of another R", {"span_weight": S[:, :3]}, ValueError, ["span_weight", "(18, 3)", "R = 4"]),
    ("span_weight 3x3", {"span_weight": torch.randn(18, 4, 3, 3)}, ValueError, ["span_weight", "(18, 4, 3, 3)"]),
    ("span_weight with half a kernel", {"span_weight": S[:10]}, ValueError, ["span_weight", "10 rows", "9 taps"]),
    ("G does not divide C", {"span_weight": torch.randn(27, 4), "span_bias": None}, ValueError, ["3 groups", "16"]),
    ("no group", {"span_weight": S[:0], "span_bias": None}, ValueError, ["span_weight", "0 groups"]),
    ("span_bias of another length", {"span_bias": B[:9]}, ValueError, ["span_bias", "(9,)", "(18,)"]),
    ("kernel_size zero", {"kernel_size": 0}, ValueError, ["kernel_size", "(0, 0)"]),
    ("kernel_size of three", {"kernel_size": (3, 3, 3)}, ValueError, ["kernel_size", "(3, 3, 3)"]),
    ("kernel_size no int", {"kernel_size": 3.0}, TypeError, ["kernel_size", "3.0"]),
    ("integers", {"input": U.int()}, TypeError, ["input", "int32"]),
    ("another device", {"span_weight": S.to("meta")}, ValueError, ["span_weight", "meta", "cpu"]),
]  # fmt: skip

BAD = [(involution2d, *bad) for bad in BAD_INVOLUTION] + [(span_involution2d, *bad) for bad in BAD_SPAN]


def over(bad: list[tuple]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("function", "arguments", "error", "words"),
        [pytest.param(b[0], *b[2:], id=f"{b[0].__name__}-{b[1]}") for b in bad],
    )


@pytest.mark.parametrize("function", GOOD, ids=lambda f: f.__name__)
def test_good_arguments_are_taken(function: Callable[..., Tensor]) -> None:
    assert function(**GOOD[function]).shape == GOOD[function]["input"].shape


@pytest.mark.parametrize("requires_grad", [False, True])
@over(BAD)
def test_a_bad_argument_is_named(
    function: Callable[..., Tensor], arguments: dict, error: type[Exception], words: list[str], requires_grad: bool
) -> None:
    if requires_grad:
        arguments = {
            k: v.clone().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in arguments.items()
        }
    with pytest.raises(error) as caught:
        function(**GOOD[function] | arguments)
    assert type(caught.value) is error
    message = str(caught.value)
    assert message.startswith(f"{function.__name__}: ")
    assert all(word in message for word in words), message


# What reaches the operators, which have no bias and take pairs of ints.
RAW = [
    bad for bad in BAD
    if "bias" not in bad[2] and "no tensor" not in bad[1]
    and all(type(bad[2].get(name, 1)) in (int, tuple) for name in ("kernel_size", "stride", "padding"))
]  # fmt: skip


@over(RAW)
def test_the_kernel_refuses_what_python_refuses(
    function: Callable[..., Tensor], arguments: dict, error: type[Exception], words: list[str]
) -> None:
    """C++ callers reach the operator without the Python function."""
    given = {"stride": 1, "dilation": 1, **GOOD[function], **arguments}
    order = ("stride", "padding", "dilation")
    pairs = [v if isinstance(v, tuple) else (v, v) for v in (given[name] for name in order)]
    if function is involution2d:
        call = lambda: ops.involution2d(given["input"], given["weight"], *pairs)  # noqa: E731
    else:
        kernel = given["kernel_size"] if isinstance(given["kernel_size"], tuple) else (given["kernel_size"],) * 2
        tensors = [given[name] for name in ("input", "reduced", "span_weight", "span_bias")]
        call = lambda: ops.span_involution2d(*tensors, None, None, False, kernel, *pairs)  # noqa: E731
    # A meta tensor is dispatched to the shape function, a sparse one to nothing.
    with pytest.raises((RuntimeError, ValueError)) as caught:
        call()
    assert "Sparse" in str(caught.value) or words[0] in str(caught.value)


@over(RAW)
def test_a_traced_call_refuses_it_too(
    function: Callable[..., Tensor], arguments: dict, error: type[Exception], words: list[str]
) -> None:
    if any(isinstance(value, Tensor) and value.is_meta for value in arguments.values()):
        pytest.skip("everything is on one device here")
    given = GOOD[function] | arguments
    with pytest.raises(error):
        function(**{name: value.to("meta") if isinstance(value, Tensor) else value for name, value in given.items()})


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


def test_bad_epilogue() -> None:
    geometry = ((3, 3), (1, 1), (1, 1), (1, 1))
    for scale, shift, word in ((torch.ones(16), None, "shift"), (torch.ones(3), torch.ones(3), "scale")):
        with pytest.raises(RuntimeError, match=f"span_involution2d: {word}"):
            ops.span_involution2d(U, R, S, B, scale, shift, False, *geometry)


def test_a_bad_argument_of_a_layer_is_named() -> None:
    case = LAYER.cases[0]
    good = [*LAYER.tensors(case, torch.float32), torch.ones(32), torch.ones(32)]
    for index, bad, words in (
        (0, torch.zeros(3, 4), ["input", "(3, 4)", "4 dimensions"]),
        (1, torch.zeros(8, 31), ["reduce_weight", "(8, 31)", "C = 32"]),
        (1, good[1].double(), ["reduce_weight", "Double", "Float"]),
        (2, torch.zeros(3), ["reduce_bias", "(3)", "(8)"]),
        (3, torch.zeros(98, 7), ["span_weight", "(98, 7)", "R = 8"]),
        (3, torch.zeros(97, 8), ["span_weight", "97 rows", "49 taps"]),
        (4, torch.zeros(5), ["span_bias", "(5)", "(98)"]),
        (5, torch.zeros(5), ["scale", "(5)", "(32)"]),
    ):
        given = [bad if i == index else t for i, t in enumerate(good)]
        with pytest.raises(RuntimeError) as caught:
            ops.involution_layer2d(*given, True, case.kernel, *case.geometry)
        message = str(caught.value)
        assert all(word in message for word in ["involution_layer2d: ", *words]), message
