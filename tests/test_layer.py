"""involution_layer2d: every variant against the float64 oracle, and as PyTorch sees it."""

import pytest
import torch
from cases import DTYPES, LAYOUTS, Case, in_layout, random_like
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_accurate
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, pad
from torch.utils.flop_counter import FlopCounterMode

from pyinvolution import force_variant, ops, optimize_for_inference, override_isa, reference
from pyinvolution.explain import available_isas
from pyinvolution.modules import Involution2d


def layer(
    batch: int, channels: int, size: tuple[int, int], groups: int, kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1), dilation: tuple[int, int] = (1, 1),
) -> Case:  # fmt: skip
    padding = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    return Case((batch, channels, *size), groups, kernel, stride, padding, dilation)


# A problem and its reduced channels.
CASES = [
    (layer(2, 32, (9, 11), 2, (7, 7)), 8),
    (layer(1, 32, (10, 9), 2, (7, 7), (2, 2)), 5),
    (layer(2, 16, (13, 6), 1, (3, 5), (2, 3)), 4),
    (layer(1, 24, (6, 5), 2, (2, 4)), 3),
    (layer(1, 40, (9, 9), 1, (4, 3), (3, 1), (1, 2)), 19),
    (layer(1, 16, (3, 130), 1, (1, 3)), 20),
    (layer(1, 128, (14, 15), 8, (3, 3), (2, 2)), 33),
    (layer(3, 6, (7, 9), 2, (3, 3)), 2),
    (layer(1, 64, (37, 29), 4, (3, 3)), 16),
]


def tensors(case: Case, reduced: int, dtype: torch.dtype, layout: str = "contiguous") -> list[Tensor]:
    """input, reduce_weight, reduce_bias, span_weight, span_bias; then scale and shift."""
    generator = torch.Generator().manual_seed(0)
    rows, channels = case.groups * case.kernel[0] * case.kernel[1], case.input[1]
    shapes = (case.input, (reduced, channels), (reduced,), (rows, reduced), (rows,), (channels,), (channels,))
    x, a, ab, s, sb, scale, shift = (random_like(shape, torch.float64, "cpu", generator) for shape in shapes)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given = (x, a / channels**0.5, ab, s / reduced**0.5, sb)
    x, *parameters = (t.to(dtype) for t in given)
    return [in_layout(x, layout), *parameters, scale.to(wide), shift.to(wide)]


def composed(case: Case, given: list[Tensor], relu: bool, work: torch.dtype) -> Tensor:
    x, a, ab, s, sb, scale, shift = (t.to(work) for t in given)
    reduced = conv2d(avg_pool2d(x, case.stride, ceil_mode=True), a[..., None, None], ab).relu()
    weight = conv2d(reduced, s[..., None, None], sb).unflatten(1, (case.groups, *case.kernel))
    odd = [d * (k - 1) % 2 for k, d in zip(case.kernel, case.dilation, strict=True)]
    y = reference.involution2d(pad(x, (0, odd[1], 0, odd[0])), weight, None, *case.geometry)
    y = y * scale[:, None, None] + shift[:, None, None]
    return y.relu() if relu else y


def run(case: Case, given: list[Tensor], relu: bool = True) -> Tensor:
    return ops.involution_layer2d(*given, relu, case.kernel, *case.geometry)


def check(case: Case, reduced: int, dtype: torch.dtype, layout: str, relu: bool) -> None:
    given = tensors(case, reduced, dtype, layout)
    same = composed(case, given, relu, torch.float32 if dtype.itemsize == 2 else dtype).to(dtype)
    exact = composed(case, given, relu, torch.float64)
    assert_accurate(run(case, given, relu), exact, same, f"{case}, R={reduced}, {dtype}, {layout}")


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cases(dtype: torch.dtype, layout: str) -> None:
    for index, (case, reduced) in enumerate(CASES):
        check(case, reduced, dtype, layout, bool(index % 2))


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_isa(isa: str, dtype: torch.dtype) -> None:
    with override_isa(isa), force_variant("cpu/fused"):
        for case, reduced in CASES:
            if case.input[1] // case.groups >= 8:
                check(case, reduced, dtype, "channels_last", True)


def test_the_composition_takes_everything() -> None:
    with force_variant("cpu/composed"):
        for case, reduced in CASES:
            check(case, reduced, torch.float32, "channels_last", True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2), groups=st.integers(1, 9), per_group=st.integers(8, 20), reduced=st.integers(1, 40),
    size=st.tuples(st.integers(1, 20), st.integers(1, 40)), kernel=st.tuples(st.integers(1, 7), st.integers(1, 8)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)), dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    layout=st.sampled_from(LAYOUTS), isa=st.sampled_from(available_isas()), threads=st.integers(1, 3),
)  # fmt: skip
def test_any_shape(
    batch: int, groups: int, per_group: int, reduced: int, size: tuple, kernel: tuple, stride: tuple, dilation: tuple,
    layout: str, isa: str, threads: int,
) -> None:  # fmt: skip
    case = layer(batch, groups * per_group, size, groups, kernel, stride, dilation)
    given = tensors(case, reduced, torch.float32, layout)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with override_isa(isa), force_variant("cpu/fused"):
            actual = run(case, given, False)
    finally:
        torch.set_num_threads(before)
    # A bound by the terms' absolute values, which chance does not make small.
    magnitude = composed(case, [t.abs() for t in given], False, torch.float64)
    error = (actual - composed(case, given, False, torch.float64)).abs()
    assert (error <= 64 * torch.finfo(torch.float32).eps * magnitude).all(), f"{case}, R={reduced}, {layout}, {isa}"


def test_threads_and_runs_give_the_same_bits() -> None:
    # Those of the kernels; torch's convolution, which takes the others, promises no more.
    cases = [c for c in CASES if c[0].input[1] // c[0].groups >= 8]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8, 1):
            torch.set_num_threads(threads)
            results.append([run(case, tensors(case, r, torch.float32, "channels_last")) for case, r in cases])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_non_finite_values_reach_what_the_equation_says() -> None:
    case, reduced = layer(1, 32, (12, 10), 2, (3, 3), (2, 2)), 4
    for spoiled, place in ((0, (0, 17, 2, 9)), (1, (2, 3)), (3, (5, 1))):
        given = tensors(case, reduced, torch.float32, "channels_last")
        given[spoiled][place] = float("nan")
        expected, actual = composed(case, given, True, torch.float64), run(case, given)
        assert actual.isnan().any()
        assert torch.equal(actual.isnan(), expected.isnan())


@pytest.mark.parametrize(("case", "reduced"), CASES[:4], ids=str)
def test_opcheck(case: Case, reduced: int) -> None:
    given = tensors(case, reduced, torch.float32)
    torch.library.opcheck(
        ops.involution_layer2d, (*given, True, case.kernel, *case.geometry),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_no_bias_no_epilogue_and_empty() -> None:
    case, reduced = CASES[0]
    x, a, ab, s, sb, *_ = tensors(case, reduced, torch.float32)
    none = ops.involution_layer2d(x, a, None, s, None, None, None, False, case.kernel, *case.geometry)
    zero = ops.involution_layer2d(x, a, 0 * ab, s, 0 * sb, None, None, False, case.kernel, *case.geometry)
    assert torch.equal(none, zero)
    four = ops.involution_layer2d(
        x, a[..., None, None], ab, s[..., None, None], sb, None, None, False, case.kernel, *case.geometry
    )
    assert torch.equal(four, ops.involution_layer2d(x, a, ab, s, sb, None, None, False, case.kernel, *case.geometry))
    assert ops.involution_layer2d(x[:0], a, ab, s, sb, None, None, False, case.kernel, *case.geometry).shape[0] == 0


def test_autocast_vmap_and_flops() -> None:
    case, reduced = CASES[1]
    given = tensors(case, reduced, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        low = run(case, given)
    assert low.dtype == torch.bfloat16
    exact = run(case, given)
    torch.testing.assert_close(low.float(), exact, rtol=0.05, atol=0.1)
    mapped = torch.vmap(lambda x: run(case, [x[None], *given[1:]])[0])(given[0])
    assert torch.equal(mapped, exact)
    pixels = 5 * 5
    with FlopCounterMode(display=False) as counter:
        run(case, given)
    assert counter.get_total_flops() == 2 * pixels * (32 * reduced + 98 * reduced + 32 * 49)


def test_bad_argument() -> None:
    case, reduced = CASES[0]
    good = tensors(case, reduced, torch.float32)
    for index, bad, words in (
        (0, torch.zeros(3, 4), ["input", "(3, 4)", "4 dimensions"]),
        (1, torch.zeros(reduced, 31), ["reduce_weight", "(8, 31)", "C = 32"]),
        (1, good[1].double(), ["reduce_weight", "Double", "Float"]),
        (2, torch.zeros(3), ["reduce_bias", "(3)", "(8)"]),
        (3, torch.zeros(98, 7), ["span_weight", "(98, 7)", "R = 8"]),
        (3, torch.zeros(97, 8), ["span_weight", "97 rows", "49 taps"]),
        (4, torch.zeros(5), ["span_bias", "(5)", "(98)"]),
        (5, torch.zeros(5), ["scale", "(5)", "(32)"]),
    ):
        given = list(good)
        given[index] = bad
        with pytest.raises(RuntimeError) as caught:
            run(case, given)
        message = str(caught.value)
        assert all(word in message for word in ["involution_layer2d: ", *words]), message


@pytest.mark.parametrize("size", [(13, 18), (14, 14)])
def test_an_optimized_layer_exports_and_compiles(size: tuple[int, int]) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(Involution2d(32, 4, 2)).eval()
    optimized = optimize_for_inference(model)
    x = torch.randn(2, 32, *size)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(optimized(x), expected, rtol=1e-4, atol=1e-4)
        program = torch.export.export(optimized, (x,))
        assert "involution_layer2d" in str(program.graph)
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-4)
        with torch._inductor.config.patch(freezing=True):
            compiled = torch.compile(optimized, fullgraph=True, dynamic=True)
            for batch in (2, 3):
                y = torch.randn(batch, 32, *size)
                torch.testing.assert_close(compiled(y), model(y), rtol=1e-4, atol=1e-4)
