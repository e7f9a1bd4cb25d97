"""Averaged weights of the recipes: their batch norms fit them, and training does not notice them."""

from itertools import pairwise

import pytest
import torch
from recipe_support import one_thread  # noqa: F401
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning")
import lightning.pytorch as pl

from pyinvolution.recipes.averaging import STATISTICS_EVERY, AveragedWeights

STEPS = STATISTICS_EVERY + 2
IMAGES = torch.randn(8 * STEPS, 3, 6, 6, generator=torch.Generator().manual_seed(0)) + 1


class Small(pl.LightningModule):
    """Two batch norms, of which the second is frozen, and dropout; with momentum 1, statistics are of one batch."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lr = lr
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=1.0), nn.Dropout(0.5),
            nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2, momentum=1.0), nn.Flatten(),
        )  # fmt: skip

    def observe(self, images):
        self.net(images)

    def on_train_batch_start(self, batch, batch_idx):
        self.net[4].eval()

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - 1).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


class Weights(pl.Callback):
    """Keeps the averaged weights after each step."""

    def __init__(self, average: AveragedWeights | None) -> None:
        self.average, self.seen = average, []

    def on_train_batch_end(self, trainer, pl_module, *_):
        if self.average is not None:
            model = self.average.model.module
            self.seen.append({name: value.clone() for name, value in model.state_dict().items()})
        self.trained = {name: value.clone() for name, value in pl_module.state_dict().items()}


def fit(folder, decay: float | None, lr: float = 0.5, **options):
    average = None if decay is None else AveragedWeights(decay)
    watch = Weights(average)
    callbacks = [watch] if average is None else [average, watch]
    module = Small(lr)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks, default_root_dir=folder, **options,
    )  # fmt: skip
    torch.manual_seed(1)
    trainer.fit(module, DataLoader(TensorDataset(IMAGES), batch_size=8))
    return module, watch


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_statistics_are_those_of_the_average(tmp_path, precision):
    module, watch = fit(tmp_path, 0.9, precision=precision)
    assert len(watch.seen) == STEPS
    tolerance = 1e-5 if precision == "32-true" else 2e-2
    for step, state in enumerate(watch.seen, start=1):
        last = step if step <= STATISTICS_EVERY else STATISTICS_EVERY
        weights = watch.seen[last - 1]
        images = IMAGES[8 * (last - 1) : 8 * last]
        outputs = nn.functional.conv2d(images, weights["net.0.weight"], weights["net.0.bias"])
        mean, variance = outputs.mean((0, 2, 3)), outputs.var((0, 2, 3))
        torch.testing.assert_close(state["net.1.running_mean"], mean, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(state["net.1.running_var"], variance, rtol=tolerance, atol=tolerance)
        assert torch.equal(state["net.4.running_mean"], torch.zeros(2)), "the second norm is frozen"
    assert not torch.allclose(watch.trained["net.1.running_mean"], module.net[1].running_mean, atol=0.05), "else any do"
    assert all(torch.equal(value, watch.seen[-1][name]) for name, value in module.state_dict().items())


def test_weights_are_averaged(tmp_path):
    _, watch = fit(tmp_path, 0.75)
    first, second = (state["net.0.weight"] for state in watch.seen[:2])
    _, one = fit(tmp_path, 0.75, limit_train_batches=1)
    _, two = fit(tmp_path, None, limit_train_batches=2)
    torch.testing.assert_close(first, one.trained["net.0.weight"])
    torch.testing.assert_close(second, 0.75 * first + 0.25 * two.trained["net.0.weight"])


def test_training_does_not_notice(tmp_path):
    """Neither weights nor statistics nor the random numbers of dropout."""
    _, with_average = fit(tmp_path, 0.9)
    _, without = fit(tmp_path, None)
    assert all(torch.equal(value, without.trained[name]) for name, value in with_average.trained.items())


def test_steps_of_several_batches(tmp_path):
    """The average follows the optimizer's steps, not the batches."""
    _, watch = fit(tmp_path, 0.9, accumulate_grad_batches=3)
    means = [state["net.1.running_mean"] for state in watch.seen]
    changed = [not torch.equal(one, other) for one, other in pairwise(means)]
    assert [index + 1 for index, change in enumerate(changed) if change] == [2, 5, 8, 11]
