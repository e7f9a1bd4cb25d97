"""What predict writes for a classifier."""

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from pyinvolution.recipes.data import data_of
from pyinvolution.recipes.distributed import from_all_processes

__all__ = ["PredictionWriter"]


class PredictionWriter(BasePredictionWriter):
    """Writes a CSV file with the path, the best classes and their probabilities for every image, in the order of paths.

    Args:
        output: the file.
    """

    def __init__(self, output: str | Path) -> None:
        super().__init__("batch")
        self.output = Path(output)
        self._rows: list[tuple[int, list[int], list[float]]] = []

    def write_on_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, prediction: tuple[Tensor, Tensor, Tensor], *args: Any
    ) -> None:
        self._rows += zip(*(tensor.tolist() for tensor in prediction), strict=True)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        rows = from_all_processes(trainer, self._rows)
        if not trainer.is_global_zero:
            return
        data: Any = data_of(trainer)
        files, names = data.predict_samples.files, data.classes
        count = len(rows[0][1]) if rows else 0
        self.output.parent.mkdir(parents=True, exist_ok=True)
        # A file's name need not be UTF-8: its bytes are written as they are.
        with self.output.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(["path", *(f"{field}_{k + 1}" for k in range(count) for field in ("class", "probability"))])
            for index, classes, probabilities in sorted(rows):
                best = [(names[c] if names else c, f"{p:.6f}") for c, p in zip(classes, probabilities, strict=True)]
                writer.writerow([files[index][0], *(value for pair in best for value in pair)])
        rank_zero_info(f"predictions of {len(rows)} images: {self.output}")
