"""Finished comparisons in a folder of results, and trainings that are taken over from there."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyinvolution.recipes.errors import RecipeError
from pyinvolution.studies.comparison.definition import Definition, Training
from pyinvolution.studies.comparison.report import markdown
from pyinvolution.studies.comparison.runner import Runner, without_folder
from pyinvolution.studies.files import read_json, write_json

__all__ = ["publish", "take_over"]


def publish(
    report: Mapping[str, Any], runner: Runner, trainings: Mapping[str, Sequence[Training]], folder: Path
) -> list[Path]:
    """Write a complete report to ``folder``: DATE-study-NAME.json and .md, and the logs of the trainings in a folder of
    that name; DATE-study-NAME-changed where options of the command line made it another comparison.

    Returns:
        The paths; none of a report that is not complete.

    Raises:
        RecipeError: another comparison of that name and day is there.
    """
    if not report["complete"]:
        return []
    stem = f"{report['date']}-study-{report['study']}{'-changed' if report['changes'] else ''}"
    table, text, logs = folder / f"{stem}.json", folder / f"{stem}.md", folder / stem
    before = read_json(table)
    if before and before.get("changes", []) != report["changes"]:
        raise RecipeError(
            f"--results has {table} of a comparison with {' '.join(before['changes'])}: move it, or give another folder"
        )
    write_json(table, dict(report))
    text.write_text(markdown(report))
    logs.mkdir(parents=True, exist_ok=True)
    for planned in trainings.values():
        for training in planned:
            shutil.copyfile(runner.place(training) / "log.txt", _log(table, training))
    return [table, text, logs]


def take_over(definition: Definition, runner: Runner, path: Path) -> None:
    """Give ``runner`` the trainings that a report has and this comparison asks for, as if they had ended here.

    Tunings are taken over, too, from a report with the same grid and settings of tuning. In which folders the data and
    the trainings were does not count.

    Args:
        path: ``report.json`` in the folder of a comparison, or a published one, whose logs are beside it.

    Raises:
        RecipeError: there is no such file, it is no report, or it has nothing that this comparison asks for.
    """
    try:
        report = read_json(path)
    except ValueError:
        report = {}
    if not isinstance(report, dict) or not isinstance(report.get("runs"), dict):
        raise RecipeError(f"--known is {path}, expected a report.json of pyinvolution study")
    found = list(_found(definition, report))
    if not found:
        raise RecipeError(
            f"--known is {path}, which has no training of {', '.join(definition.runs)} with the configuration of this "
            "comparison"
        )
    for training, result in found:
        folder = runner.place(training)
        if runner.result(training) or (folder / "last.ckpt").is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(runner.recipe(training))
        log = next((log for log in (_log(path, training), path.parent / training.run / training.label / "log.txt")
                    if log.is_file()), None)  # fmt: skip
        if log is None:
            (folder / "log.txt").write_text(f"taken over from {path.name}, without a log\n")
        else:
            shutil.copyfile(log, folder / "log.txt")
        write_json(folder / "result.json", result)
        runner.tell(f"known: {training.run}, {training.label}")


def _found(definition: Definition, report: Mapping[str, Any]) -> Iterator[tuple[Training, dict[str, Any]]]:
    """Trainings of the comparison, and the results that the report has of them."""
    anywhere = replace(definition, data_root=None)
    metric = definition.metrics[0]
    for run in definition.runs:
        entry = report["runs"].get(run)
        if entry is None or not entry["trainings"]:
            continue
        values = entry["trainings"][0]["values"]
        if without_folder(anywhere.trainings(run, values)[0].config) != without_folder(entry["config"]):
            continue
        results = {result["seed"]: result for result in entry["trainings"]}
        for training in definition.trainings(run, values):
            if training.seed in results:
                yield training, results[training.seed]
        if report["grid"] == definition.grid and report.get("tuning") == definition.tuning:
            for training in definition.tunings(run):
                for tried in entry.get("tuning", ()):
                    if tried["values"] == training.values and metric in tried:
                        score = {"diverged": True} if tried[metric] is None else {"metrics": {metric: tried[metric]}}
                        yield training, {**score, "seed": training.seed, "values": training.values}


def _log(table: Path, training: Training) -> Path:
    return table.with_suffix("") / f"{training.run}-{training.label}.log"
