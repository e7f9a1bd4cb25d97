"""Stands in for CARAFE, in ``mmcv.ops`` and in the authors' package: upsampling by a kernel for each output pixel.

An output pixel is a weighted sum of the K x K input pixels around the one that it lies in (Wang et al., ICCV 2019,
arXiv 1905.02188). It is `pyinvolution.involution2d` with ``upsample``: on a CPU and a GPU, in float32, float64, float16
and bfloat16, differentiable twice and more. Sources: https://github.com/open-mmlab/mmcv,
https://github.com/myownskyW7/CARAFE.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, softmax

from pyinvolution.compat._arguments import integer, require_shape, require_tensors
from pyinvolution.functional import involution2d
from pyinvolution.modules import check_input

__all__ = ["CARAFE", "CARAFENaive", "CARAFEPack", "carafe", "carafe_naive"]

# Opaque to torch.fx, which cannot follow their branches.
torch.fx.wrap("_carafe")
torch.fx.wrap("check_input")


def carafe(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> Tensor:
    r"""Reassembles ``features`` on a finer grid. The masks are used as they are; `CARAFEPack` applies a softmax.

    .. math::
        Y_{n,c,p} = \sum_k M_{n,\,g(c) K^2 + k,\,p} \, X_{n,c,\lfloor p / s \rfloor + k - \lfloor K / 2 \rfloor},
        \qquad g(c) = \lfloor c \, G / C \rfloor

    with X zero outside its borders.

    Args:
        features: X, (N, C, H, W); float32, float64, float16 or bfloat16; any strides.
        masks: M, (N, G K K, s H, s W).
        kernel_size: K, odd.
        group_size: G, the number of groups, which divides C.
        scale_factor: s.

    Returns:
        (N, C, s H, s W).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    return _carafe("carafe", features, masks, kernel_size, group_size, scale_factor)


def carafe_naive(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> Tensor:
    """`carafe`; mmcv has a second implementation under this name."""
    return _carafe("carafe_naive", features, masks, kernel_size, group_size, scale_factor)


def _carafe(op: str, features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> Tensor:
    require_tensors(op, "(N, C, H, W)", features=features, masks=masks)
    kernel, groups = integer(op, "kernel_size", kernel_size), integer(op, "group_size", group_size)
    scale = integer(op, "scale_factor", scale_factor)
    if kernel % 2 == 0:
        raise ValueError(f"{op}: kernel_size is {kernel}, expected an odd number")
    n, channels, height, width = features.shape
    if channels % groups:
        raise ValueError(f"{op}: group_size is {groups}, expected a divisor of the {channels} channels of features")
    require_shape(op, "masks", masks, (n, groups * kernel**2, scale * height, scale * width))
    weight = masks.unflatten(1, (groups, kernel, kernel))
    return involution2d(features, weight, padding=kernel // 2, upsample=scale)


class CARAFE(nn.Module):
    """`carafe` with fixed sizes, as a module without parameters."""

    def __init__(self, kernel_size: int, group_size: int, scale_factor: int) -> None:
        super().__init__()
        name = type(self).__name__
        self.kernel_size = integer(name, "kernel_size", kernel_size)
        self.group_size = integer(name, "group_size", group_size)
        self.scale_factor = integer(name, "scale_factor", scale_factor)

    def forward(self, features: Tensor, masks: Tensor) -> Tensor:
        return _carafe(type(self).__name__, features, masks, self.kernel_size, self.group_size, self.scale_factor)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, group_size={self.group_size}, scale_factor={self.scale_factor}"


class CARAFENaive(CARAFE):
    """`CARAFE`; mmcv has a second implementation under this name."""


class CARAFEPack(nn.Module):
    """The upsampling layer: two convolutions predict the kernels from the input, a softmax normalises them.

    Its parameters are those of mmcv's layer, ``channel_compressor`` and ``content_encoder``, so that state dicts load
    strictly.

    Args:
        channels: C, of input and output.
        scale_factor: s.
        up_kernel: K of `carafe`, odd.
        up_group: G of `carafe`.
        encoder_kernel: kernel size of ``content_encoder``, odd.
        encoder_dilation: its dilation.
        compressed_channels: channels between the two convolutions.

    Shape:
        - Input: (N, C, H, W), floating point.
        - Output: (N, C, s H, s W).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        channels: int,
        scale_factor: int,
        up_kernel: int = 5,
        up_group: int = 1,
        encoder_kernel: int = 3,
        encoder_dilation: int = 1,
        compressed_channels: int = 64,
    ) -> None:
        super().__init__()
        self.channels = integer("CARAFEPack", "channels", channels)
        self.scale_factor = integer("CARAFEPack", "scale_factor", scale_factor)
        self.up_kernel = integer("CARAFEPack", "up_kernel", up_kernel)
        self.up_group = integer("CARAFEPack", "up_group", up_group)
        self.encoder_kernel = integer("CARAFEPack", "encoder_kernel", encoder_kernel)
        self.encoder_dilation = integer("CARAFEPack", "encoder_dilation", encoder_dilation)
        self.compressed_channels = integer("CARAFEPack", "compressed_channels", compressed_channels)
        for name in ("up_kernel", "encoder_kernel"):
            if getattr(self, name) % 2 == 0:
                raise ValueError(f"CARAFEPack: {name} is {getattr(self, name)}, expected an odd number")
        if channels % up_group:
            raise ValueError(f"CARAFEPack: up_group is {up_group}, expected a divisor of the {channels} channels")
        kernels = up_kernel**2 * up_group * scale_factor**2
        self.channel_compressor = nn.Conv2d(channels, compressed_channels, 1)
        self.content_encoder = nn.Conv2d(
            compressed_channels,
            kernels,
            encoder_kernel,
            padding=(encoder_kernel - 1) * encoder_dilation // 2,
            dilation=encoder_dilation,
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Xavier's uniform numbers for ``channel_compressor``, small normal ones for ``content_encoder``, no biases."""
        nn.init.xavier_uniform_(self.channel_compressor.weight)
        nn.init.normal_(self.content_encoder.weight, std=0.001)
        for conv in (self.channel_compressor, self.content_encoder):
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)

    def kernel_normalizer(self, mask: Tensor) -> Tensor:
        """(N, G K K s s, H, W) to (N, G K K, s H, s W), with a softmax over each K x K."""
        mask = pixel_shuffle(mask, self.scale_factor)
        return softmax(mask.unflatten(1, (-1, self.up_kernel**2)), 2).flatten(1, 2)

    def feature_reassemble(self, x: Tensor, mask: Tensor) -> Tensor:
        """`carafe` with this layer's sizes."""
        return _carafe("CARAFEPack", x, mask, self.up_kernel, self.up_group, self.scale_factor)

    def forward(self, x: Tensor) -> Tensor:
        x = check_input(x, self.channels, "CARAFEPack")
        mask = self.content_encoder(self.channel_compressor(x))
        return self.feature_reassemble(x, self.kernel_normalizer(mask))
