"""Training recipes on Lightning. They need the extra ``train``: ``pip install "pyinvolution[train]"``."""

from importlib import import_module
from typing import Any

# Imported on use: Lightning takes seconds, and the parts that do without it should not wait.
_MODULES = {
    "CityscapesData": "segmentation.cityscapes",
    "Classification": "classification.task",
    "CocoData": "detection.coco",
    "Detection": "detection.task",
    "ImageFolderData": "classification.imagefolder",
    "Recipe": "recipe",
    "RecipeData": "data",
    "RecipeError": "errors",
    "Segmentation": "segmentation.task",
    "TrainingDiverged": "errors",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
