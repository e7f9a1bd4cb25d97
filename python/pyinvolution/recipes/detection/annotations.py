"""COCO's annotations as other programs write them: what is refused, what is left out, and masks of what is left."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import compress
from math import inf, isfinite
from operator import not_
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from pycocotools import mask as rle

__all__ = ["CocoFile", "Entry", "Fault", "draw_mask", "has_mask"]

Entry = Mapping[str, Any]
"""An image, a category or an annotation in the file."""
Size = tuple[int, int]
"""Height and width."""


class Fault(ValueError):
    """What is wrong in a file of annotations, without the file's name."""


class CocoFile:
    """What a file in COCO's layout lists, checked but for the masks.

    Attributes:
        file: its path.
        root: folder of the images.
        ids: of the images, in order.
        images, categories: by their ids.
        annotations: of these images.

    Raises:
        Fault: ids repeat or have another type, a name is not text, a size is not positive, a box is not four finite
            numbers of which two are sizes of at least 0, or an annotation's category is not listed.
        KeyError, TypeError, ValueError: the file is not JSON, or an entry is not an object or lacks a field.
    """

    def __init__(self, file: Path, root: Path, annotated: bool) -> None:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise Fault(f"it holds a {type(content).__name__}, expected an object with images, annotations, categories")
        images, categories = content.get("images") or [], content.get("categories") or []
        annotations: Any = content.get("annotations")
        if not images:
            raise Fault("it lists no images")
        if annotated and not categories:
            raise Fault("it lists no categories")
        if annotated and annotations is None:
            raise Fault("it has no annotations")
        for kind, field, entries in (("image", "file_name", images), ("category", "name", categories)):
            _check_entries(kind, field, entries)
        for image in images:
            for side in ("width", "height"):
                if (value := image.get(side)) is not None and not (_is_number(value) and value > 0):
                    raise Fault(f"the {side} of image {image['id']} is {value!r}, expected a positive number")
        self.file, self.root = file, root
        self.images = {image["id"]: image for image in images}
        self.categories = {category["id"]: category for category in categories}
        self.ids = sorted(self.images)
        self.annotations: list[Entry] = []
        self._warn_of_repeated_files()
        if annotated:
            self._take(annotations)

    def _take(self, annotations: list[Entry]) -> None:
        _check_unique("annotation", annotations, "images", "image_id")
        for annotation in annotations:
            _check_annotation(annotation, self.categories)
        self.annotations, strays = _split(annotations, lambda entry: entry["image_id"] in self.images)
        if strays:
            self._warn(f"images that are not listed: {_some(strays, annotations)} are left out")

    def _warn(self, text: str) -> None:
        rank_zero_warn(f"{self.file}: {text}")

    def _warn_of_repeated_files(self) -> None:
        groups: dict[str, list[int]] = defaultdict(list)
        for number, image in self.images.items():
            groups[image["file_name"]].append(number)
        repeated = [(name, numbers) for name, numbers in groups.items() if len(numbers) > 1]
        if repeated:
            name, numbers = repeated[0]
            which = ", ".join(map(str, numbers))
            self._warn(
                f"{len(repeated)} files are listed as several images (first: {name}, images {which}), each with its "
                "own annotations only"
            )

    def by_image(self, masks: bool, training: bool) -> dict[int, list[Entry]]:
        """The annotations of each image. Training goes without crowds, boxes of less than a pixel within the image and,
        for ``masks``, objects without a mask. What is left out is counted in warnings, crowds excepted.

        Raises:
            Fault: a mask is not as in COCO, or no annotation has one.
        """
        kept = self.annotations
        if training:
            objects = [annotation for annotation in kept if not annotation.get("iscrowd", 0)]
            kept, lost = _split(objects, lambda entry: _in_image(entry["bbox"], self.images[entry["image_id"]]))
            if lost:
                which = _some(lost, self.annotations)
                self._warn(f"boxes of less than a pixel within the image: {which} are not trained on")
        if masks:
            kept = self._with_masks(kept, training)
        found: dict[int, list[Entry]] = {number: [] for number in self.images}
        for annotation in kept:
            found[annotation["image_id"]].append(annotation)
        return found

    def _with_masks(self, annotations: list[Entry], training: bool) -> list[Entry]:
        masked: list[Entry] = []
        bare: list[Entry] = []
        partly: list[Any] = []
        for entry in annotations:
            polygons = _polygons(entry)
            whole = has_mask(entry)
            # Checked in any case; evaluation, as COCO's, counts masks without a pixel as objects that nobody finds.
            visible = whole and _has_pixels(entry, polygons, self.images[entry["image_id"]])
            (masked if visible or (whole and not training) else bare).append(entry)
            if whole and polygons and len(polygons) < len(entry["segmentation"]):
                partly.append(entry)
        if bare and not masked:
            raise Fault(
                f"none of its {len(bare)} annotations has a mask, expected polygons or run lengths as their "
                "segmentation; faster_rcnn and retinanet need boxes only"
            )
        if bare:
            end = "are not trained on" if training else "count as crowds, for boxes and masks"
            self._warn(f"no mask: {_some(bare, annotations)} {end}")
        if partly:
            self._warn(f"polygons of fewer than three points are left out of {_some(partly, annotations)}")
        return masked if training else annotations


def _check_entries(kind: str, field: str, entries: list[Entry]) -> None:
    for entry in entries:
        _check_id(entry["id"], f"the id of {kind} {entry[field]!r}")
        if not isinstance(entry[field], str):
            raise Fault(f"the {field} of {kind} {entry['id']} is {entry[field]!r}, expected text")
    _check_unique(kind, entries, "", field)


def _check_id(value: Any, what: str) -> None:
    if type(value) is not int or value < 0:
        raise Fault(f"{what} is {value!r}, expected an integer of at least 0")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _check_unique(kind: str, entries: list[Entry], described: str, field: str) -> None:
    groups: dict[Any, list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[entry["id"]].append(entry)
    repeated = [(number, group) for number, group in groups.items() if len(group) > 1]
    if repeated:
        number, group = repeated[0]
        where = ", ".join(str(entry[field]) for entry in group[:5]) + (", ..." if len(group) > 5 else "")
        more = f"; {len(repeated) - 1} other ids are used repeatedly" if len(repeated) > 1 else ""
        which = f"{described} {where}".strip()
        raise Fault(f"{kind} {number!r} is used {len(group)} times ({which}), expected unique ids{more}")


def _check_annotation(annotation: Entry, categories: Mapping[int, Entry]) -> None:
    name = f"annotation {annotation['id']!r}"
    _check_id(annotation["image_id"], f"the image_id of {name}")
    category, box = annotation["category_id"], annotation["bbox"]
    if type(category) is not int or category not in categories:
        known = ", ".join(map(str, sorted(categories)[:5])) + (", ..." if len(categories) > 5 else "")
        raise Fault(f"{name} has category_id {category!r}, expected one of those listed: {known}")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)) or min(box[2:]) < 0:
        raise Fault(f"the bbox of {name} is {box}, expected x, y, width and height, the sizes at least 0")
    if annotation.get("iscrowd", 0) not in (0, 1):
        raise Fault(f"the iscrowd of {name} is {annotation['iscrowd']!r}, expected 0 or 1")
    if not _is_number(area := annotation.get("area", 0)) or area < 0:
        raise Fault(f"the area of {name} is {area!r}, expected a number of at least 0")


def _split(entries: list[Entry], wanted: Callable[[Entry], bool]) -> tuple[list[Entry], list[Entry]]:
    verdicts = [wanted(entry) for entry in entries]
    return list(compress(entries, verdicts)), list(compress(entries, map(not_, verdicts)))


def _in_image(box: list[float], image: Entry) -> bool:
    x, y, width, height = box
    right, bottom = (min(end, image.get(side) or inf) for end, side in ((x + width, "width"), (y + height, "height")))
    return right - max(x, 0) >= 1 and bottom - max(y, 0) >= 1


def has_mask(annotation: Entry) -> bool:
    """Whether the annotation has run lengths or a polygon of at least three points."""
    shape: Any = annotation.get("segmentation")
    return bool(shape) and (isinstance(shape, Mapping) or any(map(_is_polygon, shape)))


def _is_polygon(part: Any) -> bool:
    return isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0


def _polygons(annotation: Entry) -> list[list[float]]:
    """Those with at least three points."""
    shape = annotation.get("segmentation") or []
    if isinstance(shape, Mapping):
        return []
    try:
        valid = isinstance(shape, list) and all(isinstance(part, list) and all(map(isfinite, part)) for part in shape)
    except TypeError:
        valid = False
    if not valid:
        raise Fault(
            f"the segmentation of annotation {annotation['id']!r} is neither a list of polygons (lists of finite x, y, "
            "x, y, ...) nor run lengths (size and counts)"
        )
    return [part for part in shape if _is_polygon(part)]


def _has_pixels(annotation: Entry, polygons: list[list[float]], image: Entry) -> bool:
    """Whether its mask may have a pixel within the image."""
    shape = annotation["segmentation"]
    if isinstance(shape, Mapping):
        return sum(_run_lengths(annotation, _listed_size(image, shape))[1::2]) > 0
    right, bottom = image.get("width") or inf, image.get("height") or inf
    return any(_has_area(polygon[::2], right) and _has_area(polygon[1::2], bottom) for polygon in polygons)


def _listed_size(image: Entry, shape: Entry) -> Size:
    height, width = shape["size"]
    return image.get("height") or height, image.get("width") or width


def _has_area(coordinates: list[float], end: float) -> bool:
    least, most = min(coordinates), max(coordinates)
    return least < most and least < end and most > 0


def _run_lengths(annotation: Entry, size: Size) -> list[int]:
    """Lengths of the runs of zeros and ones down the columns, also of COCO's compressed form."""
    name, shape = f"the segmentation of annotation {annotation['id']!r}", annotation["segmentation"]
    if list(shape["size"]) != list(size):
        raise Fault(f"{name} is of {shape['size']} pixels (height, width), expected those of its image, {list(size)}")
    counts = shape["counts"]
    runs = _decompressed(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        raise Fault(f"{name} has counts that are not run lengths")
    if sum(runs) != size[0] * size[1]:
        raise Fault(f"{name} has run lengths of {sum(runs)} pixels together, expected {size[0]} * {size[1]}")
    return runs


def _decompressed(text: str) -> list[int]:
    # pycocotools has no function for this, and where the runs end early its masks are memory that nobody wrote. Numbers
    # are in digits of five bits from the lowest, with bit 5 set if more follow; from the third run on they are
    # differences to the run before the last.
    runs: list[int] = []
    value = shift = 0
    for character in text:
        digit = ord(character) - 48
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs


def draw_mask(annotation: Entry, size: Size) -> NDArray[np.uint8]:
    """Mask (H, W) of ones where the object is; without one, where none is given.

    Raises:
        Fault: it is not as in COCO.
    """
    shape = annotation.get("segmentation")
    if isinstance(shape, Mapping) and shape:
        runs = _run_lengths(annotation, size)
        return np.repeat(np.arange(len(runs)) % 2, runs).astype(np.uint8).reshape(size[::-1]).T
    if not shape or not (polygons := _polygons(annotation)):
        return np.zeros(size, np.uint8)
    return rle.decode(rle.merge(rle.frPyObjects(polygons, *size)))


def _some(chosen: list[Entry], of: list[Entry]) -> str:
    first = chosen[0]
    return f"{len(chosen)} of {len(of)} annotations (first: annotation {first['id']!r} of image {first['image_id']})"
