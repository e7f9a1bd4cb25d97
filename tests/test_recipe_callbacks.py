"""Callbacks of the recipes, by themselves."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lightning")
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment

from pyinvolution.recipes.callbacks import AtomicCheckpointIO, StopOnSignal


def test_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "new" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    with pytest.raises(AttributeError, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"step": 2, "bad": lambda: None}, path)
    assert torch.load(path) == {"step": 1}
    AtomicCheckpointIO().save_checkpoint({"step": 3}, str(path))
    assert torch.load(path) == {"step": 3}
    assert list(path.parent.iterdir()) == [path]


def trainer(environment, batch_idx, validates=False):
    """A stand-in in the middle of an epoch, which accumulates two batches; a validation may follow."""
    return SimpleNamespace(
        _accelerator_connector=SimpleNamespace(cluster_environment=environment),
        accumulate_grad_batches=2,
        checkpoint_callbacks=[],
        fit_loop=SimpleNamespace(
            batch_idx=batch_idx, epoch_loop=SimpleNamespace(_should_check_val_fx=lambda fetcher: validates)
        ),
        global_step=7,
        is_last_batch=False,
        strategy=SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision),
    )


@pytest.fixture
def requeued():
    """Steps at which the requeue signal was answered; the answer is in place as Lightning's would be."""
    answers = []
    before = signal.signal(signal.SIGUSR1, lambda signum, frame: answers.append(signum))
    yield answers
    signal.signal(signal.SIGUSR1, before)


def test_slurm_requeues_between_steps(requeued):
    callback, environment = StopOnSignal(), SLURMEnvironment(auto_requeue=True)
    callback.on_train_start(trainer(environment, 0), None)
    os.kill(os.getpid(), signal.SIGUSR1)
    callback.on_train_batch_end(trainer(environment, 0))
    assert not requeued, "gradients are accumulating"
    callback.on_train_batch_end(trainer(environment, 1))
    callback.on_train_batch_end(trainer(environment, 3))
    assert requeued == [signal.SIGUSR1]
    callback.teardown(None, None, "fit")
    os.kill(os.getpid(), signal.SIGUSR1)
    assert len(requeued) == 2, "the handler is back in place"


def test_sigterm_exits_between_steps():
    before = signal.getsignal(signal.SIGTERM)
    callback = StopOnSignal()
    callback.on_train_start(trainer(LightningEnvironment(), 0), None)
    os.kill(os.getpid(), signal.SIGTERM)
    callback.on_train_batch_end(trainer(LightningEnvironment(), 2))
    callback.on_train_batch_end(trainer(LightningEnvironment(), 3, validates=True))
    with pytest.raises(SystemExit) as exit:
        callback.on_train_batch_end(trainer(LightningEnvironment(), 3))
    assert exit.value.code == 143
    callback.teardown(None, None, "fit")
    assert signal.getsignal(signal.SIGTERM) == before
