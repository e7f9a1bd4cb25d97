"""The detection recipe: data as COCO users know it, COCO's own evaluation, exact resumption, results and errors."""

import contextlib
import csv
import io
import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
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
import yaml
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pyinvolution.recipes import CocoData, Detection, RecipeError, command, configs
from pyinvolution.recipes.detection import digits
from pyinvolution.recipes.loading import UnreadableSample

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
    assert image.dtype == torch.float32
    assert 0 <= image.min() < image.max() <= 1
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


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.pop("images"), "is not in COCO's format"),
        (lambda c: c.pop("categories"), "lists no images or no categories"),
        (lambda c: c.pop("annotations"), "has no annotations"),
        (lambda c: c["categories"].pop(), r"categories that are not listed: \[3\]"),
        (lambda c: c["annotations"][0].pop("bbox"), "an entry lacks 'bbox'"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), r"the bbox of annotation 1 is \[1, 2, 3\]"),
    ],
)
def test_broken_annotations(data, tmp_path, change, match):
    with pytest.raises(RecipeError, match=match) as error:
        prepared(data, val_annotations=edited(data, tmp_path, change))
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
    wrong = edited(data, tmp_path, lambda c: c["annotations"][-1].update(segmentation=[[1, 2]]))
    with pytest.raises(UnreadableSample, match=r"cannot read image .*2028.png or its masks"):
        prepared(data, val_annotations=wrong).val_samples[4]
    other = edited(data, tmp_path, lambda c: c["categories"].append({"id": 91, "name": "more"}))
    with pytest.raises(RecipeError, match=r"3 categories in .* and 4 others in"):
        prepared(data, val_annotations=other)


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
    alone = command.run(["validate", checkpoint, *quiet, f"--trainer.default_root_dir={tmp_path}"]).trainer
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
            self.found.append((image, {"boxes": boxes, "labels": labels, "scores": scores, "masks": masks}))

    def forward(self, images):
        return [dict(next(found for known, found in self.found if torch.equal(known, image))) for image in images]


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


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (
            ["--model.num_classes=3"],
            r"the data has 3 classes \(class3, class7, class90, ...\) and background: set .* 4",
        ),
        (["--model.name=rednet26", "--model.options={}"], "model.name must be a detector"),
        (["--model.name=mask_rcnn_resnet9"], "no model is named"),
        (["--model.backbone_weights=nowhere.pth"], "backbone_weights: there is no file nowhere.pth"),
        (["--model.mask_threshold=1"], "mask_threshold is out of range"),
        (["--data.hflip=2"], "data.hflip must be in"),
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
        with pytest.raises(RecipeError, match=r"does not fit this model: .*3x3|is of another model: .*stem.involution"):
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
        command.run(arguments(data, tmp_path, f"--model.options={json.dumps(options)}", "--trainer.fast_dev_run=1"))


# --- Configurations ---------------------------------------------------------------------------------------------------


def config(name):
    merged: dict = {}
    for path in configs.resolve(name):
        for section, values in yaml.safe_load(Path(path).read_text()).items():
            if isinstance(values, dict):
                held = merged.setdefault(section, {})
                held |= values | {"init_args": held.get("init_args", {}) | values.get("init_args", {})}
    return merged


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
