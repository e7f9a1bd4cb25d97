"""Whether calling a module does what its class says: the condition for computing with its parameters instead.

A module may be anything once a user has it: a subclass, an adapter around it, hooks on it or on all modules, a
``forward`` of its own, parameters that are computed. Code that reads a module's parameters, or folds or fuses it, asks
`is_stock` first, and calls the module where it is not.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_in_torch_dispatch_mode, is_traceable_wrapper_subclass

_PLAIN_PARAMETERS = (type(None), torch.Tensor, nn.Parameter)
_FORWARD: dict[type, Any] = {
    cls: cls.forward for cls in (nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.ReLU, nn.AvgPool2d)
}


def is_stock(module: object, *classes: type[nn.Module]) -> bool:
    """Whether ``module`` is exactly of one of ``classes`` and calling it runs the ``forward`` of that class only.

    A parametrized or wrapped module is of another class; parameters that are tensor subclasses (quantized, distributed)
    compute in their own way.
    """
    cls = type(module)
    if not isinstance(module, nn.Module) or cls not in classes:
        return False
    if has_hooks(module) or "forward" in module.__dict__ or cls.forward is not _FORWARD.get(cls, cls.forward):
        return False
    # Loops and names instead of generators: this is asked for every module of a training step.
    for parameter in module._parameters.values():
        if type(parameter) not in _PLAIN_PARAMETERS and is_traceable_wrapper_subclass(parameter):
            return False
    return True


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` runs hooks: its own, or those registered for all modules."""
    return bool(
        _has_any_global_hook()
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_pointwise(module: object) -> bool:
    """Whether ``module`` is a stock 1x1 convolution of all channels: a matrix product at each pixel."""
    return is_stock(module, nn.Conv2d) and (
        module.kernel_size == module.stride == module.dilation == (1, 1)  # type: ignore[attr-defined]
        and module.padding in ((0, 0), "same", "valid")  # type: ignore[attr-defined]
        and module.groups == 1  # type: ignore[attr-defined]
    )


def intercepted() -> bool:
    """Whether a transform, a mode or a tracer takes part in what is computed now."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_function_stack() > 0
        or is_in_torch_dispatch_mode()
        or torch.jit.is_tracing()
    )
