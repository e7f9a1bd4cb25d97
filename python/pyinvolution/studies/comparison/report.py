"""The table of a comparison, made of trainings that came to their end."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from statistics import fmean, stdev
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pyinvolution.recipes.errors import RecipeError
from pyinvolution.recipes.recipe import build_net
from pyinvolution.studies.comparison.definition import Definition, Training
from pyinvolution.studies.comparison.runner import Runner, metric_of

__all__ = ["costs", "make", "markdown"]

TIMES = {"epoch_s": "time of an epoch (s)", "epoch_cpu_s": "processor time of an epoch (s)"}


def costs(config: Mapping[str, Any], image: Sequence[int]) -> tuple[int, int]:
    """Trained parameters, and multiply-adds for one image, of the untrained network of a recipe.

    Those of a detector's head depend on how many proposals are left.

    Raises:
        RecipeError: the recipe does not say which network, or it cannot be built.
    """
    section = config["model"]
    arguments = section.get("init_args", section)
    missing = [key for key in ("name", "num_classes") if key not in arguments]
    if missing:
        raise RecipeError(f"a recipe has no model.init_args.{missing[0]}, expected it, since the costs depend on it")
    torch.manual_seed(0)
    net: nn.Module = build_net(arguments["name"], arguments["num_classes"], arguments.get("options")).eval()
    zeros = torch.zeros(*image)
    detector = hasattr(net, "transform") and hasattr(net, "backbone")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        net([zeros] if detector else zeros[None])
    trained = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    return trained, counter.get_total_flops() // 2


def make(
    definition: Definition,
    name: str,
    runner: Runner,
    trainings: Mapping[str, Sequence[Training]],
    chosen: Mapping[str, Any],
    changes: Sequence[str] = (),
) -> dict[str, Any]:
    """What is known of a comparison: of each recipe its costs, tuning and finished trainings, with their spread.

    Args:
        trainings: of each run that is compared.
        chosen: of each run that was tuned the "values" and the "tuning" they come from.
        changes: options of the command line that make it another comparison than the one of that name.
    """
    anywhere = replace(definition, data_root=None)
    runs = {}
    for run, planned in trainings.items():
        finished = [result for training in planned if (result := runner.result(training))]
        parameters, operations = costs(planned[0].config, definition.image)
        entry: dict[str, Any] = {
            "recipe": definition.runs[run],
            "config": anywhere.trainings(run, planned[0].values)[0].config,
            "parameters": parameters,
            "multiply_adds": operations,
            **chosen.get(run, {}),
            "trainings": finished,
            "planned": len(planned),
        }
        for metric in definition.metrics:
            values = [metric_of(result, metric) for result in finished]
            entry[metric] = _spread(values)
        for time in TIMES:
            entry[time] = _spread([result[time] for result in finished if result[time] is not None])
        runs[run] = entry
    complete = all(len(entry["trainings"]) == entry["planned"] for entry in runs.values())
    return {
        "study": name,
        "changes": list(changes),
        "date": str(date.today()),
        "complete": complete and runs.keys() == definition.runs.keys(),
        "metrics": definition.metrics,
        "pairs": [pair for pair in definition.pairs if set(pair) <= runs.keys()],
        "image": definition.image,
        "grid": definition.grid,
        "tuning": definition.tuning,
        "runs": runs,
    }


def _spread(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean and sample deviation."""
    if not values:
        return None
    return {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else None, "count": len(values)}


def _text(spread: Mapping[str, Any] | None, factor: float, digits: int) -> str:
    if spread is None:
        return "not finished"
    deviation = "" if spread["std"] is None else f" ± {factor * spread['std']:.{digits}f}"
    return f"{factor * spread['mean']:.{digits}f}{deviation}"


def markdown(report: Mapping[str, Any]) -> str:
    """The report as text: a table of the recipes, and the differences of the pairs."""
    metrics = report["metrics"]
    columns = [
        "recipe",
        "seeds",
        "parameters",
        "multiply-adds (M)",
        *(f"{name} (%)" if _is_share(name) else name for name in metrics),
        *TIMES.values(),
    ]
    lines = [f"# {report['study']}, {report['date']}", ""]
    if not report["complete"]:
        lines += ["Not all trainings have come to their end.", ""]
    lines += [f"| {' | '.join(columns)} |", "| --- |" + " ---: |" * (len(columns) - 1)]
    for name, entry in report["runs"].items():
        cells = [
            f"`{name}`",
            f"{len(entry['trainings'])} of {entry['planned']}",
            f"{entry['parameters']:,}",
            f"{entry['multiply_adds'] / 1e6:.2f}",
            *(_text(entry[metric], *((100, 2) if _is_share(metric) else (1, 4))) for metric in metrics),
            *(_text(entry[time], 1, 1) for time in TIMES),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Mean and deviation over the seeds, at the last step of each training."]
    finished = [result for entry in report["runs"].values() for result in entry["trainings"]]
    if finished:
        machines, versions, commits = (
            ", ".join(sorted({str(result[name]) for result in finished})) for name in ("machine", "torch", "commit")
        )
        command = " ".join(["pyinvolution study", report["study"], *report["changes"]])
        lines += ["", f"`{command}` on {machines}, torch {versions}, commit {commits}."]
        if len({result["machine"] for result in finished}) > 1:
            lines += ["", "Times of different machines cannot be compared:", ""]
            lines += [f"- `{name}`: {', '.join(_machines(entry))}" for name, entry in report["runs"].items()]
    if report["grid"]:
        lines += ["", f"Each recipe was tuned over {report['grid']}:", ""]
        lines += [f"- `{name}`: {entry.get('values', 'not tuned yet')}" for name, entry in report["runs"].items()]
    for baseline, ours in report["pairs"]:
        one, other = report["runs"][baseline], report["runs"][ours]
        if one[metrics[0]] and other[metrics[0]]:
            ahead = ", ".join(_difference(metric, one[metric]["mean"], other[metric]["mean"]) for metric in metrics)
            parameters, operations = (_ratio(other, one, name) for name in ("parameters", "multiply_adds"))
            costs = f"{parameters} of the parameters, {operations} of the multiply-adds"
            lines += ["", f"`{ours}` against `{baseline}`: {ahead}, at {costs}."]
    return "\n".join(lines) + "\n"


def _machines(entry: Mapping[str, Any]) -> list[str]:
    return sorted({str(result["machine"]) for result in entry["trainings"]}) or ["not finished"]


def _is_share(metric: str) -> bool:
    """Whether it is given in percent, as all but losses."""
    return not metric.endswith("loss")


def _difference(metric: str, one: float, other: float) -> str:
    return f"{metric} " + (f"{100 * (other - one):+.2f} points" if _is_share(metric) else f"{other - one:+.4f}")


def _ratio(one: Mapping[str, Any], other: Mapping[str, Any], name: str) -> str:
    return f"{one[name] / other[name]:.2f}"
