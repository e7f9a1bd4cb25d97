"""Tables of classes, and segmentation of a folder of images and a folder of label maps."""

import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from recipe_support import one_thread  # noqa: F401

pytest.importorskip("lightning")
from pyinvolution import cli
from pyinvolution.recipes import LabelMapData, RecipeError, plots
from pyinvolution.recipes.data import SeededDataset, UnreadableSample
from pyinvolution.recipes.segmentation.label_maps import IGNORED, ClassTable

CLASSES = [{"name": "sky", "color": [0, 0, 255]}, {"name": "tree", "color": [0, 128, 0], "values": [4, 5]}]


def save(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8), mode).save(path)
    return path


def test_values_become_train_ids(tmp_path):
    """The position in the table, for each of a class's values; ignored ones are 255, others an error."""
    table = ClassTable([*CLASSES, {"name": "car", "values": 255}], ignored=[9])
    path = save(tmp_path / "1.png", [[0, 4, 5], [255, 9, 0]])
    assert table.read_train_ids(path).tolist() == [[0, 1, 1], [2, IGNORED, 0]]
    assert table.values.tolist() == [0, 4, 255], "what predict writes"
    assert table.names == ["sky", "tree", "car"]
    picture = np.asarray(table.picture(np.array([[0, 1, IGNORED]], np.uint8)).convert("RGB"))
    assert picture.tolist() == [[[0, 0, 255], [0, 128, 0], [0, 0, 0]]]
    path = save(tmp_path / "2.png", [[0, 7, 6]])
    message = f"labels {path} have the value 6, expected the values of the table of classes, 0, 4 to 5, 9 and 255"
    with pytest.raises(RecipeError, match=message):
        table.read_train_ids(path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_become_train_ids(tmp_path, mode):
    colors = [
        {"name": "sky", "color": [0, 0, 255]},
        {"name": "tree", "color": [1, 2, 3], "values": [[0, 128, 0], [0, 127, 0]]},
    ]
    table = ClassTable(colors, ignored=[[0, 0, 0]], rgb=True)
    mask = [[[0, 0, 255], [0, 127, 0]], [[0, 128, 0], [0, 0, 0]]]
    picture = Image.fromarray(np.asarray(mask, np.uint8))
    (picture.quantize(4) if mode == "P" else picture.convert(mode)).save(tmp_path / "1.png")
    assert Image.open(tmp_path / "1.png").mode == mode
    assert table.read_train_ids(tmp_path / "1.png").tolist() == [[0, 1], [1, IGNORED]]
    assert table.values.tolist() == [0, 1]
    assert table.palette[1].tolist() == [1, 2, 3]
    save(tmp_path / "2.png", [[[0, 0, 254], [0, 0, 255]]])
    with pytest.raises(RecipeError, match=r"2\.png have the colour 0, 0, 254, expected one of the 4 colours"):
        table.read_train_ids(tmp_path / "2.png")
    for other in ("L", "LA", "CMYK", "YCbCr"):
        picture.convert(other).save(tmp_path / "3.tif")
        message = rf"3.tif are of mode {other}, expected colours \(mode RGB, RGBA or P\)"
        with pytest.raises(UnreadableSample, match=message):
            table.read_train_ids(tmp_path / "3.tif")


def test_colours_by_default():
    """Each class has one of its own, as in PASCAL VOC."""
    table = ClassTable([{"name": str(index)} for index in range(255)])
    assert len({tuple(color) for color in table.palette[:255].tolist()}) == 255
    assert table.palette[:3].tolist() == [[128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert table.palette[255].tolist() == [0, 0, 0]


def test_colours_by_default_are_not_among_those_given():
    entries = [{"name": "a"}, {"name": "b", "color": [128, 0, 0]}, {"name": "c", "color": [0, 0, 128]}, {"name": "d"}]
    entries += [{"name": "e"}, {"name": "f", "color": [0, 128, 128]}]
    palette = ClassTable(entries).palette.tolist()
    assert palette[1:3] == [[128, 0, 0], [0, 0, 128]]
    assert palette[4] == [128, 0, 128], "as without the given ones"
    assert len({tuple(color) for color in palette[:6]}) == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "is not a table of classes"),
        ({"names": ["sky"]}, "is not a table of classes"),
        ({"classes": ["sky"]}, "expected a list of mappings with a name"),
        ({"classes": []}, "classes is 0, expected 1 to 255 classes"),
        ({"classes": [{"name": str(index)} for index in range(256)]}, "classes is 256, expected 1 to 255"),
        ({"classes": [{"color": [0, 0, 0]}]}, r"classes\[0\] is .*, expected a name of its own"),
        ({"classes": [{"name": "a"}, {"name": "a"}]}, r"classes\[1\] is .*, expected a name of its own"),
        ({"classes": [{"name": "a", "id": 3}]}, "expected a name of its own, and perhaps color and values"),
        (
            {"classes": [{"name": "a", "values": 1}, {"name": "b"}]},
            r"values of b are \[1\], but a has one of them already",
        ),
        ({"classes": [{"name": "a", "values": []}]}, "expected at least one"),
        ({"classes": [{"name": "a", "values": 256}]}, "values of a: 256, expected a number from 0 to 255"),
        ({"classes": [{"name": "a", "values": True}]}, "values of a: True, expected a number from 0 to 255"),
        ({"classes": [{"name": "a", "color": [1, 2]}]}, "color of a: .*, expected three numbers from 0 to 255"),
        ({"classes": [{"name": "a"}], "ignored": [0]}, r"ignored is \[0\], but a has one of its values"),
        ({"classes": [{"name": "a"}], "rgb": True}, "values of a: None, expected three numbers"),
    ],
)
def test_wrong_tables(tmp_path, content, message):
    (tmp_path / "classes.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match=message):
        ClassTable.read(tmp_path / "classes.yaml")


def test_a_table_that_cannot_be_read(tmp_path):
    for content in (None, b"\xff\xfe", b"classes: ["):
        if content is not None:
            (tmp_path / "classes.yaml").write_bytes(content)
        with pytest.raises(RecipeError, match=r"cannot read the table of classes .*classes\.yaml"):
            ClassTable.read(tmp_path / "classes.yaml")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Six and two scenes in nested folders: sky above, tree (4 on the left, 5 on the right) below, a void column."""
    root = tmp_path_factory.mktemp("scenes")
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for index in range(count):
            labels = np.zeros((24, 32), np.uint8)
            labels[12:, :16], labels[12:, 16:], labels[:, 0] = 4, 5, 9
            image = generator.integers(0, 90, (24, 32, 3), dtype=np.uint8)
            image[:12] += 150
            name = f"{'ab'[index % 2]}/{index}"
            save(root / f"pictures/{split}/{name}.png", image)
            save(root / f"maps/{split}/{name}.png", labels)
    (root / "classes.yaml").write_text(yaml.safe_dump({"classes": CLASSES, "ignored": [9]}))
    return root


FOLDERS = {"images": "pictures/{split}", "labels": "maps/{split}", "val": "test"}


def test_samples(tree):
    data = LabelMapData(str(tree), **FOLDERS, crop=(16, 16), scale=(0.5, 1.0), num_workers=0)
    data.setup("fit")
    assert data.classes == ["sky", "tree"]
    assert [path.removeprefix(str(tree)) for path, _ in data.val_samples.files] == [
        "/pictures/test/a/0.png",
        "/pictures/test/b/1.png",
    ]
    image, target = data.val_samples[0]
    assert (image.shape, image.dtype) == ((3, 24, 32), torch.uint8)
    expected = torch.zeros(24, 32, dtype=torch.int64)
    expected[12:], expected[:, 0] = 1, IGNORED
    assert torch.equal(target, expected)
    for index in range(6):
        image, target = data.train_samples[index]
        assert image.shape == (3, 16, 16)
        assert target.shape == (16, 16)
        assert set(target.unique().tolist()) <= {0, 1, IGNORED}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_label_maps(tmp_path, orientation):
    """They are turned as their images are."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    labels = np.zeros((8, 12), np.uint8)
    labels[:3], labels[3:, :2] = 4, 9
    for folder, pixels in (("pictures", labels), ("maps", labels)):
        (tmp_path / folder / "test").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / folder / "test/1.png", exif=exif)
    table = {"classes": CLASSES, "ignored": [9]}
    data = LabelMapData(str(tmp_path), **FOLDERS, table=table, num_workers=0)
    data.setup("validate")
    image, target = data.val_samples[0]
    assert image.shape[1:] == ((12, 8) if orientation > 4 else (8, 12))
    assert torch.equal(target, torch.tensor([0, 1, IGNORED])[(image[0] // 4).long()])


def test_images_and_label_maps_in_one_folder(tmp_path):
    """NAME.png beside NAME.jpg is not an image, in predict neither; two images with one label map are refused."""
    for name in ("a", "b"):
        save(tmp_path / f"test/x/{name}.jpg", np.full((8, 8, 3), 90))
        save(tmp_path / f"test/x/{name}.png", np.zeros((8, 8)))
    common = {"val": "test", "table": {"classes": CLASSES}, "num_workers": 0}
    data = LabelMapData(str(tmp_path), images="{split}", labels="./{split}", **common)
    data.setup("validate")
    assert [(Path(image).name, Path(label).name) for image, label in data.val_samples.files] == [
        ("a.jpg", "a.png"),
        ("b.jpg", "b.png"),
    ]
    data.setup("predict")
    assert data.predict_samples.names == ["x/a.jpg", "x/b.jpg"]
    save(tmp_path / "test/x/b.bmp", np.full((8, 8, 3), 90))
    with pytest.raises(RecipeError, match=r"b\.bmp and .*b\.jpg have one label map, .*b\.png, expected one for each"):
        data.setup("validate")


def test_values_that_are_not_in_the_table_stop_a_run(tmp_path):
    """They are no matter of unreadable files, which may be skipped."""
    for name, value in (("1", 0), ("2", 9)):
        save(tmp_path / f"pictures/test/{name}.png", np.full((8, 8, 3), 90))
        save(tmp_path / f"maps/test/{name}.png", np.full((8, 8), value))
    data = LabelMapData(str(tmp_path), **FOLDERS, table={"classes": CLASSES}, num_workers=0, unreadable="skip")
    data.setup("validate")
    samples = SeededDataset(data.val_samples, 0, data.unreadable, training=False)
    assert (samples[0, 0][1] == 0).all()
    with pytest.raises(RecipeError, match=r"maps/test/2\.png have the value 9, expected the values of the table"):
        samples[0, 1]


def test_own_size_is_the_base_of_the_resize(tree):
    """Without a size, a factor of 0.5 halves each image, whatever its size: a crop of the image is half padding."""
    data = LabelMapData(
        str(tree), **FOLDERS, crop=(24, 32), scale=(0.5, 0.5), hflip=0.0, max_class_share=1.0, num_workers=0
    )
    data.setup("fit")
    for index in range(6):
        known = (data.train_samples[index][1] != IGNORED).sum()
        assert known <= 12 * 16
        assert known >= 6 * 8


def arguments(root, run):
    backbone = "{layers: [1, 1], base_channels: 16, stem_channels: 32, stem_kernel_size: 3}"
    options = f"{{backbone: rednet, neck_channels: 16, head_channels: 8, backbone_options: {backbone}}}"
    return [
        "fit",
        "--config=camvid/fpn_rednet_inv.yaml",
        f"--data.root={root}",
        "--data.images=pictures/{split}",
        "--data.labels=maps/{split}",
        "--data.batch_size=2",
        "--data.val_batch_size=2",
        "--data.num_workers=0",
        "--data.crop=[16, 16]",
        "--model.num_classes=2",
        f"--model.options={options}",
        "--model.warmup_steps=0",
        f"--trainer.default_root_dir={run}",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.max_epochs=2",
        "--trainer.check_val_every_n_epoch=1",
        "--trainer.log_every_n_steps=1",
    ]


def test_fit_and_predict(tree, tmp_path):
    """predict needs the checkpoint only: the table comes with it, and with it the values that are written."""
    cli.main([*arguments(tree, tmp_path / "run"), "--model.region_sizes=[100]"])
    logged = plots.read_metrics(tmp_path / "run")
    assert {name for name in logged if "regions" in name} <= {
        f"val/miou_regions/{name}" for name in ("below_100", "from_100")
    }
    assert "val/miou_regions/from_100" in logged
    (tmp_path / "photos").mkdir()
    save(tmp_path / "photos/x.png", np.zeros((24, 32, 3)))
    common = [f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu", "--data.root=/nowhere"]
    checkpoint = f"--ckpt_path={tmp_path / 'run/last.ckpt'}"
    cli.main(["predict", checkpoint, *common, f"--data.predict_root={tmp_path / 'photos'}"])
    found = np.asarray(Image.open(tmp_path / "predictions/labelIds/x_labelIds.png"))
    assert found.shape == (24, 32)
    assert set(np.unique(found)) <= {0, 4}
    colors = np.asarray(Image.open(tmp_path / "predictions/colors/x.png").convert("RGB"))
    assert (colors == np.where((found == 0)[..., None], [0, 0, 255], [0, 128, 0])).all()
    with pytest.raises(SystemExit) as exit:
        cli.main(["figure", f"--ours={tmp_path / 'run/last.ckpt'}", f"--baseline={tmp_path / 'run/best.ckpt'}",
                  f"--output={tmp_path / 'figure'}", "--images", "1"])  # fmt: skip
    assert not exit.value.code
    assert Image.open(tmp_path / "figure/comparison.png").size[0] > 300


def test_another_table_than_the_checkpoints(tree):
    data = LabelMapData(str(tree), **FOLDERS, num_workers=0)
    data.setup("validate")
    data.trainer = None
    content = {"classes": [{"name": "sky"}, {"name": "sea"}]}
    with pytest.raises(RecipeError, match=r"data\.table has the classes sky, tree; the checkpoint knows sky, sea"):
        data.check_table(content)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"val": "val"}, "has no split 'val': .*pictures/val is not a folder; expected .*/pictures/val/A/NAME.jpg and"),
        ({"labels": "none/{split}"}, r"has no split 'test': .*none/test is not a folder"),
        ({"images": "maps"}, "labels of 8 images are missing, first .*maps/train/test/a/0.png"),
        ({"table": "none.yaml"}, "cannot read the table of classes .*none.yaml"),
        ({"table": {"classes": []}}, "data.table: classes is 0"),
    ],
)
def test_wrong_arguments(tree, changed, message):
    values = FOLDERS | changed
    if changed == {"images": "maps"}:
        values = {"images": "maps", "labels": "maps/train", "val": "test"}
    with pytest.raises(RecipeError, match=message):
        LabelMapData(str(tree), **values, num_workers=0).setup("validate")


def test_a_missing_table_is_no_matter_for_predict(tree, tmp_path):
    data = LabelMapData(str(tmp_path), predict_root=str(tree / "pictures"), num_workers=0)
    data.setup("predict")
    assert data.table is None
    assert len(data.predict_samples) == 8


def test_the_documents_table(tmp_path):
    page = (Path(__file__).parents[1] / "docs/training.md").read_text()
    (block,) = re.findall(r"```yaml\n(# data/mine/classes.yaml.*?)```", page, re.DOTALL)
    (tmp_path / "classes.yaml").write_text(block)
    table = ClassTable.read(tmp_path / "classes.yaml")
    assert table.names == ["road", "sky"]
    assert table.train_ids(np.array([0, 1, 2, 255])).tolist() == [0, 1, 0, IGNORED]


def grey_png(bits: int, values: np.ndarray) -> bytes:
    """Values (H, W) of so many bits, which Pillow does not write."""
    rows = [np.unpackbits(row[:, None].astype(np.uint8), axis=1)[:, -bits:].ravel() for row in values]
    content = b"".join(b"\0" + np.packbits(row).tobytes() for row in rows)
    height, width = values.shape
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(content)), (b"IEND", b"")]
    written = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_of_few_bits(bits, tmp_path):
    """Which Pillow stretches to 0 ... 255."""
    values = np.array([[0, 1, 2, 3, 0], [3, 2, 1, 0, 1]])
    (tmp_path / "x.png").write_bytes(grey_png(bits, values))
    table = ClassTable([{"name": name} for name in "abcd"])
    assert table.read_train_ids(tmp_path / "x.png").tolist() == values.tolist()
