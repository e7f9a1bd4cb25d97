"""What the processes of a distributed run tell each other."""

from typing import Any

import lightning.pytorch as pl
import torch

__all__ = ["from_all_processes"]


def from_all_processes(trainer: pl.Trainer, items: list[Any]) -> list[Any]:
    """``items`` of every process, in the order of processes."""
    if trainer.world_size == 1:
        return items
    shares: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(shares, items)
    return [item for share in shares for item in share]
