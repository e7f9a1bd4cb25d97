"""A run that was interrupted and resumed ends with the bits of one that was not."""

import signal
from functools import cache
from typing import NamedTuple

import pytest
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
from pyinvolution.recipes import cli as recipe_cli
from pyinvolution.recipes import plots


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
