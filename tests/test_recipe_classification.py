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
