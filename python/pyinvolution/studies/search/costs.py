"""What a network costs: multiply-adds, and time on this machine as the sum of a table of measured layers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pyinvolution.inference import optimize_for_inference
from pyinvolution.studies.files import read_json, write_json
from pyinvolution.studies.search.space import Architecture, SearchSpace, StageChoice, key
from pyinvolution.studies.timing import Stopwatch, fastest_passes, processor_name, stopwatch

__all__ = ["Cost", "CostTable", "Timing", "multiply_adds"]

Shape = tuple[int, int, int]
"""Channels, height and width of an image or feature map."""

Cost = Literal["macs", "latency"]
"""Multiply-adds, or seconds."""


@dataclass(frozen=True)
class Timing:
    """How time is measured.

    Args:
        batch: images at once.
        threads: of the CPU; the trainings of a search use as many.
        seconds: spent on each layer of the table; the whole networks of the check get ten times as much.
        device: "cpu", "cuda", or "auto" for the GPU where there is one.
    """

    batch: int = 32
    threads: int = 1
    seconds: float = 0.06
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @property
    def stopwatch(self) -> Stopwatch:
        """Reads seconds, once the device has done what it was given."""
        return stopwatch(self.torch_device, processor_time=self.threads == 1)

    @property
    def torch_device(self) -> torch.device:
        name = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(name if self.device == "auto" else self.device)

    def machine(self) -> dict[str, Any]:
        """What a measured time depends on."""
        device = self.torch_device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
        return {"device": name, "torch": torch.__version__, "batch": self.batch, "threads": self.threads}


class CostTable:
    """Costs of the layers of a search space, each measured once and kept in a file.

    A layer is the stem, a block (by operator, widths, stride and resolution) or the head. Time is that of evaluation
    after `optimize_for_inference`, inside a network that runs as a whole: alone, a layer would find its weights in the
    cache. The fastest of many passes count, because other processes can only slow them down; on one CPU thread it is
    the time of the processor, which does not count them. Times in the file that come from another machine, or were
    taken otherwise, are measured anew.

    Args:
        space: the networks.
        num_classes: outputs of the head.
        image: channels, height and width of the input.
        timing: how time is measured.
        path: JSON file, read and written; None keeps the table in memory.
    """

    def __init__(
        self, space: SearchSpace, num_classes: int, image: Shape, timing: Timing, path: Path | None = None
    ) -> None:
        self.space, self.num_classes, self.image, self.timing, self.path = space, num_classes, image, timing, path
        kept = read_json(path) if path else {}
        kept = kept if kept.get("machine") == timing.machine() else {}
        self.layers: dict[str, dict[str, float]] = kept.get("layers", {})
        self.networks: dict[str, float] = kept.get("networks", {})

    def cost(self, architecture: Architecture, kind: Cost) -> float:
        """Multiply-adds, or seconds, for one image (of a batch): the sum over the layers."""
        layers = [*self._split(architecture)]
        if not all(name in self.layers for name, _ in layers):
            self._measure(architecture)
        return sum(self.layers[name][kind] for name, _ in layers)

    def measured(self, architecture: Architecture) -> float:
        """Seconds for one image (of a batch) of the whole network."""
        name = key(self.space.encode(architecture))
        if name not in self.networks:
            model = self.space.to_model(architecture, self.num_classes)
            (self.networks[name],) = self._seconds([model], 10 * self.timing.seconds)
            self._save()
        return self.networks[name]

    def fill(self) -> None:
        """Measure every layer of the space."""
        for operator in self.space.operators:
            for position in range(max(len(stage.widths) for stage in self.space.stages)):
                architecture = tuple(
                    StageChoice(
                        stage.widths[min(position, len(stage.widths) - 1)],
                        (operator if operator in offered else offered[0],) * stage.depths[-1],
                    )
                    for stage, offered in zip(self.space.stages, self.space.stage_operators, strict=True)
                )
                self.cost(architecture, "macs")

    def _split(self, architecture: Architecture) -> Iterator[tuple[str, Shape]]:
        """Name and input of every layer."""
        height, width = (ceil(size / 2) for size in self.image[1:])
        yield f"stem on {_text(self.image)}", self.image
        if self.space.stem == "imagenet":
            height, width = ceil(height / 2), ceil(width / 2)
        channels = self.space.stem_channels
        for index, (choice, stage) in enumerate(zip(architecture, self.space.stages, strict=True)):
            stride = stage.stride or min(index + 1, 2)
            for operator in choice.operators:
                shape = (channels, height, width)
                name = f"{operator} at width {choice.width} to {stage.channels}, stride {stride}, on {_text(shape)}"
                yield name, shape
                channels, height, width = stage.channels, ceil(height / stride), ceil(width / stride)
                stride = 1
        shape = (channels, height, width)
        yield f"head on {_text(shape)}", shape

    def _measure(self, architecture: Architecture) -> None:
        model: Any = self.space.to_model(architecture, self.num_classes).eval()
        parts = [
            nn.Sequential(model.stem, model.pool),
            *(block for stage in model.stages for block in stage),
            nn.Sequential(model.global_pool, model.head),
        ]
        layers = [*self._split(architecture)]
        # What a call costs on its own, which a whole network pays only once.
        *seconds, call = self._seconds([*parts, nn.Identity()], len(layers) * self.timing.seconds)
        for (name, shape), part, taken in zip(layers, parts, seconds, strict=True):
            if name not in self.layers:
                self.layers[name] = {"macs": multiply_adds(part, shape), "latency": max(taken - call, 0.0)}
        self._save()

    def _seconds(self, parts: Sequence[nn.Module], budget: float) -> list[float]:
        """For one image (of a batch), of each of the parts, which together are a network."""
        device = self.timing.torch_device
        shape = (self.timing.batch, *self.image)
        images = features = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
        network = []
        with torch.inference_mode():
            for part in parts:
                network.append(optimize_for_inference(part.to(device).eval(), features))
                features = network[-1](features)
            with _threads(self.timing.threads):
                seconds = fastest_passes(network, images, self.timing.stopwatch, budget)
        return [taken / self.timing.batch for taken in seconds]

    def _save(self) -> None:
        if self.path:
            content = {"machine": self.timing.machine(), "layers": self.layers, "networks": self.networks}
            write_json(self.path, content)


def multiply_adds(model: nn.Module, image: Shape) -> int:
    """Multiply-adds of convolutions, involutions and products for one image (channels, height, width)."""
    weight = next(model.parameters())
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.eval()(torch.zeros(1, *image, device=weight.device))
    return counter.get_total_flops() // 2


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))
