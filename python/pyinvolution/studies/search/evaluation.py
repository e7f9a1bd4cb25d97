"""Accuracy of networks with the weights of a supernet."""

from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from pyinvolution.studies.files import read_json, write_json
from pyinvolution.studies.search.data import Batches
from pyinvolution.studies.search.space import Architecture, key
from pyinvolution.studies.search.supernet import Supernet

__all__ = ["Evaluator"]


class Evaluator:
    """Accuracy of architectures on held-out images, each evaluated once and kept in a file.

    The images stay in memory, that of the supernet's device.

    Args:
        supernet: trained weights.
        training: batches that the statistics of the norms are computed on.
        held_out: batches that accuracy is measured on.
        path: JSON file, read and written; None keeps the accuracies in memory.
    """

    def __init__(self, supernet: Supernet, training: Batches, held_out: Batches, path: Path | None = None) -> None:
        self.supernet, self.path = supernet, path
        device = next(supernet.parameters()).device
        self.training, self.held_out = (
            [(images.to(device), targets.to(device)) for images, targets in batches] for batches in (training, held_out)
        )
        self.known: dict[str, float] = read_json(path) if path else {}

    def network(self, architecture: Architecture) -> nn.Module:
        """The architecture's own network with the weights of the supernet, and norms recalibrated for it.

        Its running statistics are means over the training batches (Guo et al., section 3.4).
        """
        weights = self.supernet.state_dict_of(architecture)
        model = self.supernet.space.to_model(architecture, self.supernet.num_classes)
        model.to(next(iter(weights.values())).device).load_state_dict(weights, strict=False)
        update_bn((images for images, _ in self.training), model)
        return model.eval()

    def __call__(self, architecture: Architecture) -> float:
        """Share of the held-out images that are classified right."""
        name = key(self.supernet.space.encode(architecture))
        if name not in self.known:
            self.known[name] = self._accuracy(self.network(architecture))
            if self.path:
                write_json(self.path, self.known)
        return self.known[name]

    @torch.no_grad()
    def _accuracy(self, model: nn.Module) -> float:
        right = sum((model(images).argmax(1) == targets).sum().item() for images, targets in self.held_out)
        return right / sum(len(targets) for _, targets in self.held_out)
