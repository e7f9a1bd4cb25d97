"""Image data sets of Hugging Face, of their hub or in parquet files, as a source of image classification."""

from collections.abc import Callable
from importlib.util import find_spec
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
        root: a folder with parquet files SPLIT*.parquet (also in ``data``), a folder that `datasets` has saved
            (``save_to_disk``), or an id of the hub such as ``uoft-cs/cifar10``, downloaded to the cache of `datasets`.
        train: name of the split for training.
        val: name of the split for evaluation.
        image: name of the column with the images.
        label: name of the column with the numbers of the classes.
        config: of a data set of the hub that has several.
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
            RecipeError: there are none, or they lack a split or a column, or a label is not the number of a class.
        """
        if stage == "predict":
            if self.predict_root is None:
                raise RecipeError("data.predict_root is None, expected an image or a folder of images")
            root = Path(self.predict_root)
            self.predict_samples = ImageFiles.to_predict(find_images(root), root, self.val_transform)
            return
        tables = self._load()
        if stage == "fit":
            self.train_samples = self._samples(tables, "train", self.train_transform)
        self.val_samples = self._samples(tables, "val", self.val_transform)

    def _load(self) -> Any:
        import datasets

        folder = Path(self.where)
        try:
            if not folder.is_dir():
                return datasets.load_dataset(self.where, self.config)
            if (folder / "dataset_dict.json").is_file():
                return datasets.load_from_disk(str(folder))
            files: dict[str, list[str]] = {}
            for split in self.splits.values():
                found = sorted(str(path) for path in folder.rglob(f"{split}*.parquet"))
                if found:
                    files[split] = found
            if not files:
                raise RecipeError(f"data.root={self.where}: expected parquet files {self.splits['train']}*.parquet and "
                                  f"{self.splits['val']}*.parquet, or what save_to_disk has written")  # fmt: skip
            return datasets.load_dataset("parquet", data_files=files)
        except RecipeError:
            raise
        except Exception as error:  # of the hub, the network, or a file
            raise RecipeError(f"data.root={self.where}: {' '.join(str(error).split())}") from error

    def _samples(self, tables: Any, split: str, transform: Callable[[Any], Tensor]) -> TableImages:
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
        labels = table.features[label]
        if isinstance(labels, datasets.ClassLabel):
            classes = list(labels.names)
        else:
            found = sorted(set(table[label]))
            if not found or not all(type(value) is int and value >= 0 for value in found):
                raise RecipeError(f"data.label is {label!r}, whose values are {found[:3]}, expected numbers from 0")
            classes = [str(number) for number in range(max(found[-1] + 1, len(self.classes)))]
        if len(classes) > len(self.classes):
            self.classes = classes
        return TableImages(table.select_columns([image, label]), image, label, transform, f"{self.where}, {name}")
