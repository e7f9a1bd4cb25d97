"""Write a small data set in the layout of a large one."""

import argparse
from importlib import import_module

__all__ = ["configure", "main"]

# Name: help, module below pyinvolution.recipes, function (root) -> numbers of training and validation images.
DATA = {
    "cityscapes-digits": (
        "680 scenes of two photographs and digits, 128 x 256, as Cityscapes' tree",
        "segmentation.digits",
        "write_scenes",
    ),
    "coco-digits": (
        "1,200 photographs with handwritten digits on them, 160 x 160, boxes and masks, as COCO's tree",
        "detection.digits",
        "write_coco_digits",
    ),
    "digits": (
        "1,797 handwritten digits, 32 x 32, as ImageNet's tree of folders",
        "classification.digits",
        "write_digits",
    ),
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=[*DATA], help="; ".join(f"{name}: {text}" for name, (text, *_) in DATA.items()))
    parser.add_argument("root", metavar="DIR", help="where the tree goes")


def main(options: argparse.Namespace) -> None:
    _, module, function = DATA[options.name]
    train, val = getattr(import_module(f"pyinvolution.recipes.{module}"), function)(options.root)
    print(f"{train} training and {val} validation images in {options.root}")
