"""Stands in for FeatUp's extension, ``featup.adaptive_conv_cuda``: joint bilateral upsampling's last step.

FeatUp (Fu et al., ICLR 2024, arXiv 2403.10516) filters enlarged features with a kernel for each pixel. That is
`pyinvolution.involution2d` with one group and without padding: on a CPU and a GPU, in float32, float64, float16 and
bfloat16, differentiable twice and more. Source: https://github.com/mhamilton723/FeatUp.
"""

import sys

from torch import Tensor

from pyinvolution.compat import _install
from pyinvolution.compat._arguments import require_shape, require_tensors
from pyinvolution.functional import involution2d

__all__ = ["AdaptiveConv", "install"]


class AdaptiveConv:
    """What FeatUp calls, as ``AdaptiveConv.apply(input, filters)``; there it is an autograd function."""

    @staticmethod
    def apply(input: Tensor, filters: Tensor) -> Tensor:
        r"""Filters each pixel's window with the kernel of that pixel.

        .. math::
            Y_{n,c,p} = \sum_k F_{n,p,k} \, X_{n,c,p + k}

        Args:
            input: X, (B, C, H + I - 1, W + J - 1), padded by the caller; any floating-point dtype of the library.
            filters: F, (B, H, W, I, J).

        Returns:
            (B, C, H, W).

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        require_tensors("AdaptiveConv", "(B, C, H, W)", input=input)
        require_tensors("AdaptiveConv", "(B, H, W, I, J)", filters=filters)
        n, height, width, rows, columns = filters.shape
        require_shape("AdaptiveConv", "input", input, (n, input.shape[1], height + rows - 1, width + columns - 1))
        return involution2d(input, filters.movedim((3, 4), (1, 2)).unsqueeze(1))


def install() -> None:
    """Makes FeatUp import this module in place of its extension, in this process.

    Call it before ``featup.upsamplers`` is imported; the package itself can then be used without being compiled.

    Raises:
        ImportError: the extension was imported before.
    """
    _install.install({"featup.adaptive_conv_cuda.adaptive_conv": sys.modules[__name__]})
