"""Draw the predictions of two segmentation models (figure 1 of the paper), and the kernels that one has learned."""

import argparse

__all__ = ["configure", "main"]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ours", required=True, metavar="CKPT", help="checkpoint of the segmentation recipe")
    parser.add_argument("--baseline", required=True, metavar="CKPT", help="another, to compare with")
    parser.add_argument("--root", metavar="DIR", help="data in the tree of Cityscapes, instead of that of --ours")
    parser.add_argument("--images", nargs="+", default=(), metavar="NAME", help="CITY_SEQUENCE_FRAME, of the split val")
    parser.add_argument("--count", type=_positive, default=4, help="number of images, where none is named")
    parser.add_argument("--boxes", type=int, default=2, help="most regions of difference to mark in an image")
    parser.add_argument("--layers", nargs="+", default=(), metavar="NAME", help="involutions of --ours to look into")
    parser.add_argument("--groups", type=_positive, default=4, help="heat maps for each of these")
    parser.add_argument("--output", default="runs/figure", metavar="DIR", help="for the pictures")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"is {value}, expected at least 1")
    return value


def main(options: argparse.Namespace) -> None:
    from pyinvolution.studies import figure

    figure.run(**{name: value for name, value in vars(options).items() if name != "command"})
