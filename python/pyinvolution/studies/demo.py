"""A RedNet learns handwritten digits: the whole recipe at a size for two CPU cores."""

import shutil
import time
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from pyinvolution.recipes import cli, configs
from pyinvolution.recipes.classification.digits import write_digits
from pyinvolution.recipes.classification.imagefolder import ImageFolderData
from pyinvolution.recipes.classification.task import Classification
from pyinvolution.recipes.data import data_of
from pyinvolution.studies import compare_operator, plots
from pyinvolution.studies.learned_kernels import involution_kernels

__all__ = ["run"]

CONFIG = "digits/rednet.yaml"
SHOWN = 48


def run(output: str, target: float, max_epochs: int | None = None) -> int:
    """Make data, train, draw and compare; everything is written below ``output``.

    Args:
        output: folder for data, checkpoints and pictures; its subfolder ``run`` is begun anew.
        target: accuracy in percent that the held-out digits must reach.
        max_epochs: instead of those of the configuration.

    Returns:
        Exit status: 0, or 1 if the accuracy is below ``target``.
    """
    console = Console()
    folder, data = Path(output) / "run", Path(output) / "data"
    train, val = write_digits(data)
    console.rule(f"{train} handwritten digits to learn from, {val} held out")
    shutil.rmtree(folder, ignore_errors=True)
    trainer_options = {"default_root_dir": str(folder)} | ({} if max_epochs is None else {"max_epochs": max_epochs})
    arguments = ["fit", "--config", CONFIG, "--data.root", str(data)]
    arguments += [part for name, value in trainer_options.items() for part in (f"--trainer.{name}", str(value))]
    console.print("pyinvolution", *arguments, highlight=False)
    config = configs.merge(configs.load(CONFIG), {"data": {"root": str(data)}, "trainer": trainer_options})
    # The layers are small: a second thread gains little, and loses much on a machine that is busy with other things.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.perf_counter()
    with cli.other_processes(arguments):
        trainer = cli.fit(config)
    seconds = time.perf_counter() - start
    model, digits = trainer.lightning_module, data_of(trainer)
    assert isinstance(model, Classification)
    assert isinstance(digits, ImageFolderData)

    images, targets, probabilities = _predict(model, digits)
    confidences, predicted = probabilities.max(1)
    wrong = predicted != targets
    accuracy = 100 * (1 - wrong.float().mean().item())
    mistakes = int(wrong.sum())
    summary = f"{accuracy:.2f}% of {val} held-out digits right ({mistakes} mistake{'s' * (mistakes != 1)})"

    shown = _mistakes_and_others(wrong, SHOWN)
    grey = (images * 0.5 + 0.5)[:, 0].double().numpy()
    examples = [int((targets == digit).nonzero()[0]) for digit in (2, 3, 5, 8)]
    pictures = [
        folder / "curves.png",
        plots.predictions(
            grey[shown],
            targets[shown].tolist(),
            predicted[shown].tolist(),
            confidences[shown].tolist(),
            digits.classes,
            folder / "predictions.png",
            summary,
        ),
        plots.kernels(
            grey[examples],
            involution_kernels(model.net, images[examples]),
            [(0.3, 0.6), (0.55, 0.55), (0.85, 0.45)],
            folder / "kernels.png",
        ),
    ]
    torch.set_num_threads(threads)
    console.rule("the operator against unfold")
    console.print(compare_operator.table(compare_operator.measure()))
    console.rule("result")
    console.print(f"[bold]{summary}[/], after {seconds:.0f} s of training", highlight=False)
    for picture in pictures:
        console.print(f"  {picture}", highlight=False)
    if accuracy < target:
        console.print(f"[bold red]below the target of {target:g}%[/]", highlight=False)
        return 1
    return 0


@torch.no_grad()
def _predict(model: Classification, data: ImageFolderData) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, 3, H, W), targets (N,) and probabilities (N, classes) of the validation set."""
    model.eval()
    loaded = ((data.prepare(images), targets) for images, targets in data.val_dataloader())
    batches = [(images, targets, model(images).softmax(1)) for images, targets in loaded]
    images, targets, probabilities = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return images, targets, probabilities


def _mistakes_and_others(wrong: Tensor, count: int) -> list[int]:
    """Indices of the mistakes, filled up to ``count`` with others from all over the set, in order."""
    mistakes, others = wrong.nonzero()[:count, 0], (~wrong).nonzero()[:, 0]
    spread = torch.linspace(0, max(len(others) - 1, 0), count - len(mistakes)).long()
    return sorted(mistakes.tolist() + others[spread].tolist())
