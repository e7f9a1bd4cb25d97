"""The training commands: LightningCLI with packaged configurations, fixed places for its files, and short errors."""

import atexit
import json
import logging
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch.distributed
import yaml
from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    Callback,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    ProgressBar,
    RichProgressBar,
)
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from pyinvolution.models.checkpoint import read
from pyinvolution.recipes import callbacks, configs
from pyinvolution.recipes._lightning import PlainCLI
from pyinvolution.recipes.data import RecipeData
from pyinvolution.recipes.errors import RecipeError, naming
from pyinvolution.recipes.recipe import Recipe, init_arguments

__all__ = ["RecipeCLI", "fit", "other_processes", "run"]


HELP = """--print_config shows every field with its value; --model.help CLASS and --data.help CLASS describe the fields
of a model or data class. pyinvolution configs lists the packaged configurations."""


class Parser(LightningArgumentParser):
    """Reports an error on one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise RecipeError(" ".join(message.split())) from ex


class RecipeCLI(PlainCLI):
    """LightningCLI whose runs keep everything in ``trainer.default_root_dir``: last.ckpt, best.ckpt, curves.png, and
    logs/version_N with metrics.csv, TensorBoard events and config.yaml."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        names = ("fit", "validate", "predict")
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name in names}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults(
            {
                "model": {"class_path": "pyinvolution.recipes.Classification"},
                "data": {"class_path": "pyinvolution.recipes.ImageFolderData"},
            }
        )
        parser.add_argument(
            "--checkpoint.every_n_train_steps",
            type=NonNegativeInt,
            default=1000,
            help="optimizer steps between two writes of last.ckpt, which is also written around every validation",
        )
        parser.add_argument(
            "--checkpoint.monitor",
            type=str | None,
            default=None,
            help="what best.ckpt is chosen by; None: the recipe's",
        )
        parser.add_argument("--checkpoint.mode", type=Literal["max", "min"], default="max", help="max or min")
        parser.add_argument(
            "--output",
            type=str | None,
            default=None,
            help="what predict writes; relative to trainer.default_root_dir; None: the recipe's",
        )

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (MisconfigurationException, ValueError, TypeError) as error:
            link: BaseException | None = error
            while link and not isinstance(link, RecipeError):  # jsonargparse wraps what a constructor raises
                link = link.__cause__ or link.__context__
            raise link or RecipeError(" ".join(str(error).split())) from error

    def before_instantiate_classes(self) -> None:
        if self.subcommand != "fit":
            self.save_config_callback = None
            model = self.value("model", built=False).init_args
            trained = self.value("ckpt_path", built=False) or model.get("init_from")
            if not trained and not (model.get("options") or {}).get("pretrained"):
                raise RecipeError(f"--ckpt_path is empty, expected the checkpoint that {self.subcommand} is to use")
            return
        trainer = self.value("trainer", built=False)
        if trainer.max_epochs is None and trainer.max_steps == -1 and not trainer.fast_dev_run:
            raise RecipeError(
                "fit needs a configuration, such as --config imagenet/rednet50.yaml (pyinvolution configs lists them), "
                "or at least the length of the run: --trainer.max_epochs"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.value("trainer")
        root = Path(config.default_root_dir or ".").absolute()
        given = config.callbacks or []
        added: list[Callback] = []

        def given_one(kind: type[Callback]) -> bool:
            return any(isinstance(callback, kind) for callback in given)

        if config.enable_progress_bar is not False and not given_one(ProgressBar):
            added.append(RichProgressBar())
        if config.enable_model_summary is not False and not any(
            isinstance(callback, ModelSummary) for callback in given
        ):
            added.append(callbacks.Summary())
            config.enable_model_summary = False  # Lightning's own
        if self.subcommand == "fit":
            added += self._training_callbacks(config, root)
        else:
            config.enable_checkpointing = False
        if self.subcommand == "predict":
            output = self.value("output") or self.model.output
            added.append(self.model.prediction_writer(root / output))
        if config.logger in (None, True):
            config.logger = self.subcommand == "fit" and _loggers(root)
        plugins = config.plugins if isinstance(config.plugins, list) else [config.plugins] * bool(config.plugins)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins = [*plugins, callbacks.AtomicCheckpointIO()]
        config.plugins = plugins
        config.callbacks = [*given, *added]
        return super().instantiate_trainer(default_root_dir=root, **kwargs)

    def _training_callbacks(self, config: Namespace, root: Path) -> list[Callback]:
        added: list[Callback] = [
            callbacks.SeedEveryBatch(),
            callbacks.StopOnDivergence(),
            callbacks.ImagesPerSecond(),
            callbacks.EpochTime(),
            callbacks.Curves(),
        ]
        if config.logger is not False:
            added.append(LearningRateMonitor("step"))
        if config.enable_checkpointing is not False:
            checkpoint = self.value("checkpoint")
            added += [
                ModelCheckpoint(root, "best", checkpoint.monitor or self.model.monitor, mode=checkpoint.mode),
                callbacks.LastCheckpoint(root, checkpoint.every_n_train_steps),
                callbacks.StopOnSignal(),
            ]
        return added


def _loggers(root: Path) -> list[Logger]:
    table = CSVLogger(root, "logs")
    return [table, TensorBoardLogger(root, "logs", table.version, default_hp_metric=False)]


def fit(config: Mapping[str, Any], ckpt_path: str | Path | None = None) -> Trainer:
    """Train by a configuration.

    A strategy that starts the other processes of a distributed run by itself does so with the command line of this
    program, which must come to the same call in each of them; or see `other_processes`.

    Args:
        config: what a file for ``pyinvolution fit --config`` holds, e.g. `configs.load("digits/rednet.yaml")`.
        ckpt_path: checkpoint of the run to resume, or "last"; None begins anew.

    Returns:
        The trainer at the end of training, with its ``lightning_module`` and ``datamodule``.

    Raises:
        RecipeError, TrainingDiverged, SystemExit: as `run`.
    """
    resume = [] if ckpt_path is None else ["--ckpt_path", str(ckpt_path)]
    return _cli(["fit", "--config", configs.dump(config), *resume]).trainer


def run(arguments: Sequence[str]) -> RecipeCLI:
    """Run a training command, e.g. ``["fit", "--config", "digits/rednet.yaml", "--data.root", "data"]``.

    Raises:
        RecipeError: a configuration, path, checkpoint or data set is wrong.
        TrainingDiverged: the loss became NaN or infinite.
        SystemExit: 0 after printing help or a configuration, 143 after SIGTERM.
    """
    with other_processes(arguments):
        return _cli(_insert_checkpoint_config(_resolve_configs(arguments)))


@contextmanager
def other_processes(arguments: Sequence[str]) -> Iterator[None]:
    """Within it, a strategy starts the other processes of a distributed run with these arguments of ``pyinvolution``,
    not with those of this process."""
    # Lightning takes them from here.
    before, sys.argv = sys.argv, [sys.argv[0], *arguments]
    try:
        yield
    finally:
        sys.argv = before


def _leave_process_group() -> None:
    """Lightning leaves gloo's group to the end of the process, where its threads can meet an interpreter that is gone
    and abort a run that is complete."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _cli(arguments: list[str]) -> RecipeCLI:
    atexit.register(_leave_process_group)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning against a newer torch
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty.")
    warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended to run from within Python.*")
    if arguments[0] != "fit":
        warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint need to be provided.*")
    try:
        return RecipeCLI(
            Recipe,
            RecipeData,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            parser_class=Parser,
            parser_kwargs={"prog": "pyinvolution"} | {name: {"description": HELP} for name in RecipeCLI.subcommands()},
            args=arguments,
        )
    except MisconfigurationException as error:
        raise RecipeError(str(error)) from error
    except SIGTERMException:
        sys.exit(callbacks.StopOnSignal.EXIT_CODE)  # Lightning's own would exit with 0


def _resolve_configs(arguments: Sequence[str]) -> list[str]:
    """``arguments`` with the contents of configurations, bases first, in place of their names."""
    resolved: list[str] = []
    before: Mapping[str, Any] = {}
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if option not in ("--config", "-c"):
            resolved.append(argument)
            continue
        name = value if equals else next(rest, None)
        if name is None:
            raise RecipeError(f"{option} is empty, expected a file or the name of a packaged configuration")
        for content in configs.chain(name, before=before):
            resolved += ["--config", configs.dump(content)]
            before = configs.merge(before, content)
    return resolved


def _insert_checkpoint_config(arguments: list[str]) -> list[str]:
    """Put the model and data that a checkpoint was made with before the other arguments, which can override them.

    fit does not do this: there only the command line says what happens, and the checkpoint must match it.
    """
    path = next(iter(_values(arguments, "--ckpt_path")), None)
    if path is None or path in ("best", "last", "hpc", "null") or "://" in path:
        return arguments
    if not Path(path).is_file():
        raise RecipeError(f"--ckpt_path: there is no file {path}")
    if not zipfile.is_zipfile(path):
        raise RecipeError(f"--ckpt_path: {path} is not a checkpoint, or not a complete one")
    if arguments[0] == "fit":
        return arguments
    inserted = []
    with naming(f"--ckpt_path {path}"):
        checkpoint = read(path, mmap=True)
        for option, key in (("--model", "hyper_parameters"), ("--data", "datamodule_hyper_parameters")):
            if checkpoint.get(key):
                config: dict[str, Any] = {"init_args": init_arguments(checkpoint, key)}
                _refuse_classes(config, key)
                kind = checkpoint[key].get("_class_path")
                if kind is not None:
                    if not str(kind).startswith("pyinvolution.") and not any(str(kind) in other for other in arguments):
                        raise ValueError(
                            f"it names the class {kind}, which is not imported because a file says so: name it too, "
                            f"{option} {kind}"
                        )
                    config["class_path"] = kind
                inserted += [option, json.dumps(config)]
    return [arguments[0], *inserted, *arguments[1:]]


def _refuse_classes(value: Any, where: str) -> None:
    """Raise a ValueError if the parser would make objects of a class out of ``value``: a checkpoint is only data."""
    if isinstance(value, str):
        # The parser reads a string as YAML where any value may be.
        with suppress(yaml.YAMLError):
            value = yaml.safe_load(value)
    if isinstance(value, Mapping):
        if "class_path" in value:
            raise ValueError(f"{where} names the class {value['class_path']}, expected plain values")
        for item in value.values():
            _refuse_classes(item, where)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _refuse_classes(item, where)


def _values(arguments: list[str], option: str) -> list[str]:
    values = [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{option}=")]
    return values + [value for argument, value in pairwise(arguments) if argument == option]
