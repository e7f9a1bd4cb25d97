"""Pictures of a run."""

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from numpy.typing import NDArray

__all__ = ["Series", "costs", "curves", "kernels", "new_figure", "predictions", "read_metrics", "taps"]

Series = tuple[NDArray[np.int64], NDArray[np.float64]]
"""Optimizer steps and values of a logged quantity."""

TRAIN, VAL, MISTAKE = "#3b6fb6", "#d1603d", "#c8102e"
MARKS = "#e07b00", "#007a5e", "#8a3ffc"
STYLE = {
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


def predictions(
    images: NDArray[np.float64],
    targets: Sequence[int],
    predicted: Sequence[int],
    confidences: Sequence[float],
    classes: Sequence[str],
    path: Path,
    title: str,
) -> Path:
    """A grid of images (N, H, W) or (N, H, W, 3) in [0, 1], each with its prediction; mistakes have a red frame."""
    columns = 12
    rows = -(-len(images) // columns)
    with new_figure(path, (columns, 1.25 * rows + 0.5)) as figure:
        figure.suptitle(title, weight="bold")
        for axes in (grid := figure.subplots(rows, columns, squeeze=False)).flat:
            axes.axis("off")
        for axes, image, target, guess, confidence in zip(
            grid.flat, images, targets, predicted, confidences, strict=False
        ):
            wrong = target != guess
            axes.axis("on")
            axes.set(xticks=[], yticks=[])
            axes.imshow(image, cmap="gray_r", vmin=0, vmax=1)
            _frame(axes, MISTAKE if wrong else "#cccccc", 2.5 if wrong else 0.8)
            text = f"{classes[guess]}, is {classes[target]}" if wrong else f"{classes[guess]}  {100 * confidence:.0f}%"
            color, weight = (MISTAKE, "bold") if wrong else ("#333333", "normal")
            axes.set_title(text, fontsize=8, weight=weight, color=color, pad=3)
    return path


def kernels(
    images: NDArray[np.float64],
    layers: dict[str, NDArray[np.float64]],
    pixels: Sequence[tuple[float, float]],
    path: Path,
) -> Path:
    """Learned kernels over images: the sum over the taps at every pixel (as in figure 3 of the paper), and the taps at
    some pixels of the first image.

    Args:
        images: (N, H, W) in [0, 1].
        layers: kernels (N, G, Kh, Kw, Ho, Wo) of involution layers, by name; the group of largest contrast is shown.
        pixels: up to three (row, column), in [0, 1].
        path: the picture.
    """
    columns = len(images)
    with new_figure(path, (1.55 * (columns + len(pixels)) + 0.4, 1.75 * (1 + len(layers)) + 0.3)) as figure:
        left, right = figure.subfigures(1, 2, width_ratios=(columns, len(pixels)), wspace=0.03)
        left.suptitle("Sum over the taps of each pixel's kernel", weight="bold")
        right.suptitle("Taps at the marked pixels", weight="bold")
        maps = left.subplots(1 + len(layers), columns, squeeze=False)
        windows = right.subplots(1 + len(layers), len(pixels), squeeze=False)
        for axes in (*maps.flat, *windows.flat):
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
        height, width = images.shape[1:]
        for axes, image in zip(maps[0], images, strict=True):
            axes.imshow(image, cmap="gray_r", vmin=0, vmax=1)
            _frame(axes, "#cccccc", 0.8)
        for axes, (y, x), color in zip(windows[0], pixels, MARKS, strict=False):
            maps[0, 0].plot(x * width - 0.5, y * height - 0.5, "o", color=color, markersize=7, markeredgecolor="white")
            radius = height // 6
            row, column = int(y * height), int(x * width)
            patch = np.pad(images[0], radius)[row : row + 2 * radius + 1, column : column + 2 * radius + 1]
            axes.imshow(patch, cmap="gray_r", vmin=0, vmax=1)
            _frame(axes, color, 2.5)
        for row, (name, kernel) in enumerate(layers.items(), 1):
            sums = kernel.sum((2, 3))
            group = int(sums.std((0, 2, 3)).argmax())
            bounds = {"vmin": sums[:, group].min(), "vmax": sums[:, group].max()}
            maps[row, 0].set_ylabel(f"{name}\ngroup {group + 1} of {sums.shape[1]}", fontsize=8)
            for axes, image, heat in zip(maps[row], images, sums[:, group], strict=True):
                axes.imshow(heat, cmap="magma", extent=(0, width, height, 0), interpolation="nearest", **bounds)
                axes.contour(
                    np.arange(width) + 0.5, np.arange(height) + 0.5, image, [0.5], colors="white", linewidths=1
                )
                _frame(axes, "#cccccc", 0.8)
            bound = np.abs(kernel[0, group]).max()
            for axes, (y, x), color in zip(windows[row], pixels, MARKS, strict=False):
                _draw_taps(axes, taps(kernel[0, group], (y, x)), bound, color)
    return path


def taps(kernel: NDArray[np.float64], pixel: tuple[float, float]) -> NDArray[np.float64]:
    """The taps (Kh, Kw) of a kernel (Kh, Kw, Ho, Wo) at a pixel (row, column) in [0, 1)."""
    return kernel[:, :, int(pixel[0] * kernel.shape[2]), int(pixel[1] * kernel.shape[3])]


def _draw_taps(axes: Axes, window: NDArray[np.float64], bound: float, color: str) -> None:
    axes.imshow(window, cmap="RdBu_r", vmin=-bound, vmax=bound)
    axes.set_xlabel(f"{window.shape[0]} x {window.shape[1]}", fontsize=7)
    _frame(axes, color, 2.5)


def costs(systems: Sequence[str], quantities: dict[str, Sequence[float]], path: Path) -> Path:
    """Bars of each quantity in percent of the first system's; the last system is ours."""
    colors = ["#999999"] + [TRAIN] * (len(systems) - 2) + [VAL]
    with new_figure(path, (3.1 * len(quantities) + 1.5, 0.34 * len(systems) + 1.1)) as figure:
        panels = figure.subplots(1, len(quantities), sharey=True)
        for axes, (title, values) in zip(np.atleast_1d(panels), quantities.items(), strict=True):
            percent = 100 * np.array(values) / values[0]
            axes.barh(systems, percent, color=colors[: len(systems)])
            axes.axvline(100, color="#333333", linewidth=1, linestyle=":")
            for row, value in enumerate(percent):
                axes.text(value + 1.5, row, f"{value:.0f}", va="center", fontsize=8)
            axes.set(title=title, xlabel="% of the first", xlim=(0, 1.14 * percent.max()))
            axes.invert_yaxis() if axes is panels.flat[0] else None
            axes.grid(False, axis="y")
    return path


def _frame(axes: Axes, color: str, linewidth: float) -> None:
    for spine in axes.spines.values():
        spine.set(visible=True, color=color, linewidth=linewidth)


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
