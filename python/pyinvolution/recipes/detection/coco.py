"""COCO (Lin et al., ECCV 2014) and data in its layout: ROOT/annotations/instances_SPLIT.json and ROOT/SPLIT/IMAGE."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from math import ceil, floor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from pyinvolution.recipes.data import RecipeData, UnreadableSample
from pyinvolution.recipes.detection.annotations import CocoFile, Entry, Fault, draw_mask, has_mask
from pyinvolution.recipes.errors import RecipeError
from pyinvolution.recipes.images import exif_orientation, find_images, read_pixels
from pyinvolution.recipes.samples import ImageFiles, Transforms, compose

__all__ = ["CocoData", "CocoImages", "Target"]

Target = dict[str, Any]
"""``boxes`` (objects, 4) as x1, y1, x2, y2, ``labels`` (objects,) from 1, ``iscrowd`` and ``area`` (objects,), perhaps
``masks`` (objects, H, W), and the ``image_id``, -1 in a sample that is to be left out."""


class CocoImages:
    """Pairs of image (3, H, W), uint8, and `Target`.

    Args:
        dataset: whose images are read.
        annotations: of each image, by its id.
        category_ids: of the labels 1, 2, ...
        transform: of image and target together.
        masks: whether targets have them. Then an object without a pixel is left out in training; in evaluation one
            without a mask is a crowd as large as its box, since nothing can tell what a detection of it is worth.
        training: whether these are samples of training.
    """

    def __init__(
        self,
        dataset: CocoFile,
        annotations: Mapping[int, list[Entry]],
        category_ids: list[int],
        transform: Callable,
        masks: bool,
        training: bool,
    ) -> None:
        self.dataset, self.annotations, self.transform = dataset, annotations, transform
        self.masks, self.training = masks, training
        self.labels = {category: label for label, category in enumerate(category_ids, 1)}

    def __len__(self) -> int:
        return len(self.dataset.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image_id = self.dataset.ids[index]
        entry, annotations = self.dataset.images[image_id], self.annotations[image_id]
        path = Path(self.dataset.root, entry["file_name"])
        image = read_pixels(path)
        height, width = image.shape[-2:]
        size = height, width
        _check_size(path, entry, size)
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        target: Target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.tensor([self.labels[a["category_id"]] for a in annotations], dtype=torch.int64),
            "iscrowd": torch.tensor([int(a.get("iscrowd", 0)) for a in annotations], dtype=torch.int64),
            "area": torch.tensor([a.get("area", a["bbox"][2] * a["bbox"][3]) for a in annotations]).float(),
            "image_id": image_id,
        }
        if self.masks:
            try:
                masks = [torch.from_numpy(np.ascontiguousarray(draw_mask(a, size))) for a in annotations]
            except Fault as error:
                raise UnreadableSample(f"cannot read the masks of image {path}: {error}") from error
            target["masks"] = tv_tensors.Mask(torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.uint8))
            if not self.training:
                _cover(target, [i for i, a in enumerate(annotations) if not has_mask(a)])
        image, target = self.transform(tv_tensors.Image(image), target)
        plain = {
            key: value.as_subclass(Tensor) if isinstance(value, Tensor) else value for key, value in target.items()
        }
        if self.masks and self.training:
            visible = (plain["masks"] != 0).flatten(1).any(1)
            plain = {key: value[visible] if isinstance(value, Tensor) else value for key, value in plain.items()}
        return image.as_subclass(Tensor), plain

    def ignored(self, sample: tuple[Tensor, Target]) -> tuple[Tensor, Target]:
        return sample[0], sample[1] | {"image_id": -1}


def _check_size(path: Path, entry: Entry, size: tuple[int, int]) -> None:
    height, width = size
    listed = entry.get("height") or height, entry.get("width") or width
    if listed != size:
        reason = ""
        if listed == (width, height):
            with Image.open(path) as image:
                turned = exif_orientation(image) > 4
            reason = (
                "; its EXIF orientation, which is applied here, swaps the sides"
                if turned
                else "; the sides are swapped, probably by an EXIF rotation that only one of the two has seen"
            )
        raise UnreadableSample(
            f"image {path} has {width} x {height} pixels, its annotations say {listed[1]} x {listed[0]}{reason}"
        )


def _cover(target: Target, indices: list[int]) -> None:
    """Make objects crowds as large as their boxes."""
    for index in indices:
        left, top, right, bottom = target["boxes"][index].tolist()
        rows, columns = (slice(max(floor(a), 0), max(ceil(b), 0)) for a, b in ((top, bottom), (left, right)))
        target["masks"][index, rows, columns] = 1
        target["iscrowd"][index] = 1


def _sanitized(target: tuple[Any, Target]) -> tuple[Tensor, ...]:
    return tuple(target[1][key] for key in ("labels", "iscrowd", "area"))


class CocoData(RecipeData):
    """Images with objects. The classes are the categories of the annotations, in the order of their ids.

    Images keep their size here: the detector resizes them (its options ``min_size`` and ``max_size``). Training leaves
    out crowds, boxes of less than a pixel within the image, for a Mask R-CNN objects without a mask and, unless
    ``keep_empty``, images without any other object; evaluation looks at all images, and matches detections with crowds
    as COCO does. In both, polygons of less than three points are left out.

    Args:
        root: folder with ``annotations`` and the folders of images.
        train: folder of the training images.
        val: folder of the images for evaluation.
        train_annotations: file, relative to ``root``; None for ``annotations/instances_TRAIN.json``.
        val_annotations: likewise; predict is content with a file that only lists images.
        hflip: probability of a horizontal flip in training.
        train_transform: instead of the flip: transforms of torchvision.transforms.v2 by name, e.g.
            ``[{"RandomPhotometricDistort": {}}, {"RandomHorizontalFlip": {"p": 0.5}}]``.
        keep_empty: train on images without objects too.
        predict_root: an image or a folder of images, in any depth, for predict; None for the images of ``val``.
        batch_size: images a device and forward pass in training.
        kwargs: of `RecipeData`.
    """

    def __init__(
        self,
        root: str = "data/coco",
        train: str = "train2017",
        val: str = "val2017",
        train_annotations: str | None = None,
        val_annotations: str | None = None,
        hflip: float = 0.5,
        train_transform: Transforms | None = None,
        keep_empty: bool = False,
        predict_root: str | None = None,
        batch_size: int = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size, **kwargs)
        self.save_hyperparameters(logger=False)
        if not 0 <= hflip <= 1:
            raise RecipeError(f"data.hflip is {hflip}, expected a value in [0, 1]")
        self.root, self.predict_root, self.keep_empty = Path(root), predict_root, keep_empty
        self.folders = {"train": train, "val": val}
        self.annotations = {"train": train_annotations, "val": val_annotations}
        if train_transform is None:
            train_transform = [{"RandomHorizontalFlip": {"p": hflip}}]
        clean = [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(labels_getter=_sanitized)]
        self.train_transform = v2.Compose([compose("train_transform", train_transform), *clean])
        self.classes: list[str] = []
        self.category_ids: list[int] = []
        self.image_ids: list[int] = []
        self.ids_listed = False

    @staticmethod
    def collate(batch: list[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:  # type: ignore[override]
        """Images of several sizes, and their targets."""
        images, targets = zip(*batch, strict=True)
        return list(images), list(targets)

    def setup(self, stage: str) -> None:
        """Read the annotations.

        Raises:
            RecipeError: a file or folder is missing or not as in COCO, or there is nothing to train on.
        """
        if stage == "predict":
            self._setup_predict()
            return
        val = self._read("val")
        val_samples = self._samples(val, "val")
        if stage == "fit":
            train = self._read("train")
            self._check_categories(train, val)
            self.train_samples = self._samples(train, "train")
            if not self.keep_empty:
                train.ids = [image for image in train.ids if self.train_samples.annotations[image]]
            if not train.ids:
                raise RecipeError(f"{self._file('train')} has no image with an object to train on")
        self.val_samples = val_samples

    def _samples(self, dataset: CocoFile, split: str) -> CocoImages:
        self._set_categories(dataset)
        masks = getattr(getattr(self.trainer, "lightning_module", None), "masks", True)
        training = split == "train"
        with _errors_of(dataset.file):
            annotations = dataset.by_image(masks, training)
        transform = self.train_transform if training else v2.Identity()
        return CocoImages(dataset, annotations, self.category_ids, transform, masks, training)

    def _check_categories(self, *datasets: CocoFile) -> None:
        train, val = ({number: entry["name"] for number, entry in data.categories.items()} for data in datasets)
        different = sorted(number for number in train.keys() | val.keys() if train.get(number) != val.get(number))
        if different:
            number = different[0]
            raise RecipeError(
                f"data.root={self.root}: {len(train)} categories in {self._file('train')} and {len(val)} in "
                f"{self._file('val')}, {len(different)} of which differ; first {number}: "
                f"{train.get(number, 'missing')} and {val.get(number, 'missing')}"
            )

    def _setup_predict(self) -> None:
        listed: Any = None
        if self.predict_root is None or self._file("val").is_file():
            listed = self._read("val", annotated=False)
            if not self.classes:
                self._set_categories(listed)
        root = Path(self.predict_root or self.root / self.folders["val"])
        if self.predict_root is None:
            self.image_ids, self.ids_listed = listed.ids, True
            paths = [Path(listed.root, listed.images[image]["file_name"]) for image in listed.ids]
            self.predict_samples = ImageFiles.to_predict(paths, root)
            return
        paths = find_images(root)
        self.predict_samples = ImageFiles.to_predict(paths, root)
        known: dict[str, int] = {}
        for number, image in (listed.images if listed else {}).items():
            known[str(Path(listed.root, image["file_name"]).resolve())] = number
        ids: list[Any] = [known.get(str(path.resolve())) for path in paths]
        self.ids_listed = None not in ids and len(set(ids)) == len(ids)
        if not self.ids_listed:
            numbers = [int(path.stem) for path in paths if path.stem.isdecimal()]
            unique = len(set(numbers)) == len(paths)
            ids = numbers if unique else list(range(len(paths)))
        self.image_ids = ids

    def _file(self, split: str) -> Path:
        return self.root / (self.annotations[split] or f"annotations/instances_{self.folders[split]}.json")

    def _read(self, split: str, annotated: bool = True) -> CocoFile:
        file, folder = self._file(split), self.root / self.folders[split]
        for path, found in ((file, file.is_file()), (folder, folder.is_dir())):
            if not found:
                raise RecipeError(
                    f"data.root={self.root}: there is no {path}; expected {self.root}/annotations/"
                    f"instances_{self.folders[split]}.json and {self.root}/{self.folders[split]}/IMAGE"
                )
        with _errors_of(file):
            return CocoFile(file, folder, annotated)

    def _set_categories(self, dataset: CocoFile) -> None:
        self.category_ids = sorted(dataset.categories)
        self.classes = [dataset.categories[category]["name"] for category in self.category_ids]

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"classes": self.classes, "category_ids": self.category_ids}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.classes and state["classes"] != self.classes:
            raise RecipeError(
                f"data.root={self.root} has the {len(self.classes)} categories {', '.join(self.classes[:5])}, ...; the "
                f"checkpoint knows {len(state['classes'])}: {', '.join(state['classes'][:5])}, ..."
            )
        self.classes, self.category_ids = state["classes"], state["category_ids"]


@contextlib.contextmanager
def _errors_of(file: Path) -> Iterator[None]:
    try:
        yield
    except Fault as fault:
        raise RecipeError(f"{file}: {fault}") from fault
    except KeyError as error:
        raise RecipeError(f"{file} is not in COCO's format: an entry lacks {error}") from error
    except (ValueError, AssertionError, TypeError, AttributeError) as error:
        raise RecipeError(f"{file} is not in COCO's format: {error}") from error
