"""Data loading for runs that may be interrupted.

What a sample looks like depends only on (seed, epoch, index), and which samples come next depends only on the optimizer
step. So a checkpoint need not hold anything about either, and the processes that load data have no state.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data.distributed import DistributedSampler
from torchvision.transforms.v2.functional import normalize, to_dtype

from pyinvolution.recipes.errors import RecipeError, require

__all__ = ["EvalSampler", "RecipeData", "ResumableSampler", "SeededDataset", "UnreadableSample", "data_of", "seed_from"]

Key = tuple[int, int]
"""(epoch, index), as the samplers here yield it and `SeededDataset` takes it."""


def seed_from(*parts: int) -> int:
    """A seed of 32 bits, made from non-negative integers such that similar ones give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class UnreadableSample(RecipeError):
    """A sample cannot be decoded; the message names its path."""


class Samples(Protocol):
    """What `SeededDataset` wraps."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """The sample, augmented with torch's global generator; `UnreadableSample` if it cannot be decoded."""

    def ignored(self, sample: Any) -> Any:
        """The same sample, marked so that loss and metrics leave it out."""


class SeededDataset(Dataset):
    """A view of ``samples`` by (epoch, index), with augmentation seeded by (seed, epoch, index).

    Args:
        samples: the data.
        seed: of the run.
        unreadable: "skip" warns with the path and takes the next readable sample instead, "raise" stops.
        training: a replaced sample is used as it is in training, and marked as ignored in evaluation.
    """

    def __init__(self, samples: Samples, seed: int, unreadable: Literal["skip", "raise"], training: bool) -> None:
        self.samples, self.seed, self.unreadable, self.training = samples, seed, unreadable, training

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key) -> Any:
        """The sample; index -1 stands for padding and gives some sample marked as ignored."""
        epoch, index = key
        with torch.random.fork_rng(devices=()):
            # Not torch.manual_seed: that would seed the GPUs too, which belong to the model.
            torch.default_generator.manual_seed(seed_from(self.seed, epoch, max(index, 0)))
            found, sample = self._read(max(index, 0))
        return sample if found == index or self.training else self.samples.ignored(sample)

    def _read(self, wanted: int) -> tuple[int, Any]:
        first = None
        for offset in range(len(self)):
            index = (wanted + offset) % len(self)
            try:
                return index, self.samples[index]
            except UnreadableSample as error:
                if self.unreadable == "raise":
                    raise
                warnings.warn(f"skipped: {error}", stacklevel=2)
                first = first or error
        raise RecipeError(f"none of the {len(self)} samples can be read; the first: {first}")


class ResumableSampler(DistributedSampler):
    """Shuffled keys of this process, beginning where the run stands.

    The position is asked for whenever an iterator is made and not set from outside, because Lightning makes the first
    iterator of a resumed run before it tells samplers their epoch.

    Args:
        dataset: what to draw from.
        position: returns (epoch, samples of this process that are done in it).
        epoch_length: keys of a full epoch in this process; the rest of the permutation is left out.
        seed: of the permutations.
        num_replicas, rank: of this process.
    """

    def __init__(
        self,
        dataset: Dataset,
        position: Callable[[], tuple[int, int]],
        epoch_length: int,
        seed: int,
        num_replicas: int,
        rank: int,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=True, seed=seed, drop_last=True)
        self.position, self.epoch_length = position, epoch_length

    def __iter__(self) -> Iterator[Key]:
        epoch, done = self.position()
        self.set_epoch(epoch)
        indices = list(super().__iter__())[done : self.epoch_length]
        return iter([(epoch, index) for index in indices])

    def __len__(self) -> int:
        """Length of a full epoch, even if the iterator begins in its middle: Lightning counts the batches before it."""
        return self.epoch_length


class EvalSampler(DistributedSampler):
    """Every sample once, in order; index -1 pads the shares of the processes to the same length."""

    def __init__(self, dataset: Dataset, num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=False)

    def __iter__(self) -> Iterator[Key]:
        size = len(self.dataset)  # type: ignore[arg-type]  # a Dataset need not have a length, ours do
        return iter([(0, i if i < size else -1) for i in range(self.rank, self.total_size, self.num_replicas)])


class RecipeData(pl.LightningDataModule):
    """Loaders of a recipe. A subclass sets ``train_samples``, ``val_samples`` or ``predict_samples`` in ``setup``.

    Training drops the samples that do not fill an optimizer step (another selection every epoch). Images are the first
    entry of a sample, (3, H, W), as uint8, which become floats on the device (`prepare`), or as floats.

    Args:
        batch_size: samples a device and forward pass in training.
        val_batch_size: samples a device in evaluation; None for ``batch_size``.
        num_workers: processes that load data, for each device; 0 loads in the training process. The result does not
            depend on it.
        unreadable: what to do with a sample that cannot be decoded: "skip" names it in a warning, "raise" stops.
        seed: of shuffling and augmentation; None for that of `lightning.seed_everything`, else 0.
    """

    train_samples: Samples
    val_samples: Samples
    predict_samples: Samples
    classes: list[str]
    """Names of the classes, as far as they are known."""
    normalization: tuple[Sequence[float], Sequence[float]] | None = None
    """Mean and deviation of the RGB channels in [0, 1]; None for images in [0, 1]."""
    # Lightning sets it before it asks for anything.
    trainer: pl.Trainer  # type: ignore[assignment]

    @staticmethod
    def collate(batch: list[Any]) -> Any:
        """A batch of a list of samples; here their tensors are stacked.

        Raises:
            RecipeError: images differ in size.
        """
        sizes = sorted({tuple(image.shape[-2:]) for image, *_ in batch})
        if len(sizes) > 1:
            raise RecipeError(
                f"images of {sizes[0]} and {sizes[1]} pixels (height, width) are in one batch, expected one size: "
                "resize them in data.val_transform, or set data.val_batch_size=1"
            )
        return default_collate(batch)

    def __init__(
        self,
        batch_size: int = 32,
        val_batch_size: int | None = None,
        num_workers: int = 4,
        unreadable: Literal["skip", "raise"] = "skip",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("val_batch_size", val_batch_size or batch_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
        ):
            require(f"data.{name}", value, value >= least, f"at least {least}")
        self.batch_size, self.val_batch_size = batch_size, val_batch_size or batch_size
        self.num_workers, self.unreadable, self.seed = num_workers, unreadable, seed
        # The loaders here can be resumed, though not in the way that Lightning looks for.
        warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")

    @property
    def global_batch(self) -> int:
        """Samples an optimizer step: over all devices, nodes and accumulated batches."""
        return self.batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches

    @property
    def batches_per_epoch(self) -> int:
        """Batches of this device, a multiple of the accumulated ones unless the trainer limits them."""
        limit = self.trainer.limit_train_batches
        full = self._full_batches
        return min(limit, full) if isinstance(limit, int) else int(limit * full)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps; Lightning takes one at the end of the epoch also when fewer batches have accumulated."""
        return math.ceil(self.batches_per_epoch / self.trainer.accumulate_grad_batches)

    @property
    def _full_batches(self) -> int:
        steps = len(self.train_samples) // self.global_batch
        if not steps:
            raise RecipeError(
                f"{len(self.train_samples)} training samples do not fill one step of {self.global_batch} "
                f"(data.batch_size={self.batch_size} x {self.trainer.world_size} devices x "
                f"trainer.accumulate_grad_batches={self.trainer.accumulate_grad_batches})"
            )
        return steps * self.trainer.accumulate_grad_batches

    def _position(self) -> tuple[int, int]:
        epoch, steps = divmod(self.trainer.global_step, self.steps_per_epoch)
        return epoch, steps * self.trainer.accumulate_grad_batches * self.batch_size

    def train_dataloader(self) -> DataLoader:
        dataset = SeededDataset(self.train_samples, self.seed, self.unreadable, training=True)
        sampler = ResumableSampler(
            dataset,
            self._position,
            self._full_batches * self.batch_size,
            self.seed,
            self.trainer.world_size,
            self.trainer.global_rank,
        )
        return self._loader(dataset, sampler, self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return self._eval_loader(self.val_samples)

    def predict_dataloader(self) -> DataLoader:
        return self._eval_loader(self.predict_samples)

    def _eval_loader(self, samples: Samples) -> DataLoader:
        dataset = SeededDataset(samples, self.seed, self.unreadable, training=False)
        sampler = EvalSampler(dataset, self.trainer.world_size, self.trainer.global_rank)
        return self._loader(dataset, sampler, self.val_batch_size)

    def _loader(self, dataset: Dataset, sampler: DistributedSampler, batch_size: int) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=batch_size,  # by name: for predict, Lightning makes the loader a second time
            sampler=sampler,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def prepare(self, images: Tensor) -> Tensor:
        """What a network sees (..., 3, H, W), float32, of images as samples hold them, uint8: values in [0, 1],
        normalised by `normalization`."""
        images = to_dtype(images, torch.float32, scale=True)
        return images if self.normalization is None else normalize(images, *map(list, self.normalization))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """`prepare` the images, a tensor or a list of them, on the device, to which a quarter of the bytes are sent.

        They are the first entry of a batch; a batch of another form stays as it is.
        """

        def ready(images: Any) -> Any:
            if not isinstance(images, Tensor) or not (images.dtype == torch.uint8 or images.is_floating_point()):
                return images
            return self.trainer.precision_plugin.convert_input(self.prepare(images))

        if not isinstance(batch, (list, tuple)) or not batch:
            return batch
        images, *rest = batch
        return [[*map(ready, images)] if isinstance(images, (list, tuple)) else ready(images), *rest]

    def state_dict(self) -> dict[str, Any]:
        return {"steps_per_epoch": self.steps_per_epoch, "seed": self.seed, "global_batch": self.global_batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.trainer.state.fn != "fit":
            return
        for name in ("steps_per_epoch", "seed", "global_batch"):
            missing = None if name != "global_batch" else self.global_batch  # earlier checkpoints do not know it
            if state.get(name, missing) != getattr(self, name):
                raise RecipeError(
                    f"cannot resume: the checkpoint was made with {name}={state.get(name)}, this run has "
                    f"{getattr(self, name)}; keep data, seed and global batch, or begin anew from its weights with "
                    "model.init_from"
                )


def data_of(trainer: pl.Trainer) -> RecipeData:
    """The data of a trainer that a recipe runs."""
    return trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it by name
