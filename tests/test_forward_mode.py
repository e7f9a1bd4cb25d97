"""Forward mode is right wherever PyTorch has it, alone and with reverse mode and vmap, or raises an error."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from surgeries import plain, spread
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from pyinvolution import Involution2d, optimize_for_inference
from pyinvolution.functional import involution2d, span_involution2d
from pyinvolution.models import create_model


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WINDOW = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
CALLS = {
    "involution2d": (
        lambda x, w: involution2d(x, w, **WINDOW),
        (random(2, 4, 5, 4), random(2, 2, 3, 3, 3, 4, seed=1)),
    ),
    "involution2d with bias": (
        lambda x, w, b: involution2d(x, w, b, padding=1),
        (random(1, 2, 3, 4), random(1, 1, 3, 3, 3, 4, seed=1), random(2, seed=2)),
    ),
    "span_involution2d": (
        lambda x, r, s, b: span_involution2d(x, r, s, b, 3, **WINDOW),
        (random(1, 4, 5, 4), random(1, 3, 3, 4, seed=1), random(18, 3, seed=2), random(18, seed=3)),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_tangents_are_those_of_differences(name):
    function, tensors = CALLS[name]
    for wanted in [range(len(tensors)), *([place] for place in range(len(tensors)))]:
        leaves = [t.clone().requires_grad_(place in wanted) for place, t in enumerate(tensors)]
        assert gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(function, leaves, check_fwd_over_rev=True, fast_mode=True)
    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_forward_grad=True)


def layer(**options):
    torch.manual_seed(0)
    options = {"kernel_size": 3, "group_channels": 2, "reduction": 2, "activation": nn.Softplus, **options}
    return spread(Involution2d(4, dtype=torch.float64, **options)).eval()


def frozen(model):
    return model.requires_grad_(False)


def part_frozen(model):
    model.span.requires_grad_(False)
    return model


def rednet(**options):
    torch.manual_seed(0)
    options |= {
        "layers": [1],
        "stem": "small",
        "stem_channels": 4,
        "base_channels": 4,
        "group_channels": 2,
        "reduction": 2,
    }
    return spread(create_model("rednet", num_classes=2, in_channels=1, zero_init_residual=False, **options).double())


LAYERS = {
    "stride 1": layer,
    "stride 2": lambda: layer(stride=2),
    "even kernel": lambda: layer(kernel_size=(2, 4), stride=(1, 2)),
    "not fused": lambda: layer(fused=False),
    "projection": lambda: layer(out_channels=2, bias=True),
    "bias, no norm": lambda: layer(bias=True, norm_layer=None),
    "frozen": lambda: frozen(layer()),
    "span frozen": lambda: part_frozen(layer()),
    "in training": lambda: layer().train(),
}
MODELS = {
    **LAYERS,
    "RedNet in training": lambda: rednet().train(),
    "RedNet in evaluation": lambda: rednet().eval(),
    "RedNet, checkpointing": lambda: rednet(grad_checkpointing=True).eval(),
    "RedNet, stages frozen": lambda: rednet(frozen_stages=1).train(),
}


def state_of(model):
    return dict(model.named_parameters()), dict(model.named_buffers())


def apply(model, x, parameters=None):
    """Without a change of the model's buffers."""
    own, buffers = state_of(model)
    buffers = {name: buffer.clone() for name, buffer in buffers.items()}
    return functional_call(model, (own if parameters is None else parameters, buffers), (x,))


def image(model):
    return random(2, 4, 3, 4) if isinstance(model, Involution2d) else random(2, 1, 6, 6)


def scalar(model):
    return lambda x: apply(model, x).square().sum()


def dual_tangent(function, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent


@pytest.mark.parametrize("name", MODELS)
def test_jacobians(name):
    model, twin = MODELS[name](), plain(MODELS[name]())
    x, tangent = image(model), random(*image(model).shape, seed=5)
    expected = jacrev(lambda x: apply(twin, x))(x)
    product = torch.tensordot(expected, tangent, 4)
    assert product.abs().sum() > 0
    call = lambda x: apply(model, x)  # noqa: E731
    for found in (
        jvp(call, (x,), (tangent,))[1],
        dual_tangent(call, x, tangent),
    ):
        torch.testing.assert_close(found, product)
    try:
        linear = linearize(call, x)[1](tangent)
    except (AssertionError, RuntimeError):
        # It traces the function, and so takes neither operators in place nor checkpoints.
        assert not isinstance(model, Involution2d)
    else:
        torch.testing.assert_close(linear, product)
    with torch.no_grad():
        torch.testing.assert_close(dual_tangent(call, x, tangent), product)
    torch.testing.assert_close(jacfwd(call)(x), expected)


@pytest.mark.parametrize("name", MODELS)
def test_tangents_of_parameters(name):
    model, twin = MODELS[name](), plain(MODELS[name]())
    x, parameters = image(model), state_of(model)[0]
    tangents = {key: random(*value.shape, seed=len(key)) for key, value in parameters.items()}
    output, found = jvp(lambda p: apply(model, x, p), (parameters,), (tangents,))
    cotangent = random(*output.shape, seed=7)
    (gradients,) = vjp(lambda p: apply(twin, x, p), parameters)[1](cotangent)
    expected = sum((gradients[key] * tangents[key]).sum() for key in parameters)
    torch.testing.assert_close((found * cotangent).sum(), expected)
    for key in parameters:
        one = {key: parameters[key]}
        only = jvp(lambda p: apply(model, x, {**parameters, **p}), (one,), ({key: tangents[key]},))[1]
        torch.testing.assert_close(
            (only * cotangent).sum(), (gradients[key] * tangents[key]).sum(), atol=1e-9, rtol=1e-7
        )


@pytest.mark.parametrize("name", LAYERS)
def test_second_derivatives(name):
    model, twin = MODELS[name](), plain(MODELS[name]())
    x, tangent = image(model)[:1], random(1, 4, 3, 4, seed=5)
    expected = jacrev(jacrev(scalar(twin)))(x)
    assert expected.abs().sum() > 0
    seconds = [hessian, lambda f: jacfwd(jacrev(f))]
    # The tangents of torch's own batch norm have wrong derivatives in training.
    if not model.training:
        seconds += [lambda f: jacrev(jacfwd(f)), lambda f: jacfwd(jacfwd(f))]
    for second in seconds:
        torch.testing.assert_close(second(scalar(model))(x), expected)
    product = torch.tensordot(expected, tangent, 4)
    torch.testing.assert_close(jvp(grad(scalar(model)), (x,), (tangent,))[1], product)
    if not model.training:
        twice = grad(lambda x: jvp(scalar(model), (x,), (tangent,))[1])
        torch.testing.assert_close(twice(x), product)
    # Dual numbers through a backward pass.
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(), tangent)
        (gradient,) = torch.autograd.grad(scalar(model)(dual), dual, create_graph=True)
        torch.testing.assert_close(forward_ad.unpack_dual(gradient).tangent, product)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "in training"])
def test_vmap_and_forward_mode(name):
    model, twin = MODELS[name](), plain(MODELS[name]())
    x, tangent = random(3, 2, 4, 3, 4), random(3, 2, 4, 3, 4, seed=5)
    expected = torch.stack([jvp(lambda x: apply(twin, x), (a,), (t,))[1] for a, t in zip(x, tangent, strict=True)])
    call = lambda x: apply(model, x)  # noqa: E731
    torch.testing.assert_close(vmap(lambda a, t: jvp(call, (a,), (t,))[1])(x, tangent), expected)
    torch.testing.assert_close(jvp(vmap(call), (x,), (tangent,))[1], expected)
    # One image, many tangents.
    expected = torch.stack([jvp(lambda x: apply(twin, x), (x[0],), (t,))[1] for t in tangent])
    torch.testing.assert_close(vmap(lambda t: jvp(call, (x[0],), (t,))[1])(tangent), expected)


@pytest.mark.parametrize("name", MODELS)
def test_optimized_models(name):
    model = MODELS[name]().eval()
    x, tangent = image(model), random(*image(model).shape, seed=5)
    expected = vjp(plain(model), x)[1]
    optimized = optimize_for_inference(model, x)
    with torch.no_grad():
        for found in (jvp(optimized, (x,), (tangent,))[1], dual_tangent(optimized, x, tangent)):
            cotangent = random(*found.shape, seed=7)
            torch.testing.assert_close((found * cotangent).sum(), (expected(cotangent)[0] * tangent).sum())


@pytest.mark.parametrize("name", ["stride 1", "not fused"])
def test_compiled_code_has_no_forward_mode(name):
    """It raises an error, or runs eagerly; it never gives zeros."""
    # In a process of its own: Dynamo leaves its level of forward mode behind where it raises an error.
    code = f"import test_forward_mode; test_forward_mode.derive_in_compiled_code({name!r})"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def derive_in_compiled_code(name):
    model = MODELS[name]()
    x, tangent = image(model), random(*image(model).shape, seed=5)
    compiled = torch.compile(lambda x: jvp(model, (x,), (tangent,))[1], backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        compiled(x)
    expected = jvp(model, (x,), (tangent,))[1]
    for function in (
        lambda: jvp(torch.compile(model, backend="aot_eager"), (x,), (tangent,))[1],
        lambda: dual_tangent(torch.compile(model, backend="aot_eager"), x, tangent),
    ):
        torch._dynamo.reset()
        try:
            found = function()
        except (RuntimeError, NotImplementedError):
            continue
        torch.testing.assert_close(found, expected)
