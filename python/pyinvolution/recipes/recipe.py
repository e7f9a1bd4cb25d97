"""What every recipe's LightningModule shares: optimizer, schedule, memory format, compilation, averaged weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.optim import Lamb
from torch import Tensor, nn

from pyinvolution.models import create_model
from pyinvolution.models.checkpoint import check_fit
from pyinvolution.models.loading import load
from pyinvolution.modules import Involution2d
from pyinvolution.recipes.averaging import AveragedWeights
from pyinvolution.recipes.data import data_of
from pyinvolution.recipes.errors import RecipeError, naming, require
from pyinvolution.recipes.schedule import cosine, multistep, poly, scale_lr, total_steps, warmup

__all__ = ["Recipe", "build_net", "init_arguments"]


class Recipe(pl.LightningModule):
    """A network ``net`` with its optimizer, linear warm-up and a decay of the learning rate by the optimizer step.

    Of a checkpoint that training goes on from (``fit --ckpt_path``) come the weights, their average, the optimizer's
    moments and the position; everything else is as this run's configuration says, also where the checkpoint's was
    another: learning rate, weight decay, momentum, the run's length. One line of the log tells the differences.

    Args:
        net: the network.
        lr: learning rate at ``reference_batch`` images a step; it is scaled linearly to the actual global batch
            (devices x nodes x accumulated batches x batch size).
        reference_batch: images a step that ``lr`` is meant for; None switches the scaling off.
        optimizer: "sgd", "adamw", or "lamb" (You et al., ICLR 2020; timm's) for large batches.
        momentum: of SGD.
        nesterov: momentum as Nesterov's, of SGD.
        weight_decay: on all parameters that are trained, but for those of the next two.
        vector_decay: weight decay on vectors: biases, and the weights of norms; None for ``weight_decay``.
        generator_decay: weight decay on what makes the kernels of involutions, reduction and span, their vectors too;
            None for that of other parameters.
        decay: "cosine" (half a cosine over the run), "poly" ((1 - progress)^``power``) or "step" (times ``gamma`` at
            every one of ``milestones``).
        milestones: epochs after which "step" decays.
        gamma: of "step".
        power: of "poly".
        min_lr: what "cosine" and "poly" end at; scaled like ``lr``.
        warmup_steps: optimizer steps of the linear warm-up, whatever the batch; 0 for none. A run that is shorter never
            reaches the full rate, and is warned of.
        warmup_ratio: factor of the learning rate at the first step.
        init_from: file with weights to begin with: an official checkpoint, one of this library or a plain state dict.
        ema_decay: of an exponential moving average of the weights, with batch norm statistics of its own
            (`AveragedWeights`), which validation uses and checkpoints hold as their weights; 0 for none.
        channels_last: memory format of network and images.
        compile: run the network through torch.compile; the names in its state dict stay the same.
        compile_options: arguments of torch.compile, e.g. ``{"mode": "max-autotune"}``.
        matmul_precision: of float32 products on GPUs; "high" allows TF32.

    Raises:
        RecipeError: a value is out of its range, or ``init_from`` does not fit.
    """

    net: Any  # a module; each task knows more of it
    # What best.ckpt is chosen by and curves.png shows (beside its train/ namesake), a share of 1; the file of predict.
    monitor: ClassVar[str]
    monitor_title: ClassVar[str]
    output: ClassVar[str]

    def __init__(
        self,
        net: nn.Module,
        lr: float = 0.8,
        reference_batch: int | None = 2048,
        optimizer: Literal["sgd", "adamw", "lamb"] = "sgd",
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 1e-4,
        vector_decay: float | None = None,
        generator_decay: float | None = None,
        decay: Literal["cosine", "poly", "step"] = "cosine",
        milestones: Sequence[int] = (),
        gamma: float = 0.1,
        power: float = 0.9,
        min_lr: float = 0.0,
        warmup_steps: int = 3130,
        warmup_ratio: float = 0.25,
        init_from: str | None = None,
        ema_decay: float = 0.0,
        channels_last: bool = False,
        compile: bool = False,
        compile_options: dict[str, Any] | None = None,
        matmul_precision: Literal["highest", "high", "medium"] = "highest",
    ) -> None:
        super().__init__()
        for name, value, valid, expected in (
            ("lr", lr, lr > 0, "a positive number"),
            ("reference_batch", reference_batch, reference_batch is None or reference_batch > 0, "at least 1, or None"),
            ("momentum", momentum, 0 <= momentum < 1, "a value in [0, 1)"),
            ("nesterov", nesterov, momentum > 0 or not nesterov, f"False with momentum={momentum}"),
            ("optimizer", optimizer, optimizer in ("sgd", "adamw", "lamb"), "'sgd', 'adamw' or 'lamb'"),
            ("decay", decay, decay in ("cosine", "poly", "step"), "'cosine', 'poly' or 'step'"),
            ("milestones", milestones, all(milestone > 0 for milestone in milestones), "positive numbers of epochs"),
            ("gamma", gamma, 0 < gamma <= 1, "a value in (0, 1]"),
            ("power", power, power > 0, "a positive number"),
            ("min_lr", min_lr, 0 <= min_lr <= lr, f"a value from 0 to lr={lr}"),
            ("weight_decay", weight_decay, weight_decay >= 0, "at least 0"),
            ("vector_decay", vector_decay, (vector_decay or 0) >= 0, "at least 0, or None"),
            ("generator_decay", generator_decay, (generator_decay or 0) >= 0, "at least 0, or None"),
            ("warmup_steps", warmup_steps, warmup_steps >= 0, "at least 0"),
            ("warmup_ratio", warmup_ratio, 0 <= warmup_ratio <= 1, "a value in [0, 1]"),
            ("ema_decay", ema_decay, 0 <= ema_decay < 1, "a value in [0, 1)"),
        ):
            require(f"model.{name}", value, valid, expected)
        self.net = net
        self.lr, self.reference_batch = lr, reference_batch
        self.optimizer, self.weight_decay = optimizer, weight_decay
        self.vector_decay = weight_decay if vector_decay is None else vector_decay
        self.generator_decay = generator_decay
        self.sgd: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov}
        self.decay, self.milestones, self.gamma, self.power = decay, milestones, gamma, power
        self.min_ratio = min_lr / lr
        self.warmup_steps, self.warmup_ratio = warmup_steps, warmup_ratio
        self.ema_decay = ema_decay
        # Of this run, and the settings of the checkpoint with which it goes on.
        self._total_steps: int | None = None
        self._before: dict[str, Any] | None = None
        torch.set_float32_matmul_precision(matmul_precision)
        if init_from is not None:
            self.load_weights(init_from)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        if channels_last:
            self.net.to(memory_format=torch.channels_last)
        if compile:
            # In place: the state dict keeps its names, and the averaged copy is not compiled a second time.
            self.compiled_part.compile(**(compile_options or {}))

    @property
    def compiled_part(self) -> nn.Module:
        """What ``compile`` is for."""
        return self.net

    def load_weights(self, path: str) -> None:
        """Load ``net`` from a checkpoint of a recipe, of this library or of the authors' code.

        Raises:
            RecipeError: there is no such file, or it is of another model.
        """
        with naming("model.init_from"):
            load(self.net, path)

    def prediction_writer(self, output: Path) -> pl.Callback:
        """Callback that writes to ``output`` what `predict_step` returns."""
        raise NotImplementedError

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        needed: dict[str, type] = {"state_dict": Mapping}
        if self.trainer.state.fn == "fit":
            needed |= {
                "loops": Mapping,
                "optimizer_states": list,
                "lr_schedulers": list,
                "global_step": int,
                "epoch": int,
            }
        for key, kind in needed.items():
            if not isinstance(checkpoint.get(key), kind):
                raise RecipeError(f"--ckpt_path: the checkpoint has no {key} to go on with, or a damaged one")
        with naming("--ckpt_path"):
            check_fit(checkpoint["state_dict"], self, "the checkpoint")
        if self.trainer.state.fn == "fit":
            self._resume(checkpoint)

    def _resume(self, checkpoint: dict[str, Any]) -> None:
        try:
            groups = checkpoint["optimizer_states"][0]["param_groups"]
            kind, count = _kind(groups[0]), sum(len(group["params"]) for group in groups)
        except (IndexError, KeyError, TypeError) as error:
            raise RecipeError("--ckpt_path: the checkpoint's optimizer_states are damaged") from error
        if kind != self.optimizer:
            raise RecipeError(
                f"cannot resume: the checkpoint was made with model.optimizer={kind}, this run has {self.optimizer}"
            )
        if count != (ours := len(self._trained())):
            raise RecipeError(f"cannot resume: the checkpoint has {count} trained parameters, this run {ours}")
        theirs, mine = ([len(group["params"]) for group in found] for found in (groups, self._groups()))
        if theirs != mine:
            raise RecipeError(
                f"cannot resume: the checkpoint was made with groups of {theirs} parameters, this run has {mine}: give "
                "model.vector_decay and model.generator_decay as before"
            )
        if not self.ema_decay and "current_model_state" in checkpoint:
            check_fit(checkpoint["current_model_state"], self, "--ckpt_path")
            checkpoint["state_dict"] = checkpoint["current_model_state"]  # there, state_dict is the average
        self._before = _settings(checkpoint.get("hyper_parameters"), checkpoint.get("datamodule_hyper_parameters"))
        if "total_steps" in checkpoint:
            self._before["the run's length"] = checkpoint["total_steps"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["total_steps"] = self._total_steps

    def on_train_start(self) -> None:
        """Let the configuration hold in a resumed run: what it says of the optimizer replaces what Lightning has taken
        from the checkpoint."""
        if self._before is None:
            return
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        scheduler: Any = self.lr_schedulers()
        lr = optimizer.defaults["lr"]
        scheduler.base_lrs = [lr] * len(optimizer.param_groups)
        decays = [group["weight_decay"] for group in self._groups()]
        for group, factor, decay in zip(optimizer.param_groups, scheduler.lr_lambdas, decays, strict=True):
            rate = {"initial_lr": lr, "lr": lr * factor(scheduler.last_epoch)}
            settings = optimizer.defaults | rate | {"weight_decay": decay}
            # torch adds to the defaults of an optimizer when it loads one.
            group |= {name: value for name, value in settings.items() if name in group}
        now = _settings(self.hparams, data_of(self.trainer).hparams) | {"the run's length": self._total_steps}
        changed = [
            f"{name}={now[name]} (before: {value})"
            for name, value in self._before.items()
            if name in now and now[name] != value
        ]
        rank_zero_info(
            f"resumed at step {self.trainer.global_step}; the configuration of this run holds, which differs from the "
            f"checkpoint's in {', '.join(changed) or 'nothing'}"
        )

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters by their weight decay."""
        generators = {
            parameter
            for module in self.modules()
            if isinstance(module, Involution2d)
            for part in module.children()
            for parameter in part.parameters()
        }
        groups: dict[float, list[nn.Parameter]] = {}
        for parameter in self._trained():
            decay = self.vector_decay if parameter.ndim < 2 else self.weight_decay
            if self.generator_decay is not None and parameter in generators:
                decay = self.generator_decay
            groups.setdefault(decay, []).append(parameter)
        return [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]

    def images(self, batch: Tensor) -> Tensor:
        return batch.contiguous(memory_format=self.memory_format)

    def observe(self, images: Any) -> None:
        """Run the network on the images of a training batch, for nothing but what its batch norms see."""
        self.net(self.images(images))

    def configure_callbacks(self) -> list[pl.Callback]:
        # Outside training a checkpoint's weights are the averaged ones already.
        fitting = self.trainer.state.fn == "fit"
        return [AveragedWeights(self.ema_decay)] if self.ema_decay and fitting else []

    def configure_optimizers(self) -> OptimizerLRScheduler:
        data = data_of(self.trainer)
        lr = scale_lr(self.lr, data.global_batch, self.reference_batch)
        total = total_steps(data.steps_per_epoch, self.trainer.max_epochs, self.trainer.max_steps)
        self._total_steps = total
        if 0 < total <= self.warmup_steps:
            rank_zero_warn(
                f"model.warmup_steps={self.warmup_steps} is not shorter than the run of {total} steps: the learning "
                f"rate will not reach {lr:g}"
            )
        rank_zero_info(
            f"{total} steps of {data.global_batch} images, learning rate {lr:g}, warm-up {self.warmup_steps} steps"
        )
        parameters = self._groups()
        optimizer: torch.optim.Optimizer
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD(parameters, lr, weight_decay=self.weight_decay, **self.sgd)
        elif self.optimizer == "adamw":
            optimizer = torch.optim.AdamW(parameters, lr, weight_decay=self.weight_decay)
        else:
            optimizer = Lamb(parameters, lr, weight_decay=self.weight_decay)

        # A plain function: its values come from the configuration, so a resumed run may be given another length.
        def factor(step: int) -> float:
            rise = warmup(step, self.warmup_steps, self.warmup_ratio)
            if self.decay == "step":
                return rise * multistep(step / data.steps_per_epoch, self.milestones, self.gamma)
            fall = cosine(step / total) if self.decay == "cosine" else poly(step / total, self.power)
            return rise * (self.min_ratio + (1 - self.min_ratio) * fall)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}}


def _settings(model: Any, data: Any) -> dict[str, Any]:
    """Arguments of a model and of its data by their names on the command line, as plain values."""
    return {
        f"{section}.{name}": _plain(value)
        for section, values in (("model", model), ("data", data))
        if isinstance(values, Mapping)
        for name, value in values.items()
        if not name.startswith("_")
    }


def _kind(group: Mapping[str, Any]) -> str:
    """Which optimizer of `Recipe` a group of parameters in a checkpoint is of."""
    if "betas" not in group:
        return "sgd"
    return "lamb" if "trust_clip" in group else "adamw"


def _plain(value: Any) -> Any:
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def init_arguments(checkpoint: Mapping[str, Any], key: str = "hyper_parameters") -> dict[str, Any]:
    """The arguments that a checkpoint's model (or data, "datamodule_hyper_parameters") was made with, without those
    that only say where its first weights came from, which the checkpoint's own replace.

    Raises:
        ValueError: the entry is damaged.
    """
    given = checkpoint.get(key) or {}
    if not isinstance(given, dict):
        raise ValueError(f"{key} of the checkpoint is a {type(given).__name__}, expected a dict")
    first_weights = ("init_from", "backbone_weights")
    return {name: value for name, value in given.items() if not name.startswith("_") and name not in first_weights}


def build_net(name: str, num_classes: int, options: dict[str, Any] | None) -> Any:
    """The model ``name`` of `create_model`, or a RecipeError that says which argument is wrong."""
    with naming("model"):
        return create_model(name, num_classes=num_classes, **(options or {}))
