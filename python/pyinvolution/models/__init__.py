"""Models built from involution: `create_model`, `list_models`, `RedNet`."""

from pyinvolution.models._registry import create_model, list_models, register_model
from pyinvolution.models.rednet import RedNet

__all__ = ["RedNet", "create_model", "list_models", "register_model"]
