"""Involution in a network that was not written for it."""

import re
from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

from torch import nn

from pyinvolution.modules import Involution2d
from pyinvolution.stock import is_stock

__all__ = ["convert"]

Match = str | re.Pattern[str] | Callable[[str, nn.Conv2d], bool]


def convert(model: nn.Module, match: Match | None = None, **options: Any) -> nn.Module:
    """Replace 3x3 convolutions of ``model`` by involutions, in place, and keep everything else.

    This is how RedNet comes from ResNet (paper, section 4.1), for any network: those of torchvision and timm, or your
    own. The involution takes over stride, dilation, bias and output channels of the convolution (a 1x1 convolution
    follows where those differ from the input's), device, dtype and training mode; not the groups of a ResNeXt, since an
    involution mixes no channels at all. Its weights are new: the network has to be trained. Optimizers made before hold
    the old ones. A second call finds nothing to replace, and changes nothing.

    Args:
        model: any module.
        match: which 3x3 convolutions. None takes every one that an involution can replace, whose channels
            ``group_channels`` divides, which leaves out the first layer, and that is not depthwise; a shell-style
            pattern of names, e.g. ``"layer[34].*"``; a compiled regular expression, searched for in the names; or a
            function (name, convolution) -> bool. What one of these picks must be replaceable.
        options: of `Involution2d`: ``kernel_size`` (7), ``group_channels`` (16), ``reduction`` (4), ``norm_layer``, ...

    Returns:
        ``model``, or an involution if ``model`` itself is such a convolution.

    Raises:
        ValueError: nothing matches, neither a convolution nor an involution of an earlier call, or a convolution that
            ``match`` picks has a padding that changes the size, another padding than zeros, or channels that do not fit
            ``group_channels``.
        TypeError: an argument is unknown or has the wrong type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a module")
    if not (match is None or isinstance(match, (str, re.Pattern)) or callable(match)):
        raise TypeError(f"match is {match!r}, expected None, a pattern or a function")
    group_channels = options.get("group_channels", 16)
    chosen, refused, done = [], "", False
    for name, module in model.named_modules():
        if isinstance(module, Involution2d):
            done = done or callable(match) or _picks(match, name, module)
        # Subclasses, and what a user has put around a convolution, do something else with the same weights.
        if type(module) is not nn.Conv2d:
            continue
        obstacle = _obstacle(module, group_channels)
        if match is None:
            picked = not obstacle and not 1 < module.groups == module.in_channels
        elif (picked := _picks(match, name, module)) and obstacle:
            refused = refused or f"match picks {name or 'the model'}, which no involution can replace: {obstacle}"
            if module.kernel_size == (3, 3):
                raise ValueError(refused)
            picked = False
        if picked:
            chosen.append((name, module))
    if not chosen:
        if done:
            return model
        raise ValueError(refused or f"match={match!r} picks no convolution of {type(model).__name__}")
    replacements = {convolution: _involution(convolution, options) for _, convolution in chosen}
    if model in replacements:
        return replacements[model]  # type: ignore[index]
    # A module may be registered under several names.
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                setattr(parent, name, replacements[child])  # type: ignore[index]
    return model


def _picks(match: Match | None, name: str, module: Any) -> bool:
    if isinstance(match, str):
        return fnmatch(name, match)
    if isinstance(match, re.Pattern):
        return match.search(name) is not None
    return match is None or match(name, module)


def _obstacle(convolution: nn.Conv2d, group_channels: int) -> str:
    """Why no involution can stand in for ``convolution``, or an empty string."""
    if not is_stock(convolution, nn.Conv2d):
        return "it has hooks, a forward of its own or weights that are not plain tensors, which would be lost"
    for name, value, expected in (
        ("kernel_size", convolution.kernel_size, (3, 3)),
        ("padding_mode", convolution.padding_mode, "zeros"),
    ):
        if value != expected:
            return f"{name} is {value}, expected {expected}"
    if convolution.padding not in (convolution.dilation, "same"):
        return f"padding is {convolution.padding}, expected {convolution.dilation}"
    if isinstance(group_channels, int) and group_channels > 0 and convolution.in_channels % group_channels:
        return f"group_channels={group_channels} does not divide its {convolution.in_channels} channels"
    return ""


def _involution(convolution: nn.Conv2d, options: dict[str, Any]) -> Involution2d:
    taken = {
        "stride": convolution.stride,
        "dilation": convolution.dilation,
        "out_channels": convolution.out_channels,
        "bias": convolution.bias is not None,
        "device": convolution.weight.device,
        "dtype": convolution.weight.dtype,
    }
    if given := sorted(taken.keys() & options.keys()):
        raise TypeError(f"{given[0]} comes from each convolution and cannot be given")
    for name, reason in (
        ("generator", "each layer needs one of its own"),
        ("guide_channels", "a network calls its layers with one tensor"),
    ):
        if options.get(name) is not None:
            raise TypeError(f"{name} cannot be given: {reason}")
    return Involution2d(convolution.in_channels, **taken, **options).train(convolution.training)  # type: ignore[arg-type]
