"""Image files: their pixels in every mode that Pillow knows, which files are images, and names for results."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("lightning")
from pyinvolution.recipes import RecipeError
from pyinvolution.recipes.data import UnreadableSample
from pyinvolution.recipes.images import find_images, is_hidden, output_names, read_image, read_pixels, relative_names

GRAY = np.linspace(0, 255, 24, dtype=np.uint8).reshape(4, 6)
"""What every file of this module shows."""
PICTURE = Image.fromarray(GRAY)
IN_16_BITS = GRAY.astype(np.uint16) * 257


def png(channels: int, color_type: int) -> bytes:
    """A PNG file of 16 bits, which Pillow cannot write in colour; an alpha channel is half transparent."""
    values = np.repeat(IN_16_BITS[..., None], channels, 2)
    if channels % 2 == 0:
        values[..., -1] = 32768
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", GRAY.shape[1], GRAY.shape[0], 16, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def with_palette():
    """Indices in another order than the colours, every second one transparent."""
    picture = Image.fromarray(255 - GRAY)
    picture.putpalette(bytes(255 - index // 3 for index in range(768)))
    return picture


def half_transparent(mode):
    picture = PICTURE.convert(mode)
    picture.putalpha(128)
    return picture


FILES = {
    "gray.png": PICTURE,
    "gray.tif": PICTURE,
    "rgb.bmp": PICTURE.convert("RGB"),
    "alpha.png": half_transparent("L"),
    "rgb_alpha.png": half_transparent("RGB"),
    "palette.png": with_palette(),
    "cmyk.tif": PICTURE.convert("RGB").convert("CMYK"),
    "gray16.png": Image.fromarray(IN_16_BITS),
    "gray16.tif": Image.fromarray(IN_16_BITS),
    "gray16.pgm": Image.fromarray(IN_16_BITS),
    "float.tif": Image.fromarray(GRAY.astype(np.float32) / 255),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FILES)
def test_pixels(tmp_path, name):
    FILES[name].save(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.mode == "RGB"
    assert (np.asarray(image) == GRAY[..., None]).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("channels", "color_type"), [(1, 0), (3, 2), (2, 4), (4, 6)])
def test_png_of_16_bits(tmp_path, channels, color_type):
    (tmp_path / "image.png").write_bytes(png(channels, color_type))
    assert (np.asarray(read_image(tmp_path / "image.png")) == GRAY[..., None]).all()


@pytest.mark.filterwarnings("error")
def test_transparent_palette(tmp_path):
    with_palette().save(tmp_path / "image.png", transparency=bytes([0, 255] * 128))
    assert (np.asarray(read_image(tmp_path / "image.png")) == GRAY[..., None]).all()


def test_values_between_two_levels(tmp_path):
    """16 bits are rounded to the nearest of 8."""
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / "image.png")
    expected = np.floor(values / 257 + 0.5)
    assert (np.asarray(read_image(tmp_path / "image.png"))[..., 0] == expected).all()


def test_tiff_of_12_bits(tmp_path):
    """Pillow has no mode of 12 bits: it reads them as 16, and they would be nearly black."""
    values = np.array([[0, 4095, 2048, 1]], np.uint16)
    packed = "".join(f"{value:012b}" for value in values.flatten())
    strip = bytes(int(packed[i : i + 8], 2) for i in range(0, len(packed), 8))
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, len(strip))]
    strip = strip.ljust(8, b"\0")
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHIHH", tag, 3, 1, v, 0) for tag, v in tags)
    header = struct.pack("<2sHI", b"II", 42, 8 + len(strip))
    (tmp_path / "image.tif").write_bytes(header + strip + directory + bytes(4))
    assert Image.open(tmp_path / "image.tif").mode == "I;16"
    assert np.asarray(read_image(tmp_path / "image.tif"))[0, :, 0].tolist() == [0, 255, 128, 0]


@pytest.mark.parametrize(
    ("values", "arguments", "message"),
    [
        (IN_16_BITS.astype(np.int32), {}, "its mode is I .integers of 32 bits or with a sign., expected 8 or 16 bits"),
        (GRAY.astype(np.float32), {}, "its values of mode F are in 0 to 255, expected 0 to 1"),
        (GRAY.astype(np.float32) / 255 - 0.5, {}, "its values of mode F are in -0.5 to 0.5, expected 0 to 1"),
        (np.where(GRAY == 0, np.nan, 0.5).astype(np.float32), {}, "its values of mode F are in nan to nan, expected"),
        (IN_16_BITS, {"tiffinfo": {262: 0}}, "it has 16 bits of which 0 is white, expected 0 to be black"),
    ],
)
def test_values_of_unknown_range(tmp_path, values, arguments, message):
    path = tmp_path / "image.tif"
    Image.fromarray(values).save(path, **arguments)
    with pytest.raises(UnreadableSample, match=f"cannot read image {path}: {message}"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_damaged_files_are_named(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    for broken in (content[: len(content) // 2], b"", b"text"):
        path.write_bytes(broken)
        with pytest.raises(UnreadableSample, match=f"cannot read image {path}"):
            read_image(path)
    path.unlink()
    with pytest.raises(UnreadableSample, match=f"cannot read image {path}: .*No such file"):
        read_image(path)


def test_damaged_exif(tmp_path):
    """The pixels are there."""
    PICTURE.save(tmp_path / "image.png", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0\xff\xff")
    assert (np.asarray(read_image(tmp_path / "image.png"))[..., 0] == GRAY).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation, suffix):
    """The first row of the stored image is the top, bottom, left or right of what is seen, perhaps mirrored."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    PICTURE.save(tmp_path / f"image.{suffix}", exif=exif)
    if suffix == "tif" and orientation > 4:
        with pytest.raises(UnreadableSample, match=r"image.tif: it is TIFF with swapped sides .*, expected it upright"):
            read_image(tmp_path / "image.tif")
        return
    seen = {
        1: GRAY,
        2: GRAY[:, ::-1],
        3: GRAY[::-1, ::-1],
        4: GRAY[::-1],
        5: GRAY.T,
        6: GRAY[::-1].T,
        7: GRAY[::-1, ::-1].T,
        8: GRAY[:, ::-1].T,
    }[orientation]
    assert (np.asarray(read_image(tmp_path / f"image.{suffix}"))[..., 0] == seen).all()


def both(path):
    """What `read_pixels` and `read_image` make of a file, (H, W, 3)."""
    return read_pixels(path).permute(1, 2, 0).numpy(), np.asarray(read_image(path))


COLOURS = np.dstack(
    [np.linspace(start, end, 48 * 32).reshape(32, 48) for start, end in ((0, 255), (200, 40), (90, 90))]
)


@pytest.mark.parametrize("orientation", [0, *range(1, 9), 9])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_is_read_as_by_pillow(tmp_path, orientation, mode):
    """The two decoders may be built with libjpegs that differ by a level."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(COLOURS.astype(np.uint8)).convert(mode).save(tmp_path / "1.jpg", exif=exif, quality=90)
    ours, pillows = both(tmp_path / "1.jpg")
    assert ours.shape == ((48, 32, 3) if 5 <= orientation <= 8 else (32, 48, 3))
    assert ours.dtype == np.uint8
    assert np.abs(ours.astype(int) - pillows).max() <= 1


def test_jpeg_with_damaged_exif(tmp_path):
    Image.fromarray(COLOURS.astype(np.uint8)).save(
        tmp_path / "1.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0\xff\xff"
    )
    ours, pillows = both(tmp_path / "1.jpg")
    assert np.abs(ours.astype(int) - pillows).max() <= 1


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def exif(order: str, size: int, orientation: int = 6) -> bytes:
    """EXIF with an orientation of 16 or 32 bits in little or big endian."""
    value = struct.pack(order + {16: "H", 32: "I"}[size], orientation).ljust(4, b"\0")
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, 1)
    return b"Exif\0\0" + header + struct.pack(order + "HHI", 274, {16: 3, 32: 4}[size], 1) + value + bytes(4)


XMP = (
    b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    b'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
    b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/"%s/></rdf:RDF></x:xmpmeta>'
)


@pytest.mark.parametrize(
    "segments",
    [
        [XMP % b"", exif("<", 16)],
        [exif(">", 16), XMP % b""],
        [exif("<", 32)],
        [exif(">", 32)],
        [XMP % b' tiff:Orientation="6"'],
    ],
)
def test_jpeg_with_orientation_in_other_places(tmp_path, segments):
    """Behind XMP, in 32 bits, or in XMP."""
    Image.fromarray(COLOURS.astype(np.uint8)).save(tmp_path / "1.jpg")
    content = (tmp_path / "1.jpg").read_bytes()
    marked = b"".join(segment(0xE1, part) for part in segments)
    (tmp_path / "1.jpg").write_bytes(content[:2] + marked + content[2:])
    ours, pillows = both(tmp_path / "1.jpg")
    assert ours.shape == (48, 32, 3)
    assert np.abs(ours.astype(int) - pillows).max() <= 1


@pytest.mark.parametrize("name", FILES)
def test_other_files_are_read_by_pillow(tmp_path, name):
    FILES[name].save(tmp_path / name)
    ours, _ = both(tmp_path / name)
    assert (ours == GRAY[..., None]).all()
    content = (tmp_path / name).read_bytes()
    assert (read_pixels(content).numpy() == GRAY).all()


def test_pixels_of_damaged_files_are_refused(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "1.jpg")
    content = (tmp_path / "1.jpg").read_bytes()
    for broken in (content[: len(content) // 2], content[:10], b"", b"text"):
        (tmp_path / "1.jpg").write_bytes(broken)
        with pytest.raises(UnreadableSample, match=f"cannot read image {tmp_path / '1.jpg'}"):
            read_pixels(tmp_path / "1.jpg")
        with pytest.raises(UnreadableSample, match="cannot read image 7 of a table"):
            read_pixels(broken, "7 of a table")
    with pytest.raises(UnreadableSample, match=r"cannot read image .*none\.jpg: .*No such file"):
        read_pixels(tmp_path / "none.jpg")


def test_found_images(tmp_path):
    """In any depth, without what is hidden below the root; the root itself may be in a hidden folder."""
    root = tmp_path / ".cache" / "photos"
    kept = ["1.jpg", "a/1.JPG", "a/b/2.png"]
    for name in (
        *kept,
        ".3.jpg",
        "a/._1.jpg",
        ".ipynb_checkpoints/1.jpg",
        "a/.x/y/1.jpg",
        "__MACOSX/1.jpg",
        "notes.txt",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "folder.png").mkdir()
    found = find_images(root)
    assert relative_names(found, root) == kept
    assert find_images(root / "a/._1.jpg") == [root / "a/._1.jpg"], "asked for by name"
    assert relative_names([root / "1.jpg"], root / "1.jpg") == ["1.jpg"]
    assert not is_hidden(found[0].relative_to(root))
    with pytest.raises(RecipeError, match=f"no image to predict in {root / '.ipynb_checkpoints' / 'no'}"):
        find_images(root / ".ipynb_checkpoints" / "no")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a/1.jpg", "b/2.jpg"], ["1", "2"]),
        (["a/1.jpg", "b/1.jpg"], ["a/1", "b/1"]),
        (["a/1.jpg", "b/1.jpg", "2.jpg"], ["a/1", "b/1", "2"]),
        (["1.jpg", "1.png"], ["1.jpg", "1.png"]),
        (["a_1/2.jpg", "a/1_2.jpg"], ["2", "1_2"]),
        (["A/x.jpg", "a/X.jpg"], ["0_x", "1_X"]),
        (["../b/1.jpg", "b/1.jpg"], ["0_1", "1_1"]),
        (["../../1.jpg", "/etc/2.jpg"], ["1", "2"]),
        (["v1.2.jpg", "v1.3.jpg"], ["v1.2", "v1.3"]),
    ],
)
def test_names_of_results(names, expected):
    """Unique, and within the folder of the results."""
    assert output_names(names) == expected
