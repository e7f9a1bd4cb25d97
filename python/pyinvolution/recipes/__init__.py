"""Training recipes on Lightning. They need the extra ``train``: ``pip install "pyinvolution[train]"``."""

from importlib import import_module
from typing import Any

from pyinvolution._moved import alias_modules

# Imported on use: Lightning takes seconds, and the parts that do without it should not wait.
_MODULES = {
    "CityscapesData": "segmentation.cityscapes",
    "Classification": "classification.task",
    "CocoData": "detection.coco",
    "Detection": "detection.task",
    "HuggingFaceData": "classification.hugging_face",
    "ImageFolderData": "classification.imagefolder",
    "LabelMapData": "segmentation.label_maps",
    "Recipe": "recipe",
    "RecipeData": "data",
    "RecipeError": "errors",
    "Segmentation": "segmentation.task",
    "SegmentationData": "segmentation.label_maps",
    "TrainingDiverged": "errors",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


alias_modules(
    {
        "recipes.classification.comparison": "studies.compare_operator",
        "recipes.classification.demo": "studies.demo",
        "recipes.classification.module": "recipes.classification.task",
        "recipes.command": "recipes.cli",
        "recipes.detection.module": "recipes.detection.task",
        "recipes.kernels": "studies.learned_kernels",
        "recipes.loading": "recipes.data",
        "recipes.module": "recipes.recipe",
        "recipes.peers": "studies.compare_systems",
        "recipes.search": "studies.search",
        "recipes.search.files": "studies.files",
        "recipes.segmentation.figure": "studies.figure",
        "recipes.segmentation.module": "recipes.segmentation.task",
    }
    | {
        f"recipes.search.{name}": f"studies.search.{name}"
        for name in (
            "config",
            "costs",
            "data",
            "evaluation",
            "pipeline",
            "report",
            "space",
            "study",
            "supernet",
        )
    }
)
