"""Reference involution in plain PyTorch: the oracle of every test and the naive side of every benchmark.

Involution (Li et al., CVPR 2021, arXiv 2103.06255, eq. 4) with a kernel at each position of an output::

    Y[n, c, p] = sum over taps k of  W[n, g(c), k, p] * X[n, c, first(p) + d * k],    g(c) = c // (C / G)

where X is zero outside its borders, d is the dilation and, with stride s and padding P, first(p) = s * p - P; other
borders and an upsampling are explained at `first_taps`. It is built from ``torch.nn.functional.unfold``, or from
indices where that cannot read such windows, and ``torch.einsum``, so it is differentiable to any order, runs on every
device and dtype, and materialises all Kh * Kw shifted copies of X.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, unfold
from torch.nn.modules.utils import _pair

BORDERS = ("zeros", "shift")
"""What a window does that reaches beyond the input: it reads zeros, or is moved inside by multiples of the dilation."""


def first_taps(
    size: int,
    kernel: int,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    upsample: int = 1,
    *,
    border: int = 0,
    device: torch.device | None = None,
) -> Tensor:
    """The input position of tap 0 for each output along one axis.

    An output p belongs to position i = floor(stride * p / upsample). With zeros its window begins at i - padding. One
    that is shifted is centred at i and moved inside, within the positions that are a multiple of the dilation apart
    (the rule of neighbourhood attention, Hassani et al., CVPR 2023, and of its dilated form, arXiv 2209.15001).

    Args:
        border: the index in `BORDERS`.
        device: of the result.

    Returns:
        (outputs,), int64; with zeros outside [0, size) where a window begins or ends beyond the input.
    """
    if border == 0:
        windows = torch.sym_max((size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1, 0)
    else:
        windows = (size + stride - 1) // stride
    i = torch.arange(windows * upsample, device=device) * stride // upsample
    if border == 0:
        return i - padding
    residue, step = i % dilation, i // dilation
    last = (size - residue + dilation - 1) // dilation - kernel
    return residue + dilation * torch.minimum((step - kernel // 2).clamp(min=0), last)


def windows(
    input: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    *,
    border: str = "zeros",
    upsample: int | tuple[int, int] = 1,
) -> Tensor:
    """What each window reads: (N, C, H, W) -> (N, C, Kh, Kw, Ho, Wo)."""
    kernel, steps, zeros, gaps, factors = map(_pair, (kernel_size, stride, padding, dilation, upsample))
    mode = BORDERS.index(border)
    starts = [
        first_taps(*values, border=mode, device=input.device)
        for values in zip(input.shape[2:], kernel, steps, zeros, gaps, factors, strict=True)
    ]
    if mode == 0 and factors == (1, 1) and all(map(len, starts)):
        columns = unfold(input, kernel, gaps, zeros, steps)
        return columns.view(*input.shape[:2], *kernel, *map(len, starts))
    rows, columns = (
        first + z + d * torch.arange(k, device=input.device)[:, None]
        for first, z, d, k in zip(starts, zeros, gaps, kernel, strict=True)
    )
    padded = pad(input, (zeros[1], zeros[1], zeros[0], zeros[0]))
    return padded[:, :, rows[:, None, :, None], columns[None, :, None, :]]


def involution2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    *,
    border: str = "zeros",
    upsample: int | tuple[int, int] = 1,
) -> Tensor:
    """Involution by unfolding.

    Args:
        input: (N, C, H, W), floating point.
        weight: (N, G, Kh, Kw, Ho, Wo), the kernel of every output pixel and group; G divides C.
        bias: (C,) or None, added to every pixel.
        stride, padding, dilation, upsample: int or (vertical, horizontal).
        border: one of `BORDERS`.

    Returns:
        (N, C, Ho, Wo), contiguous.
    """
    n, c = input.shape[:2]
    groups, kh, kw, ho, wo = weight.shape[1:]
    columns = windows(input, (kh, kw), stride, padding, dilation, border=border, upsample=upsample)
    columns = columns.unflatten(1, (groups, c // groups))
    output = torch.einsum("ngcijhw,ngijhw->ngchw", columns, weight).reshape(n, c, ho, wo)
    return output if bias is None else output + bias.view(-1, 1, 1)


def local_correlation2d(
    query: Tensor,
    key: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    border: str = "zeros",
    upsample: int | tuple[int, int] = 1,
) -> Tensor:
    """Scores of each pixel with its window, by unfolding.

    Args:
        query: (N, C, Ho, Wo), floating point.
        key: (N, C, H, W).
        kernel_size, stride, padding, dilation, upsample: int or (vertical, horizontal).
        groups: G, a divisor of C; the channels of a group are summed.
        border: one of `BORDERS`.

    Returns:
        (N, G, Kh, Kw, Ho, Wo), contiguous.
    """
    columns = windows(key, kernel_size, stride, padding, dilation, border=border, upsample=upsample)
    pair = (columns.unflatten(1, (groups, -1)), query.unflatten(1, (groups, -1)))
    return torch.einsum("ngcijhw,ngchw->ngijhw", *pair).contiguous()
