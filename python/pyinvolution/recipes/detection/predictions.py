"""What predict writes for a detector."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from pyinvolution.recipes.data import data_of
from pyinvolution.recipes.detection import pictures
from pyinvolution.recipes.distributed import from_all_processes
from pyinvolution.recipes.images import output_names

__all__ = ["CocoWriter"]


class CocoWriter(BasePredictionWriter):
    """Writes the detections in all images as COCO's results: a list of ``image_id``, ``category_id``, ``bbox`` (x, y,
    width, height), ``score`` and, from a Mask R-CNN, ``segmentation`` (compressed run lengths); and pictures of the
    first images to a folder of the same name.

    Images which no annotations list have the numbers that are their names, as in COCO, if these differ, else their
    places in the order of paths; and results have a ``file_name`` too, relative to ``predict_root``. Pictures are named
    by `output_names`.

    Args:
        output: the file.
        shown: number of pictures.
    """

    def __init__(self, output: str | Path, shown: int) -> None:
        super().__init__("batch")
        self.output, self.shown = Path(output), shown
        self._found: list[tuple[int, dict[str, list]]] = []
        self._names: list[str] = []

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data: Any = data_of(trainer)
        self._names = output_names(data.predict_samples.names)

    def write_on_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, prediction: list[tuple[int, dict, Any]], *args: Any
    ) -> None:
        data: Any = data_of(trainer)
        for index, found, scene in prediction:
            self._found.append((index, found))
            if scene is not None:
                path = self.output.with_suffix("") / f"{self._names[index]}.png"
                pictures.grid([scene], data.classes, path)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = from_all_processes(trainer, self._found)
        if not trainer.is_global_zero:
            return
        data: Any = data_of(trainer)
        results = []
        for index, image in sorted(found, key=lambda image: image[0]):
            common = {"image_id": data.image_ids[index]}
            if not data.ids_listed:
                common["file_name"] = data.predict_samples.names[index]
            masks = image.get("masks", [None] * len(image["boxes"]))
            for box, label, score, mask in zip(image["boxes"], image["labels"], image["scores"], masks, strict=True):
                x1, y1, x2, y2 = box
                result = {
                    **common,
                    "category_id": data.category_ids[label - 1] if data.category_ids else label,
                    "bbox": [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)],
                    "score": round(score, 6),
                }
                results.append(result if mask is None else result | {"segmentation": mask})
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text(json.dumps(results))
        rank_zero_info(f"{len(results)} objects in {len(found)} images: {self.output}")
        if self.shown:
            rank_zero_info(f"pictures: {self.output.with_suffix('')}")
