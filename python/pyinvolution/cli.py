"""The command ``pyinvolution``. Everything it needs beyond torch is imported by the subcommand that needs it."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from pyinvolution import __version__

TRAINING = {
    "fit": "train a model: pyinvolution fit --config imagenet/rednet50.yaml --data.root DIR",
    "validate": "evaluate a checkpoint: pyinvolution validate --ckpt_path FILE --data.root DIR",
    "predict": "classify images into a CSV: pyinvolution predict --ckpt_path FILE --data.predict_root DIR",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line ``argv``, by default that of the process.

    Exits with 1 if training diverged or the demo missed its target, 2 after wrong input, 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    from pyinvolution.recipes.errors import RecipeError, TrainingDiverged

    try:
        if arguments and arguments[0] in TRAINING:
            _recipe("command").run(arguments)
        else:
            _other(arguments)
    except (RecipeError, TrainingDiverged) as error:
        if debug:
            raise
        name = " ".join(["pyinvolution", *arguments[:1]])
        print(f"{name}: error: {error} (--debug shows where)", file=sys.stderr)
        sys.exit(1 if isinstance(error, TrainingDiverged) else 2)


def _other(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "pyinvolution",
        description="Involution for PyTorch: training recipes, data and a demonstration.",
        epilog="COMMAND --help tells more; --debug adds a traceback to an error.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in TRAINING.items():
        commands.add_parser(name, help=text)
    commands.add_parser("configs", help="list the configurations that --config knows by a short name")
    data = commands.add_parser("make-data", help="write a data set as a tree of images")
    data.add_argument("name", choices=["digits"], help="digits: 1,797 handwritten digits, 32 x 32")
    data.add_argument("root", metavar="DIR", help="where train/ and val/ go")
    demo = commands.add_parser("demo", help="train a small RedNet on handwritten digits, in about two minutes")
    demo.add_argument("--output", default="runs/demo", metavar="DIR", help="for data, checkpoints and pictures")
    demo.add_argument("--target", type=float, default=98.0, help="accuracy in percent below which the demo fails")
    demo.add_argument("--max-epochs", type=int, help="instead of those of digits/rednet.yaml")
    options = parser.parse_args(arguments)
    if options.command == "configs":
        for name, text in _recipe("configs").listing():
            print(f"{name:28}{text}")
    elif options.command == "make-data":
        train, val = _recipe("digits").write_digits(options.root)
        print(f"{train} training and {val} validation images in {options.root}")
    elif options.command == "demo":
        sys.exit(_recipe("demo").run(options.output, options.target, options.max_epochs))


def _recipe(name: str) -> Any:
    try:
        return import_module(f"pyinvolution.recipes.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("pyinvolution"):
            raise
        print(f'this command needs more packages ({error}): pip install "pyinvolution[train]"', file=sys.stderr)
        sys.exit(2)
