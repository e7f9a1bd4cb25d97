"""Check and time every kernel on this machine; exit status 1 and a remedy where one is wrong."""

import argparse
from pathlib import Path

__all__ = ["configure", "main"]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="fewer problems: some seconds instead of up to a minute")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write everything that was found, to attach to a report"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), action="append", help="default: the CPU, and the GPU if there is one"
    )


def main(options: argparse.Namespace) -> int:
    import torch

    from pyinvolution.recipes.errors import require
    from pyinvolution.studies import doctor

    for device in options.device or ():
        require("--device", device, device == "cpu" or torch.cuda.is_available(), "a device that torch finds")
    return doctor.run(options.device, options.quick, options.json)
