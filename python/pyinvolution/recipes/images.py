"""Image files: what is one, how it becomes 8-bit RGB, and how results are named after it."""

import os
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import pil_to_tensor

from pyinvolution.recipes.data import UnreadableSample
from pyinvolution.recipes.errors import RecipeError

__all__ = [
    "Source",
    "exif_orientation",
    "find_images",
    "is_hidden",
    "is_image_name",
    "output_names",
    "read_image",
    "read_pixels",
    "relative_names",
    "to_rgb",
    "upright",
]

Source = str | Path | bytes
"""An image: the path of its file, or the content."""

_OF_SYSTEMS = {"__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}

_JPEG = b"\xff\xd8\xff"
"""What a JPEG file begins with."""
_APP1 = b"\xff\xe1"
"""What a segment with EXIF or XMP begins with."""
_BITS, _PHOTOMETRIC, _ORIENTATION, _WHITE_IS_ZERO = 258, 262, 274, 0
"""Tags of TIFF, and a value of the second."""

_TURNS = dict(
    enumerate(
        (
            Image.Transpose.FLIP_LEFT_RIGHT,
            Image.Transpose.ROTATE_180,
            Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE,
            Image.Transpose.ROTATE_270,
            Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
        ),
        start=2,
    )
)
"""By the EXIF orientation."""
_FLIPPED = {2: (-1,), 3: (-2, -1), 4: (-2,), 5: (), 6: (-1,), 7: (-2, -1), 8: (-2,)}
"""Dimensions of pixels (3, H, W) that the same turns flip, after exchanging H and W from 5 on."""


def is_hidden(path: Path) -> bool:
    """Whether a part of ``path`` begins with a dot (.ipynb_checkpoints, ._1.jpg), or is a folder that operating systems
    make. Call it with a path relative to the data's root, which may itself be in a hidden folder."""
    return any(part.startswith(".") or part in _OF_SYSTEMS for part in path.parts)


def find_images(root: Path) -> list[Path]:
    """The images to predict: those in a folder, in any depth, that are not hidden, or ``root`` itself.

    Raises:
        RecipeError: there is none.
    """
    paths = [root] if root.is_file() else sorted(path for path in root.rglob("*") if _is_image(path, root))
    if not paths:
        raise RecipeError(f"there is no image to predict in {root}: set --data.predict_root to an image or a folder")
    return paths


def is_image_name(path: Path) -> bool:
    """Whether a file's suffix is one of images."""
    return path.suffix.lower() in IMG_EXTENSIONS


def _is_image(path: Path, root: Path) -> bool:
    return is_image_name(path) and not is_hidden(path.relative_to(root)) and path.is_file()


def read_pixels(source: Source, name: str | None = None) -> Tensor:
    """The pixels (3, H, W), uint8, of `read_image`.

    torchvision decodes JPEG, in less time than Pillow; it is as exact, but the two may have been built with libjpegs
    that differ by a level. Everything else, JPEG in CMYK included, and what torchvision refuses, is read by Pillow.

    Raises:
        UnreadableSample: as `read_image`.
    """
    if name is None and not isinstance(source, bytes):
        name = str(source)
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        if content[:3] == _JPEG:
            encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            pixels = decode_jpeg(encoded, ImageReadMode.UNCHANGED)
            if pixels.shape[0] in (1, 3):
                if _APP1 in content:  # torchvision misses EXIF behind XMP, and orientations of 32 bits
                    with Image.open(BytesIO(content)) as image:
                        pixels = _turned(pixels, exif_orientation(image))
                return pixels.expand(3, -1, -1).contiguous()
        source = content
    except (OSError, RuntimeError, Image.DecompressionBombError):
        pass  # Pillow knows better what is wrong, or reads it
    return pil_to_tensor(read_image(source, name))


def _turned(pixels: Tensor, orientation: int) -> Tensor:
    flipped = _FLIPPED.get(orientation)
    return pixels if flipped is None else (pixels.mT if orientation > 4 else pixels).flip(flipped)


def read_image(source: Source, name: str | None = None) -> Image.Image:
    """An image as 8-bit RGB, turned as its EXIF orientation says, as detectron2, mmdetection and OpenCV do.

    Transparency is dropped; see `to_rgb` for images of more than 8 bits.

    Args:
        source: the file, or its content.
        name: of the image in an error; None for the path.

    Raises:
        UnreadableSample: the file is missing or damaged, or has values whose range is unknown; the message names it.
    """
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            return upright(image, to_rgb)
    except Exception as error:  # decoders raise nearly anything on broken files
        shown = name or ("in memory" if isinstance(source, bytes) else source)
        raise UnreadableSample(f"cannot read image {shown}: {error}") from error


def upright(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """What ``convert`` makes of an image as it is opened, turned as the EXIF orientation of ``image`` says.

    Raises:
        ValueError: it is TIFF with swapped sides.
    """
    if image.format == "TIFF" and getattr(image, "tag_v2", {}).get(_ORIENTATION, 1) > 4:  # Pillow 13 mixes up its rows
        raise ValueError("it is TIFF with swapped sides (EXIF orientation 5 to 8), expected it upright")
    image.load()
    converted = convert(image)
    turn = _TURNS.get(exif_orientation(image))  # only now: Pillow turns TIFF when it decodes
    return converted if turn is None else converted.transpose(turn)


def exif_orientation(image: Image.Image) -> int:
    """From 1 (upright) to 8; 1 where there is none, or it is damaged: the pixels can be seen all the same."""
    try:
        orientation: Any = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        return 1
    return orientation if orientation in _TURNS else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """``image`` as 8-bit RGB. 16-bit gray (mode I;16) is scaled from 0 to 65535, floating point (mode F) from 0 to 1.

    Raises:
        ValueError: the range of the values is unknown: integers of 32 bits (mode I), signed ones, floating point values
            outside 0 to 1 or NaN, or 16-bit TIFF in which 0 is white.
    """
    if image.mode.startswith("I"):
        return Image.fromarray(_from_integers(image)).convert("RGB")
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError(f"its values of mode F are in {values.min():g} to {values.max():g}, expected 0 to 1")
        return Image.fromarray((255 * values).round().astype(np.uint8)).convert("RGB")
    if image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns of transparency on the direct way
    return image.convert("RGB")


def _from_integers(image: Image.Image) -> NDArray[np.uint8]:
    tags = getattr(image, "tag_v2", {})
    # Pillow gives 16-bit PGM, and earlier versions 16-bit PNG, as mode I with values of 0 to 65535.
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise ValueError("its mode is I (integers of 32 bits or with a sign), expected 8 or 16 bits without a sign")
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        raise ValueError("it has 16 bits of which 0 is white, expected 0 to be black")
    (bits,) = tags.get(_BITS, (16,))
    most = 2**bits - 1
    values = np.asarray(image).astype(np.uint32)
    return ((values * 255 + most // 2) // most).astype(np.uint8)


def relative_names(paths: Sequence[str | Path], root: str | Path) -> list[str]:
    """The paths relative to the folder ``root``, or to the folder of the image ``root``, with slashes."""
    folder = Path(root).parent if Path(root).is_file() else Path(root)
    return [Path(os.path.relpath(path, folder)).as_posix() for path in paths]


def output_names(names: Sequence[str]) -> list[str]:
    """A path for what is written about each image, without a suffix, from the relative paths of their files.

    They are unique, also where capitals do not count: the names of the files without their suffixes; where two files
    have the same, the relative paths; where these are the same too (1.jpg and 1.png), with the suffixes.
    """
    inside = [Path(*(part for part in Path(name).parts if part not in ("..", "/"))) for name in names]
    forms = [path.stem for path in inside], [path.with_suffix("").as_posix() for path in inside], list(map(str, inside))
    numbered = [f"{index}_{path.stem}" for index, path in enumerate(inside)]
    return next((form for form in forms if len({name.casefold() for name in form}) == len(form)), numbered)
