"""Images a second of the data loading of the ImageNet recipe, against Pillow with an early conversion to float."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from pyinvolution.studies.timing import interleaved

__all__ = ["IMAGES", "loader"]

IMAGES, SIZE, CROP = 32, (480, 360), 224


def write_images(root: Path, count: int) -> None:
    """An ImageFolder tree of random parts of scikit-learn's photographs, of 480 x 360 pixels, as JPEG of quality 90."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    for split in ("train", "val"):
        (root / split / "photographs").mkdir(parents=True)
    for index in range(count):
        left, top = (11 * index) % 160, (7 * index) % 67
        part = photographs[index % 2].crop((left, top, left + SIZE[0], top + SIZE[1]))
        part.save(root / "train/photographs" / f"{index:03d}.jpg", quality=90)
    part.save(root / "val/photographs/0.jpg", quality=90)


def with_pillow(paths: Sequence[str], transform: Callable[[Any], Tensor], seed: Callable[[int], int]) -> list[Tensor]:
    """Decoded and cropped by Pillow, converted to float and normalised in the loading process."""
    from PIL import Image

    images = []
    for index, path in enumerate(paths):
        torch.manual_seed(seed(index))
        with Image.open(path) as image:
            images.append(transform(image.convert("RGB")))
    return images


def loader(report: Any, count: int = IMAGES, seconds: float = 5.0) -> None:
    """Rows of one core: reading, decoding, RandomResizedCrop to 224 and a flip."""
    from torchvision.transforms import v2

    from pyinvolution.recipes import ImageFolderData
    from pyinvolution.recipes.data import SeededDataset, seed_from

    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        write_images(Path(folder), count)
        data = ImageFolderData(folder, size=CROP, num_workers=0)
        data.setup("fit")
        samples: Any = data.train_samples
        ours = SeededDataset(samples, 0, "raise", training=True)
        paths = [path for path, _ in samples.files]
        transforms = [v2.RandomResizedCrop(CROP), v2.RandomHorizontalFlip(), v2.ToImage()]
        early = [*transforms, v2.ToDtype(torch.float32, scale=True), v2.Normalize(*data.normalization)]  # type: ignore[misc]
        pillow = partial(with_pillow, paths, v2.Compose(early), lambda index: seed_from(0, 0, index))

        def tensors() -> list[Tensor]:
            return [ours[0, index][0] for index in range(count)]

        deviation = max(data.normalization[1])  # type: ignore[index]
        difference = (data.prepare(torch.stack(tensors())) - torch.stack(pillow())).abs() * deviation * 255
        assert difference.mean() < 1, f"the images differ by {difference.mean():.2f} levels in the mean"
        times = interleaved({"ours": tensors, "Pillow, float": pillow}, seconds)
    report.add("loader", f"JPEG of {SIZE[0]} x {SIZE[1]}, {count} images", 1, "ours", times)
    report.rows[-1]["images_per_s"] = count / statistics.median(times["ours"])
    report.rows[-1]["Pillow, float: images_per_s"] = count / statistics.median(times["Pillow, float"])
