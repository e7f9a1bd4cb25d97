"""Image data sets of Hugging Face, of their hub or in parquet files, as a source of image classification."""

import re
from collections.abc import Callable
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision import tv_tensors

from pyinvolution.recipes.classification.imagefolder import ImageFolderData
from pyinvolution.recipes.data import UnreadableSample
from pyinvolution.recipes.errors import RecipeError
from pyinvolution.recipes.images import find_images, read_pixels
from pyinvolution.recipes.samples import IGNORED, ImageFiles

__all__ = ["HuggingFaceData", "TableImages"]


class TableImages:
    """Pairs of image and target, of the rows of a table (map-style: any row can be read at any time).

    Args:
        table: a split as `datasets` gives it, whose images are not decoded.
        image: name of the column with the encoded images: mappings with ``bytes`` or a ``path``.
        label: name of the column with the number of the class.
        transform: from pixels (3, H, W), uint8, to what a batch is made of.
        where: of the data, for errors.
    """

    def __init__(self, table: Any, image: str, label: str, transform: Callable[[Any], Tensor], where: str) -> None:
        self.table, self.image, self.label = table, image, label
        self.transform, self.where = transform, where

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self.table[index]
        encoded, name = row[self.image], f"{index} of {self.where}"
        content = encoded.get("bytes") or encoded.get("path") if isinstance(encoded, dict) else encoded
        if not isinstance(content, (bytes, str)):
            raise UnreadableSample(f"cannot read image {name}: {self.image} holds a {type(content).__name__}")
        return self.transform(tv_tensors.Image(read_pixels(content, name))), row[self.label]

    def ignored(self, sample: tuple[Tensor, int]) -> tuple[Tensor, int]:
        return sample[0], IGNORED


class HuggingFaceData(ImageFolderData):
    """Images of a data set of Hugging Face, read through `datasets` (the extra ``hub``) as tables on disk, so
    that an interrupted run is resumed as exactly as with files.

    Args:
        root: a folder with parquet files, SPLIT.parquet or SPLIT-00000-of-00001.parquet and so on, or with a folder
            ``data`` of them; a folder that `datasets` has saved (``save_to_disk``); or an id of the hub such as
            ``uoft-cs/cifar10``, downloaded to the cache of `datasets`.
        train: name of the split for training.
        val: name of the split for evaluation.
        image: name of the column with the images.
        label: name of the column with the numbers of the classes, from 0, of every image. Names of the classes, where
            it has them, must be the same in both splits.
        config: of a data set of the hub that has several; of a folder the name of one in it, which is read instead.
        kwargs: of `ImageFolderData`; ``predict`` needs ``predict_root``.

    Raises:
        RecipeError: `datasets` is not installed.
    """

    def __init__(
        self,
        root: str = "data/imagenet",
        train: str = "train",
        val: str = "validation",
        image: str = "image",
        label: str = "label",
        config: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        if find_spec("datasets") is None:
            raise RecipeError('data.class_path=HuggingFaceData needs datasets: pip install "pyinvolution[hub]"')
        if self.held_out:
            raise RecipeError(f"data.held_out is {self.held_out}, expected 0 with data of Hugging Face: name a split")
        self.where, self.splits = root, {"train": train, "val": val}
        self.columns, self.config = (image, label), config

    def setup(self, stage: str) -> None:
        """Open the tables.

        Raises:
            RecipeError: there are none, or they lack a split or a column; a label is not the number of a class; or the
                splits name the classes differently.
        """
        if stage == "predict":
            if self.predict_root is None:
                raise RecipeError("data.predict_root is None, expected an image or a folder of images")
            root = Path(self.predict_root)
            self.predict_samples = ImageFiles.to_predict(find_images(root), root, self.val_transform)
            return
        loaded = self._load()
        # Labels without names may not all occur in the split for evaluation.
        used = [split for split in ("train", "val") if stage == "fit" or split == "val" or self.splits[split] in loaded]
        tables = {split: self._table(loaded, split) for split in used}
        self.classes = self._classes(tables)
        if stage == "fit":
            self.train_samples = self._samples(tables, "train", self.train_transform)
        self.val_samples = self._samples(tables, "val", self.val_transform)

    def _load(self) -> Any:
        import datasets

        try:
            if not Path(self.where).is_dir():
                return datasets.load_dataset(self.where, self.config)
            folder = Path(self.where, self.config or "")
            if (folder / "dataset_dict.json").is_file():
                return datasets.load_from_disk(str(folder))
            return datasets.load_dataset("parquet", data_files=self._files(folder))
        except RecipeError:
            raise
        except Exception as error:  # of the hub, the network, or a file
            raise RecipeError(f"data.root={self.where}: {' '.join(str(error).split())}") from error

    def _files(self, folder: Path) -> dict[str, list[str]]:
        """The parquet files of each split that has some."""
        names = {split: re.compile(rf"{re.escape(split)}([-.]\d.*)?\.parquet") for split in self.splits.values()}
        there = [path for place in (folder, folder / "data") if place.is_dir() for path in sorted(place.iterdir())]
        found = {split: [path for path in there if name.fullmatch(path.name)] for split, name in names.items()}
        places = sorted({str(path.parent) for paths in found.values() for path in paths})
        if not places:
            shown = " and ".join(f"{split}.parquet or {split}-00000-of-00001.parquet ..." for split in names)
            raise RecipeError(
                f"data.root={self.where}: expected files {shown} in {folder} or {folder / 'data'}, or what "
                "save_to_disk has written; data.config names a folder in data.root"
            )
        if len(places) > 1:
            raise RecipeError(
                f"data.root={self.where}: files of the splits in {' and '.join(places)}, expected them in one folder"
            )
        return {split: [str(path) for path in paths] for split, paths in found.items() if paths}

    def _table(self, tables: Any, split: str) -> Any:
        """The columns of a split that are read."""
        import datasets

        name = self.splits[split]
        if name not in tables:
            raise RecipeError(f"data.{split} is {name!r}, expected a split of {self.where}: {', '.join(tables)}")
        table, (image, label) = tables[name], self.columns
        for argument, column in (("image", image), ("label", label)):
            if column not in table.column_names:
                known = ", ".join(table.column_names)
                raise RecipeError(f"data.{argument} is {column!r}, expected a column of {self.where}: {known}")
        if isinstance(table.features[image], datasets.Image):
            table = table.cast_column(image, datasets.Image(decode=False))  # read_pixels decodes
        return table.select_columns([image, label])

    def _classes(self, tables: dict[str, Any]) -> list[str]:
        """The names of the classes; their numbers, where no table names them."""
        import datasets

        label = self.columns[1]
        kinds = {self.splits[split]: table.features[label] for split, table in tables.items()}
        named = {name: list(kind.names) for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)}
        names = next(iter(named.values()), None)
        for split, theirs in named.items():
            for number, (one, other) in enumerate(zip_longest(names or [], theirs, fillvalue="missing")):
                if one != other:
                    first = next(iter(named))
                    raise RecipeError(
                        f"data.root={self.where}: the {len(named[first])} classes of {first} and {len(theirs)} of "
                        f"{split} differ, first number {number}: {one} and {other}"
                    )
        count = 0
        for split, table in tables.items():
            for index, value in enumerate(table.select_columns([label])[:][label]):
                if type(value) is not int or value < 0 or (names is not None and value >= len(names)):
                    expected = "a number from 0" + (f" to {len(names) - 1}" if names else "")
                    raise RecipeError(
                        f"data.label is {label!r}, which is {value!r:.60} for image {index} of {self.splits[split]}, "
                        f"expected {expected}"
                    )
                count = max(count, value + 1)
        return [str(number) for number in range(count)] if names is None else names

    def _samples(self, tables: dict[str, Any], split: str, transform: Callable[[Any], Tensor]) -> TableImages:
        return TableImages(tables[split], *self.columns, transform, f"{self.where}, {self.splits[split]}")
