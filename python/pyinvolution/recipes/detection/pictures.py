"""Images with the boxes and masks found in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from pyinvolution.recipes.plots import new_figure

__all__ = ["Scene", "draw", "grid"]

SCORE = 0.5
"""Detections of less confidence are not drawn."""
COLUMNS = 4


@dataclass
class Scene:
    """An image (H, W, 3) in [0, 1] with boxes (objects, 4), labels and scores (objects,) and masks (objects, H, W) or
    None; and the true boxes, if they are known."""

    image: NDArray[np.float32]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    scores: NDArray[np.float32]
    masks: NDArray[np.bool_] | None = None
    truth: NDArray[np.float32] | None = None

    @classmethod
    def of(cls, image: Tensor, found: Mapping[str, Tensor], truth: Mapping[str, Tensor] | None = None) -> "Scene":
        """Of an image (3, H, W); only the detections that are drawn are kept."""
        sure = found["scores"] >= SCORE
        arrays = {
            name: found[name][sure].cpu().numpy() for name in ("boxes", "labels", "scores", "masks") if name in found
        }
        boxes = None if truth is None else truth["boxes"][truth["iscrowd"] == 0].cpu().numpy()
        return cls(image.permute(1, 2, 0).float().cpu().numpy(), **arrays, truth=boxes)


def draw(axes: Axes, scene: Scene, classes: Sequence[str]) -> None:
    """Masks and boxes in a colour of the class, true boxes dashed."""
    shown = scene.image.copy()
    colors = [colormaps["tab10"](index) for index in range(10)]
    for mask, label in zip(scene.masks if scene.masks is not None else (), scene.labels, strict=False):
        shown[mask] = 0.45 * shown[mask] + 0.55 * np.array(colors[label % 10][:3])
    axes.imshow(shown.clip(0, 1), interpolation="nearest")
    height, width = shown.shape[:2]
    for x1, y1, x2, y2 in scene.truth if scene.truth is not None else ():
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color="white", linewidth=1, linestyle=":"))
    for (x1, y1, x2, y2), label, score in zip(scene.boxes, scene.labels, scene.scores, strict=True):
        color = colors[label % 10]
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=color, linewidth=1.5))
        name = classes[label - 1] if classes else str(label)
        style = {"facecolor": color, "edgecolor": "none", "pad": 1}
        # Above the box, and inside it where the picture ends there.
        x, horizontally = (x1, "left") if x1 < 0.75 * width else (min(x2, width - 2), "right")
        y, vertically = (y1, "bottom") if y1 > 0.06 * max(height, width) else (max(y1, 0), "top")
        text = axes.text(x, y, f"{name} {100 * score:.0f}", color="white", fontsize=7, bbox=style, clip_on=True)
        text.set(ha=horizontally, va=vertically)


def grid(scenes: Sequence[Scene], classes: Sequence[str], path: Path) -> Path:
    """A picture of several scenes."""
    columns = min(COLUMNS, len(scenes))
    rows = -(-len(scenes) // columns)
    with new_figure(path, (3 * columns, 3 * rows)) as canvas:
        for axes in (panels := canvas.subplots(rows, columns, squeeze=False)).flat:
            axes.axis("off")
        for axes, scene in zip(panels.flat, scenes, strict=False):
            draw(axes, scene, classes)
    return path
