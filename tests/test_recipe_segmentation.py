"""The segmentation recipe: the tree of Cityscapes, crops, inference, metrics and what predict writes."""

import copy
import csv
import shutil
from fnmatch import fnmatch

import numpy as np
import pytest
import torch
from recipe_support import one_thread, run_distributed  # noqa: F401
from torchvision import tv_tensors

pytest.importorskip("lightning")
import yaml
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from pyinvolution import cli
from pyinvolution.models import create_model, official_state_dict
from pyinvolution.recipes import CityscapesData, RecipeError, Segmentation
from pyinvolution.recipes import cli as recipe_cli
from pyinvolution.recipes.data import UnreadableSample
from pyinvolution.recipes.segmentation import digits
from pyinvolution.recipes.segmentation.cityscapes import CLASSES, IMAGE_SUFFIX, LABEL_IDS, PALETTE, TABLE
from pyinvolution.recipes.segmentation.inference import flipped, sliding_window
from pyinvolution.recipes.segmentation.label_maps import IGNORED, BalancedCrop
from pyinvolution.studies import figure

BACKBONE = "{layers: [1, 1], base_channels: 16, stem_channels: 32, stem_kernel_size: 3}"
OPTIONS = f"{{backbone: rednet, neck_channels: 16, head_channels: 8, neck: involution, backbone_options: {BACKBONE}}}"
ROAD, CAR, SIDEWALK = 0, 13, 1


def write_tree(root, train=6, val=3, size=(32, 64)):
    """Cityscapes of two cities: road (label id 7) on the left, car (26) on the right, and three columns of "static"."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for index in range(count):
            name = f"{'bonn' if index % 2 else 'ulm'}_{index:06d}_000019"
            labels = np.full(size, 7, np.uint8)
            labels[:, size[1] // 2 :] = 26
            labels[:, :3] = 4
            image = generator.integers(0, 100, (*size, 3), dtype=np.uint8)
            image[labels == 26, 0] += 150
            for folder, suffix, content in (
                ("leftImg8bit", "leftImg8bit", image),
                ("gtFine", "gtFine_labelIds", labels),
            ):
                path = root / folder / split / name.split("_")[0] / f"{name}_{suffix}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(content).save(path)
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("cityscapes"))


def arguments(subcommand, root, run, *more):
    return [
        subcommand,
        "--config=cityscapes/fpn_rednet50_inv.yaml",
        f"--data.root={root}",
        f"--trainer.default_root_dir={run}",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--model.name=semantic_fpn",
        f"--model.options={OPTIONS}",
        "--data.num_workers=0",
        "--data.size=[32, 64]",
        "--data.crop=[16, 32]",
        *more,
    ]


@pytest.fixture(scope="module")
def trained(tree, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    fit = ["--trainer.max_steps=12", "--trainer.val_check_interval=6", "--model.optimizer=adamw", "--model.lr=0.01"]
    cli.main(arguments("fit", tree, run, *fit, "--trainer.log_every_n_steps=2"))
    return run


def test_ids_and_colors():
    assert len(CLASSES) == 19
    assert (CLASSES[0], CLASSES[13], CLASSES[18]) == ("road", "car", "bicycle")
    assert LABEL_IDS.tolist() == [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert TABLE.train_ids(np.array([7, 26, 33])).tolist() == [0, 13, 18]
    others = np.setdiff1d([*range(34), 255], LABEL_IDS)
    assert set(TABLE.train_ids(others).tolist()) == {IGNORED}
    for value in (34, 254):
        with pytest.raises(ValueError, match=f"the value {value}, expected the ids of Cityscapes, 0 to 33 and 255"):
            TABLE.train_ids(np.array([value]))
    assert PALETTE[0].tolist() == [128, 64, 128]
    assert PALETTE[13].tolist() == [0, 0, 142]


def test_recipe_is_the_papers(capsys):
    for name in ("fpn_rednet50", "fpn_rednet50_inv", "fpn_resnet50", "upernet_rednet50"):
        with pytest.raises(SystemExit):
            recipe_cli.run(["fit", "--config", f"cityscapes/{name}.yaml", "--print_config"])
        config = yaml.safe_load(capsys.readouterr().out)
        model, data = config["model"]["init_args"], config["data"]["init_args"]
        assert (
            model["name"]
            == {"fpn": "semantic_fpn", "upernet": "upernet"}[name.split("_")[0]] + "_" + name.split("_")[1]
        )
        assert (model["options"] or {}).get("neck", "conv") == ("involution" if name.endswith("inv") else "conv")
        assert (config["trainer"]["max_steps"], config["trainer"]["sync_batchnorm"]) == (80000, True)
        values = [
            model[key] for key in ("lr", "momentum", "weight_decay", "decay", "power", "min_lr", "auxiliary_weight")
        ]
        assert values == [0.01, 0.9, 5e-4, "poly", 0.9, 1e-4, 0.4]
        values = [data[key] for key in ("batch_size", "size", "scale", "crop", "max_class_share")]
        assert values == [2, [1024, 2048], [0.5, 2.0], [512, 1024], 0.75]


def test_sample(tree):
    """Label ids become train ids; evaluation sees the whole image, normalised."""
    data = CityscapesData(str(tree), num_workers=0)
    data.setup("validate")
    assert len(data.val_samples) == 3
    image, target = data.val_samples[1]  # sorted by city: bonn 1, ulm 0, ulm 2
    expected = torch.full((32, 64), ROAD)
    expected[:, 32:], expected[:, :3] = CAR, IGNORED
    pixels = torch.from_numpy(np.array(Image.open(tree / "leftImg8bit/val/ulm/ulm_000000_000019_leftImg8bit.png")))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert image.dtype == torch.uint8
    torch.testing.assert_close(data.prepare(image), ((pixels / 255 - mean) / std).permute(2, 0, 1))
    assert type(image) is type(target) is torch.Tensor
    assert torch.equal(target, expected)
    assert (data.val_samples.ignored((image, target))[1] == IGNORED).all()


def test_augmentation_moves_image_and_mask_together(tree):
    """Also for scales below 1, where the crop is larger than the image: the rest is ignored."""
    data = CityscapesData(str(tree), size=(32, 64), crop=(24, 48), scale=(0.5, 2.0), mean=(0, 0, 0), std=(1, 1, 1))
    data.setup("fit")
    torch.manual_seed(0)
    wrong, padded = [], 0
    for index in range(24):
        image, target = data.train_samples[index % len(data.train_samples)]
        image = data.prepare(image)
        assert image.shape == (3, 24, 48)
        assert target.shape == (24, 48)
        assert set(target.unique().tolist()) <= {ROAD, CAR, IGNORED}
        red = image[0] - image[1:].mean(0)
        edge = torch.nn.functional.max_pool2d((target[None, None] != CAR).float(), 5, 1, 2)[0, 0] > 0
        inside = (target == CAR) & ~edge
        wrong.append(red[inside].mean() < 0.1 if inside.any() else False)
        padded += bool((target[0] == IGNORED).all() or (target[-1] == IGNORED).all())
    assert sum(wrong) <= 2, "distortion may wash out a picture, but not many"
    assert padded, "scale 0.5 is smaller than the crop"


def test_no_class_fills_a_crop():
    """Four fifths of the mask are road: plain crops are nearly always too much of it."""
    mask = torch.full((40, 100), ROAD)
    mask[:, 40:50], mask[:, 50:60] = CAR, IGNORED
    image = tv_tensors.Image(torch.zeros(3, 40, 100, dtype=torch.uint8))

    def shares(crop):
        torch.manual_seed(0)
        found = []
        for _ in range(200):
            _, part = crop(image, tv_tensors.Mask(mask))
            counts = part[part != IGNORED].bincount()
            found.append((counts.max() / counts.sum()).item())
        return torch.tensor(found)

    plain = shares(BalancedCrop((20, 30), 1.0))
    balanced = shares(BalancedCrop((20, 30), 0.75))
    assert (plain > 0.75).float().mean() > 0.5
    assert (balanced > 0.75).float().mean() < 0.05
    assert shares(BalancedCrop((20, 30), 0.75, tries=200)).max() <= 0.75


def test_sliding_window_averages_overlaps():
    """A network that tells where in its window a pixel lies."""

    def net(images):
        rows = torch.arange(images.shape[-2], dtype=torch.float32)[:, None].expand(images.shape[-2:])
        return torch.stack([rows, images[0, 0]])[None]

    images = torch.rand(1, 3, 10, 7)
    logits = sliding_window(net, images, (4, 7), (3, 7))  # rows 0-3, 3-6, 6-9
    assert logits[0, 0, :, 0].tolist() == [0, 1, 2, 1.5, 1, 2, 1.5, 1, 2, 3]
    torch.testing.assert_close(logits[0, 1], images[0, 0])
    logits = sliding_window(net, images, (8, 20), (4, 10))  # rows 0-7, 2-9; wider than the image
    assert logits[0, 0, :, 3].tolist() == [0, 1, 1, 2, 3, 4, 5, 6, 6, 7]
    with pytest.raises(ValueError, match=r"stride is \(5, 1\), expected a value from 1 to window=\(4, 4\)"):
        sliding_window(net, images, (4, 4), (5, 1))


def test_flip_averages_probabilities():
    torch.manual_seed(0)
    net = torch.nn.Conv2d(3, 4, 3, padding=1)
    images = torch.randn(2, 3, 6, 8)
    expected = (net(images).softmax(1) + net(images.flip(-1)).softmax(1).flip(-1)) / 2
    torch.testing.assert_close(flipped(net, images).exp(), expected)
    assert not torch.allclose(expected, net(images).softmax(1), atol=1e-3)


def test_auxiliary_loss_and_ignored_pixels():
    options = {"backbone": "rednet", "head_channels": 8, "auxiliary_channels": 8}
    options["backbone_options"] = {"layers": [1, 1], "base_channels": 16, "stem_channels": 32}
    model = Segmentation("upernet", options=options, reference_batch=None)
    model.log = lambda *args, **kwargs: None
    images, targets = torch.randn(2, 3, 32, 64), torch.randint(0, 19, (2, 32, 64))
    targets[:, :16] = IGNORED
    torch.manual_seed(0)
    loss = model.training_step((images, targets), 0)
    torch.manual_seed(0)
    main, auxiliary = (logits[:, :, 16:].log_softmax(1) for logits in model.net(images))
    kept = targets[:, None, 16:]
    torch.testing.assert_close(loss, -(main.gather(1, kept).mean() + 0.4 * auxiliary.gather(1, kept).mean()))
    model.zero_grad()
    nothing = model.training_step((images, torch.full_like(targets, IGNORED)), 0)
    nothing.backward()
    assert nothing == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def read(folder):
    return np.array(Image.open(folder))


def test_fit_validate_and_predict(tree, trained, tmp_path, capsys):
    """mIoU as by the definition from predict's own files, over all images; file names as the benchmark wants."""
    best = f"--ckpt_path={trained / 'best.ckpt'}"
    common = [f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu"]
    capsys.readouterr()
    cli.main(["validate", best, *common, "--trainer.enable_progress_bar=false"])
    out = capsys.readouterr().out
    cli.main(["predict", best, *common, "--trainer.enable_progress_bar=false"])
    ids = sorted((tmp_path / "predictions" / "labelIds").iterdir())
    assert [path.name for path in ids] == [
        f"{name}_labelIds.png" for name in ("bonn_000001_000019", "ulm_000000_000019", "ulm_000002_000019")
    ]
    confusion = np.zeros((34, 34), int)
    for path in ids:
        name = path.name.removesuffix("_labelIds.png")
        assert fnmatch(path.name, f"{name}*.png"), "how the evaluation finds a prediction"
        (truth,) = (tree / "gtFine" / "val").rglob(f"{name}_gtFine_labelIds.png")
        truth, found = read(truth), read(path)
        assert found.shape == truth.shape
        assert found.dtype == np.uint8
        np.add.at(confusion, (truth, found), 1)
        color = np.array(Image.open(tmp_path / "predictions" / "colors" / f"{name}.png").convert("RGB"))
        assert (color == PALETTE[TABLE.train_ids(found)]).all()
    kept = confusion[LABEL_IDS][:, LABEL_IDS]
    union = kept.sum(0) + kept.sum(1) - kept.diagonal()
    iou = kept.diagonal()[union > 0] / union[union > 0]
    assert f"{iou.mean():.5f}"[:6] in out
    assert "val/iou/road" in out
    assert "val/iou/train" not in out, "neither in the images nor predicted"
    with (trained / "logs" / "version_0" / "metrics.csv").open() as file:
        assert {"val/miou", "val/iou/car", "val/loss", "train/loss", "lr"} <= set(csv.DictReader(file).fieldnames)
    assert (trained / "curves.png").stat().st_size > 10_000


def test_options_of_evaluation(tree, trained, tmp_path, capsys):
    """Sliding windows of the image's size give what whole images do; smaller ones and flipping something else."""

    def miou(*more):
        common = [f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu", f"--data.root={tree}"]
        cli = recipe_cli.run(["validate", f"--ckpt_path={trained / 'last.ckpt'}", *common, *more])
        return cli.trainer.callback_metrics["val/loss"].item()

    whole = miou()
    assert miou(
        "--model.inference=slide", "--model.window=[32, 64]", "--model.window_stride=[32, 64]"
    ) == pytest.approx(whole, rel=1e-5)
    small = miou("--model.inference=slide", "--model.window=[32, 32]", "--model.window_stride=[16, 16]")
    mirrored = miou("--model.flip=true")
    assert len({round(value, 5) for value in (whole, small, mirrored)}) == 3


def test_weights_to_begin_with(trained, tmp_path):
    """A classifier of the library becomes the backbone; a segmentation model is read whole."""
    options = yaml.safe_load(OPTIONS)
    classifier = create_model("rednet", num_classes=10, **options["backbone_options"])
    ours = {f"net.{key}": value for key, value in classifier.state_dict().items()}
    for state in (ours, official_state_dict(classifier)):
        torch.save({"state_dict": state}, tmp_path / "classifier.ckpt")
        model = Segmentation("semantic_fpn", options=options, backbone_weights=str(tmp_path / "classifier.ckpt"))
        assert torch.equal(model.net.backbone.layer2[0].conv1.weight, classifier.layer2[0].conv1.weight)
    model = Segmentation("semantic_fpn", options=options, init_from=str(trained / "last.ckpt"))
    state = torch.load(trained / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(model.net.decode_head.conv_seg.weight, state["net.decode_head.conv_seg.weight"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--data.root=/nowhere"],
            "data.root=/nowhere has no split 'train' of Cityscapes: /nowhere/leftImg8bit/train is not a folder; ",
        ),
        (["--data.crop=[0, 8]"], "data.crop is (0, 8), expected two positive numbers"),
        (["--data.scale=[2.0, 1.0]"], "data.scale is (2.0, 1.0), expected two positive"),
        (["--model.inference=slide", "--model.window_stride=[600, 8]"], "model.window_stride is"),
        (["--model.region_sizes=[9, 4]"], "model.region_sizes: bounds is [9, 4], expected ascending numbers"),
        (["--model.num_classes=7"], "model.num_classes is 7, but the data has 19 classes (road, sidewalk, building"),
        (["--model.name=rednet26", "--model.options={}"], "model.name is 'rednet26', expected a segmentation model"),
        (["--model.options.neck=other"], "neck is 'other', expected 'conv' or 'involution'"),
        (["--model.backbone_weights=/nowhere"], "model.backbone_weights: there is no file /nowhere"),
    ],
)
def test_wrong_input_is_one_line(tree, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments("fit", tree, tmp_path, *more))
    assert exit.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert message in line


def test_a_file_among_the_cities(tmp_path):
    root = write_tree(tmp_path, 1, 1)
    (root / "leftImg8bit/val/README").touch()
    (root / "leftImg8bit/val/.DS_Store").touch()
    for folder in ("ulm/.ipynb_checkpoints", ".ipynb_checkpoints", "__MACOSX"):
        (root / "leftImg8bit/val" / folder).mkdir()
        shutil.copy(
            next(root.glob("leftImg8bit/val/ulm/*.png")), root / "leftImg8bit/val" / folder / f"a{IMAGE_SUFFIX}"
        )
    shutil.copy(next(root.glob("leftImg8bit/val/ulm/*.png")), root / f"leftImg8bit/val/ulm/._a{IMAGE_SUFFIX}")
    data = CityscapesData(str(root), num_workers=0)
    data.setup("validate")
    assert [path for path, _ in data.val_samples.files] == [
        str(root / "leftImg8bit/val/ulm/ulm_000000_000019_leftImg8bit.png")
    ]
    with pytest.raises(RecipeError, match=r"data.crop is \(16,\), expected two positive numbers"):
        CityscapesData(str(root), crop=(16,))


def saved(mode, size=(64, 32), value=7):
    return lambda path: Image.new(mode, size, value).save(path, "png")


def with_value(value):
    def save(path):
        ids = np.full((32, 64), 7, np.uint8)
        ids[5, 6] = value
        Image.fromarray(ids).save(path)

    save.__name__ = "with_value"
    return save


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (saved("L", (63, 32)), "have 63 x 32 pixels, expected 64 x 32 as in .*ulm_000000_000019_leftImg8bit.png"),
        (saved("L", (32, 64)), "have 32 x 64 pixels, expected 64 x 32"),
        (saved("RGB", value=(7, 7, 7)), r"are of mode RGB, expected one byte for each pixel \(mode L or P\)"),
        (saved("RGBA", value=(7, 7, 7, 255)), "are of mode RGBA, expected"),
        (saved("LA", value=(7, 255)), "are of mode LA, expected"),
        (saved("1", value=1), "are of mode 1, expected"),
        (saved("I;16"), "are of mode I;16, expected"),
        (with_value(34), "have the value 34, expected the ids of Cityscapes, 0 to 33 and 255"),
        (with_value(254), "have the value 254, expected"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "cannot read labels .*gtFine_labelIds.png: "),
    ],
)
def test_wrong_labels(tmp_path, save, message):
    """Each is reported by name, and nothing is learned from it."""
    root = write_tree(tmp_path, 1, 1)
    (path,) = root.glob("gtFine/val/ulm/*_gtFine_labelIds.png")
    save(path)
    data = CityscapesData(str(root), num_workers=0)
    data.setup("validate")
    with pytest.raises(RecipeError, match=message) as error:
        data.val_samples[0]
    assert str(path) in str(error.value)
    assert isinstance(error.value, UnreadableSample) == (save.__name__ != "with_value"), "what may be skipped"


def test_labels_with_a_palette(tmp_path):
    """The indices are the ids, whatever their colours are; 255 is the id -1."""
    root = write_tree(tmp_path, 1, 1)
    (path,) = root.glob("gtFine/val/ulm/*_gtFine_labelIds.png")
    ids = np.array(Image.open(path))
    ids[0] = 255
    picture = Image.fromarray(ids)
    picture.putpalette(bytes(255 - index // 3 for index in range(768)))
    picture.save(path)
    assert Image.open(path).mode == "P"
    data = CityscapesData(str(root), num_workers=0)
    data.setup("validate")
    target = data.val_samples[0][1]
    assert (target[0] == IGNORED).all()
    assert (target[1:].numpy() == TABLE.train_ids(ids[1:])).all()
    assert set(target[1:].unique().tolist()) == {ROAD, CAR, IGNORED}


def test_predictions_of_equal_names(trained, tmp_path, caplog):
    """Each image has its own files; one that cannot be read has none, and does not count."""
    for name in ("a/1.png", "b/1.png", "b/2.jpg", ".hidden/3.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "photos" / name)
    (tmp_path / "photos/b/2.jpg").write_bytes(b"no image")
    common = [f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu", "--data.val_batch_size=2"]
    common += [f"--ckpt_path={trained / 'last.ckpt'}", f"--data.predict_root={tmp_path / 'photos'}"]
    with pytest.warns(UserWarning, match=r"skipped: cannot read image .*photos/b/2.jpg"), caplog.at_level("INFO"):
        cli.main(["predict", *common])
    found = {
        path.relative_to(tmp_path / "predictions").as_posix() for path in (tmp_path / "predictions").rglob("*.png")
    }
    assert found == {"labelIds/a/1_labelIds.png", "labelIds/b/1_labelIds.png", "colors/a/1.png", "colors/b/1.png"}
    assert "predictions of 2 images" in caplog.text


def test_images_of_several_sizes(tree, trained, tmp_path, capsys):
    """One after the other they can be predicted; a batch of them is refused in one line."""
    (tmp_path / "photos").mkdir()
    for index, size in enumerate(((32, 32), (64, 32))):
        Image.new("RGB", size).save(tmp_path / f"photos/{index}.png")
    common = [f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu"]
    common += [f"--ckpt_path={trained / 'last.ckpt'}", f"--data.predict_root={tmp_path / 'photos'}"]
    cli.main(["predict", *common])
    assert [Image.open(tmp_path / f"predictions/colors/{index}.png").size for index in (0, 1)] == [(32, 32), (64, 32)]
    with pytest.raises(SystemExit) as exit:
        cli.main(["predict", *common, "--data.val_batch_size=2"])
    assert exit.value.code == 2
    assert "images of (32, 32) and (32, 64) pixels (height, width) are in one batch" in capsys.readouterr().err


def test_missing_labels(tmp_path):
    root = write_tree(tmp_path, 2, 2)
    (root / "gtFine/val/ulm/ulm_000000_000019_gtFine_labelIds.png").unlink()
    data = CityscapesData(str(root), num_workers=0)
    with pytest.raises(
        RecipeError, match=r"labels of 1 images are missing, first .*ulm_000000_000019_gtFine_labelIds.png"
    ):
        data.setup("fit")


def test_cityscapes_digits(tmp_path, monkeypatch):
    """The tree can be read, has the three classes and ignored borders, and is the same every time."""
    monkeypatch.setattr(digits, "SCENES", {"train": 3, "val": 2})
    assert digits.write_scenes(tmp_path / "a") == (3, 2)
    digits.write_scenes(tmp_path / "b")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.png"))
    assert len(files) == 15
    assert all((tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes() for path in files)
    data = CityscapesData(str(tmp_path / "a"), num_workers=0)
    data.setup("fit")
    seen = torch.stack([data.val_samples[i][1] for i in range(2)])
    assert seen.shape == (2, 128, 256)
    names = {CLASSES[i] for i in seen.unique().tolist() if i != IGNORED}
    assert names == {"building", "vegetation", "traffic sign"}
    assert (seen[:, 0] == IGNORED).all()
    assert 0.02 < (seen == IGNORED).float().mean() < 0.2


def test_two_processes_see_every_image_once(tree, trained, tmp_path):
    """Three images on two processes: the confusion is summed, and padding ignored."""
    common = [f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu", f"--data.root={tree}"]
    common += [f"--ckpt_path={trained / 'last.ckpt'}", "--trainer.logger=lightning.pytorch.loggers.CSVLogger"]
    one = recipe_cli.run(["validate", *common, f"--trainer.logger.save_dir={tmp_path / 'one'}"])
    status, error = run_distributed(["validate", *common, f"--trainer.logger.save_dir={tmp_path / 'two'}"])
    assert status == 0, error
    (path,) = (tmp_path / "two").rglob("metrics.csv")
    with path.open() as file:
        (row,) = csv.DictReader(file)
    for name in ("val/miou", "val/iou/road", "val/loss"):
        assert float(row[name]) == pytest.approx(one.trainer.callback_metrics[name].item(), rel=1e-5)


def test_figure_marks_where_predictions_differ():
    """Two blobs and a seam: the blobs are found, the larger first; the seam and what is ignored are not."""
    truth = np.full((64, 128), ROAD, np.uint8)
    truth[:, 120:] = IGNORED
    one, other = truth.copy(), truth.copy()
    one[10:20, 20:40], other[10:20, 20:40] = CAR, ROAD
    one[40:46, 60:70] = SIDEWALK
    one[:, 90] = CAR
    one[:, 120:] = CAR
    first, second = figure.differing_regions(one, other, truth)
    assert 180 <= first.pixels <= 200, "corners may be left out"
    assert 50 <= second.pixels <= 60
    for region, (top, left, bottom, right) in ((first, (10, 20, 20, 40)), (second, (40, 60, 46, 70))):
        assert region.top <= top
        assert region.left <= left
        assert region.top + region.height >= bottom
        assert region.left + region.width >= right
        assert region.height <= bottom - top + 8
        assert region.width <= right - left + 8
    assert figure.differing_regions(one, other, truth, 1) == [first]
    assert figure.differing_regions(other, other, truth) == []


@pytest.mark.parametrize("width", [3, 8, 12])
def test_legends_fit(width):
    """Thirteen classes take as few rows as have room, down to one column."""
    drawn = Figure((width, 4), layout="constrained")
    drawn.subplots()
    handles = [Patch(label=f"a class, number {index}") for index in range(13)]
    figure._legend_below(drawn, handles)
    (legend,) = drawn.legends
    drawn.draw_without_rendering()
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= drawn.bbox.width
    assert len(legend.get_texts()) == 13
    entry = box.width / legend._ncols
    assert box.width + 1.3 * entry > drawn.bbox.width, "another column would have had room"


def test_figure(tree, trained, tmp_path, capsys):
    """Pictures of two checkpoints of a run; wrong names are one line."""
    checkpoints = [f"--ours={trained / 'best.ckpt'}", f"--baseline={trained / 'last.ckpt'}", f"--output={tmp_path}"]
    with pytest.raises(SystemExit) as exit:
        cli.main(["figure", *checkpoints, "--count=2"])
    assert not exit.value.code
    for name in ("comparison", "kernels"):
        assert Image.open(tmp_path / f"{name}.png").size[0] > 500
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    for more, message in (
        (
            ["--images", "paris_000000_000000"],
            "has no validation image paris_000000_000000; there are bonn_000001_000019",
        ),
        (
            ["--images", "ulm_000000_000019", "--layers", "layer9"],
            "--layers has layer9, expected involutions of the model: backbone.",
        ),
        (["--ours", __file__], "is not a checkpoint of the segmentation recipe"),
        (["--root", "/nowhere"], "data.root=/nowhere has no split 'val'"),
    ):
        with pytest.raises(SystemExit) as exit:
            cli.main(["figure", *checkpoints, *more])
        assert exit.value.code == 2
        assert message in capsys.readouterr().err


def test_each_side_of_a_figure_sees_its_own_images(tree, trained, tmp_path, monkeypatch):
    """Normalised as in its training."""
    changed = torch.load(trained / "last.ckpt", weights_only=True)
    changed["datamodule_hyper_parameters"] |= {"mean": [0.0] * 3, "std": [0.5] * 3}
    torch.save(changed, tmp_path / "baseline.ckpt")
    seen, forward = [], figure.Segmentation.forward

    def watched(network, images):
        seen.append(images)
        return forward(network, images)

    monkeypatch.setattr(figure.Segmentation, "forward", watched)
    figure.run(str(trained / "last.ckpt"), str(tmp_path / "baseline.ckpt"), str(tmp_path), count=1)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(seen[0] * 0.5, seen[1] * std + mean)
    other = copy.deepcopy(changed)
    other["hyper_parameters"]["num_classes"] = 3
    monkeypatch.setattr(figure.Segmentation, "load_state_dict", lambda *_: None)
    torch.save(other, tmp_path / "other.ckpt")
    with pytest.raises(RecipeError, match=r"other.ckpt of 3 classes, expected 19 as in --ours"):
        figure.run(str(trained / "last.ckpt"), str(tmp_path / "other.ckpt"), str(tmp_path))
