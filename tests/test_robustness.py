"""Damaged files and full disks: one line on stderr and exit code 2, nothing executed, and no checkpoint lost."""

import ast
import errno
import json
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recipe_support import environment, fit_arguments, one_thread, training_state, write_images  # noqa: F401

import pyinvolution
from pyinvolution import cli

pytest.importorskip("lightning")
from PIL import Image

from pyinvolution.recipes import RecipeError
from pyinvolution.recipes.callbacks import AtomicCheckpointIO

PACKAGE = Path(pyinvolution.__file__).parent


def error_of(capsys, *arguments):
    """The one line of error of a command line that must fail with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        cli.main([str(argument) for argument in arguments])
    err = capsys.readouterr().err
    assert exit.value.code == 2, err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if re.match(r"pyinvolution[ \w-]*: error: ", line)]
    assert line.startswith(f"pyinvolution {arguments[0]}: error: ")
    assert err.splitlines()[-1] == line, "nothing comes after it"
    return line


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of the data and of a run over it."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_images(folder / "data", train=8, val=4)
    cli.main(fit_arguments(data, folder / "run", "--trainer.max_epochs=1"))
    return data, folder / "run"


# --- code in files ----------------------------------------------------------------------------------------------------


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


def test_nothing_is_unpickled_and_no_yaml_makes_objects():
    loads = 0
    for path in PACKAGE.rglob("*.py"):
        for name, keywords in calls(ast.parse(path.read_text())):
            if name == "torch.load":
                loads += 1
                assert keywords.get("weights_only") == "True", path
            assert not re.fullmatch(r"(c?[pP]ickle|dill|joblib|marshal|shelve)\.(load|loads|open|Unpickler)", name), (
                path
            )
            assert name not in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"), (path, name)
            assert name != "np.load" or keywords.get("allow_pickle", "False") == "False", path
            assert not name.endswith("load_from_checkpoint"), path
    assert loads == 1, "files are read in one place"


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def truncated(content):
    return content[: len(content) // 2]


def flipped(content):
    """The first kilobytes, where the names and numbers are, overwritten."""
    return content[:60] + b"\xa5" * 4000 + content[4060:]


def without(*keys):
    def remove(checkpoint):
        for key in keys:
            del checkpoint[key]

    return remove


def replaced(**values):
    return lambda checkpoint: checkpoint.update(values)


RAW = {
    "empty": lambda content: b"",
    "truncated": truncated,
    "without its end": lambda content: content[:-100],
    "random": lambda content: bytes(torch.randint(256, (5000,), dtype=torch.uint8).tolist()),
    "overwritten": flipped,
    "text": lambda content: b"version https://git-lfs.github.com/spec/v1\n",
}
CHANGED = {
    "no state_dict": without("state_dict"),
    "no version": without("pytorch-lightning_version"),
    "no optimizer": without("optimizer_states"),
    "no state of the optimizer": replaced(optimizer_states=[]),
    "optimizer of a wrong type": replaced(optimizer_states=[3]),
    "loops of a wrong type": replaced(loops=3),
    "state_dict of a wrong type": replaced(state_dict=[1, 2]),
    "entries of a wrong type": lambda checkpoint: checkpoint["state_dict"].update({"net.head.fc.bias": "text"}),
    "another entry": lambda checkpoint: checkpoint["state_dict"].update({"net.other": torch.zeros(1)}),
    "no data": lambda checkpoint: checkpoint["ImageFolderData"].clear(),
}


@pytest.fixture(scope="module")
def damaged(trained, tmp_path_factory):
    """Files by what is wrong with them, and a path that code in two of them would make."""
    folder = tmp_path_factory.mktemp("damaged")
    content = (trained[1] / "last.ckpt").read_bytes()
    files = {name: folder / f"{name}.ckpt" for name in [*RAW, *CHANGED]}
    for name, change in RAW.items():
        files[name].write_bytes(change(content))
    for name, change in CHANGED.items():
        checkpoint = torch.load(trained[1] / "last.ckpt", weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, files[name])
    made = folder / "made"
    files |= {name: folder / f"{name}.ckpt" for name in ("a list", "code", "code in a plain pickle")}
    torch.save([1, 2], files["a list"])
    torch.save({"state_dict": {}, "hyper_parameters": Payload(made)}, files["code"])
    files["code in a plain pickle"].write_bytes(pickle.dumps(Payload(made)))
    return files, made


NAMES = [*RAW, *CHANGED, "a list", "code", "code in a plain pickle"]
# What has no business with weights alone, or with evaluation.
OF_TRAINING = {
    "no version",
    "no optimizer",
    "no state of the optimizer",
    "optimizer of a wrong type",
    "loops of a wrong type",
    "no data",
}


@pytest.mark.parametrize("name", NAMES)
def test_damaged_checkpoint(capsys, trained, damaged, tmp_path, name):
    files, made = damaged
    data, path = trained[0], files[name]
    line = error_of(capsys, *fit_arguments(data, tmp_path, f"--ckpt_path={path}"))
    assert "checkpoint" in line or "--ckpt_path" in line
    assert not (tmp_path / "last.ckpt").exists()
    common = (f"--data.root={data}", f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu")
    if name not in OF_TRAINING:
        assert path.name in error_of(capsys, *fit_arguments(data, tmp_path, f"--model.init_from={path}"))
        for command in ("validate", "predict"):
            assert "--ckpt_path" in error_of(capsys, command, f"--ckpt_path={path}", *common)
        if name != "entries of a wrong type":
            assert path.name in error_of(capsys, "export", path, f"--output={tmp_path / 'model.pt2'}")
    assert not made.exists(), "code in a file ran"


def test_damaged_hyper_parameters(capsys, trained, tmp_path):
    checkpoint = torch.load(trained[1] / "last.ckpt", weights_only=True)
    for value in ([1], {"lr": "fast"}, {"name": torch.zeros(2)}, {"_class_path": "os.system"}, {"_class_path": 3}):
        torch.save({**checkpoint, "hyper_parameters": value}, tmp_path / "other.ckpt")
        error_of(capsys, "validate", f"--ckpt_path={tmp_path / 'other.ckpt'}", f"--data.root={trained[0]}")


@pytest.mark.parametrize("written", ["mapping", "string", "escaped string"])
@pytest.mark.parametrize("command", ["validate", "predict"])
def test_a_checkpoint_makes_no_objects(capsys, trained, tmp_path, command, written):
    """The parser would make an instance of any class that a value names."""
    made = tmp_path / "made"
    given: dict | str = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(made)]}}
    if written != "mapping":
        given = json.dumps(given).replace("class_path", "class_path" if written == "string" else "class\\u005fpath")
    checkpoint = torch.load(trained[1] / "last.ckpt", weights_only=True)
    options = checkpoint["hyper_parameters"].get("options") or {}
    checkpoint["hyper_parameters"]["options"] = options | {"stem_channels": [given]}
    torch.save(checkpoint, tmp_path / "other.ckpt")
    data = ("--data.root", trained[0]) if command == "validate" else ("--data.predict_root", trained[0] / "val")
    line = error_of(capsys, command, f"--ckpt_path={tmp_path / 'other.ckpt'}", *data)
    assert "other.ckpt: hyper_parameters names the class subprocess.Popen, expected plain values" in line
    assert not made.exists(), "code that a file names ran"


def test_a_class_of_ones_own_is_imported_by_name_only(capsys, trained, tmp_path, monkeypatch):
    (tmp_path / "own_data.py").write_text(
        "from pathlib import Path\nfrom pyinvolution.recipes import ImageFolderData\n"
        "Path(__file__).with_name('imported').touch()\nclass Own(ImageFolderData): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    checkpoint = torch.load(trained[1] / "last.ckpt", weights_only=True)
    checkpoint["datamodule_hyper_parameters"]["_class_path"] = "own_data.Own"
    torch.save(checkpoint, tmp_path / "other.ckpt")
    arguments = ("validate", f"--ckpt_path={tmp_path / 'other.ckpt'}", f"--data.root={trained[0]}")
    assert "name it too, --data own_data.Own" in error_of(capsys, *arguments)
    assert not (tmp_path / "imported").exists()
    cli.main([*arguments, "--data", "own_data.Own", "--trainer.accelerator=cpu"])
    assert (tmp_path / "imported").exists()


# --- configurations ---------------------------------------------------------------------------------------------------

CONFIGS = {
    "empty": b"",
    "syntax": b"model: {lr: [1, 2\ntrainer: 3",
    "tabs": b"model:\n\tlr: 1\n",
    "unknown field": b"model: {lerning_rate: 1}",
    "unknown section": b"modell: {lr: 1}",
    "wrong type": b"trainer: {max_epochs: many}",
    "wrong type in the model": b"model: {lr: [1, 2]}",
    "a list": b"- 1\n- 2\n",
    "text": b"hello",
    "binary": bytes(range(256)),
    "zeros": bytes(100),
    "not UTF-8": "# ü\nmodel: {lr: 1}".encode("latin-1"),
    "an object": b"model: !!python/object/apply:os.mkdir [made]",
    "a class that is none": b"model: {class_path: os.system, init_args: {command: ls}}",
    "a module that is none": b"model: {class_path: nowhere.Model}",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_damaged_config(capsys, trained, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "own.yaml"
    path.write_bytes(CONFIGS[name])
    error_of(capsys, *fit_arguments(trained[0], tmp_path), f"--config={path}")
    pytest.importorskip("optuna")
    error_of(capsys, "search", f"--config={path}", f"--output={tmp_path / 'search'}")
    assert [entry.name for entry in tmp_path.iterdir()] == ["own.yaml"]


def test_a_folder_for_a_file(capsys, trained, tmp_path):
    data = trained[0]
    for option in ("--config", "--ckpt_path", "--model.init_from"):
        assert str(tmp_path) in error_of(capsys, *fit_arguments(data, tmp_path), f"{option}={tmp_path}")
    (tmp_path / "file").touch()
    error_of(capsys, *fit_arguments(data, tmp_path / "file"))
    error_of(capsys, "make-data", "digits", tmp_path / "file")
    with pytest.raises((OSError, RecipeError)):
        cli.main([*fit_arguments(data, tmp_path / "file"), "--debug"])


# --- data -------------------------------------------------------------------------------------------------------------


def images_missing(root):
    shutil.rmtree(root)


def images_are_a_file(root):
    shutil.rmtree(root)
    root.touch()


def no_training_images(root):
    shutil.rmtree(root / "train")


def no_images_of_a_class(root):
    for path in (root / "val" / "class1").iterdir():
        path.unlink()


def no_classes(root):
    shutil.rmtree(root / "train")
    (root / "train").mkdir()


def another_class(root):
    (root / "val" / "class1").rename(root / "val" / "klass1")


def truncated_image(root):
    path = next((root / "train" / "class0").iterdir())
    path.write_bytes(truncated(path.read_bytes()))


def all_images_are_text(root):
    for path in root.rglob("*.png"):
        path.write_text("no image")


def all_images_are_empty(root):
    for path in root.rglob("*.png"):
        path.write_bytes(b"")


FOLDERS = [images_missing, images_are_a_file, no_training_images, no_images_of_a_class, no_classes, another_class]
FILES = [truncated_image, all_images_are_text, all_images_are_empty]


@pytest.mark.parametrize("damage", FOLDERS, ids=lambda function: function.__name__)
def test_damaged_image_folders(capsys, tmp_path, damage):
    root = write_images(tmp_path / "data", train=4, val=4)
    damage(root)
    assert f"data.root={root}" in error_of(capsys, *fit_arguments(root, tmp_path / "run"))


@pytest.mark.filterwarnings("ignore:skipped")
@pytest.mark.parametrize("damage", FILES, ids=lambda function: function.__name__)
def test_damaged_images(capsys, tmp_path, damage):
    root = write_images(tmp_path / "data", train=4, val=4)
    damage(root)
    line = error_of(capsys, *fit_arguments(root, tmp_path / "run", "--data.unreadable=raise"))
    assert f"cannot read image {root}" in line
    if damage is not truncated_image:
        assert "none of the 4 samples can be read" in error_of(capsys, *fit_arguments(root, tmp_path / "run"))


@pytest.mark.filterwarnings("ignore:skipped")
def test_damaged_images_in_another_process(capsys, tmp_path):
    root = write_images(tmp_path / "data", train=4, val=4)
    all_images_are_text(root)
    more = ("--data.unreadable=raise", "--data.num_workers=1")
    line = error_of(capsys, *fit_arguments(root, tmp_path / "run", *more))
    assert line.startswith(f"pyinvolution fit: error: cannot read image {root}")


def test_nothing_to_predict(capsys, trained, tmp_path):
    given = ("predict", f"--ckpt_path={trained[1] / 'last.ckpt'}", f"--trainer.default_root_dir={tmp_path}")
    for root in (tmp_path, tmp_path / "nowhere"):
        assert f"no image to predict in {root}" in error_of(capsys, *given, f"--data.predict_root={root}")


def of_another_recipe(kind, root, run):
    """`fit` on other data. The network is the small one: the data are wrong before it sees them."""
    return [
        *(a for a in fit_arguments(root, run) if not a.startswith(("--data.size", "--data.resize", "--data.root"))),
        f"--data={kind}",
        f"--data.root={root}",
        "--data.unreadable=raise",
        "--trainer.num_sanity_val_steps=0",
    ]


def write_coco(root):
    images = write_images(root / "all", train=4, val=4, classes=1)
    for split in ("train", "val"):
        (images / split / "class0").rename(root / f"{split}2017")
        listed = [{"id": i, "file_name": f"{i:03d}.png", "height": 16, "width": 16} for i in range(4)]
        box = {"bbox": [2, 2, 9, 9], "area": 81, "iscrowd": 0, "segmentation": [[2, 2, 11, 2, 11, 11, 2, 11]]}
        content = {
            "images": listed,
            "annotations": [{"id": i + 1, "image_id": i, "category_id": 5 + i % 2, **box} for i in range(4)],
            "categories": [{"id": 5, "name": "five"}, {"id": 6, "name": "six"}],
        }
        path = root / "annotations" / f"instances_{split}2017.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))


def in_json(change):
    def damage(root):
        path = root / "annotations" / "instances_train2017.json"
        content = json.loads(path.read_text())
        changed = change(content)
        path.write_text(json.dumps(content if changed is None else changed))

    return damage


def in_text(change):
    def damage(root):
        path = root / "annotations" / "instances_train2017.json"
        path.write_bytes(change(path.read_bytes()))

    return damage


COCO = {
    "no file": lambda root: (root / "annotations" / "instances_train2017.json").unlink(),
    "no folder": lambda root: shutil.rmtree(root / "train2017"),
    "empty": in_text(lambda text: b""),
    "truncated": in_text(truncated),
    "binary": in_text(lambda text: bytes(range(256))),
    "a list": in_json(lambda content: []),
    "an empty dict": in_json(lambda content: {}),
    "no annotations": in_json(lambda content: content.pop("annotations") and None),
    "no categories": in_json(lambda content: content.update(categories=[])),
    "other categories": in_json(lambda content: content["categories"].append({"id": 9, "name": "nine"})),
    "images that are numbers": in_json(lambda content: content.update(images=[1, 2])),
    "an annotation without a category": in_json(lambda content: content["annotations"][0].pop("category_id") and None),
    "an annotation without a box": in_json(lambda content: content["annotations"][0].pop("bbox") and None),
    "an unknown category": in_json(lambda content: content["annotations"][0].update(category_id=77)),
    "a box of 3": in_json(lambda content: content["annotations"][0].update(bbox=[1, 2, 3])),
    "a box of text": in_json(lambda content: content["annotations"][0].update(bbox=["a", "b", "c", "d"])),
    "repeated annotations": in_json(lambda content: [entry.update(id=1) for entry in content["annotations"]]),
    "repeated images": in_json(lambda content: content["images"][0].update(id=1)),
    "repeated categories": in_json(lambda content: content["categories"][0].update(id=6)),
    "ids of text": in_json(lambda content: [image.update(id=str(image["id"])) for image in content["images"]]),
    "other names of categories": in_json(lambda content: content["categories"][0].update(name="fünf")),
    "a box of NaN": in_json(lambda content: content["annotations"][0].update(bbox=[1, 2, 3, float("nan")])),
    "a box of a negative size": in_json(lambda content: content["annotations"][0].update(bbox=[9, 9, -3, 4])),
    "no masks": in_json(lambda content: [entry.update(segmentation=[]) for entry in content["annotations"]]),
    "sizes of other images": in_json(lambda content: [image.update(width=17) for image in content["images"]]),
    "masks of text": in_json(lambda content: content["annotations"][0].update(segmentation="round")),
    "a category without a name": in_json(lambda content: content["categories"][0].pop("name") and None),
    "an image without a name": in_json(lambda content: content["images"][0].pop("file_name") and None),
    "a missing image": lambda root: (root / "train2017" / "000.png").unlink(),
    "a broken image": lambda root: (root / "train2017" / "001.png").write_text("no image"),
}


@pytest.mark.parametrize("name", COCO)
def test_damaged_coco(capsys, tmp_path, name):
    pytest.importorskip("pycocotools")
    write_coco(tmp_path)
    COCO[name](tmp_path)
    kind = "pyinvolution.recipes.CocoData"
    assert str(tmp_path) in error_of(capsys, *of_another_recipe(kind, tmp_path, tmp_path / "run"))


def write_cityscapes(root):
    for split in ("train", "val"):
        for folder, suffix, mode in (("leftImg8bit", "leftImg8bit", "RGB"), ("gtFine", "gtFine_labelIds", "L")):
            for index in range(4):
                path = root / folder / split / "ulm" / f"ulm_{index:06d}_000019_{suffix}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new(mode, (32, 16)).save(path)


def labels(root):
    return root / "gtFine" / "train" / "ulm" / "ulm_000000_000019_gtFine_labelIds.png"


CITYSCAPES = {
    "no folder": shutil.rmtree,
    "no images": lambda root: shutil.rmtree(root / "leftImg8bit"),
    "no labels": lambda root: shutil.rmtree(root / "gtFine"),
    "no validation": lambda root: shutil.rmtree(root / "leftImg8bit" / "val"),
    "an empty split": lambda root: [path.unlink() for path in (root / "leftImg8bit" / "train" / "ulm").iterdir()],
    "labels missing": lambda root: labels(root).unlink(),
    "labels of another size": lambda root: Image.new("L", (31, 16)).save(labels(root)),
    "labels in colour": lambda root: Image.new("RGB", (32, 16)).save(labels(root)),
    "labels of 16 bits": lambda root: Image.new("I;16", (32, 16)).save(labels(root)),
    "labels truncated": lambda root: labels(root).write_bytes(truncated(labels(root).read_bytes())),
    "labels that are text": lambda root: labels(root).write_text("no image"),
}


@pytest.mark.parametrize("name", CITYSCAPES)
def test_damaged_cityscapes(capsys, tmp_path, name):
    root = tmp_path / "data"
    write_cityscapes(root)
    CITYSCAPES[name](root)
    arguments = of_another_recipe("pyinvolution.recipes.CityscapesData", root, tmp_path / "run")
    assert str(root) in error_of(capsys, *arguments, "--model.num_classes=19", "--data.crop=[16,16]")


# --- full disks and Ctrl-C --------------------------------------------------------------------------------------------


class Failing:
    """A file of which only the first bytes can be written."""

    def __init__(self, file, room, error):
        self.file, self.room, self.error = file, room, error

    def write(self, content):
        self.room -= len(content)
        if self.room < 0:
            self.file.write(bytes(content)[: self.room])
            raise self.error
        return self.file.write(content)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()


@pytest.fixture
def fail(monkeypatch):
    """Makes every checkpoint from now on fail with an error after some bytes."""
    original = Path.open

    def install(error, room=5000):
        def open(path, *arguments, **more):
            file = original(path, *arguments, **more)
            return Failing(file, room, error) if path.suffix == ".part" else file

        monkeypatch.setattr(Path, "open", open)

    return install


def no_space():
    return OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("room", [0, 100, 5000, 40_000])
@pytest.mark.parametrize(("error", "raised"), [(no_space(), RecipeError), (KeyboardInterrupt(), KeyboardInterrupt)])
def test_failed_write_keeps_the_checkpoint(tmp_path, fail, error, raised, room):
    path, writer = tmp_path / "last.ckpt", AtomicCheckpointIO()
    writer.save_checkpoint({"epoch": 1, "weights": torch.ones(10_000)}, path)
    fail(error, room)
    with pytest.raises(raised) as caught:
        writer.save_checkpoint({"epoch": 2, "weights": torch.ones(10_000)}, path)
    assert raised is KeyboardInterrupt or (str(path) in str(caught.value) and "No space left" in str(caught.value))
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(path, weights_only=True)["epoch"] == 1


def test_failed_serialisation_keeps_the_checkpoint(tmp_path, monkeypatch):
    """An error that has nothing to do with the disk stays as it is."""
    path, writer = tmp_path / "last.ckpt", AtomicCheckpointIO()
    writer.save_checkpoint({"epoch": 1}, path)
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        writer.save_checkpoint({"epoch": 2, "function": lambda: 0}, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(path, weights_only=True)["epoch"] == 1


@pytest.fixture
def run_folder(trained, tmp_path):
    """Another finished run of one epoch."""
    cli.main(fit_arguments(trained[0], tmp_path / "run", "--trainer.max_epochs=1"))
    return tmp_path / "run"


def resumed(data, folder):
    return fit_arguments(data, folder, "--trainer.max_epochs=2", "--ckpt_path=last")


def test_ctrl_c_while_a_checkpoint_is_written(trained, run_folder, fail):
    before = (run_folder / "last.ckpt").read_bytes()
    handler = signal.getsignal(signal.SIGINT)
    fail(KeyboardInterrupt())
    with pytest.raises(SystemExit) as exit:
        cli.main(resumed(trained[0], run_folder))
    signal.signal(signal.SIGINT, handler)  # Lightning ignores a second Ctrl-C
    assert exit.value.code == 1
    assert (run_folder / "last.ckpt").read_bytes() == before
    assert not list(run_folder.rglob("*.part"))


LIMITED = """
import resource, sys
from pyinvolution import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
cli.main(sys.argv[2:])
"""


def test_files_that_may_not_grow(trained, run_folder):
    """As on a full disk, by the operating system's own means."""
    before = (run_folder / "last.ckpt").read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(len(before) // 2), *resumed(trained[0], run_folder)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"pyinvolution fit: error: cannot write the checkpoint {run_folder / 'last.ckpt'}: File too")
    assert "Traceback" not in done.stderr
    assert (run_folder / "last.ckpt").read_bytes() == before
    assert not list(run_folder.rglob("*.part"))

    cli.main(resumed(trained[0], run_folder))
    assert training_state(run_folder / "last.ckpt")["['global_step']"] == 4
