"""Borders that shift windows, upsampling, and local_correlation2d: the equation written out, and what PyTorch asks."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path

import pytest
import torch
from cases import SHIFTED_CASES, UPSAMPLED_CASES, Case, shifted
from operators import CORRELATION, INVOLUTION, Operator
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import interpolate

from pyinvolution import explain, explain_correlation, ops, reference
from pyinvolution.functional import involution2d, local_correlation2d


def correlate(case: Case, query: Tensor, key: Tensor) -> Tensor:
    return local_correlation2d(query, key, case.kernel, *case.geometry, case.groups, **case.options)


def call(op: Operator, case: Case) -> Callable[..., Tensor]:
    return lambda *t: correlate(case, *t) if op is CORRELATION else op.function(case, *t)


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


SMALL = [
    shifted((2, 4, 5, 6), 2, (3, 2), dilation=(1, 2)),
    shifted((1, 2, 4, 3), 1, (3, 3), upsample=(2, 1)),
    Case((1, 2, 3, 2), 1, (3, 3), upsample=(2, 3)),
    Case((1, 2, 5, 4), 2, (3, 3), (2, 1), (1, 1)),
]
BOTH = pytest.mark.parametrize("op", [INVOLUTION, CORRELATION], ids=str)
EACH = pytest.mark.parametrize("case", SMALL, ids=str)


# --- the equation -----------------------------------------------------------------------------------------------------


def moved_first(border: str, size: int, kernel: int, stride: int, padding: int, dilation: int, up: int, p: int) -> int:
    """Where the window of an output begins: a window that a border shifts is moved step by step until it is inside."""
    position = p // up * stride
    if border == "zeros":
        return position - padding
    first = position - kernel // 2 * dilation
    while first < 0:
        first += dilation
    while first + (kernel - 1) * dilation >= size:
        first -= dilation
    return first


def test_windows_are_moved_by_the_dilation_until_they_are_inside() -> None:
    checked = 0
    for size, kernel, dilation in product(range(1, 26), range(1, 8), range(1, 9)):
        for border, stride, up in (("zeros", 1, 1), ("zeros", 2, 1), ("zeros", 1, 3), *(
            (("shift", 1, 1), ("shift", 3, 1), ("shift", 1, 2)) if kernel * dilation <= size else ()
        )):  # fmt: skip
            padding = 2 if border == "zeros" else 0
            window = (size, kernel, stride, padding, dilation, up)
            first = reference.first_taps(*window, border=reference.BORDERS.index(border)).tolist()
            count = ops.output_size(size, kernel, stride, padding, dilation, reference.BORDERS.index(border), up)
            assert first == [moved_first(border, *window, p) for p in range(count)]
            checked += count
    assert checked > 10000


def read(case: Case, image: Tensor) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], Tensor]]:
    """Each tap and output pixel, and what it reads: (N, C)."""
    windows = list(zip(case.input[2:], case.kernel, *case.geometry, case.upsample, strict=True))
    for i, j, h, v in product(*map(range, (*case.kernel, *case.output))):
        at = [moved_first(case.border, *w, p) + d * k for w, p, d, k in zip(windows, (h, v), case.dilation, (i, j))]  # noqa: B905
        inside = all(0 <= a < size for a, size in zip(at, case.input[2:], strict=True))
        yield (i, j), (h, v), image[:, :, at[0], at[1]] if inside else torch.zeros_like(image[:, :, 0, 0])


EQUATIONS = [
    *SMALL,
    shifted((1, 4, 7, 9), 2, (7, 3)),
    shifted((1, 2, 13, 12), 1, (3, 4), (1, 1), (4, 3)),
    shifted((1, 2, 10, 9), 2, (3, 3), (3, 2), (2, 3)),
    shifted((1, 2, 16, 8), 1, (2, 1), dilation=(8, 8)),
    Case((1, 4, 3, 4), 2, (3, 2), padding=(1, 1), dilation=(1, 2), upsample=(4, 2)),
]


@pytest.mark.parametrize("case", EQUATIONS, ids=str)
def test_results_are_the_equation_written_out(case: Case) -> None:
    x, w, y = INVOLUTION.tensors(case, torch.float64)
    involved, scores = torch.zeros_like(y), torch.zeros_like(w)
    width = case.group_channels
    for (i, j), (h, v), seen in read(case, x):
        involved[:, :, h, v] += w[:, :, i, j, h, v].repeat_interleave(width, 1) * seen
        scores[:, :, i, j, h, v] = (y[:, :, h, v] * seen).unflatten(1, (-1, width)).sum(2)
    for function in (involution2d, reference.involution2d):
        torch.testing.assert_close(function(x, w, None, *case.geometry, **case.options), involved)
    for function in (local_correlation2d, reference.local_correlation2d):
        actual = function(y, x, case.kernel, *case.geometry, case.groups, **case.options)
        torch.testing.assert_close(actual, scores)


def test_an_upsampling_reads_the_nearest_pixel_of_a_larger_image() -> None:
    x, w = random(2, 4, 5, 6), random(2, 2, 3, 3, 10, 18)
    large = interpolate(x, scale_factor=(2.0, 3.0), mode="nearest")
    # A step of the window is two and three pixels there, and so is its padding.
    expected = involution2d(large, w, padding=(2, 3), dilation=(2, 3))
    torch.testing.assert_close(involution2d(x, w, padding=1, upsample=(2, 3)), expected)


def test_a_border_that_shifts_is_not_one_of_zeros() -> None:
    x = random(1, 16, 14, 14) + 3
    w = random(1, 1, 7, 7, 14, 14).flatten(2, 3).softmax(2).unflatten(2, (7, 7))
    exact = reference.involution2d(x, w, border="shift")
    error = (involution2d(x, w, border="shift") - exact).abs().max()
    apart = (involution2d(x, w, padding=3) - exact).abs().max()
    assert error < 1e-12
    assert apart > 1e-1
    inside = (slice(None), slice(None), slice(3, 11), slice(3, 11))
    torch.testing.assert_close(involution2d(x, w, padding=3)[inside], exact[inside])


def test_weights_of_one_give_means_that_no_border_darkens() -> None:
    ones = torch.ones(1, 2, 9, 10, dtype=torch.float64)
    w = torch.full((1, 2, 3, 5, 9, 10), 1 / 15, dtype=torch.float64)
    torch.testing.assert_close(involution2d(ones, w, dilation=(3, 2), border="shift"), ones)


def test_a_stride_takes_every_so_many_outputs() -> None:
    x, q = random(1, 4, 11, 13), random(1, 4, 11, 13)
    every = local_correlation2d(q, x, 3, dilation=2, border="shift")
    some = local_correlation2d(q[..., ::3, ::2].contiguous(), x, 3, (3, 2), dilation=2, border="shift")
    torch.testing.assert_close(some, every[..., ::3, ::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_without_a_border_case_is_global_attention(dtype: torch.dtype) -> None:
    # A window of the whole image: every query sees all keys.
    q, k, v = (random(2, 8, 5, 7, dtype=dtype) * scale for scale in (1, 0.5, 2))
    scores = local_correlation2d(q, k, (5, 7), groups=2, border="shift")
    weight = scores.flatten(2, 3).softmax(2).unflatten(2, (5, 7))
    heads = [t.unflatten(1, (2, 4)).flatten(3).transpose(2, 3).double() for t in (q, k, v)]
    expected = nn.functional.scaled_dot_product_attention(*heads, scale=1.0).transpose(2, 3).reshape(q.shape)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(
        involution2d(v, weight, border="shift").double(), expected, rtol=tolerance, atol=tolerance
    )


# --- derivatives ------------------------------------------------------------------------------------------------------


@EACH
def test_derivatives_of_a_correlation_are_those_of_differences(case: Case) -> None:
    tensors = [t.requires_grad_() for t in CORRELATION.tensors(case, torch.float64)]
    function = call(CORRELATION, case)
    assert gradcheck(function, tensors, check_batched_grad=True, check_forward_ad=True)
    assert gradgradcheck(function, tensors, check_fwd_over_rev=True)
    for wanted in range(2):
        tensors = [t.detach().requires_grad_(place == wanted) for place, t in enumerate(tensors)]
        assert gradcheck(function, tensors, check_forward_ad=True)
        assert gradgradcheck(function, tensors, fast_mode=True)


@EACH
def test_tangents_of_an_involution_are_those_of_differences(case: Case) -> None:
    tensors = [t.requires_grad_() for t in INVOLUTION.tensors(case, torch.float64)[:2]]
    assert gradcheck(call(INVOLUTION, case), tensors, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(call(INVOLUTION, case), tensors, check_fwd_over_rev=True, fast_mode=True)


@BOTH
@EACH
def test_transforms_agree_with_the_composition(op: Operator, case: Case) -> None:
    tensors = op.tensors(case, torch.float64)[:2]

    def loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda a, b: function(a, b).square().sum()

    ours, theirs = loss(call(op, case)), loss(lambda *t: op.composed(case, *t))
    for transform in (
        lambda f: torch.func.hessian(f)(*tensors),
        lambda f: torch.func.jacfwd(torch.func.jacfwd(f))(*tensors),
        lambda f: torch.vmap(torch.func.grad(lambda a, b: f(a[None], b[None]), (0, 1)))(*tensors),
    ):
        torch.testing.assert_close(transform(ours), transform(theirs))


def test_a_missing_tap_has_no_gradient_of_infinity_times_zero() -> None:
    x, w = random(1, 2, 4, 4), random(1, 1, 3, 3, 4, 4)
    w[0, 0, 0, 0, 0, 0] = float("inf")
    assert involution2d(x, w, padding=1).isnan().any()  # of padding
    assert not involution2d(x, w, border="shift").isnan().any()  # there is none


# --- what PyTorch asks of an operator ---------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_code_keeps_the_operator(op: Operator, dynamic: bool) -> None:
    torch._dynamo.reset()
    sizes = ((2, 16, 6, 7), (3, 16, 9, 8), (2, 16, 7, 11))
    for make in (lambda s: shifted(s, 2, (3, 3), dilation=(2, 1)), lambda s: Case(s, 2, (3, 3), upsample=(2, 2))):
        cases = [make(size) for size in sizes]
        function = call(op, cases[0])
        compiled = torch.compile(
            lambda *t, f=function: f(*t).sin(), fullgraph=True, dynamic=dynamic, backend="aot_eager"
        )
        for case in cases:
            tensors = [t.requires_grad_() for t in op.tensors(case, torch.float32)[:2]]
            eager, result = function(*tensors).sin(), compiled(*tensors)
            torch.testing.assert_close(result, eager)
            torch.testing.assert_close(*(torch.autograd.grad(y.sum(), tensors) for y in (result, eager)))


class Attention(nn.Module):
    """Neighbourhood attention over an image, twice as large when it leaves."""

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        scores = local_correlation2d(x * 0.25, x, 3, dilation=2, groups=2, border="shift")
        attended = involution2d(x, scores.flatten(2, 3).softmax(2).unflatten(2, (3, 3)), dilation=2, border="shift")
        return involution2d(attended, w, padding=1, upsample=2)


def attention_inputs(height: int, width: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    return random(batch, 8, height, width, dtype=torch.float32), random(
        batch, 1, 3, 3, 2 * height, 2 * width, dtype=torch.float32
    )


@pytest.fixture
def program() -> torch.export.ExportedProgram:
    height, width = (torch.export.Dim(name, min=6, max=64) for name in ("height", "width"))
    shapes = ({2: height, 3: width}, {4: 2 * height, 5: 2 * width})
    return torch.export.export(Attention(), attention_inputs(7, 9), dynamic_shapes=shapes)


def test_programs_are_exported_and_loaded(program: torch.export.ExportedProgram, tmp_path: Path) -> None:
    torch.export.save(program, tmp_path / "attention.pt2")
    loaded = torch.export.load(tmp_path / "attention.pt2").module()
    for inputs in (attention_inputs(7, 9), attention_inputs(12, 6)):
        torch.testing.assert_close(loaded(*inputs), Attention()(*inputs))


def test_programs_become_operations_of_onnx(program: torch.export.ExportedProgram) -> None:
    plain = program.run_decompositions(ops.PLAIN)
    assert "pyinvolution" not in str(plain.graph)
    for inputs in (attention_inputs(7, 9), attention_inputs(12, 6)):
        torch.testing.assert_close(plain.module()(*inputs), Attention()(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamo", [True, False])
def test_modules_become_operations_of_onnx(dynamo: bool, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    inputs, path = attention_inputs(7, 9), tmp_path / "attention.onnx"
    torch.onnx.export(Attention().eval(), inputs, path, dynamo=dynamo, opset_version=18, verbose=False)
    session = runtime.InferenceSession(path)
    names = [given.name for given in session.get_inputs()]
    (found,) = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
    torch.testing.assert_close(torch.from_numpy(found), Attention()(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", [INVOLUTION, CORRELATION], ids=str)
@pytest.mark.parametrize("case", [*SHIFTED_CASES, *UPSAMPLED_CASES], ids=str)
def test_operations_of_onnx_compute_the_operator(op: Operator, case: Case) -> None:
    tensors = op.tensors(case, torch.float64)[:2]
    operator, arguments = op.forward(case, *tensors)
    torch.testing.assert_close(ops.PLAIN[operator](*arguments), operator(*arguments))


@BOTH
@EACH
def test_traces_have_gradients(op: Operator, case: Case) -> None:
    tensors = [t.requires_grad_() for t in op.tensors(case, torch.float64)[:2]]
    function = call(op, case)
    traced = torch.jit.trace(function, [t.detach() for t in tensors])
    assert f"traced_{op}" in str(traced.graph)
    expected, actual = function(*tensors), traced(*tensors)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), tensors) for y in (actual, expected)))


def test_calls_from_before_there_were_borders_mean_zeros() -> None:
    x, w, y = INVOLUTION.tensors(Case((1, 16, 5, 6), 1), torch.float32)
    window = ((1, 1),) * 3
    assert torch.equal(torch.ops.pyinvolution.involution2d(x, w, *window), involution2d(x, w, padding=1))
    grads = torch.ops.pyinvolution.involution2d_backward(y, x, w, *window, (True, True))
    expected = ops.involution2d_backward(y, x, w, *window, (True, True), 0, (1, 1))
    assert all(map(torch.equal, grads, expected))


@BOTH
def test_images_need_no_batch(op: Operator) -> None:
    for case in SMALL:
        tensors = op.tensors(case, torch.float32)[:2]
        assert torch.equal(call(op, case)(*(t[0] for t in tensors)), call(op, case)(*tensors)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_query_and_key(dtype: torch.dtype) -> None:
    q, k = random(1, 16, 5, 6, dtype=torch.float32), random(1, 16, 5, 6, dtype=torch.float32)
    expected = local_correlation2d(q.to(dtype), k.to(dtype), 3, border="shift")
    with torch.autocast("cpu", dtype):
        assert torch.equal(local_correlation2d(q, k, 3, border="shift"), expected)
        assert torch.equal(local_correlation2d(q.to(dtype), k, 3, border="shift"), expected)
        assert local_correlation2d(q.double(), k.double(), 3, border="shift").dtype == torch.float64


def test_the_scores_of_a_channels_last_key_have_their_taps_together() -> None:
    q, k = random(2, 16, 5, 6), random(2, 16, 5, 6)
    assert local_correlation2d(q, k, 3, padding=1, groups=2).is_contiguous()
    last = local_correlation2d(q, k.to(memory_format=torch.channels_last), 3, padding=1, groups=2)
    assert last.permute(0, 4, 5, 1, 2, 3).is_contiguous()
    torch.testing.assert_close(last, local_correlation2d(q, k, 3, padding=1, groups=2))


# --- which kernel runs ------------------------------------------------------------------------------------------------


def test_explanations_name_border_and_upsampling() -> None:
    x, w = random(1, 16, 6, 6, dtype=torch.float32), random(1, 1, 3, 3, 12, 12, dtype=torch.float32)
    up = explain(x, w, padding=1, upsample=2)
    assert "border zeros, upsample (2, 2)" in str(up)
    assert up.chosen == "channels"  # for each phase
    shift = explain_correlation(x, x, 3, border="shift")
    assert str(shift).startswith("local_correlation2d")
    assert "border shift" in str(shift)
    assert shift.chosen is not None
    assert "border" not in str(explain(x, w[..., :6, :6], padding=1))


# --- errors -----------------------------------------------------------------------------------------------------------

X, W = random(1, 16, 6, 7, dtype=torch.float32), random(1, 1, 3, 3, 6, 7, dtype=torch.float32)
WRONG: Sequence[tuple[dict, type, str]] = [
    ({"border": "reflect"}, ValueError, "border is 'reflect', expected one of zeros, shift"),
    ({"border": 1}, TypeError, "border is 1, expected a str"),
    ({"border": "shift", "padding": (0, 1)}, ValueError, "padding is 1 for the width, expected 0"),
    ({"border": "shift", "padding": 1}, ValueError, "padding is 1 for the height, expected 0"),
    ({"border": "shift", "dilation": (2, 3)}, ValueError, "a width of 7, expected at least 9, kernel 3 times"),
    ({"border": "shift", "dilation": 4}, ValueError, "has a height of 6, expected at least 12"),
    ({"upsample": 0}, ValueError, "upsample is (0, 0), expected two values of at least 1"),
    ({"upsample": (2, 0)}, ValueError, "upsample is (2, 0)"),
    ({"upsample": 1.5}, TypeError, "upsample is 1.5, expected an int or a pair of ints"),
    ({"upsample": (2, 2, 2)}, ValueError, "upsample is (2, 2, 2), expected an int or a pair"),
    ({"upsample": 2, "stride": (1, 2)}, ValueError, "stride is 2 and upsample is 2 for the width, expected 1 for one"),
    ({"upsample": 2}, ValueError, "expected"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), WRONG)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_arguments_that_do_not_fit_are_named(options: dict, error: type, message: str, device: str) -> None:
    x, w = X.to(device), W.to(device)
    for function in (lambda: involution2d(x, w, **options), lambda: local_correlation2d(x, x, 3, **options)):
        with pytest.raises(error) as caught:
            function()
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, None, 3), TypeError, "key is a NoneType, expected a Tensor"),
        ((X, X.double(), 3), TypeError, "query has dtype torch.float32, expected key's dtype torch.float64"),
        ((X, X[0], 3), ValueError, "key has shape (16, 6, 7)"),
        ((X, X.to_sparse(), 3), ValueError, "key has layout torch.sparse_coo"),
        ((X, X, 3), ValueError, "query has shape (1, 16, 6, 7), expected (1, 16, 4, 5) for a key of 6 x 7"),
        ((X, X, 3, 1, 1, 1, 3), ValueError, "groups is 3, expected a divisor of key's 16 channels"),
        ((X, X, 3, 1, 1, 1, 0), ValueError, "groups is 0"),
        ((X, X, 3, 1, 1, 1, 2.0), TypeError, "groups is 2.0, expected an int"),
        ((X, X, 0), ValueError, "kernel_size is (0, 0)"),
    ],
)
def test_correlations_that_do_not_fit_are_named(arguments: tuple, error: type, message: str) -> None:
    with pytest.raises(error) as caught:
        local_correlation2d(*arguments)
    assert str(caught.value).startswith("local_correlation2d: ")
    assert message in str(caught.value)


def test_images_without_pixels_have_results_without_pixels() -> None:
    for shape in ((2, 4, 0, 5), (0, 4, 6, 5), (2, 0, 6, 5)):
        x = torch.zeros(shape)
        assert local_correlation2d(x, x, 3, border="shift").shape == (shape[0], 1, 3, 3, *shape[2:])
        assert involution2d(x, torch.zeros(shape[0], 1, 3, 3, *shape[2:]), border="shift").shape == shape
