"""Involution in a network that was not written for it."""

from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

from torch import nn

from pyinvolution.modules import Involution2d

__all__ = ["convert"]

Match = str | Callable[[str, nn.Conv2d], bool]


def convert(model: nn.Module, match: Match | None = None, **options: Any) -> nn.Module:
    """Replace 3x3 convolutions of ``model`` by involutions, in place, and keep everything else.

    This is how RedNet comes from ResNet (paper, section 4.1), for any network: those of torchvision and timm, or your
    own. The involution takes over stride, dilation, bias and output channels of the convolution (a 1x1 convolution
    follows where those differ from the input's), device, dtype and training mode. Its weights are new: the network has
    to be trained. Optimizers made before hold the old ones.

    Args:
        model: any module.
        match: which convolutions. None takes every one that an involution can replace and whose channels
            ``group_channels`` divides, which leaves out the first layer; a shell-style pattern of names, e.g.
            ``"layer[34].*.conv2"``; or a function (name, convolution) -> bool. Convolutions that a pattern or function
            picks must be replaceable.
        options: of `Involution2d`: ``kernel_size`` (7), ``group_channels`` (16), ``reduction`` (4), ``norm_layer``, ...

    Returns:
        ``model``, or an involution if ``model`` itself is such a convolution.

    Raises:
        ValueError: nothing matches, or a convolution that ``match`` picks is no 3x3 convolution with padding that keeps
            the size, ``groups=1`` and zero padding, or its channels do not fit ``group_channels``.
        TypeError: an argument is unknown or has the wrong type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    if match is not None and not isinstance(match, str) and not callable(match):
        raise TypeError(f"match must be None, a pattern or a function, got {match!r}")
    group_channels = options.get("group_channels", 16)
    chosen = []
    for name, module in model.named_modules():
        # Subclasses do something else with the same weights.
        if type(module) is not nn.Conv2d:
            continue
        obstacle = _obstacle(module, group_channels)
        if match is None:
            picked = not obstacle
        else:
            picked = fnmatch(name, match) if isinstance(match, str) else match(name, module)
            if picked and obstacle:
                raise ValueError(f"match picks {name or 'the model'}, which no involution can replace: {obstacle}")
        if picked:
            chosen.append((name, module))
    if not chosen:
        raise ValueError(f"match={match!r} picks no convolution of {type(model).__name__}")
    replacements = {convolution: _involution(convolution, options) for _, convolution in chosen}
    if model in replacements:
        return replacements[model]  # type: ignore[index]
    # A module may be registered under several names.
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                setattr(parent, name, replacements[child])  # type: ignore[index]
    return model


def _obstacle(convolution: nn.Conv2d, group_channels: int) -> str:
    """Why no involution can stand in for ``convolution``, or an empty string."""
    for name, value, expected in (
        ("kernel_size", convolution.kernel_size, (3, 3)),
        ("groups", convolution.groups, 1),
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
    return Involution2d(convolution.in_channels, **taken, **options).train(convolution.training)  # type: ignore[arg-type]
