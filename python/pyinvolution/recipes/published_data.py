"""Published data sets, brought from the form in which they are published into the layouts of the recipes."""

from importlib import import_module
from pathlib import Path
from typing import Any

from pyinvolution.recipes.errors import RecipeError

__all__ = ["DATA", "write"]

# Name: help, module below pyinvolution.recipes, function (root, source, options) -> number of images in each split.
DATA = {
    "bccd": ("364 images of blood cells with boxes, from BCCD's VOC tree, as COCO's", "detection.voc", "write_bccd"),
    "camvid": (
        "701 street scenes with 11 classes, from SegNet's folders, as images, labels and a table of classes",
        "segmentation.camvid",
        "write_camvid",
    ),
    "cifar10": (
        "60,000 images of 32 x 32, from the python version or folders of images, as ImageNet's tree of folders",
        "classification.cifar10",
        "write_cifar10",
    ),
    "voc": ("your own data in PASCAL VOC's tree of XML files, as COCO's", "detection.voc", "write_voc"),
}


def write(name: str, root: str | Path, source: str | Path, **options: Any) -> dict[str, int]:
    """Write the data set ``name`` of `DATA` below ``root``, from the folder or archive ``source``; files that are there
    already stay as they are.

    Args:
        options: of `pyinvolution.recipes.detection.voc.write_voc`, for "voc".

    Returns:
        Number of images in each split.

    Raises:
        RecipeError: there is no such data set, ``source`` is not in its published form, or ``root`` holds another.
    """
    if name not in DATA:
        raise RecipeError(f"name is {name!r}, expected one of {', '.join(DATA)}")
    _, module, function = DATA[name]
    return getattr(import_module(f"pyinvolution.recipes.{module}"), function)(root, source, **options)
