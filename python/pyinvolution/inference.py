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
from torch.utils._pytree import tree_leaves, tree_map_only

from pyinvolution import ops
from pyinvolution.functional import forward_mode, involution2d, may_require_grad, span_involution2d
from pyinvolution.modules import Involution2d, _CellMean, _drop_batch, check_input
from pyinvolution.stock import has_hooks, is_pointwise, is_stock

__all__ = ["optimize_for_inference"]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""The largest difference, relative to the largest output, that `optimize_for_inference` takes for rounding."""


def optimize_for_inference(model: nn.Module, example_input: Tensor | tuple[Any, ...] | None = None) -> fx.GraphModule:
    """A copy of a model that computes the same in evaluation mode, faster.

    Batch norms are folded: after a convolution into its weights (`torch.nn.utils.fusion`), after an involution,
    together with a following ReLU, into the operator (applied while the result is in registers). A module that is
    called twice, that has forward hooks or whose parameters are read elsewhere stays what it is.
    Parameters become channels_last and constant (no gradients), and so does a 4-dimensional input. The result is a
    `torch.fx.GraphModule` with the model's ``forward`` alone; ``torch.compile`` takes it without graph breaks, and with
    ``torch._inductor.config.freezing`` packs the constant weights for the convolution library.

    The copy is compared with the model on a random input before it is returned: ``max_difference`` of the result is the
    largest absolute difference between their floating-point outputs.

    Args:
        model: any module that `torch.fx.symbolic_trace` can follow; it is not changed.
        example_input: what the check runs on, a tuple for a model of several arguments; default: two random images of
            64 x 64 with the channels of the first convolution.

    Raises:
        TypeError: ``model`` is not a module, ``example_input`` no tensor or tuple, or it is needed: no convolution says
            what an input is.
        ValueError: ``model`` has control flow that cannot be traced, or cannot run on the default input.
        RuntimeError: the outputs differ by more than rounding.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"model {type(model).__name__} is TorchScript, expected the module that it was made from")
    if not isinstance(example_input, Tensor | tuple | None):
        raise TypeError(f"example_input is a {type(example_input).__name__}, expected a Tensor or a tuple")
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    traced = copy.deepcopy(reference)
    try:
        # Of the root, torch.fx traces the forward of its class: a layer, hooks and a forward of its own are seen inside
        # something only.
        whole = not isinstance(traced, Involution2d) and not has_hooks(traced) and "forward" not in vars(traced)
        root = traced if whole else nn.Sequential(traced)
        graph = _Tracer().trace(root)
    except (fx.proxy.TraceError, NotImplementedError, TypeError) as error:
        raise ValueError(f"model {type(model).__name__} cannot be traced by torch.fx: {error}") from error
    result = fx.GraphModule(root, graph, f"Inference{type(model).__name__}")
    _fold(result)
    _enter_channels_last(result)
    # Module.to would convert parameters of 5 dimensions, too, which have another such format.
    result._apply(lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)
    difference = _compare(reference, result, example_input)
    result.max_difference = difference  # type: ignore[assignment]
    # What a deep copy of a GraphModule keeps.
    result.meta["_user_preserved_attributes"] = {"max_difference": difference}
    return result


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        # A subclass of a batch norm looks at its input, which cannot be followed.
        leaves = (Involution2d, _FoldedInvolution2d, nn.BatchNorm2d)
        return isinstance(module, leaves) or super().is_leaf_module(module, qualified_name)


class _FoldedInvolution2d(nn.Module):
    """An `Involution2d` in evaluation mode, then ``scale * y + shift`` for each channel, then ReLU."""

    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, layer: Involution2d, norm: nn.BatchNorm2d | None, relu: bool) -> None:
        super().__init__()
        self.channels, self.pool = layer.channels, layer.pool
        reduce: Any = layer.reduce
        ordered = is_stock(reduce, nn.Sequential) and [*reduce._modules][:2] == ["conv", "norm"]
        if ordered and _foldable(reduce.norm) and is_stock(reduce.conv, nn.Conv2d):
            reduce.conv = fuse_conv_bn_eval(reduce.conv, reduce.norm)
            del reduce.norm
        self.reduce = reduce
        self.span, self.project = layer.span, layer.project
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
        x = check_input(input, self.channels, "Involution2d", unbatched=True)
        # The epilogue operators have no derivative. Where one is wanted (saliency maps, forward mode), the
        # differentiable operator runs, and the epilogue after it.
        differentiable = forward_mode() or may_require_grad(x, *self.parameters())
        # In the arithmetic type, also where the whole model was converted to 16 bits.
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        scale = None if self.scale is None else self.scale.to(dtype)
        shift = None if self.shift is None else self.shift.to(dtype)
        span: Any = self.span
        pointwise = is_pointwise(span)
        if pointwise and not differentiable and self._reduces_by_convolution():
            conv: Any = self.reduce.conv
            output = ops.recorded(ops.involution_layer2d)(
                x, conv.weight, conv.bias, span.weight, span.bias, scale, shift, self.relu, *self.geometry
            )
            return _drop_batch(output if self.project is None else self.project(output), input)
        reduced = self.reduce(x if self.pool is None else self.pool(x))
        if any(self.extra_padding):
            x = pad(x, self.extra_padding)
        if pointwise and not differentiable:
            output = ops.recorded(ops.span_involution2d)(
                x, reduced, span.weight, span.bias, scale, shift, self.relu, *self.geometry
            )
        else:
            kernel_size, *window = self.geometry
            if pointwise:
                output = span_involution2d(x, reduced, span.weight, span.bias, *self.geometry)
            else:
                output = involution2d(x, span(reduced).unflatten(1, (-1, *kernel_size)), None, *window)
            if scale is not None and shift is not None:
                output = (output * scale[:, None, None] + shift[:, None, None]).to(output.dtype)
            output = output.relu() if self.relu else output
        return _drop_batch(output if self.project is None else self.project(output), input)

    def _reduces_by_convolution(self) -> bool:
        """Whether calling ``pool`` and ``reduce`` is what the operator for a whole layer computes: conv, then ReLU."""
        reduce: Any = self.reduce
        return (
            is_stock(reduce, nn.Sequential)
            and [type(module) for module in reduce] == [nn.Conv2d, nn.ReLU]
            and is_pointwise(reduce[0])
            and is_stock(reduce[1], nn.ReLU)
            and (self.pool is None or is_stock(self.pool, _CellMean))
        )


def _folds(layer: Involution2d, call: fx.Node) -> bool:
    """Whether a layer makes its kernels from its input by ``reduce`` and ``span`` and nothing else."""
    return layer.generator is None and layer.kernel_norm is None and len(call.args) == 1 and not call.kwargs


def _foldable(module: object) -> bool:
    """Whether a module is a batch norm that is an affine map in evaluation mode."""
    return is_stock(module, nn.BatchNorm2d, nn.SyncBatchNorm) and module.running_mean is not None  # type: ignore[attr-defined]


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

    def module_of(node: fx.Node, kinds: tuple[type, ...]) -> Any:
        """What a node calls, if nothing else calls, reads or watches it."""
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if not is_stock(module, *kinds) or any(has_hooks(m) for m in module.modules()):  # type: ignore[union-attr]
            return None
        return module if sum(f"{n.target}.".startswith(f"{node.target}.") for n in model.graph.nodes) == 1 else None

    def follower(node: fx.Node, accept: Callable[[fx.Node], object]) -> fx.Node | None:
        users = list(node.users)
        return users[0] if len(users) == 1 and users[0].all_input_nodes == [node] and accept(users[0]) else None

    def norm_of(node: fx.Node) -> Any:
        norm = module_of(node, (nn.BatchNorm2d, nn.SyncBatchNorm))
        return norm if _foldable(norm) else None

    def is_relu(node: fx.Node) -> bool:
        if node.op == "call_function":
            return node.target in (torch.relu, functional_relu)
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        return (node.op == "call_method" and node.target == "relu") or is_stock(module, nn.ReLU)

    def drop(node: fx.Node, into: fx.Node) -> None:
        node.replace_all_uses_with(into)
        model.graph.erase_node(node)

    for node in list(model.graph.nodes):
        layer = module_of(node, (nn.Conv2d, Involution2d))
        if layer is None or (isinstance(layer, Involution2d) and not _folds(layer, node)):
            continue
        norm_node: Any = follower(node, norm_of)
        norm: Any = norm_of(norm_node) if norm_node is not None else None
        if isinstance(layer, nn.Conv2d):
            if norm_node is not None:
                model.set_submodule(str(node.target), fuse_conv_bn_eval(layer, norm))
                drop(norm_node, node)
            continue
        if layer.project is None:
            if norm_node is not None:
                drop(norm_node, node)
        elif norm is not None and is_stock(layer.project, nn.Conv2d):
            layer.project, norm = fuse_conv_bn_eval(layer.project, norm), None
            drop(norm_node, node)
        else:
            norm = None
        relu_node = follower(node, is_relu) if layer.project is None else None
        if relu_node is not None:
            drop(relu_node, node)
        model.set_submodule(str(node.target), _FoldedInvolution2d(layer, norm, relu_node is not None))
    model.delete_all_unused_submodules()
    model.graph.lint()
    model.recompile()


@fx.wrap
def _channels_last(input: Any) -> Any:
    # vmap has no memory formats.
    plain = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None
    if isinstance(input, Tensor) and input.dim() == 4 and plain:
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


def _compare(reference: nn.Module, result: nn.Module, given: Tensor | tuple[Any, ...] | None) -> float:
    example = _example(reference) if given is None else given
    arguments = example if isinstance(example, tuple) else (example,)

    @torch.no_grad()
    def outputs(model: nn.Module) -> list[Tensor]:
        # A model may change its input.
        leaves = tree_leaves(model(*tree_map_only(Tensor, Tensor.clone, arguments)))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    try:
        expected = outputs(reference)
    except Exception as error:
        if given is not None:
            raise
        name, shape = type(reference).__name__, tuple(arguments[0].shape)
        raise ValueError(f"example_input is needed: {name} does not take one of shape {shape}: {error}") from error
    pairs = [(a, b) for a, b in zip(expected, outputs(result), strict=True) if a.is_floating_point() and a.numel()]
    if not all(a.isfinite().any() for a, _ in pairs) or not pairs:
        warnings.warn("an output of the model has no finite number on the check's input: not compared", stacklevel=3)
    # NaN and infinities of the model are right where they are; another NaN is a difference that torch's maximum keeps.
    apart = [
        (a.double() - b.double()).abs().where((a != b) & ~(a.isnan() & b.isnan()), 0).max().item() for a, b in pairs
    ]
    difference = torch.tensor([0.0, *apart], dtype=torch.float64).max().item()
    scale = max((a.double().abs().where(a.isfinite(), 0).max().item() for a, _ in pairs), default=0.0)
    dtypes = {tensor.dtype for tensor in (*reference.parameters(), *expected)}
    dtypes |= {torch.get_autocast_dtype(device) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)}
    tolerance = max((TOLERANCE[dtype] for dtype in dtypes if dtype in TOLERANCE), default=1e-3)
    if not difference <= tolerance * max(scale, 1e-6):
        raise RuntimeError(
            f"the optimized model differs from the model by {difference:.3g}, where its largest output is {scale:.3g}"
        )
    return difference
