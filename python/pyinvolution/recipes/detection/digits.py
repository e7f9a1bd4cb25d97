"""A small data set in COCO's layout: handwritten digits on photographs, all of which scikit-learn ships."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from pyinvolution.recipes.classification.digits import split_digits
from pyinvolution.recipes.files import write_file

__all__ = ["write_coco_digits"]

SIZE = 160
IMAGES = {"train": 1000, "val": 200}
EMPTY, CROWD = 0.05, 0.08
"""Shares of images without a digit, and of those with a crowd of small ones of one class."""
DIGITS, HEIGHTS = (1, 5), (28, 64)
"""Least and most digits in an image, and their heights in pixels."""
OVERLAP = 0.15
"""Most of a digit's box that lies within another's."""

Array = NDArray[np.float64]


def write_coco_digits(root: str | Path) -> tuple[int, int]:
    """Write ROOT/{train,val}2017/*.jpg and ROOT/annotations/instances_{train,val}2017.json.

    On random parts of two photographs lie up to five handwritten digits of 28 to 64 pixels, turned and coloured. The
    digits held out by `split_digits`, and the right two fifths of the photographs, are only for validation. Some
    images are empty, and some have a crowd (``iscrowd``): many small digits of one class under one annotation. Masks
    are uncompressed run lengths of the visible pixels. The files are the same every time; those that are there
    already are not written again.

    Returns:
        Numbers of training and validation images.

    Raises:
        RecipeError: a file is there with other content.
    """
    photographs = [photograph / 255 for photograph in load_sample_images().images]
    cut = photographs[0].shape[1] * 3 // 5
    regions = {"train": [photo[:, :cut] for photo in photographs], "val": [photo[:, cut:] for photo in photographs]}
    digits, splits = load_digits(), split_digits()
    number = 0
    for split, count in IMAGES.items():
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            number += 1
            generator = np.random.default_rng((list(IMAGES).index(split), index))
            pixels, objects = _scene(generator, regions[split], digits, splits[split])
            name = f"{number:012d}.jpg"
            images.append({"id": number, "file_name": name, "height": SIZE, "width": SIZE})
            for entry in objects:
                annotations.append({"id": len(annotations) + 1, "image_id": number, **entry})
            write_file(Path(root, f"{split}2017", name), _jpeg(pixels))
        content = {
            "info": {"description": "Handwritten digits (UCI) on photographs (scikit-learn)"},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 1 + digit, "name": str(digit), "supercategory": "digit"} for digit in range(10)],
        }
        write_file(Path(root, "annotations", f"instances_{split}2017.json"), json.dumps(content).encode())
    return IMAGES["train"], IMAGES["val"]


def _scene(
    generator: np.random.Generator, photographs: list[Array], digits: Any, members: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
    """Image (H, W, 3) and annotations."""
    image = _background(generator, photographs[generator.integers(len(photographs))])
    placed: list[tuple[int, bool, NDArray[np.bool_]]] = []
    taken: list[tuple[int, int, int]] = []

    def place(which: int, height: int, area: tuple[int, int, int], most: float) -> NDArray[np.bool_] | None:
        """Draw a digit at a random place in the square ``area`` (top, left, side) where it covers others little."""
        for _ in range(20):
            top, left = (int(generator.integers(start, start + area[2] - height + 1)) for start in area[:2])
            if all(_covered((top, left, height), other) <= most for other in taken):
                break
        else:
            return None
        taken.append((top, left, height))
        window = np.s_[top : top + height, left : left + height]
        ink = _ink(generator, digits.images[which], height)
        image[window] += ink[:, :, None] * (_color(generator, image[window]) - image[window])
        mask = np.zeros((SIZE, SIZE), bool)
        mask[window] = ink > 0.5
        for *_, other in placed:
            other &= ~mask
        return mask

    if generator.random() >= EMPTY:
        if generator.random() < CROWD:
            target = digits.target[generator.choice(members)]
            same = members[digits.target[members] == target]
            side = int(generator.integers(56, 80))
            top, left = (int(value) for value in generator.integers(0, SIZE - side + 1, 2))
            area = (top, left, side)
            small = [place(generator.choice(same), int(generator.integers(12, 19)), area, 0.3) for _ in range(12)]
            placed.append((target, True, np.any([mask for mask in small if mask is not None], axis=0)))
            taken[:] = [area]
        for _ in range(generator.integers(DIGITS[0], DIGITS[1] + 1)):
            which = generator.choice(members)
            height = int(np.exp(generator.uniform(*np.log(HEIGHTS))))
            mask = place(which, height, (0, 0, SIZE), OVERLAP)
            if mask is not None:
                placed.append((digits.target[which], False, mask))
    image += generator.normal(scale=0.01, size=image.shape)
    annotations = [_annotation(int(target), crowd, mask) for target, crowd, mask in placed if mask.any()]
    return (255 * image.clip(0, 1)).round().astype(np.uint8), annotations


def _background(generator: np.random.Generator, photograph: Array) -> Array:
    """A random square of the photograph, perhaps mirrored, a little lighter or darker."""
    side = int(generator.integers(SIZE // 2, min(photograph.shape[:2]) + 1))
    top, left = (int(generator.integers(0, extent - side + 1)) for extent in photograph.shape[:2])
    square = photograph[top : top + side, left : left + side][:, :: generator.choice([1, -1])]
    return np.dstack([_resize(channel, SIZE) for channel in square.transpose(2, 0, 1)]) * generator.uniform(0.8, 1.1)


def _ink(generator: np.random.Generator, digit: Array, height: int) -> Array:
    """Opacity (height, height) of a digit (8, 8) of levels 0 to 16, turned by up to 12 degrees."""
    picture = Image.fromarray(_resize(digit / 16, height).astype(np.float32))
    return np.asarray(picture.rotate(generator.uniform(-12, 12), Image.Resampling.BILINEAR), np.float64).clip(0, 1)


def _color(generator: np.random.Generator, behind: Array) -> Array:
    """Random, but light on dark and dark on light."""
    level = 0.0 if behind.mean() > 0.5 else 0.7
    return level + generator.uniform(0, 0.3, 3)


def _resize(values: Array, size: int) -> Array:
    image = Image.fromarray(values.astype(np.float32))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), np.float64)


def _covered(one: tuple[int, int, int], other: tuple[int, int, int]) -> float:
    """Share of the smaller of two squares (top, left, side) that is within the larger."""
    rows, columns = (min(a + one[2], b + other[2]) - max(a, b) for a, b in zip(one[:2], other[:2], strict=True))
    return max(rows, 0) * max(columns, 0) / min(one[2], other[2]) ** 2


def _annotation(target: int, crowd: bool, mask: NDArray[np.bool_]) -> dict[str, Any]:
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    # Runs go down the columns, and begin with those of the background.
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flat, [flat[-1]]])))
    runs = np.diff(np.concatenate([[0], edges, [flat.size]]))
    return {
        "category_id": 1 + target,
        "bbox": [float(value) for value in box],
        "area": float(mask.sum()),
        "iscrowd": int(crowd),
        "segmentation": {"size": list(mask.shape), "counts": [int(run) for run in runs]},
    }


def _jpeg(pixels: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "jpeg", quality=92)
    return stream.getvalue()
