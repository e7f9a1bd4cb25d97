"""Learning rate of a run as a function of the optimizer step."""

import math

from pyinvolution.recipes.errors import RecipeError

__all__ = ["scale_lr", "total_steps", "warmup_cosine"]


def scale_lr(lr: float, global_batch: int, reference_batch: int | None) -> float:
    """Linear scaling: ``lr`` holds for ``reference_batch`` images a step, over all devices and accumulated batches.

    ``reference_batch=None`` leaves ``lr`` as it is.
    """
    return lr if reference_batch is None else lr * global_batch / reference_batch


def warmup_cosine(step: int, total: int, warmup: int = 0, warmup_ratio: float = 0.25) -> float:
    """Factor of the learning rate at optimizer step ``step`` of ``total``.

    A half cosine from 1 to 0 over the whole run (paper, appendix A.1), times a line from ``warmup_ratio`` to 1 over the
    first ``warmup`` steps, as in the authors' code: the cosine does not wait for the warm-up.
    """
    cosine = 0.5 * (1 + math.cos(math.pi * min(step / total, 1)))
    if step >= warmup:
        return cosine
    return cosine * (1 - (1 - step / warmup) * (1 - warmup_ratio))


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
