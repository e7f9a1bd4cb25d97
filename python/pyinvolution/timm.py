"""RedNet in timm's registry, without importing timm before the user does."""

import importlib.abc
import sys
import warnings
from functools import partial

from torch import Tensor, nn

from pyinvolution.models._registry import create_model, list_models
from pyinvolution.models.official import official_key

default_cfgs: dict = {}
__all__: list[str] = []


def register_when_imported() -> None:
    """Add our models to timm's registry: now if timm is imported, else as soon as it is.

    Importing timm takes seconds, which users of the operator alone should not pay; timm has no entry points.
    """
    if sys.modules.get("timm"):
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Leaves the import of timm to the other finders, and registers our models after it."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "timm":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register() -> None:
    try:
        from timm.models import generate_default_cfgs, is_model, register_model
    except ImportError as error:
        warnings.warn(f"RedNet is not available from timm.create_model: {error}", stacklevel=2)
        return
    names = [name for name in list_models("rednet*") if not is_model(name)]
    cfg = {
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 224 / 256,
        "interpolation": "bilinear",
        "first_conv": "stem.conv1",
        "classifier": "head",
        "paper_name": "Involution: Inverting the Inherence of Convolution for Visual Recognition",
        "paper_ids": "arXiv:2103.06255",
    }
    default_cfgs.update(generate_default_cfgs(dict.fromkeys(names, cfg)))
    for name in names:
        register_model(_entry_point(name))


def _entry_point(name: str):
    def build(pretrained: bool = False, **kwargs) -> nn.Module:
        from timm.models import build_model_with_cfg

        return build_model_with_cfg(
            partial(_create, name),
            name,
            pretrained,
            pretrained_filter_fn=_from_official,
            feature_cfg={"out_indices": (0, 1, 2, 3, 4)},
            **kwargs,
        )

    build.__name__ = build.__qualname__ = name
    return build


def _create(name: str, in_chans: int = 3, **kwargs) -> nn.Module:
    model = create_model(name, in_channels=in_chans, **kwargs)
    model.in_chans = in_chans  # type: ignore[assignment]
    return model


def _from_official(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    names = {official_key(key): key for key in [*model.state_dict(), "head.weight", "head.bias"]}
    return {names.get(key, key): value for key, value in state_dict.items()}
