"""make-data from published forms: CIFAR-10, CamVid and VOC, in trees that the tests make, and in the real ones."""

import json
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("lightning")
from pyinvolution import cli
from pyinvolution.recipes import CocoData, ImageFolderData, LabelMapData, RecipeError
from pyinvolution.recipes import files as files_module
from pyinvolution.recipes.classification.cifar10 import BATCHES, CLASSES, write_cifar10
from pyinvolution.recipes.detection.voc import write_voc
from pyinvolution.recipes.files import unpacked
from pyinvolution.recipes.segmentation import camvid
from pyinvolution.recipes.segmentation.label_maps import IGNORED


def published(name: str) -> Path:
    """A file of published data, where the tests have been told of a folder with them."""
    folder = os.environ.get("PYINVOLUTION_TEST_DATA")
    path = Path(folder or "", name)
    if not folder or not path.is_file():
        pytest.skip(f"PYINVOLUTION_TEST_DATA names no folder with {name}")
    return path


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as exit:
        cli.main(["make-data", *map(str, arguments)])
    assert exit.value.code == 2
    return capsys.readouterr().err


def packed(folder: Path, kind: str) -> Path:
    """An archive of the folder, in a folder of its own as publishers pack them."""
    path = folder.with_name(f"archive.{kind}")
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in files:
                archive.write(file, Path("data", file.relative_to(folder)))
    else:
        with tarfile.open(path, f"w:{kind.partition('.')[2]}") as archive:
            for file in files:
                archive.add(file, Path("data", file.relative_to(folder)))
    return path


# --- CIFAR-10 ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """The python version with ten images in each file: pixels by file, and the labels 0 to 9."""
    folder = tmp_path_factory.mktemp("cifar") / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    pixels = {}
    for name in (*BATCHES["train"], *BATCHES["test"]):
        pixels[name] = generator.integers(0, 256, (10, 3072), dtype=np.uint8)
        content = {b"data": pixels[name], b"labels": list(range(10)), b"batch_label": b"training batch"}
        (folder / name).write_bytes(pickle.dumps(content, protocol=3))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": []}))
    return folder, pixels


@pytest.mark.parametrize("kind", ["folder", "tar.gz", "tar.xz", "zip"])
def test_cifar10_of_the_python_version(batches, tmp_path, capsys, kind):
    """Rows are 1,024 red, green and blue values; the label names the folder."""
    folder, pixels = batches
    source = folder if kind == "folder" else packed(folder, kind)
    with pytest.raises(SystemExit) as exit:
        cli.main(["make-data", "cifar10", str(tmp_path), f"--source={source}"])
    assert not exit.value.code
    assert "train: 50, test: 10 images" in capsys.readouterr().out
    for label, name in enumerate(CLASSES):
        found = np.asarray(Image.open(tmp_path / "train" / name / f"{20 + label:05d}.png"))
        row = pixels["data_batch_3"][label]
        assert (found == np.stack([row[:1024], row[1024:2048], row[2048:]], 1).reshape(32, 32, 3)).all()
        assert len([*(tmp_path / "test" / name).iterdir()]) == 1
    data = ImageFolderData(str(tmp_path), num_workers=0)
    data.setup("fit")
    assert data.classes == list(CLASSES)
    assert (len(data.train_samples), len(data.val_samples)) == (50, 10)


def test_cifar10_of_folders(batches, tmp_path):
    """Files are copied as they are; those that are there already are not written again."""
    write_cifar10(tmp_path / "one", batches[0])
    (tmp_path / "one/train/cat/.hidden.png").write_bytes(b"")
    assert write_cifar10(tmp_path / "two", tmp_path / "one") == {"train": 50, "test": 10}
    files = sorted(path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*.png"))
    assert len(files) == 60
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)
    times = [(tmp_path / "two" / file).stat().st_mtime_ns for file in files]
    write_cifar10(tmp_path / "two", tmp_path / "one")
    assert times == [(tmp_path / "two" / file).stat().st_mtime_ns for file in files]


class Harmful:
    """Runs a command when it is unpickled by plain pickle."""

    def __reduce__(self):
        return os.mkdir, (os.environ["HARM_OF_A_HOSTILE_FILE"],)


def test_cifar10_that_is_none(batches, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "source"
    folder.mkdir()
    for path in batches[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    monkeypatch.setenv("HARM_OF_A_HOSTILE_FILE", str(tmp_path / "harm"))
    for content, message in (
        (pickle.dumps(Harmful()), "asks for posix.mkdir, expected arrays only"),
        (b"text", "is not one of CIFAR-10's files"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}), "it has 2 images and 1 labels"),
        (pickle.dumps({b"data": np.zeros((1, 9), np.uint8), b"labels": [1]}), "is not one of CIFAR-10's files"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}), "is not one of CIFAR-10's files"),
    ):
        (folder / "data_batch_2").write_bytes(content)
        assert message in error_of(capsys, "cifar10", tmp_path / "out", f"--source={folder}")
    assert not (tmp_path / "harm").exists()
    (tmp_path / "empty").mkdir()
    assert "expected CIFAR-10's python version" in error_of(
        capsys, "cifar10", tmp_path, f"--source={tmp_path / 'empty'}"
    )
    (tmp_path / "empty/train/cat").mkdir(parents=True)
    (tmp_path / "empty/test").mkdir()
    message = error_of(capsys, "cifar10", tmp_path, f"--source={tmp_path / 'empty'}")
    assert "train has the class folders cat, expected airplane" in message
    (tmp_path / "cifar-100-python").mkdir()
    for name in ("train", "test", "meta"):
        (tmp_path / "cifar-100-python" / name).write_bytes(b"")
    message = error_of(
        capsys, "cifar10", tmp_path / "out", f"--source={packed(tmp_path / 'cifar-100-python', 'tar.gz')}"
    )
    assert "--source: train is not a folder, expected CIFAR-10's python version (data_batch_1, ...)" in message
    for split in ("train", "test"):
        for name in CLASSES:
            (tmp_path / "empty" / split / name).mkdir(parents=True, exist_ok=True)
    message = error_of(capsys, "cifar10", tmp_path / "out", f"--source={tmp_path / 'empty'}")
    assert "--source has no image in train, expected CIFAR-10's python version" in message
    assert not (tmp_path / "out").exists()


def test_cifar10_beside_other_data(batches, tmp_path):
    """Images of another form, or of a split that would be evaluated, are not mixed with these."""
    folders, out = tmp_path / "folders", tmp_path / "out"
    for split in BATCHES:
        for name in CLASSES:
            (folders / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(folders / split / name / "0001.jpg")
    write_cifar10(out, batches[0])
    before = sorted(out.rglob("*"))
    with pytest.raises(
        RecipeError, match=r"out/train/airplane/00000\.png is not an image of this data set, expected a folder"
    ):
        write_cifar10(out, folders)
    assert sorted(out.rglob("*")) == before
    (tmp_path / "other/val/cat").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "other/val/cat/1.png")
    with pytest.raises(RecipeError, match=r"other/val/cat/1\.png is not an image of this data set"):
        write_cifar10(tmp_path / "other", folders)


def interrupted_after(monkeypatch, files, write):
    """Call ``write``, which is interrupted when it has written so many files."""
    count, real = [0], files_module._write

    def stop(path, content):
        if count[0] == files:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f".{path.name}.part").write_bytes(content[:9])
            raise KeyboardInterrupt
        count[0] += 1
        real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(files_module, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            write()


def test_cifar10_that_was_interrupted(batches, tmp_path, monkeypatch):
    """There is no data set until it is complete; the same command completes it."""
    interrupted_after(monkeypatch, 55, lambda: write_cifar10(tmp_path, batches[0]))
    assert [path.name for path in sorted(tmp_path.iterdir())] == [".test.part", ".train.part"]
    with pytest.raises(RecipeError, match="has no folder 'val'"):
        ImageFolderData(str(tmp_path), num_workers=0).setup("fit")
    write_cifar10(tmp_path, batches[0])
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["test", "train"]
    assert len(list(tmp_path.rglob("*.png"))) == 60
    assert not list(tmp_path.rglob("*.part"))


def test_archives_that_are_none(tmp_path, capsys):
    """Missing, of another kind, cut off, or with a member outside of the folder."""
    assert "there is no such file" in error_of(capsys, "cifar10", tmp_path, f"--source={tmp_path / 'none.tar'}")
    (tmp_path / "text.tar").write_text("text")
    message = error_of(capsys, "camvid", tmp_path, f"--source={tmp_path / 'text.tar'}")
    assert "expected a folder, a tar archive or a zip archive" in message
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_bytes(np.random.default_rng(0).bytes(200_000))
    for kind in ("tar.gz", "tar.xz"):
        whole = packed(tmp_path / "tree", kind)
        whole.write_bytes(whole.read_bytes()[:100_000])
        assert "cannot unpack" in error_of(capsys, "bccd", tmp_path / "out", f"--source={whole}")
    with tarfile.open(tmp_path / "outside.tar", "w") as archive:
        archive.add(tmp_path / "text.tar", "../escaped")
    with pytest.raises(RecipeError, match="cannot unpack"), unpacked(tmp_path / "outside.tar"):
        pass
    with zipfile.ZipFile(tmp_path / "outside.zip", "w") as archive:
        archive.write(tmp_path / "text.tar", "../escaped")
    with pytest.raises(RecipeError, match=r"escaped is outside of the archive"), unpacked(tmp_path / "outside.zip"):
        pass
    with zipfile.ZipFile(tmp_path / "plain.zip", "w") as archive:
        archive.write(tmp_path / "tree/file", "file")
        archive.write(tmp_path / "tree/file", "a/photo..1.jpg")
    with unpacked(tmp_path / "plain.zip") as folder:
        assert sorted(path.name for path in folder.rglob("*")) == ["a", "file", "photo..1.jpg"]
    with zipfile.ZipFile(tmp_path / "plain.zip", "w") as archive:
        archive.write(tmp_path / "tree/file", "file")
    plain = (tmp_path / "plain.zip").read_bytes()
    central = plain.index(b"PK\1\2")
    for offset, value, message in ((6, 1, "encrypted"), (8, 9, "compression method is not supported")):
        content = bytearray(plain)
        content[offset] = content[central + offset + 2] = value  # the flags, and the kind of compression
        (tmp_path / "other.zip").write_bytes(content)
        found = error_of(capsys, "bccd", tmp_path / "out", f"--source={tmp_path / 'other.zip'}")
        assert "--source: cannot unpack" in found
        assert message in found
    assert not (tmp_path / "out").exists()


def test_options_belong_to_their_data(tmp_path, capsys):
    assert "cifar10 needs --source" in error_of(capsys, "cifar10", tmp_path)
    assert "expected none: digits is made here" in error_of(capsys, "digits", tmp_path, "--source=x")
    message = error_of(capsys, "bccd", tmp_path, "--source=x", "--first-pixel=0")
    assert "--first-pixel is given with bccd, expected it with voc" in message


# --- CamVid -----------------------------------------------------------------------------------------------------------


def write_segnet(root: Path) -> Path:
    """SegNet's folders with one small scene a split, whose columns are the values 0 to 11."""
    for split in ("train", "val", "test"):
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir(parents=True)
        labels = np.tile(np.arange(12, dtype=np.uint8), (8, 2))
        Image.fromarray(labels).save(root / f"{split}annot/1.png")
        Image.new("RGB", (24, 8), (10, 20, 30)).save(root / f"{split}/1.jpg")
    return root


def test_camvid(tmp_path):
    source = write_segnet(tmp_path / "source")
    assert camvid.write_camvid(tmp_path / "out", packed(source, "tar.gz")) == {"train": 1, "val": 1, "test": 1}
    data = LabelMapData(str(tmp_path / "out"), val="test", num_workers=0)
    data.setup("fit")
    image, target = data.val_samples[0]
    assert image.shape == (3, 8, 24)
    assert target[0, :12].tolist() == [*range(11), IGNORED]
    assert data.classes == list(camvid.CLASSES)
    assert data.table.palette[3].tolist() == [128, 64, 128], "of the road"
    (source / "valannot/1.png").unlink()
    with pytest.raises(RecipeError, match=r"has no valannot/1.png, expected a label map for every image"):
        camvid.write_camvid(tmp_path / "other", source)
    (source / "val/1.jpg").unlink()
    with pytest.raises(RecipeError, match="has no image in val"):
        camvid.write_camvid(tmp_path / "other", source)


def test_camvid_beside_other_data(tmp_path, monkeypatch):
    """Neither images in PNG beside JPEG, nor another table; and no table before the images are complete."""
    source, out = write_segnet(tmp_path / "source"), tmp_path / "out"
    interrupted_after(monkeypatch, 5, lambda: camvid.write_camvid(out, source))
    with pytest.raises(RecipeError, match="cannot read the table of classes"):
        LabelMapData(str(out), num_workers=0).setup("fit")
    camvid.write_camvid(out, source)
    assert not list(out.rglob("*.part"))
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    camvid.write_camvid(out, source)
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    (out / "classes.yaml").write_text("mine")
    with pytest.raises(
        RecipeError, match=r"classes\.yaml is there with other content, expected a folder without other"
    ):
        camvid.write_camvid(out, source)
    assert (out / "classes.yaml").read_text() == "mine"
    for split in camvid.SPLITS:
        (source / split / "1.jpg").unlink()
        Image.new("RGB", (24, 8), (10, 20, 30)).save(source / split / "1.png")
    with pytest.raises(RecipeError, match=r"out/images/test/1\.jpg is not an image of this data set"):
        camvid.write_camvid(out, source)


# --- VOC --------------------------------------------------------------------------------------------------------------

OBJECT = "<object><name>{name}</name>{flags}<bndbox>{box}</bndbox></object>"


def thing(name, box, flags=""):
    sides = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    return OBJECT.format(name=name, flags=flags, box="".join(f"<{side}>{value}</{side}>" for side, value in sides))


def write_tree(
    root: Path, images: dict[str, list[str]], size="<size><width>40</width><height>30</height></size>"
) -> Path:
    """VOC's tree; the image "a" is for training and all others for val."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for name, objects in images.items():
        (root / f"Annotations/{name}.xml").write_text(f"<annotation>{size}{''.join(objects)}</annotation>")
        Image.new("RGB", (40, 30)).save(root / f"JPEGImages/{name}.jpg")
    (root / "ImageSets/Main/train.txt").write_text("a\n")
    (root / "ImageSets/Main/val.txt").write_text("".join(f"{name}  1\n" for name in images if name != "a"))
    return root


def objects_of(root: Path, split: str) -> list[dict]:
    return json.loads((root / f"annotations/instances_{split}.json").read_text())["annotations"]


def test_voc_counts_pixels_from_one(tmp_path):
    """xmin = 1 and xmax = 40 is the whole width; one pixel is a box of width 1."""
    images = {"a": [thing("dog", (1, 1, 40, 30)), thing("cat", (7, 9, 7, 9))], "b": [thing("dog", (2.5, 1, 4, 2))]}
    source = write_tree(tmp_path / "source", images)
    assert write_voc(tmp_path / "out", source) == {"train": 1, "val": 1}
    whole, pixel = objects_of(tmp_path / "out", "train")
    assert (whole["bbox"], whole["area"], whole["category_id"]) == ([0, 0, 40, 30], 1200, 2)
    assert (pixel["bbox"], pixel["category_id"]) == ([6, 8, 1, 1], 1)
    assert objects_of(tmp_path / "out", "val")[0]["bbox"] == [1.5, 0, 2.5, 2]
    write_voc(tmp_path / "zero", source, first_pixel=0)
    assert objects_of(tmp_path / "zero", "train")[1]["bbox"] == [7, 9, 1, 1]
    data = CocoData(
        str(tmp_path / "out"), "images", "images", "annotations/instances_train.json", "annotations/instances_val.json",
        num_workers=0,
    )  # fmt: skip
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(masks=False))
    data.setup("fit")
    assert data.classes == ["cat", "dog"]
    assert data.val_samples[0][1]["boxes"].tolist() == [[1.5, 0, 4, 2]]


def test_voc_flags(tmp_path):
    """Difficult objects are crowds, others, or none; truncated is kept as a field."""
    flags = "<difficult>1</difficult><truncated>1</truncated>"
    source = write_tree(
        tmp_path / "source", {"a": [thing("dog", (1, 1, 9, 9), flags), thing("dog", (2, 2, 9, 9))], "b": []}
    )
    for difficult, crowds in (("crowd", [1, 0]), ("keep", [0, 0]), ("drop", [0])):
        write_voc(tmp_path / difficult, source, difficult=difficult)
        found = objects_of(tmp_path / difficult, "train")
        assert [entry["iscrowd"] for entry in found] == crowds
        assert [entry["truncated"] for entry in found] == [1, 0][-len(crowds) :]
        assert [entry["difficult"] for entry in found] == [1, 0][-len(crowds) :]


def test_voc_boxes_outside(tmp_path, recwarn):
    boxes = [(-5, 0, 3, 50), (39, 29, 80, 80), (41, 1, 50, 9), (9, 9, 3, 3), (1, 1, 5, 5)]
    source = write_tree(tmp_path / "source", {"a": [thing("dog", box) for box in boxes], "b": []})
    write_voc(tmp_path / "out", source)
    assert [entry["bbox"] for entry in objects_of(tmp_path / "out", "train")] == [
        [0, 0, 3, 30],
        [38, 28, 2, 2],
        [0, 0, 5, 5],
    ]
    (text,) = [str(warning.message) for warning in recwarn if "boxes" in str(warning.message)]
    assert (
        "2 boxes reach beyond their image and are cut off, 2 boxes without a pixel in their image are left out" in text
    )


def test_voc_classes(tmp_path, capsys):
    source = write_tree(tmp_path / "source", {"a": [thing("dog", (1, 1, 9, 9)), thing("cow", (1, 1, 9, 9))], "b": []})
    arguments = ("voc", tmp_path / "out", f"--source={source}", "--classes", "dog", "cat")
    message = error_of(capsys, *arguments)
    assert "has objects of cow, expected the classes dog, cat; --unknown drop leaves the others out" in message
    with pytest.raises(SystemExit) as exit, pytest.warns(UserWarning, match="1 objects of other classes are left out"):
        cli.main(["make-data", *map(str, arguments), "--unknown=drop", "--splits", "train"])
    assert not exit.value.code
    content = json.loads((tmp_path / "out/annotations/instances_train.json").read_text())
    assert content["categories"] == [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    assert [entry["category_id"] for entry in content["annotations"]] == [1]
    assert not (tmp_path / "out/annotations/instances_val.json").exists()
    with pytest.raises(RecipeError, match=r"--classes is \['dog', 'dog'\], expected names that differ"):
        write_voc(tmp_path / "other", source, ["dog", "dog"])


def test_voc_beside_other_data(tmp_path, monkeypatch):
    """Splits of one source may be written one after the other; another data set, or other options, are refused."""
    images = {name: [thing("dog", (1, 1, 9, 9))] for name in "abcd"}
    source, out = write_tree(tmp_path / "source", images), tmp_path / "out"
    interrupted_after(monkeypatch, 3, lambda: write_voc(out, source))
    assert not (out / "annotations").exists(), "nothing lists images that are not there"
    write_voc(out, source)
    assert sorted(path.name for path in out.rglob("*.*")) == [
        *(f"{name}.jpg" for name in "abcd"),
        "instances_train.json",
        "instances_val.json",
    ]
    for splits in (["train"], ["val"]):
        write_voc(tmp_path / "steps", source, splits=splits)
    with pytest.raises(RecipeError, match=r"instances_train\.json is there with other content"):
        write_voc(out, source, first_pixel=0)
    other = write_tree(tmp_path / "other", {name: images[name] for name in "ab"})
    with pytest.raises(RecipeError, match=r"out/images/c\.jpg is not an image of this data set"):
        write_voc(out, other)
    Image.new("RGB", (40, 30), (9, 9, 9)).save(source / "JPEGImages/a.jpg")
    with pytest.raises(RecipeError, match=r"a\.jpg is there with other content"):
        write_voc(out, source)


def test_names_in_voc(tmp_path):
    """A byte order mark, a name with a space, and a second column."""
    source = write_tree(tmp_path / "source", {"a": [], "my image": [], "c": []})
    (source / "ImageSets/Main/train.txt").write_bytes(b"\xef\xbb\xbfmy image\r\n")
    (source / "ImageSets/Main/val.txt").write_text("a  1\nc -1\n")
    assert write_voc(tmp_path / "out", source) == {"train": 1, "val": 2}
    assert (tmp_path / "out/images/my image.jpg").is_file()


DAMAGE = {
    "two trees": (
        lambda root: (
            [shutil.copytree(root, root / name) for name in ("VOC2007", ".trash")]
            + [(root / "Annotations").rename(root / "x"), shutil.copytree(root / "VOC2007", root / "VOC2012")]
        ),
        "--source has several folders with Annotations, JPEGImages, ImageSets: VOC2007, VOC2012, expected it to be one",
    ),
    "two images": (
        lambda root: Image.new("RGB", (40, 30)).save(root / "JPEGImages/b.png"),
        "--source has b.jpg and b.png in JPEGImages, expected one image of a name in its splits",
    ),
    "split in Latin-1": (
        lambda root: (root / "ImageSets/Main/train.txt").write_bytes(b"caf\xe9\n"),
        "--source: train.txt is not UTF-8: ",
    ),
    "unknown encoding": (
        lambda root: (root / "Annotations/b.xml").write_text('<?xml version="1.0" encoding="foo-8"?><annotation/>'),
        "--source: b.xml: unknown encoding: foo-8",
    ),
    "no image": (
        lambda root: (root / "JPEGImages/b.jpg").unlink(),
        "lacks the image of 1 names in its splits, first b",
    ),
    "no XML": (
        lambda root: (root / "Annotations/b.xml").unlink(),
        "lacks the annotations of 1 names in its splits, first b",
    ),
    "no split": (lambda root: [path.unlink() for path in (root / "ImageSets/Main").iterdir()], "has no split"),
    "empty split": (lambda root: (root / "ImageSets/Main/val.txt").write_text("\n"), "the split val lists no images"),
    "no folder": (lambda root: (root / "JPEGImages").rename(root / "Images"), "expected VOC's tree"),
    "not XML": (lambda root: (root / "Annotations/b.xml").write_text("<annotation>"), "b.xml: no element found"),
    "no name": (
        lambda root: (root / "Annotations/b.xml").write_text("<annotation><object/></annotation>"),
        "b.xml: an object has no name",
    ),
    "no number": (
        lambda root: (root / "Annotations/b.xml").write_text(f"<a>{thing('dog', (1, 'nan', 3, 4))}</a>"),
        "b.xml: ymin of dog is 'nan', expected a number",
    ),
    "other size": (
        lambda root: Image.new("RGB", (30, 40)).save(root / "JPEGImages/b.jpg"),
        "b.xml: its width is 40, but b.jpg has 30 x 40 pixels",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_voc_that_is_damaged(tmp_path, name):
    source = write_tree(tmp_path / "source", {"a": [thing("dog", (1, 1, 9, 9))], "b": [thing("dog", (1, 1, 9, 9))]})
    damage, message = DAMAGE[name]
    damage(source)
    with pytest.raises(RecipeError, match="--source") as error:
        write_voc(tmp_path / "out", source)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists(), "nothing is written before all is read"


# --- The published files ----------------------------------------------------------------------------------------------


def test_published_bccd(tmp_path):
    """4,888 objects in 364 images; every box is within its image."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyinvolution.recipes.detection.voc.rank_zero_warn", lambda text: None)
        from pyinvolution.recipes import published_data

        counts = published_data.write("bccd", tmp_path, published("bccd.tar.xz"))
    assert counts == {"train": 205, "val": 87, "trainval": 292, "test": 72}
    content = [
        json.loads((tmp_path / f"annotations/instances_{split}.json").read_text()) for split in ("trainval", "test")
    ]
    assert sum(len(part["annotations"]) for part in content) == 4888
    for part in content:
        for entry in part["annotations"]:
            x, y, width, height = entry["bbox"]
            assert min(x, y) >= 0
            assert x + width <= 640
            assert y + height <= 480


def test_published_camvid(tmp_path):
    assert camvid.write_camvid(tmp_path, published("camvid.tar")) == {"train": 367, "val": 101, "test": 233}
    data = LabelMapData(str(tmp_path), num_workers=0, crop=(96, 128))
    data.setup("fit")
    image, target = data.val_samples[0]
    assert image.shape == (3, 360, 480)
    assert target.shape == (360, 480)
    assert set(target.unique().tolist()) <= {*range(11), IGNORED}
    image, target = data.train_samples[0]
    assert image.shape == (3, 96, 128)


def test_published_cifar10(tmp_path):
    """A few images of every class, since writing all takes a minute."""
    members: dict[str, int] = {}
    with tarfile.open(published("cifar10.tar.xz")) as archive:
        for member in archive:
            place = str(Path(member.name).parent)
            if member.isfile() and members.setdefault(place, 0) < 2:
                members[place] += 1
                archive.extract(member, tmp_path / "source", filter="data")
    assert write_cifar10(tmp_path / "out", tmp_path / "source") == {"train": 20, "test": 20}
    data = ImageFolderData(str(tmp_path / "out"), num_workers=0, val_transform=[])
    data.setup("fit")
    assert data.classes == sorted(CLASSES)
    assert data.val_samples[0][0].shape == (3, 32, 32)
