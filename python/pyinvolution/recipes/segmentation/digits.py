"""Small street scenes without streets, in the tree of Cityscapes: regions of two photographs, with digits on them."""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from pyinvolution.recipes.classification.digits import split_digits
from pyinvolution.recipes.files import write_splits
from pyinvolution.recipes.segmentation.cityscapes import CLASSES, IMAGE_SUFFIX, LABEL_IDS, TABLE

__all__ = ["SIZE", "write_scenes"]

SIZE = (128, 256)
SCENES = {"train": 600, "val": 80}
CITY = "digits"
PHOTOGRAPHS, DIGIT = ("building", "vegetation"), "traffic sign"
"""The classes that the photographs of a temple and of a flower stand for, and the digits."""
UNLABELLED, BORDER = 0, 2
"""Ids in the files: boundaries between the photographs and edges of the digits; the rim of the image."""
RIM = 3
COLORS = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1]])
"""Of the digits; black and white could not be seen on either photograph."""

Array = NDArray[np.float64]
Pixels = NDArray[np.uint8]


def write_scenes(root: str | Path) -> tuple[int, int]:
    """Write ROOT/{leftImg8bit,gtFine}/{train,val}/digits/digits_NNNNNN_000000_*.png: images of 128 x 256 pixels, their
    label ids and, to look at, the colours of the classes.

    A smooth random field decides which photograph (of the two that scikit-learn ships) shows where; one to four
    handwritten digits, coloured and 32 to 64 pixels high, lie on top. Training sees the left three fifths of the
    photographs and four fifths of the digits, validation the rest of both. The files are the same every time; those
    that are there already are not written again.

    Returns:
        Numbers of training and validation images.

    Raises:
        RecipeError: there are other images in these folders, or files with other content.
    """
    files: dict[Path, Callable[[], bytes]] = {}
    photographs = [photograph / 255 for photograph in load_sample_images().images]
    digits = load_digits()
    members = split_digits()
    for number, (split, count) in enumerate(SCENES.items()):
        cut = photographs[0].shape[1] * 3 // 5
        halves = [photo[:, :cut] if split == "train" else photo[:, cut:] for photo in photographs]
        for index in range(count):
            generator = np.random.default_rng((number, index))
            image, ids = _scene(generator, halves, digits.images[members[split]])
            name = f"{CITY}_{index:06d}_000000"
            truth = Path("gtFine", split, CITY, f"{name}_gtFine")
            files[Path("leftImg8bit", split, CITY, f"{name}{IMAGE_SUFFIX}")] = partial(_png, Image.fromarray(image))
            files[Path(f"{truth}_labelIds.png")] = partial(_png, Image.fromarray(ids))
            files[Path(f"{truth}_color.png")] = partial(_png, TABLE.picture(TABLE.train_ids(ids)).convert("RGB"))
    write_splits(Path(root), files, ("leftImg8bit", "gtFine"))
    return SCENES["train"], SCENES["val"]


def _scene(generator: np.random.Generator, photographs: list[Array], digits: Array) -> tuple[Pixels, Pixels]:
    """Image (H, W, 3) and label ids (H, W)."""
    classes = [LABEL_IDS[CLASSES.index(name)] for name in (*PHOTOGRAPHS, DIGIT)]
    field = _resize(generator.normal(size=(4, 7)), SIZE)
    second = field > np.quantile(field, generator.uniform(0.35, 0.65))
    first_patch, second_patch = (_patch(generator, photograph) for photograph in photographs)
    image = np.where(second[:, :, None], second_patch, first_patch)
    ids = np.where(second, classes[1], classes[0])
    ids[_boundary(second)] = UNLABELLED
    taken = np.zeros(SIZE, bool)
    for _ in range(generator.integers(1, 5)):
        height = int(generator.integers(32, 65))
        ink = _resize(digits[generator.integers(len(digits))] / 16, (height, height)).clip(0, 1)
        top, left = (int(generator.integers(0, extent - height + 1)) for extent in SIZE)
        place = np.s_[top : top + height, left : left + height]
        if taken[place].any():
            continue
        taken[place] = True
        color = COLORS[generator.integers(len(COLORS))] * 0.85 + generator.uniform(0, 0.15, 3)
        image[place] += ink[:, :, None] * (color - image[place])
        ids[place] = np.where(ink > 0.5, classes[2], np.where(ink > 0.25, UNLABELLED, ids[place]))
    ids[:RIM], ids[-RIM:], ids[:, :RIM], ids[:, -RIM:] = (BORDER,) * 4
    image += generator.normal(scale=0.01, size=image.shape)
    return (255 * image.clip(0, 1)).round().astype(np.uint8), ids.astype(np.uint8)


def _patch(generator: np.random.Generator, photograph: Array) -> Array:
    """A random part of a photograph, at a random scale, perhaps mirrored, a little lighter or darker."""
    height = int(SIZE[0] * generator.uniform(0.7, photograph.shape[1] / SIZE[1]))
    width = height * SIZE[1] // SIZE[0]
    top, left = (
        int(generator.integers(0, extent - length + 1))
        for extent, length in zip(photograph.shape, (height, width), strict=False)
    )
    patch = photograph[top : top + height, left : left + width][:, :: generator.choice([1, -1])]
    return np.dstack([_resize(channel, SIZE) for channel in patch.transpose(2, 0, 1)]) * generator.uniform(0.8, 1.1)


def _resize(values: Array, size: tuple[int, int]) -> Array:
    """Bicubic, to (rows, columns)."""
    image = Image.fromarray(values.astype(np.float32))
    return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC), np.float64)


def _boundary(region: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels with a neighbour on the other side."""
    padded = np.pad(region, 1, "edge")
    shifted = [padded[1 + y : y - 1 or None, 1 + x : x - 1 or None] for y, x in ((-1, 0), (1, 0), (0, -1), (0, 1))]
    return np.any([side != region for side in shifted], 0)


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "png")
    return stream.getvalue()
