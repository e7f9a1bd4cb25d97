"""The detection recipe: data as COCO users know it, COCO's own evaluation, exact resumption, results and errors."""

import contextlib
import csv
import io
import json
import re
import shutil
import signal
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from recipe_support import (
    assert_same_state,
    interruption,
    one_thread,  # noqa: F401
    run_distributed,
    run_forked,
    training_state,
)
from torch import nn

from pyinvolution import cli
from pyinvolution.models import create_model, official_state_dict

pytest.importorskip("lightning")
pytest.importorskip("pycocotools")
import lightning.pytorch as pl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pyinvolution.recipes import CocoData, Detection, RecipeError, configs
from pyinvolution.recipes import cli as recipe_cli
from pyinvolution.recipes.data import UnreadableSample
from pyinvolution.recipes.detection import digits, pictures
from pyinvolution.recipes.detection.annotations import draw_mask
from pyinvolution.recipes.images import output_names

IDS = [3, 7, 90]
BACKBONE = {"layers": [1, 1], "stem_channels": 32, "base_channels": 16, "stem_kernel_size": 3}
OPTIONS = {
    "backbone": "rednet",
    "backbone_options": BACKBONE | {"frozen_stages": -1, "norm_eval": False},
    "neck": "involution",
    "channels": 32,
    "levels": [0, 1],
    "hidden": 32,
    "min_size": 48,
    "max_size": 64,
    "rpn_post_nms_top_n_train": 20,
    "rpn_post_nms_top_n_test": 20,
    "box_score_thresh": 0.0,
    "box_detections_per_img": 5,
}
HEIGHT, WIDTH = 48, 64


def rectangle(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def runs(x, y, w, h):
    """Uncompressed run lengths of a rectangle, down the columns."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[y : y + h, x : x + w] = 1
    flat = mask.T.flatten()
    edges = [0, *(np.flatnonzero(np.diff(flat)) + 1), flat.size]
    return {"size": [HEIGHT, WIDTH], "counts": np.diff(edges).tolist()}


def objects(index, generator):
    """Category, box and crowd of the objects in an image: the first is empty, the second has a crowd and a degenerate
    box beside an object, the third only a crowd; the others have two objects."""
    if index == 1:
        yield 7, (30, 4, 30, 30), 1
        yield 3, (10, 10, 0, 12), 0
    if index == 2:
        yield 3, (2, 2, 40, 40), 1
    if index not in (0, 2):
        x, y = generator.integers(0, 20, 2).tolist()
        yield IDS[index % 3], (x, y, 20, 16), 0
    if index > 2:
        yield 90, (34, 20, 24, 24), 0


def write_coco(root, train=8, val=5):
    generator = np.random.default_rng(0)
    for first, (split, count) in zip((1000, 2000), (("train2017", train), ("val2017", val)), strict=True):
        images, annotations = [], []
        (root / split).mkdir(parents=True)
        for index in range(count):
            number = first + 7 * index
            images.append({"id": number, "file_name": f"{number:012d}.png", "height": HEIGHT, "width": WIDTH})
            pixels = generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / images[-1]["file_name"])
            for category, box, crowd in objects(index, generator):
                entry = {"id": len(annotations) + 1, "image_id": number, "category_id": category, "bbox": list(box)}
                shape = runs(*box) if crowd or category == 90 else rectangle(*box)
                annotations.append(entry | {"area": box[2] * box[3], "iscrowd": crowd, "segmentation": shape})
        categories = [{"id": category, "name": f"class{category}"} for category in reversed(IDS)]
        path = root / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco"))


def arguments(data, run, *more, subcommand="fit"):
    return [
        subcommand,
        "--model=pyinvolution.recipes.Detection",
        "--data=pyinvolution.recipes.CocoData",
        f"--data.root={data}",
        f"--trainer.default_root_dir={run}",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=2",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--model.name=mask_rcnn",
        f"--model.options={json.dumps(OPTIONS)}",
        "--model.num_classes=4",
        "--model.reference_batch=2",
        "--model.lr=0.01",
        "--model.warmup_steps=2",
        "--model.decay=step",
        "--model.milestones=[1]",
        "--data.batch_size=2",
        "--data.num_workers=0",
        "--data.keep_empty=true",
        *more,
    ]


def prepared(data, **kwargs):
    module = CocoData(str(data), num_workers=0, **kwargs)
    module.setup("fit")
    return module


# --- Data -------------------------------------------------------------------------------------------------------------


def test_targets_of_training(data):
    """Crowds and degenerate boxes are left out, and images that have nothing else."""
    module = prepared(data, hflip=0.0)
    assert module.classes == ["class3", "class7", "class90"]
    assert module.category_ids == IDS
    samples = module.train_samples
    assert [samples.dataset.ids[index] for index in range(len(samples))] == [1007, 1021, 1028, 1035, 1042, 1049]
    image, target = samples[0]
    assert image.shape == (3, HEIGHT, WIDTH)
    assert image.dtype == torch.uint8
    ready = module.prepare(image)
    assert ready.dtype == torch.float32
    assert 0 <= ready.min() < ready.max() <= 1
    assert target["labels"].tolist() == [2]
    assert target["masks"].shape == (1, HEIGHT, WIDTH)
    x1, y1, x2, y2 = target["boxes"][0].int().tolist()
    assert (x2 - x1, y2 - y1) == (20, 16)
    assert target["masks"][0, y1:y2, x1:x2].all()
    assert target["masks"].sum() == 20 * 16
    assert samples[1][1]["labels"].tolist() == [1, 3]
    assert len(prepared(data, keep_empty=True).train_samples) == 8
    empty = prepared(data, keep_empty=True).train_samples[0][1]
    assert {name: tuple(empty[name].shape) for name in ("boxes", "labels", "masks")} == {
        "boxes": (0, 4),
        "labels": (0,),
        "masks": (0, HEIGHT, WIDTH),
    }


def test_flip_moves_boxes_and_masks(data):
    (image, target), (flipped, other) = (prepared(data, hflip=p).train_samples[1] for p in (0.0, 1.0))
    assert torch.equal(flipped, image.flip(2))
    assert torch.equal(other["masks"], target["masks"].flip(2))
    assert torch.equal(other["boxes"][:, 0], WIDTH - target["boxes"][:, 2])
    crop = [{"RandomCrop": {"size": [24, 24]}}]
    for _ in range(5):
        _, cut = prepared(data, train_transform=crop).train_samples[1]
        assert len(cut["boxes"]) == len(cut["labels"]) == len(cut["masks"]) == len(cut["area"])
        assert (cut["boxes"][:, 2:] - cut["boxes"][:, :2] >= 1).all()


def test_targets_of_evaluation(data):
    """Everything is there, as the evaluation needs it."""
    samples = prepared(data).val_samples
    assert len(samples) == 5
    target = samples[1][1]
    assert target["iscrowd"].tolist() == [1, 0, 0]
    assert target["labels"].tolist() == [2, 1, 2]
    assert target["area"].tolist() == [900, 0, 320]
    assert target["masks"].flatten(1).sum(1).tolist() == [900, 0, 320]
    assert samples[0][1]["boxes"].shape == (0, 4)


def edited(data, folder, change):
    """A copy of the validation annotations with a change."""
    content = json.loads((data / "annotations/instances_val2017.json").read_text())
    change(content)
    path = folder / "changed.json"
    path.write_text(json.dumps(content))
    return str(path)


def first(**values):
    return lambda content: content["annotations"][0].update(values)


def every(kind, **values):
    return lambda content: [entry.update(values) for entry in content[kind]]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.pop("images"), "lists no images"),
        (lambda c: c.pop("categories"), "lists no categories"),
        (lambda c: c.pop("annotations"), "has no annotations"),
        (lambda c: c["annotations"][0].pop("bbox"), "an entry lacks 'bbox'"),
        (lambda c: c["annotations"][0].pop("id"), "an entry lacks 'id'"),
        (every("annotations", id=7), r"annotation 7 is used 8 times \(images 2007, 2007, 2007, 2014, 2021, ...\), exp"),
        (every("annotations", id=None), "annotation None is used 8 times"),
        (
            lambda c: (c["annotations"][7].update(id=3), c["annotations"][6].update(id=3)),
            r"changed.json: annotation 3 is used 3 times \(images 2007, 2028, 2028\), expected unique ids$",
        ),
        (
            lambda c: c["images"][1].update(id=2000),
            r"image 2000 is used 2 times \(000000002000.png, 000000002007.png\), expected unique ids$",
        ),
        (
            lambda c: c["categories"][0].update(id=3),
            r"category 3 is used 2 times \(class90, class3\), expected unique ids$",
        ),
        (
            lambda c: c["images"][2].update(id="2014"),
            "the id of image '000000002014.png' is '2014', expected an integer",
        ),
        (
            lambda c: c["images"][2].update(id=-1),
            "the id of image '000000002014.png' is -1, expected an integer of at l",
        ),
        (lambda c: c["images"][2].update(file_name=5), "the file_name of image 2014 is 5, expected text"),
        (lambda c: c["images"][2].update(width="64"), "the width of image 2014 is '64', expected a positive number"),
        (lambda c: c["images"][2].update(height=0), "the height of image 2014 is 0, expected a positive number"),
        (lambda c: c["categories"][0].update(id="90"), "the id of category 'class90' is '90', expected an integer"),
        (lambda c: c["categories"][0].update(name=90), "the name of category 90 is 90, expected text"),
        (first(image_id="2007"), "the image_id of annotation 1 is '2007', expected an integer"),
        (first(category_id=77), "annotation 1 has category_id 77, expected one of those listed: 3, 7, 90"),
        (first(category_id="7"), "annotation 1 has category_id '7', expected one of those listed"),
        (first(bbox=[1, 2, 3]), r"the bbox of annotation 1 is \[1, 2, 3\], expected x, y, width and height"),
        (first(bbox=[1, 2, 3, float("nan")]), r"the bbox of annotation 1 is \[1, 2, 3, nan\]"),
        (first(bbox=[1, 2, float("inf"), 3]), r"the bbox of annotation 1 is \[1, 2, inf, 3\]"),
        (first(bbox=[9, 9, -3, 4]), r"the bbox of annotation 1 is \[9, 9, -3, 4\], .* the sizes at least 0"),
        (first(bbox=None), "the bbox of annotation 1 is None"),
        (first(iscrowd="0"), "the iscrowd of annotation 1 is '0', expected 0 or 1"),
        (first(area=float("nan")), "the area of annotation 1 is nan, expected a number of at least 0"),
        (first(area="900"), "the area of annotation 1 is '900', expected a number"),
        (first(segmentation="round"), "the segmentation of annotation 1 is neither a list of polygons"),
        (first(segmentation=[1, 2, 3, 4, 5, 6]), "the segmentation of annotation 1 is neither a list of polygons"),
        (first(segmentation=[[1, 2, 3, 4, 5, float("nan")]]), "the segmentation of annotation 1 is neither"),
        (first(segmentation=runs(1, 1, 5, 5) | {"size": [64, 48]}), r"is of \[64, 48\] pixels .*expected .*\[48, 64\]"),
        (
            first(segmentation={"size": [48, 64], "counts": [9, 4]}),
            r"segmentation of annotation 1 has run lengths of 13 pixels together, expected 48 \* 64",
        ),
        (first(segmentation={"size": [48, 64], "counts": [3073, -1]}), "has counts that are not run lengths"),
        (first(segmentation={"size": [48, 64], "counts": "53"}), "has run lengths of 8 pixels together"),
        (first(segmentation={"size": [48, 64]}), "an entry lacks 'counts'"),
        (
            every("annotations", segmentation=[]),
            "none of its 8 annotations has a mask, expected polygons or run lengths",
        ),
        (lambda c: [a.pop("segmentation") for a in c["annotations"]], "none of its 8 annotations has a mask"),
        (every("annotations", segmentation=[[1, 2, 3, 4]]), "none of its 8 annotations has a mask"),
    ],
)
def test_broken_annotations(data, tmp_path, change, match):
    path = edited(data, tmp_path, change)
    with pytest.raises(RecipeError, match=match) as error:
        prepared(data, val_annotations=path)
    assert str(error.value).startswith(path)
    assert "\n" not in str(error.value)


def test_missing_files(data, tmp_path):
    with pytest.raises(RecipeError, match=r"there is no .*instances_val2017.json; expected .*/val2017/IMAGE"):
        prepared(tmp_path)
    with pytest.raises(RecipeError, match=r"there is no .*/train2014"):
        prepared(data, train="train2014", train_annotations="annotations/instances_train2017.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(RecipeError, match=r"broken.json is not in COCO's format"):
        prepared(data, val_annotations=str(tmp_path / "broken.json"))
    samples = prepared(data).val_samples
    samples.dataset.root = str(tmp_path)
    with pytest.raises(UnreadableSample, match=f"cannot read image {tmp_path}/000000002000.png"):
        samples[0]


def test_categories_of_both_splits(data, tmp_path):
    """They must have the same ids and names."""
    other = edited(data, tmp_path, lambda c: c["categories"].append({"id": 91, "name": "more"}))
    with pytest.raises(
        RecipeError, match=r"3 categories in .* and 4 in .*, 1 of which differ; first 91: missing and mo"
    ):
        prepared(data, val_annotations=other)
    other = edited(data, tmp_path, lambda c: c["categories"][0].update(name="class91"))
    with pytest.raises(RecipeError, match=r"1 of which differ; first 90: class90 and class91"):
        prepared(data, val_annotations=other)


def changed_in_both(data, tmp_path, change):
    """The data with a change of the image of two objects that is in both splits: 1021 and 2021."""
    paths = {}
    for split in ("train", "val"):
        content = json.loads((data / f"annotations/instances_{split}2017.json").read_text())
        number = {"train": 1021, "val": 2021}[split]
        change(content, [a for a in content["annotations"] if a["image_id"] == number])
        path = tmp_path / f"{split}.json"
        path.write_text(json.dumps(content))
        paths[f"{split}_annotations"] = str(path)
    return prepared(data, hflip=0.0, **paths)


def sample_of(samples, image_id):
    return samples[samples.dataset.ids.index(image_id)][1]


@pytest.mark.parametrize("shape", [[], None, {}, [[3, 3, 9, 9]], [[3, 3, 9, 9, 4]], "missing"])
def test_objects_without_a_mask(data, tmp_path, shape):
    """They are not learned, and no detection of them counts; the others stay."""

    def change(content, objects):
        objects[0].pop("segmentation")
        if shape != "missing":
            objects[0]["segmentation"] = shape

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = changed_in_both(data, tmp_path, change)
    texts = [str(warning.message) for warning in caught]
    assert (
        f"{tmp_path}/train.json: no mask: 1 of 11 annotations (first: annotation 5 of image 1021) are not t" in texts[2]
    )
    assert (
        f"{tmp_path}/val.json: no mask: 1 of 8 annotations (first: annotation 5 of image 2021) count as cr" in texts[0]
    )
    trained = sample_of(module.train_samples, 1021)
    assert trained["labels"].tolist() == [3]
    assert trained["masks"].flatten(1).sum(1).tolist() == [24 * 24]
    evaluated = sample_of(module.val_samples, 2021)
    assert evaluated["labels"].tolist() == [1, 3]
    assert evaluated["iscrowd"].tolist() == [1, 0]
    x1, y1, x2, y2 = evaluated["boxes"][0].int().tolist()
    assert evaluated["masks"][0, y1:y2, x1:x2].all()
    assert evaluated["masks"].flatten(1).sum(1).tolist() == [20 * 16, 24 * 24]
    module.trainer = SimpleNamespace(lightning_module=SimpleNamespace(masks=False))
    module.setup("fit")
    assert sample_of(module.train_samples, 1021)["labels"].tolist() == [1, 3], "boxes need no mask"
    assert sample_of(module.val_samples, 2021)["iscrowd"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("box", "pixels"), [([-30, 5, 20, 16], 0), ([5, -30, 20, 16], 0), ([-5, -6, 20, 16], 150), ([60, 40, 20, 16], 32)]
)
def test_crowds_instead_of_masks_at_the_border(data, tmp_path, box, pixels):
    """They cover what is within the image."""
    module = changed_in_both(data, tmp_path, lambda content, objects: objects[0].update(bbox=box, segmentation=[]))
    target = sample_of(module.val_samples, 2021)
    assert target["iscrowd"].tolist() == [1, 0]
    assert target["masks"][0].sum() == pixels


def test_images_without_a_mask_are_empty(data, tmp_path):
    def change(content, objects):
        for entry in objects:
            entry["segmentation"] = []

    module = changed_in_both(data, tmp_path, change)
    assert 1021 not in module.train_samples.dataset.ids


@pytest.mark.parametrize("short", [[3, 3, 9, 9], [3, 3], [3, 3, 9, 9, 4], [1, 2, 3, 4, 5, 6, 7], []])
def test_short_polygons_are_left_out(data, tmp_path, short):
    """Not the object, nor its other polygons; four numbers are no box either."""
    with pytest.warns(
        UserWarning, match=r"fewer than three points are left out of 1 of \d+ annotations .first: annot.* 5"
    ):
        module = changed_in_both(data, tmp_path, lambda content, objects: objects[0]["segmentation"].insert(0, short))
    for samples, number in ((module.train_samples, 1021), (module.val_samples, 2021)):
        target = sample_of(samples, number)
        assert target["masks"].flatten(1).sum(1).tolist() == [20 * 16, 24 * 24]
        assert target["iscrowd"].tolist() == [0, 0]


@pytest.mark.parametrize(
    "shape",
    [
        [[70, 5, 90, 5, 90, 20]],
        [[5, 5, 5, 20, 5, 10]],
        [[3, 3, 5, 5, 7, 7, 9, 9]],
        {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]},
        {"size": [HEIGHT, WIDTH], "counts": rle.encode(np.zeros((HEIGHT, WIDTH), np.uint8, "F"))["counts"].decode()},
    ],
)
def test_masks_without_a_pixel(data, tmp_path, shape):
    """Outside, without area, or empty: not learned; evaluation has an object that nobody finds, as COCO's."""
    module = changed_in_both(data, tmp_path, lambda content, objects: objects[0].update(segmentation=shape))
    assert sample_of(module.train_samples, 1021)["labels"].tolist() == [3]
    evaluated = sample_of(module.val_samples, 2021)
    assert evaluated["iscrowd"].tolist() == [0, 0]
    assert evaluated["masks"].flatten(1).sum(1).tolist() == [0, 24 * 24]


@pytest.mark.parametrize("form", ["polygon", "runs", "compressed"])
def test_forms_of_a_mask(data, tmp_path, form):
    """All give the same pixels as pycocotools."""
    drawn = np.zeros((HEIGHT, WIDTH), np.uint8)
    drawn[5:20, 7:30], drawn[10:12, 0], drawn[-1, -1] = 1, 1, 1
    shapes = {
        "polygon": rectangle(7, 5, 23, 15) + rectangle(0, 10, 1, 2) + rectangle(63, 47, 1, 1),
        "compressed": rle.encode(np.asfortranarray(drawn)),
    }
    shapes["compressed"]["counts"] = shapes["compressed"]["counts"].decode()
    flat = drawn.T.flatten()
    edges = [0, *(np.flatnonzero(np.diff(flat)) + 1), flat.size]
    shapes["runs"] = {"size": [HEIGHT, WIDTH], "counts": np.diff(edges).tolist()}
    module = changed_in_both(data, tmp_path, lambda content, objects: objects[0].update(segmentation=shapes[form]))
    assert (sample_of(module.train_samples, 1021)["masks"][0].numpy() == drawn).all()
    assert (sample_of(module.val_samples, 2021)["masks"][0].numpy() == drawn).all()


def test_compressed_masks():
    draw = np.random.default_rng(0)
    for share in (0.02, 0.5, 0.98):
        for size in ((1, 1), (7, 300), (61, 40)):
            drawn = (draw.random(size) < share).astype(np.uint8)
            encoded = rle.encode(np.asfortranarray(drawn))
            shape = {"size": list(size), "counts": encoded["counts"].decode()}
            assert (draw_mask({"id": 1, "segmentation": shape}, size) == drawn).all()


@pytest.mark.parametrize("box", [[70, 5, 20, 16], [-30, 5, 30, 16], [5, 5, 0, 16], [5, 5, 20, 0.5], [63.5, 5, 20, 16]])
def test_boxes_that_cannot_be_seen(data, tmp_path, box):
    """Outside or without area: not learned, counted once; evaluation has them as COCO does."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = changed_in_both(data, tmp_path, lambda content, objects: objects[0].update(bbox=box))
    (text,) = [str(warning.message) for warning in caught if "than a pixel" in str(warning.message)]
    assert text.endswith("2 of 14 annotations (first: annotation 2 of image 1007) are not trained on")
    assert sample_of(module.train_samples, 1021)["labels"].tolist() == [3]
    evaluated = sample_of(module.val_samples, 2021)
    x, y, w, h = box
    assert evaluated["boxes"][0].tolist() == [x, y, x + w, y + h]


def test_annotations_of_other_images(data, tmp_path):
    """An excerpt of a file may keep the annotations of all images."""
    with pytest.warns(
        UserWarning, match=r"not listed: 2 of 14 annotations \(first: annotation 5 of image 1021\) are left"
    ):
        module = changed_in_both(
            data, tmp_path, lambda c, objects: c["images"].remove(next(i for i in c["images"] if i["id"] % 1000 == 21))
        )
    assert module.train_samples.dataset.ids == [1007, 1028, 1035, 1042, 1049]


def test_files_that_are_listed_twice(data, tmp_path):
    with pytest.warns(
        UserWarning, match=r"1 files are listed as several images \(first: 000000001000.png, images 1000, 10"
    ):
        changed_in_both(data, tmp_path, lambda c, objects: c["images"][1].update(file_name=c["images"][0]["file_name"]))


def test_size_of_the_image(data, tmp_path):
    """Images whose size is not the listed one are reported with both sizes."""

    def swap(content, objects):
        for image in content["images"]:
            image["width"], image["height"] = image["height"], image["width"]
        for entry in content["annotations"]:
            entry["segmentation"] = rectangle(*entry["bbox"])

    module = changed_in_both(data, tmp_path, swap)
    with pytest.raises(
        UnreadableSample, match=r"000.png has 64 x 48 pixels, its annotations say 48 x 64; .*EXIF rotation"
    ):
        module.val_samples[0]
    module = changed_in_both(data, tmp_path, lambda c, objects: c["images"][0].update(width=65))
    with pytest.raises(UnreadableSample, match=r"000.png has 64 x 48 pixels, its annotations say 65 x 48$"):
        module.val_samples[0]

    def unlisted(content, objects):
        for image in content["images"]:
            del image["width"], image["height"]

    targets = [prepared(data).val_samples[1][1], changed_in_both(data, tmp_path, unlisted).val_samples[1][1]]
    for name in ("boxes", "masks"):
        assert torch.equal(targets[0][name], targets[1][name])


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_orientation(data, tmp_path, orientation):
    """Images are turned as a viewer does, and annotations are of the turned image: a bright corner stays in its box."""
    upright = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    upright[:16, :20] = 255
    turn = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    stored = Image.fromarray(upright)
    if turn[orientation] is not None:
        stored = stored.transpose(turn[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    shutil.copytree(data, tmp_path / "data")
    stored.save(tmp_path / "data/train2017/000000001021.png", exif=exif)
    paths = {}

    def change(content, objects):
        objects[0].update(bbox=[0, 0, 20, 16], segmentation=rectangle(0, 0, 20, 16))
        image = next(image for image in content["images"] if image["id"] in (1021, 2021))
        paths[image["id"]] = image

    samples = changed_in_both(tmp_path / "data", tmp_path, change).train_samples
    image, target = samples[samples.dataset.ids.index(1021)]
    image = image / 255
    assert image.shape == (3, HEIGHT, WIDTH)
    x1, y1, x2, y2 = target["boxes"][0].int().tolist()
    assert (image[:, y1:y2, x1:x2] == 1).all()
    assert image.sum() == 3 * 20 * 16
    assert (target["masks"][0] == (image[0] == 1)).all()

    if orientation > 4:

        def as_stored(content, objects):
            for image in content["images"]:
                if image["id"] == 1021:
                    image["width"], image["height"] = stored.size
            for entry in objects:
                entry["segmentation"] = rectangle(*entry["bbox"])

        samples = changed_in_both(tmp_path / "data", tmp_path, as_stored).train_samples
        with pytest.raises(
            UnreadableSample, match="64 x 48 pixels, its annotations say 48 x 64; its EXIF orientation, "
        ):
            samples[samples.dataset.ids.index(1021)]


def test_cropped_away_masks(data):
    """A crop may hold the corner of a box and nothing of the object in it."""
    samples = prepared(data, train_transform=[{"RandomCrop": {"size": [12, 12]}}]).train_samples
    counts = []
    for index in range(60):
        torch.manual_seed(index)
        target = samples[index % len(samples)][1]
        counts.append(len(target["masks"]))
        assert len({len(target[name]) for name in ("boxes", "labels", "iscrowd", "area", "masks")}) == 1
        assert target["masks"].flatten(1).any(1).all()
    assert sum(counts) > 0


# --- The whole recipe -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Folder of a run of 2 epochs of 4 steps."""
    run = tmp_path_factory.mktemp("run")
    cli.main(arguments(data, run, "--model.ema_decay=0.5"))
    return run


def test_files_of_a_run(data, trained):
    assert {"last.ckpt", "best.ckpt", "curves.png", "detections.png"} <= {path.name for path in trained.iterdir()}
    header = (trained / "logs/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    names = [f"val/{kind}_{name}" for kind in ("box", "mask") for name in ("ap", "ap50", "ap75", "ap_small")]
    assert set(header) >= {"train/loss", "train/loss_mask", "train/loss_objectness", "lr", *names}


def test_resumed_run_has_the_same_bits(data, trained, tmp_path):
    killed = arguments(data, tmp_path, "--model.ema_decay=0.5", "--checkpoint.every_n_train_steps=2")
    resumed = [*killed, f"--ckpt_path={tmp_path}/last.ckpt"]
    (status, _), (end, stderr) = run_forked([[*killed, *interruption(signal.SIGKILL, 7)], resumed], tmp_path)
    assert (status, end) == (-signal.SIGKILL, 0), stderr
    assert_same_state(training_state(tmp_path / "last.ckpt"), training_state(trained / "last.ckpt"))


def test_two_processes_evaluate_as_one(data, tmp_path):
    """Of 5 images one process has a sixth, which does not count."""
    status, stderr = run_distributed(arguments(data, tmp_path, "--trainer.max_epochs=1"))
    assert status == 0, stderr
    (rows,) = (list(csv.DictReader(path.open())) for path in tmp_path.glob("logs/version_0/metrics.csv"))
    (together,) = (row for row in rows if row["val/box_ap"])
    checkpoint = f"--ckpt_path={tmp_path}/last.ckpt"
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    alone = recipe_cli.run(["validate", checkpoint, *quiet, f"--trainer.default_root_dir={tmp_path}"]).trainer
    metrics = {name: value.item() for name, value in alone.callback_metrics.items()}
    assert metrics["val/box_ap50"] > 0
    assert {name: float(together[name]) for name in metrics} == pytest.approx(metrics, abs=1e-6)


class Oracle(nn.Module):
    """Finds what is annotated, a little beside its place, some of it in the wrong class, and what is not there."""

    def __init__(self, samples, seed=0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.found = []
        for image, target in (samples[index] for index in range(len(samples))):
            boxes = target["boxes"] + torch.randint(-3, 4, target["boxes"].shape, generator=draw)
            boxes = torch.cat([boxes, torch.tensor([[3.0, 3, 30, 40]])]).clamp(min=0)
            boxes[:, 2:] = boxes[:, 2:].maximum(boxes[:, :2] + 1)
            masks = torch.zeros(len(boxes), 1, *image.shape[1:])
            for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
                mask[0, y1 : y2 - 1, x1:x2] = 0.9
            labels = torch.cat([target["labels"], torch.tensor([1])])
            labels[::4] = 2
            scores = torch.rand(len(boxes), generator=draw)
            self.found.append(
                (image.float() / 255, {"boxes": boxes, "labels": labels, "scores": scores, "masks": masks})
            )

    def forward(self, images):
        return [
            dict(next(found for known, found in self.found if torch.allclose(known, image, atol=1e-6)))
            for image in images
        ]


def test_evaluation_is_cocos(data, tmp_path):
    """What validation logs is what pycocotools finds in the predictions' file."""
    model = Detection("mask_rcnn", 4, OPTIONS, shown=2)
    module = CocoData(str(data), num_workers=0, val_batch_size=2)
    module.setup("validate")
    model.net = Oracle(module.val_samples)
    writer = model.prediction_writer(tmp_path / "predictions.json")
    settings = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "enable_checkpointing": False}
    trainer = pl.Trainer(callbacks=[writer], default_root_dir=tmp_path, **settings)
    model.setup = lambda stage: None  # it looks at the real network
    (logged,) = trainer.validate(model, module, verbose=False)
    trainer.predict(model, module, return_predictions=False)

    results = json.loads((tmp_path / "predictions.json").read_text())
    assert {result["image_id"] for result in results} == {2000, 2007, 2014, 2021, 2028}
    assert {result["category_id"] for result in results} <= set(IDS)
    assert "file_name" not in results[0]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(data / "annotations/instances_val2017.json"))
        found = truth.loadRes(results)
        for kind, name in (("bbox", "box"), ("segm", "mask")):
            evaluation = COCOeval(truth, found, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            expected = dict(zip(("ap", "ap50", "ap75", "ap_small"), evaluation.stats, strict=False))
            assert 0.05 < expected["ap"] < 0.95
            assert {key: logged[f"val/{name}_{key}"] for key in expected} == pytest.approx(expected, abs=1e-4)
    assert {path.name for path in (tmp_path / "predictions").iterdir()} == {"000000002000.png", "000000002007.png"}
    for path in (tmp_path / "detections.png", tmp_path / "predictions" / "000000002007.png"):
        shares = np.mean(np.asarray(Image.open(path).convert("RGB")).min(2) < 200)
        assert shares > 0.3, "there is something on it"


def test_validate_and_predict_from_a_checkpoint(data, trained, tmp_path, capsys):
    more = [f"--ckpt_path={trained}/last.ckpt", f"--trainer.default_root_dir={tmp_path}"]
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    cli.main(["validate", *more, *quiet])
    assert "val/mask_ap50" in capsys.readouterr().out
    cli.main(["predict", *more, *quiet])
    results = json.loads((tmp_path / "predictions.json").read_text())
    assert len(results) == 5 * 5
    assert set(results[0]) == {"image_id", "category_id", "bbox", "score", "segmentation"}
    assert results[0]["segmentation"]["size"] == [HEIGHT, WIDTH]

    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("one.png", "two.png"):
        Image.fromarray(np.zeros((50, 40, 3), np.uint8)).save(folder / name)
    cli.main(["predict", *more, *quiet, f"--data.predict_root={folder}", "--data.root=nowhere", "--output=photos.json"])
    results = json.loads((tmp_path / "photos.json").read_text())
    assert [(r["image_id"], r["file_name"]) for r in results[::5]] == [(0, "one.png"), (1, "two.png")]
    assert {r["category_id"] for r in results} <= set(IDS), "the checkpoint knows the categories"


def ids_to_predict(folder, *names, **arguments):
    """Ids and relative names, and the names of pictures, of a folder with these images."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)
    module = CocoData(num_workers=0, **{"root": "nowhere", "predict_root": str(folder)} | arguments)
    module.classes = ["something"]
    module.setup("predict")
    found = dict(zip(module.predict_samples.names, module.image_ids, strict=True))
    return found, output_names(module.predict_samples.names)


def test_ids_of_images_to_predict(data, tmp_path):
    """Numbers as names are ids where they differ; a listed image is known by its path, not by its name."""
    found, pictures = ids_to_predict(tmp_path / "1", "a/1.jpg", "b/1.jpg", ".cache/2.jpg", "__MACOSX/a/._1.jpg")
    assert found == {"a/1.jpg": 0, "b/1.jpg": 1}
    assert pictures == ["a/1", "b/1"]
    assert ids_to_predict(tmp_path / "2", "a/7.jpg", "b/9.jpg") == ({"a/7.jpg": 7, "b/9.jpg": 9}, ["7", "9"])
    found, pictures = ids_to_predict(tmp_path / "3", "1.jpg", "01.jpg", "1.png")
    assert sorted(found.values()) == [0, 1, 2]
    assert pictures == ["01.jpg", "1.jpg", "1.png"]
    listed = {"root": str(data)}
    assert ids_to_predict(data / "val2017", **listed)[0]["000000002007.png"] == 2007
    assert ids_to_predict(data / "val2017/000000002014.png", **listed)[0] == {"000000002014.png": 2014}
    found, _ = ids_to_predict(tmp_path / "4", "other/000000002007.png", "000000002014.png", **listed)
    assert found == {"000000002014.png": 2014, "other/000000002007.png": 2007}, "the numbers in their names"
    found, _ = ids_to_predict(tmp_path / "5", "a/000000002007.png", "b/000000002007.png", **listed)
    assert found == {"a/000000002007.png": 0, "b/000000002007.png": 1}
    listed = {"root": str(tmp_path / "own"), "val": "val"}
    (tmp_path / "own/annotations").mkdir(parents=True)
    content = {"images": [{"id": 7, "file_name": "a.png"}], "categories": [{"id": 1, "name": "something"}]}
    (tmp_path / "own/annotations/instances_val.json").write_text(json.dumps(content))
    (tmp_path / "own/val").mkdir()
    assert ids_to_predict(tmp_path / "6", "a.png", **listed)[0] == {"a.png": 0}, "another picture of a listed name"
    assert ids_to_predict(tmp_path / "own/val", "a.png", **listed)[0] == {"a.png": 7}


def test_predictions_of_equal_names(trained, tmp_path):
    """Each image has its own id, name and picture."""
    for name in ("a/1.png", "b/1.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "photos" / name)
    more = [f"--ckpt_path={trained}/last.ckpt", f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu"]
    cli.main(["predict", *more, f"--data.predict_root={tmp_path / 'photos'}", "--data.root=nowhere"])
    results = json.loads((tmp_path / "predictions.json").read_text())
    assert [(r["image_id"], r["file_name"]) for r in results[::5]] == [(0, "a/1.png"), (1, "b/1.png")]
    pictures = {
        path.relative_to(tmp_path / "predictions").as_posix() for path in (tmp_path / "predictions").rglob("*.*")
    }
    assert pictures == {"a/1.png", "b/1.png"}


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (
            ["--model.num_classes=3"],
            r"the data has 3 classes \(class3, class7, class90, ...\) and background: set .* 4",
        ),
        (["--model.name=rednet26", "--model.options={}"], "model.name is 'rednet26', expected a detector"),
        (["--model.name=mask_rcnn_resnet9"], "name is 'mask_rcnn_resnet9'"),
        (["--model.backbone_weights=nowhere.pth"], "backbone_weights: there is no file nowhere.pth"),
        (["--model.mask_threshold=1"], "mask_threshold is 1.0, expected a value in"),
        (["--data.hflip=2"], "data.hflip is 2.0, expected a value in"),
        (["--data.train_transform=[{Flip: {}}]"], "data.train_transform: torchvision.transforms.v2 has no 'Flip'"),
        (["--data.val=val2014"], "there is no .*instances_val2014.json"),
    ],
)
def test_errors_are_one_line(data, tmp_path, capsys, more, match):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments(data, tmp_path, *more))
    assert exit.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert line.startswith("pyinvolution fit: error:")
    assert re.search(match, line)


@pytest.mark.parametrize("form", ["classifier", "official classifier", "detector", "official detector", "plain"])
def test_backbone_weights(form, tmp_path):
    torch.manual_seed(1)
    source = create_model("rednet", num_classes=10, **BACKBONE)
    detector = create_model("mask_rcnn", num_classes=9, **OPTIONS)
    detector.backbone.body.load_state_dict(source.state_dict(), strict=False)
    state = {
        "classifier": {"state_dict": {f"net.{key}": value for key, value in source.state_dict().items()}},
        "official classifier": {"state_dict": official_state_dict(source), "meta": {}},
        "detector": {"state_dict": {f"net.{key}": value for key, value in detector.state_dict().items()}},
        "official detector": official_state_dict(detector),
        "plain": {key: value for key, value in source.state_dict().items() if not key.startswith("head.")},
    }[form]
    torch.save(state, tmp_path / "weights.pth")
    body = Detection("mask_rcnn", 4, OPTIONS, str(tmp_path / "weights.pth")).net.backbone.body.state_dict()
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in body.items())
    if "classifier" in form:
        options = OPTIONS | {"backbone_options": BACKBONE | {"stem_kernel_size": 7}}
        with pytest.raises(RecipeError, match=r"does not fit the model, .*3x3|is of another model: .*stem.involution"):
            Detection("mask_rcnn", 4, options, str(tmp_path / "weights.pth"))


def test_whole_detector_by_init_from(tmp_path):
    detector = create_model("mask_rcnn", num_classes=4, **OPTIONS)
    for state in (detector.state_dict(), official_state_dict(detector)):
        torch.save(state, tmp_path / "weights.pth")
        model = Detection("mask_rcnn", 4, OPTIONS, init_from=str(tmp_path / "weights.pth"))
        ours = official_state_dict(model.net)
        assert all(torch.equal(ours[key], value) for key, value in official_state_dict(detector).items())


def test_random_frozen_weights_are_warned_of(data, tmp_path):
    options = OPTIONS | {"backbone_options": BACKBONE}
    with pytest.warns(UserWarning, match="stay at their random values.*--model.backbone_weights"):
        recipe_cli.run(arguments(data, tmp_path, f"--model.options={json.dumps(options)}", "--trainer.fast_dev_run=1"))


# --- Configurations ---------------------------------------------------------------------------------------------------


def config(name):
    return configs.load(name)


@pytest.mark.parametrize("family", ["faster_rcnn", "mask_rcnn", "retinanet"])
@pytest.mark.parametrize("kind", ["", "_inv", "_inv_head"])
def test_coco_recipe_is_the_papers(family, kind):
    if (family, kind) == ("retinanet", "_inv_head"):
        return
    read = config(f"coco/{family}_rednet50{kind}.yaml")
    model, data, trainer = read["model"]["init_args"], read["data"]["init_args"], read["trainer"]
    assert model["name"] == f"{family}_rednet50"
    assert model["options"].get("neck", "conv") == ("involution" if kind else "conv")
    assert model["options"].get("head", "conv") == ("involution" if "head" in kind else "conv")
    assert (model["lr"], model["reference_batch"]) == (0.01 if family == "retinanet" else 0.02, 16)
    assert (model["momentum"], model["nesterov"], model["weight_decay"]) == (0.9, False, 1e-4)
    assert (model["decay"], model["milestones"], model["gamma"]) == ("step", [8, 11], 0.1)
    assert (model["warmup_steps"], model["warmup_ratio"]) == (2000 if kind else 500, 0.001)
    assert (trainer["max_epochs"], data["batch_size"], model["num_classes"]) == (12, 2, 81)
    clip = {("retinanet", "_inv"): 40}.get((family, kind), 5 if "head" in kind else None)
    assert trainer.get("gradient_clip_val") == clip
    if kind == "_inv":
        with torch.device("meta"):
            net = create_model(model["name"], num_classes=81, **model["options"])
        assert (net.transform.min_size, net.transform.max_size) == ((800,), 1333)
        assert net.backbone.body.stem.involution.kernel_size == (3, 3)


# --- Digits in COCO's layout ------------------------------------------------------------------------------------------


def test_coco_digits(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "IMAGES", {"train": 30, "val": 10})
    monkeypatch.setattr(digits, "EMPTY", 0.2)
    monkeypatch.setattr(digits, "CROWD", 0.3)
    assert digits.write_coco_digits(tmp_path) == (30, 10)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for path in files:
        path.unlink()
    digits.write_coco_digits(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files

    for split, count in digits.IMAGES.items():
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(tmp_path / f"annotations/instances_{split}2017.json"))
        assert len(truth.imgs) == count
        assert [category["name"] for category in truth.cats.values()] == [str(digit) for digit in range(10)]
        assert any(not truth.imgToAnns[image] for image in truth.imgs)
        assert any(annotation["iscrowd"] for annotation in truth.anns.values())
        for annotation in truth.anns.values():
            mask = truth.annToMask(annotation)
            rows, columns = np.nonzero(mask)
            box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert annotation["bbox"] == box
            assert annotation["area"] == mask.sum() > 0
        names = {image["file_name"] for image in truth.imgs.values()}
        assert names == {path.name for path in (tmp_path / f"{split}2017").iterdir()}
    assert not set(digits.split_digits()["train"]) & set(digits.split_digits()["val"])


def test_labels_of_boxes_at_the_border_can_be_read():
    """A picture of 480 x 640 in a panel of three inches, as in `pictures.grid`."""
    corners = [(x, y, x + 60, y + 50) for x in (0, 300, 580) for y in (0, 200, 430)]
    scene = pictures.Scene(
        np.zeros((480, 640, 3), np.float32), np.array(corners, np.float32), np.ones(9, np.int64), np.ones(9, np.float32)
    )
    drawn = Figure((3, 3))
    axes = drawn.add_axes((0, 0, 1, 1))
    axes.axis("off")
    pictures.draw(axes, scene, ["Platelets"])
    FigureCanvasAgg(drawn).draw()
    inside = axes.get_window_extent()
    assert len(axes.texts) == 9
    for text in axes.texts:
        extent = text.get_window_extent()
        assert inside.x0 <= extent.x0 < extent.x1 <= inside.x1
        assert inside.y0 <= extent.y0 < extent.y1 <= inside.y1
