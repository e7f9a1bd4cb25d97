"""What a search chooses from: depth, width and the operator of every block, for each stage of a residual network."""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import prod
from numbers import Integral
from typing import Any

import torch
from torch import nn

from pyinvolution.models import create_model
from pyinvolution.models.searchable import parse_operator

__all__ = ["OPERATORS", "Architecture", "Code", "SearchSpace", "StageSpace"]

OPERATORS = ("conv3", *(f"inv{kernel}x{group}" for kernel in (3, 5, 7, 9) for group in (8, 16, 32)))
"""3x3 convolution, and involutions of every kernel size and group width."""

Code = tuple[int, ...]
"""An architecture as integers: for each stage the indices of its depth, its width and the operator of each block it may
have. Blocks beyond the depth have 0."""


@dataclass(frozen=True)
class StageChoice:
    """A stage of an architecture: channels inside its blocks, and the operator of every block."""

    width: int
    operators: tuple[str, ...]


Architecture = tuple[StageChoice, ...]
"""A network of the space, stage by stage."""


@dataclass(frozen=True)
class StageSpace:
    """Choices of a stage.

    Args:
        channels: of its output, which are not searched.
        widths: channels inside its blocks.
        depths: numbers of blocks.
        stride: of its first block; None for 1 in the first stage and 2 in the others.
    """

    channels: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    stride: int | None = None

    def __post_init__(self) -> None:
        for name in ("widths", "depths"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not all(isinstance(value, int) for value in values):
                raise TypeError(f"{name} is {values!r}, expected a list of ints")
            if not values or sorted({*values}) != list(values) or values[0] < 1:
                raise ValueError(f"{name} of a stage is {list(values)}, expected positive numbers in ascending order")


@dataclass(frozen=True)
class SearchSpace:
    """All networks that `create_model("searchable")` builds from the choices of each stage.

    A stage offers those operators whose groups divide all of its widths, so that every combination of its choices
    is a network, and two codes with the same entries for its blocks are the same network.

    Args:
        stages: the choices of each stage.
        operators: ``"conv3"`` and involutions such as ``"inv7x16"`` (7 x 7, 16 channels a group).
        stem, stem_channels, reduction: as in `pyinvolution.models.SearchableNet`.

    Raises:
        ValueError: choices are missing or repeated, or a stage offers no operator.
    """

    stages: tuple[StageSpace, ...]
    operators: tuple[str, ...] = OPERATORS
    stem: str = "imagenet"
    stem_channels: int = 64
    reduction: int = 4

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages is empty, expected at least one stage")
        if len({*self.operators}) != len(self.operators):
            raise ValueError(f"operators are {', '.join(self.operators)}, expected each only once")
        for index, (stage, operators) in enumerate(zip(self.stages, self.stage_operators, strict=True)):
            if not operators:
                raise ValueError(
                    f"widths of stages[{index}] are {list(stage.widths)}, expected multiples of the channels in a "
                    "group of at least one operator"
                )
        with torch.device("meta"):
            self.to_model(self.largest())  # for what it says of the other arguments

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SearchSpace":
        """The space of a configuration: the arguments as plain mappings and lists, as `to_dict` gives them.

        Raises:
            TypeError: there is no such argument, or one has the wrong type.
            ValueError: as of the class.
        """
        tuples: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        stages = tuples.get("stages", ())
        if not isinstance(stages, tuple) or not all(isinstance(stage, Mapping) for stage in stages):
            raise TypeError(f"stages is {stages!r}, expected a list of mappings")
        built = []
        for stage in stages:
            try:
                values = {name: tuple(v) if isinstance(v, list) else v for name, v in stage.items()}
                built.append(StageSpace(**values))  # type: ignore[arg-type]  # it checks the types
            except TypeError as error:
                raise TypeError(f"stages: {_plain(error)}") from error
        try:
            return cls(**{**tuples, "stages": tuple(built)})
        except TypeError as error:
            raise TypeError(_plain(error)) from error

    def to_dict(self) -> dict[str, Any]:
        """Plain mappings and lists, which `from_dict` takes."""
        return json.loads(json.dumps(asdict(self)))

    @cached_property
    def stage_operators(self) -> tuple[tuple[str, ...], ...]:
        """The operators that each stage offers."""

        def fits(operator: str, stage: StageSpace) -> bool:
            involution = parse_operator(operator)
            return involution is None or not any(width % involution[1] for width in stage.widths)

        return tuple(tuple(name for name in self.operators if fits(name, stage)) for stage in self.stages)

    @cached_property
    def genes(self) -> dict[str, int]:
        """Entries of a code in order: name and number of choices."""
        genes: dict[str, int] = {}
        for index, (stage, operators) in enumerate(zip(self.stages, self.stage_operators, strict=True), 1):
            genes |= {f"depth{index}": len(stage.depths), f"width{index}": len(stage.widths)}
            genes |= {f"operator{index}.{block + 1}": len(operators) for block in range(stage.depths[-1])}
        return genes

    def __len__(self) -> int:
        """Number of different networks."""
        return prod(
            len(stage.widths) * sum(len(operators) ** depth for depth in stage.depths)
            for stage, operators in zip(self.stages, self.stage_operators, strict=True)
        )

    def sample(self, generator: random.Random, by_kind: bool = False) -> Architecture:
        """Uniform over depth and width of each stage and over the operators of each of its blocks.

        With ``by_kind``, convolution and involution have the same chance in every block, whatever the number of
        involutions.
        """
        architecture = []
        for stage, operators in zip(self.stages, self.stage_operators, strict=True):
            kinds = [operators]
            if by_kind and len(operators) > 1 and "conv3" in operators:
                kinds = [("conv3",), tuple(name for name in operators if name != "conv3")]
            width, depth = generator.choice(stage.widths), generator.choice(stage.depths)
            chosen = tuple(generator.choice(generator.choice(kinds)) for _ in range(depth))
            architecture.append(StageChoice(width, chosen))
        return tuple(architecture)

    def encode(self, architecture: Architecture) -> Code:
        """The code of an architecture.

        Raises:
            ValueError: the space does not hold it.
        """
        if len(architecture) != len(self.stages):
            raise ValueError(f"the architecture has {len(architecture)} stages, expected {len(self.stages)}")
        code: list[int] = []
        for index, (choice, stage, operators) in enumerate(
            zip(architecture, self.stages, self.stage_operators, strict=True)
        ):
            depth = len(choice.operators)
            for name, value, allowed in (
                ("depth", depth, stage.depths),
                ("width", choice.width, stage.widths),
                *(("operator", operator, operators) for operator in choice.operators),
            ):
                if value not in allowed:
                    raise ValueError(f"{name} of stage {index} is {value!r}, expected one of {list(allowed)}")
            code += [stage.depths.index(depth), stage.widths.index(choice.width)]
            code += [operators.index(operator) for operator in choice.operators] + [0] * (stage.depths[-1] - depth)
        return tuple(code)

    def decode(self, code: Code) -> Architecture:
        """The architecture of a code; what it says of blocks beyond the depth is ignored.

        Raises:
            TypeError: an entry is not an integer.
            ValueError: the code has another length, or an entry out of range.
        """
        if len(code) != len(self.genes):
            raise ValueError(f"the code has {len(code)} entries, expected {len(self.genes)}")
        for value, (name, count) in zip(code, self.genes.items(), strict=True):
            if not isinstance(value, Integral):
                raise TypeError(f"{name} of the code is {value!r}, expected an int")
            if not 0 <= value < count:
                raise ValueError(f"{name} of the code is {value}, expected 0 to {count - 1}")
        entries = iter(code)
        architecture = []
        for stage, operators in zip(self.stages, self.stage_operators, strict=True):
            depth, width = stage.depths[next(entries)], stage.widths[next(entries)]
            chosen = [operators[next(entries)] for _ in range(stage.depths[-1])]
            architecture.append(StageChoice(width, tuple(chosen[:depth])))
        return tuple(architecture)

    def neighbours(self, architecture: Architecture) -> Iterator[Architecture]:
        """All networks that differ in one choice: a block's operator, a stage's width, or its depth by one step.

        The blocks that a deeper neighbour adds have one operator, any of the stage's.
        """
        self.encode(architecture)
        for index, (choice, stage, operators) in enumerate(
            zip(architecture, self.stages, self.stage_operators, strict=True)
        ):
            changed = [replace(choice, width=width) for width in stage.widths if width != choice.width]
            for block, present in enumerate(choice.operators):
                before, after = choice.operators[:block], choice.operators[block + 1 :]
                changed += [
                    replace(choice, operators=(*before, other, *after)) for other in operators if other != present
                ]
            for less, more in pairwise(stage.depths):
                if more == len(choice.operators):
                    changed.append(replace(choice, operators=choice.operators[:less]))
                if less == len(choice.operators):
                    changed += [
                        replace(choice, operators=choice.operators + (added,) * (more - less)) for added in operators
                    ]
            for other in changed:
                yield (*architecture[:index], other, *architecture[index + 1 :])

    def largest(self, operator: str | None = None) -> Architecture:
        """Full depth and width, with one operator everywhere; None for each stage's first."""
        return tuple(
            StageChoice(stage.widths[-1], (operator or operators[0],) * stage.depths[-1])
            for stage, operators in zip(self.stages, self.stage_operators, strict=True)
        )

    def to_options(self, architecture: Architecture) -> dict[str, Any]:
        """Arguments of `create_model("searchable")`, of plain types: ``model.options`` of a training configuration."""
        stages = []
        for choice, stage in zip(architecture, self.stages, strict=True):
            entry = {"channels": stage.channels, "width": choice.width, "operators": [*choice.operators]}
            stages.append(entry if stage.stride is None else entry | {"stride": stage.stride})
        shared = {name: getattr(self, name) for name in ("stem", "stem_channels", "reduction")}
        return shared | {"stages": stages}

    def to_model(self, architecture: Architecture, num_classes: int | None = None, **kwargs: Any) -> nn.Module:
        """The network with fresh parameters; ``kwargs`` as of `pyinvolution.models.SearchableNet`."""
        return create_model("searchable", num_classes, **self.to_options(architecture), **kwargs)


def _plain(error: TypeError) -> str:
    """What Python says of wrong arguments, without the name of the class."""
    return str(error).split("__init__() ")[-1]


def key(code: Code) -> str:
    """A code as a name of files and entries."""
    return "-".join(map(str, code))


def describe(architecture: Architecture) -> str:
    """One line: width and operators of every stage."""
    return " | ".join(f"{choice.width}: {' '.join(choice.operators)}" for choice in architecture)


def involution_share(architecture: Architecture) -> float:
    """Share of the blocks that are involutions."""
    operators = [operator for choice in architecture for operator in choice.operators]
    return sum(parse_operator(operator) is not None for operator in operators) / len(operators)
