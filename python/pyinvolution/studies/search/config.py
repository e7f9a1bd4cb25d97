"""The configuration of a search, and the training runs it asks for."""

from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser

from pyinvolution.recipes import configs
from pyinvolution.recipes.errors import RecipeError, require
from pyinvolution.studies.search.costs import Cost, Timing
from pyinvolution.studies.search.space import Architecture, SearchSpace

__all__ = ["SearchConfig", "read"]

CONFIGS = Path(__file__).parent / "configs"

# What may change between two runs of the same search: how far it goes.
EXTENDABLE = ("output", "trials", "networks", "opponents", "seeds")
CLASSIFICATION, IMAGE_FOLDER = "pyinvolution.recipes.Classification", "pyinvolution.recipes.ImageFolderData"


@dataclass
class SearchConfig:
    """A search.

    Args:
        space: as of `SearchSpace.from_dict`.
        recipe: a configuration of ``pyinvolution fit`` for image classification, by which networks are trained alone;
            the search fills in ``model.name`` and ``model.options``.
        output: folder of the search.
        make_data: data of ``pyinvolution make-data`` that are written to the recipe's ``data.root`` first.
        data_root: instead of the recipe's ``data.root``.
        supernet: values of the supernet's training that replace those of the recipe.
        ranking: the same for the trainings for the rank correlation. Shorter trainings tell apart networks that all
            end near the same accuracy.
        held_out: share of the training images by which networks are chosen; ``val`` is for the comparison at the end.
        recalibration_images: training images for the statistics of the norms of a candidate.
        cost: what the search minimises together with the error.
        budget: the largest cost, as a share of the all-convolution network of full depth and width.
        trials: networks that the search looks at.
        population: networks of a generation.
        timing: how time is measured.
        networks: trained alone for the rank correlation, and timed for the check of the table.
        opponents: random networks of the found one's cost.
        seeds: trainings of every network that is trained alone.
        seed: of everything.
    """

    space: dict[str, Any]
    recipe: dict[str, Any]
    output: str = "runs/search"
    make_data: str | None = None
    data_root: str | None = None
    supernet: dict[str, Any] = field(default_factory=dict)
    ranking: dict[str, Any] = field(default_factory=dict)
    held_out: float = 0.4
    recalibration_images: int = 512
    cost: Cost = "macs"
    budget: float = 0.5
    trials: int = 150
    population: int = 25
    timing: Timing = field(default_factory=Timing)
    networks: int = 10
    opponents: int = 3
    seeds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("recalibration_images", 1),
            ("trials", 1),
            ("population", 2),
            ("networks", 3),
            ("opponents", 1),
            ("seeds", 1),
            ("seed", 0),
        ):
            require(name, getattr(self, name), getattr(self, name) >= least, f"at least {least}")
        if self.timing.batch < 1 or self.timing.threads < 1 or self.timing.seconds < 0:
            raise RecipeError(
                f"timing is {self.timing}, expected batch and threads of at least 1 and seconds of at least 0"
            )
        if self.timing.torch_device.type == "cuda" and not torch.cuda.is_available():
            raise RecipeError("timing.device is cuda, expected cpu on a machine without a GPU")
        require("budget", self.budget, self.budget > 0, "a positive number")
        try:
            self.search_space = SearchSpace.from_dict(self.space)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"space: {error}") from error
        for section, expected in (("model", CLASSIFICATION), ("data", IMAGE_FOLDER)):
            found = self.recipe.get(section, {}).get("class_path", expected)
            if found.rpartition(".")[2] != expected.rpartition(".")[2]:
                raise RecipeError(
                    f"recipe.{section}.class_path is {found}, expected {expected}: a search trains image classification"
                )

    @property
    def folder(self) -> Path:
        return Path(self.output)

    @property
    def num_classes(self) -> int:
        return _arguments(self.recipe, "model").get("num_classes", 1000)

    @property
    def data(self) -> dict[str, Any]:
        """Arguments of `ImageFolderData`."""
        given = _arguments(self.recipe, "data")
        return given | ({"root": self.data_root} if self.data_root else {})

    def training(self, architecture: Architecture) -> dict[str, Any]:
        """Configuration of ``pyinvolution fit`` for a network on all training images."""
        options = self.search_space.to_options(architecture)
        model = _arguments(self.recipe, "model") | {"name": "searchable", "options": options}
        return self._run(model, CLASSIFICATION, self.data, IMAGE_FOLDER)

    def selection_training(self, architecture: Architecture) -> dict[str, Any]:
        """Likewise by ``ranking``, validated on the training images that the search has held out."""
        config = self.training(architecture) | {"data": self._held_out}
        return configs.merge(config, _sections(self.ranking))

    def supernet_training(self) -> dict[str, Any]:
        """Likewise of the supernet."""
        model = {name: value for name, value in _arguments(self.recipe, "model").items() if name not in _ONE_NETWORK}
        model["space"] = self.search_space.to_dict()
        config = self._run(model, "pyinvolution.studies.search.OneShot", {}, "") | {"data": self._held_out}
        return configs.merge(config, _sections(self.supernet))

    @property
    def _held_out(self) -> dict[str, Any]:
        arguments = self.data | {"held_out": self.held_out}
        return {"class_path": "pyinvolution.studies.search.HeldOut", "init_args": arguments}

    def _run(self, model: dict[str, Any], model_class: str, data: dict[str, Any], data_class: str) -> dict[str, Any]:
        config = deepcopy({name: value for name, value in self.recipe.items() if name not in ("model", "data")})
        return {
            "seed_everything": self.seed,
            **config,
            "model": {"class_path": model_class, "init_args": deepcopy(model)},
            "data": {"class_path": data_class, "init_args": deepcopy(data)},
        }

    def claim(self) -> None:
        """Write the configuration to the folder, or see that the search there is the same.

        Raises:
            RecipeError: the folder holds another search.
        """
        path = self.folder / "search.yaml"
        ours = {name: value for name, value in asdict(self).items() if name != "output"}
        if path.is_file():
            theirs = yaml.safe_load(path.read_text())
            for name, value in ours.items():
                if name not in EXTENDABLE and theirs.get(name) != value:
                    raise RecipeError(
                        f"{self.folder} holds a search with another {name} (see {path}): give another --output, or "
                        "delete the folder"
                    )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(ours, sort_keys=False))


# Arguments of a recipe's model that belong to one network.
_ONE_NETWORK = ("name", "options", "init_from")


def _arguments(recipe: dict[str, Any], section: str) -> dict[str, Any]:
    values = recipe.get(section, {})
    return values.get("init_args", {}) if "class_path" in values else values


def _sections(overrides: dict[str, Any]) -> dict[str, Any]:
    """Overrides of a recipe, with the arguments of model and data where they belong."""
    result = deepcopy(overrides)
    for section in ("model", "data"):
        if section in result and "init_args" not in result[section]:
            result[section] = {"init_args": result[section]}
    return result


def read(name: str, overrides: dict[str, Any]) -> SearchConfig:
    """The configuration in a file, with the values of ``overrides`` in place of its own.

    Raises:
        RecipeError: there is no such file, or its content is wrong.
    """
    values = configs.load(name, CONFIGS)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SearchConfig)
    try:
        return SearchConfig(**parser.instantiate(parser.parse_object(configs.merge(values, overrides))).as_dict())
    except ArgumentError as error:
        raise RecipeError(f"{name}: {' '.join(str(error).split())}") from error
