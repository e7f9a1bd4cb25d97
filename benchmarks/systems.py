"""Whole systems on RedNet-50 against the same on ResNet-50: semantic FPN and Mask R-CNN, eager and optimized.

Semantic FPN runs on a 512 x 1024 image; Mask R-CNN on an 800 x 1280 image with 1000 proposals and 100 masks, the same
for every system. The involution neck has no twin of its own: the baseline is ResNet-50 with the convolution neck. Each
optimized model is compared with itself before it is timed.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyinvolution import optimize_for_inference
from pyinvolution.models import create_model
from pyinvolution.studies.compare_systems import Workload
from pyinvolution.studies.timing import Function, interleaved

BASELINE = "ResNet-50"
NAMES = ("RedNet-50", "RedNet-50, involution neck", BASELINE)


@dataclass(frozen=True)
class System:
    """Models by name, how to run one of them on ``size``, height and width of an image, and which of its parts torch.fx
    can trace, which are optimized; "" is the whole model."""

    name: str
    size: tuple[int, int]
    models: Callable[[], dict[str, nn.Module]]
    prepare: Callable[[tuple[int, int]], Callable[[nn.Module], Tensor]]
    parts: tuple[str, ...] = ("",)


def segmentation_models() -> dict[str, nn.Module]:
    make: Callable[..., nn.Module] = partial(create_model, "semantic_fpn")
    models = (make(backbone="rednet50"), make(backbone="rednet50", neck="involution"), make(backbone="resnet50"))
    return dict(zip(NAMES, models, strict=True))


def detection_models() -> dict[str, nn.Module]:
    make: Callable[..., nn.Module] = partial(create_model, "mask_rcnn")
    models = (make(), make(neck="involution"), create_model("mask_rcnn_resnet50"))
    return dict(zip(NAMES, models, strict=True))


def segment(size: tuple[int, int]) -> Callable[[nn.Module], Tensor]:
    image = torch.randn(1, 3, *size).to(memory_format=torch.channels_last)
    return lambda model: model(image)


def detect(size: tuple[int, int]) -> Callable[[nn.Module], Tensor]:
    workload = Workload(size)
    workload.image = workload.image.to(memory_format=torch.channels_last)
    return workload


SYSTEMS = (
    System("semantic FPN", (512, 1024), segmentation_models, segment),
    System("Mask R-CNN", (800, 1280), detection_models, detect, ("backbone", "roi_heads.mask_head")),
)


def optimize(model: nn.Module, parts: tuple[str, ...]) -> nn.Module:
    """A copy of ``model`` with optimized parts."""
    if parts == ("",):
        return optimize_for_inference(model)
    model = copy.deepcopy(model)
    for part in parts:
        model.set_submodule(part, optimize_for_inference(model.get_submodule(part)))
    return model


def systems(report: Any, threads: int, seconds: float = 15.0) -> None:
    """Rows of ``report`` for every system, eager and optimized."""
    torch.set_num_threads(threads)
    for system in SYSTEMS:
        run = system.prepare(system.size)
        eager = {name: model.eval().to(memory_format=torch.channels_last) for name, model in system.models().items()}
        optimized = {name: optimize(model, system.parts) for name, model in eager.items()}
        with torch.inference_mode():
            for name, model in eager.items():
                torch.testing.assert_close(run(optimized[name]), run(model), rtol=1e-3, atol=1e-3)
            calls: dict[str, Function] = {name: partial(run, model) for name, model in eager.items()}
            calls |= {f"{name}, optimized": partial(run, model) for name, model in optimized.items()}
            times = interleaved(calls, seconds, 3)
        height, width = system.size
        for mode in ("", ", optimized"):
            for name in NAMES[:2]:
                chosen = {name: times[f"{name}{mode}"], BASELINE: times[f"{BASELINE}{mode}"]}
                where = f"{name}, {height} x {width}, {'optimized' if mode else 'eager'}"
                report.add(f"system: {system.name}", where, threads, name, chosen)
