"""Intersection over union of the regions of a range of sizes."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torchmetrics import Metric

from pyinvolution.recipes.segmentation.label_maps import IGNORED

__all__ = ["RegionSizeIoU", "region_areas"]


def region_areas(labels: np.ndarray) -> np.ndarray:
    """For each pixel the number of pixels of its region: pixels of one label that touch by their sides.

    Args:
        labels: (H, W), integers.

    Returns:
        (H, W), int64.
    """
    index = np.arange(labels.size).reshape(labels.shape)
    right, below = labels[:, 1:] == labels[:, :-1], labels[1:] == labels[:-1]
    start = np.concatenate([index[:, :-1][right], index[:-1][below]])
    end = np.concatenate([index[:, 1:][right], index[1:][below]])
    edges = coo_array((np.ones(start.size, np.uint8), (start, end)), shape=(labels.size, labels.size))
    _, region = connected_components(edges, directed=False)
    return np.bincount(region)[region].reshape(labels.shape)


class RegionSizeIoU(Metric):
    """Mean intersection over union of the classes, for regions of each range of sizes, over all images.

    A labelled pixel belongs to the range of its region in the ground truth, and a pixel with a wrong class counts
    against that class in the range of its region in the prediction. So with one range this is the usual IoU.

    Args:
        num_classes: number of classes.
        bounds: between the ranges, in pixels, ascending: (1024, 9216) makes three ranges.

    Raises:
        ValueError: ``bounds`` do not ascend from 1 or more.
    """

    full_state_update = False
    intersection: Tensor
    union: Tensor
    labelled: Tensor

    def __init__(self, num_classes: int, bounds: Sequence[int]) -> None:
        super().__init__()
        if any(low >= high for low, high in zip([0, *bounds], bounds, strict=False)):
            raise ValueError(f"bounds is {list(bounds)}, expected ascending numbers of pixels from 1 on")
        self.num_classes, self.bounds = num_classes, list(bounds)
        for name in ("intersection", "union", "labelled"):
            count = torch.zeros(len(bounds) + 1, num_classes, dtype=torch.int64)
            self.add_state(name, count, dist_reduce_fx="sum")

    @property
    def names(self) -> list[str]:
        """One for each range."""
        if not self.bounds:
            return ["all"]
        return [*(f"below_{bound}" for bound in self.bounds), f"from_{self.bounds[-1]}"]

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count images.

        Args:
            prediction: (N, H, W), class of each pixel.
            target: (N, H, W), class of each pixel, or the value for pixels that are ignored.
        """
        for one, other in zip(prediction.cpu().numpy(), target.cpu().numpy(), strict=True):
            ranges = [np.digitize(region_areas(labels), self.bounds) for labels in (one, other)]
            known = other != IGNORED
            right, wrong = known & (one == other), known & (one != other)
            self.intersection += self._count(ranges[1], other, right)
            labelled = self._count(ranges[1], other, known)
            self.labelled += labelled
            self.union += labelled + self._count(ranges[0], one, wrong)

    def compute(self) -> Tensor:
        """(ranges,), or () for one: mean over the classes that occur in regions of that range; NaN where none does."""
        iou = self.intersection / self.union.clamp(min=1)
        return torch.where(self.labelled > 0, iou, torch.nan).nanmean(1)

    def _count(self, ranges: np.ndarray, labels: np.ndarray, pixels: np.ndarray) -> Tensor:
        count = np.bincount(
            ranges[pixels] * self.num_classes + labels[pixels], minlength=(len(self.bounds) + 1) * self.num_classes
        )
        return torch.from_numpy(count).view(len(self.bounds) + 1, self.num_classes).to(self.union.device)
