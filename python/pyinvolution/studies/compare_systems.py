"""The systems of Table 1 side by side: what each adds to Mask R-CNN on ResNet-50, measured on one input in one run."""

import csv
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pyinvolution.models import create_model
from pyinvolution.recipes.errors import RecipeError
from pyinvolution.studies import plots
from pyinvolution.studies.timing import (
    Spread,
    clock,
    device_peak,
    forked,
    interleaved,
    peak_growth,
    processor_name,
    stopwatch,
)

__all__ = ["SYSTEMS", "Measurement", "System", "Workload", "measure", "run"]

PROPOSALS, MASKS = 1000, 100


@dataclass(frozen=True)
class System:
    """A detector of the table.

    Attributes:
        title: as in the table.
        model, options: of `pyinvolution.models.create_model`.
        box_ap, mask_ap: published COCO AP in percent.
        baseline: AP of plain Mask R-CNN, ResNet-50-FPN, in the same source; frameworks differ.
        source: of these figures.
    """

    title: str
    model: str
    options: dict[str, Any]
    box_ap: float
    mask_ap: float
    baseline: tuple[float, float] | None
    source: str


_AUTHORS = "model zoo of the authors' code"
_ZOO = "model zoo of mmdetection 2, block at C3 to C5"
# The AP of these two has not been checked against the papers; the others are from the model zoos.
_CCNET, _DGMN = "Huang et al., ICCV 2019 (not checked)", "Zhang et al., CVPR 2020 (not checked)"
SYSTEMS = (
    System("Mask R-CNN, ResNet-50-FPN", "mask_rcnn_resnet50", {}, 38.4, 35.1, None, _AUTHORS),
    System("+ NL", "mask_rcnn_resnet50", {"block": "non_local"}, 39.0, 35.5, (38.2, 34.8), _CCNET),
    System("+ RCCA", "mask_rcnn_resnet50", {"block": "criss_cross"}, 39.3, 36.1, (38.2, 34.8), _CCNET),
    System("+ GC @C5", "mask_rcnn_resnet50", {"block": "global_context"}, 39.7, 35.9, (38.2, 34.7), _ZOO),
    System("+ DCN @C5", "mask_rcnn_resnet50", {"block": "deformable"}, 41.5, 37.1, (38.2, 34.7), _ZOO),
    System("+ DGMN @C5", "mask_rcnn_resnet50", {"block": "dynamic_graph"}, 40.2, 36.0, (37.8, 34.4), _DGMN),
    System("RedNet-50, neck", "mask_rcnn_rednet50", {"neck": "involution"}, 40.8, 36.4, (38.4, 35.1), _AUTHORS),
)


@dataclass
class Measurement:
    """Cost of a system: trained and all parameters, multiply-adds of the `Workload`, its median time in seconds with
    the quartiles, and the growth of peak memory in bytes."""

    title: str
    trained: int
    parameters: int
    multiply_adds: int
    seconds: float = 0.0
    quartiles: tuple[float, float] = (0.0, 0.0)
    peak: int = 0


class Workload:
    """One image through a detector: backbone, pyramid, proposal network, box head on 1000 proposals, mask head on 100.

    The proposals are the same for every system: how many proposals an untrained network finds says nothing about its
    cost.

    Args:
        size: height and width of the image.
        device: where it runs.
        proposals, masks: how many.
    """

    def __init__(
        self, size: tuple[int, int], device: str = "cpu", proposals: int = PROPOSALS, masks: int = MASKS
    ) -> None:
        draw = torch.Generator().manual_seed(0)
        height, width = size
        self.size, self.masks = size, masks
        self.image = torch.rand(1, 3, height, width, generator=draw).to(device)
        corners = torch.rand(proposals, 2, 2, generator=draw) * torch.tensor([width, height])
        self.boxes = torch.cat([corners.amin(1), corners.amax(1)], 1).to(device)

    def __call__(self, model: nn.Module) -> Tensor:
        """Mask logits (masks, classes, 28, 28)."""
        heads: Any = model.roi_heads
        features = model.backbone(self.image)  # type: ignore[operator]
        model.rpn.head(list(features.values()))  # type: ignore[operator, union-attr]
        heads.box_predictor(heads.box_head(heads.box_roi_pool(features, [self.boxes], [self.size])))
        regions = heads.mask_roi_pool(features, [self.boxes[: self.masks]], [self.size])
        return heads.mask_predictor(heads.mask_head(regions))


def measure(
    workload: Workload,
    systems: Sequence[System] = SYSTEMS,
    repeats: int = 5,
    build: Callable[..., nn.Module] = create_model,
) -> list[Measurement]:
    """Measure ``systems`` by turns in this process; peak memory of each in a process of its own on a CPU.

    Raises:
        RecipeError: a process that measured memory failed.
    """
    device = workload.image.device
    on_cpu = device.type == "cpu"
    peaks = []
    # First: a process can be forked only as long as no threads compute.
    for system in systems if on_cpu else ():
        try:
            peaks.append(forked(_peak_of_a_pass, workload, system, build))
        except ChildProcessError as error:
            raise RecipeError(f"{system.title}: the process that measured memory failed") from error
    models = [build(system.model, **system.options).eval().to(device) for system in systems]
    results = []
    with torch.inference_mode():
        for index, (system, model) in enumerate(zip(systems, models, strict=True)):
            with FlopCounterMode(display=False) as counter:
                output = workload(model)
            if not output.isfinite().all():
                raise RecipeError(f"{system.title}: the result is not finite")
            sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
            trained, everything = sum(size for size, needed in sizes if needed), sum(size for size, _ in sizes)
            results.append(Measurement(system.title, trained, everything, counter.get_total_flops() // 2))
            results[-1].peak = peaks[index] if on_cpu else device_peak(partial(workload, model), device)
        calls = {str(index): partial(workload, model) for index, model in enumerate(models)}
        times = interleaved(calls, least=repeats, clock=clock(stopwatch(device)), warm_up=False)
    for result, taken in zip(results, times.values(), strict=True):
        spread = Spread.of(taken)
        result.seconds, result.quartiles = spread.median, (spread.low, spread.high)
    return results


def table(results: Sequence[Measurement], systems: Sequence[System] = SYSTEMS) -> Table:
    """A row for each system, costs relative to the first, beside what was published."""
    grid = Table(box=SIMPLE, pad_edge=False, title="What each system costs, and its published COCO AP")
    for column in ("", "trained", "", "multiply-adds", "", "time", "", "peak", "", "box AP", "mask AP"):
        grid.add_column(column, justify="left" if not column and not grid.columns else "right")
    grid.add_column("source")
    first = results[0]
    for result, system in zip(results, systems, strict=True):
        pairs = (
            (f"{result.trained / 1e6:.2f} M", result.trained / first.trained),
            (f"{result.multiply_adds / 1e9:.1f} G", result.multiply_adds / first.multiply_adds),
            (f"{1e3 * result.seconds:.0f} ms", result.seconds / first.seconds),
            (f"{result.peak / 2**20:.0f} MiB", result.peak / first.peak),
        )
        costs = [text for value, ratio in pairs for text in (value, f"{100 * (ratio - 1):+.0f}%")]
        grid.add_row(result.title, *costs, *_published(system), system.source)
    return grid


def run(output: Path, size: tuple[int, int], repeats: int, device: str = "cpu") -> None:
    """Measure, print a table, and write systems.json, systems.csv and systems.png to ``output``.

    Raises:
        RecipeError: the device is not there, or a size is not positive.
    """
    if min(*size, repeats) < 1:
        raise RecipeError(f"size and repeats are {size} and {repeats}, expected positive numbers")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise RecipeError(f"--device is {device}, expected cpu on a machine without a GPU that PyTorch can use")
    results = measure(Workload(size, device), SYSTEMS, repeats)
    console = Console(width=None if os.isatty(1) else 150)
    console.print(table(results))
    name = torch.cuda.get_device_name() if device.startswith("cuda") else processor_name()
    console.print(
        f"One image of {size[0]} x {size[1]}, {PROPOSALS} proposals, {MASKS} masks, float32, {name}, "
        f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}; median of {repeats}. In brackets the AP of "
        "Mask R-CNN, ResNet-50-FPN, in the same source."
    )
    rows = [
        asdict(result) | {"box_ap": system.box_ap, "mask_ap": system.mask_ap, "source": system.source}
        for result, system in zip(results, SYSTEMS, strict=True)
    ]
    output.mkdir(parents=True, exist_ok=True)
    setting = {"size": size, "device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    (output / "systems.json").write_text(json.dumps({**setting, "systems": rows}, indent=1) + "\n")
    with (output / "systems.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    plots.costs(
        [result.title for result in results],
        {
            "Trained parameters": [result.trained for result in results],
            "Multiply-adds": [result.multiply_adds for result in results],
            "Time": [result.seconds for result in results],
            "Peak memory": [result.peak for result in results],
        },
        output / "systems.png",
    )
    console.print(f"{output}/systems.json, systems.csv, systems.png")


def _published(system: System) -> tuple[str, str]:
    box, mask = f"{system.box_ap:.1f}", f"{system.mask_ap:.1f}"
    if system.baseline is None:
        return box, mask
    return f"{box} ({system.baseline[0]:.1f})", f"{mask} ({system.baseline[1]:.1f})"


def _peak_of_a_pass(workload: Workload, system: System, build: Callable[..., nn.Module]) -> int:
    """Growth of the peak of memory over the network's own parameters."""
    with torch.inference_mode():
        model = build(system.model, **system.options).eval()
        return peak_growth(lambda: workload(model))
