"""Figures of segmentation models: predictions side by side (figure 1 of the paper), and learned kernels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import Normal, Stroke
from numpy.typing import NDArray
from rich.console import Console
from scipy import ndimage
from torchmetrics.functional.classification import multiclass_jaccard_index

from pyinvolution import Involution2d
from pyinvolution.models.checkpoint import read, reason_of
from pyinvolution.recipes.errors import RecipeError
from pyinvolution.recipes.images import read_image
from pyinvolution.recipes.plots import new_figure
from pyinvolution.recipes.recipe import init_arguments
from pyinvolution.recipes.segmentation.cityscapes import TABLE, CityscapesData
from pyinvolution.recipes.segmentation.label_maps import IGNORED, ClassTable, LabelMapData, SegmentationData
from pyinvolution.recipes.segmentation.task import Segmentation
from pyinvolution.studies import plots
from pyinvolution.studies.learned_kernels import involution_kernels

__all__ = ["Region", "compare", "deepest_pixels", "differing_regions", "draw_kernels", "load", "run"]

Labels = NDArray[np.uint8]
"""Train ids (H, W)."""
BOX = "#ffd400"


class Region(NamedTuple):
    """A rectangle of pixels, and how many in it, of the connected ones it was made for, two predictions disagree on."""

    top: int
    left: int
    height: int
    width: int
    pixels: int

    def overlaps(self, other: "Region") -> bool:
        return max(self.top, other.top) < min(self.top + self.height, other.top + other.height) and max(
            self.left, other.left
        ) < min(self.left + self.width, other.left + other.width)

    def joined(self, other: "Region") -> "Region":
        top, left = min(self.top, other.top), min(self.left, other.left)
        bottom = max(self.top + self.height, other.top + other.height)
        right = max(self.left + self.width, other.left + other.width)
        return Region(top, left, bottom - top, right - left, self.pixels + other.pixels)


def differing_regions(one: Labels, other: Labels, truth: Labels, most: int = 2) -> list[Region]:
    """Where two predictions differ most: up to ``most`` rectangles, largest disagreement first.

    Thin seams along the edges of objects, where any two predictions disagree, are left out: in a window of one
    sixteenth of the height, at least half of the labelled pixels must differ. Connected places of this kind are ranked
    by the pixels that differ, and those of less than a thousandth of the image are dropped. One that would overlap a
    larger one joins it.
    """
    labelled = truth != IGNORED
    different = (one != other) & labelled
    window = max(truth.shape[0] // 16, 3)
    share, known = (
        ndimage.uniform_filter(mask.astype(float), window, mode="constant") for mask in (different, labelled)
    )
    places, count = ndimage.label((share >= 0.5 * known) & different)
    sizes = np.bincount(places[different], minlength=count + 1)[1:]
    objects = ndimage.find_objects(places)
    regions: list[Region] = []
    for index in np.argsort(-sizes, kind="stable"):
        if sizes[index] < truth.size / 1000:
            break
        low, high = (
            [round(value) for value in np.clip([s.start - window / 2, s.stop + window / 2], 0, extent)]
            for s, extent in zip(objects[index], truth.shape, strict=True)
        )
        region = Region(low[0], high[0], low[1] - low[0], high[1] - high[0], int(sizes[index]))
        near = next((other for other in regions if region.overlaps(other)), None)
        if near is not None:
            regions[regions.index(near)] = near.joined(region)
        elif len(regions) < most:
            regions.append(region)
    return regions


def deepest_pixels(truth: Labels, most: int = 3) -> list[tuple[float, float]]:
    """The (row, column), in [0, 1], which lies deepest inside each of the ``most`` largest classes."""
    classes, counts = np.unique(truth[truth != IGNORED], return_counts=True)
    pixels = []
    for label in classes[np.argsort(-counts, kind="stable")[:most]]:
        depth = ndimage.distance_transform_cdt(np.pad(truth == label, 1))[1:-1, 1:-1]
        row, column = np.unravel_index(depth.argmax(), depth.shape)
        pixels.append(((row + 0.5) / truth.shape[0], (column + 0.5) / truth.shape[1]))
    return pixels


def compare(
    images: Sequence[NDArray[np.uint8]],
    truths: Sequence[Labels],
    baseline: Sequence[Labels],
    ours: Sequence[Labels],
    path: Path,
    names: tuple[str, str] = ("Baseline", "Ours"),
    boxes: int = 2,
    table: ClassTable = TABLE,
) -> Path:
    """Draw a column for each image, with rows image, ground truth, baseline and ours, to ``path`` and as PDF.

    Yellow boxes mark the `differing_regions`; the mean IoU of the image is below each prediction.

    Args:
        images: RGB (H, W, 3).
        truths: `Labels`.
        baseline, ours: predictions.
        path: of the PNG file.
        names: of baseline and ours.
        boxes: at most so many in an image.
        table: of the classes; Cityscapes' by default.
    """
    height, width = truths[0].shape
    panel = 3.1 if len(images) > 2 else 4.2
    size = (panel * len(images) + 0.5, 4 * (panel * height / width + 0.22) + 0.6)
    present = sorted({int(label) for labels in (*truths, *baseline, *ours) for label in np.unique(labels)} - {IGNORED})
    with new_figure(path, size, ("pdf",)) as figure:
        marked = False
        grid = figure.subplots(4, len(images), squeeze=False)
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
        for axes, name in zip(grid[:, 0], ("Image", "Ground truth", *names), strict=True):
            axes.set_ylabel(name, fontsize=11, weight="bold")
        for column, image, truth, one, other in zip(grid.T, images, truths, baseline, ours, strict=True):
            column[0].imshow(image)
            regions = differing_regions(one, other, truth, boxes)
            marked = marked or bool(regions)
            for axes, labels in zip(column[1:], (truth, one, other), strict=True):
                axes.imshow(table.palette[labels], interpolation="nearest")
            for axes, labels in zip(column[2:], (one, other), strict=True):
                axes.set_xlabel(f"mean IoU {100 * _mean_iou(labels, truth, table):.1f}%", fontsize=8, labelpad=2)
            for axes in column:
                plots.frame(axes, "#cccccc", 0.8)
                _mark(axes, regions)
        handles = [Patch(facecolor=table.palette[label] / 255, label=table.names[label]) for label in present]
        if any((truth == IGNORED).any() for truth in truths):
            handles.append(Patch(facecolor="black", label="ignored"))
        if marked:
            handles.append(Patch(facecolor="none", edgecolor=BOX, linewidth=2, label="largest difference"))
        _legend_below(figure, handles)
    return path


def _legend_below(figure: Figure, handles: Sequence[Patch]) -> None:
    """In as few rows as the figure's width allows."""
    for columns in range(len(handles), 0, -1):
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def _mark(axes: Axes, regions: Sequence[Region]) -> None:
    for region in regions:
        corner = (region.left - 0.5, region.top - 0.5)
        box = Rectangle(corner, region.width, region.height, fill=False, edgecolor=BOX, linewidth=2, clip_on=False)
        # Some classes are yellow too.
        box.set_path_effects([Stroke(linewidth=3.5, foreground="black"), Normal()])
        axes.add_patch(box)


def _mean_iou(labels: Labels, truth: Labels, table: ClassTable) -> float:
    found, expected = (torch.from_numpy(array.astype(np.int64)) for array in (labels, truth))
    return multiclass_jaccard_index(found, expected, len(table.names), ignore_index=IGNORED).item()


def draw_kernels(
    image: NDArray[np.uint8],
    layers: dict[str, NDArray[np.float64]],
    pixels: Sequence[tuple[float, float]],
    path: Path,
    groups: int = 4,
) -> Path:
    """Draw learned kernels over an image, to ``path`` and as PDF: for each layer, the sum over the taps at every pixel
    in the ``groups`` groups where it varies most, and the taps of the first of these at some pixels.

    Args:
        image: RGB (H, W, 3).
        layers: kernels (1, G, Kh, Kw, Ho, Wo) by name.
        pixels: up to three (row, column), in [0, 1].
        path: of the PNG file.
        groups: at most so many heat maps in a row.
    """
    groups = min(groups, max(kernel.shape[1] for kernel in layers.values()))
    height, width = image.shape[:2]
    panel = 2.6 * height / width
    ratios = [2.6] * groups + [panel] * len(pixels)
    size = (sum(ratios) + 0.9, (panel + 0.25) * (1 + len(layers)) + 0.8)
    with new_figure(path, size, ("pdf",)) as figure:
        grid = figure.add_gridspec(1 + len(layers), len(ratios), width_ratios=ratios)

        def panel_at(row: int, column: int, color: str, linewidth: float) -> Axes:
            axes = figure.add_subplot(grid[row, column])
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
            plots.frame(axes, color, linewidth)
            return axes

        picture = panel_at(0, 0, "#cccccc", 0.8)
        picture.imshow(image)
        picture.set_ylabel("image", fontsize=8, weight="bold")
        for index, ((row, column), color) in enumerate(zip(pixels, plots.MARKS, strict=False)):
            picture.plot(column * width, row * height, "o", color=color, markersize=8, markeredgecolor="white")
            axes = panel_at(0, groups + index, color, 2.5)
            radius = height // 8
            y, x = int(row * height), int(column * width)
            padded = np.pad(image, ((radius, radius), (radius, radius), (0, 0)), constant_values=255)
            axes.imshow(padded[y : y + 2 * radius + 1, x : x + 2 * radius + 1])
            axes.set_title(f"pixel {index + 1}", color=color, fontsize=9)
        maps, windows = [], []
        for line, (name, kernel) in enumerate(layers.items(), 1):
            sums = kernel[0].sum((1, 2))
            order = np.argsort(-sums.std((1, 2)), kind="stable")[:groups]
            for index, group in enumerate(order):
                axes = panel_at(line, index, "#cccccc", 0.8)
                axes.imshow(sums[group], cmap="magma", interpolation="nearest", aspect="auto")
                axes.set_box_aspect(height / width)
                axes.set_xlabel(f"group {group + 1} of {len(sums)}", fontsize=7, labelpad=2)
                maps.append(axes)
            short = name.removeprefix("backbone.").removesuffix(".involution")
            maps[-len(order)].set_ylabel(short, fontsize=8, weight="bold")
            main = kernel[0, order[0]]
            bound = max(np.abs(plots.taps(main, pixel)).max() for pixel in pixels)
            for index, (pixel, color) in enumerate(zip(pixels, plots.MARKS, strict=False)):
                windows.append(panel_at(line, groups + index, color, 2.5))
                plots.draw_taps(windows[-1], plots.taps(main, pixel), bound, color)
        for shown, colors, label, ticks in (
            (maps, "magma", "sum over the taps of each pixel's kernel, within a map", ("least", "", "most")),
            (windows, "RdBu_r", "taps of the first group shown", ("negative", "0", "positive")),
        ):
            bar = figure.colorbar(
                ScalarMappable(cmap=colors), ax=shown, location="bottom", fraction=0.02, pad=0.01, aspect=40
            )
            bar.set_ticks([0, 0.5, 1], labels=ticks)
            bar.set_label(label)
            bar.ax.grid(False)
    return path


def load(path: str | Path, device: str = "cpu") -> tuple[Segmentation, type[SegmentationData], dict[str, Any]]:
    """The model in a checkpoint of the recipe, in evaluation mode, and the class and arguments of the data it was
    trained on.

    Raises:
        RecipeError: there is no such checkpoint.
    """
    try:
        checkpoint = read(path)
        model = Segmentation(**init_arguments(checkpoint) | {"compile": False})
        model.load_state_dict(checkpoint["state_dict"])
        data = init_arguments(checkpoint, "datamodule_hyper_parameters")
        name = checkpoint["datamodule_hyper_parameters"].get("_class_path") or CityscapesData.__name__
        kind = {known.__name__: known for known in (CityscapesData, LabelMapData)}[name.rpartition(".")[2]]
    except Exception as error:  # there are many ways not to be one
        raise RecipeError(f"{path} is not a checkpoint of the segmentation recipe: {reason_of(error)}") from error
    return model.to(device).eval(), kind, data


@torch.inference_mode()
def run(
    ours: str,
    baseline: str,
    output: str,
    root: str | None = None,
    images: Sequence[str] = (),
    count: int = 4,
    boxes: int = 2,
    layers: Sequence[str] = (),
    groups: int = 4,
    device: str = "cpu",
) -> list[Path]:
    """Draw ``comparison`` and, for the first image, ``kernels`` (PNG and PDF) into the folder ``output``.

    Args:
        ours, baseline: checkpoints of the recipe.
        output: folder.
        root: of the data, instead of that in the checkpoint.
        images: names of images (CITY_SEQUENCE_FRAME in Cityscapes) in the validation set; none for ``count`` of them at
            equal distances.
        count: number of images.
        boxes: at most so many in an image.
        layers: involutions of ``ours``; none for the last of each stage and the first of the neck.
        groups: heat maps for each of them.
        device: of torch.

    Raises:
        RecipeError: a checkpoint, image or layer does not exist.
    """
    model, kind, arguments = load(ours, device)
    other, other_kind, other_arguments = load(baseline, device)
    changed: dict[str, Any] = {"num_workers": 0} | ({"root": root} if root else {})
    data, others = kind(**arguments | changed), other_kind(**other_arguments | changed)
    classes, expected = (network.hparams["num_classes"] for network in (other, model))
    if classes != expected:
        raise RecipeError(f"--baseline is {baseline} of {classes} classes, expected {expected} as in --ours {ours}")
    data.setup("validate")
    samples: Any = data.val_samples
    names = [data.name_of(path) for path, _ in samples.files]
    missing = [name for name in images if name not in names]
    if missing:
        raise RecipeError(
            f"{data.root} has no validation image {missing[0]}; there are {names[0]}, {names[1 % len(names)]}, ..."
        )
    chosen = [names.index(name) for name in images] or [
        int(index) for index in np.linspace(0, len(names) - 1, min(count, len(names))).round()
    ]
    pictures: list[NDArray[np.uint8]] = []
    truths: list[Labels] = []
    found: tuple[list[Labels], list[Labels]] = ([], [])
    for index in chosen:
        image, truth = samples[index]
        pictures.append(np.asarray(read_image(samples.files[index][0])))
        truths.append(truth.numpy().astype(np.uint8))
        for network, own, labels in zip((other, model), (others, data), found, strict=True):  # each normalises its way
            labels.append(network(own.prepare(image[None].to(device)))[0].argmax(0).to(torch.uint8).cpu().numpy())
    folder, console = Path(output), Console()
    paths = [compare(pictures, truths, *found, folder / "comparison.png", boxes=boxes, table=samples.table)]
    layers = layers or _layers(model.net)
    if layers:
        first = data.prepare(samples[chosen[0]][0][None].to(device))
        kernels = involution_kernels(model.net, first, layers)
        unknown = [name for name in layers if name not in kernels]
        if unknown:
            raise RecipeError(
                f"--layers has {unknown[0]}, expected involutions of the model: {', '.join(_involutions(model.net))}"
            )
        kernels = {name: kernels[name] for name in layers}
        pixels = deepest_pixels(truths[0]) or [(0.5, 0.5)]
        paths.append(draw_kernels(pictures[0], kernels, pixels, folder / "kernels.png", groups))
    paths = [path.with_suffix(suffix) for path in paths for suffix in (".png", ".pdf")]
    for path in paths:
        console.print(f"  {path}", highlight=False)
    return paths


def _involutions(net: torch.nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if isinstance(module, Involution2d)]


def _layers(net: torch.nn.Module) -> list[str]:
    """The last involution of each stage, and the first of the neck."""
    names = _involutions(net)
    last = {name.split(".")[1]: name for name in names if name.startswith("backbone.layer")}
    return [*last.values(), *[name for name in names if name.startswith("neck.")][:1]]
