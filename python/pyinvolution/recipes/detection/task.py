"""Detection and instance segmentation: the COCO recipe of the paper (appendix A.2)."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from pycocotools import mask as rle
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision

from pyinvolution.models.loading import load_backbone
from pyinvolution.recipes.data import data_of
from pyinvolution.recipes.detection import pictures
from pyinvolution.recipes.detection.coco import Target
from pyinvolution.recipes.detection.predictions import CocoWriter
from pyinvolution.recipes.errors import RecipeError, naming, require
from pyinvolution.recipes.recipe import Recipe, build_net
from pyinvolution.recipes.samples import IGNORED

__all__ = ["Detection"]

METRICS = {
    "map": "ap",
    "map_50": "ap50",
    "map_75": "ap75",
    "map_small": "ap_small",
    "map_medium": "ap_medium",
    "map_large": "ap_large",
}
_LOSSES = {"classification": "loss_classifier", "bbox_regression": "loss_box_reg"}


class Detection(Recipe):
    """The losses of torchvision's detectors; COCO's AP of boxes and, of a Mask R-CNN, of masks.

    Validation logs ``val/box_ap``, ``val/box_ap50``, ..., ``val/mask_ap`` as shares of 1 (-1 where there is no such
    object) and draws its first images to ``detections.png`` in the run's folder.

    Args:
        name: of the model, as in `pyinvolution.models.list_models`, or "mask_rcnn", "faster_rcnn" or "retinanet" with
            the options ``backbone`` and ``backbone_options``.
        num_classes: classes of the data and background.
        options: further arguments of `pyinvolution.models.create_model`, e.g. ``{"neck": "involution"}``.
        backbone_weights: file with the backbone's weights, e.g. an ImageNet classifier's: an official checkpoint or one
            of this library. A whole detector is read by ``init_from``.
        mask_threshold: probability from which a pixel belongs to an object.
        shown: number of images that validation and predict draw.
        kwargs: of `Recipe`.
    """

    monitor, monitor_title = "val/box_ap", "Box AP (%)"
    output = "predictions.json"

    def __init__(
        self,
        name: str = "mask_rcnn_rednet50",
        num_classes: int = 81,
        options: dict[str, Any] | None = None,
        backbone_weights: str | None = None,
        mask_threshold: float = 0.5,
        shown: int = 12,
        **kwargs: Any,
    ) -> None:
        require("model.mask_threshold", mask_threshold, 0 < mask_threshold < 1, "a value in (0, 1)")
        require("model.shown", shown, shown >= 0, "at least 0")
        net = build_net(name, num_classes, options)
        require("model.name", name, hasattr(net, "transform"), "a detector, such as mask_rcnn_rednet50")
        super().__init__(net, **kwargs)
        self.save_hyperparameters(logger=False)
        self.num_classes, self.mask_threshold, self.shown = num_classes, mask_threshold, shown
        self.masks = hasattr(net, "roi_heads") and net.roi_heads.has_mask()
        self.pretrained = not (backbone_weights is None and kwargs.get("init_from") is None)
        if backbone_weights is not None:
            with naming("model.backbone_weights"):
                load_backbone(net.backbone.body, backbone_weights)
        kinds: tuple[Literal["bbox", "segm"], ...] = ("bbox", "segm") if self.masks else ("bbox",)
        self.net.backbone.register_forward_pre_hook(self._to_memory_format)
        self.val_ap = MeanAveragePrecision(iou_type=kinds)
        self.val_ap.warn_on_many_detections = False  # COCO counts 100 an image
        self._scenes: list[pictures.Scene] = []

    @property
    def compiled_part(self) -> nn.Module:
        return self.net.backbone  # the rest depends on what is in the images

    def _to_memory_format(self, backbone: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        return (self.images(arguments[0]),)

    def prediction_writer(self, output: Path) -> CocoWriter:
        return CocoWriter(output, self.shown)

    def setup(self, stage: str) -> None:
        classes = data_of(self.trainer).classes
        if classes and len(classes) + 1 != self.num_classes:
            raise RecipeError(
                f"model.num_classes is {self.num_classes}, but the data has {len(classes)} classes "
                f"({', '.join(classes[:3])}, ...) and background: set --model.num_classes {len(classes) + 1}"
            )
        frozen = [name for name, parameter in self.net.backbone.named_parameters() if not parameter.requires_grad]
        if stage == "fit" and frozen and not self.pretrained and not self.trainer.ckpt_path:
            rank_zero_warn(
                f"{len(frozen)} parameters of the backbone stay at their random values, because its first stages are "
                "frozen: give ImageNet weights by --model.backbone_weights, or train all with "
                "--model.options.backbone_options.frozen_stages=-1"
            )

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Detections in images (3, H, W) of values in [0, 1]: ``boxes``, ``labels``, ``scores`` and, from a Mask R-CNN,
        ``masks`` (bool, objects, H, W)."""
        found = self.net(images)
        for detections in found:
            if "masks" in detections:
                detections["masks"] = detections["masks"][:, 0] >= self.mask_threshold
        return found

    def observe(self, images: Any) -> None:
        self.net(images)

    def training_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> Tensor:
        images, targets = batch
        wanted = ("boxes", "labels", "masks") if self.masks else ("boxes", "labels")
        losses = self.net(images, [{name: target[name] for name in wanted} for target in targets])
        loss = sum(losses.values())
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        self.log_dict(
            {f"train/{_LOSSES.get(name, name)}": value for name, value in losses.items()}, batch_size=len(images)
        )
        return loss

    def validation_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> None:
        images, targets = batch
        for image, target, found in zip(images, targets, self(images), strict=True):
            truth = {name: value for name, value in target.items() if isinstance(value, Tensor)}
            if target["image_id"] < 0:
                # Without objects it counts for nothing, but the processes must have the same number of images.
                found, truth = ({name: value[:0] for name, value in side.items()} for side in (found, truth))
            elif len(self._scenes) < self.shown:
                self._scenes.append(pictures.Scene.of(image, found, truth))
            self.val_ap.update([found], [truth])

    def on_validation_epoch_end(self) -> None:
        result = self.val_ap.compute()
        self.val_ap.reset()
        for kind, name in (("bbox_" if self.masks else "", "box"), ("segm_", "mask")):
            for theirs, ours in METRICS.items():
                if kind + theirs in result:
                    # The same in all processes, but Lightning cannot know.
                    value = result[kind + theirs].to(self.device)
                    self.log(f"val/{name}_{ours}", value, prog_bar=ours == "ap50", sync_dist=True)
        scenes, self._scenes = self._scenes, []
        if scenes and self.trainer.is_global_zero and not self.trainer.sanity_checking:
            path = Path(self.trainer.default_root_dir, "detections.png")
            pictures.grid(scenes, data_of(self.trainer).classes, path)

    def predict_step(
        self, batch: tuple[list[Tensor], list[int]], batch_idx: int
    ) -> list[tuple[int, dict[str, Any], pictures.Scene | None]]:
        """Of every image its index, the ``boxes``, ``labels``, ``scores`` and run-length encoded ``masks`` found in it
        as lists, and what to draw if it is one of the first."""
        images, indices = batch
        results = []
        for image, index, found in zip(images, indices, self(images), strict=True):
            if index == IGNORED:
                continue
            scene = pictures.Scene.of(image, found) if index < self.shown else None
            if "masks" in found:
                found["masks"] = [encode(mask) for mask in found["masks"].cpu().numpy()]
            results.append((index, {k: v.tolist() if isinstance(v, Tensor) else v for k, v in found.items()}, scene))
        return results


def encode(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """COCO's compressed run lengths of a mask (H, W)."""
    encoded = rle.encode(np.asfortranarray(mask, np.uint8))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}
