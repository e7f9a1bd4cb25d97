"""Data of the recipes: which samples come, what they look like, and what happens to broken files."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
from PIL import Image
from recipe_support import write_images

from pyinvolution.recipes import ImageFolderData, RecipeError
from pyinvolution.recipes.classification.digits import write_digits
from pyinvolution.recipes.data import EvalSampler, ResumableSampler, SeededDataset, UnreadableSample


def trainer(**changed):
    values = {"global_step": 0, "world_size": 1, "global_rank": 0, "accumulate_grad_batches": 1}
    return SimpleNamespace(**values | {"limit_train_batches": 1.0} | changed)


def loaded(root, stage="fit", **arguments):
    """A data module at the beginning of a run."""
    values = {"size": 16, "resize": 16, "batch_size": 4, "num_workers": 0}
    data = ImageFolderData(root=str(root), **values | arguments)
    data.trainer = trainer()
    data.setup(stage)
    return data


@pytest.fixture
def root(tmp_path):
    return write_images(tmp_path / "data")


@pytest.mark.parametrize("ranks", [1, 3])
def test_sampler_goes_on_where_the_run_stands(ranks):
    size, length, epochs = 20, 6, {}
    run = SimpleNamespace(position=(0, 0))
    for rank in range(ranks):
        sampler = ResumableSampler(range(size), lambda: run.position, length, 7, ranks, rank)
        for epoch in range(3):
            run.position = (epoch, 0)
            epochs[rank, epoch] = list(sampler)
            run.position = (epoch, 4)
            assert list(sampler) == epochs[rank, epoch][4:]
            assert len(sampler) == length == len(epochs[rank, epoch])
            assert {key[0] for key in epochs[rank, epoch]} == {epoch}
    for epoch in range(3):
        drawn = [index for rank in range(ranks) for _, index in epochs[rank, epoch]]
        assert len(set(drawn)) == len(drawn) == ranks * length
    assert epochs[0, 0] != [(0, index) for _, index in epochs[0, 1]]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_sees_every_sample_once(ranks):
    shares = [list(EvalSampler(range(10), ranks, rank)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    indices = [index for share in shares for _, index in share]
    assert sorted(index for index in indices if index >= 0) == list(range(10))


def test_position_follows_the_optimizer_step(root):
    data = loaded(root, batch_size=3)
    data.trainer = trainer(accumulate_grad_batches=2)
    assert (data.global_batch, data.batches_per_epoch, data.steps_per_epoch) == (6, 8, 4)
    sampler = data.train_dataloader().sampler
    whole = list(sampler)
    data.trainer.global_step = 4 + 3
    assert [epoch for epoch, _ in sampler] == [1] * 6
    data.trainer.global_step = 3
    assert list(sampler) == whole[18:]
    data.trainer = trainer(accumulate_grad_batches=2, limit_train_batches=3)
    assert (data.batches_per_epoch, data.steps_per_epoch) == (3, 2)
    data.trainer = trainer(limit_train_batches=0.5)
    assert data.batches_per_epoch == 4


def test_augmentation_depends_on_seed_epoch_and_index_alone(root):
    data = loaded(root)
    one, two = (SeededDataset(data.train_samples, seed, "skip", training=True) for seed in (0, 1))
    image, target = one[3, 5]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(one[3, 5][0], image)
    assert torch.equal(torch.get_rng_state(), state), "the global generator belongs to the model"
    assert target == data.train_samples.files[5][1]
    for other in (one[4, 5], one[3, 6], two[3, 5]):
        assert not torch.equal(other[0], image)


def test_evaluation_pipeline(root):
    data = loaded(root, mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0), size=8, resize=16)
    image, _ = data.val_samples[0]
    pixels = torch.from_numpy(np.asarray(Image.open(data.val_samples.files[0][0]))).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.5, 0.25, 0.0])[:, None, None], torch.tensor([0.5, 1.0, 2.0])[:, None, None]
    assert image.dtype == torch.uint8
    torch.testing.assert_close(data.prepare(image), (pixels[:, 4:12, 4:12] - mean) / std)


BROKEN = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "text": lambda content: b"not an image",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_image(root, kind):
    data = loaded(root)
    broken = data.train_samples.files[2][0]
    with open(broken, "rb") as file:
        content = BROKEN[kind](file.read())
    with open(broken, "wb") as file:
        file.write(content)
    data.val_samples.files[1] = (broken, 1)

    skipping = SeededDataset(data.train_samples, 0, "skip", training=True)
    with pytest.warns(UserWarning, match=f"skipped: cannot read image {broken}"):
        image, target = skipping[0, 2]
    assert target == data.train_samples.files[3][1]
    with pytest.warns(UserWarning, match=broken):
        assert torch.equal(skipping[0, 2][0], image)

    with pytest.warns(UserWarning, match=broken):
        assert SeededDataset(data.val_samples, 0, "skip", training=False)[0, 1][1] == -1, "must not count twice"
    with pytest.raises(UnreadableSample, match=broken):
        SeededDataset(data.train_samples, 0, "raise", training=True)[0, 2]


def test_nothing_readable(root):
    data = loaded(root)
    data.train_samples.files = [(str(root), 0)] * 2
    with (
        pytest.raises(RecipeError, match=f"none of the 2 samples .* cannot read image {root}"),
        pytest.warns(UserWarning, match="skipped"),
    ):
        SeededDataset(data.train_samples, 0, "skip", training=True)[0, 0]


def test_wrong_trees_and_values(root, tmp_path):
    with pytest.raises(RecipeError, match=r"no folder 'val'.*train/CLASS/IMAGE"):
        loaded(tmp_path)
    with pytest.raises(RecipeError, match="no image to predict"):
        loaded(root, "predict", predict_root=str(tmp_path / "none"))
    (root / "val" / "extra").mkdir()
    with pytest.raises(RecipeError, match=f"1 of 3 class folders in {root / 'val'} hold no image .*: extra$"):
        loaded(root)
    (root / "val" / "extra" / "image.png").write_bytes((root / "val" / "class0" / "000.png").read_bytes())
    with pytest.raises(RecipeError, match="train has 2 classes and val 3; only in train: none; only in val: extra"):
        loaded(root)
    with pytest.raises(RecipeError, match=r"data.train_transform: torchvision.transforms.v2 has no 'RandomCorp'"):
        ImageFolderData(train_transform=[{"RandomCorp": {"size": 32}}])
    with pytest.raises(RecipeError, match=r"data.val_transform: CenterCrop: .*sice"):
        ImageFolderData(val_transform=[{"CenterCrop": {"sice": 32}}])
    with pytest.raises(RecipeError, match=r"data.batch_size is 0, expected at least 1"):
        ImageFolderData(batch_size=0)
    small = ImageFolderData(root=str(root), batch_size=64)
    small.train_samples, small.trainer = range(24), trainer(world_size=2)
    with pytest.raises(RecipeError, match="24 training samples do not fill one step of 128"):
        small.train_dataloader()


HIDDEN = [".ipynb_checkpoints", "__MACOSX", "@eaDir"]


def test_hidden_folders_and_files_are_no_data(root):
    """Neither as classes nor within one; a name that only contains a dot is a class."""
    for split in ("train", "val"):
        (root / split / "class1").rename(root / split / "v1.0")
    before = loaded(root)
    image = (root / "train/class0/000.png").read_bytes()
    for split in ("train", "val"):
        for name in HIDDEN:
            for folder in (root / split / name, root / split / "class0" / name / "more"):
                folder.mkdir(parents=True)
                (folder / "0-checkpoint.png").write_bytes(image)
        (root / split / "class0" / "._000.png").write_bytes(image)
        (root / split / ".DS_Store").touch()
    after = loaded(root)
    assert after.classes == before.classes == ["class0", "v1.0"]
    for name in ("train_samples", "val_samples"):
        assert getattr(after, name).files == getattr(before, name).files
        assert {target for _, target in getattr(after, name).files} == {0, 1}


def test_folders_of_classes(root, tmp_path):
    """What is missing is told by split and class."""
    for path in (root / "train/class1").iterdir():
        path.rename(path.with_name(f".{path.name}"))
    with pytest.raises(RecipeError, match=r"data.root=.*: 1 of 2 class folders in .*/train hold no image .*: class1$"):
        loaded(root)
    (root / "val/class1").rename(root / "val/klass1")
    (root / "train/class1").rename(root / "train/.class1")
    with pytest.raises(RecipeError, match=r"only in train: none; only in val: klass1$"):
        loaded(root)
    (root / "val/class0").rename(root / "val/.class0")
    (root / "val/klass1").rename(root / "val/.klass1")
    with pytest.raises(RecipeError, match=r"data.root=.*: val: there is no class folder in .*/val"):
        loaded(root)


def test_images_of_16_bits(tmp_path):
    """The network sees the gray values, not white."""
    gray = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    for split in ("train", "val"):
        for name in ("class0", "class1"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(gray).save(tmp_path / split / name / "1.png")
    data = loaded(tmp_path, mean=(0, 0, 0), std=(1, 1, 1))
    expected = torch.from_numpy(gray.astype(np.float32) / 65535).expand(3, 16, 16)
    torch.testing.assert_close(data.prepare(data.val_samples[0][0]), expected, rtol=0, atol=0.5 / 255)


def test_digits(tmp_path):
    def digest():
        files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
        return {str(path.relative_to(tmp_path)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    assert write_digits(tmp_path) == (1437, 360)
    first = digest()
    assert len(first) == 1797
    assert len(set(map(str, (name.rsplit("/")[-1] for name in first)))) == 1797, "no digit in both splits"
    for digit in range(10):
        held_out = sum(name.startswith(f"val/{digit}/") for name in first)
        total = held_out + sum(name.startswith(f"train/{digit}/") for name in first)
        assert held_out / total == pytest.approx(0.2, abs=0.005)
    with Image.open(tmp_path / min(first)) as image:
        assert (image.size, image.mode) == ((32, 32), "L")

    changed, removed = (tmp_path / name for name in sorted(first)[:2])
    content = changed.read_bytes()
    changed.write_bytes(b"changed")
    removed.unlink()
    kept = (tmp_path / sorted(first)[2]).stat().st_mtime_ns
    with pytest.raises(
        RecipeError, match=f"{changed} is there with other content, expected a folder without other data"
    ):
        write_digits(tmp_path)
    assert not removed.exists(), "nothing is written before all is looked at"
    changed.write_bytes(content)
    write_digits(tmp_path)
    assert digest() == first
    assert (tmp_path / sorted(first)[2]).stat().st_mtime_ns == kept
    with Image.open(changed) as image:
        image.load()
    image.save(changed, compress_level=0)  # as another version of a library may write it
    assert changed.read_bytes() != content
    write_digits(tmp_path)
    Image.eval(image, lambda value: value ^ 1).save(changed)
    with pytest.raises(RecipeError, match=f"{changed} is there with other content"):
        write_digits(tmp_path)


def test_test_for_val(tmp_path):
    """Where there is no folder val, test is evaluated; else val."""
    root = write_images(tmp_path / "data", val=6)
    (root / "val").rename(root / "test")
    data = loaded(root)
    assert len(data.val_samples) == 6
    assert all(f"{root}/test/" in path for path, _ in data.val_samples.files)
    data = loaded(root, stage="predict")
    assert len(data.predict_samples) == 6
    write_images(root, train=1, val=4)
    assert len(loaded(root).val_samples) == 4


def test_held_out_images(root):
    """A share of every class's training images, the same for every seed, instead of val."""
    data, other = (loaded(root, held_out=0.25, seed=seed) for seed in (0, 1))
    held, kept = ({path for path, _ in samples.files} for samples in (data.val_samples, data.train_samples))
    assert held == {path for path, _ in other.val_samples.files}
    assert not held & kept
    everything = loaded(root)
    assert held | kept == {path for path, _ in everything.train_samples.files}
    assert [sum(target == index for _, target in data.val_samples.files) for index in range(2)] == [3, 3]
    assert torch.equal(data.val_samples[0][0], data.val_samples[0][0]), "they are not augmented"
    with pytest.raises(RecipeError, match=r"data.held_out is 1.0, expected a value in \[0, 1\)"):
        loaded(root, held_out=1.0)


@pytest.mark.parametrize("interpolation", ["bilinear", "lanczos"])
def test_resizing_of_pixels_is_pillows(root, interpolation):
    """Within a level, though the pixels are a tensor; Lanczos is Pillow's own."""
    data = loaded(root, interpolation=interpolation, size=11, resize=11)
    path = data.val_samples.files[3][0]
    image = Image.open(path).resize((11, 11), getattr(Image.Resampling, interpolation.upper()))
    difference = data.val_samples[3][0].permute(1, 2, 0).int() - torch.from_numpy(np.array(image)).int()
    assert difference.abs().max() <= (interpolation == "bilinear")


def test_images_become_floats_after_the_transfer(root):
    """In the type of the run's precision, images in lists too; what else is in a batch stays."""
    data = loaded(root, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0))
    for convert in (lambda tensor: tensor, lambda tensor: tensor.double()):
        data.trainer.precision_plugin = SimpleNamespace(convert_input=convert)
        pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
        expected = (pixels / 255 - 0.5) / torch.tensor([0.25, 0.5, 1.0])[:, None, None]
        images, targets = data.on_after_batch_transfer([pixels, "targets"], 0)
        assert targets == "targets"
        torch.testing.assert_close(images, convert(expected), rtol=1e-6, atol=1e-6)
        images, _ = data.on_after_batch_transfer([pixels / 255, "targets"], 0)
        torch.testing.assert_close(images, convert(expected), rtol=1e-6, atol=1e-6)
        images, _ = data.on_after_batch_transfer([[*pixels], "targets"], 0)
        torch.testing.assert_close(images, [*convert(expected)], rtol=1e-6, atol=1e-6)
    for batch in ({"x": pixels}, [], [torch.arange(3)], ["text", pixels]):
        assert data.on_after_batch_transfer(batch, 0) == batch, "of another form"
