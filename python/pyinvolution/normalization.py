"""Batch norm with the addition and the ReLU that follow it, in one pass over memory each way (training on a CPU)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from pyinvolution.stock import intercepted, is_stock

__all__ = ["BatchNormReLU", "conv_norm", "norm_relu"]

_ops = torch.ops.pyinvolution
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def norm_relu(norm: nn.Module, activation: nn.Module | None, input: Tensor, residual: Tensor | None = None) -> Tensor:
    """``activation(norm(input) + residual)``, without ``residual`` or ``activation`` where that is None.

    A batch norm that computes statistics and a ReLU, both stock, run as one operator if they run on a CPU, eagerly or
    (in channels_last) in a graph of torch.compile, and nothing takes part in the computation that the operator does not
    know: torch moves 9 elements forward and 8 backward for each of the input where it moves 4 and 7, without a residual
    6 and 8 where it moves 3 and 5. Gradients of every order are those of the modules (torch.compile has those of the
    first), results agree but for rounding, and the buffers of ``norm`` are updated as usual. On processors with
    AVX512-BF16, results in bfloat16 that are subnormal numbers become zeros.

    Args:
        norm: a module, called with ``input``.
        activation: a module, called with the sum; it may change it in place; or None.
        input: (N, C, H, W).
        residual: of the shape of ``norm(input)``, or None.
    """
    if norm.training and _is_one(norm, activation, input, residual):
        run = _run_in_graph if torch.compiler.is_compiling() else _run
        return run(norm, activation is not None, input, residual)
    output = norm(input)
    if residual is not None:
        # Not `+=`, which torch.fx would trace as a sum in new memory.
        output = output.add_(residual)
    return output if activation is None else activation(output)


def conv_norm(layers: nn.Module, input: Tensor) -> Tensor:
    """``layers(input)``; of a stock ``Sequential`` of "conv", "norm" and perhaps "act" by `norm_relu`."""
    if layers.training and is_stock(layers, nn.Sequential):
        modules: Any = layers._modules
        if list(modules) in (["conv", "norm", "act"], ["conv", "norm"]):
            return norm_relu(modules["norm"], modules.get("act"), modules["conv"](input))
    return layers(input)


def _is_one(norm: Any, activation: nn.Module | None, input: Tensor, residual: Tensor | None) -> bool:
    compiling = torch.compiler.is_compiling()
    if type(input) is not Tensor or (_traced_otherwise() if compiling else intercepted()):
        return False
    if not is_stock(norm, nn.BatchNorm2d) or not (activation is None or is_stock(activation, nn.ReLU)):
        return False
    # No generators: this is asked for every norm of a training step.
    return (
        input.dim() == 4
        and input.shape[1] == norm.num_features
        and input.numel() > norm.num_features > 0
        and input.dtype in DTYPES
        and input.is_cpu
        # In NCHW, inductor's convolutions may want another order, and there would be conversions around the operator.
        and (input.is_contiguous(memory_format=torch.channels_last) or (input.is_contiguous() and not compiling))
        and (
            residual is None
            or (
                type(residual) is Tensor
                and residual.is_cpu
                and residual.dtype == input.dtype
                and residual.shape == input.shape
                and residual.stride() == input.stride()
            )
        )
        and has_plain_vectors(norm)
    )


def has_plain_vectors(norm: Any) -> bool:
    """Whether a batch norm has a weight and a bias, and its vectors are as the operators read them."""
    for vector, needed in (
        (norm.weight, True),
        (norm.bias, True),
        (norm.running_mean, False),
        (norm.running_var, False),
    ):
        if vector is None:
            if needed:
                return False
        elif not (vector.dtype is torch.float32 and vector.is_cpu and vector.is_contiguous()):
            return False
    return True


def _traced_otherwise() -> bool:
    """Whether a graph is made for others than torch.compile, or of what a transform does."""
    return (
        torch.compiler.is_exporting()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def _run(norm: Any, relu: bool, input: Tensor, residual: Tensor | None) -> Tensor:
    return BatchNormReLU.apply(
        input, residual, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked,
        norm.momentum, norm.eps, relu,
    )  # fmt: skip


def _run_in_graph(norm: Any, relu: bool, input: Tensor, residual: Tensor | None) -> Tensor:
    """In two, so that what a graph changes, the buffers, is changed outside of the differentiable function."""
    mean, invstd = _ops.batch_norm_statistics(
        input.detach(), norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.momentum, norm.eps
    )
    return _InGraph.apply(input, residual, norm.weight, norm.bias, mean, invstd, norm.eps, relu)


class BatchNormReLU(torch.autograd.Function):
    """``relu(batch_norm(input) + residual)``; saves ``input, weight, bias, mean, invstd, output``.

    Without ``relu`` the sum itself; the output is not saved then.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        batches: Tensor | None,
        momentum: float | None,
        eps: float,
        relu: bool,
    ) -> Tensor:
        output, mean, invstd = _ops.batch_norm(
            input, residual, weight, bias, running_mean, running_var, batches, momentum, eps, relu
        )
        _save(ctx, input, residual, weight, bias, mean, invstd, output, eps, relu)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, grad_output), None, None, None, None, None, None


class _InGraph(torch.autograd.Function):
    """The same from the statistics, which are functions of ``input`` here, too."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        invstd: Tensor,
        eps: float,
        relu: bool,
    ) -> Tensor:
        output = _ops.batch_norm_output(input, residual, weight, bias, mean, invstd, relu)
        _save(ctx, input, residual, weight, bias, mean, invstd, output, eps, relu)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, grad_output), None, None, None, None


def _save(ctx: Any, input: Tensor, residual: Tensor | None, *rest: Any) -> None:
    weight, bias, mean, invstd, output, ctx.eps, ctx.relu = rest
    ctx.adds = residual is not None
    ctx.save_for_backward(input, weight, bias, mean, invstd, *([output] if ctx.relu else []))


def _gradients(ctx: Any, grad_output: Tensor) -> list[Tensor | None]:
    """Of input, residual, weight and bias."""
    input, weight, bias, mean, invstd, *outputs = ctx.saved_tensors
    output = outputs[0] if ctx.relu else None
    wanted = ctx.needs_input_grad
    if torch.is_grad_enabled():
        return _differentiable(grad_output, input, weight, bias, output, ctx.eps, wanted)
    gradients = _ops.batch_norm_backward(
        grad_output, input, output if ctx.adds else None, weight, bias, mean, invstd, ctx.relu
    )
    return [gradient if want else None for gradient, want in zip(gradients, wanted, strict=False)]


def _differentiable(
    grad_output: Tensor, input: Tensor, weight: Tensor, bias: Tensor, output: Tensor | None, eps: float, wanted: Any
) -> list[Tensor | None]:
    """The same gradients by torch's operators, for gradients of the gradients. NaN passes, as through torch's ReLU."""
    masked = grad_output if output is None else torch.where(output <= 0, torch.zeros_like(grad_output), grad_output)
    sources = [t for t, want in zip((input, weight, bias), (wanted[0], wanted[2], wanted[3]), strict=True) if want]
    found: Iterator[Tensor] = iter(())
    if sources:
        z = batch_norm(input, None, None, weight, bias, True, 0.0, eps)
        found = iter(torch.autograd.grad(z, sources, masked, create_graph=True))
    return [
        next(found) if wanted[0] else None,
        masked if wanted[1] else None,
        next(found) if wanted[2] else None,
        next(found) if wanted[3] else None,
    ]
