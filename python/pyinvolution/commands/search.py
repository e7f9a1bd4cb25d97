"""Search for a network of convolutions and involutions: pyinvolution search --config digits.yaml."""

import argparse
from importlib.util import find_spec
from typing import Any

__all__ = ["configure", "main"]

# Option: place in the configuration, help.
OPTIONS = {
    "trials": (("trials",), "networks that the search looks at; increase it to continue an earlier search"),
    "supernet-epochs": (("supernet", "trainer", "max_epochs"), "of the supernet"),
    "epochs": (("recipe", "trainer", "max_epochs"), "of networks that are trained alone"),
    "networks": (("networks",), "trained alone for the rank correlation"),
    "opponents": (("opponents",), "random networks that the found one is compared with"),
    "seeds": (("seeds",), "trainings of each network alone"),
    "seed": (("seed",), "of the whole search"),
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="digits.yaml, or a file of your own like it")
    parser.add_argument("--output", metavar="DIR", help="folder of the search; results that are there already are used")
    parser.add_argument("--data-root", metavar="DIR", help="instead of the recipe's data.root")
    for name, (_, text) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", help=text)


def main(options: argparse.Namespace) -> None:
    from pyinvolution.recipes import configs, small_data
    from pyinvolution.recipes.errors import RecipeError

    if find_spec("optuna") is None:
        raise RecipeError('search needs optuna: pip install "pyinvolution[search]"')
    from pyinvolution.studies.search import config, pipeline

    places = {name.replace("-", "_"): place for name, (place, _) in OPTIONS.items()}
    places |= {"output": ("output",), "data_root": ("data_root",)}
    overrides: dict[str, Any] = {}
    for name, place in places.items():
        value = getattr(options, name)
        if value is not None:
            for part in reversed(place):
                value = {part: value}
            overrides = configs.merge(overrides, value)
    search = config.read(options.config, overrides)
    if search.make_data:
        small_data.write(search.make_data, search.data.get("root", "data"))
    pipeline.run(search)
