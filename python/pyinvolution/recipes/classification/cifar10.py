"""CIFAR-10 (Krizhevsky 2009) in the layout of ImageNet's tree of folders."""

import pickle
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from pyinvolution.recipes.errors import RecipeError
from pyinvolution.recipes.files import Files, find_folder, unpacked, write_splits
from pyinvolution.recipes.images import is_hidden

__all__ = ["CLASSES", "write_cifar10"]

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""In the order of the labels."""
FORMS = "CIFAR-10's python version (data_batch_1, ...), or folders of images, train/CLASS and test/CLASS"
BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}


def write_cifar10(root: str | Path, source: str | Path) -> dict[str, int]:
    """Write ROOT/{train,test}/CLASS/IMAGE: 50,000 and 10,000 images of 32 x 32. The folders appear when all is written.

    Args:
        root: where the tree goes; files that are there already are not written again.
        source: the published archive ``cifar-10-python.tar.gz`` or its folder, whose pixels become PNG files, or images
            in folders ``train/CLASS`` and ``test/CLASS``, which are copied as they are; an archive of either.

    Returns:
        Number of images in each split.

    Raises:
        RecipeError: it is neither, or has no images, or a file of the published form is damaged; or there are other
            images in ``root``, or files with other content.
    """
    with unpacked(source) as folder:
        tree = find_folder(folder, FORMS, ("data_batch_1", "test_batch"), ("train", "test"))
        files = _of_batches(tree) if (tree / "test_batch").is_file() else _of_folders(tree)
        counts = {split: sum(path.parts[0] == split for path in files) for split in BATCHES}
        for split, count in counts.items():
            if not count:
                raise RecipeError(f"--source has no image in {split}, expected {FORMS}")
        write_splits(Path(root), files, BATCHES, ["val"])  # which is evaluated rather than test
    return counts


def _of_folders(folder: Path) -> Files:
    files = {}
    for split in BATCHES:
        if not (folder / split).is_dir():
            raise RecipeError(f"--source: {split} is not a folder, expected {FORMS}")
        names = sorted(
            path.name for path in (folder / split).iterdir() if path.is_dir() and not is_hidden(Path(path.name))
        )
        if names != sorted(CLASSES):
            raise RecipeError(
                f"--source: {split} has the class folders {', '.join(names)}, expected {', '.join(CLASSES)}"
            )
        for path in sorted((folder / split).glob("*/*")):
            if path.suffix.lower() in IMG_EXTENSIONS and not is_hidden(path.relative_to(folder)):
                files[path.relative_to(folder)] = path.read_bytes
    return files


class _Plain(pickle.Unpickler):
    """Of a pickle reads numbers, text, lists, dictionaries and NumPy's arrays of numbers; it calls nothing else."""

    _ALLOWED: ClassVar[dict[str, str]] = {
        "_reconstruct": "numpy._core.multiarray",
        "ndarray": "numpy",
        "dtype": "numpy",
    }

    def find_class(self, module: str, name: str) -> Any:
        if name in self._ALLOWED and module.split(".")[0] == "numpy":
            return getattr(__import__(self._ALLOWED[name], fromlist=[name]), name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, expected arrays only")


def _of_batches(folder: Path) -> Files:
    files = {}
    for split, batches in BATCHES.items():
        number = 0
        for batch in batches:
            path = folder / batch
            try:
                with path.open("rb") as file:
                    content = _Plain(file, encoding="bytes").load()
                pixels = np.asarray(content[b"data"], np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                labels = [CLASSES[label] for label in content[b"labels"]]
                if len(labels) != len(pixels):
                    raise ValueError(f"it has {len(pixels)} images and {len(labels)} labels")
            except Exception as error:  # there are many ways not to be one
                raise RecipeError(f"--source: {batch} is not one of CIFAR-10's files: {error}") from error
            for image, label in zip(pixels, labels, strict=True):
                files[Path(split, label, f"{number:05d}.png")] = partial(_png, image)
                number += 1
    return files


def _png(image: NDArray[np.uint8]) -> bytes:
    stream = BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(stream, "png")
    return stream.getvalue()
