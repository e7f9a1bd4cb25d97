"""Image data sets of Hugging Face, from parquet files: samples, errors, and resuming bit for bit."""

import io
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from recipe_support import (
    assert_same_state,
    fit_arguments,
    interruption,
    one_thread,  # noqa: F401
    run_forked,
    training_state,
)

pytest.importorskip("lightning")
from pyinvolution.recipes import HuggingFaceData, RecipeError
from pyinvolution.recipes.data import UnreadableSample

datasets = pytest.importorskip("datasets")


def write_tables(root, train=24, validation=10, named=True, damage=False):
    """Parquet files of noise in two classes, in turn; the second image of validation is perhaps damaged."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("validation", validation)):
        rows = []
        for index in range(count):
            stream = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(stream, "png")
            content = b"no image" if damage and split == "validation" and index == 1 else stream.getvalue()
            rows.append({"image": {"bytes": content, "path": None}, "label": index % 2, "text": "x"})
        features = {
            "image": datasets.Image(decode=False),
            "label": datasets.ClassLabel(names=["cat", "dog"]) if named else datasets.Value("int64"),
            "text": datasets.Value("string"),
        }
        table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
        (root / "data").mkdir(parents=True, exist_ok=True)
        table.to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_tables(tmp_path_factory.mktemp("tables"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def loaded(root, stage="fit", **changed):
    data = HuggingFaceData(str(root), **{"val_transform": [], "num_workers": 0} | changed)
    data.setup(stage)
    return data


@pytest.mark.parametrize("saved", [False, True])
def test_samples(root, tmp_path, saved):
    """The rows in order, with the names of the classes; also of what save_to_disk has written."""
    where = root
    if saved:
        files = {split: str(root / f"data/{split}-00000-of-00001.parquet") for split in ("train", "validation")}
        datasets.load_dataset("parquet", data_files=files).save_to_disk(str(tmp_path / "saved"))
        where = tmp_path / "saved"
    data = loaded(where)
    assert data.classes == ["cat", "dog"]
    assert (len(data.train_samples), len(data.val_samples)) == (24, 10)
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(34)]
    for index in (0, 7):
        image, target = data.val_samples[index]
        assert (image.permute(1, 2, 0).numpy() == pictures[24 + index]).all()
        assert target == index % 2


def test_classes_without_names(tmp_path):
    assert loaded(write_tables(tmp_path / "tables", named=False)).classes == ["0", "1"]


def test_wrong_input(root, tmp_path):
    for changed, message in (
        ({"val": "test"}, "data.val is 'test', expected a split of .*: train"),
        ({"image": "picture"}, "data.image is 'picture', expected a column of .*: image, label, text"),
        ({"label": "text"}, "data.label is 'text', which is 'x' for image 0 of train, expected a number from 0"),
        ({"held_out": 0.5}, "data.held_out is 0.5, expected 0 with data of Hugging Face"),
    ):
        with pytest.raises(RecipeError, match=message):
            loaded(root, **changed)
    (tmp_path / "none").mkdir()
    with pytest.raises(
        RecipeError, match=r"expected files train\.parquet or train-0.* and validation\.parquet or .*none/data"
    ):
        loaded(tmp_path / "none")
    (tmp_path / "none/train.parquet").write_bytes(b"text")
    with pytest.raises(RecipeError, match=f"data.root={tmp_path / 'none'}: "):
        loaded(tmp_path / "none")
    with pytest.raises(RecipeError, match=r"data.predict_root is None, expected an image or a folder"):
        loaded(root, "predict")


def save_labels(root, splits):
    """What save_to_disk writes of splits: the labels of one small image each, and their type."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "png")
    tables = {}
    for split, (labels, kind) in splits.items():
        features = datasets.Features({"image": datasets.Image(decode=False), "label": kind})
        columns = {"image": [{"bytes": stream.getvalue(), "path": None}] * len(labels), "label": labels}
        tables[split] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(tables).save_to_disk(str(root))
    return root


NAMED = datasets.ClassLabel(names=["cat", "dog"])
NUMBER = datasets.Value("int64")


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        ([0, -1], NAMED, "is -1 for image 1 of validation, expected a number from 0 to 1"),
        ([0, None], NAMED, "is None for image 1 of validation, expected a number from 0 to 1"),
        ([2], NUMBER, "is 2 for image 0 of validation, expected a number from 0 to 1"),
        ([None, 1], NUMBER, "is None for image 0 of validation"),
        ([[0]], datasets.Sequence(NUMBER), r"is \[0\] for image 0 of validation"),
        ([1.0], datasets.Value("float32"), "is 1.0 for image 0 of validation"),
        ([True], datasets.Value("bool"), "is True for image 0 of validation"),
    ],
)
def test_labels_that_are_no_classes(tmp_path, labels, kind, message):
    """Splits of the hub whose labels are not published have -1."""
    save_labels(tmp_path / "tables", {"train": ([0, 1], NAMED), "validation": (labels, kind)})
    with pytest.raises(RecipeError, match=f"data.label is 'label', which {message}"):
        loaded(tmp_path / "tables")


def test_splits_that_name_classes_differently(tmp_path):
    for number, (names, message) in enumerate(
        (
            (["cat", "fox"], "the 2 classes of train and 2 of validation differ, first number 1: dog and fox"),
            (["ant", "cat", "dog"], "the 2 classes of train and 3 of validation differ, first number 0: cat and ant"),
            (
                ["cat", "dog", "fox"],
                "the 2 classes of train and 3 of validation differ, first number 2: missing and fox",
            ),
        )
    ):
        root = tmp_path / str(number)
        save_labels(root, {"train": ([0, 1], NAMED), "validation": ([0], datasets.ClassLabel(names=names))})
        for stage in ("fit", "validate"):
            with pytest.raises(RecipeError, match=message):
                loaded(root, stage)


def test_classes_without_names_in_an_evaluation(tmp_path):
    """Those of the training images count, as a checkpoint knows them."""
    root = save_labels(tmp_path / "tables", {"train": ([0, 2], NUMBER), "validation": ([0, 1], NUMBER)})
    assert loaded(root, "validate").classes == ["0", "1", "2"]
    root = save_labels(tmp_path / "one", {"validation": ([0, 1], NUMBER)})
    assert loaded(root, "validate").classes == ["0", "1"]


def test_files_of_the_splits(root, tmp_path):
    """Of other splits, and of other folders than the one that is meant, none is read."""
    train, validation = (root / f"data/{split}-00000-of-00001.parquet" for split in ("train", "validation"))
    for name in (
        "plain/train.parquet",
        "plain/train_extra-0.parquet",
        "plain/train-extra.parquet",
        "two/fine/train-0.parquet",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(train.read_bytes())
    for name in ("plain/validation.parquet", "two/fine/validation-0.parquet", "two/coarse/validation-0.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(validation.read_bytes())
    assert len(loaded(tmp_path / "plain").train_samples) == 24
    data = loaded(tmp_path / "two", config="fine")
    assert (len(data.train_samples), len(data.val_samples)) == (24, 10)
    with pytest.raises(RecipeError, match=r"expected files .* in .*two or .*two/data.*; data\.config names a folder"):
        loaded(tmp_path / "two")
    (tmp_path / "plain/data").mkdir()
    (tmp_path / "plain/data/train-0.parquet").write_bytes(train.read_bytes())
    with pytest.raises(
        RecipeError, match=r"files of the splits in .*plain and .*plain/data, expected them in one folder"
    ):
        loaded(tmp_path / "plain")


def test_a_damaged_image_is_named(tmp_path):
    data = loaded(write_tables(tmp_path / "tables", damage=True))
    with pytest.raises(UnreadableSample, match=r"cannot read image 1 of .*tables, validation"):
        data.val_samples[1]


def test_resumed_run_is_the_same(root, tmp_path):
    """Killed in the middle of an epoch, as with files."""
    source = "--data.class_path=pyinvolution.recipes.HuggingFaceData"

    def arguments(run, *more):
        first, *rest = fit_arguments(root, run, *more)
        return [first, source, *rest]

    whole, half = tmp_path / "whole", tmp_path / "half"
    runs = [arguments(whole), arguments(half, *interruption(signal.SIGTERM, 8))]
    (status, error), (stopped, _) = run_forked(runs, tmp_path)
    assert status == 0, error
    assert stopped == 143
    assert torch.load(half / "last.ckpt", weights_only=True)["global_step"] == 9
    ((status, error),) = run_forked([arguments(half, f"--ckpt_path={half / 'last.ckpt'}")], tmp_path)
    assert status == 0, error
    assert_same_state(training_state(whole / "last.ckpt"), training_state(half / "last.ckpt"))
