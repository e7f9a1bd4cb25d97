"""A run that was interrupted and resumed ends with the bits of one that was not."""

import signal
from functools import cache

import pytest
import torch
from recipe_support import assert_same_state, fit_arguments, interruption, run_forked, training_state, write_images

pytest.importorskip("lightning")
from pyinvolution.recipes import command, plots


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """State at the end of a run of 3 epochs of 6 batches, by the number of accumulated batches."""

    @cache
    def state(accumulate: int):
        run = tmp_path_factory.mktemp("uninterrupted")
        command.run(fit_arguments(data, run, f"--trainer.accumulate_grad_batches={accumulate}"))
        return training_state(run / "last.ckpt")

    return state


# Signal, workers, accumulated batches, when (again in the resumed run), step of the checkpoint from which it goes on.
# Saved are steps 4, 8, ... and the ends of epochs: 6, 12, 18 (3, 6, 9 with two accumulated batches).
CASES = {
    "kill": (signal.SIGKILL, 0, 1, [{"step": 9}], 8),
    "kill twice, 2 workers, accumulating": (
        signal.SIGKILL,
        2,
        2,
        [{"step": 5, "batch_idx": 5}, {"step": 4, "batch_idx": 3}],
        4,
    ),
    "term, 2 workers": (signal.SIGTERM, 2, 1, [{"step": 9}], 10),
    "term, accumulating": (signal.SIGTERM, 0, 2, [{"step": 4, "batch_idx": 2}], 5),
    "term in validation": (signal.SIGTERM, 0, 1, [{"step": 12, "batch_idx": 1, "validation": True}], 12),
}


def arguments_of(case, data, folder):
    _, workers, accumulate, _, _ = CASES[case]
    return fit_arguments(
        data, folder / case, f"--trainer.accumulate_grad_batches={accumulate}", f"--data.num_workers={workers}"
    )


@pytest.fixture(scope="module")
def interrupted(data, tmp_path_factory):
    """Folder of the runs, and exit status and stderr of the last one of each case."""
    folder = tmp_path_factory.mktemp("interrupted")
    names, runs = [], []
    for name, (signum, _, _, times, _) in CASES.items():
        for when in times:
            resumed = ["--ckpt_path=last"] if name in names else []
            runs.append([*arguments_of(name, data, folder), *interruption(signum, **when), *resumed])
            names.append(name)
    return folder, dict(zip(names, run_forked(runs, folder), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_resumed_run_ends_with_the_same_bits(case, data, interrupted, uninterrupted):
    signum, _, accumulate, _, saved_step = CASES[case]
    folder, results = interrupted
    status, stderr = results[case]
    last = folder / case / "last.ckpt"
    assert status == (143 if signum == signal.SIGTERM else -signum), stderr
    assert training_state(last)["['global_step']"] == saved_step
    if signum == signal.SIGTERM:
        assert str(last) in stderr

    command.run([*arguments_of(case, data, folder), "--ckpt_path=last"])
    assert_same_state(training_state(last), uninterrupted(accumulate))
    steps, _ = plots.read_metrics(folder / case)["val/top1"]
    assert steps.tolist() == [5, 11, 17] if accumulate == 1 else [2, 5, 8]
