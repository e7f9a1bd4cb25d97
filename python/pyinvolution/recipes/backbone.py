"""Weights for the backbone of a network that has more than one."""

import re

from torch import nn

from pyinvolution.models import load_official
from pyinvolution.recipes.errors import RecipeError
from pyinvolution.recipes.recipe import check_fit, read_weights

__all__ = ["load_backbone"]


def load_backbone(backbone: nn.Module, path: str) -> None:
    """Load ``backbone`` from a classifier, detector or segmentation model, official or of this library.

    Raises:
        RecipeError: there is no such file, or it does not fit.
    """
    field = f"model.backbone_weights: {path}"
    state = read_weights(path, "model.backbone_weights")
    bare = {re.sub(r"^(module\.|net\.)?(backbone\.(body\.)?)?", "", key): value for key, value in state.items()}
    if any(re.match(r"stem\.\d", key) for key in bare):
        try:
            load_official(backbone, state)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"{field} does not fit this model: {error}") from error
        return
    ours = {key: value for key, value in bare.items() if key in backbone.state_dict()}
    check_fit(ours, backbone, field)
    backbone.load_state_dict(ours)
