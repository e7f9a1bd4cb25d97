"""Compare recipes from data to table, over several seeds; goes on where it stopped: pyinvolution study camvid."""

import argparse
from pathlib import Path
from typing import Any

__all__ = ["configure", "main"]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="cifar10-small, cifar10-large, cifar10-groups, cifar10-parts, "
                        "cifar10-modern, camvid, camvid-backbones, camvid-pretrained, bccd or cityscapes-digits, or "
                        "a file of your own like theirs")  # fmt: skip
    parser.add_argument("--output", metavar="DIR", help="folder of the comparison, runs/study/NAME by default; results "
                        "that are there already are used")  # fmt: skip
    parser.add_argument("--data-root", metavar="DIR", help="instead of the recipes' data.root")
    parser.add_argument("--only", nargs="+", default=[], metavar="RUN", help="train and report these only")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="of the trainings of each recipe")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="trainings at the same time, of one thread each"
    )
    parser.add_argument("--minutes", type=float, metavar="N", help="then save what is running and stop")
    parser.add_argument("--no-tuning", action="store_true", help="train the recipes with the values that they have")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="in every recipe, e.g. trainer.max_epochs=1"
    )
    parser.add_argument(
        "--known", metavar="FILE", help="a report.json, or a published one: what it has of the same trainings is not "
        "trained again"
    )  # fmt: skip
    parser.add_argument("--report", action="store_true", help="report what is there, without training")
    parser.add_argument(
        "--results", metavar="DIR", help="write the finished table and the logs there too, e.g. benchmarks/results"
    )


def main(options: argparse.Namespace) -> None:
    import yaml

    from pyinvolution.recipes.errors import RecipeError, require
    from pyinvolution.studies.comparison import definition, pipeline

    require("--jobs", options.jobs, options.jobs >= 1, "at least 1")
    values = {}
    changes = [f"--set {setting}" for setting in options.set]
    for setting in options.set:
        name, equals, text = setting.partition("=")
        try:
            values[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {name} is {text}, expected a value in YAML") from error
        if not equals or not name:
            raise RecipeError(f"--set is {setting}, expected NAME=VALUE")
    overrides: dict[str, Any] = {"forced": definition.nested(values), "data_root": options.data_root}
    if options.seeds:
        overrides["seeds"] = options.seeds
        changes.append(f"--seeds {' '.join(map(str, options.seeds))}")
    if options.no_tuning:
        overrides["grid"] = None
        changes.append("--no-tuning")
    study = definition.read(options.name, overrides)
    name = Path(options.name).stem
    pipeline.run(
        study,
        name,
        options.output or f"runs/study/{name}",
        options.only,
        options.jobs,
        options.minutes,
        not options.report,
        options.results,
        changes,
        options.known,
    )
