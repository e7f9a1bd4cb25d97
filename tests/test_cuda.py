"""The CUDA variants on a GPU: what only a real device can show. test_kernels.py runs each over all that it takes."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from cases import REDNET50, Case, in_layout
from operators import INVOLUTION, SPAN, Operator
from torch import Tensor

from pyinvolution import force_variant, ops
from pyinvolution.functional import involution2d, span_involution2d

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.usefixtures("poisoned_outputs"),
]

SIXTEEN_BITS = (torch.float16, torch.bfloat16)
VARIANTS, SPAN_VARIANTS = ([name for name in op.takes if name.startswith("cuda/")] for op in (INVOLUTION, SPAN))

# One that each variant takes.
COMMON = {
    "cuda/mma": torch.bfloat16,
    "cuda/sliding": torch.float32,
    "cuda/tiled": torch.float32,
    "cuda/generic": torch.float32,
}


def compute(case: Case, *given: Tensor) -> list[Tensor]:
    return list(INVOLUTION.run(case, given).values())


def check(case: Case, given: Sequence[Tensor], variant: str) -> None:
    INVOLUTION.assert_accurate(case, given, INVOLUTION.run(case, given), variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mix", range(8))
def test_mixed_layouts(variant: str, mix: int) -> None:
    """Each tensor in a layout of its own. A pass that the variant refuses is left to the others."""
    case = Case((2, 64, 12, 20), 4, (7, 7), padding=(3, 3))
    given = [
        in_layout(t, ("contiguous", "channels_last")[mix >> i & 1])
        for i, t in enumerate(INVOLUTION.tensors(case, COMMON[variant], device="cuda"))
    ]
    if variant == "cuda/mma" and mix & 2 and mix & 5 != 5:
        pytest.skip("mma takes dense taps beside dense channels only")
    with force_variant(variant):
        check(case, given, variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_unaligned_storage(variant: str, layout: str, offset: int) -> None:
    case = Case((2, 64, 12, 16), 4, (7, 7), padding=(3, 3))

    def moved(t: Tensor) -> Tensor:
        storage = torch.full((t.numel() + offset,), float("nan"), dtype=t.dtype, device="cuda")
        return storage[offset:].as_strided(t.shape, t.stride()).copy_(t)

    given = [moved(t) for t in INVOLUTION.tensors(case, COMMON[variant], layout, "cuda")]
    assert all(t.data_ptr() % 16 == offset * t.itemsize % 16 for t in given)
    with force_variant(variant):
        check(case, given, variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", REDNET50)
def test_runs_give_the_same_bits(variant: str, name: str) -> None:
    case = replace(REDNET50[name], input=(8, *REDNET50[name].input[1:]))
    given = INVOLUTION.tensors(case, COMMON[variant], "channels_last", "cuda")
    with force_variant(variant):
        first = compute(case, *given)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, compute(case, *given), strict=True))


# --- streams, graphs, devices -----------------------------------------------------------------------------------------

SMALL = Case((2, 64, 14, 14), 4, (7, 7), padding=(3, 3), reduced=16)


def subject(variant: str, op: Operator) -> tuple[list[Tensor], Callable[..., list[Tensor]]]:
    """Tensors, and what a variant computes of them."""
    passes = op.passes if op is INVOLUTION else ["forward"]
    given = op.tensors(SMALL, COMMON.get(variant, torch.bfloat16), "channels_last", "cuda")
    return given, lambda *tensors: list(op.run(SMALL, tensors, passes).values())


SUBJECTS = [*((variant, INVOLUTION) for variant in VARIANTS), *((variant, SPAN) for variant in SPAN_VARIANTS)]
over_subjects = pytest.mark.parametrize(("variant", "op"), SUBJECTS, ids=str)


def assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert not e.isnan().any()
        assert torch.equal(a.cpu(), e.cpu())


@over_subjects
def test_current_stream(variant: str, op: Operator) -> None:
    (x, *rest), function = subject(variant, op)
    with force_variant(variant):
        expected = function(x, *rest)
        late = torch.full_like(x, float("nan"))
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # about a tenth of a second: any other stream would read NaN
            late.copy_(x)
            actual = function(late, *rest)
        stream.synchronize()
    assert_same_bits(actual, expected)


@over_subjects
def test_graph_capture(variant: str, op: Operator) -> None:
    given, function = subject(variant, op)
    with force_variant(variant):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function(*given)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = function(*given)
        for tensor in given:
            tensor.copy_(tensor.flip(0))
        expected = function(*given)
        graph.replay()
        torch.cuda.synchronize()
    assert_same_bits(captured, expected)


def test_graph_capture_of_a_training_step() -> None:
    x, w, gy = INVOLUTION.tensors(SMALL, torch.bfloat16, "channels_last", "cuda")
    x.requires_grad_(), w.requires_grad_()

    def step() -> tuple[Tensor, ...]:
        y = involution2d(x, w, None, *SMALL.geometry)
        return y, *torch.autograd.grad(y, (x, w), gy)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(captured, step())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
@over_subjects
def test_another_device(variant: str, op: Operator) -> None:
    given, function = subject(variant, op)
    with force_variant(variant), torch.cuda.device(0):
        expected = function(*given)
        actual = function(*(t.to("cuda:1") for t in given))
        assert torch.cuda.current_device() == 0
    assert all(a.device == torch.device("cuda:1") for a in actual)
    assert_same_bits(actual, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_two_devices_in_one_call() -> None:
    x, w, _ = INVOLUTION.tensors(SMALL, torch.float32, device="cuda:0")
    with pytest.raises((ValueError, RuntimeError), match="cuda:1"):
        involution2d(x, w.to("cuda:1"), None, *SMALL.geometry)


# --- large tensors ----------------------------------------------------------------------------------------------------


def require_memory(gibibytes: int) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < gibibytes << 30:
        pytest.skip(f"less than {gibibytes} GiB of GPU memory are free")


def random_in_layout(shape: tuple[int, ...], layout: str) -> Tensor:
    """Made on the device, without a copy."""
    strides = in_layout(torch.empty(shape, device="meta"), layout).stride()
    order = sorted(range(len(shape)), key=lambda d: -strides[d])
    made = torch.randn([shape[d] for d in order], dtype=torch.bfloat16, device="cuda")
    return made.permute([order.index(d) for d in range(len(shape))])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_batch_beyond_two_to_the_31_elements(variant: str, layout: str) -> None:
    require_memory(40)
    one = Case((1, 32, 112, 112), 2, (3, 3))
    batch = 2**31 // (32 * 112 * 112) + 3
    case = replace(one, input=(batch, *one.input[1:]))
    shapes = (case.input, case.weight, (*case.input[:2], *case.output))
    given = [random_in_layout(shape, layout) for shape in shapes]
    assert given[0].numel() > 2**31
    with force_variant(variant):
        whole = compute(case, *given)
        for image in (0, batch - 3, batch - 2, batch - 1):
            alone = compute(one, *(t[image : image + 1] for t in given))
            assert_same_bits([t[image : image + 1] for t in whole], alone)
        check(one, [t[-1:] for t in given], variant)


def test_an_image_beyond_two_to_the_31_elements() -> None:
    require_memory(24)
    side = 46400
    x = torch.randn(1, 1, side, side, dtype=torch.bfloat16, device="cuda")
    w = torch.randn(1, 1, 1, 1, side, side, dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 2**31
    y = ops.involution2d(x, w, (1, 1), (0, 0), (1, 1))
    for rows in (slice(0, 8), slice(-8, None)):
        assert torch.equal(y[..., rows, :], x[..., rows, :] * w[0, :, 0, 0, rows, :])


@pytest.mark.parametrize("variant", SPAN_VARIANTS)
def test_span_gradients(variant: str) -> None:
    """Through autograd, whose backward may be another variant's."""
    case = SPAN.cuda_cases[0]
    *given, gy = SPAN.tensors(case, torch.bfloat16, "channels_last", "cuda")
    leaves = [t.requires_grad_() for t in given]
    with force_variant(variant):
        y = span_involution2d(*leaves, case.kernel, *case.geometry)
        results = [y, *torch.autograd.grad(y, leaves, gy)]
    actual = dict(zip(SPAN.results, (t.detach() for t in results), strict=True))
    SPAN.assert_accurate(case, [*(t.detach() for t in leaves), gy], actual, variant)


# --- as PyTorch sees it -----------------------------------------------------------------------------------------------


def test_gradcheck() -> None:
    case = Case((1, 4, 5, 4), 2, (3, 3), (2, 1))
    x, w, _ = INVOLUTION.tensors(case, torch.float64, device="cuda")
    leaves = (x.requires_grad_(), w.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, w: involution2d(x, w, None, *case.geometry), leaves)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    x, w, _ = (t.requires_grad_() for t in INVOLUTION.tensors(SMALL, torch.float32, device="cuda"))
    exact = involution2d(x, w, None, *SMALL.geometry)
    with torch.autocast("cuda", dtype):
        mixed = involution2d(x, w, None, *SMALL.geometry)
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed.float(), exact, rtol=5e-2, atol=1e-1)
    for mine, right in zip(
        torch.autograd.grad(mixed.float().sum(), (x, w)), torch.autograd.grad(exact.sum(), (x, w)), strict=True
    ):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, right, rtol=5e-2, atol=0.02 * right.abs().max().item())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    torch._dynamo.reset()
    x, w, _ = (t.requires_grad_() for t in INVOLUTION.tensors(SMALL, torch.float32, "channels_last", "cuda"))
    function = lambda x, w: torch.tanh(involution2d(x, w, None, *SMALL.geometry))  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    expected, actual = function(x, w), compiled(x, w)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual.sum(), (x, w)), torch.autograd.grad(expected.sum(), (x, w)))
