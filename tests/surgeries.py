"""What users do to modules, and a plain twin that says what the result has to be.

The twin of a network has the same modules and calls them one after the other, by forwards that are written out here.
"""

import copy
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from pyinvolution import Involution2d, reference
from pyinvolution.models.rednet import Bottleneck, Stage, Stem


def stem_in_order(self, x):
    for name in ("conv1", "norm1", "act1", "involution", "norm2", "act2", "conv2", "norm3", "act3"):
        x = getattr(self, name)(x)
    return x


def stage_in_order(self, x):
    for block in self:
        x = block(x)
    return x


def block_in_order(self, x):
    y = self.act(self.norm1(self.conv1(x)))
    y = self.act(self.norm2(self.involution(y)))
    y = self.conv3(y)
    shortcut = x if self.downsample is None else self.downsample(x)
    y = self.norm3(y)
    y += shortcut
    return self.act(y)


def layer_in_order(self, x):
    images = x if x.dim() == 4 else x[None]
    reduced = self.reduce(images if self.pool is None else self.pool(images))
    kernels = self.span(reduced).unflatten(1, (self.groups, *self.kernel_size))
    padded = nn.functional.pad(images, self._extra_padding)
    y = reference.involution2d(padded, kernels, self.bias, self.stride, self.padding, self.dilation)
    y = y if self.project is None else self.project(y)
    return y if x.dim() == 4 else y[0]


FORWARDS = {Stem: stem_in_order, Stage: stage_in_order, Bottleneck: block_in_order}


def in_order(model: nn.Module, forwards: dict[type, Callable] = FORWARDS) -> nn.Module:
    """``model`` with forwards that call its modules and do nothing else."""
    for module in model.modules():
        if (forward := forwards.get(type(module))) is not None:
            module.forward = MethodType(forward, module)
    return model


def plain(model: nn.Module) -> nn.Module:
    """The same with `reference.involution2d` in the layers, for a copy of ``model``."""
    return in_order(copy.deepcopy(model), {**FORWARDS, Involution2d: layer_in_order})


def spread(model: nn.Module) -> nn.Module:
    """Norms, statistics and biases as after training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
    return model


# --- what there may be in the place of a module -----------------------------------------------------------------------


class Adapter(nn.Module):
    """A low-rank adapter, with the parameters of what it wraps."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        factory = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.base = base
        self.down = nn.Conv2d(base.in_channels, 2, 1, bias=False, **factory)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False, **factory)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class OtherConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * super().forward(x)


class Wrapped(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.module(x))


class Residual(nn.Module):
    """``conv`` and ``norm``, but not one after the other."""

    def __init__(self, reduce: nn.Sequential) -> None:
        super().__init__()
        self.conv, self.norm = reduce.conv, reduce.norm

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + self.norm(y)


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight + 0.1


def sequence(conv: Any) -> nn.Module:
    like = {"device": conv.weight.device, "dtype": conv.weight.dtype}
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels, **like), nn.SiLU())


def subclass(conv: nn.Module) -> nn.Module:
    conv.__class__ = OtherConv
    return conv


def patched(module: nn.Module) -> nn.Module:
    """As accelerate does it; once for each module, since the second forward would call itself."""

    def forward(self: nn.Module, *arguments: Tensor) -> Tensor:
        return 0.7 * self._old_forward(*arguments)

    if hasattr(module, "_old_forward"):
        return module
    module._old_forward = module.forward
    module.forward = MethodType(forward, module)
    return module


def old_weight_norm(conv: nn.Module) -> nn.Module:
    # A weight with a graph cannot be copied.
    with torch.no_grad():
        return nn.utils.weight_norm(conv)


def _halved(module: nn.Module, inputs: Any, *outputs: Any) -> tuple:
    return tuple(None if grad is None else 0.5 * grad for grad in inputs)


def _hooked(register: str, hook: Callable, module: nn.Module) -> nn.Module:
    getattr(module, register)(hook)
    return module


HOOKS = {
    "forward hook": ("register_forward_hook", lambda module, inputs, output: 0.8 * output),
    "forward pre-hook": ("register_forward_pre_hook", lambda module, inputs: (0.8 * inputs[0],)),
    "backward hook": ("register_full_backward_hook", _halved),
    "backward pre-hook": ("register_full_backward_pre_hook", _halved),
}

ANYWHERE = {
    "wrapped": Wrapped,
    "patched": patched,
    **{name: partial(_hooked, *hook) for name, hook in HOOKS.items()},
}
"""Functions of any module from images to images, that return what is put in its place."""

ON_CONVOLUTIONS = {
    **ANYWHERE,
    "sequence": sequence,
    "subclass": subclass,
    "adapter": Adapter,
    "parametrization": lambda conv: parametrize.register_parametrization(conv, "weight", Halved()),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old weight_norm": old_weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
}


def operate(model: nn.Module, name: str, surgery: Callable[[Any], nn.Module], seed: int = 0) -> nn.Module:
    """Put ``surgery(module)`` into the place of the module of that name; "" is the model."""
    torch.manual_seed(seed)
    if not name:
        return surgery(model)
    model.set_submodule(name, surgery(model.get_submodule(name)))
    return model


# --- what is compared -------------------------------------------------------------------------------------------------


def weighted(output: Tensor) -> Tensor:
    """A loss in which each element counts differently."""
    return (output * torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view_as(output)).square().sum()


def trained(model: nn.Module, x: Tensor, call: Callable | None = None) -> dict[str, Tensor | None]:
    """Output, gradients and buffers of a training step."""
    x = x.detach().clone().requires_grad_()
    output = model(x) if call is None else call(model, x)
    weighted(output).backward()
    return {
        "output": output.detach(),
        "gradient of the input": x.grad,
        **{f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()},
        **{f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()},
    }


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")
    assert expected["output"].abs().sum() > 0
