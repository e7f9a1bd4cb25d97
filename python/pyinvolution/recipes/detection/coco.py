"""COCO (Lin et al., ECCV 2014) and data in its layout: ROOT/annotations/instances_SPLIT.json and ROOT/SPLIT/IMAGE."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection
from torchvision.transforms import v2

from pyinvolution.recipes.classification.imagefolder import ImageFiles, Transforms, compose, find_images
from pyinvolution.recipes.data import RecipeData, UnreadableSample
from pyinvolution.recipes.errors import RecipeError

__all__ = ["CocoData", "CocoImages", "Target"]

Target = dict[str, Any]
"""``boxes`` (objects, 4) as x1, y1, x2, y2, ``labels`` (objects,) from 1, ``iscrowd`` and ``area`` (objects,), perhaps
``masks`` (objects, H, W), and the ``image_id``, -1 in a sample that is to be left out."""


class CocoImages:
    """Pairs of image (3, H, W) in [0, 1] and `Target`.

    Args:
        dataset: whose images and annotations are read.
        category_ids: of the labels 1, 2, ...
        transform: of image and target together.
        masks: whether targets have them.
        crowd: whether targets have the annotations of crowds, which an evaluation needs and training does not.
    """

    def __init__(
        self, dataset: CocoDetection, category_ids: list[int], transform: Callable, masks: bool, crowd: bool
    ) -> None:
        self.dataset, self.transform, self.masks, self.crowd = dataset, transform, masks, crowd
        self.labels = {category: label for label, category in enumerate(category_ids, 1)}

    def __len__(self) -> int:
        return len(self.dataset.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image_id = self.dataset.ids[index]
        try:
            image, annotations = self.dataset[index]
            annotations = [a for a in annotations if self.crowd or not a.get("iscrowd", 0)]
            masks = self._masks(annotations, image.size[::-1]) if self.masks else None
        except Exception as error:  # decoders raise nearly anything on broken files
            path = Path(self.dataset.root, self.dataset.coco.imgs[image_id]["file_name"])
            raise UnreadableSample(f"cannot read image {path} or its masks: {error}") from error
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        target: Target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=image.size[::-1]),
            "labels": torch.tensor([self.labels[a["category_id"]] for a in annotations], dtype=torch.int64),
            "iscrowd": torch.tensor([a.get("iscrowd", 0) for a in annotations], dtype=torch.int64),
            "area": torch.tensor([a.get("area", a["bbox"][2] * a["bbox"][3]) for a in annotations]).float(),
            "image_id": image_id,
        }
        if masks is not None:
            target["masks"] = tv_tensors.Mask(masks)
        image, target = self.transform(tv_tensors.Image(image), target)
        plain = {
            key: value.as_subclass(Tensor) if isinstance(value, Tensor) else value for key, value in target.items()
        }
        return image.as_subclass(Tensor), plain

    def _masks(self, annotations: list[dict[str, Any]], size: tuple[int, int]) -> Tensor:
        masks = torch.zeros(len(annotations), *size, dtype=torch.uint8)
        for mask, annotation in zip(masks, annotations, strict=True):
            if annotation.get("segmentation"):
                mask.copy_(torch.from_numpy(self.dataset.coco.annToMask(annotation)))
        return masks

    def ignored(self, sample: tuple[Tensor, Target]) -> tuple[Tensor, Target]:
        return sample[0], sample[1] | {"image_id": -1}


def _sanitized(target: tuple[Any, Target]) -> tuple[Tensor, ...]:
    return tuple(target[1][key] for key in ("labels", "iscrowd", "area"))


class CocoData(RecipeData):
    """Images with objects. The classes are the categories of the annotations, in the order of their ids.

    Images keep their size here: the detector resizes them (its options ``min_size`` and ``max_size``). Training leaves
    out crowds, boxes of less than a pixel within the image and, unless ``keep_empty``, images without any other object;
    evaluation looks at all images, and matches detections with crowds as COCO does.

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
            raise RecipeError(f"data.hflip must be in [0, 1], got {hflip}")
        self.root, self.predict_root, self.keep_empty = Path(root), predict_root, keep_empty
        self.folders = {"train": train, "val": val}
        self.annotations = {"train": train_annotations, "val": val_annotations}
        to_float = [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)]
        if train_transform is None:
            train_transform = [{"RandomHorizontalFlip": {"p": hflip}}]
        clean = [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(labels_getter=_sanitized)]
        self.train_transform = v2.Compose([compose("train_transform", train_transform), *clean, *to_float])
        self.val_transform = v2.Compose(to_float)
        self.predict_transform = v2.Compose([v2.ToImage(), *to_float])
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
        masks = getattr(getattr(self.trainer, "lightning_module", None), "masks", True)
        val = self._read("val")
        if stage == "fit":
            train = self._read("train")
            if train.coco.cats.keys() != val.coco.cats.keys():
                raise RecipeError(
                    f"data.root={self.root}: {len(train.coco.cats)} categories in {self._file('train')} and "
                    f"{len(val.coco.cats)} others in {self._file('val')}"
                )
            if not self.keep_empty:
                train.ids = [image for image in train.ids if any(map(_usable, train.coco.imgToAnns[image]))]
            if not train.ids:
                raise RecipeError(f"{self._file('train')} has no image with an object that is not a crowd")
            self._set_categories(train)
            self.train_samples = CocoImages(train, self.category_ids, self.train_transform, masks, crowd=False)
        self._set_categories(val)
        self.val_samples = CocoImages(val, self.category_ids, self.val_transform, masks, crowd=True)

    def _setup_predict(self) -> None:
        listed = None
        if self.predict_root is None or self._file("val").is_file():
            listed = self._read("val", annotated=False)
            if not self.classes:
                self._set_categories(listed)
        if self.predict_root is None:
            self.image_ids, self.ids_listed = listed.ids, True
            paths = [Path(listed.root, listed.coco.imgs[image]["file_name"]) for image in listed.ids]
        else:
            paths = find_images(Path(self.predict_root))
            known = {
                Path(image["file_name"]).name: number for number, image in (listed.coco.imgs if listed else {}).items()
            }
            self.ids_listed = all(path.name in known for path in paths)
            numbered = all(path.stem.isdecimal() for path in paths)
            self.image_ids = [
                known[path.name] if self.ids_listed else int(path.stem) if numbered else index
                for index, path in enumerate(paths)
            ]
        self.predict_samples = ImageFiles([(str(path), i) for i, path in enumerate(paths)], self.predict_transform)

    def _file(self, split: str) -> Path:
        return self.root / (self.annotations[split] or f"annotations/instances_{self.folders[split]}.json")

    def _read(self, split: str, annotated: bool = True) -> CocoDetection:
        file, folder = self._file(split), self.root / self.folders[split]
        for path, found in ((file, file.is_file()), (folder, folder.is_dir())):
            if not found:
                raise RecipeError(
                    f"data.root={self.root}: there is no {path}; expected {self.root}/annotations/"
                    f"instances_{self.folders[split]}.json and {self.root}/{self.folders[split]}/IMAGE"
                )
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress
                dataset = CocoDetection(str(folder), str(file))
            coco = dataset.coco
            if not coco.imgs or (annotated and not coco.cats):
                raise ValueError("it lists no images or no categories")
            if annotated and "annotations" not in coco.dataset:
                raise ValueError("it has no annotations")
            names = [image["file_name"] for image in coco.imgs.values()]
            names += [category["name"] for category in coco.cats.values()]
            if not all(isinstance(name, str) for name in names):
                raise ValueError("names of files and categories must be text")
            unknown = {annotation["category_id"] for annotation in coco.anns.values()} - coco.cats.keys()
            if unknown:
                raise ValueError(f"annotations have categories that are not listed: {sorted(unknown)[:5]}")
            for annotation in coco.anns.values():
                box = annotation["bbox"]
                if len(box) != 4 or not all(isinstance(value, (int, float)) for value in box):
                    raise ValueError(f"the bbox of annotation {annotation['id']} is {annotation['bbox']}")
        except KeyError as error:
            raise RecipeError(f"{file} is not in COCO's format: an entry lacks {error}") from error
        except (ValueError, AssertionError, TypeError, AttributeError) as error:
            raise RecipeError(f"{file} is not in COCO's format: {error}") from error
        return dataset

    def _set_categories(self, dataset: CocoDetection) -> None:
        self.category_ids = sorted(dataset.coco.cats)
        self.classes = [dataset.coco.cats[category]["name"] for category in self.category_ids]

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


def _usable(annotation: dict[str, Any]) -> bool:
    return not annotation.get("iscrowd", 0) and min(annotation["bbox"][2:]) >= 1
