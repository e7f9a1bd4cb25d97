"""Learning rate: the formula, its scaling, and what the optimizer really gets."""

import math

import pytest

pytest.importorskip("lightning")
import torch
from recipe_support import fit_arguments, one_thread, write_images  # noqa: F401

from pyinvolution.recipes import RecipeError, plots
from pyinvolution.recipes import cli as recipe_cli
from pyinvolution.recipes.schedule import cosine, multistep, poly, scale_lr, total_steps, warmup


def warmup_cosine(step, total=130 * 625, steps=3130, ratio=0.25):
    return warmup(step, steps, ratio) * cosine(step / total)


def test_paper_schedule():
    assert warmup_cosine(0) == 0.25
    assert warmup_cosine(3130) == pytest.approx(0.5 * (1 + math.cos(math.pi * 3130 / 81250)))
    # Halfway through the warm-up: 5/8 of the cosine, which goes on meanwhile.
    assert warmup_cosine(1565) == pytest.approx(0.625 * 0.5 * (1 + math.cos(math.pi * 1565 / 81250)))
    assert warmup_cosine(40625) == pytest.approx(0.5)
    assert warmup_cosine(81250) == pytest.approx(0, abs=1e-12)
    assert warmup_cosine(81249) > 0
    assert [cosine(step / 4) for step in range(5)] == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0])


def test_other_decays():
    assert [multistep(epoch, (8, 11), 0.1) for epoch in (0, 7.99, 8, 10.5, 11, 12)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )
    assert [poly(progress, 0.9) for progress in (0, 0.25, 1, 1.1)] == pytest.approx([1, 0.75**0.9, 0, 0])


def test_scaling():
    assert scale_lr(0.8, 2048, 2048) == 0.8
    assert scale_lr(0.8, 32, 2048) == pytest.approx(0.0125)
    assert scale_lr(0.1, 32, None) == 0.1


def test_total_steps():
    assert total_steps(10, max_epochs=3) == 30
    assert total_steps(10, max_epochs=3, max_steps=25) == 25
    assert total_steps(10, max_epochs=3, max_steps=35) == 30
    assert total_steps(10, max_epochs=-1, max_steps=35) == 35
    with pytest.raises(RecipeError, match=r"max_epochs or trainer\.max_steps"):
        total_steps(10, max_epochs=-1)


def test_optimizer_follows(tmp_path):
    """3 epochs of 24 // (2 * 3) = 4 steps: two accumulated batches of 3 make a global batch of 6."""
    cli = recipe_cli.run(
        fit_arguments(
            write_images(tmp_path / "data"),
            tmp_path,
            "--data.batch_size=3",
            "--trainer.accumulate_grad_batches=2",
            "--model.reference_batch=4",
            "--model.lr=0.2",
            "--model.weight_decay=0.01",
            "--model.nesterov=false",
        )
    )
    steps, rates = plots.read_metrics(tmp_path)["lr"]
    assert steps.tolist() == list(range(12))
    assert rates == pytest.approx([0.2 * 6 / 4 * warmup_cosine(step, 12, 3) for step in range(12)])
    (group,) = cli.trainer.optimizers[0].param_groups
    assert isinstance(cli.trainer.optimizers[0], torch.optim.SGD)
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, False, 0.01)
    assert len(group["params"]) == len(list(cli.model.net.parameters()))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--model.decay=poly", "--model.min_lr=0.02", "--model.lr=0.2", "--model.reference_batch=null"],
            [0.02 + 0.18 * (1 - step / 4) ** 0.9 for step in range(4)],
        ),
        (
            ["--model.decay=step", "--model.milestones=[1]", "--model.lr=0.2", "--model.reference_batch=null"],
            [0.2, 0.2, 0.02, 0.02],
        ),
    ],
)
def test_optimizer_follows_other_decays(tmp_path, options, expected):
    """2 epochs of 24 // 12 = 2 steps."""
    arguments = ["--model.optimizer=adamw", "--model.warmup_steps=0", "--data.batch_size=12", "--trainer.max_epochs=2"]
    cli = recipe_cli.run(fit_arguments(write_images(tmp_path / "data"), tmp_path, *arguments, *options))
    _, rates = plots.read_metrics(tmp_path)["lr"]
    assert rates == pytest.approx(expected)
    assert isinstance(cli.trainer.optimizers[0], torch.optim.AdamW)
