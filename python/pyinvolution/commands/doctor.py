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

    from pyinvolution._library import _C
    from pyinvolution.recipes.errors import naming, require
    from pyinvolution.studies import doctor

    for device in options.device or ():
        require("--device", device, device == "cpu" or torch.cuda.is_available(), "a device that torch finds")
    if options.json is not None:
        require("--json", str(options.json), options.json.absolute().parent.is_dir(), "a file in a folder that exists")
    with naming("environment"):
        _C.forced_variant(), _C.disabled_variants(), _C.current_isa()
    return doctor.run(options.device, options.quick, options.json)
