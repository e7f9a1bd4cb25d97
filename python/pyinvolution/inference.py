"""Models for inference: norms folded away, channels_last, one operator for each involution with what follows it."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import pad
from torch.nn.functional import relu as functional_relu
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._pytree import tree_leaves

from pyinvolution import ops
from pyinvolution.functional import span_involution2d
from pyinvolution.modules import Involution2d

__all__ = ["optimize_for_inference"]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""The largest difference, relative to the largest output, that `optimize_for_inference` takes for rounding."""


def optimize_for_inference(model: nn.Module, example_input: Tensor | None = None) -> fx.GraphModule:
    """A copy of a model that computes the same in evaluation mode, faster.

    Batch norms are folded: after a convolution into its weights (`torch.nn.utils.fusion`), after an involution,
    together with a following ReLU, into the operator (applied while the result is in registers).
    Parameters become channels_last and constant (no gradients), and so does a 4-dimensional input. The result is a
    `torch.fx.GraphModule` with the model's ``forward`` alone; ``torch.compile`` takes it without graph breaks, and with
    ``torch._inductor.config.freezing`` packs the constant weights for the convolution library.

    The copy is compared with the model on a random input before it is returned: ``max_difference`` of the result is the
    largest absolute difference between their outputs.

    Args:
        model: any module that `torch.fx.symbolic_trace` can follow; it is not changed.
        example_input: what the check runs on; default: two random images of 64 x 64 with the channels of the first
            convolution.

    Raises:
        TypeError: ``model`` is not a module, or ``example_input`` is needed: no convolution says what an input is.
        ValueError: ``model`` has control flow that cannot be traced.
        RuntimeError: the outputs differ by more than rounding.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Module, got {type(model).__name__}")
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    traced = copy.deepcopy(reference)
    try:
        graph = _Tracer().trace(traced)
    except (fx.proxy.TraceError, NotImplementedError, TypeError) as error:
        raise ValueError(f"model {type(model).__name__} cannot be traced by torch.fx: {error}") from error
    result = fx.GraphModule(traced, graph, f"Inference{type(model).__name__}")
    _fold(result)
    _enter_channels_last(result)
    result.to(memory_format=torch.channels_last)
    difference = _compare(reference, result, _example(model) if example_input is None else example_input)
    result.max_difference = difference  # type: ignore[assignment]
    return result


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, Involution2d) or super().is_leaf_module(module, qualified_name)


class _FoldedInvolution2d(nn.Module):
    """An `Involution2d` in evaluation mode, then ``scale * y + shift`` for each channel, then ReLU."""

    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, layer: Involution2d, norm: nn.BatchNorm2d | None, relu: bool) -> None:
        super().__init__()
        self.pool = layer.pool
        reduce: Any = layer.reduce
        if isinstance(getattr(reduce, "norm", None), nn.BatchNorm2d):
            reduce.conv = fuse_conv_bn_eval(reduce.conv, reduce.norm)
            del reduce.norm
        self.reduce = reduce
        self.span, self.project = layer.span, layer.project
        # reduce.conv, then ReLU alone: what the operator for a whole layer computes.
        self.whole = [type(m) for m in reduce] == [nn.Conv2d, nn.ReLU]
        self.geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        self.extra_padding = layer._extra_padding
        self.relu = relu
        scale, shift = (None, None) if norm is None else _affine(norm)
        if layer.bias is not None:
            scale = torch.ones_like(layer.bias) if scale is None else scale
            shift = layer.bias * scale + (0 if shift is None else shift)
        if scale is not None:
            dtype = torch.float64 if scale.dtype == torch.float64 else torch.float32
            scale, shift = scale.detach().to(dtype), shift.detach().to(dtype)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, input: Tensor) -> Tensor:
        # The operators with an epilogue have no gradient; without it is for those who explain a prediction by one.
        differentiable = torch.is_grad_enabled() and (input.requires_grad or self.span.weight.requires_grad)
        epilogue = (self.scale, self.shift, self.relu)
        if self.whole and input.device.type == "cpu" and not differentiable:
            conv: Any = self.reduce.conv
            output = ops.involution_layer2d(
                input, conv.weight, conv.bias, self.span.weight, self.span.bias, *epilogue, *self.geometry
            )
            return output if self.project is None else self.project(output)
        reduced = self.reduce(input if self.pool is None else self.pool(input))
        if any(self.extra_padding):
            input = pad(input, self.extra_padding)
        tensors = (input, reduced, self.span.weight, self.span.bias)
        if differentiable:
            output = span_involution2d(*tensors, *self.geometry)
            if self.scale is not None and self.shift is not None:
                output = (output * self.scale[:, None, None] + self.shift[:, None, None]).to(output.dtype)
            output = output.relu() if self.relu else output
        else:
            output = ops.span_involution2d(*tensors, *epilogue, *self.geometry)
        return output if self.project is None else self.project(output)


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in evaluation mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return scale.to(norm.running_var.dtype), shift.to(norm.running_var.dtype)


def _fold(model: fx.GraphModule) -> None:
    modules = dict(model.named_modules())

    def module_of(node: fx.Node, kind: type | tuple[type, ...]) -> Any:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        # A module that is called twice has to stay what it is.
        once = sum(n.op == "call_module" and n.target == node.target for n in model.graph.nodes) == 1
        return module if once and isinstance(module, kind) else None

    def follower(node: fx.Node, accept: Callable[[fx.Node], object]) -> fx.Node | None:
        users = list(node.users)
        return users[0] if len(users) == 1 and users[0].all_input_nodes == [node] and accept(users[0]) else None

    def norm_of(node: fx.Node) -> Any:
        norm = module_of(node, nn.BatchNorm2d)
        return norm if norm is not None and norm.running_mean is not None else None

    def is_relu(node: fx.Node) -> bool:
        if node.op == "call_function":
            return node.target in (torch.relu, functional_relu)
        return (node.op == "call_method" and node.target == "relu") or isinstance(
            modules.get(str(node.target)) if node.op == "call_module" else None, nn.ReLU
        )

    def drop(node: fx.Node, into: fx.Node) -> None:
        node.replace_all_uses_with(into)
        model.graph.erase_node(node)

    for node in list(model.graph.nodes):
        layer = module_of(node, (nn.Conv2d, Involution2d))
        if layer is None or type(layer) not in (nn.Conv2d, Involution2d):
            continue
        norm_node: Any = follower(node, norm_of)
        norm: Any = norm_of(norm_node) if norm_node is not None else None
        if isinstance(layer, nn.Conv2d):
            if norm_node is not None:
                model.set_submodule(str(node.target), fuse_conv_bn_eval(layer, norm))
                drop(norm_node, node)
            continue
        if layer.project is not None and norm is not None:
            layer.project, norm = fuse_conv_bn_eval(layer.project, norm), None
            drop(norm_node, node)
        elif norm_node is not None:
            drop(norm_node, node)
        relu_node = follower(node, is_relu) if layer.project is None else None
        if relu_node is not None:
            drop(relu_node, node)
        model.set_submodule(str(node.target), _FoldedInvolution2d(layer, norm, relu_node is not None))
    model.delete_all_unused_submodules()
    model.graph.lint()
    model.recompile()


@fx.wrap
def _channels_last(input: Any) -> Any:
    if isinstance(input, Tensor) and input.dim() == 4:
        return input.contiguous(memory_format=torch.channels_last)
    return input


def _enter_channels_last(model: fx.GraphModule) -> None:
    for node in [n for n in model.graph.nodes if n.op == "placeholder"]:
        with model.graph.inserting_after(node):
            entered = model.graph.call_function(_channels_last, (node,))
        node.replace_all_uses_with(entered, delete_user_cb=lambda user, entered=entered: user is not entered)
    model.recompile()


def _example(model: nn.Module) -> Tensor:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, Involution2d)):
            channels = module.in_channels if isinstance(module, nn.Conv2d) else module.channels
            parameter = next(module.parameters())
            return torch.randn(2, channels, 64, 64, dtype=parameter.dtype, device=parameter.device)
    raise TypeError("example_input is needed: the model has no convolution that says what an input is")


def _compare(reference: nn.Module, result: nn.Module, example: Tensor) -> float:
    with torch.no_grad():
        pairs = list(zip(_tensors(reference(example)), _tensors(result(example)), strict=True))
    difference = max(((a.double() - b.double()).abs().max().item() for a, b in pairs if a.numel()), default=0.0)
    scale = max((a.double().abs().max().item() for a, _ in pairs if a.numel()), default=0.0)
    if not difference <= TOLERANCE.get(example.dtype, 1e-3) * max(scale, 1e-6):
        if scale != scale:
            warnings.warn("the model's own output has NaN on the check's input: nothing was compared", stacklevel=3)
            return difference
        raise RuntimeError(
            f"the optimized model differs from the model by {difference:.3g}, where its largest output is {scale:.3g}"
        )
    return difference


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
