"""Image classification: the ImageNet recipe of the paper (appendix A.1), for any model of the library."""

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from pyinvolution.recipes.classification.predictions import PredictionWriter
from pyinvolution.recipes.data import data_of
from pyinvolution.recipes.errors import RecipeError, require
from pyinvolution.recipes.recipe import Recipe, build_net
from pyinvolution.recipes.samples import IGNORED

__all__ = ["Classification"]


class Classification(Recipe):
    """Cross entropy with label smoothing; top-1 and top-5.

    Args:
        name: of the model, as in `pyinvolution.models.list_models`, or e.g. ``timm/resnet50``.
        num_classes: classes of the data.
        options: further arguments of `pyinvolution.models.create_model`.
        label_smoothing: of the training loss; validation goes without.
        mixup: alpha of MixUp (Zhang et al., ICLR 2018): training images are averaged in pairs; 0 for none.
        cutmix: alpha of CutMix (Yun et al., ICCV 2019): a rectangle of another image replaces a part; 0 for none. With
            both, each batch gets one of them, at even odds. ``train/top1`` then counts the larger share's class.
        kwargs: of `Recipe`.
    """

    monitor, monitor_title = "val/top1", "Top-1 accuracy (%)"
    output = "predictions.csv"

    def __init__(
        self,
        name: str = "rednet50",
        num_classes: int = 1000,
        options: dict[str, Any] | None = None,
        label_smoothing: float = 0.1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        **kwargs: Any,
    ) -> None:
        require("model.num_classes", num_classes, num_classes >= 1, "at least 1")
        require("model.label_smoothing", label_smoothing, 0 <= label_smoothing < 1, "a value in [0, 1)")
        require("model.mixup", mixup, mixup >= 0, "at least 0")
        require("model.cutmix", cutmix, cutmix >= 0, "at least 0")
        require(
            "model.num_classes", num_classes, num_classes > 1 or not (mixup or cutmix), "at least 2 with mixup, cutmix"
        )
        net = build_net(name, num_classes, options)
        super().__init__(net, **kwargs)
        self.save_hyperparameters(logger=False)
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        kinds: list[tuple[Any, float]] = [(v2.MixUp, mixup), (v2.CutMix, cutmix)]
        mixes = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]
        self.mix = v2.RandomChoice(mixes) if mixes else None
        top1, top5 = (
            # Without validation of the arguments, which waits for the GPU.
            MulticlassAccuracy(num_classes, min(k, num_classes), "micro", ignore_index=IGNORED, validate_args=False)
            for k in (1, 5)
        )
        self.train_top1 = top1.clone()
        # Groups would merge both for good if they happened to agree on the first batch.
        self.val_accuracy = MetricCollection({"val/top1": top1, "val/top5": top5}, compute_groups=False)
        self.val_loss = MeanMetric(nan_strategy="disable")  # else it drops them

    def prediction_writer(self, output: Path) -> PredictionWriter:
        return PredictionWriter(output)

    def setup(self, stage: str) -> None:
        data = data_of(self.trainer)
        if data.classes and len(data.classes) != self.num_classes:
            raise RecipeError(
                f"model.num_classes is {self.num_classes}, but the data has {len(data.classes)} classes "
                f"({', '.join(data.classes[:3])}, ...): set --model.num_classes {len(data.classes)}"
            )

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes) of normalised images (N, 3, H, W)."""
        return self.net(self.images(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        if self.mix is not None:
            images, targets = self.mix(images, targets)
        logits = self(images)
        loss = cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        self.train_top1.update(logits.detach(), targets if targets.ndim == 1 else targets.argmax(1))
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/top1", self.train_top1, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, targets = batch
        logits = self(images)
        self.val_accuracy.update(logits, targets)
        losses = cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
        self.val_loss.update(losses[targets != IGNORED])
        self.log("val/loss", self.val_loss)
        self.log_dict(self.val_accuracy, prog_bar=True)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> tuple[Tensor, Tensor, Tensor]:
        """Indices (N,) of the images, their up to five best classes (N, 5) and the probabilities (N, 5)."""
        images, indices = batch
        probabilities, classes = self(images).float().softmax(1).topk(min(5, self.num_classes))
        read = indices != IGNORED
        return indices[read], classes[read], probabilities[read]
