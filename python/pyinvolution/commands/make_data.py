"""Write a small data set in the layout of a large one."""

import argparse

from pyinvolution.recipes import small_data

__all__ = ["configure", "main"]


def configure(parser: argparse.ArgumentParser) -> None:
    texts = "; ".join(f"{name}: {text}" for name, (text, *_) in small_data.DATA.items())
    parser.add_argument("name", choices=[*small_data.DATA], help=texts)
    parser.add_argument("root", metavar="DIR", help="where the tree goes")


def main(options: argparse.Namespace) -> None:
    train, val = small_data.write(options.name, options.root)
    print(f"{train} training and {val} validation images in {options.root}")
