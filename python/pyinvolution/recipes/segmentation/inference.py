"""Logits of images that are larger than the network should see at once."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["flipped", "sliding_window"]

Network = Callable[[Tensor], Tensor]


def sliding_window(net: Network, images: Tensor, window: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Logits (N, K, H, W), averaged over all windows that cover a pixel.

    Windows lie ``stride`` apart; the last ones are moved back to the border. An image smaller than the window is seen
    whole.

    Args:
        net: from images to logits of the same height and width.
        images: (N, C, H, W).
        window: height and width.
        stride: rows and columns between two windows, at most ``window``.

    Raises:
        ValueError: ``stride`` is not in 1 to ``window``.
    """
    if not all(1 <= step <= extent for step, extent in zip(stride, window, strict=True)):
        raise ValueError(f"stride is {tuple(stride)}, expected a value from 1 to window={tuple(window)}")
    size = images.shape[-2:]
    window = (min(window[0], size[0]), min(window[1], size[1]))
    tops, lefts = (
        [min(index * step, extent - length) for index in range(math.ceil((extent - length) / step) + 1)]
        for extent, length, step in zip(size, window, stride, strict=True)
    )
    total: Tensor | None = None
    count = images.new_zeros(size, dtype=torch.float32)
    for top in tops:
        for left in lefts:
            rows, columns = slice(top, top + window[0]), slice(left, left + window[1])
            logits = net(images[..., rows, columns]).float()
            if total is None:
                total = logits.new_zeros((*logits.shape[:2], *size))
            total[..., rows, columns] += logits
            count[rows, columns] += 1
    assert total is not None  # at least one window
    return total / count


def flipped(net: Network, images: Tensor) -> Tensor:
    """Logarithms of the probabilities (N, K, H, W), averaged over the images and their mirror images."""
    plain = net(images).float().log_softmax(1)
    mirrored = net(images.flip(-1)).float().log_softmax(1).flip(-1)
    return torch.logaddexp(plain, mirrored) - math.log(2)
