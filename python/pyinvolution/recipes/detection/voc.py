"""Annotations in PASCAL VOC's XML as COCO's JSON."""

import json
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, Literal, get_args

from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from pyinvolution.recipes.errors import RecipeError, require
from pyinvolution.recipes.files import find_folder, unpacked, write_tree
from pyinvolution.recipes.images import exif_orientation, is_hidden

__all__ = ["write_bccd", "write_voc"]

Difficult = Literal["crowd", "keep", "drop"]
Unknown = Literal["error", "drop"]

TREE = "VOC's tree: Annotations/NAME.xml, JPEGImages/NAME.jpg and ImageSets/Main/SPLIT.txt"


def write_voc(
    root: str | Path,
    source: str | Path,
    classes: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    difficult: Difficult = "crowd",
    unknown: Unknown = "error",
    first_pixel: int = 1,
) -> dict[str, int]:
    """Write ROOT/images/IMAGE and ROOT/annotations/instances_SPLIT.json of data in VOC's tree.

    A box of VOC names its first and last pixels, counted from 1: ``xmin=1, xmax=10`` is COCO's ``x=0, width=10``. What
    reaches beyond the image is cut off; a box of which less than a pixel is left, or whose last pixel is before its
    first, is left out. Both are counted in a warning. Every annotation keeps the flags ``difficult`` and ``truncated``
    as fields of these names; evaluation does not look at ``truncated``. The area of an object is its box's.

    Args:
        root: where the tree goes; files that are there already are not written again.
        source: folder or archive with ``Annotations``, ``JPEGImages`` and ``ImageSets/Main``.
        classes: names of the classes in the order of their ids from 1; None for all that occur, sorted.
        splits: files in ``ImageSets/Main`` without their suffix, whose first column names images, or the whole line
            where there is an image of that name; None for those of train, val, trainval and test that are there.
        difficult: objects with this flag: as a "crowd" (not trained on, and neither right nor wrong to detect, as VOC's
            own evaluation has it), "keep" as any other object, or "drop".
        unknown: an object of another class is an "error", or "drop" leaves it out and counts it in a warning.
        first_pixel: number of the first row and column: 1, or 0 for programs that count from 0.

    Returns:
        Number of images in each split.

    Raises:
        RecipeError: an image or its annotations are missing, or a name has two images; a file is damaged or lacks a
            field, a size differs from the image's, or the class of an object is not one of ``classes``, or these are
            not distinct; or there are other images in ROOT/images, or files with other content.
    """
    require("--difficult", difficult, difficult in get_args(Difficult), "one of crowd, keep and drop")
    require("--unknown", unknown, unknown in get_args(Unknown), "error or drop")
    require("--first-pixel", first_pixel, first_pixel in (0, 1), "0 or 1")
    require("--classes", classes, len(set(classes or ())) == len(classes or ()), "names that differ")
    with unpacked(source) as folder:
        tree = find_folder(folder, TREE, ("Annotations", "JPEGImages", "ImageSets"))
        found_images: dict[str, list[Path]] = defaultdict(list)
        for path in sorted((tree / "JPEGImages").iterdir()):
            if _is_image(path):
                found_images[path.stem].append(path)
        images = {name: paths[0] for name, paths in found_images.items()}
        members = _splits(tree / "ImageSets" / "Main", splits, images)
        needed = sorted({name for names in members.values() for name in names})
        for name in needed:
            if len(found_images[name]) > 1:
                several = " and ".join(path.name for path in found_images[name])
                raise RecipeError(f"--source has {several} in JPEGImages, expected one image of a name in its splits")
        for kind, lacking in (
            ("image", [name for name in needed if name not in images]),
            ("annotations", [name for name in needed if not (tree / "Annotations" / f"{name}.xml").is_file()]),
        ):
            if lacking:
                raise RecipeError(
                    f"--source lacks the {kind} of {len(lacking)} names in its splits, first {lacking[0]}"
                )
        read = {name: _read(tree / "Annotations" / f"{name}.xml", images[name], first_pixel) for name in needed}
        found = sorted({entry["name"] for _, objects in read.values() for entry in objects})
        names = list(found if classes is None else classes)
        others = [name for name in found if name not in names]
        if others and unknown == "error":
            raise RecipeError(
                f"--source has objects of {', '.join(others)}, expected the classes {', '.join(names)}; --unknown drop "
                "leaves the others out"
            )
        numbers = {name: number for number, name in enumerate(needed, 1)}
        counts: Counter[str] = Counter()
        entries = {name: _annotations(read[name], names, numbers[name], difficult, counts) for name in needed}
        files: dict[Path, Callable[[], bytes]] = {
            Path("images", images[name].name): images[name].read_bytes for name in needed
        }
        # An interrupted command must not leave annotations of images that are not there: they are the last.
        for split, listed in members.items():
            annotations = [entry for name in listed for entry in entries[name]]
            content = {
                "images": [{"id": numbers[name], "file_name": images[name].name, **read[name][0]} for name in listed],
                "annotations": [{"id": number, **entry} for number, entry in enumerate(annotations, 1)],
                "categories": [{"id": number, "name": name} for number, name in enumerate(names, 1)],
            }
            files[Path("annotations", f"instances_{split}.json")] = json.dumps(content).encode
        of_other_splits = {Path("images", path.name): path.read_bytes for path in images.values()}
        write_tree(Path(root), files, ["images"], of_other_splits)
    if counts:
        rank_zero_warn(f"{source}: {', '.join(f'{count} {what}' for what, count in sorted(counts.items()))}")
    return {split: len(names) for split, names in members.items()}


def write_bccd(root: str | Path, source: str | Path) -> dict[str, int]:
    """BCCD (github Shenggan/BCCD_Dataset, MIT) by `write_voc`: 364 images of blood cells of 640 x 480 pixels."""
    return write_voc(root, source, ("RBC", "WBC", "Platelets"))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMG_EXTENSIONS and not is_hidden(Path(path.name))


def _splits(folder: Path, wanted: Sequence[str] | None, images: Container[str]) -> dict[str, list[str]]:
    chosen = wanted or [name for name in ("train", "val", "trainval", "test") if (folder / f"{name}.txt").is_file()]
    if not chosen:
        raise RecipeError(
            f"--source has no split: there is none of train.txt, val.txt and test.txt in its {folder.name}"
        )
    members = {}
    for split in chosen:
        path = folder / f"{split}.txt"
        if not path.is_file():
            there = ", ".join(sorted(other.stem for other in folder.glob("*.txt"))) or "none"
            raise RecipeError(f"--splits is {split}, expected one that --source has: {there}")
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except UnicodeDecodeError as error:
            raise RecipeError(f"--source: {path.name} is not UTF-8: {error}") from error
        names = [line if line in images else line.split()[0] for line in lines if line]
        members[split] = list(dict.fromkeys(names))
        if not names:
            raise RecipeError(f"--source: the split {split} lists no images")
    return members


def _read(path: Path, image: Path, first_pixel: int) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Height and width, and of each object its name, flags and box (x1, y1, x2, y2) of COCO."""
    try:
        root = ElementTree.parse(path).getroot()
        size = _size(root, image)
        return size, [_object(entry, first_pixel) for entry in root.iter("object")]
    except (ElementTree.ParseError, ValueError, LookupError, OSError) as error:  # lookup: of an encoding
        raise RecipeError(f"--source: {path.name}: {error}") from error


def _size(root: ElementTree.Element, image: Path) -> dict[str, int]:
    with Image.open(image) as opened:
        width, height = opened.size
        if exif_orientation(opened) > 4:
            width, height = height, width
    for name, actual in (("width", width), ("height", height)):
        # Some programs write 0, or nothing, for what they do not know.
        listed = root.findtext(f"size/{name}") or "0"
        if _number(listed, f"size/{name}") not in (0, actual):
            raise ValueError(f"its {name} is {listed}, but {image.name} has {width} x {height} pixels")
    return {"height": height, "width": width}


def _object(entry: ElementTree.Element, first_pixel: int) -> dict[str, Any]:
    name = (entry.findtext("name") or "").strip()
    if not name:
        raise ValueError("an object has no name")
    box = [_number(entry.findtext(f"bndbox/{side}"), f"{side} of {name}") for side in ("xmin", "ymin", "xmax", "ymax")]
    flags = {flag: int(_number(entry.findtext(flag) or "0", flag)) for flag in ("difficult", "truncated")}
    # From the numbers of the first and last pixels to the edges of the box.
    return {"name": name, "box": [value - first_pixel + (index > 1) for index, value in enumerate(box)], **flags}


def _number(text: str | None, what: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = float("nan")
    if not isfinite(value):
        raise ValueError(f"{what} is {text!r}, expected a number")
    return value


def _annotations(
    read: tuple[dict[str, int], list[dict[str, Any]]],
    names: list[str],
    number: int,
    difficult: Difficult,
    counts: Counter[str],
) -> list[dict[str, Any]]:
    size, objects = read
    annotations = []
    for entry in objects:
        if entry["name"] not in names:
            counts["objects of other classes are left out"] += 1
            continue
        if entry["difficult"] and difficult == "drop":
            counts["difficult objects are left out"] += 1
            continue
        box = [
            min(max(value, 0), size[side]) for value, side in zip(entry["box"], ("width", "height") * 2, strict=True)
        ]
        width, height = box[2] - box[0], box[3] - box[1]
        if width < 1 or height < 1:
            counts["boxes without a pixel in their image are left out"] += 1
            continue
        if box != entry["box"]:
            counts["boxes reach beyond their image and are cut off"] += 1
        annotations.append(
            {
                "image_id": number,
                "category_id": names.index(entry["name"]) + 1,
                "bbox": [box[0], box[1], width, height],
                "area": width * height,
                "iscrowd": int(bool(entry["difficult"]) and difficult == "crowd"),
                "difficult": entry["difficult"],
                "truncated": entry["truncated"],
            }
        )
    return annotations
