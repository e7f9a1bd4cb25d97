"""How a span involution runs is decided in one place (`route` in cpp/core/dispatch.cpp): everybody gives its answer."""

import itertools

import pytest
import torch

from pyinvolution import Involution2d, build_info, explain_layer, explain_span, force_variant
from pyinvolution._library import _C
from pyinvolution.functional import span_involution2d

# channels, groups, reduced, kernel, stride, height, width
LAYERS = (
    (32, 2, 8, 7, 1, 9, 8),
    (32, 2, 16, 7, 2, 8, 12),
    (64, 4, 16, 7, 1, 14, 14),
    (512, 32, 128, 7, 1, 7, 7),
    (16, 4, 4, 3, 1, 6, 6),  # 4 channels per group
    (6, 6, 2, 3, 1, 5, 4),  # a kernel for every channel
    (8, 1, 2, 3, 1, 5, 5),
    (14, 2, 3, 5, 2, 10, 10),  # 7 channels per group
    (32, 2, 8, 33, 1, 40, 40),  # more than 1024 taps: no fused kernel
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def arguments(layer: tuple, dtype: torch.dtype, layout: torch.memory_format) -> tuple[tuple, dict]:
    channels, groups, reduced, kernel, stride, height, width = layer
    pixels = [(size - 1) // stride + 1 for size in (height, width)]
    x = torch.randn(1, channels, height, width, dtype=dtype).to(memory_format=layout)
    r = torch.randn(1, reduced, *pixels, dtype=dtype).to(memory_format=layout)
    tensors = (x, r, torch.randn(groups * kernel**2, reduced, dtype=dtype))
    return tensors, {"kernel_size": kernel, "stride": stride, "padding": kernel // 2}


def pairs(window: dict) -> list[tuple[int, int]]:
    return [(window[name],) * 2 for name in ("kernel_size", "stride", "padding")] + [(1, 1)]


def dense(layer: tuple, dtype: torch.dtype, device: str, layout: torch.memory_format, window: dict, **options) -> bool:
    kernel_size, stride, padding, dilation = pairs(window)
    return _C.fuses_span(
        dtype=str(dtype).removeprefix("torch."), device=device, input=(1, layer[0], *layer[5:]), groups=layer[1],
        reduced=layer[2], kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation,
        channels_last=layout is torch.channels_last, **options,
    )  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everybody_gives_the_same_answer(layer: tuple, dtype: torch.dtype) -> None:
    for layout in LAYOUTS:
        tensors, window = arguments(layer, dtype, layout)
        kernels = {
            p: explain_span(*tensors, None, **window, pass_=p).chosen != "composed" for p in ("forward", "backward")
        }
        for differentiable in (False, True):
            expected = kernels["forward"] and (kernels["backward"] or not differentiable)
            assert torch.ops.pyinvolution.fuses_span(*tensors, *pairs(window), differentiable) == expected
            assert dense(layer, dtype, "cpu", layout, window, differentiable=differentiable) == expected
        trained = span_involution2d(*(t.requires_grad_() for t in tensors), None, **window)
        assert trained.grad_fn is not None
        assert trained.grad_fn.name() == ("_SpanInvolution2dBackward" if expected else "_Involution2dBackward")


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_the_module_and_the_compiler_ask_the_same_question(layer: tuple) -> None:
    channels, groups, reduced, kernel, stride, height, width = layer
    module = Involution2d(channels, kernel, stride, group_channels=channels // groups, reduction=channels // reduced)
    x = torch.randn(1, channels, height, width)
    eager = module(x).grad_fn.name()
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch.compile(module, backend=backend, fullgraph=True)(x)
    called = {str(node.target) for graph in graphs for g in (graph, *graph.children()) for node in g.graph.nodes}
    fused = any("span_involution2d" in target for target in called)
    assert fused == (eager == "_SpanInvolution2dBackward")


def test_a_forced_variant_decides_for_all() -> None:
    tensors, window = arguments(LAYERS[0], torch.float32, torch.channels_last)
    assert torch.ops.pyinvolution.fuses_span(*tensors, *pairs(window), True)
    with force_variant("composed"):
        assert not torch.ops.pyinvolution.fuses_span(*tensors, *pairs(window), True)
        assert explain_span(*tensors, None, **window).chosen == "composed"
        assert (
            span_involution2d(*(t.requires_grad_() for t in tensors), None, **window).grad_fn.name()
            == "_Involution2dBackward"
        )


def test_weights_that_a_backward_pass_needs_are_computed_once() -> None:
    tensors, window = arguments(LAYERS[-1], torch.float32, torch.contiguous_format)
    x, r, s = (t.requires_grad_() for t in tensors)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        span_involution2d(x, r, s, None, **window).sum().backward()
    assert sum(event.count for event in profile.key_averages() if event.key == "aten::convolution") == 1


def test_routes_on_a_gpu_follow_from_strides_and_sizes() -> None:
    built = not build_info()["cuda"].startswith("none: ")
    stage4, wide = (512, 32, 128, 7, 1, 7, 7), (64, 4, 16, 7, 1, 56, 56)
    window = {"kernel_size": 7, "stride": 1, "padding": 3}
    for layer, layout, dtype in itertools.product((stage4, wide), LAYOUTS, (torch.float32, torch.bfloat16)):
        fused = dense(layer, dtype, "cuda", layout, window, differentiable=True)
        # The fused CUDA kernels take channels_last, 16-bit types, and not 128 reduced channels for 7 x 7 pixels.
        assert fused == (built and layer is wide and layout is torch.channels_last and dtype is torch.bfloat16)


def test_the_layer_operator_is_explained() -> None:
    parameters = torch.randn(8, 32), torch.randn(98, 8)
    explanation = explain_layer(torch.randn(1, 32, 8, 8), *parameters)
    assert explanation.chosen == "fused"
    refused = explain_layer(torch.randn(1, 32, 8, 8, dtype=torch.float64), *(p.double() for p in parameters))
    assert refused.chosen == "composed"
    assert (
        refused.verdicts[0].refusal == "requires float32, float16 or bfloat16 (it accumulates in float32), got float64"
    )
