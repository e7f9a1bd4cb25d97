"""A run that was interrupted and resumed ends with the bits of one that was not."""

import signal
from functools import cache
from typing import NamedTuple

import pytest
import torch
from recipe_support import (
    assert_same_state,
    fit_arguments,
    interruption,
    one_thread,  # noqa: F401
    run_forked,
    training_state,
    write_images,
)

pytest.importorskip("lightning")
import lightning.pytorch as pl

from pyinvolution.recipes import RecipeError, plots
from pyinvolution.recipes import cli as recipe_cli
from pyinvolution.recipes.cli import RecipeCLI
from pyinvolution.recipes.schedule import cosine, warmup


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """State at the end of a run of 3 epochs of 6 batches, by the number of accumulated batches."""

    @cache
    def state(accumulate: int):
        run = tmp_path_factory.mktemp("uninterrupted")
        recipe_cli.run(fit_arguments(data, run, f"--trainer.accumulate_grad_batches={accumulate}"))
        return training_state(run / "last.ckpt")

    return state


class Case(NamedTuple):
    signum: int
    times: list[dict]
    """When the signal comes, in each of the runs that are interrupted."""
    saved_step: int
    """Of the checkpoint from which the last run goes on."""
    accumulate: int = 1
    more: tuple[str, ...] = ()
    validations: tuple[int, ...] = (5, 11, 17)

    def arguments(self, data, folder):
        return fit_arguments(data, folder, f"--trainer.accumulate_grad_batches={self.accumulate}", *self.more)


# Saved are steps 4, 8, ... and the ends of epochs: 6, 12, 18 (3, 6, 9 with two accumulated batches).
WORKERS = "--data.num_workers=2"
CASES = {
    "kill": Case(signal.SIGKILL, [{"step": 9}], 8),
    "kill twice, accumulating, 2 workers": Case(
        signal.SIGKILL,
        [{"step": 5, "batch_idx": 5}, {"step": 4, "batch_idx": 3}],
        saved_step=4,
        accumulate=2,
        more=(WORKERS,),
        validations=(2, 5, 8),
    ),
    "term, 2 workers": Case(signal.SIGTERM, [{"step": 9}], 10, more=(WORKERS,)),
    "term, accumulating": Case(signal.SIGTERM, [{"step": 4, "batch_idx": 2}], 5, accumulate=2, validations=(2, 5, 8)),
    "term before a validation": Case(signal.SIGTERM, [{"step": 11}], 12),
    "term in validation": Case(signal.SIGTERM, [{"step": 12, "batch_idx": 1, "validation": True}], 12),
    "term in validation inside an epoch": Case(
        signal.SIGTERM,
        [{"step": 9, "batch_idx": 1, "validation": True}],
        saved_step=9,
        more=("--trainer.val_check_interval=0.5",),
        validations=(2, 5, 8, 11, 14, 17),
    ),
}


@pytest.fixture(scope="module")
def interrupted(data, tmp_path_factory):
    """Folder of the runs, and exit status and stderr of the last one of each case."""
    folder = tmp_path_factory.mktemp("interrupted")
    names, runs = [], []
    for name, case in CASES.items():
        for when in case.times:
            resumed = ["--ckpt_path=last"] if name in names else []
            runs.append([*case.arguments(data, folder / name), *interruption(case.signum, **when), *resumed])
            names.append(name)
    return folder, dict(zip(names, run_forked(runs, folder), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_resumed_run_ends_with_the_same_bits(name, data, interrupted, uninterrupted):
    case = CASES[name]
    folder, results = interrupted
    status, stderr = results[name]
    last = folder / name / "last.ckpt"
    assert status == (143 if case.signum == signal.SIGTERM else -case.signum), stderr
    assert training_state(last)["['global_step']"] == case.saved_step
    if case.signum == signal.SIGTERM:
        assert str(last) in stderr

    recipe_cli.run([*case.arguments(data, folder / name), "--ckpt_path=last"])
    assert_same_state(training_state(last), uninterrupted(case.accumulate))
    steps, _ = plots.read_metrics(folder / name)["val/top1"]
    assert tuple(steps) == case.validations


def resumed(data, folder, caplog, *more):
    """The optimizer's group, the learning rates and the line of the log of a second epoch, after one of 6 steps."""
    recipe_cli.run(fit_arguments(data, folder, "--trainer.max_epochs=1"))
    with caplog.at_level("INFO"):
        cli = recipe_cli.run(fit_arguments(data, folder, "--trainer.max_epochs=2", "--ckpt_path=last", *more))
    (line,) = [line for line in caplog.messages if line.startswith("resumed at step")]
    ((_, rates),) = [plots.read_metrics(folder)["lr"]]
    return cli.trainer.optimizers[0].param_groups[0], rates, line


def test_configuration_of_a_resumed_run_holds(data, tmp_path, caplog):
    """Not that of the checkpoint, which Lightning loads into the optimizer; and the log says so."""
    more = ["--model.lr=0.2", "--model.weight_decay=0.3", "--model.momentum=0.5", "--model.nesterov=false"]
    group, rates, line = resumed(data, tmp_path, caplog, *more, "--data.hflip=0")
    assert (group["initial_lr"], group["weight_decay"], group["momentum"], group["nesterov"]) == (0.2, 0.3, 0.5, False)
    expected = [0.2 * warmup(step, 3, 0.25) * cosine(step / 12) for step in range(12)]
    assert rates[-6:] == pytest.approx(expected[6:], rel=1e-6), "from the first step on"
    assert line.startswith(
        "resumed at step 6; the configuration of this run holds, which differs from the checkpoint's"
    )
    for change in (
        "model.lr=0.2 (before: 0.05)",
        "model.weight_decay=0.3 (before: 0.0001)",
        "model.momentum=0.5 (before: 0.9)",
        "model.nesterov=False (before: True)",
        "data.hflip=0.0 (before: 0.5)",
        "the run's length=12 (before: 6)",
    ):
        assert change in line


def test_only_differences_are_told(data, tmp_path, caplog):
    group, _, line = resumed(data, tmp_path, caplog)
    assert line.endswith("which differs from the checkpoint's in the run's length=12 (before: 6)")
    assert (group["initial_lr"], group["weight_decay"], group["momentum"]) == (0.05, 1e-4, 0.9)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.optimizer=adamw"], "the checkpoint was made with model.optimizer=sgd, this run has adamw"),
        (["--data.seed=1"], "the checkpoint was made with seed=0, this run has 1"),
        (["--data.batch_size=3"], "the checkpoint was made with steps_per_epoch=6, this run has 8"),
    ],
)
def test_what_a_resumed_run_cannot_change(data, tmp_path, more, message):
    recipe_cli.run(fit_arguments(data, tmp_path, "--trainer.max_epochs=1"))
    with pytest.raises(RecipeError, match=f"cannot resume: {message}"):
        recipe_cli.run(fit_arguments(data, tmp_path, "--trainer.max_epochs=2", "--ckpt_path=last", *more))


def test_resumed_batch_of_the_same_number_of_steps(tmp_path):
    """11 images make one step of 8 as of 6, but not the same one."""
    data = write_images(tmp_path / "data", train=11, val=2)
    one, other = "--data.batch_size=8", "--data.batch_size=6"
    recipe_cli.run(fit_arguments(data, tmp_path, "--trainer.max_epochs=1", one))
    with pytest.raises(RecipeError, match="the checkpoint was made with global_batch=8, this run has 6"):
        recipe_cli.run(fit_arguments(data, tmp_path, "--trainer.max_epochs=2", "--ckpt_path=last", other))


def test_resumed_without_averages(data, tmp_path):
    """Training goes on with the weights that were trained, not with their average."""
    recipe_cli.run(fit_arguments(data, tmp_path, "--trainer.max_epochs=1"))
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    seen = {}

    class Look(pl.Callback):
        def on_train_start(self, trainer, module):
            seen.update({name: value.clone() for name, value in module.state_dict().items()})

    arguments = fit_arguments(data, tmp_path, "--trainer.max_epochs=2", "--ckpt_path=last", "--model.ema_decay=0")
    original = RecipeCLI._training_callbacks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecipeCLI, "_training_callbacks", lambda *given: [*original(*given), Look()])
        recipe_cli.run(arguments)
    trained, average = checkpoint["current_model_state"], checkpoint["state_dict"]
    assert all(torch.equal(value, trained[name]) for name, value in seen.items())
    assert any(not torch.equal(value, average[name]) for name, value in seen.items())


def test_resumed_run_mixes_and_augments_the_same(data, tmp_path):
    """With all that the modern recipe draws at random: MixUp or CutMix, TrivialAugment, random erasing; and LAMB."""
    transforms = "[{RandomHorizontalFlip: {}}, {TrivialAugmentWide: {}}, {RandomErasing: {p: 0.5}}]"
    more = ["--model.mixup=0.5", "--model.cutmix=1.0", "--model.optimizer=lamb", "--model.vector_decay=0"]
    more += [f"--data.train_transform={transforms}", "--trainer.max_epochs=2"]
    recipe_cli.run(fit_arguments(data, tmp_path / "whole", *more))
    with pytest.raises(SystemExit) as stopped:
        recipe_cli.run(fit_arguments(data, tmp_path / "half", *more, *interruption(signal.SIGTERM, 8)))
    assert stopped.value.code == 143
    assert torch.load(tmp_path / "half/last.ckpt", weights_only=True)["global_step"] == 9
    recipe_cli.run(fit_arguments(data, tmp_path / "half", *more, "--ckpt_path=last"))
    assert_same_state(training_state(tmp_path / "whole/last.ckpt"), training_state(tmp_path / "half/last.ckpt"))
