"""Train a small RedNet on handwritten digits, in about two minutes."""

import argparse

__all__ = ["configure", "main"]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="runs/demo", metavar="DIR", help="for data, checkpoints and pictures")
    parser.add_argument("--target", type=float, default=98.0, help="accuracy in percent below which the demo fails")
    parser.add_argument("--max-epochs", type=int, help="instead of those of digits/rednet.yaml")


def main(options: argparse.Namespace) -> int:
    from pyinvolution.studies import demo

    return demo.run(options.output, options.target, options.max_epochs)
