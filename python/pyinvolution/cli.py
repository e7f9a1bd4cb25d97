"""The command ``pyinvolution``. Everything it needs beyond torch is imported by the subcommand that needs it."""

import argparse
import shlex
import sys
from collections.abc import Sequence

from pyinvolution import __version__, cmake_prefix_path, commands, openvino

TRAINING = {
    "fit": "train a model: pyinvolution fit --config imagenet/rednet50.yaml --data.root DIR",
    "validate": "evaluate a checkpoint: pyinvolution validate --ckpt_path FILE --data.root DIR",
    "predict": "apply a checkpoint to images: pyinvolution predict --ckpt_path FILE --data.predict_root DIR",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line ``argv``, by default that of the process.

    Exits with 1 if training diverged or the demo missed its target, 2 after wrong input or where a file cannot be read
    or written, 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    from pyinvolution.recipes.errors import RecipeError, TrainingDiverged

    try:
        if arguments and arguments[0] in TRAINING:
            from pyinvolution.recipes import cli

            cli.run(arguments)
        else:
            sys.exit(_run(arguments))
    except (RecipeError, TrainingDiverged, OSError) as error:
        if debug:
            raise
        name = " ".join(["pyinvolution", *arguments[:1]])
        print(f"{name}: error: {_one_line(error)} (--debug shows where)", file=sys.stderr)
        sys.exit(1 if isinstance(error, TrainingDiverged) else 2)
    except ModuleNotFoundError as error:
        if debug or (error.name or "").startswith("pyinvolution"):
            raise
        print(f'this command needs more packages ({error}): pip install "pyinvolution[train]"', file=sys.stderr)
        sys.exit(2)


def _one_line(error: BaseException) -> str:
    text = str(error)
    if text.startswith("Caught ") and "Traceback" in text:  # from a process that loads data
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())


class _CMakeDir(argparse.Action):
    """Not "version", which breaks long lines."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        print(cmake_prefix_path)
        parser.exit()


class _OpenVINOExtension(argparse.Action):
    """The folder alone where another program reads it, as ``cmake -S "$(...)"`` does."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        folder = openvino.source_path()
        print(folder)
        if sys.stdout.isatty():
            print(
                "\nThe source of the extension, which has to be built for the OpenVINO that loads it:\n\n"
                "  pip install openvino cmake\n"
                f"  cmake -S {shlex.quote(folder)} -B build/openvino\n"
                "  cmake --build build/openvino\n\n"
                'Then ov.Core().add_extension("build/openvino/libpyinvolution_openvino.so"), or\n'
                '"build/openvino/libpyinvolution_openvino_bf16.so" to compute in bfloat16.'
            )
        parser.exit()


def _run(arguments: list[str]) -> int | None:
    parser = argparse.ArgumentParser(
        "pyinvolution",
        description="Involution for PyTorch: training recipes, data and a demonstration.",
        epilog="COMMAND --help tells more; --debug adds a traceback to an error.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "--cmake-dir",
        action=_CMakeDir,
        nargs=0,
        default=argparse.SUPPRESS,
        help="print what CMAKE_PREFIX_PATH needs, and exit",
    )
    parser.add_argument(
        "--openvino-extension",
        action=_OpenVINOExtension,
        nargs=0,
        default=argparse.SUPPRESS,
        help="print the folder of the extension for OpenVINO and how to build it, and exit",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in TRAINING.items():
        subparsers.add_parser(name, help=text)
    modules = commands.find()
    for name, module in modules.items():
        text = module.__doc__.strip().splitlines()[0].rstrip(".")
        module.configure(subparsers.add_parser(name, help=text[0].lower() + text[1:], description=module.__doc__))
    options = parser.parse_args(arguments)
    return modules[options.command].main(options)
