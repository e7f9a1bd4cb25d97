"""All that the recipes use of Lightning beyond its public interface.

Four promises need it. A checkpoint can be written at any optimizer step, also in the middle of an epoch and before a
validation, and a run resumed from it ends with the same bits: `ModelCheckpoint` only saves where it decides to, and a
run that is resumed in a validation would take the validation as done. A checkpoint never holds weights that are not
finite: `ModelCheckpoint` has no hook before it writes. Averaged weights have batch norm statistics of their own:
`WeightAveraging` does not show them. And on a cluster the processes stop between two steps, for which it must be known
which signal the cluster sends.

Private names may change with every minor version, so pyproject.toml limits Lightning to the versions that the tests
have run with. `missing` says what another version lacks; everything else that touches these names is in this file.
"""

import inspect
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.environments import ClusterEnvironment
from torch.optim.swa_utils import AveragedModel

__all__ = ["Average", "PlainCLI", "SaveLast", "cluster_environment", "missing", "validate_again", "validates_next"]

VALIDATION_PROGRESS = "epoch_loop.val_loop.batch_progress"
"""Where the counters of the validation are in ``checkpoint["loops"]["fit_loop"]``."""

# Class, name, and what its parameters are.
METHODS: tuple[tuple[type, str, tuple[str, ...]], ...] = (
    (ModelCheckpoint, "_save_last_checkpoint", ("self", "trainer", "monitor_candidates")),
    (ModelCheckpoint, "_monitor_candidates", ("self", "trainer")),
    (ModelCheckpoint, "_find_last_checkpoints", ("self", "trainer")),
    (ModelCheckpoint, "_save_checkpoint", ("self", "trainer", "filepath")),
    (_TrainingEpochLoop, "_should_check_val_fx", ("self", "data_fetcher")),
    (LightningCLI, "_parse_ckpt_path", ("self",)),
    (LightningCLI, "_get", ("self", "config", "key", "default")),
)

# Of an object of the class.
ATTRIBUTES: tuple[tuple[type, str], ...] = (
    (EMAWeightAveraging, "_average_model"),
    (EMAWeightAveraging, "_latest_update_step"),
)


class SaveLast(ModelCheckpoint):
    """`ModelCheckpoint` that also saves ``last.ckpt`` when it is told to."""

    def save_last_now(self, trainer: pl.Trainer) -> None:
        """Write ``last.ckpt``."""
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def last_checkpoints(self, trainer: pl.Trainer) -> set[str]:
        """Paths of ``last.ckpt`` and its versions that are in the folder."""
        return self._find_last_checkpoints(trainer)

    def before_save(self, trainer: pl.Trainer) -> None:
        """Called before every write; what it raises prevents the write."""

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        self.before_save(trainer)
        super()._save_checkpoint(trainer, filepath)


class Average(EMAWeightAveraging):
    """`EMAWeightAveraging` that shows its average."""

    @property
    def model(self) -> AveragedModel:
        """The average; its ``module`` is a copy of the trained one."""
        assert self._average_model is not None, "it is made when fit begins"
        return self._average_model

    def is_due(self, trainer: pl.Trainer) -> bool:
        """At the end of a batch: whether the optimizer made a step that the average does not know yet."""
        return trainer.global_step > self._latest_update_step


class PlainCLI(LightningCLI):
    """`LightningCLI` that leaves the configuration in a checkpoint to its caller."""

    def _parse_ckpt_path(self) -> None:
        pass

    def value(self, name: str, built: bool = True) -> Any:
        """The value of an argument of the subcommand; ``built`` with the objects that it describes."""
        return self._get(self.config_init if built else self.config, name)


def cluster_environment(trainer: pl.Trainer) -> ClusterEnvironment | None:
    """How the processes of a distributed run were started, e.g. by SLURM."""
    return trainer._accelerator_connector.cluster_environment


def validates_next(trainer: pl.Trainer) -> bool:
    """Whether a validation follows the training batch that ends."""
    # The fetcher matters only to a `training_step` that takes the loader's iterator.
    return trainer.fit_loop.epoch_loop._should_check_val_fx(None)  # type: ignore[arg-type]


def validate_again(checkpoint: dict[str, Any]) -> None:
    """Let a run that is resumed from ``checkpoint`` begin with a validation.

    The counters are what Lightning's own say in the middle of one.
    """
    progress = checkpoint["loops"]["fit_loop"][VALIDATION_PROGRESS]
    progress["total"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}


def missing() -> list[str]:
    """What the installed Lightning lacks of the private names that this file uses, one text for each."""
    found = [_difference(owner, name, parameters) for owner, name, parameters in METHODS]
    found += [f"{owner.__name__}.{name} is missing" for owner, name in ATTRIBUTES if not hasattr(owner(), name)]
    found.append(_of_a_trainer(_has_environment))
    found.append(_of_a_trainer(_has_progress))
    return [text for text in found if text]


def _difference(owner: type, name: str, parameters: tuple[str, ...]) -> str:
    method = getattr(owner, name, None)
    if method is None:
        return f"{owner.__name__}.{name} is missing"
    actual = tuple(inspect.signature(method).parameters)
    return "" if actual == parameters else f"{owner.__name__}.{name} takes {actual}, expected {parameters}"


def _of_a_trainer(check: Callable[[pl.Trainer], str]) -> str:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
    try:
        return check(trainer)
    except (AttributeError, KeyError) as error:
        return f"{check.__name__.removeprefix('_has_')} of a trainer: {type(error).__name__}: {error}"


def _has_environment(trainer: pl.Trainer) -> str:
    found = cluster_environment(trainer)
    expected = found is None or isinstance(found, ClusterEnvironment)
    return "" if expected else f"Trainer._accelerator_connector.cluster_environment is a {type(found).__name__}"


def _has_progress(trainer: pl.Trainer) -> str:
    state = trainer.fit_loop.state_dict()
    if VALIDATION_PROGRESS not in state:
        return f"the state of Trainer.fit_loop has no entry {VALIDATION_PROGRESS!r}"
    counters = set(state[VALIDATION_PROGRESS]["total"])
    expected = {"ready", "started", "processed", "completed"}
    return "" if counters == expected else f"{VALIDATION_PROGRESS} counts {counters}, expected {expected}"
