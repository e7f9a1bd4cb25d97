"""Small data sets, each in the layout of a large one, made of what scikit-learn ships."""

from importlib import import_module
from pathlib import Path

from pyinvolution.recipes.errors import RecipeError

__all__ = ["DATA", "write"]

# Name: help, module below pyinvolution.recipes, function (root) -> numbers of training and validation images.
DATA = {
    "cityscapes-digits": (
        "680 scenes of two photographs and digits, 128 x 256, as Cityscapes' tree",
        "segmentation.digits",
        "write_scenes",
    ),
    "coco-digits": (
        "1,200 photographs with handwritten digits on them, 160 x 160, boxes and masks, as COCO's tree",
        "detection.digits",
        "write_coco_digits",
    ),
    "digits": (
        "1,797 handwritten digits, 32 x 32, as ImageNet's tree of folders",
        "classification.digits",
        "write_digits",
    ),
}


def write(name: str, root: str | Path) -> tuple[int, int]:
    """Write the data set ``name`` of `DATA` below ``root``; files that are there already stay as they are.

    Returns:
        Numbers of training and validation images.

    Raises:
        RecipeError: there is no such data set, or ``root`` holds another.
    """
    if name not in DATA:
        raise RecipeError(f"make_data is {name!r}, expected one of {', '.join(DATA)}")
    _, module, function = DATA[name]
    return getattr(import_module(f"pyinvolution.recipes.{module}"), function)(root)
