"""Images with a class for every pixel, in a folder of images and a folder of label maps, and the table of classes."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from pyinvolution.recipes.data import RecipeData, UnreadableSample
from pyinvolution.recipes.errors import RecipeError, require
from pyinvolution.recipes.images import find_images, is_hidden, is_image_name, read_pixels, upright
from pyinvolution.recipes.samples import IMAGENET_MEAN, IMAGENET_STD, ImageFiles

__all__ = ["IGNORED", "BalancedCrop", "ClassTable", "LabelMapData", "LabelledImages", "SegmentationData"]

IGNORED = 255
"""Train id of pixels that loss and metrics leave out."""
MOST = 255
"""Classes that a table can have: train ids are bytes, of which one is `IGNORED`."""


class ClassTable:
    """The classes of label maps: their names and colours, and how the values in the files become train ids.

    The train id of a class is its position in the table.

    Args:
        classes: for each class a mapping with its ``name`` and, where they are not by default, its ``color`` (RGB, 0 to
            255; by default one that is far from the others' and not among those given) and its ``values``: what its
            pixels are in the files, one value or a list, by default the position in the table, and in masks of ``rgb``
            the colour.
        ignored: further values, whose pixels loss and metrics leave out. Any other value is an error.
        rgb: whether the files hold colours (lists of three numbers), not numbers from 0 to 255.
        what: what the values are called in errors.

    Attributes:
        names: of the classes.
        palette: RGB (256, 3) by train id; black for what is ignored.
        values: what predict writes for each class (classes,): the first of its values; of ``rgb`` the train id.

    Raises:
        RecipeError: a class has no name, or one that is there already; a value belongs to two classes or is out of
            range; or there is no class, or more than 255.
    """

    def __init__(
        self,
        classes: Sequence[Mapping[str, Any]],
        ignored: Sequence[Any] = (),
        rgb: bool = False,
        what: str = "values of the table of classes",
    ) -> None:
        require("classes", len(classes), 1 <= len(classes) <= MOST, f"1 to {MOST} classes")
        self.plain = {"classes": [dict(entry) for entry in classes], "ignored": list(ignored), "rgb": bool(rgb)}
        self.names: list[str] = []
        self.rgb, self.what = rgb, what
        self.palette: NDArray[np.uint8] = np.zeros((256, 3), np.uint8)
        known: dict[int, int] = {}
        first: list[int] = []
        for index, entry in enumerate(classes):
            unknown = set(entry) - {"name", "color", "values"}
            if unknown or not isinstance(entry.get("name"), str) or entry["name"] in self.names:
                raise RecipeError(
                    f"classes[{index}] is {entry!r}, expected a name of its own, and perhaps color and values"
                )
            self.names.append(entry["name"])
            if "color" in entry:
                self.palette[index] = _color(entry["color"], f"color of {entry['name']}")
            values = entry.get("values", entry.get("color") if rgb else index)
            if not isinstance(values, Sequence) or (rgb and values and not isinstance(values[0], Sequence)):
                values = [values]
            codes = [self._code(value, f"values of {entry['name']}") for value in values]
            if not codes:
                raise RecipeError(f"values of {entry['name']} are {values!r}, expected at least one")
            first.append(codes[0])
            for code in codes:
                if known.setdefault(code, index) != index:
                    other = self.names[known[code]]
                    raise RecipeError(f"values of {entry['name']} are {values!r}, but {other} has one of them already")
        for value in ignored:
            code = self._code(value, "ignored")
            if known.setdefault(code, IGNORED) != IGNORED:
                raise RecipeError(f"ignored is {list(ignored)!r}, but {self.names[known[code]]} has one of its values")
        given = {tuple(entry["color"]) for entry in classes if "color" in entry}
        spare = map(_distinct, count(len(classes)))
        for index in (index for index, entry in enumerate(classes) if "color" not in entry):
            color = _distinct(index)
            while color in given:
                color = next(spare)
            self.palette[index] = color
        self._codes = np.array(sorted(known), np.int64)
        self._train_ids = np.array([known[code] for code in sorted(known)], np.uint8)
        self.values: NDArray[np.uint8] = np.array(range(len(first)) if rgb else first, np.uint8)

    @classmethod
    def read(cls, path: Path) -> "ClassTable":
        """The table in a YAML or JSON file with ``classes`` and perhaps ``ignored`` and ``rgb``.

        Raises:
            RecipeError: there is no such file, or it is not a table.
        """
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RecipeError(f"cannot read the table of classes {path}: {' '.join(str(error).split())}") from error
        return cls.of(content, str(path))

    @classmethod
    def of(cls, content: Any, where: str) -> "ClassTable":
        """The table that plain data describe; a `RecipeError` names ``where`` they are from."""
        lists = isinstance(content, Mapping) and all(
            isinstance(content.get(name, []), list) for name in ("classes", "ignored")
        )
        if not lists or not content.keys() <= {"classes", "ignored", "rgb"} or "classes" not in content:
            raise RecipeError(f"{where} is not a table of classes, expected lists classes and perhaps ignored, and rgb")
        if not all(isinstance(entry, Mapping) for entry in content["classes"]):
            raise RecipeError(f"{where}: classes is {content['classes']!r}, expected a list of mappings with a name")
        try:
            return cls(**content)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from error

    def _code(self, value: Any, where: str) -> int:
        """A number for each value or colour."""
        if self.rgb:
            red, green, blue = _color(value, where)
            return red << 16 | green << 8 | blue
        if type(value) is not int or not 0 <= value <= 255:
            raise RecipeError(f"{where}: {value!r}, expected a number from 0 to 255")
        return value

    def read_train_ids(self, path: str | Path) -> NDArray[np.uint8]:
        """The train ids (H, W) of the label map in a file.

        Unless the table is ``rgb``, the file has one value of 2, 4 or 8 bits for each pixel, and colours are not
        translated: a file with a palette holds the values as its indices. Its EXIF orientation is applied, as that of
        an image.

        Raises:
            UnreadableSample: the file is missing or damaged, or of another kind.
            RecipeError: it has a value that is not in the table.
        """
        try:
            with Image.open(path) as image:
                mode = image.mode
                # Pillow stretches grey of 2 and 4 bits to 0 ... 255.
                step = {"L;2": 85, "L;4": 17}.get(str(image.tile[0][-1]) if image.tile else "", 1)
                pixels = np.asarray(upright(image, self._opaque))
        except Exception as error:  # decoders raise nearly anything on broken files
            raise UnreadableSample(f"cannot read labels {path}: {error}") from error
        if self.rgb:
            if mode not in ("RGB", "RGBA", "P"):
                raise UnreadableSample(f"labels {path} are of mode {mode}, expected colours (mode RGB, RGBA or P)")
            codes = pixels.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
        elif mode not in ("L", "P"):
            raise UnreadableSample(f"labels {path} are of mode {mode}, expected one byte for each pixel (mode L or P)")
        else:
            codes = pixels.astype(np.int64) // step
        try:
            return self.train_ids(codes)
        except ValueError as error:
            raise RecipeError(f"labels {path} have {error}") from error

    def _opaque(self, image: Image.Image) -> Image.Image:
        """Colours alone, where the files hold them."""
        return image.convert("RGB") if self.rgb and image.mode in ("P", "RGBA") else image

    def train_ids(self, codes: NDArray[Any]) -> NDArray[np.uint8]:
        """Train ids (H, W) of values (H, W); a colour is red << 16 | green << 8 | blue.

        Raises:
            ValueError: a value is not in the table.
        """
        places = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)
        strange = self._codes[places] != codes
        if strange.any():
            value = int(codes[strange].min())
            text = f"colour {value >> 16}, {value >> 8 & 255}, {value & 255}" if self.rgb else f"value {value}"
            raise ValueError(f"the {text}, expected {self._expected()}")
        return self._train_ids[places]

    def _expected(self) -> str:
        """The values of the table, in runs."""
        if self.rgb:
            return f"one of the {len(self._codes)} colours of the table of classes"
        runs: list[list[int]] = []
        for code in self._codes.tolist():
            if runs and code == runs[-1][1] + 1:
                runs[-1][1] = code
            else:
                runs.append([code, code])
        texts = [f"{low} to {high}" if low < high else f"{low}" for low, high in runs]
        return f"the {self.what}, {' and '.join(filter(None, [', '.join(texts[:-1]), texts[-1]]))}"

    def picture(self, train_ids: NDArray[np.uint8]) -> Image.Image:
        """Picture with the colours of the classes, of train ids (H, W)."""
        picture = Image.fromarray(train_ids)
        picture.putpalette(self.palette.tobytes())
        return picture


def _color(value: Any, where: str) -> tuple[int, int, int]:
    valid = isinstance(value, Sequence) and len(value) == 3 and all(type(part) is int for part in value)
    if not valid or not all(0 <= part <= 255 for part in value):
        raise RecipeError(f"{where}: {value!r}, expected three numbers from 0 to 255 (red, green, blue)")
    red, green, blue = value
    return red, green, blue


def _distinct(index: int) -> tuple[int, int, int]:
    """A colour by the position of a class, as PASCAL VOC chooses them: the bits of index + 1, spread."""
    number, color = index + 1, [0, 0, 0]
    for bit in range(7, -1, -1):
        for channel in range(3):
            color[channel] |= (number >> channel & 1) << bit
        number >>= 3
    red, green, blue = color
    return red, green, blue


class OwnSizeJitter(v2.ScaleJitter):
    """`ScaleJitter` from each image's own size."""

    def __init__(self, scale: tuple[float, float]) -> None:
        super().__init__((1, 1), scale)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        scale = torch.empty(1).uniform_(*self.scale_range).item()
        return {"size": (max(round(height * scale), 1), max(round(width * scale), 1))}


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


class LabelledImages:
    """Pairs of image (3, H, W), uint8, and train ids (H, W, int64).

    Args:
        files: path of each image, and of its label map.
        transform: of image and mask together.
        table: of the classes.
    """

    def __init__(self, files: list[tuple[str, str]], transform: v2.Transform, table: ClassTable) -> None:
        self.files, self.transform, self.table = files, transform, table

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path, labels = self.files[index]
        image, train_ids = read_pixels(path), self.table.read_train_ids(labels)
        height, width = image.shape[-2:]
        if train_ids.shape != (height, width):
            raise UnreadableSample(
                f"labels {labels} have {train_ids.shape[1]} x {train_ids.shape[0]} pixels, expected {width} x {height} "
                f"as in {path}"
            )
        mask = tv_tensors.Mask(torch.from_numpy(train_ids))
        image, mask = self.transform(tv_tensors.Image(image), mask)
        return image.as_subclass(Tensor), mask.as_subclass(Tensor).long()

    def ignored(self, sample: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return sample[0], torch.full_like(sample[1], IGNORED)


class SegmentationData(RecipeData):
    """Images with a class for every pixel. Training sees random crops, evaluation whole images.

    Args:
        root: folder of the data.
        train: name of the training images' split.
        val: name of the split for evaluation.
        size: height and width that images are brought to before the random resize of training; None for each image's.
        scale: smallest and largest factor of the random resize.
        crop: height and width of the random crop of training.
        max_class_share: see `BalancedCrop`.
        hflip: probability of a horizontal flip.
        distortion: whether brightness, contrast, saturation and hue vary in training.
        mean: of the RGB channels in [0, 1], for normalisation.
        std: likewise.
        predict_root: an image or a folder of images, in any depth, for predict; None for the images of ``val``.
        batch_size: crops a device and forward pass in training.
        val_batch_size: whole images a device; more than 1 needs images of one size.
        kwargs: of `RecipeData`.
    """

    OF: ClassVar[str] = ""
    """What follows "split" in an error: of which data set."""
    folders: dict[str, str]
    """Of a split's "images" and "labels", relative to ``root``; ``{split}`` stands for its name."""
    table: ClassTable | None = None

    def __init__(
        self,
        root: str,
        train: str = "train",
        val: str = "val",
        size: tuple[int, int] | None = None,
        scale: tuple[float, float] = (0.5, 2.0),
        crop: tuple[int, int] = (512, 512),
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
            ("size", size, size is None or (len(size) == 2 and min(size) > 0), "two positive numbers, or None"),
            ("scale", scale, len(scale) == 2 and 0 < scale[0] <= scale[1], "two positive numbers in ascending order"),
            ("crop", crop, len(crop) == 2 and min(crop) > 0, "two positive numbers"),
            ("max_class_share", max_class_share, 0 < max_class_share <= 1, "a value in (0, 1]"),
            ("hflip", hflip, 0 <= hflip <= 1, "a value in [0, 1]"),
        ):
            require(f"data.{name}", value, valid, expected)
        self.root, self.predict_root = Path(root), predict_root
        self.splits = {"train": train, "val": val}
        self.classes: list[str] = []
        self.normalization = mean, std
        jitter = OwnSizeJitter if size is None else partial(v2.ScaleJitter, (size[1], size[0]))  # width before height
        self.train_transform = v2.Compose(
            [
                jitter((scale[0], scale[1])),
                BalancedCrop((crop[0], crop[1]), max_class_share, mean),
                v2.RandomHorizontalFlip(hflip),
                *([PhotometricDistortion()] if distortion else []),
            ]
        )

    def setup(self, stage: str) -> None:
        """Find the images, and read the table of classes.

        Raises:
            RecipeError: a folder, the table or the labels of an image are missing, or there is no image.
        """
        if stage == "predict":
            root = Path(self.predict_root or self.folder("images", "val"))
            paths = find_images(root)
            if self.predict_root is None:
                paths = [root / path for path in self._without_maps([path.relative_to(root) for path in paths], "val")]
            self.predict_samples = ImageFiles.to_predict(paths, root)
            self._set_table(required=False)  # else it comes from the checkpoint
            return
        self._set_table(required=True)
        assert self.table is not None
        if stage == "fit":
            self.train_samples = LabelledImages(self._find("train"), self.train_transform, self.table)
        self.val_samples = LabelledImages(self._find("val"), v2.Identity(), self.table)

    def _read_table(self, required: bool) -> ClassTable | None:
        """The table of classes; None if there is none and it is not ``required``."""
        raise NotImplementedError

    def _set_table(self, required: bool) -> None:
        self.table = self._read_table(required)
        self.classes = self.table.names if self.table else []

    def folder(self, kind: str, split: str) -> Path:
        """Of the "images" or "labels" of "train" or "val"."""
        return self.root / self.folders[kind].replace("{split}", self.splits[split])

    def expected(self, split: str) -> str:
        """What ``root`` must hold."""
        return f"expected {self.folder('images', split)}/A/NAME.jpg and {self.folder('labels', split)}/A/NAME.png"

    def name_of(self, path: str | Path) -> str:
        """What an image is called in results: its file name without the suffix."""
        return Path(path).stem

    def label_of(self, image: Path) -> Path:
        """Path of an image's label map in the folder of labels; both are relative."""
        return image.with_suffix(".png")

    def is_image(self, path: Path) -> bool:
        """Whether a file in the folder of images is one."""
        return is_image_name(path)

    def _find(self, split: str) -> list[tuple[str, str]]:
        """Paths of the images and of their labels, in an order that is the same on every machine."""
        images, labels = self.folder("images", split), self.folder("labels", split)
        for folder in (images, labels):
            if not folder.is_dir():
                raise RecipeError(
                    f"data.root={self.root} has no split {self.splits[split]!r}{self.OF}: {folder} is not a folder; "
                    f"{self.expected(split)}"
                )
        found = sorted(path.relative_to(images) for path in images.rglob("*") if self.is_image(path))
        found = self._without_maps([path for path in found if not is_hidden(path)], split)
        if not found:
            raise RecipeError(f"data.root={self.root}: no images; {self.expected(split)}")
        pairs = [(str(images / path), str(labels / self.label_of(path))) for path in found]
        taken: dict[str, str] = {}
        for image, label in pairs:
            if taken.setdefault(label, image) != image:
                raise RecipeError(
                    f"data.root={self.root}: {taken[label]} and {image} have one label map, {label}, expected one for "
                    "each image"
                )
        missing = [label for _, label in pairs if not Path(label).is_file()]
        if missing:
            raise RecipeError(
                f"data.root={self.root}: labels of {len(missing)} images are missing, first {missing[0]}; "
                f"{self.expected(split)}"
            )
        return pairs

    def _without_maps(self, found: list[Path], split: str) -> list[Path]:
        """Of relative paths in the folder of images those that are not label maps: both may be in one folder."""
        images, labels = (self.folder(kind, split).resolve() for kind in ("images", "labels"))
        maps = {labels / self.label_of(path) for path in found if labels / self.label_of(path) != images / path}
        return [path for path in found if images / path not in maps]

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | ({"table": self.table.plain} if self.table else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if "table" not in state:  # of earlier versions, which knew Cityscapes only
            return
        self.check_table(state["table"])

    def check_table(self, content: Any) -> None:
        """Take a checkpoint's table of classes, where there is none yet.

        Raises:
            RecipeError: there is another.
        """
        theirs = ClassTable.of(content, "the checkpoint's table of classes")
        if self.table and self.table.names != theirs.names:
            raise RecipeError(
                f"data.table has the classes {', '.join(self.table.names)}; the checkpoint knows "
                f"{', '.join(theirs.names)}"
            )
        if not self.table:
            self.table, self.classes = theirs, theirs.names


class LabelMapData(SegmentationData):
    """`SegmentationData` in a folder of images and a folder of label maps, with a table of classes: data of one's own.

    Args:
        root: folder of the data.
        images: folder of a split's images, in any depth, relative to ``root``; ``{split}`` stands for its name.
        labels: folder of their label maps, likewise; it may be the same folder. The map of the image A/NAME.jpg is
            A/NAME.png, which is not taken for an image then.
        table: of the classes, with ``classes``, ``ignored`` and ``rgb`` as for `ClassTable`: a YAML or JSON file
            relative to ``root``, or its content.
        kwargs: of `SegmentationData`.
    """

    def __init__(
        self,
        root: str = "data/segmentation",
        images: str = "images/{split}",
        labels: str = "labels/{split}",
        table: str | dict[str, Any] = "classes.yaml",
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        self.folders = {"images": images, "labels": labels}
        self.given_table = table

    def _read_table(self, required: bool) -> ClassTable | None:
        given = self.given_table
        if not isinstance(given, str):
            return ClassTable.of(given, "data.table")
        path = self.root / given
        return ClassTable.read(path) if required or path.is_file() else None
