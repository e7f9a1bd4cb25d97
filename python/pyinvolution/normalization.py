"""Batch norm with the addition and the ReLU that follow it, in one pass over memory each way (training on a CPU)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from pyinvolution.stock import intercepted, is_stock

__all__ = ["BatchNormReLU", "norm_relu"]

_ops = torch.ops.pyinvolution
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def norm_relu(norm: nn.Module, activation: nn.Module, input: Tensor, residual: Tensor | None = None) -> Tensor:
    """``activation(norm(input) + residual)``, without ``residual`` where that is None.

    A batch norm that computes statistics and a ReLU, both stock, run as one operator if they run eagerly on a CPU and
    nothing takes part in the computation that the operator does not know: torch moves 9 elements forward and 8 backward
    for each of the input where it moves 4 and 7, without a residual 6 and 8 where it moves 3 and 5. Gradients of every
    order are those of the modules, results agree but for rounding, and the buffers of ``norm`` are updated as usual. On
    processors with AVX512-BF16, results in bfloat16 that are subnormal numbers become zeros.

    Args:
        norm: a module, called with ``input``.
        activation: a module, called with the sum; it may change it in place.
        input: (N, C, H, W).
        residual: of the shape of ``norm(input)``, or None.
    """
    if norm.training and _is_one(norm, activation, input, residual):
        return _run(norm, input, residual)
    output = norm(input)
    if residual is not None:
        # Not `+=`, which torch.fx would trace as a sum in new memory.
        output = output.add_(residual)
    return activation(output)


def _is_one(norm: Any, activation: nn.Module, input: Tensor, residual: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or type(input) is not Tensor or intercepted():
        return False
    if not is_stock(norm, nn.BatchNorm2d) or not is_stock(activation, nn.ReLU):
        return False
    tensors = [input] if residual is None else [input, residual]
    channels = [t for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var) if t is not None]
    return (
        norm.weight is not None
        and norm.bias is not None
        and input.dim() == 4
        and input.shape[1] == norm.num_features
        and input.numel() > norm.num_features > 0
        and input.dtype in _DTYPES
        and all(type(t) is Tensor and t.device.type == "cpu" and t.dtype == input.dtype for t in tensors)
        and (input.is_contiguous() or input.is_contiguous(memory_format=torch.channels_last))
        and (residual is None or (residual.shape == input.shape and residual.stride() == input.stride()))
        and all(t.dtype is torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in channels)
    )


def _run(norm: Any, input: Tensor, residual: Tensor | None) -> Tensor:
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # a cumulative average
            momentum = 1.0 / float(norm.num_batches_tracked)
    return BatchNormReLU.apply(
        input, residual, norm.weight, norm.bias, norm.running_mean, norm.running_var, momentum, norm.eps
    )


class BatchNormReLU(torch.autograd.Function):
    """``relu(batch_norm(input) + residual)``; saves ``input, weight, bias, mean, invstd, output``."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        output, mean, invstd = _ops.batch_norm_relu(
            input, residual, weight, bias, running_mean, running_var, momentum, eps
        )
        ctx.eps, ctx.adds = eps, residual is not None
        ctx.save_for_backward(input, weight, bias, mean, invstd, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, mean, invstd, output = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if torch.is_grad_enabled():
            found = _differentiable(grad_output, input, weight, bias, output, ctx.eps, wanted)
        else:
            grad_output = grad_output.to(
                input.dtype, memory_format=torch.contiguous_format if input.is_contiguous() else torch.channels_last
            )
            if grad_output.stride() != input.stride():
                grad_output = torch.empty_like(input).copy_(grad_output)
            gradients = _ops.batch_norm_relu_backward(
                grad_output, input, output if ctx.adds else None, weight, bias, mean, invstd
            )
            found = [gradient if want else None for gradient, want in zip(gradients, wanted, strict=False)]
        return (*found, None, None, None, None)


def _differentiable(
    grad_output: Tensor, input: Tensor, weight: Tensor, bias: Tensor, output: Tensor, eps: float, wanted: Any
) -> list[Tensor | None]:
    """The same gradients by torch's operators, for gradients of the gradients. NaN passes, as through torch's ReLU."""
    masked = torch.where(output <= 0, torch.zeros_like(grad_output), grad_output)
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
