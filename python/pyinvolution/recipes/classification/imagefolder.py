"""Images in a folder for each class, as ImageNet is commonly unpacked: ROOT/{train,val}/CLASS/IMAGE."""

from pathlib import Path
from typing import Any, Literal

import torch
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode

from pyinvolution.recipes.data import RecipeData
from pyinvolution.recipes.errors import RecipeError, require
from pyinvolution.recipes.images import find_images, is_hidden
from pyinvolution.recipes.samples import IMAGENET_MEAN, IMAGENET_STD, ImageFiles, Transforms, compose

__all__ = ["ImageFolderData"]


class VisibleFolder(ImageFolder):
    """torchvision's, without hidden folders and files; classes may be empty."""

    def __init__(self, root: str) -> None:
        super().__init__(root, is_valid_file=self._visible, allow_empty=True)

    def _visible(self, path: str) -> bool:
        return path.lower().endswith(IMG_EXTENSIONS) and not is_hidden(Path(path).relative_to(self.root))

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        names = [name for name in super().find_classes(directory)[0] if not is_hidden(Path(name))]
        if not names:
            raise FileNotFoundError(f"there is no class folder in {directory}")
        return names, {name: index for index, name in enumerate(names)}


class ImageFolderData(RecipeData):
    """An ImageFolder tree. Classes are the sorted names of the folders in ``train``, but for hidden ones (`is_hidden`).

    Args:
        root: folder with ``train`` and, for evaluation, ``val``, or ``test`` where there is no ``val``.
        size: height and width in pixels of the images the network sees.
        resize: length in pixels of the shorter side before the centre crop of evaluation.
        scale: smallest and largest area of the random crop of training, as a fraction of the image.
        ratio: smallest and largest width to height of the random crop.
        hflip: probability of a horizontal flip in training.
        interpolation: of resizing.
        mean: of the RGB channels in [0, 1], for normalisation.
        std: likewise.
        train_transform: instead of random crop and flip: transforms of torchvision.transforms.v2 by name, e.g.
            ``[{"RandomCrop": {"size": 32, "padding": 2}}]``. They take pixels (3, H, W), uint8; conversion to float and
            normalisation follow on the device.
        val_transform: instead of resize and centre crop, likewise.
        predict_root: an image or a folder of images, in any depth, for predict; None for the images of evaluation.
        held_out: share of the training images of every class to evaluate on, instead of ``val``: for choices that
            ``val`` must not see. They are the same for every seed; at least one image of a class stays on either side.
        kwargs: of `RecipeData`.
    """

    def __init__(
        self,
        root: str = "data/imagenet",
        size: int = 224,
        resize: int = 256,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear",
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        train_transform: Transforms | None = None,
        val_transform: Transforms | None = None,
        predict_root: str | None = None,
        held_out: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        require("data.held_out", held_out, 0 <= held_out < 1, "a value in [0, 1)")
        self.save_hyperparameters(logger=False)
        self.root, self.predict_root, self.held_out = Path(root), predict_root, held_out
        mode = InterpolationMode(interpolation)
        if train_transform is None:
            crop = {"size": size, "scale": scale, "ratio": ratio, "interpolation": mode}
            train_transform = [{"RandomResizedCrop": crop}, {"RandomHorizontalFlip": {"p": hflip}}]
        if val_transform is None:
            val_transform = [{"Resize": {"size": resize, "interpolation": mode}}, {"CenterCrop": {"size": size}}]
        # Of torchvision's transforms, only those of Pillow know Lanczos.
        first: Transforms = [{"ToPILImage": {}}] if interpolation == "lanczos" else []
        last: Transforms = [{"ToImage": {}}, {"ToPureTensor": {}}]
        self.train_transform = compose("train_transform", first + train_transform + last)
        self.val_transform = compose("val_transform", first + val_transform + last)
        self.normalization = mean, std
        self.classes: list[str] = []

    def setup(self, stage: str) -> None:
        """Find the images.

        Raises:
            RecipeError: a folder is missing, holds no images, or ``val`` has other classes than ``train``.
        """
        if stage == "predict":
            root = Path(self.predict_root or self.root / self._evaluated)
            self.predict_samples = ImageFiles.to_predict(find_images(root), root, self.val_transform)
            return
        if self.held_out:
            self._hold_out(self._folder("train"))
            return
        val = self._folder(self._evaluated)
        self.classes = val.classes
        if stage == "fit" or (self.root / "train").is_dir():
            train = self._folder("train")
            self.classes = train.classes
            if train.classes != val.classes:
                missing = sorted(set(train.classes) - set(val.classes))
                extra = sorted(set(val.classes) - set(train.classes))
                raise RecipeError(
                    f"data.root={self.root}: train has {len(train.classes)} classes and {self._evaluated} "
                    f"{len(val.classes)}; only in train: {_some(missing)}; only in {self._evaluated}: {_some(extra)}"
                )
            self.train_samples = ImageFiles(train.samples, self.train_transform)
        self.val_samples = ImageFiles(val.samples, self.val_transform)

    @property
    def _evaluated(self) -> str:
        """The folder for evaluation."""
        return "test" if (self.root / "test").is_dir() and not (self.root / "val").is_dir() else "val"

    def _hold_out(self, train: "VisibleFolder") -> None:
        self.classes = train.classes
        generator = torch.Generator().manual_seed(0)
        kept, held = [], []
        for target, name in enumerate(self.classes):
            files = [file for file in train.samples if file[1] == target]
            if len(files) < 2:
                raise RecipeError(
                    f"data.root={self.root}: class {name} has {len(files)} training images, too few to hold some out"
                )
            order = torch.randperm(len(files), generator=generator).tolist()
            count = min(max(round(self.held_out * len(files)), 1), len(files) - 1)
            held += [files[index] for index in order[:count]]
            kept += [files[index] for index in order[count:]]
        self.train_samples = ImageFiles(kept, self.train_transform)
        self.val_samples = ImageFiles(held, self.val_transform)

    def _folder(self, split: str) -> "VisibleFolder":
        folder = self.root / split
        if not folder.is_dir():
            raise RecipeError(
                f"data.root={self.root} has no folder {split!r}; expected {self.root}/train/CLASS/IMAGE and "
                f"{self.root}/val/CLASS/IMAGE"
            )
        try:
            found = VisibleFolder(str(folder))
        except FileNotFoundError as error:
            raise RecipeError(f"data.root={self.root}: {split}: {str(error).splitlines()[0]}") from error
        if empty := sorted(set(found.class_to_idx.values()) - set(found.targets)):
            names = _some([found.classes[index] for index in empty])
            raise RecipeError(
                f"data.root={self.root}: {len(empty)} of {len(found.classes)} class folders in {folder} hold no image "
                f"({', '.join(IMG_EXTENSIONS)}): {names}"
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"classes": self.classes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.classes and state["classes"] != self.classes:
            raise RecipeError(
                f"data.root={self.root} has the classes {_some(self.classes)}; "
                f"the checkpoint knows {_some(state['classes'])}"
            )
        self.classes = state["classes"]


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"
