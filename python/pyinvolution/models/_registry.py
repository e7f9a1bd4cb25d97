"""Models by name."""

import re
from collections.abc import Callable
from difflib import get_close_matches
from fnmatch import fnmatch
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

from torch import nn

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

# Modules of this package whose models need torchvision; imported when a name is looked for.
WITH_TORCHVISION: tuple[str, ...] = ("detection", "resnet_blocks", "segmentation")

OF_TIMM = "timm/"
"""How names of timm's models begin."""

_builders: dict[str, Callable[..., nn.Module]] = {}
_listed: set[str] = set()
_digits = re.compile(r"(\d+)")


def register_model(builder: Builder, *, listed: bool = True) -> Builder:
    """Decorator: offer ``builder`` (keyword arguments -> module) to `create_model` under its own name.

    A builder that has required arguments is registered with ``listed=False``, so that everything in
    `list_models` can be created from only its name.
    """
    name = builder.__name__
    if name in _builders:
        raise ValueError(f"a model named {name!r} is registered already, by {_builders[name].__module__}")
    _builders[name] = builder
    if listed:
        _listed.add(name)
    return builder


def create_model(name: str, num_classes: int | None = None, *, pretrained: bool = False, **kwargs) -> nn.Module:
    """Build a model with fresh parameters, or with published ones.

    Args:
        name: one of `list_models`, or ``"rednet"``, which takes ``layers=(blocks of stage 1, ...)``; or a model of
            timm, ``"timm/resnet50"``, to compare with.
        num_classes: classes of the data, None for the model's default (ImageNet's 1000 for classifiers); 0 makes a
            classifier return pooled features. A detector counts the background too.
        pretrained: load the ImageNet weights that PaddleClas publishes for ``rednet26`` to ``rednet152`` (downloaded
            once, see `load_published`). With another ``num_classes`` than 1000 the classifier stays fresh. The
            attribute ``weights`` then says how images are to be prepared, and the names of the classes. For a model of
            timm as there.
        kwargs: further arguments of the model's class, e.g. `RedNet`.

    Returns:
        The model; its attribute ``model_config`` holds the arguments.

    Raises:
        ValueError: no model has this name, or an argument is out of range; there are no weights, or none that fit; timm
            is not installed.
        TypeError: the class has no such argument.
        ConnectionError: the weights cannot be downloaded.
    """
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    if str(name).startswith(OF_TIMM):
        return _create_of_timm(name, pretrained, kwargs)
    _import_all()
    if name not in _builders:
        close = get_close_matches(str(name), _builders)
        hint = f"did you mean {close[0]!r}? " if close else ""
        known = ", ".join(sorted(_builders))
        raise ValueError(f"name is {name!r}: {hint}expected one of {known}{_missing()}")
    if pretrained:
        from pyinvolution.models.published import PUBLISHED, load_published  # which need RedNet, which needs this file

        if name not in PUBLISHED:
            raise ValueError(f"pretrained is True for {name!r}, expected a model with weights: {', '.join(PUBLISHED)}")
    model = _builders[name](**kwargs)
    model.model_config = {"name": name, **kwargs}  # type: ignore[assignment]
    if pretrained:
        load_published(model, name, head=num_classes in (None, PUBLISHED[name].num_classes))
    return model


def _create_of_timm(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"name is {name!r}, which needs timm: pip install timm") from error
    bare = name.removeprefix(OF_TIMM)
    if not timm.is_model(bare):
        close = get_close_matches(bare, timm.list_models())
        hint = f", such as {OF_TIMM}{close[0]}" if close else ""
        raise ValueError(f"name is {name!r}, expected a model of timm{hint}")
    model: nn.Module = timm.create_model(bare, pretrained=pretrained, **kwargs)
    model.model_config = {"name": name, **kwargs}  # type: ignore[assignment]
    return model


def list_models(pattern: str = "*") -> list[str]:
    """Names that match a shell-style ``pattern``, in natural order; each can be created from only its name."""
    _import_all()
    names = (name for name in _listed if fnmatch(name, pattern))
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in _digits.split(name)])


def _import_all() -> None:
    if not _missing():
        for module in WITH_TORCHVISION:
            import_module(f"pyinvolution.models.{module}")


def _missing() -> str:
    return "" if find_spec("torchvision") else "; detection and segmentation need torchvision"
