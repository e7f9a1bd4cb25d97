"""List the configurations that --config knows by a short name, or print one with all that it takes from its base."""

import argparse

__all__ = ["configure", "main"]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--print",
        metavar="NAME",
        help="write this configuration, packaged or a file, as one file to stdout: the start of a file of your own",
    )


def main(options: argparse.Namespace) -> None:
    from pyinvolution.recipes import configs

    if options.print is not None:
        print(configs.dump(configs.load(options.print)), end="")
        return
    for name, text in configs.listing():
        print(f"{name:40}{text}")
