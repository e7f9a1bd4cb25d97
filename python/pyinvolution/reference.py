"""Reference involution in plain PyTorch: the oracle of every test and the naive side of every benchmark.

Involution (Li et al., CVPR 2021, arXiv 2103.06255, eq. 4) with stride s, padding P and dilation d::

    Y[n, c, p] = sum over taps k of  W[n, g(c), k, p] * X[n, c, s * p + d * k - P],    g(c) = c // (C / G)

where X is zero outside its borders. It is built from ``torch.nn.functional.unfold`` and ``torch.einsum``, so it is
differentiable to any order, runs on every device and dtype, and materialises all Kh * Kw shifted copies of X.
"""

import torch
from torch import Tensor
from torch.nn.functional import unfold
from torch.nn.modules.utils import _pair


def involution2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """Involution by unfolding.

    Args:
        input: (N, C, H, W), floating point.
        weight: (N, G, Kh, Kw, Ho, Wo), the kernel of every output pixel and group; G divides C.
        bias: (C,) or None, added to every pixel.
        stride, padding, dilation: int or (vertical, horizontal).

    Returns:
        (N, C, Ho, Wo), contiguous.
    """
    n, c = input.shape[:2]
    groups, kh, kw, ho, wo = weight.shape[1:]
    columns = unfold(input, (kh, kw), _pair(dilation), _pair(padding), _pair(stride))
    columns = columns.view(n, groups, c // groups, kh, kw, ho, wo)
    output = torch.einsum("ngcijhw,ngijhw->ngchw", columns, weight).reshape(n, c, ho, wo)
    return output if bias is None else output + bias.view(-1, 1, 1)
