"""What the tests of ONNX share: the operators in all their arguments, and a small network."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from pyinvolution.functional import involution2d, span_involution2d
from pyinvolution.models import create_model

SMALL = {"layers": (1, 1), "stem_channels": 32, "base_channels": 16, "kernel_size": 3}  # an export writes every tap


def small_rednet() -> nn.Module:
    torch.manual_seed(0)
    model = create_model("rednet", num_classes=10, **SMALL)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -0.2, 0.2)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    return model


class Operators(nn.Module):
    """The operators and their epilogue, in all their arguments."""

    CASES = (
        ((3, 3), (1, 1), (1, 1), (1, 1)),
        ((3, 1), (1, 1), (1, 0), (1, 1)),
        ((2, 5), (2, 1), (0, 3), (1, 2)),
        ((3, 2), (3, 2), (2, 1), (2, 3)),
    )

    def forward(self, x, weights, reduced, spans, biases, scale, shift):
        results = []
        for (kernel, *window), weight, r, span, bias in zip(self.CASES, weights, reduced, spans, biases, strict=True):
            results.append(involution2d(x, weight, None, *window))
            results.append(span_involution2d(x, r, span, None, kernel, *window))
            results.append(span_involution2d(x, r, span[:, :, None, None], bias, kernel, *window))
            geometry = (kernel, *window)
            results.append(torch.ops.pyinvolution.span_involution2d(x, r, span, bias, scale, shift, True, *geometry))
            halo = [d * (k - 1) // 2 for d, k in zip(window[2], kernel, strict=True)]
            layer = (kernel, window[0], halo, window[2])
            reduce = span[: r.shape[1], :1].repeat(1, x.shape[1])
            results.append(
                torch.ops.pyinvolution.involution_layer2d(
                    x, reduce, bias[: r.shape[1]], span, bias, scale, shift, False, *layer
                )
            )
        return results


def operator_inputs(dtype: torch.dtype, channels: int = 6) -> tuple:
    torch.manual_seed(0)
    size, groups, width = (9, 11), 2, 3
    lists: list[list[torch.Tensor]] = [[], [], [], []]
    for kernel, stride, padding, dilation in Operators.CASES:
        out = [(n + 2 * p - d * (k - 1) - 1) // s + 1
               for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)]  # fmt: skip
        rows = groups * kernel[0] * kernel[1]
        shapes = ((2, groups, *kernel, *out), (2, width, *out), (rows, width), (rows,))
        for values, shape in zip(lists, shapes, strict=True):
            values.append(torch.randn(shape, dtype=dtype))
    wide = torch.promote_types(dtype, torch.float32)
    scale, shift = (torch.randn(channels, dtype=wide) for _ in range(2))
    return (torch.randn(2, channels, *size, dtype=dtype), *lists, scale, shift)


def onnxruntime_library() -> Path | None:
    """The shared library in the installed wheel of onnxruntime, if there is one."""
    spec = find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted((Path(spec.origin).parent / "capi").glob("libonnxruntime.so.*"))), None)
