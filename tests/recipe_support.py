"""Small data, a small network and interruptions for the tests of the recipes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("PIL")
import lightning.pytorch as pl
from PIL import Image

OPTIONS = "{layers: [1, 1], stem: small, stem_channels: 32, base_channels: 16, kernel_size: 3, drop_rate: 0.2}"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For modules that import it: the layers are small, and the machine may be busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_images(root: Path, train: int = 24, val: int = 10, classes: int = 2, size: int = 16) -> Path:
    """An ImageFolder tree of noise with `train` and `val` images, the classes in turn."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for index in range(count):
            path = root / split / f"class{index % classes}" / f"{index:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)
    return root


def fit_arguments(data: Path, run: Path, *more: str) -> list[str]:
    """`pyinvolution fit` of a small RedNet with everything on that has a state: dropout, augmentation, EMA."""
    return [
        "fit",
        f"--data.root={data}",
        f"--trainer.default_root_dir={run}",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=3",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--checkpoint.every_n_train_steps=4",
        "--model.name=rednet",
        f"--model.options={OPTIONS}",
        "--model.num_classes=2",
        "--model.reference_batch=4",
        "--model.lr=0.05",
        "--model.warmup_steps=3",
        "--model.ema_decay=0.9",
        "--data.batch_size=4",
        "--data.num_workers=0",
        "--data.size=16",
        "--data.resize=16",
        *more,
    ]


def environment() -> dict[str, str]:
    """For processes that train: one thread each, and this folder importable."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def run_forked(runs: list[list[str]], folder: Path) -> list[tuple[int, str]]:
    """Exit status and stderr of command lines, each in a process of its own; these are forks, to import only once."""
    subprocess.run([sys.executable, __file__, "fork", str(folder), json.dumps(runs)], env=environment(), timeout=300)
    return [(int((folder / f"{i}.status").read_text()), (folder / f"{i}.stderr").read_text()) for i in range(len(runs))]


def run_distributed(*runs: list[str]) -> tuple[int, str]:
    """Exit status and stderr of command lines, one after the other, in two processes under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    runs = [[*run, "--trainer.devices=2", "--trainer.strategy=ddp"] for run in runs]
    command = [sys.executable, *launcher, __file__, "here", "", json.dumps(runs)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=environment(), stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        try:
            _, stderr = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)  # torchrun ends its processes
            raise
    return process.returncode, stderr


def main(mode: str, folder: str, runs: str) -> None:
    from pyinvolution.recipes import cli

    for index, arguments in enumerate(json.loads(runs)):
        if mode == "here":
            cli.run(arguments)
        elif process := os.fork():
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            Path(folder, f"{index}.status").write_text(str(status))
        else:
            os.dup2(os.open(Path(folder, f"{index}.stderr"), os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
            cli.run(arguments)
            sys.exit()


class Interrupt(pl.Callback):
    """Sends the process of a rank a signal before a batch of training, or of validation."""

    def __init__(
        self, signum: int, step: int, batch_idx: int | None = None, validation: bool = False, rank: int = 0
    ) -> None:
        self.signum, self.step, self.batch_idx, self.validation, self.rank = signum, step, batch_idx, validation, rank

    def send(self, trainer: pl.Trainer, batch_idx: int) -> None:
        here = trainer.global_rank == self.rank and trainer.global_step == self.step
        if here and self.batch_idx in (None, batch_idx):
            os.kill(os.getpid(), signal.Signals(self.signum))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if not self.validation:
            self.send(trainer, batch_idx)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        if self.validation and not trainer.sanity_checking:
            self.send(trainer, batch_idx)


class KeepGradients(pl.Callback):
    """Writes the gradients of the first optimizer step to a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.is_global_zero and trainer.global_step == 0:
            torch.save({name: parameter.grad for name, parameter in pl_module.named_parameters()}, self.path)


def interruption(signum: int, step: int, **more: object) -> list[str]:
    """Arguments that add an `Interrupt`."""
    values = {"signum": int(signum), "step": step, **more}
    init = [f"--trainer.callbacks.init_args.{name}={str(value).lower()}" for name, value in values.items()]
    return ["--trainer.callbacks+=recipe_support.Interrupt", *init]


def training_state(path: Path) -> dict[str, object]:
    """Everything in a checkpoint that training depends on, flat."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    names = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers", "global_step")
    leaves, _ = torch.utils._pytree.tree_flatten_with_path({name: checkpoint[name] for name in names})
    return {torch.utils._pytree.keystr(key): value for key, value in leaves}


def assert_same_state(one: dict[str, object], other: dict[str, object]) -> None:
    """Bitwise."""
    assert one.keys() == other.keys()
    different = [
        name
        for name, value in one.items()
        if not (torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name])
    ]
    assert not different, f"{len(different)} of {len(one)} differ: {different[:5]}"


if __name__ == "__main__":
    main(*sys.argv[1:])
