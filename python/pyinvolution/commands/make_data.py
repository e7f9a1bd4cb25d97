"""Write a data set in the layout of a recipe: a small one that is made here, or a published one from its files."""

import argparse

from pyinvolution.recipes import published_data, small_data

__all__ = ["configure", "main"]

VOC = "with voc: "


def configure(parser: argparse.ArgumentParser) -> None:
    made, published = small_data.DATA, published_data.DATA
    texts = [f"{name}: {text}" for name, (text, *_) in made.items()]
    texts += [f"{name} (needs --source): {text}" for name, (text, *_) in published.items()]
    parser.add_argument("name", choices=[*made, *published], metavar="NAME", help="; ".join(texts))
    parser.add_argument("root", metavar="DIR", help="where the tree goes")
    parser.add_argument("--source", metavar="PATH", help="folder or archive (tar, zip) of the published data set")
    parser.add_argument(
        "--classes", nargs="+", metavar="CLASS", help=VOC + "names in the order of their ids; all that occur by default"
    )
    parser.add_argument(
        "--splits",
        nargs="+",
        metavar="SPLIT",
        help=VOC + "files in ImageSets/Main; train, val, trainval and test by default",
    )
    parser.add_argument(
        "--difficult",
        choices=("crowd", "keep", "drop"),
        help=VOC + "what objects with this flag become; crowd (the default): neither trained on nor counted",
    )
    parser.add_argument("--unknown", choices=("error", "drop"), help=VOC + "what an object of another class is")
    parser.add_argument(
        "--first-pixel", type=int, choices=(0, 1), help=VOC + "number of the first row and column, 1 by default"
    )


def main(options: argparse.Namespace) -> None:
    from pyinvolution.recipes.errors import RecipeError

    names = ("classes", "splits", "difficult", "unknown", "first_pixel")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if given and options.name != "voc":
        raise RecipeError(f"--{next(iter(given)).replace('_', '-')} is given with {options.name}, expected it with voc")
    if options.name in small_data.DATA:
        if options.source is not None:
            raise RecipeError(f"--source is {options.source}, expected none: {options.name} is made here")
        train, val = small_data.write(options.name, options.root)
        print(f"{train} training and {val} validation images in {options.root}")
        return
    if options.source is None:
        raise RecipeError(f"{options.name} needs --source: its folder or archive as it is published")
    counts = published_data.write(options.name, options.root, options.source, **given)
    print(f"{', '.join(f'{split}: {count}' for split, count in counts.items())} images in {options.root}")
