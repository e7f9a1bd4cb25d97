"""functional.involution2d as PyTorch sees it: autograd, autocast, compile, export, vmap, FLOPs, memory formats."""

import pytest
import torch
from cases import CASES, Case, tensors
from torch.utils.flop_counter import FlopCounterMode

from pyinvolution import ops, reference
from pyinvolution.functional import involution2d

SMALL = [
    Case((2, 4, 3, 4), 2, (3, 3)),
    Case((1, 3, 5, 3), 3, (2, 4), (2, 1), (1, 2), (1, 1)),
    Case((1, 4, 5, 5), 1, (3, 3), (2, 2), (2, 2), (2, 2)),
]


def leaves(case: Case, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    x, w, _ = tensors(case, dtype)
    return x.requires_grad_(), w.requires_grad_()


def test_reference_is_the_equation() -> None:
    case = Case((2, 6, 7, 9), 2, (3, 2), (2, 1), (1, 2), (1, 3))
    x, w, _ = tensors(case, torch.float64)
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


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case: Case) -> None:
    x, w = leaves(case)
    bias = torch.randn(case.input[1], dtype=torch.float64, requires_grad=True)
    function = lambda x, w, b: involution2d(x, w, b, *case.geometry)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, w, bias), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, (x, w, bias))


@pytest.mark.parametrize("case", SMALL[:1], ids=str)
def test_second_derivative_of_one_gradient(case: Case) -> None:
    for i in range(2):
        tensors_ = list(leaves(case))
        tensors_[1 - i].requires_grad_(False)
        assert torch.autograd.gradgradcheck(lambda x, w: involution2d(x, w, None, *case.geometry), tuple(tensors_))


def test_only_the_needed_gradient_is_computed() -> None:
    x, w = leaves(SMALL[0])
    both = FlopCounterMode(display=False)
    with both:
        involution2d(x, w, padding=1).sum().backward()
    one = FlopCounterMode(display=False)
    with one:
        involution2d(x, w.detach(), padding=1).sum().backward()
    assert (both.get_total_flops(), one.get_total_flops()) == (3 * 2 * 2 * 4 * 12 * 9, 2 * 2 * 2 * 4 * 12 * 9)
    assert x.grad is not None
    empty = ops.involution2d_backward(torch.zeros(2, 4, 3, 4).double(), x, w, (1, 1), (1, 1), (1, 1), (False, True))[0]
    assert empty.numel() == 0


@pytest.mark.parametrize("case", CASES[:9], ids=str)
def test_opcheck(case: Case) -> None:
    x, w, gy = tensors(case, torch.float32)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.involution2d, (x, w, *case.geometry), test_utils=tests)
    torch.library.opcheck(ops.involution2d_backward, (gy, x, w, *case.geometry, (True, True)), test_utils=tests)


@pytest.mark.parametrize("size", [(2, 4, 5, 6), (2, 1, 5, 6), (2, 4, 1, 1), (1, 1, 1, 1), (0, 4, 5, 6), (2, 4, 5, 1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_the_one_of_a_convolution(size: tuple, memory_format: torch.memory_format) -> None:
    case = Case(size, 1, (3, 3))
    x, w, gy = tensors(case, torch.float32)
    x = x.to(memory_format=memory_format)
    assert not x.numel() or involution2d(x, w, padding=1).is_contiguous(memory_format=memory_format)
    fake = torch.library.opcheck(ops.involution2d, (x, w, *case.geometry), test_utils="test_faketensor")
    assert fake == {"test_faketensor": "SUCCESS"}
    gx, gw = ops.involution2d_backward(gy, x, w, *case.geometry, (True, True))
    assert (gx.stride(), gw.stride()) == (torch.empty_like(x).stride(), torch.empty_like(w).stride())


def test_unbatched() -> None:
    x, w, _ = tensors(SMALL[1], torch.float32)
    batched = involution2d(x, w, None, *SMALL[1].geometry)
    assert torch.equal(involution2d(x[0], w[0], None, *SMALL[1].geometry), batched[0])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, w, b: torch.tanh(involution2d(x, w, b, padding=1)).square(),
        fullgraph=True, dynamic=dynamic, backend="aot_eager",
    )  # fmt: skip
    for size in ((2, 4, 5, 6), (3, 4, 7, 8), (1, 8, 9, 4)):
        x, w = leaves(Case(size, 2), torch.float32)
        bias = torch.randn(size[1], requires_grad=True)
        eager = torch.tanh(involution2d(x, w, bias, padding=1)).square()
        grads = torch.autograd.grad(eager.sum(), (x, w, bias))
        result = compiled(x, w, bias)
        torch.testing.assert_close(result, eager)
        torch.testing.assert_close(torch.autograd.grad(result.sum(), (x, w, bias)), grads)


def test_compile_inductor_and_channels_last() -> None:
    torch._dynamo.reset()
    case = Case((2, 32, 8, 8), 2)
    x, w, _ = tensors(case, torch.float32, "channels_last")
    function = lambda x, w: involution2d(x * 2, w, padding=1).relu()  # noqa: E731
    result = torch.compile(function, fullgraph=True)(x, w)
    torch.testing.assert_close(result, function(x, w))
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_export_with_dynamic_shapes() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return involution2d(x, w, padding=1)

    batch, height, width = (torch.export.Dim(n, min=2, max=64) for n in ("batch", "height", "width"))
    x, w, _ = tensors(Case((3, 4, 6, 7), 2), torch.float32)
    program = torch.export.export(
        Model(), (x, w), dynamic_shapes=({0: batch, 2: height, 3: width}, {0: batch, 4: height, 5: width})
    )
    x, w, _ = tensors(Case((5, 4, 9, 3), 2), torch.float32)
    torch.testing.assert_close(program.module()(x, w), involution2d(x, w, padding=1))


@pytest.mark.parametrize(("in_dims", "x_size"), [((0, 0), 3), ((1, 2), 3), ((0, None), 3), ((None, 1), 3)])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_vmap(in_dims: tuple, x_size: int, requires_grad: bool) -> None:
    case = SMALL[0]
    inputs = []
    for shape, dim in zip((case.input, case.weight), in_dims, strict=True):
        full = list(shape)
        if dim is not None:
            full.insert(dim, x_size)
        inputs.append(torch.randn(full, dtype=torch.float64, requires_grad=requires_grad))
    result = torch.vmap(lambda x, w: involution2d(x, w, padding=1), in_dims)(*inputs)
    slices = [
        [t.select(d, i) if d is not None else t for t, d in zip(inputs, in_dims, strict=True)] for i in range(x_size)
    ]
    torch.testing.assert_close(result, torch.stack([involution2d(x, w, padding=1) for x, w in slices]))


def test_functional_transforms() -> None:
    x, w, _ = tensors(SMALL[0], torch.float64)
    loss = lambda x, w: involution2d(x, w, padding=1).square().sum()  # noqa: E731
    naive = lambda x, w: reference.involution2d(x, w, padding=1).square().sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(loss, (0, 1))(x, w), torch.func.grad(naive, (0, 1))(x, w))
    per_sample = lambda f: torch.vmap(torch.func.grad(lambda x, w: f(x[None], w[None]), (0, 1)))  # noqa: E731
    torch.testing.assert_close(per_sample(loss)(x, w), per_sample(naive)(x, w))
    hessian = lambda f: torch.func.jacrev(torch.func.jacrev(lambda x: f(x, w)))(x)  # noqa: E731
    torch.testing.assert_close(hessian(loss), hessian(naive))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    x, w = leaves(SMALL[0], torch.float32)
    with torch.autocast("cpu", dtype):
        mixed = involution2d(x, w.to(dtype), torch.randn(4), padding=1)
        raw = ops.involution2d(x, w, (1, 1), (1, 1), (1, 1))
        double = involution2d(x.double(), w.double(), padding=1)
    assert (mixed.dtype, raw.dtype, double.dtype) == (dtype, dtype, torch.float64)
    torch.testing.assert_close(raw.float(), involution2d(x, w, padding=1), rtol=5e-2, atol=5e-2)
    mixed.float().sum().backward()
    assert x.grad.dtype == w.grad.dtype == torch.float32
    expected = torch.autograd.grad(involution2d(x, w, padding=1).sum(), (x, w))
    torch.testing.assert_close((x.grad, w.grad), expected, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops(device: str) -> None:
    x, w = (torch.empty(s, device=device, requires_grad=True) for s in ((2, 32, 14, 14), (2, 2, 7, 7, 14, 14)))
    with FlopCounterMode(display=False) as counter:
        involution2d(x, w, padding=3)
    assert counter.get_total_flops() == 2 * 2 * 32 * 14 * 14 * 49


def test_meta_output() -> None:
    y = involution2d(torch.empty(2, 4, 5, 6, device="meta"), torch.empty(2, 2, 3, 3, 3, 3, device="meta"), None, 2, 1)
    assert y.device.type == "meta"
    assert y.shape == (2, 4, 3, 3)


def test_gradients_survive_a_strided_grad_output() -> None:
    x, w = leaves(SMALL[0])
    expected = torch.autograd.grad(reference.involution2d(x, w, padding=1).sum(), (x, w))
    actual = torch.autograd.grad(involution2d(x, w, padding=1).sum(), (x, w))  # grad_output is expanded
    torch.testing.assert_close(actual, expected)


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
