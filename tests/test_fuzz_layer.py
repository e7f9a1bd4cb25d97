"""Random surgery on layers and small RedNets, in random circumstances: what comes out is what the plain twin gives.

PYINVOLUTION_FUZZ is the number of combinations, or "seed=N" for one of them.
"""

import copy
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from surgeries import ANYWHERE, ON_CONVOLUTIONS, assert_same, operate, plain, spread, trained, weighted
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap
from torch.utils.checkpoint import checkpoint

from pyinvolution import Involution2d, optimize_for_inference
from pyinvolution.models import create_model

GIVEN = os.environ.get("PYINVOLUTION_FUZZ", "1000")
SEEDS = [int(GIVEN[5:])] if GIVEN.startswith("seed=") else range(int(GIVEN))
CHUNKS = 10


# --- what is operated on ----------------------------------------------------------------------------------------------


def layer(draw: random.Random) -> nn.Module:
    options: dict[str, Any] = {
        "kernel_size": draw.choice([1, 2, 3, (3, 5), 7]),
        "stride": draw.choice([1, 1, 2, (2, 1)]),
        "dilation": draw.choice([1, 1, 2]),
        "group_channels": draw.choice([1, 4, 8]),
        "reduction": draw.choice([1, 2, 4]),
        "out_channels": draw.choice([None, None, 6]),
        "bias": draw.choice([False, True]),
        "norm_layer": draw.choice([nn.BatchNorm2d, nn.BatchNorm2d, None, lambda channels: nn.GroupNorm(1, channels)]),
        "activation": draw.choice([nn.ReLU, nn.SiLU, nn.Identity]),
        "fused": draw.choice([None, True, False]),
    }
    return Involution2d(8, dtype=torch.float64, **options)


def network(draw: random.Random) -> nn.Module:
    return create_model(
        "rednet", layers=draw.choice([[1], [2], [1, 1]]), in_channels=8, num_classes=3, stem="small", stem_channels=8,
        base_channels=4, expansion=2, kernel_size=draw.choice([3, 5]), group_channels=draw.choice([2, 4]), reduction=2,
        conv_stages=draw.choice([-1, -1, -1, 0, 1]), frozen_stages=draw.choice([-1, -1, -1, 0, 1]),
        norm_eval=draw.choice([False, False, True]), zero_init_residual=False, dtype=torch.float64,
    )  # fmt: skip


# --- what is done to modules ------------------------------------------------------------------------------------------
# Each of these makes the same choices for a model as for its twin.


def named(model: nn.Module, kinds: tuple[type, ...]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def on_a_convolution(model: nn.Module, draw: random.Random) -> tuple[str, nn.Module]:
    names = [name for name in named(model, (nn.Conv2d,)) if type(model.get_submodule(name)) is nn.Conv2d]
    # Most of them where parameters are read.
    spans = [name for name in names if name.endswith(("span", "reduce.conv"))]
    # A computed weight cannot be computed from another computed one.
    free = [name for name in spans if draw.random() < 0.7] or spans or names
    free = [name for name in free if not model.get_submodule(name)._forward_pre_hooks]
    surgery = draw.choice([*ON_CONVOLUTIONS])
    if not free:
        return "no convolution is left", model
    name = draw.choice(free)
    return f"{surgery} on {name}", operate(model, name, ON_CONVOLUTIONS[surgery], draw.randrange(1000))


def on_a_module(model: nn.Module, draw: random.Random) -> tuple[str, nn.Module]:
    name = draw.choice([name for name, _ in model.named_modules() if "parametrizations" not in name])
    surgery = draw.choice([*ANYWHERE])
    if type(model.get_submodule(name)).__name__ in ("Stem", "Stage") and surgery == "wrapped":
        surgery = "forward hook"  # a network asks its stages for their settings
    return f"{surgery} on {name or 'the model'}", operate(model, name, ANYWHERE[surgery])


def freeze(model: nn.Module, draw: random.Random) -> tuple[str, nn.Module]:
    names = [name for name, parameter in model.named_parameters() if parameter.is_leaf and draw.random() < 0.4]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in names)
    return f"freeze {names}", model


def some_in_eval(model: nn.Module, draw: random.Random) -> tuple[str, nn.Module]:
    names = [name for name in named(model, (nn.BatchNorm2d, Involution2d)) if draw.random() < 0.5]
    for name in names:
        model.get_submodule(name).eval()
    return f"eval {names}", model


def other_activation(model: nn.Module, draw: random.Random) -> tuple[str, nn.Module]:
    names = named(model, (nn.ReLU, nn.SiLU))
    if not names:
        return "no activation", model
    name, kind = draw.choice(names), draw.choice([nn.SiLU, nn.Tanh, nn.ReLU, nn.Identity])
    return f"{kind.__name__} for {name}", operate(model, name, lambda act: kind())


def cast(model: nn.Module, draw: random.Random) -> tuple[str, nn.Module]:
    return "float and double", model.float().double()


def deep_copy(model: nn.Module, draw: random.Random) -> tuple[str, nn.Module]:
    return "deepcopy", copy.deepcopy(model)


def tie(model: nn.Module, draw: random.Random) -> tuple[str, nn.Module]:
    convs = [m for name in named(model, (nn.Conv2d,)) if type(m := model.get_submodule(name)) is nn.Conv2d]
    convs = [conv for conv in convs if isinstance(conv._parameters.get("weight"), nn.Parameter)]
    pairs = [(a, b) for i, a in enumerate(convs) for b in convs[:i] if a.weight.shape == b.weight.shape]
    if not pairs:
        return "no pair of convolutions", model
    index = draw.randrange(len(pairs))
    pairs[index][0].weight = pairs[index][1].weight
    return f"tie pair {index}", model


def checkpointed(model: nn.Module, draw: random.Random) -> tuple[str, nn.Module]:
    # The twin's stages do not look at the switch.
    for module in model.modules():
        if hasattr(module, "grad_checkpointing"):
            module.grad_checkpointing = True
    return "grad_checkpointing", model


OPERATIONS: list[Callable[[nn.Module, random.Random], tuple[str, nn.Module]]] = [
    *(on_a_convolution, on_a_convolution, on_a_convolution, on_a_module, on_a_module),
    *(freeze, some_in_eval, other_activation, cast, deep_copy, tie, checkpointed),
]


# --- in what circumstances it is called -------------------------------------------------------------------------------


def in_training(model: nn.Module, x: Tensor) -> dict:
    return trained(model, x)


def twice(model: nn.Module, x: Tensor) -> dict:
    model(x)
    return trained(model, x.flip(0))


def in_evaluation(model: nn.Module, x: Tensor) -> dict:
    return trained(model.eval(), x)


def without_gradients(model: nn.Module, x: Tensor) -> dict:
    with torch.no_grad():
        return {"output": model.eval()(x)}


def optimized(model: nn.Module, x: Tensor) -> dict:
    model.eval()
    if not any("forward" in vars(module) and not hasattr(module, "_old_forward") for module in model.modules()):
        model = optimize_for_inference(model, x)
    with torch.no_grad():
        return {"output": model(x)}


def in_float32(model: nn.Module, x: Tensor) -> dict:
    """Where there are kernels that compute the weights, too."""
    return without_gradients(model.float(), x.float())


def optimized_in_float32(model: nn.Module, x: Tensor) -> dict:
    return optimized(model.float(), x.float())


def in_autocast(model: nn.Module, x: Tensor) -> dict:
    """In kind: the shape, and which parameters have a gradient. The twin's operators choose other dtypes."""
    with torch.autocast("cpu", torch.bfloat16):
        output = model.float().eval()(x.float())
    weighted(output.float()).backward()
    gradients = [torch.tensor(parameter.grad is not None) for parameter in model.parameters()]
    return {"output": output.detach().isfinite().double(), "gradients": torch.stack(gradients)}


def with_other_parameters(model: nn.Module, x: Tensor) -> dict:
    def call(model: nn.Module, x: Tensor) -> Tensor:
        return functional_call(model, {k: 0.5 * v + 0.1 for k, v in model.named_parameters()}, (x,))

    return trained(model, x, call)


def mapped(model: nn.Module, x: Tensor) -> dict:
    images = torch.stack([x, x.flip(0), -x])
    return trained(model.eval(), images, lambda model, x: vmap(model)(x))


def in_a_checkpoint(model: nn.Module, x: Tensor) -> dict:
    return trained(model.eval(), x, lambda model, x: checkpoint(model, x, use_reentrant=False))


def in_forward_mode(model: nn.Module, x: Tensor) -> dict:
    output, tangent = jvp(model.eval(), (x,), (x.flip(-1),))
    return {"output": output.detach(), "tangent": tangent.detach()}


def twice_differentiated(model: nn.Module, x: Tensor) -> dict:
    x = x.detach().clone().requires_grad_()
    output = model.eval()(x)
    (gradient,) = torch.autograd.grad(weighted(output), x, create_graph=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    seconds = torch.autograd.grad(weighted(gradient), [x, *parameters], allow_unused=True)
    return {"output": output.detach(), **{f"second {index}": second for index, second in enumerate(seconds)}}


CIRCUMSTANCES: list[Callable[[nn.Module, Tensor], dict]] = [
    *(in_training, in_training, twice, in_evaluation, without_gradients, optimized, optimized, with_other_parameters),
    *(mapped, in_a_checkpoint, in_forward_mode, twice_differentiated, in_float32, optimized_in_float32, in_autocast),
]
REFUSED = (
    "modified inplace",  # backward hooks with operators in place
    "modified by an inplace operation",
    "of a view",
    "vmap",  # of statistics in place, of checkpoints
    "forward AD",
)
"""What PyTorch says of combinations that it does not have; the twin must get the same answer."""


def combination(seed: int) -> tuple[list[str], bool]:
    """Runs one; returns what was done, and whether there was a result to compare."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model = spread(draw.choice([layer, layer, network])(draw))
    twin = plain(model)
    log = [type(model).__name__]
    for operation in draw.choices(OPERATIONS, k=draw.randint(1, 4)):
        choices = draw.randrange(2**32)
        done, model = operation(model, random.Random(choices))
        twin = operation(twin, random.Random(choices))[1]
        log.append(done)
    circumstance = draw.choice(CIRCUMSTANCES)
    log.append(circumstance.__name__)
    x = torch.randn(2, 8, draw.choice([5, 8]), 6, dtype=torch.float64)
    results: list[Any] = []
    errors: list[Exception] = []
    for each in (twin, model):
        torch.manual_seed(seed)
        try:
            results.append(circumstance(each, x))
        except Exception as error:
            errors.append(error)
    try:
        if errors:
            # A checkpoint cannot be differentiated outside vmap, and the twin has none.
            alone = circumstance is mapped and "grad_checkpointing" in log
            assert not results or alone, f"only one of the two raises {errors[0]!r}"
            assert any(text in str(errors[0]) for text in REFUSED), f"both raise {errors[0]!r}"
            return log, False
        if circumstance in (in_float32, optimized_in_float32):
            (found, expected) = (result["output"] for result in reversed(results))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
        else:
            assert_same(results[1], results[0])
    except AssertionError as error:
        raise AssertionError(
            f"PYINVOLUTION_FUZZ=seed={seed} pytest {__file__}\n" + "\n".join(f"  {line}" for line in log) + f"\n{error}"
        ) from (errors[0] if errors else error)
    return log, True


@pytest.mark.parametrize("chunk", range(min(CHUNKS, len(SEEDS))))
@pytest.mark.filterwarnings("ignore")
def test_what_a_twin_gives(chunk: int) -> None:
    results = [combination(seed) for seed in SEEDS[chunk::CHUNKS]]
    assert len(results) < 10 or sum(compared for _, compared in results) > 0.8 * len(results)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.filterwarnings("ignore")
def test_compiled(seed: int) -> None:
    torch._dynamo.reset()
    torch.manual_seed(seed)
    model = spread(layer(random.Random(seed)))
    twin = plain(model)
    log = []
    for _ in range(2):
        done, model = on_a_convolution(model, random.Random(seed))
        twin = on_a_convolution(twin, random.Random(seed))[1]
        log.append(done)
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    compiled = torch.compile(model, backend="aot_eager")
    assert_same(trained(model, x, lambda _, x: compiled(x)), trained(twin, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wanted", ["input", "parameters", "both"])
def test_gradients_of_mapped_tensors(wanted: str, dtype: torch.dtype) -> None:
    """Inside vmap a tensor does not say whether it requires a gradient."""
    torch.manual_seed(0)
    model = spread(Involution2d(16, 3, 2)).to(dtype).eval()
    model.requires_grad_(wanted != "input")
    twin = plain(model)
    x = torch.randn(3, 2, 16, 5, 6, dtype=dtype, requires_grad=wanted != "parameters")
    leaves = [leaf for leaf in (x, *model.parameters()) if leaf.requires_grad]
    twins = [leaf for leaf in (x, *twin.parameters()) if leaf.requires_grad]
    torch._dynamo.reset()
    calls = {"eager": vmap(model), "inside": torch.compile(lambda x: vmap(model)(x), backend="aot_eager")}
    expected = torch.autograd.grad(weighted(torch.stack([twin(images) for images in x])), twins)
    tolerance = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {}
    for name, call in calls.items():
        try:
            output = call(x)
        except torch._dynamo.exc.TorchDynamoException:
            # It refuses to map a Function.
            assert name == "inside"
            continue
        torch.testing.assert_close(torch.autograd.grad(weighted(output), leaves), expected, **tolerance)
    if wanted == "input":
        optimized_model = optimize_for_inference(model, x.detach()[0])
        (gradient,) = torch.autograd.grad(weighted(vmap(optimized_model)(x)), x)
        torch.testing.assert_close(gradient, expected[0], **tolerance)
