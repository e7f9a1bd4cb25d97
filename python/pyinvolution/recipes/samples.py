"""What the data of several tasks share: image files as samples, transforms by name, ImageNet's mean and deviation."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from pyinvolution.recipes.errors import RecipeError
from pyinvolution.recipes.images import read_pixels, relative_names

__all__ = ["IGNORED", "IMAGENET_MEAN", "IMAGENET_STD", "ImageFiles", "Transforms", "compose"]

IGNORED = -1
"""Target of an image that loss and metrics leave out."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the RGB channels, in [0, 1]."""

Transforms = list[dict[str, dict[str, Any]]]
"""Transforms of torchvision.transforms.v2 by name, e.g. ``[{"RandomCrop": {"size": 32, "padding": 2}}]``."""


class ImageFiles:
    """Pairs of image and target; the image is read by `read_pixels` and transformed.

    Args:
        files: (path, target) of each.
        transform: from pixels (3, H, W), uint8, to what a batch is made of; None for the pixels.
    """

    @classmethod
    def to_predict(
        cls, paths: Sequence[Path], root: Path, transform: Callable[[Any], Tensor] | None = None
    ) -> "ImageFiles":
        """Pairs of image and index, with ``names``: the paths relative to ``root``."""
        samples = cls([(str(path), index) for index, path in enumerate(paths)], transform)
        samples.names = relative_names(paths, root)
        return samples

    def __init__(self, files: list[tuple[str, int]], transform: Callable[[Any], Tensor] | None = None) -> None:
        self.files, self.transform = files, transform
        self.names: list[str] = []

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, target = self.files[index]
        pixels = read_pixels(path)
        return (self.transform(tv_tensors.Image(pixels)) if self.transform else pixels), target

    def ignored(self, sample: tuple[Tensor, int]) -> tuple[Tensor, int]:
        return sample[0], IGNORED


def compose(field: str, transforms: Transforms) -> v2.Compose:
    """The ``transforms``, or a RecipeError that names ``field`` of the data."""
    built = []
    for transform in transforms:
        for name, arguments in transform.items():
            factory = getattr(v2, name, None)
            if factory is None:
                raise RecipeError(f"data.{field}: torchvision.transforms.v2 has no {name!r}")
            try:
                built.append(factory(**arguments))
            except (TypeError, ValueError) as error:
                raise RecipeError(f"data.{field}: {name}: {error}") from error
    return v2.Compose(built)
