"""optimize_for_inference: the same outputs, with everything folded, in one graph."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pyinvolution import Involution2d, inference, optimize_for_inference
from pyinvolution.explain import force_variant
from pyinvolution.models import create_model


def spread(model: nn.Module) -> nn.Module:
    """Batch norms with statistics and parameters as after training."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.2, 0.7)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


def small_rednet() -> nn.Module:
    return spread(create_model("rednet26", num_classes=7, base_channels=16, stem_channels=32))


def rest(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, Involution2d))]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_rednet(memory_format: torch.memory_format) -> None:
    model = small_rednet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimized = optimize_for_inference(model)
    assert not rest(optimized)
    assert not any(p.requires_grad for p in optimized.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    x = torch.randn(2, 3, 65, 70).to(memory_format=memory_format)
    expected = model(x)
    assert 0 < optimized.max_difference < 1e-3 * expected.abs().max()
    torch.testing.assert_close(optimized(x), expected, rtol=1e-4, atol=1e-4)
    # About a third of the launches are left.
    assert not any("norm" in str(node.target) for node in optimized.graph.nodes)
    # The sums of residual blocks are added in place, as in the model.
    sums = [node.target for node in optimized.graph.nodes if "add" in str(node.target)]
    assert sums == ["add_"] * sum(model.layers)


def test_compile_has_one_graph() -> None:
    torch._dynamo.reset()
    optimized = optimize_for_inference(small_rednet())
    x = torch.randn(1, 3, 64, 64)
    explanation = torch._dynamo.explain(optimized)(x)
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)
    layers = (nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), Involution2d(32, 7, 2), nn.BatchNorm2d(32), nn.ReLU())
    optimized = optimize_for_inference(spread(nn.Sequential(*layers)))
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        result = torch.compile(optimized, fullgraph=True)(x)
        torch.testing.assert_close(result, optimized(x), rtol=1e-4, atol=1e-4)


class Block(nn.Module):
    def __init__(self, layer: nn.Module, *after: nn.Module) -> None:
        super().__init__()
        self.layer, self.after = layer, nn.Sequential(*after)

    def forward(self, input: Tensor) -> Tensor:
        return self.after(self.layer(input)) + 1


@pytest.mark.parametrize("variant", ["cpu/fused", "cpu/composed"])
@pytest.mark.parametrize(
    "block",
    [
        lambda: Block(Involution2d(32, 7, 2), nn.BatchNorm2d(32), nn.ReLU()),
        lambda: Block(Involution2d(32, 3), nn.BatchNorm2d(32, affine=False)),
        lambda: Block(Involution2d(32, 4, bias=True), nn.ReLU()),
        lambda: Block(Involution2d(32, 5, bias=True), nn.BatchNorm2d(32), nn.SiLU()),
        lambda: Block(Involution2d(32, 3, out_channels=8), nn.BatchNorm2d(8), nn.ReLU()),
        lambda: Block(Involution2d(32, 3, norm_layer=None), nn.Dropout()),
        lambda: Block(Involution2d(32, 3, norm_layer=lambda c: nn.GroupNorm(2, c))),
        lambda: Block(nn.Conv2d(32, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        lambda: Block(nn.Conv2d(32, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)),
    ],
)
def test_blocks(block, variant: str) -> None:
    torch.manual_seed(0)
    model = block().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    if isinstance(model.layer, Involution2d) and model.layer.bias is not None:
        nn.init.normal_(model.layer.bias)
    x = torch.randn(2, 32, 9, 8, requires_grad=True)
    expected = model(x)
    with force_variant(variant):
        optimized = optimize_for_inference(model)
        with torch.no_grad():
            torch.testing.assert_close(optimized(x), expected, rtol=1e-4, atol=1e-4)
        grads = [torch.autograd.grad(f(x).square().sum(), x)[0] for f in (model, optimized)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


def test_a_shared_convolution_stays() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

        def forward(self, input: Tensor) -> Tensor:
            return self.conv(self.norm(self.conv(input)))

    model = spread(Shared())
    x = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(optimize_for_inference(model)(x), model(x))


class Doubling(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: Involution2d(32, 3, norm_layer=lambda c: nn.BatchNorm2d(c, track_running_stats=False)),
        lambda: Involution2d(32, 3, norm_layer=Doubling),
        lambda: Involution2d(32, 3, norm_layer=nn.SyncBatchNorm),
        lambda: nn.Sequential(Involution2d(32, 3), Doubling(32)),
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(32, 8, 3)),
        lambda: nn.Conv3d(2, 8, 3),
    ],
)
def test_what_does_not_fold(layer) -> None:
    torch.manual_seed(0)
    model = spread(nn.Sequential(layer(), nn.ReLU()))
    x = torch.randn(2, 2, 5, 6, 7) if isinstance(model[0], nn.Conv3d) else torch.randn(2, 32, 9, 8)
    torch.testing.assert_close(optimize_for_inference(model, x)(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("watched", ["0", "1", "2", "3", "3.reduce.norm", "3.span", "4", "5"])
def test_hooks_stay(watched: str) -> None:
    layers = (nn.Conv2d(3, 32, 1), nn.BatchNorm2d(32), nn.ReLU(), Involution2d(32, 3), nn.BatchNorm2d(32), nn.ReLU())
    model = spread(nn.Sequential(*layers))
    model.get_submodule(watched).register_forward_hook(lambda module, args, output: 2 * output)
    x = torch.randn(2, 3, 9, 8)
    torch.testing.assert_close(optimize_for_inference(model)(x), model(x))


def test_a_weight_that_is_read_elsewhere_stays() -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, input: Tensor, factor: Tensor) -> Tensor:
            return self.norm(self.conv(input)) + factor * self.conv.weight.sum()

    model = spread(Reading())
    given = torch.randn(1, 3, 4, 4), torch.randn(())
    torch.testing.assert_close(optimize_for_inference(model, given)(*given), model(*given))


@pytest.mark.parametrize("inside", [False, True])
def test_a_layer_alone_images_without_a_batch_and_twice(inside: bool) -> None:
    layer = spread(Involution2d(32, 3, 2, out_channels=8))
    optimized = optimize_for_inference(nn.Sequential(layer) if inside else layer)
    assert [type(m).__name__ for m in optimized.children()] == ["_FoldedInvolution2d"]
    x = torch.randn(32, 9, 8)
    torch.testing.assert_close(optimized(x), layer(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(optimize_for_inference(optimized)(x), optimized(x))
    with pytest.raises(ValueError, match="input has shape"):
        optimized(torch.randn(1, 31, 9, 8))


def test_copies_and_other_dtypes_of_the_result() -> None:
    model = spread(nn.Sequential(Involution2d(32, 3, bias=True), nn.BatchNorm2d(32)))
    optimized, x = optimize_for_inference(model), torch.randn(2, 32, 9, 8)
    for again in (copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized))):
        assert again.max_difference == optimized.max_difference > 0
        assert torch.equal(again(x), optimized(x))
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        result = copy.deepcopy(optimized).to(dtype)(x.to(dtype))
        assert result.dtype == dtype
        torch.testing.assert_close(result.float(), optimized(x), rtol=0.1, atol=0.5)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert optimize_for_inference(model).max_difference < 0.5


@pytest.mark.parametrize("factor", [1.1, float("nan"), float("inf")])
def test_the_check_notices_a_wrong_fold(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, input: Tensor) -> dict:
            input.mul_(2)
            result = self.norm(self.conv(input))
            masked = result.masked_fill(torch.arange(8)[:, None, None] > 5, -float("inf"))
            return {"first": input, "masked": masked, "class": result.argmax(1)}

    def wrong(conv: nn.Module, norm: nn.Module) -> nn.Module:
        folded = fuse_conv_bn_eval(conv, norm)
        folded.weight.data[0] *= factor
        return folded

    model, x = spread(Outputs()), torch.randn(2, 3, 8, 8)
    before = x.clone()
    assert optimize_for_inference(model, x).max_difference < 1e-5
    assert torch.equal(x, before)
    monkeypatch.setattr(inference, "fuse_conv_bn_eval", wrong)
    with pytest.raises(RuntimeError, match="differs from the model by"):
        optimize_for_inference(model, x)


def test_errors() -> None:
    with pytest.raises(TypeError, match="model is a int, expected a Module"):
        optimize_for_inference(3)
    with pytest.raises(TypeError, match="example_input is needed"):
        optimize_for_inference(nn.Sequential(nn.ReLU()))
    assert optimize_for_inference(nn.Sequential(nn.ReLU()), torch.randn(3)).max_difference == 0
    with pytest.raises(TypeError, match="example_input is a int, expected a Tensor or a tuple"):
        optimize_for_inference(nn.Conv2d(3, 4, 3), 3)
    with pytest.raises(ValueError, match=r"example_input is needed: Sequential does not take .*\(2, 3, 64, 64\)"):
        optimize_for_inference(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 32 * 32, 2)))
    with pytest.warns(UserWarning, match="not compared"):
        optimize_for_inference(nn.Sequential(nn.Conv2d(3, 4, 1)), torch.full((1, 3, 2, 2), float("nan")))

    class Branch(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return input if input.sum() > 0 else -input

    with pytest.raises(ValueError, match="Branch cannot be traced"):
        optimize_for_inference(Branch(), torch.randn(3))
