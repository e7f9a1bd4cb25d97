"""What predict writes for a segmentation model."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor

from pyinvolution.recipes.data import data_of
from pyinvolution.recipes.distributed import from_all_processes
from pyinvolution.recipes.images import output_names

__all__ = ["SegmentationWriter"]


class SegmentationWriter(BasePredictionWriter):
    """Writes two PNG files for every image, of its size: ``labelIds/NAME_labelIds.png``, in the values of the table of
    classes (`ClassTable.values`; those of Cityscapes are the ids of the benchmark), and ``colors/NAME.png`` in the
    colours of the classes.

    NAME is CITY_SEQUENCE_FRAME in Cityscapes, so that ``labelIds`` can be submitted, or evaluated by its scripts, as it
    is. Elsewhere it is as `output_names` makes it of the image's path relative to ``predict_root``.

    Args:
        output: folder.
    """

    def __init__(self, output: str | Path) -> None:
        super().__init__("batch")
        self.output = Path(output)
        self._names: list[str] = []
        self._written: list[int] = []

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data: Any = data_of(trainer)
        self._names = output_names([_short(data, name) for name in data.predict_samples.names])

    def write_on_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, prediction: tuple[Tensor, Tensor], *args: Any
    ) -> None:
        data: Any = data_of(trainer)
        for index, train_ids in zip(prediction[0].tolist(), prediction[1].cpu().numpy(), strict=True):
            name = self._names[index]
            for picture, path in (
                (Image.fromarray(data.table.values[train_ids]), self.output / "labelIds" / f"{name}_labelIds.png"),
                (data.table.picture(train_ids), self.output / "colors" / f"{name}.png"),
            ):
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
            self._written.append(index)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        count = len(from_all_processes(trainer, self._written))
        rank_zero_info(f"predictions of {count} images: {self.output}/labelIds and {self.output}/colors")


def _short(data: Any, name: str) -> str:
    """The relative path ``name`` with what the data call the image."""
    return Path(name).with_name(f"{data.name_of(name)}{Path(name).suffix}").as_posix()
