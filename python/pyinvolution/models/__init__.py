"""Models built from involution.

`create_model` and `list_models` find them by name, `RedNet` is their class, `load_official` reads checkpoints of the
authors' code, `save_pretrained` and `from_pretrained` keep models on disk, and
`push_to_hub` on Hugging Face's hub. `SearchableNet` has an operator of its own
in every block. ``import pyinvolution.timm`` adds RedNet to timm's registry.
"""

from pyinvolution._moved import alias_modules
from pyinvolution.models._registry import create_model, list_models, register_model
from pyinvolution.models.hub import model_card, push_to_hub
from pyinvolution.models.official import load_official, official_state_dict
from pyinvolution.models.pretrained import from_pretrained, save_pretrained
from pyinvolution.models.rednet import RedNet
from pyinvolution.models.searchable import SearchableNet

__all__ = [
    "RedNet",
    "SearchableNet",
    "create_model",
    "from_pretrained",
    "list_models",
    "load_official",
    "model_card",
    "official_state_dict",
    "push_to_hub",
    "register_model",
    "save_pretrained",
]
alias_modules({"models.peers": "models.resnet_blocks"})
