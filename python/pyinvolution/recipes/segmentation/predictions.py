"""What predict writes for a segmentation model."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor

from pyinvolution.recipes.segmentation.cityscapes import IMAGE_SUFFIX, LABEL_IDS, colors

__all__ = ["SegmentationWriter"]


class SegmentationWriter(BasePredictionWriter):
    """Writes two PNG files for every image, of its size: ``labelIds/NAME_labelIds.png``, in the ids of the benchmark,
    and ``colors/NAME.png`` in the colours of the classes.

    NAME is CITY_SEQUENCE_FRAME in Cityscapes, so that ``labelIds`` can be submitted, or evaluated by its scripts, as it
    is. Elsewhere it is the name of the image's file, after its folders where the file's alone is not unique.

    Args:
        output: folder.
    """

    def __init__(self, output: str | Path) -> None:
        super().__init__("batch")
        self.output = Path(output)
        self._names: list[str] = []

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._names = names([path for path, _ in trainer.datamodule.predict_samples.files])
        for folder in ("labelIds", "colors"):
            (self.output / folder).mkdir(parents=True, exist_ok=True)

    def write_on_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, prediction: tuple[Tensor, Tensor], *args: Any
    ) -> None:
        for index, train_ids in zip(prediction[0].tolist(), prediction[1].cpu().numpy(), strict=True):
            name = self._names[index]
            Image.fromarray(LABEL_IDS[train_ids]).save(self.output / "labelIds" / f"{name}_labelIds.png")
            colors(train_ids).save(self.output / "colors" / f"{name}.png")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        rank_zero_info(f"predictions of {len(self._names)} images: {self.output}/labelIds and {self.output}/colors")


def names(paths: list[str]) -> list[str]:
    """A unique name for each image."""
    short = [Path(path).name.removesuffix(IMAGE_SUFFIX) for path in paths]
    short = [name if name != Path(path).name else Path(path).stem for name, path in zip(short, paths, strict=True)]
    count = Counter(short)
    if len(count) == len(paths):
        return short
    root = os.path.commonpath(paths)
    long = ["_".join(Path(path).relative_to(root).parts).replace(".", "_") for path in paths]
    return [name if count[name] == 1 else other for name, other in zip(short, long, strict=True)]
