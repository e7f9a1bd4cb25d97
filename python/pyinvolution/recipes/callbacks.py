"""Callbacks of every recipe: exact interruption and resumption, a stop on NaN, throughput, pictures, predictions."""

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelSummary
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_summary import get_human_readable_count
from rich import get_console
from rich.table import Table
from torch import Tensor

from pyinvolution._files import replacing
from pyinvolution.models.checkpoint import read
from pyinvolution.recipes import plots
from pyinvolution.recipes._lightning import SaveLast, cluster_environment, validate_again, validates_next
from pyinvolution.recipes.data import data_of, seed_from
from pyinvolution.recipes.errors import RecipeError, TrainingDiverged, naming

__all__ = [
    "AtomicCheckpointIO",
    "Curves",
    "EpochTime",
    "ImagesPerSecond",
    "LastCheckpoint",
    "SeedEveryBatch",
    "StopOnDivergence",
    "StopOnSignal",
    "Summary",
]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final name and renames it, so that a kill, a full disk or Ctrl-C leaves the old
    one or the new one; reads tensors and plain data only.

    Lightning's own class writes to the system's folder for temporary files; moving a file from there to another file
    system copies it, which can be interrupted.

    Raises:
        RecipeError: a checkpoint cannot be written, e.g. because the disk is full, or is not one of a training run.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with replacing(path) as part, part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            # torch only says that it cannot complete the file; the cause is in the context.
            cause = error if isinstance(error, OSError) else error.__context__
            if isinstance(cause, KeyboardInterrupt):
                raise cause from None
            if not isinstance(cause, OSError):
                raise
            stays = "; the one before it stays as it is" if path.exists() else ""
            raise RecipeError(f"cannot write the checkpoint {path}: {cause.strerror or cause}{stays}") from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        if "://" in str(path):
            return super().load_checkpoint(path, weights_only=True)
        with naming("--ckpt_path"):
            checkpoint = read(path)
        if "pytorch-lightning_version" not in checkpoint:
            raise RecipeError(
                f"--ckpt_path: {path} is not a checkpoint of a run; to begin with its weights only, use model.init_from"
            )
        return checkpoint


class LastCheckpoint(SaveLast):
    """Writes ``last.ckpt`` to ``dirpath`` every ``every_n_train_steps`` optimizer steps, and before and after a
    validation.

    It is written only between optimizer steps, because gradients that are being accumulated are not saved. A run that
    is resumed from a checkpoint of before a validation begins with that validation.
    """

    def __init__(self, dirpath: str | Path, every_n_train_steps: int) -> None:
        super().__init__(dirpath, save_last=True, save_top_k=0, every_n_train_steps=every_n_train_steps)
        self._before_validation = False

    @property
    def state_key(self) -> str:
        return type(self).__name__  # not with the interval, which a resumed run may change

    def save(self, trainer: pl.Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by name
            self.save_last_now(trainer)

    def before_save(self, trainer: pl.Trainer) -> None:
        state = trainer.lightning_module.state_dict()
        if not all(value.isfinite().all() for value in state.values() if value.is_floating_point()):
            raise _diverged(trainer, "the weights are not finite")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not trainer.ckpt_path and (earlier := self.last_checkpoints(trainer)):
            rank_zero_warn(f"{max(earlier)} of an earlier run stays; to go on with it: --ckpt_path last")

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if between_steps(trainer):
            super().on_train_batch_end(trainer, *args, **kwargs)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and between_steps(trainer):
            self._before_validation = True
            self.save(trainer)
            self._before_validation = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pass

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pass  # the averaged weights are the model's by now

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._before_validation:
            validate_again(checkpoint)


def between_steps(trainer: pl.Trainer) -> bool:
    """Whether no gradients are waiting for further batches, at the end of a training batch."""
    return trainer.is_last_batch or (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0


class StopOnSignal(Checkpoint):
    """On SIGTERM in training: save after the optimizer step in progress, and exit with 143 (128 + 15).

    During a validation it exits after a batch, because `LastCheckpoint` has saved before it. It also waits for the
    validation that follows the step, if one does, so that a resumed run does not leave it out. The processes of a
    distributed run agree on the step. Under SLURM with requeueing, Lightning's response to the requeue signal (save,
    requeue) also waits for the end of the step.

    It is a `Checkpoint`, so that Lightning calls it after all other callbacks: the average of the weights must have
    been updated by the step.
    """

    EXIT_CODE = 128 + signal.SIGTERM

    def __init__(self) -> None:
        self._received: set[int] = set()
        self._original: dict[int, Any] = {}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._received.add(signum)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may handle signals
        signals = [signal.SIGTERM]
        environment = cluster_environment(trainer)
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            signals.append(environment.requeue_signal or signal.SIGUSR1)
        self._original = {signum: signal.signal(signum, self._note) for signum in signals}

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if not between_steps(trainer):
            return
        for signum, original in self._original.items():
            if not trainer.strategy.reduce_boolean_decision(signum in self._received, all=False):
                continue
            if signum == signal.SIGTERM and validates_next(trainer):
                self._received.add(signum)  # in every process
                continue
            self._received.discard(signum)
            if signum == signal.SIGTERM:
                for callback in trainer.checkpoint_callbacks:
                    if isinstance(callback, LastCheckpoint):
                        callback.save(trainer)
                self._exit(trainer)
            elif callable(original):
                original(signum, None)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if signal.SIGTERM in self._received:
            self._exit(trainer)

    def _exit(self, trainer: pl.Trainer) -> None:
        path = last_checkpoint(trainer)
        rank_zero_info(
            f"stopped by SIGTERM at step {trainer.global_step}, saved {path}; resume with --ckpt_path {path}"
        )
        raise SystemExit(self.EXIT_CODE)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for signum, original in self._original.items():
            # The trainer may already have restored the handlers of before the run.
            if signal.getsignal(signum) == self._note:
                signal.signal(signum, original)
        self._original = {}


class StopOnDivergence(Callback):
    """Raises `TrainingDiverged` before a loss that is NaN or infinite reaches the weights.

    `LastCheckpoint` checks the weights themselves, which a finite loss can also make infinite.
    """

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise _diverged(trainer, f"the loss is {loss.item()}")


def _diverged(trainer: pl.Trainer, what: str) -> TrainingDiverged:
    path = last_checkpoint(trainer)
    return TrainingDiverged(
        f"{what} at step {trainer.global_step} (epoch {trainer.current_epoch}, batch {trainer.fit_loop.batch_idx}), "
        f"learning rate {trainer.optimizers[0].param_groups[0]['lr']:g}; "
        + (f"last good checkpoint: {path}" if path else "there is no checkpoint yet")
    )


def last_checkpoint(trainer: pl.Trainer) -> str:
    """Path of the last checkpoint of this run, or an empty string."""
    paths = [
        callback.last_model_path for callback in trainer.checkpoint_callbacks if isinstance(callback, LastCheckpoint)
    ]
    return next((path for path in paths if path and Path(path).is_file()), "")


class SeedEveryBatch(Callback):
    """Seeds torch's generators by (seed, process, step, batch), so that dropout and the like go on exactly where an
    interrupted run stopped, without any generator's state in a checkpoint."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        torch.manual_seed(seed_from(data_of(trainer).seed, trainer.global_rank, trainer.global_step, batch_idx))


class ImagesPerSecond(Callback):
    """Logs ``train/images_per_s`` over all devices, without the time of validations.

    Lightning's ThroughputMonitor waits for the GPU after every batch; this callback reads the clock only when it logs.
    """

    def __init__(self) -> None:
        self._since = self._paused = 0.0
        self._batches = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since, self._batches = time.perf_counter(), 0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since += time.perf_counter() - self._paused

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches += 1
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by name
        if trainer.global_step % every == 0 and between_steps(trainer):
            now = time.perf_counter()
            images = self._batches * data_of(trainer).batch_size * trainer.world_size
            pl_module.log("train/images_per_s", images / (now - self._since), prog_bar=True)
            self._since, self._batches = now, 0


class EpochTime(Callback):
    """Logs ``train/epoch_s`` and ``train/epoch_cpu_s``: seconds of an epoch, and of the processor in this process, both
    without validations. An epoch that a resumed run has begun in its middle is left out."""

    def __init__(self) -> None:
        self._since = self._paused = (0.0, 0.0)
        self._whole = False

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self._since, self._whole = self._now(), True

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._paused = self._now()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        paused = (now - before for now, before in zip(self._now(), self._paused, strict=True))
        wall, processor = (since + gone for since, gone in zip(self._since, paused, strict=True))
        self._since = wall, processor

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._whole:
            wall, processor = (now - since for now, since in zip(self._now(), self._since, strict=True))
            pl_module.log_dict({"train/epoch_s": wall, "train/epoch_cpu_s": processor})
        self._whole = False


class Summary(ModelSummary):
    """Lightning's table of the model, without its counts of operations: they are 0 unless a model has an example of its
    input, and the size of images depends on the data."""

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        columns = [(name, values) for name, values in summary_data if name != "FLOPs"]
        table = Table()
        for name, _ in columns:
            table.add_column(name, justify="right" if name == "Params" else "left")
        for row in zip(*(values for _, values in columns), strict=True):
            table.add_row(*row)
        console = get_console()
        console.print(table)
        trained, total = (get_human_readable_count(n).strip() for n in (trainable_parameters, total_parameters))
        console.print(f"{trained} trained of {total} parameters, {model_size:.1f} MB")


class Curves(Callback):
    """Draws the logged curves to ``curves.png`` in the run's folder at the end of training."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by name
            return
        for logger in trainer.loggers:
            logger.save()
        metrics, recipe = plots.read_metrics(folder), cast(Any, pl_module)
        if metrics:
            rank_zero_info(
                f"curves: {plots.curves(metrics, folder / 'curves.png', recipe.monitor, recipe.monitor_title)}"
            )
