"""Random calls, valid and invalid: the result of the equation, or a TypeError or ValueError that names the function."""

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from torch import Tensor

from pyinvolution.functional import involution2d, local_correlation2d, span_involution2d
from pyinvolution.ops import BORDERS, DTYPES, output_size

MOST = 2**31 - 1
FUZZ = settings(
    max_examples=250, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)

small = st.integers(1, 3)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def windows(draw: Any) -> tuple[int, ...]:
    """Size of the image, taps, stride, padding and dilation along an axis; now and then the largest there are."""
    # Wide ones for the kernels' vectors and tiles and what is left at their ends.
    size = draw(st.one_of(st.integers(0, 7), st.sampled_from([15, 16, 33, 113])))
    kernel = draw(st.sampled_from([1, 2, 3, 3, 7]))
    if draw(st.integers(0, 7)):
        return size, kernel, draw(small), draw(st.integers(0, 3)), draw(small)
    dilation = MOST - draw(small)
    padding = dilation * (kernel - 1) // 2 + draw(st.integers(0, 2))
    return size, kernel, draw(st.sampled_from([1, 2, MOST])), min(padding, MOST), dilation


def integers(seed: int, *shape: int, most: int = 1) -> Tensor:
    """Small ones, of which every dtype holds every sum here exactly."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-most, most + 1, shape)).double()


def laid_out(tensor: Tensor, how: str) -> Tensor:
    """The values (expanded: those of the first of a dimension) with other strides."""
    match how:
        case "transposed":
            return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
        case "last":
            return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
        case "sliced":
            wide = tensor.new_full([2 * size + 1 for size in tensor.shape], float("nan"))
            return wide[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor)
        case "expanded":
            return tensor[:1].expand(tensor.shape) if len(tensor) else tensor
    return tensor


@st.composite
def problems(draw: Any, function: Any) -> dict[str, Any]:
    """Arguments of a valid call."""
    n, groups, per_group = draw(st.integers(0, 2)), draw(small), draw(st.sampled_from([0, 1, 2, 3, 8, 9]))
    axes = [draw(windows()), draw(windows())]
    options: dict[str, Any] = {}
    if function is not span_involution2d and draw(st.booleans()):
        factors = [draw(small) if stride == 1 else 1 for _, _, stride, _, _ in axes]
        options["border"], options["upsample"] = draw(st.sampled_from(["zeros", "shift"])), tuple(factors)
        if options["border"] == "shift":
            assume(all(kernel * dilation <= 40 for _, kernel, _, _, dilation in axes))
            axes = [(max(size, k * d) if size else 0, k, stride, 0, d) for size, k, stride, _, d in axes]
    trailing = BORDERS.index(options.get("border", "zeros")), options.get("upsample", (1, 1))
    rows, columns = axes
    out = [output_size(*window, trailing[0], up) for window, up in zip(axes, trailing[1], strict=True)]
    # The sums of 7 x 7 taps are more than bfloat16 holds.
    assume(out[0] * out[1] <= 600 and rows[1] * columns[1] <= 21)
    geometry = dict(zip(("stride", "padding", "dilation"), zip(rows[2:], columns[2:], strict=True), strict=True))
    if draw(st.booleans()):
        geometry = {name: pair[0] if pair[0] == pair[1] else [*pair] for name, pair in geometry.items()}
    channels, kernel, seed = groups * per_group, (rows[1], columns[1]), draw(seeds)
    image = integers(seed, n, channels, rows[0], columns[0], most=2)
    tensors = {"key" if function is local_correlation2d else "input": image}
    if function is local_correlation2d:
        tensors["query"] = integers(seed + 1, n, channels, *out, most=2)
        geometry |= {"kernel_size": kernel, "groups": groups}
    elif function is span_involution2d:
        reduced, taps = draw(small), groups * kernel[0] * kernel[1]
        tensors["reduced"] = integers(seed + 1, n, reduced, *out)
        tensors["span_weight"] = integers(seed + 2, taps, reduced, *draw(st.sampled_from([(), (1, 1)])))
        tensors |= {"span_bias": integers(seed + 3, taps)} if draw(st.booleans()) else {}
        geometry["kernel_size"] = kernel
    else:
        tensors["weight"] = integers(seed + 1, n, groups, *kernel, *out, most=2)
        tensors |= {"bias": integers(seed + 2, channels)} if draw(st.booleans()) else {}
    dtype, layout = draw(st.sampled_from(DTYPES)), st.sampled_from(["", "transposed", "last", "sliced", "expanded"])
    images = [name for name in tensors if name in ("input", "weight", "reduced", "query", "key")]
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    tensors |= {name: laid_out(tensors[name], draw(layout)) for name in images}
    if n == 1 and draw(st.booleans()):
        tensors |= {name: tensors[name][0] for name in images}
    return tensors | geometry | options


# --- what may be wrong ------------------------------------------------------------------------------------------------

numbers = st.sampled_from(
    [0, -1, 1, 2, 5, MOST, MOST + 1, -MOST - 1, 2**32, 2**62, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30]
)
oddities = st.sampled_from(
    [
        *(None, "same", b"1", 1.5, float("nan"), float("inf"), True, 1j, (), [], {}, {"a": 1}, (1,), (1, 1, 1)),
        *(((1, 1), 1), (1, None), (1.0, 1), ("1", 1), (True, 1), object(), int, np.int64(1), np.float32(1)),
        *(np.ones((1, 1, 2, 2)), torch.Size([1, 1]), torch.ones(2), torch.tensor(1), torch.float32, slice(1), range(2)),
    ]
)
values = st.one_of(oddities, numbers, st.tuples(numbers, numbers), st.lists(numbers, max_size=4))
SIZES = [0, 1, 2, 3, 5, MOST, 2**31, 2**40]


@st.composite
def wrong_tensors(draw: Any, tensor: Tensor) -> Tensor:
    match draw(st.integers(0, 9)):
        case 0:
            return tensor.to(draw(st.sampled_from([*DTYPES, torch.int64, torch.bool, torch.uint8, torch.complex64])))
        case 1:
            return tensor.to(torch.float8_e4m3fn)
        case 2:
            return tensor.to_sparse()
        case 3:
            return tensor.to("meta")
        case 4:
            return tensor[None]
        case 5 if tensor.dim() and len(tensor):
            return tensor[0]
        case 6 if tensor.dim():  # another size somewhere
            axis = draw(st.integers(0, tensor.dim() - 1))
            return tensor.narrow(axis, 0, 0) if draw(st.booleans()) else torch.cat([tensor, tensor], axis)
        case 7:
            shape = draw(st.permutations(tensor.shape))
            return tensor.new_ones(shape)
        case 8:  # enormous, without memory
            shape = draw(st.lists(st.sampled_from(SIZES), max_size=7))
            assume(np.prod([float(max(size, 1)) for size in shape]) < 2**60)
            return tensor.new_ones(()).expand(shape)
    return tensor.new_ones(draw(st.lists(st.integers(0, 3), max_size=7)))


@st.composite
def spoiled(draw: Any, function: Any) -> dict[str, Any]:
    arguments = draw(problems(function))
    for name in draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2, unique=True)):
        value = arguments[name]
        is_tensor = isinstance(value, Tensor) and draw(st.integers(0, 4))
        arguments[name] = draw(wrong_tensors(value)) if is_tensor else draw(values)
    return arguments


# --- what is right ----------------------------------------------------------------------------------------------------


def oracle(arguments: dict[str, Any]) -> Tensor:
    """The equation, tap by tap, of valid arguments in float64."""
    query, w = arguments.get("query"), arguments.get("weight")
    x = arguments["input"] if query is None else arguments["key"]
    unbatched = x.dim() == 3
    border, upsample = arguments.get("border", "zeros"), torch.nn.modules.utils._pair(arguments.get("upsample", 1))
    stride, padding, dilation, kernel = (
        torch.nn.modules.utils._pair(arguments.get(name, default))
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1), ("kernel_size", 7))
    )
    if w is None and query is None:
        w = torch.einsum("kr,...rhw->...khw", arguments["span_weight"].flatten(1), arguments["reduced"])
        if arguments.get("span_bias") is not None:
            w = w + arguments["span_bias"][:, None, None]
        w = w.unflatten(-3, (w.shape[-3] // (kernel[0] * kernel[1]), *kernel))
    pixels = (w if query is None else query).shape[-2:]
    taps = kernel if w is None else w.shape[-4:-2]
    if unbatched:
        x, w, query = (t if t is None else t[None] for t in (x, w, query))

    def moved(axis: int, tap: int) -> Tensor:
        """A matrix that takes a row or column of the image to what the tap sees of it."""
        first = torch.arange(pixels[axis]) // upsample[axis] * stride[axis] - padding[axis]
        if border == "shift":  # a window that is not inside moves by a dilation
            step, last = dilation[axis], x.shape[2 + axis] - dilation[axis] * (taps[axis] - 1)
            first = first - taps[axis] // 2 * step
            for _ in range(taps[axis]):
                first = torch.where(first < 0, first + step, first)
            for _ in range(taps[axis]):
                first = torch.where(first >= last, first - step, first)
        seen = first + tap * dilation[axis]
        return (seen[:, None] == torch.arange(x.shape[2 + axis])).double()

    if query is not None:
        groups = arguments.get("groups", 1)
        scores = [
            (moved(0, i) @ x @ moved(1, j).T * query).unflatten(1, (groups, x.shape[1] // groups)).sum(2)
            for i in range(taps[0])
            for j in range(taps[1])
        ]
        result = torch.stack(scores, 2).unflatten(2, tuple(taps))
        return result[0] if unbatched else result
    y = x.new_zeros(*x.shape[:2], *w.shape[4:])
    for i in range(w.shape[2]):
        for j in range(w.shape[3]):
            kernels = w[:, :, i, j].repeat_interleave(x.shape[1] // w.shape[1], 1)
            y = y + moved(0, i) @ x @ moved(1, j).T * kernels
    if arguments.get("bias") is not None:
        y = y + arguments["bias"][:, None, None]
    return y[0] if unbatched else y


def assert_right(function: Any, arguments: dict[str, Any], result: Tensor | None = None) -> None:
    """The result and its gradients."""
    given, exact = ({k: f(v) if isinstance(v, Tensor) else v for k, v in arguments.items()} for f in LEAVES)
    dtype = given["key" if "key" in given else "input"].dtype
    if result is None:
        result = function(**given)
    expected = oracle(exact)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=0)
    assert result.dtype == dtype
    if not result.requires_grad:
        return
    result.sum().backward()
    expected.sum().backward()
    for name in (name for name, value in given.items() if isinstance(value, Tensor)):
        # Sums over pixels may be more than 16 bits hold.
        grad, want = given[name].grad.double(), exact[name].grad
        torch.testing.assert_close(grad, want, rtol=torch.finfo(dtype).eps, atol=0, msg=lambda m, n=name: f"{n}: {m}")


LEAVES = (lambda t: t.detach().requires_grad_(), lambda t: t.detach().double().requires_grad_())
FUNCTIONS = pytest.mark.parametrize(
    "function", [involution2d, local_correlation2d, span_involution2d], ids=lambda f: f.__name__
)


@FUNCTIONS
def test_valid_calls(function: Any) -> None:
    @FUZZ
    @given(problems(function))
    def check(arguments: dict[str, Any]) -> None:
        assert_right(function, arguments)

    check()


@FUNCTIONS
def test_spoiled_calls(function: Any) -> None:
    @FUZZ
    @given(spoiled(function))
    def check(arguments: dict[str, Any]) -> None:
        name = f"{function.__name__}: "
        message, result = name, None
        try:
            result = function(**arguments)
        except (TypeError, ValueError) as error:
            message = str(error)
        assert message.startswith(name)
        if result is not None and not result.is_meta:
            assert_right(function, arguments)

    check()
