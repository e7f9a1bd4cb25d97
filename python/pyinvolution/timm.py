"""RedNet in timm's registry: after ``import pyinvolution.timm``, ``timm.create_model`` builds it by its name.

With ``pretrained=True`` it has the published weights (`pyinvolution.models.published`), or those that a
``pretrained_cfg`` or its overlay names.

Raises:
    ImportError: timm is not installed, or is older than 1.0.12.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, is_model, register_model
from torch import Tensor, nn

from pyinvolution.models._registry import create_model, list_models
from pyinvolution.models.checkpoint import read
from pyinvolution.models.official import official_key
from pyinvolution.models.published import PUBLISHED, published_file

__all__ = ["default_cfgs"]

_NAMES = [name for name in list_models("rednet*") if not is_model(name)]
_CFG = {
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 224 / 256,
    "interpolation": "bilinear",
    "first_conv": "stem.conv1",
    "classifier": "head",
    "paper_name": "Involution: Inverting the Inherence of Convolution for Visual Recognition",
    "paper_ids": "arXiv:2103.06255",
}
default_cfgs = generate_default_cfgs(dict.fromkeys(_NAMES, _CFG))
"""Pretrained configurations by model name; timm looks for them in the module of an entry point."""


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        overlay = dict(kwargs.get("pretrained_cfg_overlay") or {})
        if pretrained and not _names_weights(kwargs.get("pretrained_cfg")) and not _names_weights(overlay):
            kwargs["pretrained_cfg_overlay"] = overlay | {"state_dict": read(published_file(PUBLISHED[name]))}
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


def _names_weights(given: Any) -> bool:
    """Whether one of timm's pretrained configurations says where the weights are."""
    values = given.to_dict() if isinstance(given, PretrainedCfg) else given
    return isinstance(values, dict) and any(
        values.get(key) for key in ("file", "url", "state_dict", "hf_hub_id", "source")
    )


def _create(name: str, in_chans: int = 3, **kwargs: Any) -> nn.Module:
    model = create_model(name, in_channels=in_chans, **kwargs)
    model.in_chans = in_chans  # type: ignore[assignment]
    return model


def _from_official(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    names = {official_key(key): key for key in [*model.state_dict(), "head.weight", "head.bias"]}
    # Files of a backbone only, such as PaddleClas's, have no prefix.
    names.update({key.removeprefix("backbone."): value for key, value in names.items()})
    return {names.get(key, key): value for key, value in state_dict.items()}


for _name in _NAMES:
    register_model(_entry_point(_name))
