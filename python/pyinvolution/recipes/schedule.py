"""Learning rate of a run as a function of the optimizer step."""

import math
from collections.abc import Sequence

from pyinvolution.recipes.errors import RecipeError

__all__ = ["cosine", "multistep", "poly", "scale_lr", "total_steps", "warmup"]


def scale_lr(lr: float, global_batch: int, reference_batch: int | None) -> float:
    """Linear scaling: ``lr`` holds for ``reference_batch`` images a step, over all devices and accumulated batches.

    ``reference_batch=None`` leaves ``lr`` as it is.
    """
    return lr if reference_batch is None else lr * global_batch / reference_batch


def cosine(progress: float) -> float:
    """Factor of the learning rate when the share ``progress`` of the run is over: a half cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1)))


def poly(progress: float, power: float) -> float:
    """Factor of the learning rate when the share ``progress`` of the run is over: (1 - progress)^``power``."""
    return (1 - min(progress, 1)) ** power


def multistep(epoch: float, milestones: Sequence[int], gamma: float) -> float:
    """Factor of the learning rate ``epoch`` epochs after the start: ``gamma`` for every milestone that is reached."""
    return gamma ** sum(epoch >= milestone for milestone in milestones)


def warmup(step: int, steps: int, ratio: float) -> float:
    """Factor at optimizer step ``step``: a line from ``ratio`` to 1 over the first ``steps``.

    The decay is multiplied by it and does not wait for its end, as in the authors' code.
    """
    return 1.0 if step >= steps else 1 - (1 - step / steps) * (1 - ratio)


def total_steps(steps_per_epoch: int, max_epochs: int | None, max_steps: int = -1) -> int:
    """Optimizer steps of a run which ends after ``max_epochs`` or ``max_steps``, whichever comes first (-1: no limit).

    `Trainer.estimated_stepping_batches` would give the same, but it builds the training data loader before the position
    in the epoch is restored from a checkpoint.

    Raises:
        RecipeError: neither limit is set, so that a schedule has no end.
    """
    limits = []
    if max_epochs is not None and max_epochs >= 0:
        limits.append(steps_per_epoch * max_epochs)
    if max_steps >= 0:
        limits.append(max_steps)
    if not limits:
        raise RecipeError("the learning rate decays over the whole run: set trainer.max_epochs or trainer.max_steps")
    return max(min(limits), 1)
