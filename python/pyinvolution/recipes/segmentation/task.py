"""Semantic segmentation: the Cityscapes recipe of the paper (appendix A.3)."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassJaccardIndex

from pyinvolution.models.loading import load_backbone
from pyinvolution.recipes.data import data_of
from pyinvolution.recipes.errors import RecipeError, naming, require
from pyinvolution.recipes.recipe import Recipe, build_net
from pyinvolution.recipes.segmentation.inference import flipped, sliding_window
from pyinvolution.recipes.segmentation.label_maps import IGNORED
from pyinvolution.recipes.segmentation.predictions import SegmentationWriter
from pyinvolution.recipes.segmentation.regions import RegionSizeIoU

__all__ = ["Segmentation"]


class Segmentation(Recipe):
    """Cross entropy over the labelled pixels; mean intersection over union (mIoU) of the classes, over all images.

    Args:
        name: of the model, as in `pyinvolution.models.list_models`, or "semantic_fpn" or "upernet" with the option
            ``backbone``.
        num_classes: classes of the data.
        options: further arguments of `pyinvolution.models.create_model`, e.g. ``{"neck": "involution"}``.
        backbone_weights: file with the backbone's weights, e.g. an ImageNet classifier's: an official checkpoint or one
            of this library. A whole segmentation model is read by ``init_from``.
        auxiliary_weight: of the loss of UPerNet's auxiliary head.
        inference: "whole" images, or "slide": a window of ``window`` over them (`sliding_window`).
        window: height and width.
        window_stride: rows and columns between two windows.
        flip: average the probabilities over each image and its mirror image, in evaluation.
        region_sizes: in pixels, ascending; the mIoU of regions below each, and of those from the last one on, is logged
            as well (`RegionSizeIoU`). Empty for no such measure, which takes some 50 ms an image of 360 x 480.
        kwargs: of `Recipe`.
    """

    monitor, monitor_title = "val/miou", "Mean IoU (%)"
    output = "predictions"

    def __init__(
        self,
        name: str = "semantic_fpn_rednet50",
        num_classes: int = 19,
        options: dict[str, Any] | None = None,
        backbone_weights: str | None = None,
        auxiliary_weight: float = 0.4,
        inference: Literal["whole", "slide"] = "whole",
        window: tuple[int, int] = (512, 1024),
        window_stride: tuple[int, int] = (341, 683),
        flip: bool = False,
        region_sizes: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        require("model.auxiliary_weight", auxiliary_weight, auxiliary_weight >= 0, "at least 0")
        require("model.inference", inference, inference in ("whole", "slide"), "'whole' or 'slide'")
        within = all(1 <= step <= extent for step, extent in zip(window_stride, window, strict=True))
        require("model.window_stride", window_stride, within, f"a value from 1 to window={window}")
        net = build_net(name, num_classes, options)
        is_segmentation = hasattr(net, "decode_head")
        require("model.name", name, is_segmentation, "a segmentation model, such as semantic_fpn_rednet50")
        net.return_auxiliary = auxiliary_weight > 0
        if backbone_weights is not None:
            with naming("model.backbone_weights"):
                load_backbone(net.backbone, backbone_weights)
        super().__init__(net, **kwargs)
        self.save_hyperparameters(logger=False)
        self.num_classes, self.auxiliary_weight = num_classes, auxiliary_weight
        self.window = ((window[0], window[1]), (window_stride[0], window_stride[1])) if inference == "slide" else None
        self.flip = flip
        iou = MulticlassJaccardIndex(
            # Without validation of the arguments, which waits for the GPU. Classes that nowhere occur are NaN.
            num_classes,
            average="none",
            ignore_index=IGNORED,
            validate_args=False,
            zero_division=torch.nan,
        )
        self.train_iou, self.val_iou = iou, iou.clone()
        with naming("model.region_sizes"):
            self.val_region_iou = RegionSizeIoU(num_classes, region_sizes) if region_sizes else None
        self.val_loss = MeanMetric(nan_strategy="disable")  # else it drops them

    def prediction_writer(self, output: Path) -> SegmentationWriter:
        return SegmentationWriter(output)

    def setup(self, stage: str) -> None:
        classes = data_of(self.trainer).classes
        if classes and len(classes) != self.num_classes:
            raise RecipeError(
                f"model.num_classes is {self.num_classes}, but the data has {len(classes)} classes "
                f"({', '.join(classes[:3])}, ...): set --model.num_classes {len(classes)}"
            )

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes, H, W) of normalised images (N, 3, H, W); log-probabilities with ``flip``."""
        net = self.net
        if self.window:
            net = partial(sliding_window, net, window=self.window[0], stride=self.window[1])
        images = self.images(images)
        return flipped(net, images) if self.flip else net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        outputs = self.net(self.images(images))
        logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = _loss(logits, targets)
        for other in auxiliary:
            loss = loss + self.auxiliary_weight * _loss(other, targets)
        self.train_iou.update(logits.detach(), targets)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self._log_iou(self.train_iou, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, targets = batch
        logits = self(images)
        self.val_iou.update(logits, targets)
        if self.val_region_iou is not None:
            self.val_region_iou.update(logits.argmax(1), targets)
        losses = cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="none")
        # Not by a weight, which torchmetrics leaves out of account where it is to keep NaN.
        self.val_loss.update(losses[targets != IGNORED])
        self.log("val/loss", self.val_loss)

    def on_validation_epoch_end(self) -> None:
        iou = self._log_iou(self.val_iou, "val")
        names = data_of(self.trainer).classes
        by_class = {f"val/iou/{name}": value for name, value in zip(names, iou, strict=True) if not value.isnan()}
        self.log_dict(by_class, sync_dist=True)
        if self.val_region_iou is not None:
            by_size = zip(self.val_region_iou.names, self.val_region_iou.compute(), strict=True)
            self.log_dict(
                {f"val/miou_regions/{name}": value for name, value in by_size if not value.isnan()}, sync_dist=True
            )
            self.val_region_iou.reset()

    def _log_iou(self, metric: Metric, split: str) -> Tensor:
        iou = metric.compute()
        metric.reset()
        # The same in all processes already, but Lightning cannot know.
        self.log(f"{split}/miou", iou.nanmean(), prog_bar=split == "val", sync_dist=True)
        return iou

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> tuple[Tensor, Tensor]:
        """Indices (N,) of the images, and their train ids (N, H, W, uint8)."""
        images, indices = batch
        train_ids = self(images).argmax(1).to(torch.uint8)
        read = indices >= 0
        return indices[read], train_ids[read]


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy over the labelled pixels; 0 if there is none."""
    total = cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)
