"""The classification recipe in small runs: switches, weights to begin with, metrics, divergence."""

import pytest
import torch
from recipe_support import fit_arguments, one_thread, write_images  # noqa: F401
from torch.nn.functional import cross_entropy

pytest.importorskip("lightning")
import lightning.pytorch as pl

from pyinvolution.models import create_model, official_state_dict
from pyinvolution.recipes import Classification, RecipeError, TrainingDiverged
from pyinvolution.recipes import cli as recipe_cli

SMALL = {"layers": [1, 1], "stem": "small", "stem_channels": 32, "base_channels": 16, "kernel_size": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data"), train=24, val=10)


class Poison(pl.Callback):
    """Makes a weight NaN at the beginning or the end of a training batch."""

    def __init__(self, step: int, after: bool = False) -> None:
        self.step, self.after = step, after

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.step and not self.after:
            pl_module.net.head.bias.data[0] = torch.nan

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step and self.after:
            pl_module.net.head.bias.data[0] = torch.nan


@pytest.mark.parametrize(
    ("poison", "message", "saved_step"),
    [
        (["step=6"], "the loss is nan at step 6 (epoch 1, batch 0), learning rate 0.0375; ", 6),
        (["step=8", "after=true"], "the weights are not finite at step 8 (epoch 1, batch 1), learning rate 0.0", 6),
    ],
    ids=["loss", "weights"],
)
def test_divergence_names_step_rate_and_checkpoint(data, tmp_path, poison, message, saved_step):
    with pytest.raises(TrainingDiverged) as error:
        recipe_cli.run(
            fit_arguments(
                data,
                tmp_path,
                "--trainer.callbacks+=test_recipe_classification.Poison",
                *(f"--trainer.callbacks.init_args.{value}" for value in poison),
            )
        )
    path = tmp_path / "last.ckpt"
    assert message in str(error.value)
    assert f"last good checkpoint: {path}" in str(error.value)
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["global_step"] == saved_step
    assert all(value.isfinite().all() for value in checkpoint["current_model_state"].values())


def test_all_switches_together(data, tmp_path):
    """bf16, channels_last, torch.compile, clipping, EMA: it trains, and the names of the weights stay the same."""
    cli = recipe_cli.run(
        fit_arguments(
            data,
            tmp_path,
            "--trainer.max_epochs=1",
            "--trainer.precision=bf16-mixed",
            "--trainer.gradient_clip_val=1.0",
            "--model.channels_last=true",
            "--model.compile=true",
            "--model.compile_options={backend: aot_eager}",
        )
    )
    assert cli.model.net._compiled_call_impl is not None
    weight = cli.model.net.layer1[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert cli.model.images(torch.zeros(2, 3, 8, 8)).is_contiguous(memory_format=torch.channels_last)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert [*state] == [f"net.{name}" for name in create_model("rednet", num_classes=2, **SMALL).state_dict()]
    assert torch.isfinite(cli.trainer.callback_metrics["val/loss"])


def test_validation_metrics(data, tmp_path):
    """Top-1, top-5 and loss of all 10 images in batches of 4, against one forward pass in eval mode."""
    cli = recipe_cli.run(fit_arguments(data, tmp_path, "--trainer.max_epochs=1", "--model.ema_decay=0"))
    samples = cli.datamodule.val_samples
    images, targets = zip(*(samples[index] for index in range(10)), strict=True)
    targets = torch.tensor(targets)
    with torch.no_grad():
        logits = cli.model.eval()(cli.datamodule.prepare(torch.stack(images)))
    metrics = cli.trainer.callback_metrics
    assert metrics["val/top1"] == pytest.approx((logits.argmax(1) == targets).float().mean().item())
    assert metrics["val/top5"] == 1
    assert metrics["val/loss"] == pytest.approx(cross_entropy(logits, targets).item(), rel=1e-5)


def test_top5_is_not_top1():
    model = Classification("rednet", 10, SMALL)
    logits = torch.zeros(4, 10)
    logits[:, 3], logits[:, 4] = 2, 1
    model.val_accuracy.update(logits, torch.tensor([3, 3, 3, 3]))
    model.val_accuracy.update(logits, torch.tensor([4, 3, 9, -1]))
    assert {name: value.item() for name, value in model.val_accuracy.compute().items()} == pytest.approx(
        {"val/top1": 5 / 7, "val/top5": 6 / 7}
    )


@pytest.mark.parametrize("form", ["lightning", "plain", "official"])
def test_init_from(form, tmp_path):
    net = create_model("rednet26", num_classes=5)
    state = net.state_dict()
    content = {
        "lightning": {"state_dict": {f"net.{name}": value for name, value in state.items()}, "epoch": 1},
        "plain": state,
        "official": {"state_dict": official_state_dict(net), "meta": {}},
    }[form]
    torch.save(content, tmp_path / "weights.pth")
    model = Classification("rednet26", 5, init_from=str(tmp_path / "weights.pth"))
    torch.testing.assert_close(model.net.state_dict(), state, rtol=0, atol=0)
    with pytest.raises(RecipeError, match=r"weights\.pth"):
        Classification("rednet38", 5, init_from=str(tmp_path / "weights.pth"))


def test_init_from_nothing(tmp_path):
    with pytest.raises(RecipeError, match="there is no file"):
        Classification("rednet", 10, SMALL, init_from=str(tmp_path / "none.pth"))
    (tmp_path / "text.pth").write_text("text")
    with pytest.raises(RecipeError, match="not a checkpoint"):
        Classification("rednet", 10, SMALL, init_from=str(tmp_path / "text.pth"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0}, "model.lr"),
        ({"momentum": 1.0}, "model.momentum"),
        ({"warmup_steps": -1}, "model.warmup_steps"),
        ({"ema_decay": 1.0}, "model.ema_decay"),
        ({"label_smoothing": 1.0}, "model.label_smoothing"),
        ({"mixup": -1.0}, "model.mixup"),
        ({"cutmix": 0.5, "num_classes": 1}, "model.num_classes is 1, expected at least 2 with mixup"),
        ({"vector_decay": -1.0}, "model.vector_decay"),
        ({"generator_decay": -1.0}, "model.generator_decay"),
        ({"num_classes": 0}, "model.num_classes"),
        ({"name": "rednet51"}, "did you mean 'rednet50'"),
        ({"options": SMALL | {"kernel": 3}}, "kernel"),
    ],
)
def test_values_out_of_range(arguments, message):
    with pytest.raises(RecipeError, match=message):
        Classification(**{"name": "rednet", "num_classes": 10, "options": SMALL} | arguments)


def test_validation_loss_leaves_out_what_is_padding(monkeypatch):
    options = {"layers": [1], "stem": "small", "stem_channels": 32, "base_channels": 16}
    model = Classification("rednet", num_classes=4, options=options).eval()
    monkeypatch.setattr(model, "log", lambda *args, **kwargs: None)
    monkeypatch.setattr(model, "log_dict", lambda *args, **kwargs: None)
    images, targets = torch.randn(3, 3, 16, 16), torch.tensor([1, 2, -1])
    with torch.no_grad():
        model.validation_step((images, targets), 0)
        expected = cross_entropy(model(images)[:2], targets[:2])
    torch.testing.assert_close(model.val_loss.compute(), expected)


def test_mixing_is_of_images_and_targets_alike(monkeypatch):
    """CutMix of a black and a white image: the share of white is the target's; MixUp: each pixel is."""
    model = Classification("rednet", 4, SMALL, label_smoothing=0.0, mixup=1.0, cutmix=1.0)
    seen = []

    def forward(images):
        seen.append(images)
        return torch.zeros(len(images), 4, requires_grad=True)

    monkeypatch.setattr(model, "forward", forward)
    monkeypatch.setattr(model, "log", lambda *args, **kwargs: None)
    targets = []
    update = model.train_top1.update
    monkeypatch.setattr(
        model.train_top1, "update", lambda logits, found: (targets.append(found), update(logits, found))
    )
    images = torch.cat([torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)])
    shares, kinds = [], set()
    for seed in range(40):
        torch.manual_seed(seed)
        model.training_step((images, torch.tensor([0, 1])), 0)
        mixed = seen[-1]
        kinds.add("MixUp" if ((mixed > 0) & (mixed < 1)).any() else "CutMix")
        white = mixed.mean((1, 2, 3))
        shares.append(white[0].item())
        assert targets[-1].tolist() == [int(value > 0.5) for value in white.tolist()]
    assert kinds == {"MixUp", "CutMix"}
    assert 0.2 < sum(shares) / len(shares) < 0.8
    torch.manual_seed(3)
    model.training_step((images, torch.tensor([0, 1])), 0)
    again = seen[-1]
    torch.manual_seed(3)
    model.training_step((images, torch.tensor([0, 1])), 0)
    assert torch.equal(again, seen[-1]), "as the seed of the step says, so that a resumed run mixes the same"


def test_loss_of_a_mixed_batch(monkeypatch):
    """Cross entropy with each image's shares of the two classes."""
    model = Classification("rednet", 4, SMALL, label_smoothing=0.0, mixup=1.0)
    monkeypatch.setattr(model, "log", lambda *args, **kwargs: None)
    logits = torch.tensor([[1.0, -1, 0, 2], [0.5, 3, 1, 0]])
    monkeypatch.setattr(model, "forward", lambda images: logits + 0 * images.sum())
    images = torch.cat([torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)])
    torch.manual_seed(0)
    loss = model.training_step((images, torch.tensor([3, 1])), 0)
    torch.manual_seed(0)
    mixed, _ = model.mix(images, torch.tensor([3, 1]))
    white = mixed[:, 0, 0, 0]
    shares = torch.zeros(2, 4)
    shares[:, 1], shares[:, 3] = white, 1 - white
    torch.testing.assert_close(loss, -(shares * logits.log_softmax(1)).sum(1).mean())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lamb"])
def test_decay_of_vectors(data, tmp_path, optimizer):
    """Biases and the weights of norms have a decay of their own; a resumed run takes it from its configuration."""
    settings = [f"--model.optimizer={optimizer}", "--model.weight_decay=0.01", "--model.vector_decay=0.0"]
    run = recipe_cli.run(fit_arguments(data, tmp_path, *settings, "--trainer.max_epochs=1"))
    groups = run.trainer.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    assert all(parameter.ndim >= 2 for parameter in groups[0]["params"])
    assert {parameter.ndim for parameter in groups[1]["params"]} == {1}
    assert sum(len(group["params"]) for group in groups) == len([*run.model.parameters()])
    last = f"--ckpt_path={tmp_path / 'last.ckpt'}"
    settings[1:] = ["--model.weight_decay=0.02", "--model.vector_decay=0.005"]
    run = recipe_cli.run(fit_arguments(data, tmp_path, *settings, "--trainer.max_epochs=2", last))
    assert [group["weight_decay"] for group in run.trainer.optimizers[0].param_groups] == [0.02, 0.005]
    with pytest.raises(RecipeError, match=r"groups of \[\d+, \d+\] parameters, this run has \[\d+\]: give model"):
        recipe_cli.run(fit_arguments(data, tmp_path, settings[0], "--trainer.max_epochs=3", last))
    other = "adamw" if optimizer == "lamb" else "lamb"
    with pytest.raises(RecipeError, match=f"made with model.optimizer={optimizer}, this run has {other}"):
        recipe_cli.run(fit_arguments(data, tmp_path, f"--model.optimizer={other}", "--trainer.max_epochs=3", last))


def test_decay_of_generators(data, tmp_path):
    """The parts of an involution that make its kernels, vectors or not."""
    settings = ["--model.weight_decay=0.01", "--model.vector_decay=0.0", "--model.generator_decay=0.002"]
    run = recipe_cli.run(fit_arguments(data, tmp_path, *settings, "--trainer.max_epochs=1"))
    decays = {
        parameter: group["weight_decay"]
        for group in run.trainer.optimizers[0].param_groups
        for parameter in group["params"]
    }
    found = {decays[parameter]: set() for parameter in decays}
    for name, parameter in run.model.net.named_parameters():
        generates = ".reduce." in name or ".span." in name
        found[decays[parameter]].add((generates, parameter.ndim > 1))
    assert found == {0.01: {(False, True)}, 0.0: {(False, False)}, 0.002: {(True, True), (True, False)}}


def test_other_groups_are_not_resumed(data, tmp_path):
    """As many groups as in the checkpoint, of other parameters."""
    recipe_cli.run(fit_arguments(data, tmp_path, "--model.generator_decay=0.002", "--trainer.max_epochs=1"))
    last = f"--ckpt_path={tmp_path / 'last.ckpt'}"
    with pytest.raises(RecipeError, match=r"with groups of \[\d+, \d+\] parameters, this run has \[\d+, \d+\]"):
        recipe_cli.run(fit_arguments(data, tmp_path, "--model.vector_decay=0.002", "--trainer.max_epochs=2", last))


def test_the_modern_recipe(data, tmp_path):
    """All of its parts together, on images of 16 pixels."""
    arguments = [*fit_arguments(data, tmp_path, "--trainer.max_epochs=1", "--model.warmup_steps=0")]
    arguments.insert(1, "--config=imagenet/rednet50_modern.yaml")
    names = ("RandomResizedCrop: {size: 16}", "RandomHorizontalFlip: {}", "TrivialAugmentWide: {}", "RandomErasing: {}")
    transforms = ", ".join(f"{{{name}}}" for name in names)
    run = recipe_cli.run([*arguments, f"--data.train_transform=[{transforms}]"])
    assert type(run.trainer.optimizers[0]).__name__ == "Lamb"
    assert {type(part).__name__ for part in run.model.mix.transforms} == {"MixUp", "CutMix"}
    assert "current_model_state" in torch.load(tmp_path / "last.ckpt", weights_only=True), "averaged weights"
    assert torch.isfinite(run.trainer.callback_metrics["val/loss"])
    config = run.config["fit"]["model"]["init_args"]
    assert (config["weight_decay"], config["vector_decay"], config["cutmix"]) == (0.02, 0.0, 1.0)


def test_time_of_an_epoch(data, tmp_path):
    run = recipe_cli.run(fit_arguments(data, tmp_path, "--trainer.max_epochs=1"))
    metrics = run.trainer.callback_metrics
    assert metrics["train/epoch_cpu_s"] > 0
    assert 0 < metrics["train/epoch_s"] < 600
