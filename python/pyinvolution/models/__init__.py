"""Models built from involution.

`create_model` and `list_models` find them by name, `RedNet` is their class, and `load_official` reads
checkpoints of the authors' code. `SearchableNet` has an operator of its own in every block. Where timm is installed,
they are in its registry too.
"""

from pyinvolution.models._registry import create_model, list_models, register_model
from pyinvolution.models._timm import register_when_imported
from pyinvolution.models.official import load_official, official_state_dict
from pyinvolution.models.rednet import RedNet
from pyinvolution.models.searchable import SearchableNet

__all__ = [
    "RedNet",
    "SearchableNet",
    "create_model",
    "list_models",
    "load_official",
    "official_state_dict",
    "register_model",
]

register_when_imported()
