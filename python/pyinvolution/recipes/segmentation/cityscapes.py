"""Cityscapes (Cordts et al., CVPR 2016): ROOT/{leftImg8bit,gtFine}/{train,val,test}/CITY/*.png."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torchvision.datasets import Cityscapes

from pyinvolution.recipes.segmentation.label_maps import IGNORED, ClassTable, SegmentationData

__all__ = ["CLASSES", "IMAGE_SUFFIX", "LABEL_IDS", "PALETTE", "TABLE", "CityscapesData"]

_EVALUATED = sorted(
    (label for label in Cityscapes.classes if 0 <= label.train_id < IGNORED), key=lambda label: label.train_id
)
TABLE = ClassTable(
    [{"name": label.name, "color": list(label.color), "values": label.id} for label in _EVALUATED],
    # -1 is 255 in the files.
    ignored=sorted({label.id % 256 for label in Cityscapes.classes} - {label.id for label in _EVALUATED}),
    what="ids of Cityscapes",
)
"""The 19 classes that are evaluated, and the other ids of the data set."""
CLASSES: list[str] = TABLE.names
"""Names of the 19 classes, by train id."""
LABEL_IDS: NDArray[np.uint8] = TABLE.values
"""Their ids in the files of the data set and of the benchmark."""
PALETTE: NDArray[np.uint8] = TABLE.palette
"""RGB by train id; black for what is ignored."""

IMAGE_SUFFIX, LABEL_SUFFIX = "_leftImg8bit.png", "_gtFine_labelIds.png"


class CityscapesData(SegmentationData):
    """`SegmentationData` in the tree of Cityscapes, with its classes.

    Args:
        root: folder with ``leftImg8bit`` and ``gtFine``.
        size: height and width that images are brought to before the random resize of training.
        crop: height and width of the random crop of training.
        kwargs: of `SegmentationData`.
    """

    OF: ClassVar[str] = " of Cityscapes"
    classes = CLASSES
    folders: ClassVar[dict[str, str]] = {"images": "leftImg8bit/{split}", "labels": "gtFine/{split}"}  # type: ignore[misc]

    def __init__(
        self,
        root: str = "data/cityscapes",
        size: tuple[int, int] | None = (1024, 2048),
        crop: tuple[int, int] = (512, 1024),
        **kwargs: Any,
    ) -> None:
        super().__init__(root, size=size, crop=crop, **kwargs)

    def _read_table(self, required: bool) -> ClassTable:
        return TABLE

    def expected(self, split: str) -> str:
        images, labels = self.folder("images", split), self.folder("labels", split)
        return f"expected {images}/CITY/NAME{IMAGE_SUFFIX} and {labels}/CITY/NAME{LABEL_SUFFIX}"

    def name_of(self, path: str | Path) -> str:
        name = Path(path).name
        return name.removesuffix(IMAGE_SUFFIX) if name.endswith(IMAGE_SUFFIX) else Path(name).stem

    def label_of(self, image: Path) -> Path:
        return image.with_name(image.name.removesuffix(IMAGE_SUFFIX) + LABEL_SUFFIX)

    def is_image(self, path: Path) -> bool:
        return path.name.endswith(IMAGE_SUFFIX)
