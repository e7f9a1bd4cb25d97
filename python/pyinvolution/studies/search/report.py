"""What a search found, as JSON, Markdown and a picture."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from pyinvolution.recipes import plots
from pyinvolution.studies.files import write_json

__all__ = ["markdown", "picture", "write"]

UNITS = {"macs": (1e-6, "multiply-adds (M)"), "latency": (1e6, "time for an image (us)")}


def write(result: dict[str, Any], folder: Path) -> None:
    """Write ``report.json``, ``report.md`` and ``search.png``."""
    write_json(folder / "report.json", result)
    (folder / "report.md").write_text(markdown(result))
    picture(result, folder / "search.png")


def markdown(result: dict[str, Any]) -> str:
    """The report as text."""
    found, objective, comparison = result["found"], result["objective"], result["comparison"]
    correlation, latency = result["rank_correlation"], result["latency"]
    scale, unit = UNITS[objective["cost"]]
    rivals = comparison["networks"][1:]
    more_or_less = "more" if comparison["difference"] >= 0 else "less"
    feasible = sum(candidate["feasible"] for candidate in result["candidates"])
    lines = [
        "# Architecture search",
        "",
        f"Found among {result['space']['networks']:,} networks (width: operator of each block, stage by stage):",
        "",
        f"    {found['network']}",
        "",
        f"- {found['macs'] / 1e6:.2f} M multiply-adds, {1e6 * found['latency']:.0f} us an image, "
        f"{found['involutions']:.0%} of its blocks are involutions.",
        f"- The search saw {len(result['candidates'])} different networks, {feasible} of them within the budget: "
        f"{objective['budget']:g} of the {objective['cost']} of the all-convolution network of full size, "
        f"{scale * objective['limit']:.3g} of {scale * objective['all_conv']:.3g} {unit}.",
        f"- The most accurate of all, budget or not, has {scale * result['without_budget'][objective['cost']]:.3g} "
        f"{unit} and {result['without_budget']['involutions']:.0%} involutions.",
        "",
        "## Is the search worth it?",
        "",
        f"Trained alone {comparison['seeds']} times each, on all training images, and measured on images that no "
        f"choice has seen: the found network has {abs(100 * comparison['difference']):.2f} points of accuracy "
        f"{more_or_less} than the mean of {len(rivals)} random networks of its cost, and is better than "
        f"{comparison['better_than']} of them.",
        "",
        *_table(
            ["network", unit, "involutions", "accuracy (%)", "mean", "std"],
            (
                [
                    ("found: " if index == 0 else "random: ") + entry["network"],
                    f"{scale * entry['cost']:.3g}",
                    f"{entry['involutions']:.0%}",
                    " ".join(f"{100 * value:.2f}" for value in entry["accuracies"]),
                    f"{100 * entry['mean']:.2f}",
                    "-" if entry["std"] is None else f"{100 * entry['std']:.2f}",
                ]
                for index, entry in enumerate(comparison["networks"])
            ),
        ),
        "",
        "## Does the supernet rank networks as training alone does?",
        "",
        f"Spearman {_correlation(correlation['spearman'])}, Kendall {_correlation(correlation['kendall'])}, over "
        f"{len(correlation['networks'])} networks at even distances in cost among random ones. Both "
        f"accuracies are on the held-out training images, those of training alone means of {comparison['seeds']} runs. "
        f"One run ranks the networks as another does with Spearman {_correlation(correlation['between_seeds'])}; "
        f"the cost alone, with {_correlation(correlation['of_cost'])}.",
        "",
        *_table(
            ["network", unit, "supernet (%)", "alone (%)"],
            (
                [
                    entry["network"],
                    f"{scale * entry['cost']:.3g}",
                    f"{100 * entry['supernet']:.2f}",
                    f"{100 * entry['alone']:.2f}",
                ]
                for entry in correlation["networks"]
            ),
        ),
        "",
        "## Pareto front",
        "",
        *_table(
            ["network", "accuracy with shared weights (%)", "multiply-adds (M)", "us an image", "involutions"],
            (
                [
                    entry["network"],
                    f"{100 * entry['accuracy']:.2f}",
                    f"{entry['macs'] / 1e6:.2f}",
                    f"{1e6 * entry['latency']:.0f}",
                    f"{entry['involutions']:.0%}",
                ]
                for entry in result["front"]
            ),
        ),
        "",
        "## Is the table of latencies right?",
        "",
        f"The sum over the layers against the whole network, measured: {latency['mean_error']:.1%} off in the mean, "
        f"{latency['largest_error']:.1%} at most, over {len(latency['networks'])} networks "
        f"({latency['layers']} layers; {latency['machine']['device']}, batch {latency['machine']['batch']}, "
        f"{latency['machine']['threads']} thread(s)).",
        "",
        "## Time",
        "",
        *_table(["stage", "seconds"], ([name, f"{value:.0f}"] for name, value in result["seconds"].items())),
        "",
    ]
    return "\n".join(lines)


def picture(result: dict[str, Any], path: Path) -> Path:
    """Pareto front, rank correlation, comparison with random networks, and the table of latencies."""
    with plots.new_figure(path, (13, 9)) as figure:
        pareto, rank, compared, latency = figure.subplots(2, 2, width_ratios=(3, 2)).flat
        _pareto(pareto, result, figure)
        _rank(rank, result["rank_correlation"])
        _compared(compared, result["comparison"]["networks"])
        _latency(latency, result["latency"])
    return path


def _rank(axes: Axes, correlation: dict[str, Any]) -> None:
    values = [[100 * entry[name] for entry in correlation["networks"]] for name in ("supernet", "alone")]
    axes.scatter(*values, color=plots.TRAIN, zorder=3)
    axes.set(
        title=f"Rank correlation: Spearman {_correlation(correlation['spearman'])}",
        xlabel="accuracy with shared weights (%)",
        ylabel="accuracy trained alone (%)",
    )


def _compared(axes: Axes, entries: list[dict[str, Any]]) -> None:
    labels = []
    for row, entry in enumerate(entries):
        color = plots.TRAIN if row else plots.VAL
        values = [100 * value for value in entry["accuracies"]]
        axes.scatter(values, [row] * len(values), color=color, alpha=0.6, zorder=3)
        axes.plot([100 * entry["mean"]] * 2, [row - 0.25, row + 0.25], color=color, linewidth=3, zorder=4)
        labels.append("\n".join([f"random {row}" if row else "found", *entry["network"].split(" | ")]))
    axes.set_yticks(range(len(entries)), labels, fontsize=7)
    axes.set(title="Trained alone, unseen images; bar: mean", xlabel="accuracy (%)")
    axes.invert_yaxis()


def _latency(axes: Axes, latency: dict[str, Any]) -> None:
    measured, table = ([1e6 * entry[name] for entry in latency["networks"]] for name in ("measured", "table"))
    end = 1.1 * max(measured + table)
    axes.plot([0, end], [0, end], color="#999999")
    axes.scatter(measured, table, color=plots.TRAIN, zorder=3)
    axes.set(
        title=f"Latency: {latency['mean_error']:.1%} off in the mean",
        xlabel="whole network, measured (us an image)",
        ylabel="sum of the table (us an image)",
        xlim=(0, end),
        ylim=(0, end),
    )


def _pareto(axes: Axes, result: dict[str, Any], figure: Any) -> None:
    objective = result["objective"]
    scale, unit = UNITS[objective["cost"]]

    def points(entries: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
        return [scale * entry[objective["cost"]] for entry in entries], [100 * entry["accuracy"] for entry in entries]

    shares = [candidate["involutions"] for candidate in result["candidates"]]
    dots = axes.scatter(*points(result["candidates"]), c=shares, cmap="viridis", vmin=0, vmax=1, s=22, zorder=3)
    figure.colorbar(dots, ax=axes, label="share of involutions", pad=0.01)
    axes.step(*points(result["front"]), where="post", color=plots.VAL, label="Pareto front", zorder=2)
    axes.scatter(*points([result["found"]]), marker="*", s=220, color=plots.VAL, zorder=5, label="found")
    axes.axvline(scale * objective["limit"], color="#333333", linestyle=":", linewidth=1.2, label="budget")
    accuracies = np.array(points(result["candidates"])[1])
    low = max(accuracies.min(), np.quantile(accuracies, 0.05) - 2)
    axes.set(title="Search with the supernet", xlabel=unit, ylabel="accuracy with shared weights (%)")
    axes.set_ylim(low - 0.5, accuracies.max() + 0.7)
    axes.legend(loc="lower right")


def _correlation(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


def _table(header: list[str], rows: Any) -> list[str]:
    body = [[cell.replace("|", "/") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *body)]
