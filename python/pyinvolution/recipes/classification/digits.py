"""The handwritten digits that scikit-learn ships, as an ImageFolder tree."""

import io
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from pyinvolution.recipes.files import write_splits

__all__ = ["split_digits", "write_digits"]

SIZE = 32


def split_digits() -> dict[str, np.ndarray]:
    """Indices into `sklearn.datasets.load_digits`: "val" is one fifth (360), in which every class has its proportion,
    "train" the rest."""
    targets = load_digits().target
    train, val = train_test_split(np.arange(len(targets)), test_size=360, stratify=targets, random_state=0)
    return {"train": train, "val": val}


def write_digits(root: str | Path) -> tuple[int, int]:
    """Write ROOT/{train,val}/{0..9}/NNNN.png: 1,797 real digits (UCI, 8 x 8 pixels), enlarged to 32 x 32 grey levels.

    One fifth (360) is held out, with every class in proportion. The files are the same every time; those that are
    there already are not written again.

    Returns:
        Numbers of training and validation images.

    Raises:
        RecipeError: there are other images in these folders, or files with other content.
    """
    digits = load_digits()
    splits = split_digits()
    files = {
        Path(split, str(digits.target[index]), f"{index:04d}.png"): partial(_png, digits.images[index])
        for split, members in splits.items()
        for index in members
    }
    write_splits(Path(root), files, splits)
    return len(splits["train"]), len(splits["val"])


def _png(image: np.ndarray) -> bytes:
    """PNG of an image with levels 0 to 16."""
    levels = np.round(image * (255 / 16)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(levels).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(stream, "png")
    return stream.getvalue()
