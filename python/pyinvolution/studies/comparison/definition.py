"""What a comparison trains, and how it is described in a file."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from pyinvolution.recipes import configs
from pyinvolution.recipes.errors import RecipeError, require

__all__ = ["CONFIGS", "Definition", "Training", "nested", "read"]

CONFIGS = Path(__file__).parent / "configs"

ALWAYS: dict[str, Any] = {
    "trainer": {"enable_progress_bar": False, "enable_model_summary": False},
    "checkpoint": {"every_n_train_steps": 100},
}
"""Values of every training, which goes on from its last checkpoint where it was stopped."""


@dataclass(frozen=True)
class Training:
    """One training.

    Args:
        run: the name of its recipe in the comparison.
        label: what tells it from the others of that recipe, also the name of its folder.
        config: of ``pyinvolution fit``, but for its folder.
        values: of the tuning grid.
        seed: of everything.
        tuning: whether it only serves to choose values.
    """

    run: str
    label: str
    config: dict[str, Any]
    values: dict[str, Any]
    seed: int
    tuning: bool = False


@dataclass
class Definition:
    """A comparison.

    Args:
        runs: names and their recipes, as for ``pyinvolution fit --config``, or a mapping with a recipe as ``base`` and
            values that replace its own.
        metrics: what is collected at the end of each training; the first one decides in tuning.
        image: channels, height and width of the image for which multiply-adds are counted.
        pairs: names of a baseline and of what is compared with it.
        overrides: values that replace those of every recipe.
        seeds: of the trainings of each recipe.
        grid: for dotted names (``model.init_args.lr``) the values that tuning tries, in all combinations, the same for
            every recipe; empty for no tuning.
        tuning: values that replace those of every recipe in tuning: shorter trainings, on a part of the training data,
            and evaluated on another part of these.
        forced: values that replace all others, in tuning too.
        data_root: instead of the recipes' ``data.init_args.root``; None for these. It does not change what is compared.
    """

    runs: dict[str, str | dict[str, Any]]
    metrics: list[str]
    image: list[int]
    pairs: list[list[str]] = field(default_factory=list)
    overrides: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    grid: dict[str, list[Any]] = field(default_factory=dict)
    tuning: dict[str, Any] = field(default_factory=dict)
    forced: dict[str, Any] = field(default_factory=dict)
    data_root: str | None = None

    def __post_init__(self) -> None:
        require("runs", self.runs, bool(self.runs), "at least one name with its recipe")
        require("metrics", self.metrics, bool(self.metrics), "at least one")
        require("seeds", self.seeds, bool(self.seeds) and len(set(self.seeds)) == len(self.seeds), "different numbers")
        require("image", self.image, len(self.image) == 3 and min(self.image) > 0, "channels, height and width")
        for pair in self.pairs:
            require("pairs", pair, len(pair) == 2 and set(pair) <= self.runs.keys(), f"two of {', '.join(self.runs)}")
        for name, recipe in self.runs.items():
            base = recipe.get("base") if isinstance(recipe, dict) else recipe
            require(f"runs.{name}", recipe, isinstance(base, str), "a recipe, or a mapping with a recipe as base")
        for name, values in self.grid.items():
            require(f"grid.{name}", values, bool(values), "at least one value")
            require(f"grid.{name}", values, len(set(map(repr, values))) == len(values), "different values")
            forced = reduce(lambda value, key: value.get(key, {}), name.split("."), self.forced)
            require(name, forced, forced == {}, "no value of its own, since it is tuned (--no-tuning leaves that out)")
        if self.grid:
            require("metrics", self.metrics, not self.metrics[0].endswith("loss"), "first one of which more is better, "
                    "since it decides in tuning")  # fmt: skip
            require("tuning", self.tuning, "data" in self.tuning, "data that the final evaluation does not use")

    def part(self, runs: Collection[str]) -> "Definition":
        """The comparison of these runs alone."""
        kept = {run: recipe for run, recipe in self.runs.items() if run in runs}
        return replace(self, runs=kept, pairs=[pair for pair in self.pairs if kept.keys() >= set(pair)])

    def recipe(self, run: str, *more: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration of a run with all overrides, the later ones first in force."""
        recipe = self.runs[run]
        own = {"base": recipe} if isinstance(recipe, str) else dict(recipe)
        base = configs.load(own.pop("base"))
        place = {} if self.data_root is None else nested({"data.init_args.root": self.data_root})
        return reduce(configs.merge, (ALWAYS, self.overrides, own, *more, self.forced, place), base)

    def tunings(self, run: str) -> list[Training]:
        """Trainings that try every combination of the grid."""
        trainings = []
        for combination in product(*self.grid.values()) if self.grid else ():
            values = dict(zip(self.grid, combination, strict=True))
            label = "_".join(f"{name.rpartition('.')[2]}={value}" for name, value in values.items())
            seed = self.seeds[0]
            config = self.recipe(run, self.tuning, nested(values), {"seed_everything": seed})
            trainings.append(Training(run, f"tuning_{label}", config, values, seed, tuning=True))
        return trainings

    def trainings(self, run: str, values: Mapping[str, Any]) -> list[Training]:
        """The trainings that are compared, one for each seed, with the values that tuning has found."""
        config = self.recipe(run, nested(values))
        return [
            Training(run, f"seed{seed}", config | {"seed_everything": seed}, dict(values), seed) for seed in self.seeds
        ]


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings in mappings of values by their dotted names."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        for part in reversed(name.split(".")):
            value = {part: value}
        result = configs.merge(result, value)
    return result


def read(name: str, overrides: Mapping[str, Any]) -> Definition:
    """The comparison in a file, or the packaged one of this name, with ``overrides`` of its values (None: without it).

    Raises:
        RecipeError: there is none, or its content is wrong.
    """
    file = name if Path(name).is_file() or name.endswith(".yaml") else f"{name}.yaml"
    known = [known for known, _ in configs.listing(CONFIGS)]
    if not Path(file).is_file() and file not in known:
        names = ", ".join(each.removesuffix(".yaml") for each in known)
        raise RecipeError(f"NAME is {name}, expected a file or one of {names}")
    merged = configs.merge(configs.load(file, CONFIGS), overrides)
    values = {key: value for key, value in merged.items() if value is not None}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Definition)
    try:
        return Definition(**parser.instantiate(parser.parse_object(values)).as_dict())
    except (ArgumentError, yaml.YAMLError) as error:
        raise RecipeError(f"{name}: {' '.join(str(error).split())}") from error
