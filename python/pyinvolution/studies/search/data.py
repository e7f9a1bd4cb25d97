"""Data of a search: only the training images, some of which are held out for choosing networks."""

from typing import Any

import torch
from torch import Tensor

from pyinvolution.recipes.classification.imagefolder import ImageFolderData
from pyinvolution.recipes.data import SeededDataset
from pyinvolution.recipes.errors import require

__all__ = ["HeldOut", "held_out_batches", "training_batches"]

Batches = list[tuple[Tensor, Tensor]]
"""Images (N, 3, H, W) and targets (N,)."""


class HeldOut(ImageFolderData):
    """ImageFolderData that validates on a share of the training images and does not use ``val``.

    What is chosen by these can be compared on ``val``, which no choice has seen.

    Args:
        held_out: share of the images of every class; at least one image stays on either side.
        kwargs: of `ImageFolderData`.
    """

    def __init__(self, held_out: float = 0.4, **kwargs: Any) -> None:
        require("held_out", held_out, 0 < held_out < 1, "a value in (0, 1)")
        super().__init__(held_out=held_out, **kwargs)


def training_batches(data: ImageFolderData, images: int) -> Batches:
    """About ``images`` of the training images as they are in training, augmented, in batches."""
    samples = SeededDataset(data.train_samples, data.seed, data.unreadable, training=True)
    chosen = torch.randperm(len(samples), generator=torch.Generator().manual_seed(data.seed))[:images].tolist()
    return _batches(data, [samples[0, index] for index in chosen], data.batch_size)


def held_out_batches(data: ImageFolderData) -> Batches:
    """The images held out."""
    samples = SeededDataset(data.val_samples, data.seed, data.unreadable, training=False)
    return _batches(data, [samples[0, index] for index in range(len(samples))], data.val_batch_size)


def _batches(data: ImageFolderData, samples: list[tuple[Tensor, int]], batch_size: int) -> Batches:
    parts = (samples[start : start + batch_size] for start in range(0, len(samples), batch_size))
    return [
        (data.prepare(torch.stack([image for image, _ in part])), torch.tensor([target for _, target in part]))
        for part in parts
    ]
