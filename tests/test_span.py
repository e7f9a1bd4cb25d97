"""span_involution2d: every variant against the float64 oracle, and as PyTorch sees it."""

import subprocess
import sys
from collections.abc import Callable, Collection
from functools import partial

import pytest
import torch
from cases import DTYPES, LAYOUTS, Case, in_layout, random_like
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_accurate
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils.flop_counter import FlopCounterMode

from pyinvolution import ops, override_isa, reference
from pyinvolution.explain import SPAN_PASSES, available_isas, explain_span, force_variant, variants
from pyinvolution.functional import involution2d, span_involution2d

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])

# A problem and its reduced channels.
CASES = [
    (Case((2, 32, 9, 11), 2, (7, 7), padding=(3, 3)), 8),
    (Case((1, 32, 10, 9), 2, (7, 7), (2, 2), (3, 3)), 5),
    (Case((2, 16, 7, 9), 1, (3, 3)), 4),
    (Case((1, 16, 13, 6), 1, (5, 5), (2, 1), (2, 2)), 16),
    (Case((1, 24, 6, 5), 2, (2, 4), padding=(0, 1)), 3),
    (Case((1, 40, 9, 9), 1, (3, 3), (1, 2), (2, 3), (2, 3)), 1),
    (Case((1, 16, 5, 130), 1, (1, 3), padding=(0, 1)), 20),
    (Case((1, 16, 3, 260), 1, (3, 7), (1, 2), (1, 3)), 2),
    (Case((1, 8, 4, 4), 1, (9, 9), padding=(4, 4)), 2),
    (Case((1, 64, 14, 14), 4, (7, 7), padding=(3, 3)), 16),
    (Case((1, 128, 7, 7), 8, (7, 7), padding=(3, 3)), 32),
    (Case((1, 16, 3, 3), 1, (3, 3), (7, 9), (30, 30), (25, 25)), 4),
    (Case((3, 32, 37, 29), 2, (3, 3)), 8),
    (Case((1, 6, 7, 9), 2, (3, 3)), 2),
    (Case((2, 80, 19, 22), 5, (7, 7), padding=(3, 3)), 32),
    (Case((2, 80, 19, 22), 5, (7, 7), (2, 2), (3, 3)), 16),
    (Case((1, 64, 12, 17), 4, (7, 7), padding=(3, 3)), 80),
]
NAMES = ("output", "grad_input", "grad_reduced", "grad_span_weight", "grad_span_bias")
SMALL = (Case((2, 8, 4, 5), 1, (3, 3)), 3)
STRIDED = (Case((1, 16, 5, 4), 2, (2, 3), (2, 1), (1, 1)), 2)


def tensors(
    case: Case, reduced: int, dtype: torch.dtype, layout: str = "contiguous", device: str = "cpu"
) -> tuple[Tensor, ...]:
    """input, reduced, span_weight, span_bias and grad_output."""
    generator = torch.Generator().manual_seed(0)
    rows = case.groups * case.kernel[0] * case.kernel[1]
    random = partial(random_like, dtype=dtype, device=device, generator=generator)
    images = (case.input, (case.input[0], reduced, *case.output), (*case.input[:2], *case.output))
    x, r, gy = (in_layout(random(shape), layout) for shape in images)
    return x, r, random((rows, reduced)) / reduced**0.5, random((rows,)), gy


def passes(
    case: Case, x: Tensor, r: Tensor, w: Tensor, b: Tensor, gy: Tensor, wanted: Collection[str] = SPAN_PASSES
) -> list[Tensor]:
    geometry = (case.kernel, *case.geometry)
    y = [ops.span_involution2d(x, r, w, b, None, None, False, *geometry)] if "forward" in wanted else []
    if "backward" in wanted:
        y += ops.span_involution2d_backward(gy, x, r, w, b, *geometry, (True,) * 4)
    return y


def composed(case: Case, *given: Tensor, work: torch.dtype | None = None) -> list[Tensor]:
    """The same by convolution and unfolding, in the dtype `work`, or in the tensors' with float32 sums."""
    dtype = given[0].dtype
    inner = work or (torch.float32 if dtype.itemsize == 2 else dtype)
    *leaves, gy = (t.detach().to(inner) for t in given)
    leaves = [t.clone().requires_grad_() for t in leaves]
    x, r, w, b = leaves
    weight = torch.nn.functional.conv2d(r, w[..., None, None], b)
    if work is None:  # W would be stored
        weight = weight + (weight.to(dtype).to(inner) - weight).detach()
    y = reference.involution2d(x, weight.unflatten(1, (case.groups, *case.kernel)), None, *case.geometry)
    results = [y, *torch.autograd.grad(y, leaves, gy)]
    return [t.detach().to(work or dtype) for t in results]


def check(
    case: Case,
    reduced: int,
    dtype: torch.dtype,
    layout: str,
    device: str = "cpu",
    wanted: Collection[str] = SPAN_PASSES,
) -> None:
    given = tensors(case, reduced, dtype, layout, device)
    inputs = [t.cpu() for t in given]
    exact, same = composed(case, *inputs, work=torch.float64), composed(case, *inputs)
    actual = passes(case, *given, wanted)
    results = slice(0 if "forward" in wanted else 1, None if "backward" in wanted else 1)
    for name, a, e, s in zip(NAMES[results], actual, exact[results], same[results], strict=True):
        assert_accurate(a.cpu(), e, s, f"{name} of {case}, R={reduced}, {dtype}, {layout}, {device}")


def refused(variant: str, given: tuple[Tensor, ...], case: Case) -> set[str]:
    """The passes that a variant refuses."""
    return {
        pass_
        for pass_ in SPAN_PASSES
        for verdict in explain_span(*given[:4], case.kernel, *case.geometry, pass_=pass_).verdicts
        if verdict.variant == variant and verdict.refusal
    }


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """torch.empty gives NaN, so that an element that a kernel forgets is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("variant", variants("span_involution2d"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_variant(variant: str, dtype: torch.dtype, layout: str) -> None:
    device, name = variant.split("/")
    if device not in DEVICES:
        pytest.skip("no CUDA device")
    ran = 0
    for case, reduced in CASES:
        with force_variant(variant):
            wanted = set(SPAN_PASSES) - refused(name, tensors(case, reduced, dtype, layout, device), case)
            if wanted:
                check(case, reduced, dtype, layout, device, wanted)
                ran += 1
    narrow = variant == "cuda/fused" and (dtype.itemsize != 2 or layout != "channels_last")
    assert ran or narrow or dtype == torch.float64, f"{variant} ran nothing"


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_isa(isa: str, dtype: torch.dtype, layout: str) -> None:
    with override_isa(isa), force_variant("cpu/fused"):
        for case, reduced in CASES[:13]:
            check(case, reduced, dtype, layout)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2), groups=st.integers(1, 3), per_group=st.integers(8, 36), reduced=st.integers(1, 9),
    size=st.tuples(st.integers(1, 15), st.integers(1, 40)), kernel=st.tuples(st.integers(1, 7), st.integers(1, 8)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)), dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)), layout=st.sampled_from(LAYOUTS),
    isa=st.sampled_from(available_isas()),
)  # fmt: skip
def test_any_shape(
    batch: int, groups: int, per_group: int, reduced: int, size: tuple, kernel: tuple, stride: tuple, dilation: tuple,
    padding: tuple, layout: str, isa: str,
) -> None:  # fmt: skip
    case = Case((batch, groups * per_group, *size), groups, kernel, stride, padding, dilation)
    if 0 in case.output:
        return
    given = tensors(case, reduced, torch.float32, layout)
    exact = composed(case, *given, work=torch.float64)
    # Over chance shapes the reference's own error is a matter of luck; a bound by the terms' absolute values is not.
    magnitude = composed(case, *(t.abs() for t in given), work=torch.float64)
    with override_isa(isa), force_variant("cpu/fused"):
        actual = passes(case, *given)
    for name, a, e, m in zip(NAMES, actual, exact, magnitude, strict=True):
        excess = (a.double() - e).abs() - 16 * torch.finfo(torch.float32).eps * m
        assert a.isfinite().all()
        assert (excess <= 0).all(), f"{name} of {case}, R={reduced}, {layout}, {isa}"


@pytest.mark.parametrize("variant", [v for v in variants("span_involution2d") if v.startswith("cpu")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_threads_and_runs_give_the_same_bits(variant: str, layout: str) -> None:
    cases = [c for c in CASES if c[0].input[1] // c[0].groups >= 8]
    cases.append((Case((3, 64, 28, 28), 4, (7, 7), padding=(3, 3)), 16))
    before = torch.get_num_threads()
    results = []
    try:
        with force_variant(variant):
            for threads in (1, 2, 3, 1):
                torch.set_num_threads(threads)
                results.append([passes(case, *tensors(case, r, torch.float32, layout)) for case, r in cases])
    finally:
        torch.set_num_threads(before)
    if variant == "cpu/composed":
        results = [results[0], results[3]]  # torch's convolution promises no more
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            for name, a, b in zip(NAMES, one, two, strict=True):
                assert torch.equal(a, b), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("variant", ["cpu/fused", "cuda/fused"])
@pytest.mark.parametrize("stride", [1, 2])
def test_non_finite_values_reach_what_the_equation_says(value: float, layout: str, variant: str, stride: int) -> None:
    device = variant.split("/")[0]
    if device not in DEVICES or (device == "cuda" and layout != "channels_last"):
        pytest.skip("no CUDA device, or a layout that it is not for")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    case, reduced = Case((2, 32, 20, 18), 2, (7, 7), (stride, stride), (3, 3)), 16
    places = ((0, (0, 17, 2, 9)), (1, (0, 3, 5, 5)), (1, (1, 0, 0, 8)), (2, (60, 3)), (4, (0, 17, 2, 8)))
    for spoiled, place in places:
        given = list(tensors(case, reduced, dtype, layout))
        given[spoiled][place] = value
        # Zero times infinity in a convolution is one more NaN: the oracle is the equation.
        expected = composed(case, *given, work=torch.float64)
        with force_variant(variant):
            actual = passes(case, *(t.to(device) for t in given))
        for name, a, e in zip(NAMES, actual, expected, strict=True):
            for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(kind(a).cpu(), kind(e)), f"{name}, {spoiled} spoiled"


@pytest.mark.skipif("cuda" not in DEVICES, reason="no CUDA device")
@pytest.mark.parametrize("stride", [1, 2])
def test_on_cuda_the_kernels_are_never_in_memory(stride: int) -> None:
    case, reduced = Case((8, 128, 56, 56), 8, (7, 7), (stride, stride), (3, 3)), 32
    given = [t.cuda() for t in tensors(case, reduced, torch.bfloat16, "channels_last")]
    torch.use_deterministic_algorithms(False)
    with force_variant("cuda/fused"):
        first = passes(case, *given)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        second = passes(case, *given)
        peak = torch.cuda.max_memory_allocated() - before
    for name, one, two in zip(NAMES, first, second, strict=True):
        assert torch.equal(one, two), f"{name} has other bits in the second run"
    results = sum(t.nbytes for t in second)
    kernels = case.input[0] * case.groups * 49 * case.output[0] * case.output[1] * 2
    assert peak - results < kernels / 2


MEMORY = """
import torch
from pathlib import Path
from pyinvolution.functional import span_involution2d

def high_water():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

torch.set_num_threads(2)
def step(size):
    x, r, y = (torch.rand(1, c, size, size).to(memory_format=torch.channels_last) for c in (64, 16, 64))
    s, b = torch.randn(4 * 49, 16), torch.randn(4 * 49)
    leaves = [t.requires_grad_() for t in (x, r, s, b)]
    before = high_water()
    out = span_involution2d(*leaves, 7, padding=3)
    out.backward(y)
    return high_water() - before - sum(t.nbytes for t in (out, *leaves))

step(16)
print(step(640))
"""


def test_on_the_cpu_the_kernels_are_never_in_memory() -> None:
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    kernels = 4 * 49 * 640 * 640 * 4
    assert int(result.stdout) < kernels / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["cpu/fused", "cpu/composed"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("relu", [False, True])
def test_epilogue(dtype: torch.dtype, variant: str, layout: str, relu: bool) -> None:
    case, reduced = CASES[0]
    x, r, w, b, _ = tensors(case, reduced, dtype, layout)
    x[0, 5, 4, 4] = float("nan")
    scale, shift = torch.randn(2, 32)
    geometry = (case.kernel, *case.geometry)
    with force_variant(variant):
        actual = ops.span_involution2d(x, r, w, b, scale, shift, relu, *geometry)
    with force_variant("cpu/composed"):
        plain = ops.span_involution2d(x.double(), r.double(), w.double(), b.double(), None, None, False, *geometry)
    expected = plain * scale.double()[:, None, None] + shift.double()[:, None, None]
    expected = expected.relu() if relu else expected
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=4 * tolerance, equal_nan=True)
    assert actual.isnan().any()


@pytest.mark.parametrize(("case", "reduced"), [SMALL, STRIDED], ids=str)
def test_gradcheck(case: Case, reduced: int) -> None:
    leaves = [t.requires_grad_() for t in tensors(case, reduced, torch.float64)[:4]]
    function = lambda *t: span_involution2d(*t, case.kernel, *case.geometry)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, leaves)
    assert torch.autograd.gradcheck(lambda x, r, w: function(x, r, w, None), leaves[:3])


def test_only_the_needed_gradients_are_computed() -> None:
    case, reduced = SMALL
    x, r, w, b, gy = tensors(case, reduced, torch.float32)
    everything = passes(case, x, r, w, b, gy)[1:]
    for mask in ((True, False, False, False), (False, True, False, False), (False, False, True, True)):
        grads = ops.span_involution2d_backward(gy, x, r, w, b, case.kernel, *case.geometry, mask)
        for wanted, grad, full in zip(mask, grads, everything, strict=True):
            assert torch.equal(grad, full) if wanted else grad.numel() == 0


@pytest.mark.parametrize(("case", "reduced"), [*CASES[:5], SMALL], ids=str)
def test_opcheck(case: Case, reduced: int) -> None:
    x, r, w, b, gy = tensors(case, reduced, torch.float32)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    geometry = (case.kernel, *case.geometry)
    torch.library.opcheck(ops.span_involution2d, (x, r, w, b, None, None, False, *geometry), test_utils=tests)
    torch.library.opcheck(ops.span_involution2d_backward, (gy, x, r, w, b, *geometry, (True,) * 4), test_utils=tests)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic: bool) -> None:
    torch._dynamo.reset()
    seen = []

    def spy(graph: torch.fx.GraphModule, inputs: list) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    backend = aot_autograd(fw_compiler=spy, bw_compiler=spy)
    compiled = torch.compile(
        lambda *t: torch.tanh(span_involution2d(*t, 3, padding=1)), fullgraph=True, dynamic=dynamic, backend=backend
    )
    for size in ((2, 16, 5, 6), (3, 16, 7, 8)):
        leaves = [t.requires_grad_() for t in tensors(Case(size, 1), 4, torch.float32)[:4]]
        eager = torch.tanh(span_involution2d(*leaves, 3, padding=1))
        grads = torch.autograd.grad(eager.sum(), leaves)
        result = compiled(*leaves)
        torch.testing.assert_close(result, eager)
        torch.testing.assert_close(torch.autograd.grad(result.sum(), leaves), grads)
    assert "pyinvolution.span_involution2d.default" in seen
    assert "pyinvolution.span_involution2d_backward.default" in seen


def test_unbatched_and_four_dimensional_parameters() -> None:
    case, reduced = STRIDED
    x, r, w, b, _ = tensors(case, reduced, torch.float32)
    expected = span_involution2d(x, r, w, b, case.kernel, *case.geometry)
    actual = span_involution2d(x[0], r[0], w[:, :, None, None], b, case.kernel, *case.geometry)
    assert torch.equal(actual, expected[0])


@pytest.mark.parametrize("in_dims", [(0, 1, None, None), (None, 0, None, None), (0, 0, 0, None), (0, None, None, 1)])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_vmap(in_dims: tuple, requires_grad: bool) -> None:
    case, reduced = SMALL
    given = []
    for tensor, dim in zip(tensors(case, reduced, torch.float64), in_dims, strict=False):
        shape = list(tensor.shape)
        if dim is not None:
            shape.insert(dim, 3)
        given.append(torch.randn(shape, dtype=torch.float64, requires_grad=requires_grad))
    function = lambda *t: span_involution2d(*t, 3, padding=1)  # noqa: E731
    result = torch.vmap(function, in_dims)(*given)
    each = [[t if d is None else t.select(d, i) for t, d in zip(given, in_dims, strict=True)] for i in range(3)]
    torch.testing.assert_close(result, torch.stack([function(*e) for e in each]))


def test_functional_transforms() -> None:
    x, r, w, b, _ = tensors(*SMALL, torch.float64)

    def loss(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return span_involution2d(x, r, w, b, 3, padding=1).square().sum()

    def naive(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        weight = torch.nn.functional.conv2d(r, w[..., None, None], b).unflatten(1, (-1, 3, 3))
        return involution2d(x, weight, padding=1).square().sum()

    every = tuple(range(4))
    torch.testing.assert_close(torch.func.grad(loss, every)(x, r, w, b), torch.func.grad(naive, every)(x, r, w, b))

    def sample(f: Callable) -> Callable:
        return torch.vmap(torch.func.grad(lambda x, r, w, b: f(x[None], r[None], w, b), every), (0, 0, None, None))

    torch.testing.assert_close(sample(loss)(x, r, w, b), sample(naive)(x, r, w, b))
    hessian = lambda f: torch.func.jacrev(torch.func.jacrev(lambda r: f(x, r, w, b)))(r)  # noqa: E731
    torch.testing.assert_close(hessian(loss), hessian(naive))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    leaves = [t.requires_grad_() for t in tensors(*CASES[2], torch.float32)[:4]]
    with torch.autocast("cpu", dtype):
        mixed = span_involution2d(*leaves, 3, padding=1)
        raw = ops.span_involution2d(*(t.detach() for t in leaves), None, None, False, (3, 3), (1, 1), (1, 1), (1, 1))
    assert (mixed.dtype, raw.dtype) == (dtype, dtype)
    exact = span_involution2d(*leaves, 3, padding=1)
    torch.testing.assert_close(mixed.float(), exact, rtol=5e-2, atol=1e-1)
    mixed.float().sum().backward()
    for leaf, grad in zip(leaves, torch.autograd.grad(exact.sum(), leaves), strict=True):
        assert leaf.grad.dtype == torch.float32
        torch.testing.assert_close(leaf.grad, grad, rtol=5e-2, atol=0.02 * grad.abs().max().item())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops(device: str) -> None:
    x, r, w = (
        torch.empty(s, device=device, requires_grad=True) for s in ((2, 32, 14, 14), (2, 8, 14, 14), (2 * 49, 8))
    )
    with FlopCounterMode(display=False) as counter:
        y = span_involution2d(x, r, w, padding=3)
    one = 2 * 2 * 14 * 14 * 49 * (32 + 2 * 8)
    assert counter.get_total_flops() == one
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * one


@pytest.mark.parametrize(
    "size", [(0, 16, 8, 8), (2, 16, 2, 8)], ids=["no image", "no output pixel"]
)  # fmt: skip
def test_empty(size: tuple) -> None:
    case = Case(size, 1, (5, 5), padding=(0, 2))
    given = tensors(case, 4, torch.float32)
    for result, like in zip(passes(case, *given), (given[4], *given[:4]), strict=True):
        assert result.shape == like.shape
        assert torch.equal(result, torch.zeros_like(like))


X, R, W, B = torch.randn(2, 16, 5, 6), torch.randn(2, 4, 5, 6), torch.randn(18, 4), torch.randn(18)
BAD = [
    ("reduced no tensor", {"reduced": None}, TypeError, ["reduced", "NoneType"]),
    ("span_bias no tensor", {"span_bias": 1.0}, TypeError, ["span_bias", "float"]),
    ("input of 2 dimensions", {"input": X[0, 0]}, ValueError, ["input", "(5, 6)"]),
    ("reduced of 2 dimensions", {"reduced": R[0, 0]}, ValueError, ["reduced", "(5, 6)"]),
    ("reduced of another batch", {"reduced": R[:1]}, ValueError, ["reduced", "batch size 1", "2"]),
    ("reduced of another size", {"reduced": R[..., :4]}, ValueError, ["reduced", "5 x 4", "5 x 6"]),
    ("reduced of another dtype", {"reduced": R.double()}, TypeError, ["reduced", "float64", "float32"]),
    ("span_weight of another R", {"span_weight": W[:, :3]}, ValueError, ["span_weight", "(18, 3)", "R = 4"]),
    ("span_weight 3x3", {"span_weight": torch.randn(18, 4, 3, 3)}, ValueError, ["span_weight", "(18, 4, 3, 3)"]),
    ("span_weight with half a kernel", {"span_weight": W[:10]}, ValueError, ["span_weight", "10 rows", "9 taps"]),
    ("G does not divide C", {"span_weight": torch.randn(27, 4), "span_bias": None}, ValueError, ["3 groups", "16"]),
    ("no group", {"span_weight": W[:0], "span_bias": None}, ValueError, ["span_weight", "0 groups"]),
    ("span_bias of another length", {"span_bias": B[:9]}, ValueError, ["span_bias", "(9,)", "(18,)"]),
    ("kernel_size zero", {"kernel_size": 0}, ValueError, ["kernel_size", "(0, 0)"]),
    ("kernel_size of three", {"kernel_size": (3, 3, 3)}, ValueError, ["kernel_size", "(3, 3, 3)"]),
    ("kernel_size no int", {"kernel_size": 3.0}, TypeError, ["kernel_size", "3.0"]),
    ("integers", {"input": X.int()}, TypeError, ["input", "int32"]),
    ("another device", {"span_weight": W.to("meta")}, ValueError, ["span_weight", "meta", "cpu"]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "words"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_argument(arguments: dict, error: type[Exception], words: list[str]) -> None:
    given = {"input": X, "reduced": R, "span_weight": W, "span_bias": B, "kernel_size": 3, "padding": 1, **arguments}
    with pytest.raises(error) as caught:
        span_involution2d(**given)
    message = str(caught.value)
    assert message.startswith("span_involution2d: ")
    assert all(word in message for word in words), message


def test_bad_epilogue() -> None:
    geometry = ((3, 3), (1, 1), (1, 1), (1, 1))
    for scale, shift, word in ((torch.ones(16), None, "shift"), (torch.ones(3), torch.ones(3), "scale")):
        with pytest.raises(RuntimeError, match=f"span_involution2d: {word}"):
            ops.span_involution2d(X, R, W, B, scale, shift, False, *geometry)
