"""Stands in for ``sapa``: the two operators of similarity-aware point affiliation, an upsampling with guidance.

Each pixel of a large image is compared with the K x K pixels of a small one around it, and the small image's features
are averaged accordingly (Lu et al., NeurIPS 2022, arXiv 2209.12866). They are `pyinvolution.local_correlation2d` and
`pyinvolution.involution2d` with ``upsample``: on a CPU and a GPU, differentiable twice and more. Channels are last, as
in the authors' code. Source: https://github.com/poppinace/sapa.
"""

from torch import Tensor

from pyinvolution.compat._arguments import integer, require_kind, require_shape, require_tensors
from pyinvolution.functional import involution2d, local_correlation2d

__all__ = ["atn", "sim"]


def sim(query: Tensor, key: Tensor, kernel_size: int, scale_factor: int) -> Tensor:
    """The products of each query with the K x K keys around the one that it lies in.

    Args:
        query: (B, s H, s W, C); float32, float64, float16 or bfloat16; any strides.
        key: (B, H, W, C), zero outside its borders: a softmax that follows sees these zeros.
        kernel_size: K, odd.
        scale_factor: s.

    Returns:
        (B, s H, s W, K * K), the window's last axis fastest.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    require_tensors("sim", "(B, H, W, C)", query=query, key=key)
    kernel, scale = _sizes("sim", kernel_size, scale_factor)
    n, height, width, channels = key.shape
    require_shape("sim", "query", query, (n, scale * height, scale * width, channels))
    query, key = query.permute(0, 3, 1, 2), key.permute(0, 3, 1, 2)
    products = local_correlation2d(query, key, kernel, padding=kernel // 2, upsample=scale)
    return products.flatten(1, 3).permute(0, 2, 3, 1)


def atn(attn: Tensor, value: Tensor, kernel_size: int, scale_factor: int) -> Tensor:
    """The sum of the K x K values around each output pixel, weighted by ``attn``.

    Args:
        attn: (B, s H, s W, K * K).
        value: (B, H, W, C), zero outside its borders.
        kernel_size: K, odd.
        scale_factor: s.

    Returns:
        (B, s H, s W, C).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    require_tensors("atn", "(B, H, W, K * K)", attn=attn)
    require_tensors("atn", "(B, H, W, C)", value=value)
    require_kind("atn", attn=attn, value=value)
    kernel, scale = _sizes("atn", kernel_size, scale_factor)
    n, height, width = value.shape[:3]
    require_shape("atn", "attn", attn, (n, scale * height, scale * width, kernel**2))
    weight = attn.unflatten(3, (kernel, kernel)).permute(0, 3, 4, 1, 2).unsqueeze(1)
    output = involution2d(value.permute(0, 3, 1, 2), weight, padding=kernel // 2, upsample=scale)
    return output.permute(0, 2, 3, 1)


def _sizes(op: str, kernel_size: int, scale_factor: int) -> tuple[int, int]:
    kernel = integer(op, "kernel_size", kernel_size)
    if kernel % 2 == 0:
        raise ValueError(f"{op}: kernel_size is {kernel}, expected an odd number")
    return kernel, integer(op, "scale_factor", scale_factor)
