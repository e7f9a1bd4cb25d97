"""The curves of a run, and the style of all figures."""

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from numpy.typing import NDArray

__all__ = ["TRAIN", "VAL", "Series", "curves", "new_figure", "read_metrics"]

Series = tuple[NDArray[np.int64], NDArray[np.float64]]
"""Optimizer steps and values of a logged quantity."""

TRAIN, VAL = "#3b6fb6", "#d1603d"
"""Colours of training and validation, and of ours beside others."""
STYLE: dict[Any, Any] = {
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.facecolor": "white",
    "font.size": 9,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def read_metrics(folder: Path) -> dict[str, Series]:
    """What CSVLogger wrote under ``folder``/logs, by name: the last value at every step.

    Of the steps which a resumed run has repeated, only its own values count.
    """
    rows: list[dict[str, str]] = []
    versions = folder.glob("logs/version_*/metrics.csv")
    for path in sorted(versions, key=lambda path: int(path.parent.name.removeprefix("version_"))):
        with path.open(newline="") as file:
            new = list(csv.DictReader(file))
        if new:
            first = min(int(row["step"]) for row in new)
            rows = [row for row in rows if int(row["step"]) < first] + new
    series: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "epoch") and value:
                series.setdefault(name, {})[int(row["step"])] = float(value)
    return {name: (np.array([*values]), np.array([*values.values()])) for name, values in series.items()}


def curves(metrics: dict[str, Series], path: Path, monitor: str, title: str) -> Path:
    """Loss, the share ``monitor`` (val/...) in percent and learning rate against the optimizer step."""
    with new_figure(path, (12, 3.6)) as figure:
        loss, score, rate = figure.subplots(1, 3)
        if "train/loss" in metrics:
            steps, values = metrics["train/loss"]
            loss.plot(steps, values, color=TRAIN, alpha=0.25, linewidth=1)
            loss.plot(steps, _smooth(values), color=TRAIN, label="training")
        _line(loss, metrics, "val/loss", VAL, "validation")
        loss.set(title="Loss", yscale="log")  # the first epochs of a validation can be far off
        loss.yaxis.set_major_formatter("{x:g}")
        loss.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
        _line(score, metrics, monitor.replace("val/", "train/"), TRAIN, "training (augmented)", 100)
        _line(score, metrics, monitor, VAL, "validation", 100)
        score.set(title=title)
        if monitor in metrics:
            steps, values = metrics[monitor]
            score.annotate(
                f"{100 * values[-1]:.2f}",
                (steps[-1], 100 * values[-1]),
                xytext=(0, -14),
                textcoords="offset points",
                ha="right",
                color=VAL,
                weight="bold",
            )
        _line(rate, metrics, "lr", TRAIN, None, marker="")
        rate.set(title="Learning rate", ylim=(0, None))
        for axes in (loss, score, rate):
            axes.set_xlabel("optimizer step")
            if axes.get_legend_handles_labels()[0]:
                axes.legend(loc="best")
    return path


@contextmanager
def new_figure(path: Path, size: tuple[float, float], formats: Sequence[str] = ()) -> Iterator[Figure]:
    """A figure which is saved to ``path`` and, beside it, in other ``formats``, e.g. pdf."""
    # A figure of its own: pyplot would choose a window system and keep every figure alive.
    with plt.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        for suffix in (path.suffix, *(f".{name}" for name in formats)):
            figure.savefig(path.with_suffix(suffix), dpi=140)


def _line(
    axes: Axes,
    metrics: dict[str, Series],
    name: str,
    color: str,
    label: str | None,
    scale: float = 1,
    marker: str = "o",
) -> None:
    if name in metrics:
        steps, values = metrics[name]
        axes.plot(steps, scale * values, color=color, label=label, marker=marker, markersize=3.5)


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred running mean over a twentieth of the curve, over what is there at its ends."""
    window = np.ones(max(len(values) // 20, 1))
    total = np.convolve(values, window, "same")
    return total / np.convolve(np.ones_like(values), window, "same")
