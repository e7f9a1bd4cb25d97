"""Less memory for training: what a block of RedNet need not keep for the backward pass."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import lru_cache
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from pyinvolution.normalization import BatchNormReLU
from pyinvolution.stock import has_hooks, intercepted, is_stock

__all__ = ["checkpoint", "forget_activations"]

# --- activations ------------------------------------------------------------------------------------------------------

_STOCK = {nn.BatchNorm2d, nn.Conv2d, nn.ReLU, nn.Sequential}


def forget_activations(block: nn.Module, input: Tensor, output: Tensor) -> None:
    """Save the activations between ``input`` and ``output = block(input)`` as what they are computed from.

    Of a batch norm and a ReLU autograd keeps the norm's input x, and the activation ``y = relu(batch_norm(x))``, which
    the next layer saves too. Here y is taken out of the graph; backward computes it again when it asks for it, with the
    kernel, the statistics and so the bits of the forward pass. No module runs a second time, and all but y is still
    saved by autograd itself, with its checks.

    Nothing is done, which costs memory only, unless the block has the stock modules, without hooks, and ran eagerly on
    a CPU: other code may hold an activation, or change it without autograd's knowledge. Not for a block that ran in
    `checkpoint`, which keeps none: reading what its nodes have saved would run it again for each tensor.
    """
    if torch.compiler.is_compiling() or type(output) is not Tensor or output.device.type != "cpu":
        return
    if output.grad_fn is None or intercepted() or _saves_in_another_way():
        return
    if not _has_stock_modules(block):
        return
    try:
        nodes = [(node, list(_saved(node))) for node in _graph(output, input)]
        recipes = {}
        for node, saved in nodes:
            made = None if node is output.grad_fn else _recipe(node, [tensor for tensor, _ in saved])
            if made is not None:
                recipes[made[0].data_ptr()] = made
        # Found first and replaced then: a tensor that an operator has changed since it was saved raises an error here,
        # and is left to raise it in backward.
        found = [
            (raw, made[1])
            for _, saved in nodes
            for tensor, raw in saved
            if (made := recipes.get(tensor.data_ptr())) is not None and tensor.is_set_to(made[0])
        ]
    except RuntimeError:
        return
    for raw, recipe in found:
        raw.register_hooks(lambda _, recipe=recipe: recipe, _Recipe.activation)


class _Recipe(ABC):
    """``relu(batch_norm(x))`` from the norm's input x."""

    def __init__(self, input: Tensor) -> None:
        self.input, self.version = input.detach(), input._version
        self.value: Tensor | None = None

    @abstractmethod
    def again(self) -> Tensor:
        """The activation, by the kernel and from the statistics of the forward pass."""

    def activation(self) -> Tensor:
        # Kept from here on: the layer behind the activation asks for it, and then the ReLU.
        if self.value is None:
            if self.input._version != self.version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"the input of a batch norm, of shape {tuple(self.input.shape)}, is at version "
                    f"{self.input._version}; expected version {self.version}"
                )
            self.value = self.again()
        return self.value


class _OfModules(_Recipe):
    """Of torch's norm and ReLU."""

    def __init__(self, input: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, bias: Tensor) -> None:
        super().__init__(input)
        # The parameters may change before backward. All of these have a value for each channel.
        self.mean, self.scale, self.bias = mean.detach(), (invstd * weight).detach(), bias.detach().clone()

    def again(self) -> Tensor:
        # In training, the kernel multiplies by invstd * weight, as in evaluation: with a variance of 1 and an eps of 0,
        # that is the scale itself.
        value, _, _ = torch.native_batch_norm(
            self.input, self.scale, self.bias, self.mean, torch.ones_like(self.mean), False, 0.0, 0.0
        )
        return value.relu_()


class _OfOperator(_Recipe):
    """Of `pyinvolution.normalization.BatchNormReLU`."""

    def __init__(self, input: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, bias: Tensor) -> None:
        super().__init__(input)
        self.statistics = (weight.detach().clone(), bias.detach().clone(), mean.detach(), invstd.detach())

    def again(self) -> Tensor:
        return torch.ops.pyinvolution.batch_norm_output(self.input, None, *self.statistics, True)


def _recipe(node: Any, saved: list[Tensor]) -> tuple[Tensor, _Recipe] | None:
    """The result of an autograd node, which has ``saved`` tensors, with its recipe, if that is the ReLU of a batch norm
    that can be computed again exactly."""
    name = node.name()
    if name == f"{BatchNormReLU.__name__}Backward":
        if node.adds or not node.relu:
            return None
        x, scale, shift, mean, invstd, output = saved
        return output, _OfOperator(x, mean, invstd, scale, shift)
    if name != "ReluBackward0":
        return None
    norm = node.next_functions[0][0]
    if norm is None or norm.name() != "NativeBatchNormBackward0" or not norm._saved_training:
        return None
    # A frozen bias has no node and the norm does not save it.
    bias = getattr(norm.next_functions[2][0], "variable", None)
    input, weight = norm._saved_input, norm._saved_weight
    if bias is None or weight is None:
        return None
    vectors = [weight, bias, norm._saved_running_mean, norm._saved_running_var]
    # Else torch uses another formula, or rounds the scale.
    exact = (
        (input.is_contiguous() or input.is_contiguous(memory_format=torch.channels_last))
        and all(vector is None or vector.is_contiguous() for vector in vectors)
        and weight.dtype in (torch.float32, torch.float64)
    )
    if not exact or any(type(tensor) not in (Tensor, nn.Parameter) for tensor in (input, weight, bias)):
        return None
    return node._saved_result, _OfModules(input, norm._saved_result1, norm._saved_result2, weight, bias)


def _saves_in_another_way() -> bool:
    return (
        torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        or torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None
    )


def _has_stock_modules(block: nn.Module) -> bool:
    left: list[nn.Module | None] = [block]
    while left:
        module = left.pop()
        if module is None:
            continue
        if type(module).__module__.startswith("pyinvolution."):
            if "forward" in vars(module) or has_hooks(module):
                return False
        elif not is_stock(module, *_STOCK):
            return False
        left += module._modules.values()
    return True


def _graph(output: Tensor, input: Tensor) -> Iterator[Any]:
    """The autograd nodes that lead from ``input`` to ``output``."""
    left: list[Any] = [output.grad_fn]
    seen = {None, input.grad_fn}
    while left:
        node = left.pop()
        if node not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
            yield node


def _saved(node: Any) -> Iterator[tuple[Tensor, Any]]:
    """Tensors that a node has saved, and the objects that hold them (`torch.autograd.graph.saved_tensors_hooks`)."""
    for name, raw_name in _saved_names(node.__class__):
        tensors, raws = getattr(node, name), getattr(node, raw_name)
        if not isinstance(tensors, tuple):
            tensors, raws = (tensors,), (raws,)
        for tensor, raw in zip(tensors, raws, strict=True):
            if tensor is not None:
                yield tensor, raw


@lru_cache
def _saved_names(node: type) -> tuple[tuple[str, str], ...]:
    raw = [name for name in dir(node) if name.startswith("_raw_saved_")]
    # A Function written in Python has `saved_tensors`, others have `_saved_` and a name.
    return tuple((name.removeprefix("_raw" if hasattr(node, name[4:]) else "_raw_"), name) for name in raw)


# --- checkpoints ------------------------------------------------------------------------------------------------------

# Held while a checkpointed block runs: no other thread must see it as `_AsBefore` makes it.
_running = RLock()


def checkpoint(block: nn.Module, input: Tensor) -> Tensor:
    """``block(input)``, of which only ``input`` is kept: the block runs again in the backward pass.

    The second time it has the parameters, buffers, mode and random numbers of the first, and leaves its buffers alone.
    What else it remembers or does, it remembers or does twice.
    """
    if not torch.is_grad_enabled():
        return block(input)
    if torch.compiler.is_compiling():
        # A compiled recomputation has no side effects, and takes no context_fn of ours.
        return torch_checkpoint(block, input, use_reentrant=False)
    return torch_checkpoint(
        block,
        input,
        use_reentrant=False,
        context_fn=lambda: (_running, _AsBefore(block)),
        # An operator may save a tensor before it fills it, RReLU's noise for one.
        early_stop=False,
    )


class _AsBefore:
    """A context in which a block is as it was when this was made. Entered once for each recomputation.

    Its parameters may be others by then (`torch.func.functional_call`), and batch norms must not count a second time.
    """

    def __init__(self, block: nn.Module) -> None:
        self.before = [
            (module, module.training, {**module._parameters}, _copies(module._buffers)) for module in block.modules()
        ]

    def __enter__(self) -> None:
        _running.acquire()
        self.now = [
            (module, module.training, {**module._parameters}, {**module._buffers}) for module, *_ in self.before
        ]
        for module, training, parameters, buffers in self.before:
            _set(module, training, parameters, _copies(buffers))

    def __exit__(self, *error: object) -> None:
        for state in self.now:
            _set(*state)
        _running.release()


def _copies(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if tensor is None else tensor.detach().clone() for name, tensor in tensors.items()}


def _set(
    module: nn.Module, training: bool, parameters: dict[str, nn.Parameter | None], buffers: dict[str, Tensor | None]
) -> None:
    module.training = training
    module._parameters.update(parameters)
    module._buffers.update(buffers)
