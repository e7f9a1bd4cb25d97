"""A network whose weights serve every network of a search space, trained one path at a time.

Single-path one-shot training with uniform sampling: Guo et al., "Single Path One-Shot Neural Architecture Search with
Uniform Sampling", ECCV 2020, sections 3.1 and 3.2.
"""

import random
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyinvolution.models import register_model
from pyinvolution.models.searchable import parse_operator
from pyinvolution.recipes.classification.task import Classification
from pyinvolution.recipes.errors import RecipeError
from pyinvolution.studies.search.space import Architecture, SearchSpace, StageChoice

__all__ = ["OneShot", "Supernet"]

Sampling = Literal["operators", "kinds"]


class Supernet(nn.Module):
    """The weights that all networks of a space share, and those networks as functions of them.

    It holds one network of full depth and width with both operators in every block, a 3x3 convolution and an involution
    of the largest kernel and the most groups. A network of the space takes from it:

    - depth: the first blocks of each stage;
    - width and groups: the first channels inside a block, the first groups of the involution;
    - kernel size: the central taps.

    So nearly every step trains weights of nearly every network (weight entanglement: Chen et al., "AutoFormer", ICCV
    2021, section 3.2; central taps: Stamoulis et al., "Single-Path NAS", 2019). Batch norms share scale and shift, and
    use the statistics of the batch in training and evaluation alike, because no running average fits all paths;
    `Evaluator.network` computes those of one network.

    Args:
        space: the networks.
        num_classes: outputs of the classifier.
        in_channels: channels of the image.
        sampling: how a block's operator is drawn: "operators", uniformly from those of its stage (Guo et al., section
            3.3), or "kinds", first convolution or involution with the same chance. There each operator has weights of
            its own; here all involutions of a block share theirs, which "operators" trains up to twelve times as often
            as the convolution's, and "kinds" as often.
        kwargs: further arguments of `pyinvolution.models.SearchableNet`.

    Raises:
        ValueError: ``sampling`` is neither.
    """

    def __init__(
        self,
        space: SearchSpace,
        num_classes: int,
        in_channels: int = 3,
        *,
        sampling: Sampling = "operators",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if sampling not in ("operators", "kinds"):
            raise ValueError(f"sampling is {sampling!r}, expected 'operators' or 'kinds'")
        self.space, self.num_classes, self.by_kind = space, num_classes, sampling == "kinds"
        build = partial(
            space.to_model,
            num_classes=num_classes,
            in_channels=in_channels,
            norm_layer=partial(nn.BatchNorm2d, track_running_stats=False),
            **kwargs,
        )
        self.build = cast(Callable[[Architecture], Any], build)
        largest: list[list[StageChoice]] = []
        for stage, operators in zip(space.stages, space.stage_operators, strict=True):
            involutions = [size for size in map(parse_operator, operators) if size]
            kernel, group = (max(k for k, _ in involutions), min(g for _, g in involutions)) if involutions else (0, 0)
            names = ["conv3"] * ("conv3" in operators) + [f"inv{kernel}x{group}"] * bool(involutions)
            largest.append([StageChoice(stage.widths[-1], (name,) * stage.depths[-1]) for name in names])
        self.net: Any = self.build(tuple(choices[0] for choices in largest))
        other: Any = self.build(tuple(choices[-1] for choices in largest))
        for stage, others in zip(self.net.stages, other.stages, strict=True):
            for block, counterpart in zip(stage, others, strict=True):
                both = {_kind(module): module for module in (block.involution, counterpart.involution)}
                block.involution = nn.ModuleDict(both)

    def forward(self, input: Tensor, architecture: Architecture | None = None) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, H, W) through one network of the space.

        ``architecture`` None takes one at random, by torch's generator.
        """
        if architecture is None:
            architecture = self.space.sample(random.Random(int(torch.randint(2**62, ()))), self.by_kind)
        path = self._skeleton(architecture).train(self.training)
        # Permanently, not by functional_call, because blocks compute norms again in the backward pass.
        for name, weight in self._weights(path).items():
            module, _, own = name.rpartition(".")
            owner = path.get_submodule(module)
            delattr(owner, own)
            setattr(owner, own, weight)
        return path(input)

    @torch.no_grad()
    def state_dict_of(self, architecture: Architecture) -> dict[str, Tensor]:
        """Parameters for `SearchSpace.to_model` of the architecture, as copies. There are no statistics of norms."""
        return {name: weight.clone() for name, weight in self._weights(self._skeleton(architecture)).items()}

    def _skeleton(self, architecture: Architecture) -> nn.Module:
        with torch.device("meta"), _WithoutValues():
            return self.build(architecture)

    def _weights(self, path: nn.Module) -> dict[str, Tensor]:
        """Views of the shared weights by the names of the parameters of ``path``."""
        shared = dict(self.net.named_parameters())
        weights = {}
        for name, parameter in path.named_parameters():
            block, operator, rest = name.partition(".involution.")
            if not operator:
                weights[name] = _leading(shared[name], parameter.shape)
                continue
            module: Any = path.get_submodule(f"{block}.involution")
            source = f"{block}.involution.{_kind(module)}"
            weight = shared[f"{source}.{rest}"]
            if rest.startswith("span."):
                weights[name] = _central_taps(
                    weight, parameter.shape, self.net.get_submodule(source).kernel_size[0], module.kernel_size[0]
                )
            else:
                weights[name] = _leading(weight, parameter.shape)
        return weights


class _WithoutValues(TorchFunctionMode):
    """Leaves out random initial values, which on the meta device take ten times as long as building the modules."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        return function(*args, **(kwargs or {}))


def _kind(operator: nn.Module) -> str:
    return "conv" if isinstance(operator, nn.Conv2d) else "involution"


def _leading(weight: Tensor, shape: torch.Size) -> Tensor:
    return weight[tuple(slice(size) for size in shape)]


def _central_taps(weight: Tensor, shape: torch.Size, largest: int, kernel: int) -> Tensor:
    """Of a span's weight or bias (groups * largest^2, ...) that of fewer groups and a smaller kernel."""
    margin = (largest - kernel) // 2
    centre = slice(margin, margin + kernel)
    taps = weight.unflatten(0, (-1, largest, largest))[: shape[0] // kernel**2, centre, centre]
    return _leading(taps.flatten(0, 2), shape)


@partial(register_model, listed=False)
def supernet(space: dict[str, Any], num_classes: int, **kwargs: Any) -> Supernet:
    """The shared weights of a search space."""
    return Supernet(SearchSpace.from_dict(space), num_classes, **kwargs)


class OneShot(Classification):
    """Trains a `Supernet`: every optimizer step sees one random network of the space.

    In validation every batch goes through another random network, so ``val/top1`` is a mean over the space.

    Args:
        space: as `SearchSpace.from_dict` takes it.
        num_classes: classes of the data.
        sampling: as of `Supernet`.
        kwargs: of `Classification`.

    Raises:
        RecipeError: the space or ``sampling`` is wrong, or ``compile`` is on: every step would be compiled anew.
    """

    def __init__(
        self, space: dict[str, Any], num_classes: int = 1000, sampling: Sampling = "operators", **kwargs: Any
    ) -> None:
        if kwargs.get("compile"):
            raise RecipeError("model.compile: a supernet runs another network at every step, which cannot be compiled")
        options = {"space": space, "sampling": sampling}
        super().__init__(name="supernet", num_classes=num_classes, options=options, **kwargs)
