"""Write a model for deployment: a torch.export archive, an AOTInductor package, or ONNX."""

import argparse

from pyinvolution.export import FORMATS, export, load_model

__all__ = ["configure", "main"]

DTYPES = ("float32", "float16", "bfloat16")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="name (rednet50), checkpoint of a recipe, or folder of save_pretrained"
    )
    parser.add_argument("--format", choices=[*FORMATS], default="pt2", help="default: pt2")
    parser.add_argument("--output", metavar="FILE", help="default: the model's name in the working directory")
    parser.add_argument("--weights", metavar="FILE", help="for a name: a checkpoint, ours or of the authors' code")
    parser.add_argument("--num-classes", type=int, help="for a name; default: the model's own")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(224, 224), metavar=("H", "W"), help="of the example image"
    )
    parser.add_argument("--static", action="store_true", help="fix batch (2) and size instead of leaving them free")
    parser.add_argument("--plain", action="store_true", help="keep norms and epilogues apart: do not optimize first")
    parser.add_argument(
        "--device", default="cpu", help="cpu or cuda; an AOTInductor package runs on this kind of device"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument("--opset", type=int, default=20, help="of ONNX, at least 18; default: 20")
    parser.add_argument(
        "--custom-ops",
        action="store_true",
        help="in ONNX, call the involutions by name, for engines that have a kernel of it; other engines run standard "
        "operations as before",
    )


def main(options: argparse.Namespace) -> None:
    import warnings
    from pathlib import Path

    import torch

    from pyinvolution.recipes.errors import RecipeError

    warnings.filterwarnings("ignore", category=DeprecationWarning)
    output = options.output or Path(options.model).stem + FORMATS[options.format].suffix
    try:
        model = load_model(options.model, options.weights, options.num_classes)
        model = model.to(options.device, getattr(torch, options.dtype))
        batch = 1 if hasattr(model, "transform") else 2
        example = torch.rand(batch, 3, *options.size, dtype=getattr(torch, options.dtype), device=options.device)
        print(
            export(
                model,
                output,
                options.format,
                example,
                dynamic=not options.static,
                optimize=not options.plain,
                opset=options.opset,
                custom_ops=options.custom_ops,
            )
        )
    except (ValueError, RuntimeError) as error:
        raise RecipeError(" ".join(str(error).split())) from error
