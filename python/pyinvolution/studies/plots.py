"""Figures of the studies: predictions, learned kernels, costs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from pyinvolution.recipes.plots import TRAIN, VAL, new_figure

__all__ = ["MARKS", "costs", "draw_taps", "frame", "kernels", "predictions", "taps"]

MISTAKE = "#c8102e"
MARKS = "#e07b00", "#007a5e", "#8a3ffc"
"""Colours of the pixels whose kernels are shown."""


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
            frame(axes, MISTAKE if wrong else "#cccccc", 2.5 if wrong else 0.8)
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
        halves: Any = figure.subfigures(1, 2, width_ratios=(columns, len(pixels)), wspace=0.03)
        left, right = halves
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
            frame(axes, "#cccccc", 0.8)
        for axes, (y, x), color in zip(windows[0], pixels, MARKS, strict=False):
            maps[0, 0].plot(x * width - 0.5, y * height - 0.5, "o", color=color, markersize=7, markeredgecolor="white")
            radius = height // 6
            row, column = int(y * height), int(x * width)
            patch = np.pad(images[0], radius)[row : row + 2 * radius + 1, column : column + 2 * radius + 1]
            axes.imshow(patch, cmap="gray_r", vmin=0, vmax=1)
            frame(axes, color, 2.5)
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
                frame(axes, "#cccccc", 0.8)
            bound = np.abs(kernel[0, group]).max()
            for axes, (y, x), color in zip(windows[row], pixels, MARKS, strict=False):
                draw_taps(axes, taps(kernel[0, group], (y, x)), bound, color)
    return path


def taps(kernel: NDArray[np.float64], pixel: tuple[float, float]) -> NDArray[np.float64]:
    """The taps (Kh, Kw) of a kernel (Kh, Kw, Ho, Wo) at a pixel (row, column) in [0, 1)."""
    return kernel[:, :, int(pixel[0] * kernel.shape[2]), int(pixel[1] * kernel.shape[3])]


def draw_taps(axes: Axes, window: NDArray[np.float64], bound: float, color: str) -> None:
    """Draw taps (Kh, Kw), of absolute values up to ``bound``, in a frame of ``color``."""
    axes.imshow(window, cmap="RdBu_r", vmin=-bound, vmax=bound)
    axes.set_xlabel(f"{window.shape[0]} x {window.shape[1]}", fontsize=7)
    frame(axes, color, 2.5)


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


def frame(axes: Axes, color: str, linewidth: float) -> None:
    """Draw all four edges of ``axes``."""
    for spine in axes.spines.values():
        spine.set(visible=True, color=color, linewidth=linewidth)
