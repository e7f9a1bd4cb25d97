"""Norms of an involution's kernels over their taps."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.functional import conv2d, normalize

LEAST_LENGTH = 1e-12
"""Shorter kernels are divided by it. In float16 it would be 0, and a kernel of zeros become NaN."""


def _of_length_one(kernels: Tensor) -> Tensor:
    return normalize(kernels.to(_with_least_length(kernels)), dim=2, eps=LEAST_LENGTH).to(kernels.dtype)


def _with_least_length(tensor: Tensor) -> torch.dtype:
    """The tensor's dtype, float32 at least."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


KernelNorm = Callable[[Tensor], Tensor]
KERNEL_NORMS: dict[str, KernelNorm] = {
    "softmax": lambda kernels: kernels.softmax(2),
    "l2": lambda kernels: _of_length_one(kernels),  # by its name, which torch.fx replaces
}
"""By name: (N, G, K, Ho, Wo) -> the same, a norm over the K taps of each kernel."""

torch.fx.wrap("_of_length_one")


def per_kernel_length(output: Tensor, reduced: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """Divide an involution by the lengths of its kernels, S r + b at each pixel and group, without computing these::

        |S r + b|² = r · (SᵀS r + 2 Sᵀb) + b · b

    in float32 at least, because the sum may be much smaller than its terms.

    Args:
        output: (N, C, Ho, Wo).
        reduced: (N, R, Ho, Wo), r.
        weight: (groups * K, R, 1, 1), S of each group.
        bias: (groups * K,), b of each group; None for zeros.
    """
    dtype = _with_least_length(reduced)
    kind = reduced.device.type
    # Entered only where it changes something: programs for ONNX cannot have it.
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
        r, s = reduced.to(dtype), weight.to(dtype).flatten(1).unflatten(0, (groups, -1))
        products = s.mT @ s
        linear = constant = None
        if bias is not None:
            b = bias.to(dtype).view(groups, -1, 1)
            linear, constant = 2 * (s.mT @ b).flatten(), b.square().sum((1, 2)).view(-1, 1, 1)
        terms = conv2d(r, products.flatten(0, 1)[..., None, None], linear).unflatten(1, (groups, -1)) * r.unsqueeze(1)
        squared = terms.sum(2) if constant is None else terms.sum(2) + constant
        factor = squared.clamp(min=LEAST_LENGTH**2).rsqrt()
    return (output.unflatten(1, (groups, -1)) * factor.unsqueeze(2)).to(output.dtype).flatten(1, 2)
