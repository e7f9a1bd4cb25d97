"""Measure the systems of Table 1 on one input: Mask R-CNN, the same with other blocks, and RedNet with involution."""

import argparse
from pathlib import Path

__all__ = ["configure", "main"]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, default=Path("runs/compare"), metavar="DIR", help="for table and picture"
    )
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1280), metavar=("H", "W"), help="of the image")
    parser.add_argument("--repeats", type=int, default=5, help="forward passes of each system, by turns")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")


def main(options: argparse.Namespace) -> None:
    from pyinvolution.studies import compare_systems

    compare_systems.run(options.output, tuple(options.size), options.repeats, options.device)
