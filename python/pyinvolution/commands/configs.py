"""List the configurations that --config knows by a short name."""

import argparse

__all__ = ["configure", "main"]


def configure(parser: argparse.ArgumentParser) -> None:
    pass


def main(options: argparse.Namespace) -> None:
    from pyinvolution.recipes import configs

    for name, text in configs.listing():
        print(f"{name:40}{text}")
