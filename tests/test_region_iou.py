"""Intersection over union by the size of regions."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torchmetrics.classification import MulticlassJaccardIndex

pytest.importorskip("lightning", reason="the recipes need the extra train")

from pyinvolution.recipes.segmentation.label_maps import IGNORED
from pyinvolution.recipes.segmentation.regions import RegionSizeIoU, region_areas


def maps(seed, classes=4, size=(23, 31), count=3):
    """Smooth label maps: classes in blobs of many sizes."""
    noise = np.random.default_rng(seed).normal(size=(count, classes, *size))
    return torch.from_numpy(ndimage.gaussian_filter(noise, (0, 0, 2, 2)).argmax(1))


def areas_by_class(labels):
    result = np.zeros_like(labels)
    for label in np.unique(labels):
        regions, _ = ndimage.label(labels == label)
        result = np.where(labels == label, np.bincount(regions.ravel())[regions], result)
    return result


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (17, 24)])
def test_areas(shape):
    labels = np.random.default_rng(0).integers(0, 3, shape)
    np.testing.assert_array_equal(region_areas(labels), areas_by_class(labels))


def test_diagonal_neighbours_are_apart():
    np.testing.assert_array_equal(region_areas(np.array([[1, 0], [0, 1]])), np.ones((2, 2)))


def test_one_range_is_the_usual_iou():
    prediction, target = maps(0), maps(1)
    target[:, :5] = IGNORED
    usual = MulticlassJaccardIndex(4, ignore_index=IGNORED)
    assert RegionSizeIoU(4, []).names == ["all"]
    metric = RegionSizeIoU(4, [])
    metric.update(prediction, target)
    torch.testing.assert_close(metric.compute(), usual(prediction, target), check_dtype=False)


def test_ranges():
    prediction, target, bounds = maps(2), maps(3), [20, 150]
    target[:, 20:] = IGNORED
    inside, outside = np.zeros((3, 4)), np.zeros((3, 4))
    occurs = np.zeros((3, 4), bool)
    for one, other in zip(prediction.numpy(), target.numpy(), strict=True):
        found, true = areas_by_class(one), areas_by_class(other)
        for y, x in np.argwhere(other != IGNORED):
            at = sum(true[y, x] >= bound for bound in bounds), other[y, x]
            occurs[at] = True
            if one[y, x] == other[y, x]:
                inside[at] += 1
            else:
                outside[at] += 1
                outside[sum(found[y, x] >= bound for bound in bounds), one[y, x]] += 1
    assert occurs.any(1).all(), "every range has some class"
    assert not occurs.all(), "some range lacks a class"
    expected = [np.mean((inside / np.maximum(inside + outside, 1))[i][occurs[i]]) for i in range(3)]
    metric = RegionSizeIoU(4, bounds)
    for one, other in zip(prediction, target, strict=True):
        metric.update(one[None], other[None])
    torch.testing.assert_close(metric.compute(), torch.tensor(expected), check_dtype=False)
    assert metric.names == ["below_20", "below_150", "from_150"]
    metric.reset()
    assert metric.compute().isnan().all()


@pytest.mark.parametrize("bounds", [[0], [-5, 3], [9, 4], [4, 4]])
def test_bounds_ascend(bounds):
    with pytest.raises(ValueError, match=r"bounds is \[.*\], expected ascending"):
        RegionSizeIoU(4, bounds)
