"""A comparison from data to table."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from math import isnan
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.markdown import Markdown

from pyinvolution.recipes.errors import RecipeError
from pyinvolution.studies.comparison import published, report
from pyinvolution.studies.comparison.definition import Definition, Training
from pyinvolution.studies.comparison.runner import Runner, metric_of
from pyinvolution.studies.files import write_json

__all__ = ["run"]


def run(
    definition: Definition,
    name: str,
    output: str | Path,
    only: Sequence[str] = (),
    jobs: int = 1,
    minutes: float | None = None,
    train: bool = True,
    results: str | Path | None = None,
    changes: Sequence[str] = (),
    known: str | Path | None = None,
) -> dict[str, Any]:
    """Tune and train, and write ``report.json`` and ``report.md`` to ``output``.

    What is in the folder already is not done again, and trainings that were stopped go on.

    Args:
        definition: of the comparison.
        name: of it.
        output: folder.
        only: names of the runs to train; empty for all.
        jobs: trainings at the same time.
        minutes: after which trainings save themselves and stop; None for no limit.
        train: whether to train at all; else what is there is reported.
        results: folder that also gets the report and the logs, if all trainings have come to their end.
        changes: options of the command line that make it another comparison than the one of that name.
        known: report of the same comparison, whose trainings are not done again; their checkpoints are not there.

    Returns:
        The content of ``report.json``.

    Raises:
        RecipeError: a name in ``only`` is unknown, a recipe cannot be built, a training failed, the folder holds
            another comparison, another command trains in it, or ``known`` or ``results`` has another comparison.
    """
    unknown = [run for run in only if run not in definition.runs]
    if unknown:
        raise RecipeError(f"--only is {unknown[0]}, expected some of {', '.join(definition.runs)}")
    console = Console()

    def tell(line: str) -> None:
        console.print(f"{time.strftime('%H:%M:%S')}  {line}", highlight=False, soft_wrap=True)

    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    runner = Runner(Path(output), jobs, deadline, tell)
    if only and set(only) != definition.runs.keys():
        definition = definition.part(only)
        changes = [*changes, f"--only {' '.join(definition.runs)}"]
    runs = list(definition.runs)
    for run in runs:  # before hours of training
        report.costs(definition.recipe(run), definition.image)
    with _alone(Path(output)) if train else nullcontext():
        if known is not None:
            published.take_over(definition, runner, Path(known))
        if train:
            runner.run([training for name in runs for training in definition.tunings(name)], definition.metrics)
        chosen, trainings = {}, {}
        for run in runs:
            tuned = _best(definition, runner, run)
            if tuned is not None:
                chosen[run] = tuned
            if tuned is not None or not definition.grid:
                trainings[run] = definition.trainings(run, tuned["values"] if tuned else {})
        if train:
            # Seed by seed, so that a comparison that is stopped early has something of every side.
            order = sorted((training for each in trainings.values() for training in each), key=_seed(definition))
            runner.run(order, definition.metrics)
    result = report.make(definition, name, runner, trainings, chosen, changes)
    write_json(Path(output) / "report.json", result)
    (Path(output) / "report.md").write_text(report.markdown(result))
    console.print(Markdown(report.markdown(result)))
    paths = [Path(output) / "report.json", Path(output) / "report.md"]
    if results is not None:
        written = published.publish(result, runner, trainings, Path(results))
        paths += written
        if not written:
            tell(f"nothing is written to {results}: not all trainings have come to their end")
    for path in paths:
        console.print(f"  {path}", highlight=False)
    return result


def _best(definition: Definition, runner: Runner, run: str) -> dict[str, Any] | None:
    """The values with the best first metric, and all that were tried; None before tuning has come to its end."""
    trainings = definition.tunings(run)
    results = [runner.result(training) for training in trainings]
    if not trainings or not all(results):
        return None
    metric = definition.metrics[0]
    scores = [None if result.get("diverged") else metric_of(result, metric) for result in results]
    best = max((score for score in scores if score is not None and not isnan(score)), default=None)
    if best is None:
        raise RecipeError(f"grid is {definition.grid}, with which every training of {run} diverged")
    tried = [{"values": one.values, metric: score} for one, score in zip(trainings, scores, strict=True)]
    return {"values": trainings[scores.index(best)].values, "tuning": tried}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within it, no other command trains in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise RecipeError(f"--output is {folder}, where another command is training") from None


def _seed(definition: Definition) -> Any:
    def position(training: Training) -> int:
        return definition.seeds.index(training.seed)

    return position
