"""The operators as PyTorch sees them: autograd, autocast, compile, export, vmap, FLOPs, memory formats."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from cases import SHIFTED_CASES, UPSAMPLED_CASES, Case
from operators import CORRELATION, INVOLUTION, LAYER, OPERATORS, SPAN, Operator, over_functions, over_operators
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils.flop_counter import FlopCounterMode

from pyinvolution import Involution2d, optimize_for_inference, reference
from pyinvolution.functional import involution2d


def leaves(op: Operator, case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """What the public function can be differentiated in."""
    tensors = op.tensors(case, dtype)[: op.leaves]
    if op is INVOLUTION:
        tensors.append(torch.linspace(-1, 1, case.input[1], dtype=dtype))  # a bias, which the operator does not know
    return [t.requires_grad_() for t in tensors]


def called(op: Operator, case: Case) -> Callable[..., Tensor]:
    """The public function, or where there is none the operator."""

    def call(*tensors: Tensor) -> Tensor:
        if op.function is not None:
            return op.function(case, *tensors)
        operator, arguments = op.forward(case, *tensors)
        return operator(*arguments)

    return call


def test_the_reference_is_the_equation() -> None:
    case = Case((2, 6, 7, 9), 2, (3, 2), (2, 1), (1, 2), (1, 3))
    x, w, _ = INVOLUTION.tensors(case, torch.float64)
    bias = torch.randn(6, dtype=torch.float64)
    expected = torch.zeros(*x.shape[:2], *case.output, dtype=torch.float64)
    (sh, sw), (ph, pw), (dh, dw) = case.geometry
    for n, c, h, v in torch.cartesian_prod(*map(torch.arange, expected.shape)).tolist():
        expected[n, c, h, v] = bias[c]
        for i in range(3):
            for j in range(2):
                row, column = sh * h + dh * i - ph, sw * v + dw * j - pw
                if 0 <= row < 7 and 0 <= column < 9:
                    expected[n, c, h, v] += w[n, c // 3, i, j, h, v] * x[n, c, row, column]
    torch.testing.assert_close(reference.involution2d(x, w, bias, *case.geometry), expected)
    torch.testing.assert_close(involution2d(x, w, bias, *case.geometry), expected)


# --- derivatives ------------------------------------------------------------------------------------------------------

SMALL = pytest.mark.parametrize(
    ("op", "case"), [(op, case) for op in OPERATORS if op.function for case in op.small], ids=str
)


@SMALL
def test_gradients_and_second_gradients_are_those_of_differences(op: Operator, case: Case) -> None:
    tensors = leaves(op, case)
    assert torch.autograd.gradcheck(called(op, case), tensors, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(called(op, case), tensors)
    assert torch.autograd.gradcheck(called(op, case), tensors[:-1])  # without a bias


@over_functions
def test_second_gradients_of_one_tensor_are_those_of_differences(op: Operator) -> None:
    case = op.small[0]
    for wanted in range(op.leaves):
        tensors = [t.requires_grad_(i == wanted) for i, t in enumerate(leaves(op, case))]
        assert torch.autograd.gradgradcheck(called(op, case), tensors, fast_mode=True)


@over_functions
def test_only_the_needed_gradients_are_computed(op: Operator) -> None:
    case = op.small[0]
    tensors = op.tensors(case, torch.float32)

    def gradients(mask: tuple[bool, ...]) -> tuple[Tensor, ...]:
        operator, arguments = op.backward(case, *tensors, mask=mask)
        return operator(*arguments)

    everything = gradients((True,) * op.leaves)
    for mask in product((False, True), repeat=op.leaves):
        for wanted, grad, full in zip(mask, gradients(mask), everything, strict=True):
            assert torch.equal(grad, full) if wanted else grad.numel() == 0


def test_autograd_asks_for_the_needed_gradients_only() -> None:
    x, w, _ = leaves(INVOLUTION, INVOLUTION.small[0])
    with FlopCounterMode(display=False) as both:
        involution2d(x, w, padding=1).sum().backward()
    with FlopCounterMode(display=False) as one:
        involution2d(x, w.detach(), padding=1).sum().backward()
    assert (both.get_total_flops(), one.get_total_flops()) == (3 * 2 * 2 * 4 * 12 * 9, 2 * 2 * 2 * 4 * 12 * 9)


@over_functions
def test_functional_transforms_agree_with_the_composition(op: Operator) -> None:
    case, each = op.small[0], tuple(range(op.leaves))
    tensors = op.tensors(case, torch.float64)[: op.leaves]

    def loss(*t: Tensor) -> Tensor:
        return called(op, case)(*t).square().sum()

    def naive(*t: Tensor) -> Tensor:
        return op.composed(case, *t).square().sum()

    def sample(f: Callable) -> Callable:
        images = [t.dim() > 2 for t in tensors]
        one = lambda *t: f(*(u[None] if image else u for u, image in zip(t, images, strict=True)))  # noqa: E731
        return torch.vmap(torch.func.grad(one, each), tuple(0 if image else None for image in images))

    def hessian(f: Callable) -> Tensor:
        place = op.leaves // 2 - 1  # the input, or what it is reduced to
        fixed = lambda t: f(*tensors[:place], t, *tensors[place + 1 :])  # noqa: E731
        return torch.func.jacrev(torch.func.jacrev(fixed))(tensors[place])

    torch.testing.assert_close(torch.func.grad(loss, each)(*tensors), torch.func.grad(naive, each)(*tensors))
    torch.testing.assert_close(sample(loss)(*tensors), sample(naive)(*tensors))
    torch.testing.assert_close(hessian(loss), hessian(naive))


def test_gradients_survive_a_strided_grad_output() -> None:
    x, w, _ = leaves(INVOLUTION, INVOLUTION.small[0])
    expected = torch.autograd.grad(reference.involution2d(x, w, padding=1).sum(), (x, w))
    actual = torch.autograd.grad(involution2d(x, w, padding=1).sum(), (x, w))  # grad_output is expanded
    torch.testing.assert_close(actual, expected)


# --- what PyTorch asks of an operator ---------------------------------------------------------------------------------


CHECKED = [(op, case) for op, count in zip(OPERATORS, (9, 6, 4, 9), strict=True) for case in op.cases[:count]]


CHECKED += [(op, case) for op in (INVOLUTION, CORRELATION) for case in (SHIFTED_CASES[3], UPSAMPLED_CASES[0])]


@pytest.mark.parametrize(("op", "case"), CHECKED, ids=str)
def test_opcheck(op: Operator, case: Case) -> None:
    tensors = op.tensors(case, torch.float32)
    calls = [op.forward(case, *tensors[: op.leaves])]
    calls += [op.backward(case, *tensors, mask=(True,) * op.leaves)] if op.differentiable else []
    for operator, arguments in calls:
        torch.library.opcheck(
            operator, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        )


@over_operators
@pytest.mark.parametrize("size", [(2, 4, 5, 6), (2, 1, 5, 6), (2, 4, 1, 1), (1, 1, 1, 1), (0, 4, 5, 6), (2, 4, 5, 1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_the_one_of_a_convolution(
    op: Operator, size: tuple, memory_format: torch.memory_format
) -> None:
    case = Case(size, 1, (3, 3), reduced=2)
    x, *others = op.tensors(case, torch.float32)
    x = x.to(memory_format=memory_format)
    if op is CORRELATION:  # the second is the image there
        others[0] = others[0].to(memory_format=memory_format)
    operator, arguments = op.forward(case, *[x, *others][: op.leaves])
    result = operator(*arguments)
    if result.dim() == 6:  # kernels: as a 1x1 convolution would have made them
        result = result.flatten(1, 3)
    one_channel = result.shape[1] != size[1] == 1  # whose format can be taken for either
    assert not x.numel() or one_channel or result.is_contiguous(memory_format=memory_format)
    fake = torch.library.opcheck(operator, arguments, test_utils="test_faketensor")
    assert fake == {"test_faketensor": "SUCCESS"}
    if op.differentiable:
        operator, arguments = op.backward(case, x, *others, mask=(True,) * op.leaves)
        for grad, like in zip(operator(*arguments), (x, *others), strict=False):
            assert grad.stride() == torch.empty_like(like).stride()


@over_functions
def test_images_need_no_batch(op: Operator) -> None:
    for case in op.small:
        tensors = op.tensors(case, torch.float32)[: op.leaves]
        one = [t[0] if t.dim() > 2 else t for t in tensors]
        assert torch.equal(called(op, case)(*one), called(op, case)(*tensors)[0])


VMAPPED = [(op, in_dims) for op in OPERATORS for in_dims in op.vmapped]


@pytest.mark.parametrize(("op", "in_dims"), VMAPPED, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_vmap_gives_what_each_call_gives(op: Operator, in_dims: tuple, requires_grad: bool) -> None:
    case = op.small[0]
    given = []
    for shape, dim in zip(op.shapes(case), in_dims, strict=False):
        size = list(shape)
        if dim is not None:
            size.insert(dim, 3)
        given.append(torch.randn(size, dtype=torch.float64, requires_grad=requires_grad and op.differentiable))
    each = [[t if d is None else t.select(d, i) for t, d in zip(given, in_dims, strict=True)] for i in range(3)]
    result = torch.vmap(called(op, case), in_dims)(*given)
    torch.testing.assert_close(result, torch.stack([called(op, case)(*e) for e in each]))


@over_operators
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_a_cast_of_all_tensors_but_float64(op: Operator, dtype: torch.dtype) -> None:
    case = op.cases[2]
    tensors = op.tensors(case, torch.float32)[: op.leaves]
    function, (operator, arguments) = called(op, case), op.forward(case, *tensors)
    cast = [t.to(dtype) for t in tensors]
    expected = function(*cast)
    with torch.autocast("cpu", dtype):
        assert torch.equal(operator(*arguments), expected)
        assert torch.equal(function(*tensors), expected)
        assert torch.equal(function(tensors[0], *cast[1:]), expected)
        assert function(*(t.double() for t in tensors)).dtype == torch.float64
    assert expected.dtype == dtype
    if op.function is None:
        return
    one, other = leaves(op, case, torch.float32), leaves(op, case, torch.float32)
    with torch.autocast("cpu", dtype):
        mixed = function(*one)
    results = [torch.autograd.grad(y.float().sum(), t) for y, t in (
        (mixed, one), (function(*(t.to(dtype) for t in other)), other)
    )]  # fmt: skip
    for grad, same in zip(*results, strict=True):
        assert grad.dtype == torch.float32
        assert torch.equal(grad, same)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("op", "multiply_adds"), [
        (INVOLUTION, 32 * 49), (SPAN, 98 * 8 + 32 * 49), (LAYER, 32 * 8 + 98 * 8 + 32 * 49), (CORRELATION, 32 * 49)
    ],
    ids=str,
)  # fmt: skip
def test_flops_are_counted(op: Operator, multiply_adds: int, device: str) -> None:
    """Multiply-adds of an output pixel, each of which is two."""
    case = Case((2, 32, 14, 12), 2, (7, 7), padding=(3, 3), reduced=8)
    tensors = [t.to(device).requires_grad_(op.differentiable) for t in op.tensors(case, torch.float32)[: op.leaves]]
    with FlopCounterMode(display=False) as counter:
        output = called(op, case)(*tensors)
    assert output.device.type == device
    assert counter.get_total_flops() == 2 * 2 * 14 * 12 * multiply_adds
    if op.differentiable:
        with FlopCounterMode(display=False) as counter:
            output.sum().backward()
        assert counter.get_total_flops() == 2 * 2 * 2 * 14 * 12 * multiply_adds


# --- compile and export -----------------------------------------------------------------------------------------------


@over_operators
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_code_has_no_graph_break_and_keeps_the_operator(op: Operator, dynamic: bool) -> None:
    torch._dynamo.reset()
    seen = []

    def spy(graph: torch.fx.GraphModule, inputs: list) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph)

    cases = [Case(size, 2, (3, 3), reduced=4) for size in ((2, 16, 5, 6), (3, 16, 7, 8), (1, 32, 9, 4))]
    call = called(op, cases[0])
    function = lambda *t: torch.tanh(call(*t)).square()  # noqa: E731
    compiled = torch.compile(
        function, fullgraph=True, dynamic=dynamic, backend=aot_autograd(fw_compiler=spy, bw_compiler=spy)
    )
    for case in cases:
        tensors = [t.requires_grad_(op.differentiable) for t in leaves(op, case, torch.float32)]
        eager, result = function(*tensors), compiled(*tensors)
        torch.testing.assert_close(result, eager)
        if op.differentiable:
            grads = [torch.autograd.grad(y.sum(), tensors) for y in (result, eager)]
            torch.testing.assert_close(*grads)
    wanted = {f"pyinvolution.{op}.default"} | ({f"pyinvolution.{op}_backward.default"} if op.differentiable else set())
    assert wanted <= set(seen)


def test_inductor_keeps_channels_last() -> None:
    torch._dynamo.reset()
    case = Case((2, 32, 8, 8), 2)
    x, w, _ = INVOLUTION.tensors(case, torch.float32, "channels_last")
    function = lambda x, w: involution2d(x * 2, w, padding=1).relu()  # noqa: E731
    result = torch.compile(function, fullgraph=True)(x, w)
    torch.testing.assert_close(result, function(x, w))
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_export_with_dynamic_shapes() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return involution2d(x, w, padding=1)

    batch, height, width = (torch.export.Dim(n, min=2, max=64) for n in ("batch", "height", "width"))
    x, w, _ = INVOLUTION.tensors(Case((3, 4, 6, 7), 2), torch.float32)
    program = torch.export.export(
        Model(), (x, w), dynamic_shapes=({0: batch, 2: height, 3: width}, {0: batch, 4: height, 5: width})
    )
    x, w, _ = INVOLUTION.tensors(Case((5, 4, 9, 3), 2), torch.float32)
    torch.testing.assert_close(program.module()(x, w), involution2d(x, w, padding=1))


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


def test_a_tensor_beyond_two_to_the_31_elements() -> None:
    # A view of one image's worth of memory: offsets are large, storage is not.
    storage = torch.randn(2**16 + 64, dtype=torch.float32)
    x = storage.as_strided((1, 1, 4, 4), (0, 0, 2**14, 1))
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((1, 2, 4, 4), (0, 2**31, 8, 1))
    near = torch.randn(1, 2, 4, 4).bfloat16()
    far.copy_(near)
    w = torch.randn(1, 1, 3, 3, 4, 4)
    assert torch.equal(involution2d(far, w.bfloat16(), padding=1), involution2d(near, w.bfloat16(), padding=1))
    torch.testing.assert_close(involution2d(x, w, padding=1), involution2d(x.contiguous(), w, padding=1))
