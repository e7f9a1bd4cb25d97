"""The stand-in for NATTEN, against its windows written out, against natten-mps, and in files as users have them."""

import importlib
import importlib.metadata
import math
import subprocess
import sys
from functools import partial
from itertools import product

import pytest
import torch
from documents import BLOCKS
from tolerance import assert_accurate
from torch import nn

from pyinvolution import involution2d
from pyinvolution.compat import _install, natten
from pyinvolution.compat.natten import functional, v014

draw = partial(torch.randn, dtype=torch.float64)


def windows(length, kernel, dilation):
    """The positions that each position of an axis attends to.

    They are ``kernel`` neighbours in its residue class modulo the dilation: of all such runs, the one whose middle is
    the nearest.
    """
    found = []
    for i in range(length):
        members = range(i % dilation, length, dilation)
        place = i // dilation
        start = min(range(len(members) - kernel + 1), key=lambda s: abs(s + kernel // 2 - place))
        found.append([members[start + k] for k in range(kernel)])
    return found


def neighbours(lengths, kernels, dilations):
    """(positions, taps): the flat index of each tap, the last axis fastest."""
    axes = [windows(*sizes) for sizes in zip(lengths, kernels, dilations, strict=True)]
    flat = []
    for position in product(*map(range, lengths)):
        taps = product(*(axis[i] for axis, i in zip(axes, position, strict=True)))
        flat.append([sum(t * math.prod(lengths[a + 1 :]) for a, t in enumerate(tap)) for tap in taps])
    return torch.tensor(flat)


def written_out_qk(query, key, kernels, dilations, rpb=None):
    lengths = query.shape[2:-1]
    index = neighbours(lengths, kernels, dilations)
    found = torch.einsum("bhpd,bhpkd->bhpk", query.flatten(2, -2), key.flatten(2, -2)[:, :, index])
    if rpb is not None:
        axes = [windows(*sizes) for sizes in zip(lengths, kernels, dilations, strict=True)]
        rows = [
            [
                [(t - i) // d + k - 1 for i, d, k, t in zip(position, dilations, kernels, tap, strict=True)]
                for tap in product(*(axis[i] for axis, i in zip(axes, position, strict=True)))
            ]
            for position in product(*map(range, lengths))
        ]
        found = found + rpb[(slice(None), *torch.tensor(rows).unbind(-1))]
    return found.unflatten(2, lengths)


def written_out_av(attn, value, kernels, dilations):
    index = neighbours(value.shape[2:-1], kernels, dilations)
    found = torch.einsum("bhpk,bhpkd->bhpd", attn.flatten(2, -2), value.flatten(2, -2)[:, :, index])
    return found.unflatten(2, value.shape[2:-1])


# Lengths, kernel sizes and dilations of each axis: dilations 1 to 8, K d = L exactly, even K, lengths that are no
# multiple of the dilation, axes that differ.
WINDOWS = {
    "1d": ((11,), (3,), (1,)),
    "1d, dilated": ((17,), (5,), (3,)),
    "1d, exact": ((14,), (7,), (2,)),
    "1d, even": ((9,), (4,), (2,)),
    "2d": ((7, 9), (3, 5), (1, 1)),
    "2d, dilated": ((11, 13), (3, 3), (3, 4)),
    "2d, dilations 5 and 8": ((16, 25), (3, 3), (5, 8)),
    "2d, exact": ((6, 21), (3, 3), (2, 7)),
    "2d, even": ((8, 7), (4, 2), (2, 3)),
    "2d, one tap": ((5, 6), (1, 3), (4, 2)),
    "3d": ((4, 5, 6), (3, 3, 5), (1, 1, 1)),
    "3d, dilated": ((7, 4, 6), (3, 2, 3), (2, 1, 2)),
}


@pytest.fixture(params=WINDOWS.values(), ids=WINDOWS)
def window(request):
    torch.manual_seed(0)
    return request.param


def functions(axes):
    return getattr(functional, f"na{axes}d_qk"), getattr(functional, f"na{axes}d_av")


def gradients_agree(actual, expected, tensors):
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, tensors, upstream), torch.autograd.grad(expected, tensors, upstream)
    )


def test_qk(window):
    lengths, kernels, dilations = window
    query, key = (draw(2, 3, *lengths, 4).requires_grad_() for _ in range(2))
    rpb = draw(3, *(2 * k - 1 for k in kernels)).requires_grad_()
    qk, _ = functions(len(lengths))
    for tensors in ((query, key), (query, key, rpb)):
        actual = qk(*tensors[:2], kernels, dilations, rpb=rpb if len(tensors) == 3 else None)
        expected = written_out_qk(*tensors[:2], kernels, dilations, *tensors[2:])
        torch.testing.assert_close(actual, expected)
        gradients_agree(actual, expected, tensors)


def test_av(window):
    lengths, kernels, dilations = window
    attn = draw(2, 3, *lengths, math.prod(kernels)).requires_grad_()
    value = draw(2, 3, *lengths, 4).requires_grad_()
    _, av = functions(len(lengths))
    actual, expected = av(attn, value, kernels, dilations), written_out_av(attn, value, kernels, dilations)
    torch.testing.assert_close(actual, expected)
    gradients_agree(actual, expected, (attn, value))


def test_a_border_of_zeros_is_another_operator():
    torch.manual_seed(0)
    attn, value = draw(1, 2, 8, 9, 25).softmax(-1), draw(1, 2, 8, 9, 4)
    expected = written_out_av(attn, value, (5, 5), (1, 1))
    torch.testing.assert_close(functional.na2d_av(attn, value, 5), expected)
    weight = attn.unflatten(-1, (5, 5)).permute(0, 1, 4, 5, 2, 3)
    zeros = involution2d(value.permute(0, 1, 4, 2, 3).flatten(1, 2), weight, padding=2)
    apart = (zeros.unflatten(1, (2, 4)).permute(0, 1, 3, 4, 2) - expected).abs()
    assert apart[:, :, 2:-2, 2:-2].max() < 1e-12
    assert apart.max() > 0.1


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_both_with_a_softmax_between_them(axes):
    torch.manual_seed(0)
    lengths, kernels, dilations = (7, 6, 5)[:axes], (3, 3, 3)[:axes], (2, 1, 1)[:axes]
    query, key = (draw(2, *lengths, 3, 4) for _ in range(2))
    value = draw(2, *lengths, 3, 5)
    first = [t.movedim(-2, 1) for t in (query, key, value)]
    attend = getattr(functional, f"na{axes}d")
    for scale, factor in ((None, 0.5), (1.5, 1.5)):
        attn = (factor * written_out_qk(*first[:2], kernels, dilations)).softmax(-1)
        expected = written_out_av(attn, first[2], kernels, dilations).movedim(1, -2)
        torch.testing.assert_close(attend(query, key, value, kernels, dilation=dilations, scale=scale), expected)
        # By the names of 0.20.
        actual = attend(query, key, value, kernels, stride=1, dilation=dilations, scale=scale, backend="cutlass-fna")
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(attend(query, key, value, kernels, 1, 1), attend(query, key, value, kernels))
    rpb = draw(3, *(2 * k - 1 for k in kernels))
    attn = written_out_qk(0.5 * first[0], first[1], kernels, dilations, rpb).softmax(-1)
    expected = written_out_av(attn, first[2], kernels, dilations).movedim(1, -2)
    torch.testing.assert_close(attend(query, key, value, kernels, dilation=dilations, rpb=rpb), expected)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_additional_keys_and_values(axes):
    torch.manual_seed(0)
    lengths, kernels, ones = (7, 6, 5)[:axes], (3, 5, 3)[:axes], (1, 1, 1)[:axes]
    query, key, value = (draw(2, 3, *lengths, 4) for _ in range(3))
    keys, values = draw(2, 3, 6, 4), draw(2, 3, 6, 4)
    qk, av = functions(axes)
    more = torch.einsum("bhpd,bhtd->bhpt", query.flatten(2, -2), keys).unflatten(2, lengths)
    expected = torch.cat([written_out_qk(query, key, kernels, ones), more], -1)
    logits = qk(query, key, kernels, 1, keys)
    torch.testing.assert_close(logits, expected)
    taps = math.prod(kernels)
    more = torch.einsum("bhpt,bhtd->bhpd", expected[..., taps:].flatten(2, -2), values).unflatten(2, lengths)
    torch.testing.assert_close(
        av(logits, value, kernels, 1, values), written_out_av(expected[..., :taps], value, kernels, ones) + more
    )
    # The operators of 0.20 have their heads and tokens the other way round.
    last = [t.movedim(1, -2) for t in (query, key, value)]
    attn = torch.softmax(qk(query, key, kernels, 1, keys), -1)
    found = getattr(functional, f"na{axes}d")(
        *last, kernels, scale=1.0, additional_keys=keys.transpose(1, 2), additional_values=values.transpose(1, 2)
    )
    torch.testing.assert_close(found, av(attn, value, kernels, 1, values).movedim(1, -2))


def test_second_derivatives():
    torch.manual_seed(0)
    query, key, value = (draw(1, 2, 4, 5, 2).requires_grad_() for _ in range(3))
    rpb = draw(2, 5, 5).requires_grad_()

    def attend(query, key, value, rpb):
        logits = functional.na2d_qk(query, key, 3, 1, rpb=rpb)
        return functional.na2d_av(logits.softmax(-1), value, 3, 1)

    assert torch.autograd.gradgradcheck(attend, (query, key, value, rpb))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["one projection", "heads first"])
def test_dtypes(dtype, layout):
    torch.manual_seed(0)
    kernels, dilations = (5, 3), (1, 2)
    if layout == "one projection":
        qkv = torch.randn(2, 7, 8, 3, 2, 16, dtype=dtype)
        query, key, value = qkv.permute(3, 0, 4, 1, 2, 5)
    else:
        query, key, value = (torch.randn(2, 2, 7, 8, 16, dtype=dtype) for _ in range(3))
    attn = torch.randn(2, 2, 7, 8, 15).softmax(-1).to(dtype)
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    for ours, theirs, tensors in (
        (functional.na2d_qk, written_out_qk, (query, key)),
        (functional.na2d_av, written_out_av, (attn, value)),
    ):
        oracle, reference = (
            theirs(*(t.to(kind) for t in tensors), kernels, dilations) for kind in (torch.double, wide)
        )
        assert_accurate(ours(*tensors, kernels, dilations), oracle, reference.to(dtype), ours.__name__)


def test_the_same_bits_with_any_number_of_threads():
    """Of each operator; the gradient of PyTorch's softmax between them does not have them."""
    torch.manual_seed(0)
    image = (1, 4, 15, 14, 16)
    tensors = [torch.randn(shape).requires_grad_() for shape in (image, image, (4, 9, 9), (*image[:-1], 25), image)]
    upstream = torch.randn(*image[:-1], 25), torch.randn(image)

    def compute():
        query, key, rpb, attn, value = tensors
        outputs = functional.na2d_qk(query, key, 5, 2, rpb=rpb), functional.na2d_av(attn, value, 5, 2)
        return *outputs, *torch.autograd.grad(outputs, tensors, upstream)

    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            found.append(compute())
    finally:
        torch.set_num_threads(threads)
    for one, two, again in zip(*found, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, again)


def test_no_copies_of_one_projection():
    query = torch.randn(2, 7, 8, 3, 2, 16).permute(3, 0, 4, 1, 2, 5)[1]
    assert functional._as_image(query).data_ptr() == query.data_ptr()
    image = torch.randn(2, 2 * 16, 7, 8)
    assert functional._as_image(image.unflatten(1, (2, 16)).permute(0, 1, 3, 4, 2)).data_ptr() == image.data_ptr()


def test_it_compiles():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 6, 7, 4) for _ in range(3))
    rpb = torch.randn(2, 5, 5)

    def attend(query, key, value, rpb):
        return functional.na2d_av(functional.natten2dqkrpb(query, key, rpb, 3, 2).softmax(-1), value, 3, 2)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key, value, rpb), attend(query, key, value, rpb))


def test_it_is_followed_by_fx():
    torch.manual_seed(0)
    for layer, x in (
        (natten.NeighborhoodAttention1D(8, 2, 3, rel_pos_bias=True), torch.randn(2, 7, 8)),
        (natten.NeighborhoodAttention2D(8, 2, (3, 5), (2, 1)), torch.randn(2, 7, 6, 8)),
        (v014.NeighborhoodAttention2D(8, 2, 3, 2), torch.randn(2, 4, 7, 8)),
    ):
        torch.testing.assert_close(torch.fx.symbolic_trace(layer)(x), layer(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_on_a_gpu(axes):
    torch.manual_seed(0)
    lengths, kernels, dilations = (9, 8, 7)[:axes], (3, 3, 5)[:axes], (3, 2, 1)[:axes]
    layer = getattr(natten, f"NeighborhoodAttention{axes}D")(16, 2, kernels, dilations, rel_pos_bias=True).double()
    x = draw(2, *lengths, 16)
    expected = their_layer(layer.state_dict(), x, 2, kernels, dilations)
    wanted = torch.autograd.grad(layer(x).square().sum(), layer.parameters())
    layer.cuda()
    actual = layer(x.cuda())
    torch.testing.assert_close(actual.cpu(), expected)
    found = torch.autograd.grad(actual.square().sum(), layer.parameters())
    torch.testing.assert_close([gradient.cpu() for gradient in found], [*wanted])


# --- every version's names --------------------------------------------------------------------------------------------


def test_names_in_one_dimension():
    torch.manual_seed(0)
    query, key, value = (draw(2, 3, 11, 4) for _ in range(3))
    rpb = draw(3, 9)
    logits, biased = (written_out_qk(query, key, (5,), (2,), *more) for more in ((), (rpb,)))
    attn = logits.softmax(-1)
    output = written_out_av(attn, value, (5,), (2,))
    f = functional
    for found in (
        f.natten1dqkrpb(query, key, rpb, 2),  # 0.14.1
        f.natten1dqkrpb(query, key, rpb, dilation=2),
        f.natten1dqkrpb(query, key, rpb, 5, 2),  # 0.14.2
        f.natten1dqkrpb(query, key, rpb, kernel_size=5, dilation=2),
        f.natten1dqkrpb(query, key, rpb, 5, dilation=2),
        f.na1d_qk_with_bias(query, key, rpb, 5, 2),  # 0.15
        f.na1d_qk(query, key, 5, 2, rpb=rpb),  # 0.17
        f.na1d_qk(query, key, (5,), [2], None, False, rpb),
    ):
        torch.testing.assert_close(found, biased)
    for found in (
        f.natten1dqk(query, key, 5, 2),
        f.natten1dqkrpb(query, key, None, 5, 2),
        f.na1d_qk_with_bias(query, key, None, 5, 2),
        f.na1d_qk(query, key, 5, 2),
    ):
        torch.testing.assert_close(found, logits)
    for found in (
        f.natten1dav(attn, value, 2),
        f.natten1dav(attn, value, dilation=2),
        f.natten1dav(attn, value, 5, 2),
        f.natten1dav(attn, value, kernel_size=5, dilation=2),
        f.na1d_av(attn, value, 5, 2),
        f.na1d_av(attn, value, kernel_size=5, dilation=2, is_causal=None),
    ):
        torch.testing.assert_close(found, output)


def test_names_in_two_dimensions():
    torch.manual_seed(0)
    query, key, value = (draw(2, 3, 7, 8, 4) for _ in range(3))
    rpb = draw(3, 5, 5)
    logits, biased = (written_out_qk(query, key, (3, 3), (2, 2), *more) for more in ((), (rpb,)))
    attn = logits.softmax(-1)
    output = written_out_av(attn, value, (3, 3), (2, 2))
    f = functional
    for found in (
        f.natten2dqkrpb(query, key, rpb, 2),
        f.natten2dqkrpb(query, key, rpb, 3, 2),
        f.na2d_qk_with_bias(query, key, rpb, 3, 2),
        f.na2d_qk(query, key, 3, 2, None, False, rpb),
    ):
        torch.testing.assert_close(found, biased)
    for found in (
        f.natten2dqk(query, key, 3, 2),
        f.natten2dqkrpb(query, key, None, 3, 2),
        f.na2d_qk(query, key, (3, 3), (2, 2)),
    ):
        torch.testing.assert_close(found, logits)
    for found in (f.natten2dav(attn, value, 2), f.natten2dav(attn, value, 3, 2), f.na2d_av(attn, value, 3, 2)):
        torch.testing.assert_close(found, output)
    keys, values = draw(2, 3, 4, 4), draw(2, 3, 4, 4)
    more = f.na2d_qk(query, key, 3, 2, keys)
    torch.testing.assert_close(f.natten2dqk(query, key, 3, 2, keys), more)
    torch.testing.assert_close(f.natten2dav(more, value, 3, 2, values), f.na2d_av(more, value, 3, 2, values))


def test_names_in_three_dimensions():
    torch.manual_seed(0)
    query, key, value = (draw(1, 2, 7, 5, 6, 3) for _ in range(3))
    kernels, dilations = (3, 5, 5), (2, 1, 1)
    rpb = draw(2, 5, 9, 9)
    logits, biased = (written_out_qk(query, key, kernels, dilations, *more) for more in ((), (rpb,)))
    attn = logits.softmax(-1)
    output = written_out_av(attn, value, kernels, dilations)
    f = functional
    for found in (
        f.natten3dqkrpb(query, key, rpb, 3, 5, 2, 1),
        f.na3d_qk_with_bias(query, key, rpb, 3, 5, 2, 1),
        f.na3d_qk(query, key, kernels, dilations, rpb=rpb),
    ):
        torch.testing.assert_close(found, biased)
    for found in (f.natten3dqk(query, key, 3, 5, 2, 1), f.na3d_qk(query, key, 3, 5, 2, 1)):  # the order of 0.15
        torch.testing.assert_close(found, logits)
    for found in (
        f.natten3dav(attn, value, 3, 5, 2, 1),
        f.na3d_av(attn, value, 3, 5, 2, 1),
        f.na3d_av(attn, value, kernels, dilations),
    ):
        torch.testing.assert_close(found, output)


Q, A = torch.randn(1, 2, 6, 7, 4), torch.randn(1, 2, 6, 7, 9)
LAST = torch.randn(1, 6, 7, 2, 4)
REFUSED = {
    "causal": (lambda: functional.na2d_qk(Q, Q, 3, is_causal=True), NotImplementedError, "is_causal is True"),
    "causal on one axis": (
        lambda: functional.na2d_av(A, Q, 3, is_causal=(False, True)),
        NotImplementedError,
        r"is_causal is \(False, True\), expected False",
    ),
    "causal, both": (
        lambda: functional.na2d(LAST, LAST, LAST, 3, is_causal=True),
        NotImplementedError,
        "na2d: is_causal",
    ),
    "causal, wrong type": (lambda: functional.na2d_qk(Q, Q, 3, 1, None, 2), TypeError, "is_causal is 2"),
    "stride": (lambda: functional.na2d(LAST, LAST, LAST, 3, stride=2), NotImplementedError, "stride is 2, expected 1"),
    "sums": (lambda: functional.na2d(LAST, LAST, LAST, 3, return_lse=True), NotImplementedError, "return_lse is True"),
    "ambiguous": (lambda: functional.na2d(LAST, LAST, LAST, 3, 2), TypeError, "follows kernel_size, expected names"),
    "unknown": (lambda: functional.na2d(LAST, LAST, LAST, 3, dilations=2), TypeError, "dilations is not an argument"),
    "keys without values": (
        lambda: functional.na2d(LAST, LAST, LAST, 3, additional_keys=torch.randn(1, 3, 2, 4)),
        ValueError,
        "additional_values is None, expected both",
    ),
    "too large": (
        lambda: functional.na2d_qk(Q, Q, 3, (2, 3)),
        ValueError,
        r"na2d_qk: kernel_size times dilation is 3 \* 3 on axis 1, expected at most its length 7",
    ),
    "rank": (
        lambda: functional.na2d_qk(Q[0], Q[0], 3),
        ValueError,
        r"query has shape \(2, 6, 7, 4\), expected \(B, heads, H, W, D\)",
    ),
    "heads last": (
        lambda: functional.na2d_av(Q[..., :1], LAST, 1),
        ValueError,
        r"attn has .* expected \(1, 6, 7, 2, 1\)",
    ),
    "key": (lambda: functional.na2d_qk(Q, Q[..., :3], 3), ValueError, r"key has shape .* expected \(1, 2, 6, 7, 4\)"),
    "attn": (lambda: functional.na2d_av(A, Q, 5), ValueError, r"attn has shape .* expected \(1, 2, 6, 7, 25\)"),
    "dtypes": (
        lambda: functional.na2d_av(A, Q.double(), 3),
        TypeError,
        "value has dtype torch.float64, expected attn's",
    ),
    "int": (lambda: functional.na2d_qk(Q.int(), Q.int(), 3), TypeError, "query has dtype torch.int32"),
    "no tensor": (lambda: functional.na2d_qk(Q, None, 3), TypeError, "key is a NoneType, expected a Tensor"),
    "nested": (
        lambda: functional.na2d_qk(torch.nested.nested_tensor([Q[0]], layout=torch.jagged), Q, 3),
        ValueError,
        "query is a nested tensor",
    ),
    "kernel": (lambda: functional.na2d_qk(Q, Q, 3.0), TypeError, "kernel_size is 3.0, expected an int or a pair"),
    "kernels": (lambda: functional.na2d_qk(Q, Q, (3, 3, 3)), ValueError, r"kernel_size is \(3, 3, 3\)"),
    "no kernel": (lambda: functional.na2d_qk(Q, Q, 0), ValueError, "kernel_size is 0, expected at least 1"),
    "dilation": (lambda: functional.na2d_qk(Q, Q, 3, 0), ValueError, "dilation is 0, expected at least 1"),
    "biases": (
        lambda: functional.natten2dqkrpb(Q, Q, torch.randn(2, 3, 3), 3, 1),
        ValueError,
        r"rpb has shape \(2, 3, 3\), expected \(2, 5, 5\)",
    ),
    "biases by the name of 0.15": (
        lambda: functional.na2d_qk_with_bias(Q, Q, 1, 3, 1),
        TypeError,
        "bias is a int, expected a Tensor or None",
    ),
    "nothing to infer from": (lambda: functional.natten2dqkrpb(Q, Q, None, 2), TypeError, "kernel_size is missing"),
    "not a square": (lambda: functional.natten2dav(A[..., :8], Q, 1), TypeError, "kernel_size is missing, and attn"),
    "no dilation": (lambda: functional.natten2dav(A, Q, kernel_size=3), TypeError, "dilation is missing"),
    "too many": (lambda: functional.natten2dqkrpb(Q, Q, None, 3, 1, 1), TypeError, "follow the tensors"),
    "additional keys": (
        lambda: functional.na2d_qk(Q, Q, 3, 1, torch.randn(1, 5, 2, 4)),
        ValueError,
        r"additional_keys has shape \(1, 5, 2, 4\), expected \(1, 2, 2, 4\)",
    ),
    "module, heads": (
        lambda: natten.NeighborhoodAttention2D(30, 4, 3),
        ValueError,
        "dim is 30, expected a multiple of num_heads 4",
    ),
    "module, causal": (
        lambda: natten.NeighborhoodAttention1D(8, 2, 3, is_causal=True),
        NotImplementedError,
        "NeighborhoodAttention1D: is_causal",
    ),
    "module, stride": (lambda: natten.NeighborhoodAttention2D(8, 2, 3, stride=2), NotImplementedError, "stride is 2"),
    "module, input": (
        lambda: natten.NeighborhoodAttention2D(8, 2, 3)(torch.randn(1, 8, 5, 5)),
        ValueError,
        r"x has shape \(1, 8, 5, 5\), expected \(B, H, W, 8\)",
    ),
    "module, small input": (
        lambda: natten.NeighborhoodAttention2D(8, 2, 3, dilation=2)(torch.randn(1, 8, 5, 8)),
        ValueError,
        r"kernel_size times dilation is 3 \* 2 on axis 1",
    ),
}


@pytest.mark.parametrize(("call", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_refusals(call, error, text):
    with pytest.raises(error, match=text):
        call()


# --- modules ----------------------------------------------------------------------------------------------------------


def their_layer(entries, x, heads, kernels, dilations):
    """The forward pass of NATTEN's modules, from a state dict under their names."""
    batch, *lengths, dim = x.shape
    qkv = nn.functional.linear(x, entries["qkv.weight"], entries.get("qkv.bias"))
    # The last axis holds (3, heads, channels).
    query, key, value = qkv.reshape(batch, *lengths, 3, heads, dim // heads).movedim(-3, 0).movedim(-2, 2)
    logits = written_out_qk(query * (dim // heads) ** -0.5, key, kernels, dilations, entries.get("rpb"))
    output = written_out_av(logits.softmax(-1), value, kernels, dilations).movedim(1, -2).reshape(batch, *lengths, dim)
    return nn.functional.linear(output, entries["proj.weight"], entries["proj.bias"])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_modules(axes, bias):
    torch.manual_seed(0)
    lengths, kernels, dilations = (7, 8, 6)[:axes], (3, 3, 5)[:axes], (2, 1, 1)[:axes]
    make = getattr(natten, f"NeighborhoodAttention{axes}D")
    layer = make(12, 3, kernels, dilations, rel_pos_bias=bias, qkv_bias=bias).double()
    names = {"qkv.weight", "proj.weight", "proj.bias"} | ({"qkv.bias", "rpb"} if bias else set())
    assert set(layer.state_dict()) == names
    entries = {name: draw(value.shape) for name, value in layer.state_dict().items()}
    layer.load_state_dict(entries, strict=True)
    x = draw(2, *lengths, 12)
    torch.testing.assert_close(layer(x), their_layer(entries, x, 3, kernels, dilations))


def test_modules_of_the_older_versions():
    """They have biases by default, and pad what is smaller than the window with zeros, which are projected, too."""
    torch.manual_seed(0)
    layer = v014.NeighborhoodAttention2D(12, num_heads=3, kernel_size=3, dilation=2).double()
    assert layer.rpb.shape == (3, 5, 5)
    assert v014.NeighborhoodAttention1D(12, 3, 3, bias=False).rpb is None
    assert natten.NeighborhoodAttention2D(12, 3, 3).rpb is None
    entries = {name: draw(value.shape) for name, value in layer.state_dict().items()}
    layer.load_state_dict(entries)
    for lengths in ((7, 8), (4, 9), (5, 3)):
        x = draw(2, *lengths, 12)
        padded = nn.functional.pad(x, (0, 0, 0, max(6 - lengths[1], 0), 0, max(6 - lengths[0], 0)))
        expected = their_layer(entries, padded, 3, (3, 3), (2, 2))[:, : lengths[0], : lengths[1]]
        torch.testing.assert_close(layer(x), expected)


def test_volumes_of_the_older_versions():
    torch.manual_seed(0)
    layer = v014.NeighborhoodAttention3D(12, 3, 3, kernel_size_d=2, dilation=2, dilation_d=1).double()
    assert layer.rpb.shape == (3, 3, 5, 5)
    entries = {name: draw(value.shape) for name, value in layer.state_dict().items()}
    layer.load_state_dict(entries)
    x = draw(1, 3, 6, 7, 12)
    torch.testing.assert_close(layer(x), their_layer(entries, x, 3, (2, 3, 3), (1, 2, 2)))
    assert v014.NeighborhoodAttention3D(12, 3, 3, dilation=2).dilation == (2, 2, 2)


def test_autocast():
    torch.manual_seed(0)
    layer = natten.NeighborhoodAttention2D(32, 2, 3, rel_pos_bias=True)
    x = torch.randn(1, 6, 7, 32)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
    assert half.dtype == torch.bfloat16
    assert (half - layer(x)).abs().max() < 0.02 * layer(x).abs().max()


def test_dropout_of_attention_weights():
    layer = natten.NeighborhoodAttention2D(8, 2, 3, attn_drop=1.0)
    x = torch.randn(1, 5, 5, 8)
    torch.testing.assert_close(layer(x), layer.proj.bias.expand(1, 5, 5, 8))
    assert not torch.equal(layer.eval()(x)[0, 0, 0], layer.proj.bias)


# --- the other side ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_natten_mps(axes):
    pytest.importorskip("natten_mps")
    from natten_mps import functional as theirs
    from natten_mps import nn as their_modules

    torch.manual_seed(0)
    lengths, kernels, dilations = (11, 8, 7)[:axes], (3, 3, 3)[:axes], (3, 2, 1)[:axes]
    query, key, value = (draw(2, 3, *lengths, 4).requires_grad_() for _ in range(3))
    last = [t.movedim(1, -2) for t in (query, key, value)]
    qk, av = functions(axes)
    logits, expected = (
        qk(query, key, kernels, dilations),
        getattr(theirs, f"na{axes}d_qk")(*last[:2], kernels, dilations),
    )
    torch.testing.assert_close(logits, expected.movedim(-2, 1))
    attn = logits.softmax(-1)
    output = av(attn, value, kernels, dilations).movedim(1, -2)
    expected = getattr(theirs, f"na{axes}d_av")(expected.softmax(-1), last[2], kernels, dilations)
    torch.testing.assert_close(output, expected)
    gradients_agree(output, expected, (query, key, value))

    name = f"NeighborhoodAttention{axes}D"
    layer = getattr(natten, name)(12, 3, kernels, dilations).double()
    other = getattr(their_modules, name)(12, 3, kernels, dilation=dilations).double()
    other.load_state_dict(layer.state_dict(), strict=True)
    x = draw(2, *lengths, 12)
    torch.testing.assert_close(layer(x), other(x))


def test_biases_of_natten_mps():
    theirs = pytest.importorskip("natten_mps.compat.v014")
    torch.manual_seed(0)
    query, key, rpb = draw(2, 3, 9, 8, 4), draw(2, 3, 9, 8, 4), draw(3, 5, 5)
    torch.testing.assert_close(
        functional.natten2dqkrpb(query, key, rpb, 3, 2), theirs.natten2dqkrpb(query, key, rpb, 3, 2)
    )


# A block as in the repositories that use NATTEN 0.14 (modules) and 0.17 (functions); nothing is changed but the import.
OLD_FILE = """
import torch.nn as nn
from natten import NeighborhoodAttention2D as NeighborhoodAttention


class NATLayer(nn.Module):
    def __init__(self, dim, num_heads, kernel_size=7, dilation=None,
                 qkv_bias=True, qk_scale=None, drop=0., attn_drop=0.):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = NeighborhoodAttention(
            dim, kernel_size=kernel_size, dilation=dilation, num_heads=num_heads,
            qkv_bias=qkv_bias, qk_scale=qk_scale, attn_drop=attn_drop, proj_drop=drop)

    def forward(self, x):
        return x + self.attn(self.norm1(x))
"""
NEW_FILE = """
import torch.nn as nn
from natten.functional import na2d_av, na2d_qk


class Block(nn.Module):
    def __init__(self, dim, num_heads, kernel_size, dilation):
        super().__init__()
        self.num_heads, self.kernel_size, self.dilation = num_heads, kernel_size, dilation
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x):
        B, H, W, C = x.shape
        qkv = self.qkv(x).reshape(B, H, W, 3, self.num_heads, C // self.num_heads).permute(3, 0, 4, 1, 2, 5)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = na2d_qk(q, k, kernel_size=self.kernel_size, dilation=self.dilation)
        attn = (attn * q.shape[-1] ** -0.5).softmax(dim=-1)
        x = na2d_av(attn, v, kernel_size=self.kernel_size, dilation=self.dilation)
        return x.permute(0, 2, 3, 1, 4).reshape(B, H, W, C)
"""


def run_file(text):
    names = {"__name__": "theirs"}
    exec(compile(text, "theirs.py", "exec"), names)
    return names


def test_a_file_with_one_import_changed():
    torch.manual_seed(0)
    block = run_file(OLD_FILE.replace("from natten import", "from pyinvolution.compat.natten.v014 import"))["NATLayer"]
    layer = block(12, 3, kernel_size=3, dilation=2).double()
    entries = {name: draw(value.shape) for name, value in layer.state_dict().items()}
    layer.load_state_dict(entries)
    x = draw(2, 7, 8, 12)
    attention = {name.removeprefix("attn."): value for name, value in entries.items() if name.startswith("attn.")}
    assert set(attention) == {"qkv.weight", "qkv.bias", "rpb", "proj.weight", "proj.bias"}
    torch.testing.assert_close(layer(x), x + their_layer(attention, layer.norm1(x), 3, (3, 3), (2, 2)))

    block = run_file(NEW_FILE.replace("from natten.", "from pyinvolution.compat.natten."))["Block"](
        12, 3, 3, 2
    ).double()
    entries = block.state_dict() | {"proj.weight": torch.eye(12).double(), "proj.bias": torch.zeros(12).double()}
    torch.testing.assert_close(block(x), their_layer(entries, x, 3, (3, 3), (2, 2)))


@pytest.fixture
def imports(monkeypatch):
    """What a test installs is gone after it."""
    for name in [name for name in sys.modules if name.split(".")[0] == "natten"]:
        monkeypatch.delitem(sys.modules, name)
    before = set(sys.modules)
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if finder is not _install._finder])
    monkeypatch.setattr(_install._finder, "versions", {})
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "natten":
            del sys.modules[name]


@pytest.mark.parametrize(("version", "has_bias"), [("0.14", True), ("0.15", True), ("0.17", False)])
def test_install(imports, version, has_bias):
    natten.install(version)
    natten.install(version)
    layer = run_file(OLD_FILE)["NATLayer"](12, 3, kernel_size=3)
    assert (layer.attn.rpb is not None) == has_bias
    assert run_file(NEW_FILE)["na2d_av"] is functional.na2d_av
    found = importlib.import_module("natten")
    assert found.functional is functional
    assert found.__version__.startswith("0.1")
    assert importlib.metadata.version("natten").startswith(version)
    assert importlib.util.find_spec("natten") is not None
    assert importlib.import_module("natten.natten2d").NeighborhoodAttention2D is found.NeighborhoodAttention2D
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("no-such-package")


def test_install_refuses(imports, monkeypatch):
    with pytest.raises(ValueError, match=r"version is '0.20', expected one of 0.14, 0.15, 0.17"):
        natten.install("0.20")
    monkeypatch.setitem(sys.modules, "natten", type(sys)("natten"))
    with pytest.raises(ImportError, match=r"natten is already imported .* expected install\(\) before"):
        natten.install()
    assert "natten.functional" not in sys.modules


def test_switches_warn():
    with pytest.warns(UserWarning, match="use_fused_na has no effect"):
        natten.use_fused_na(True)
    assert not natten.has_fused_na()


def test_dinat(tmp_path):
    """The recipe of the documentation, in a process of its own, which imports transformers after it is installed."""
    pytest.importorskip("transformers")
    (recipe,) = [block for block in BLOCKS if "DinatModel" in block.code]
    check = """
import torch
from pyinvolution.compat.natten import functional
seen = []
original = functional.natten2dqkrpb
modeling_dinat.natten2dqkrpb = lambda query, *rest: (seen.append(tuple(query.shape)), original(query, *rest))[1]
model(torch.randn(1, 3, 96, 64))
print(seen)
"""
    path = tmp_path / "dinat.py"
    path.write_text(recipe.code + check)
    result = subprocess.run([sys.executable, path], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    # Batch, heads, height, width, channels of a head at the four levels.
    assert result.stdout.splitlines()[-1] == str(
        [(1, 2, 24, 16, 16), (1, 4, 12, 8, 16), (1, 8, 6, 4, 16), (1, 16, 3, 3, 16)]
    )
