"""The kernels that a network's involutions generate."""

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pyinvolution.modules import Involution2d

__all__ = ["involution_kernels"]


@torch.no_grad()
def involution_kernels(
    net: nn.Module, images: Tensor, names: Collection[str] | None = None
) -> dict[str, NDArray[np.float64]]:
    """Kernels (N, G, Kh, Kw, Ho, Wo) that the `Involution2d` layers of ``net`` generate for images (N, C, H, W).

    Args:
        net: the network; it is set to evaluation mode.
        images: normalised as it expects.
        names: of layers, as in ``net.named_modules()``; None for all.
    """
    layers = {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, Involution2d) and (names is None or name in names)
    }
    kernels: dict[nn.Module, Tensor] = {}

    def keep(layer: Any, arguments: tuple[Tensor, ...]) -> None:
        kernels[layer] = layer.kernels(*arguments)

    hooks = [layer.register_forward_pre_hook(keep) for layer in layers.values()]
    net.eval()(images)
    for hook in hooks:
        hook.remove()
    return {name: kernels[layer].double().cpu().numpy() for name, layer in layers.items()}
