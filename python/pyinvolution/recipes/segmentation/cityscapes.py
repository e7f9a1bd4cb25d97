"""Cityscapes (Cordts et al., CVPR 2016): ROOT/{leftImg8bit,gtFine}/{train,val,test}/CITY/*.png."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.datasets import Cityscapes
from torchvision.transforms import v2

from pyinvolution.recipes.data import RecipeData, UnreadableSample
from pyinvolution.recipes.errors import RecipeError, require
from pyinvolution.recipes.images import find_images, is_hidden, read_image
from pyinvolution.recipes.samples import IMAGENET_MEAN, IMAGENET_STD, ImageFiles

__all__ = ["CLASSES", "IGNORED", "LABEL_IDS", "PALETTE", "TRAIN_IDS", "BalancedCrop", "CityscapesData", "colors"]

IGNORED = 255
"""Train id of pixels that loss and metrics leave out."""

_EVALUATED = sorted(
    (label for label in Cityscapes.classes if 0 <= label.train_id < IGNORED), key=lambda label: label.train_id
)
CLASSES: list[str] = [label.name for label in _EVALUATED]
"""Names of the 19 classes, by train id."""
LABEL_IDS: NDArray[np.uint8] = np.array([label.id for label in _EVALUATED], np.uint8)
"""Their ids in the files of the data set and of the benchmark."""
PALETTE: NDArray[np.uint8] = np.zeros((256, 3), np.uint8)
"""RGB by train id; black for what is ignored."""
PALETTE[: len(CLASSES)] = [label.color for label in _EVALUATED]
TRAIN_IDS: NDArray[np.uint8] = np.full(256, IGNORED, np.uint8)
"""Train ids by the ids in the files."""
TRAIN_IDS[LABEL_IDS] = np.arange(len(CLASSES))
_KNOWN: NDArray[np.bool_] = np.zeros(256, bool)
"""Whether an id is one of the data set's; -1 is 255 in the files."""
_KNOWN[[label.id for label in Cityscapes.classes]] = True

IMAGE_SUFFIX, LABEL_SUFFIX = "_leftImg8bit.png", "_gtFine_labelIds.png"


def colors(train_ids: NDArray[np.uint8]) -> Image.Image:
    """Picture with the colours of the classes, of train ids (H, W)."""
    picture = Image.fromarray(train_ids)
    picture.putpalette(PALETTE.tobytes())
    return picture


class BalancedCrop(v2.RandomCrop):
    """Random crop of image and mask in which no class has more than a share of the labelled pixels.

    Of ``tries`` crops the first such one is taken, else the one that comes nearest. Smaller images are padded: the
    image with ``mean``, the mask with `IGNORED`.

    Args:
        size: height and width.
        max_class_share: of the pixels that are not ignored; 1 takes any crop.
        mean: RGB in [0, 1].
        tries: crops that are looked at.
    """

    def __init__(
        self,
        size: tuple[int, int],
        max_class_share: float = 0.75,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        tries: int = 10,
    ) -> None:
        fill: Any = {tv_tensors.Image: [round(255 * value) for value in mean], tv_tensors.Mask: IGNORED}
        super().__init__(size, pad_if_needed=True, fill=fill)
        self.max_class_share, self.tries = max_class_share, tries

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        mask = next(value for value in flat_inputs if isinstance(value, tv_tensors.Mask))
        best, least = super().make_params(flat_inputs), 2.0
        crop = best
        for _ in range(self.tries if self.max_class_share < 1 else 0):
            share = _largest_share(self.transform(mask, crop))
            if share < least:
                best, least = crop, share
            if least <= self.max_class_share:
                break
            crop = super().make_params(flat_inputs)
        return best


def _largest_share(mask: Tensor) -> float:
    counts = torch.bincount(mask[mask != IGNORED].flatten())
    return (counts.max() / counts.sum()).item() if len(counts) else 1.0


class PhotometricDistortion(v2.RandomPhotometricDistort):
    """Brightness, contrast, saturation and hue, each with probability 1/2; the channels stay in order."""

    def __init__(self) -> None:
        super().__init__(hue=(-0.1, 0.1))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return super().make_params(flat_inputs) | {"channel_permutation": None}


def read_label_ids(path: str | Path) -> NDArray[np.uint8]:
    """The ids (H, W) in a PNG file of the data set, which are numbers: colours are not translated. A file with a
    palette holds them as its indices.

    Raises:
        UnreadableSample: the file is missing or damaged, it is not one byte for each pixel, or an id does not exist.
    """
    try:
        with Image.open(path) as image:
            mode, ids = image.mode, np.asarray(image)
    except Exception as error:  # decoders raise nearly anything on broken files
        raise UnreadableSample(f"cannot read labels {path}: {error}") from error
    if mode not in ("L", "P"):
        raise UnreadableSample(f"labels {path} are of mode {mode}, expected one byte for each pixel (mode L or P)")
    known = _KNOWN[ids]
    if not known.all():
        raise UnreadableSample(
            f"labels {path} have the value {ids[~known].min()}, expected the ids of Cityscapes, "
            f"0 to {np.flatnonzero(_KNOWN)[-2]} and 255"
        )
    return ids


class LabelledImages:
    """Pairs of image (3, H, W) and train ids (H, W, int64).

    Args:
        files: path of each image, and of its label ids.
        transform: of image and mask together.
    """

    def __init__(self, files: list[tuple[str, str]], transform: v2.Transform) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path, labels = self.files[index]
        image, ids = read_image(path), read_label_ids(labels)
        if ids.shape != (image.height, image.width):
            raise UnreadableSample(
                f"labels {labels} have {ids.shape[1]} x {ids.shape[0]} pixels, expected {image.width} x {image.height} "
                f"as in {path}"
            )
        mask = tv_tensors.Mask(torch.from_numpy(TRAIN_IDS[ids]))
        image, mask = self.transform(tv_tensors.Image(image), mask)
        return image.as_subclass(Tensor), mask.as_subclass(Tensor).long()

    def ignored(self, sample: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return sample[0], torch.full_like(sample[1], IGNORED)


class CityscapesData(RecipeData):
    """Images of streets with a class for every pixel. Training sees random crops, evaluation whole images.

    Args:
        root: folder with ``leftImg8bit`` and ``gtFine``.
        size: height and width that images are brought to before the random resize.
        scale: smallest and largest factor of the random resize.
        crop: height and width of the random crop of training.
        max_class_share: see `BalancedCrop`.
        hflip: probability of a horizontal flip.
        distortion: whether brightness, contrast, saturation and hue vary in training.
        mean: of the RGB channels in [0, 1], for normalisation.
        std: likewise.
        predict_root: an image or a folder of images, in any depth, for predict; None for ROOT/leftImg8bit/val.
        batch_size: crops a device and forward pass in training.
        val_batch_size: whole images a device; more than 1 needs images of one size.
        kwargs: of `RecipeData`.
    """

    classes = CLASSES

    def __init__(
        self,
        root: str = "data/cityscapes",
        size: tuple[int, int] = (1024, 2048),
        scale: tuple[float, float] = (0.5, 2.0),
        crop: tuple[int, int] = (512, 1024),
        max_class_share: float = 0.75,
        hflip: float = 0.5,
        distortion: bool = True,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        predict_root: str | None = None,
        batch_size: int = 2,
        val_batch_size: int | None = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size, val_batch_size, **kwargs)
        self.save_hyperparameters(logger=False)
        for name, value, valid, expected in (
            ("size", size, len(size) == 2 and min(size) > 0, "two positive numbers"),
            ("scale", scale, len(scale) == 2 and 0 < scale[0] <= scale[1], "two positive numbers in ascending order"),
            ("crop", crop, len(crop) == 2 and min(crop) > 0, "two positive numbers"),
            ("max_class_share", max_class_share, 0 < max_class_share <= 1, "a value in (0, 1]"),
            ("hflip", hflip, 0 <= hflip <= 1, "a value in [0, 1]"),
        ):
            require(f"data.{name}", value, valid, expected)
        self.root, self.predict_root = Path(root), predict_root
        tail = [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True), v2.Normalize(mean, std)]
        self.train_transform = v2.Compose(
            [
                v2.ScaleJitter((size[1], size[0]), tuple(scale)),  # it takes width before height
                BalancedCrop((crop[0], crop[1]), max_class_share, mean),
                v2.RandomHorizontalFlip(hflip),
                *([PhotometricDistortion()] if distortion else []),
                *tail,
            ]
        )
        self.val_transform = v2.Compose(tail)
        self.predict_transform = v2.Compose([v2.ToImage(), *tail])

    def setup(self, stage: str) -> None:
        """Find the images.

        Raises:
            RecipeError: a folder, or the labels of an image, are missing, or there is no image.
        """
        if stage == "predict":
            root = Path(self.predict_root or self.root / "leftImg8bit" / "val")
            self.predict_samples = ImageFiles.to_predict(find_images(root), root, self.predict_transform)
            return
        if stage == "fit":
            self.train_samples = LabelledImages(self._find("train"), self.train_transform)
        self.val_samples = LabelledImages(self._find("val"), self.val_transform)

    def _find(self, split: str) -> list[tuple[str, str]]:
        """Paths of the images and of their labels, in an order that is the same on every machine."""
        images, labels = self.root / "leftImg8bit" / split, self.root / "gtFine" / split
        expected = f"expected {images}/CITY/NAME{IMAGE_SUFFIX} and {labels}/CITY/NAME{LABEL_SUFFIX}"
        for folder in (images, labels):
            if not folder.is_dir():
                raise RecipeError(
                    f"data.root={self.root} has no split {split!r} of Cityscapes: {folder} is not a folder; {expected}"
                )
        found = sorted(path.relative_to(images) for path in images.glob(f"*/*{IMAGE_SUFFIX}"))
        found = [path for path in found if not is_hidden(path)]
        if not found:
            raise RecipeError(f"data.root={self.root}: no images; {expected}")
        pairs = [
            (str(images / path), str(labels / path.parent / (path.name.removesuffix(IMAGE_SUFFIX) + LABEL_SUFFIX)))
            for path in found
        ]
        missing = [label for _, label in pairs if not Path(label).is_file()]
        if missing:
            raise RecipeError(
                f"data.root={self.root}: labels of {len(missing)} images are missing, first {missing[0]}; {expected}"
            )
        return pairs
