"""RedNet: its size, its features, and the switches that training code relies on."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pyinvolution import Involution2d
from pyinvolution.models import RedNet, create_model, list_models
from pyinvolution.models.rednet import Bottleneck

PARAMETERS = {
    "rednet26": 9_233_166,
    "rednet38": 12_386_986,
    "rednet50": 15_540_806,
    "rednet101": 25_652_950,
    "rednet152": 33_984_582,
}
GIGA_MULTIPLY_ADDS = {
    "rednet26": 1.685,
    "rednet38": 2.167,
    "rednet50": 2.649,
    "rednet101": 4.659,
    "rednet152": 6.679,
}
SMALL = {"stem": "small", "stem_channels": 32, "base_channels": 16, "num_classes": 10}


def small(layers=(1, 2), **kwargs):
    torch.manual_seed(0)
    return create_model("rednet", layers=layers, **{**SMALL, **kwargs})


def scramble(model):
    """Weights and statistics with which every part of the network matters to its output."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    tensor.uniform_(0.5, 1.5)
                for tensor in (module.bias, module.running_mean):
                    tensor.normal_(std=0.1)
    return model


def test_names():
    assert list_models("rednet*") == list(PARAMETERS)
    assert list_models("rednet*5*") == ["rednet50", "rednet152"]
    with pytest.raises(ValueError, match="name is 'redent50': did you mean 'rednet50'"):
        create_model("redent50")
    with pytest.raises(TypeError, match="layers"):
        create_model("rednet")


@pytest.mark.parametrize("name", PARAMETERS)
def test_size(name):
    model = create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)
    # Torch counts a multiply-add as two operations.
    assert counter.get_total_flops() / 2e9 == pytest.approx(GIGA_MULTIPLY_ADDS[name], abs=5e-4)


def test_small_network_for_digits():
    model = small(layers=[1, 1, 1])
    assert sum(p.numel() for p in model.parameters()) == 91_218
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert [f.shape[1:] for f in model.features(torch.randn(2, 3, 28, 28))] == [
        (64, 14, 14),
        (128, 7, 7),
        (256, 4, 4),
    ]


@pytest.mark.parametrize("size", [(224, 224), (225, 225), (65, 96), (1, 1)])
def test_features(size):
    model = create_model("rednet26", device="meta")
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8, 16, 32]
    image = torch.empty(2, 3, *size, device="meta")
    expected = [
        (2, channels, *(-(-n // stride) for n in size))
        for channels, stride in zip((64, 256, 512, 1024, 2048), (2, 4, 8, 16, 32), strict=True)
    ]
    assert [tuple(f.shape) for f in model.features(image)] == expected[1:]
    last, taken = model.forward_intermediates(image)
    assert [tuple(f.shape) for f in taken] == expected
    assert tuple(last.shape) == tuple(model.forward_features(image).shape) == expected[-1]
    assert tuple(model.forward_head(last, pre_logits=True).shape) == (2, 2048)


def test_forward_is_the_chain_of_its_parts():
    model = scramble(small()).eval()
    x = torch.randn(2, 3, 33, 30)
    stages = model.features(x)
    torch.testing.assert_close(stages[-1], model.forward_features(x), rtol=0, atol=0)
    torch.testing.assert_close(stages[0], model.layer1(model.pool(model.stem(x))), rtol=0, atol=0)
    torch.testing.assert_close(model.head(stages[-1].mean((2, 3))), model(x))
    last, (stem, first) = model.forward_intermediates(x, [0, -2], stop_early=True)
    torch.testing.assert_close(stem, model.stem(x), rtol=0, atol=0)
    torch.testing.assert_close(first, stages[0], rtol=0, atol=0)
    assert last is first
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([0, -2]) == [0, 1]
    torch.testing.assert_close(pruned(x), stages[0], rtol=0, atol=0)
    assert not hasattr(pruned, "layer2")


def test_strides_become_dilations():
    layers = (1, 1, 1, 1)
    model = small(layers, stem="imagenet", output_stride=8)
    assert [f.shape[-1] for f in model.features(torch.randn(1, 3, 64, 64))] == [16, 8, 8, 8]
    assert [stage[0].involution.dilation for stage in model.stages] == [(1, 1), (1, 1), (2, 2), (4, 4)]
    same = small(layers, stem="imagenet", strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))
    same.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 40, 40)
    torch.testing.assert_close(same.eval()(x), model.eval()(x), rtol=0, atol=0)


def test_channels_last_and_compile():
    model = scramble(small()).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        model.to(memory_format=torch.channels_last)
        features = model.features(x.to(memory_format=torch.channels_last))
        assert all(f.is_contiguous(memory_format=torch.channels_last) for f in features)
        torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
        sizes = {2: torch.export.Dim("height", min=16), 3: torch.export.Dim("width", min=16)}
        exported = torch.export.export(model, (x,), dynamic_shapes=(sizes,)).module()
        larger = torch.randn(2, 3, 41, 50)
        torch.testing.assert_close(exported(larger), model(larger))


def test_blocks_start_as_identity():
    model = small()
    block = model.layer2[1]
    x = torch.randn(2, 128, 6, 6).relu()
    torch.testing.assert_close(block(x), x, rtol=0, atol=0)
    assert model.layer1[0].norm3.weight.eq(0).all()
    assert small(zero_init_residual=False).layer2[1].norm3.weight.eq(1).all()
    others = [m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and "norm3" not in name]
    assert others
    assert all(m.weight.eq(1).all() and m.bias.eq(0).all() for m in others)


def test_initialisation():
    model = create_model("rednet26")
    for conv in (model.stem.conv1, model.layer3[1].conv1, model.layer4[0].involution.span):
        fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
    assert model.head.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not model.head.bias.any()
    assert not model.layer4[0].involution.span.bias.any()
    deferred = create_model("rednet26", device="meta").to_empty(device="cpu")
    deferred.init_weights()
    assert deferred.layer3[1].conv1.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.1)
    assert deferred.stem.norm1.running_var.eq(1).all()


@pytest.mark.parametrize("frozen", [-1, 0, 1, 2])
def test_frozen_stages(frozen):
    model = scramble(small(frozen_stages=frozen))
    parts = [model.stem, model.layer1, model.layer2]
    model.eval()
    model.train()
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(4, 3, 16, 16)).square().sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= p.grad.sign()
    for part, name, still in zip(
        parts, ("stem", "layer1", "layer2"), (frozen > -1, frozen > 0, frozen > 1), strict=True
    ):
        assert not any(m.training for m in part.modules()) if still else part.training
        assert all(p.requires_grad != still and (p.grad is None) == still for p in part.parameters())
        changed = [not torch.equal(v, before[f"{name}.{k}"]) for k, v in part.state_dict().items()]
        assert not any(changed) if still else all(changed)
    assert model.head.weight.grad is not None


def test_norm_eval():
    model = scramble(small(norm_eval=True))
    x = torch.randn(2, 3, 16, 16)
    expected = model.eval()(x)
    model.train()
    assert model.training
    assert model.layer1[0].training
    before = copy.deepcopy(model.state_dict())
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model(x).sum().backward()
    assert model.layer1[0].norm1.weight.grad.any()


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointing_changes_nothing_but_memory(compiled):
    x = torch.randn(4, 3, 16, 16)
    plain, saving = scramble(small([2])), scramble(small([2], grad_checkpointing=True))
    saved = []
    for model in (plain, saving):
        if compiled:
            torch._dynamo.reset()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            output = run(x)
        saved.append(sum(sizes))
        output.square().sum().backward()
    assert compiled or saved[1] < saved[0] / 2
    for p, q in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)
    for p, q in zip(plain.buffers(), saving.buffers(), strict=True):
        torch.testing.assert_close(q, p)
    saving.set_grad_checkpointing(False)
    assert not any(stage.grad_checkpointing for stage in saving.stages)


def test_head():
    model = small(drop_rate=0.5)
    x = torch.randn(2, 3, 16, 16)
    assert not torch.equal(model(x), model(x))
    model.eval()
    torch.testing.assert_close(model(x), model(x), rtol=0, atol=0)
    model.reset_classifier(3)
    assert model.num_classes == 3
    assert model.get_classifier() is model.head
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert model(x).shape == (2, 128)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 128, 4, 4)
    with pytest.raises(ValueError, match="num_classes is 5, expected 0 with global_pool=''"):
        model.reset_classifier(5)
    assert small(num_classes=0, in_channels=1, dtype=torch.bfloat16)(x[:, :1].bfloat16()).dtype == torch.bfloat16


def test_other_norms():
    model = small(norm_layer=lambda channels: nn.GroupNorm(2, channels))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert model.layer1[0].norm3.weight.eq(0).all()
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, 10)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(small(norm_eval=True)).train()
    assert not synced.stem.norm1.training


def test_kernel_norm():
    """Every involution has it, the stem's too; the factor of a kernel of length one does not count."""
    torch.manual_seed(0)
    model = scramble(small(kernel_norm="l2")).eval()
    involutions = [module for module in model.modules() if isinstance(module, Involution2d)]
    assert len(involutions) == 1 + sum(model.layers)
    assert {module.kernel_norm for module in involutions} == {"l2"}
    x = torch.randn(2, 3, 16, 16)
    before = model(x)
    with torch.no_grad():
        for module in involutions:
            module.span.weight *= 3
            module.span.bias *= 3
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="kernel_norm is 'l3', expected one of softmax, l2"):
        small(kernel_norm="l3")


@pytest.mark.parametrize("last", [-1, 0, 1, 2])
def test_convolution_stages(last):
    model = small(conv_stages=last, kernel_size=5)
    kinds = [type(model.stem.involution), type(model.layer1[0].involution), type(model.layer2[1].involution)]
    assert kinds == [nn.Conv2d if index <= last else Involution2d for index in range(3)]
    assert [info["reduction"] for info in model.feature_info] == [2, 2, 4]
    assert [tuple(map.shape[1:]) for map in model.features(torch.randn(1, 3, 17, 20))] == [(64, 9, 10), (128, 5, 5)]
    dilated = small(conv_stages=last, output_stride=2)
    assert dilated.layer2[0].involution.dilation == (2, 2)
    assert [map.shape[-1] for map in dilated.features(torch.randn(1, 3, 17, 20))] == [10, 10]


def test_convolutions_everywhere_are_a_resnet():
    timm = pytest.importorskip("timm")
    model = scramble(small([1, 2, 2, 1], conv_stages=4, stem="imagenet", stem_channels=64, base_channels=64)).eval()
    options = {"layers": [1, 2, 2, 1], "stem_type": "deep", "stem_width": 32, "num_classes": 10}
    resnet = timm.create_model("resnet26", **options).eval()
    resnet.load_state_dict(dict(zip(resnet.state_dict(), model.state_dict().values(), strict=True)))
    x = torch.randn(2, 3, 65, 64)
    torch.testing.assert_close(model(x), resnet(x), rtol=1e-4, atol=1e-4)


def test_copies():
    model = scramble(small(frozen_stages=0)).eval()
    x = torch.randn(1, 3, 16, 16)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)
        assert not twin.train().stem.training
    assert {type(m) for m in model.stages[1]} == {Bottleneck}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layers": 50}, TypeError, "layers is 50, expected a sequence of ints"),
        ({"layers": []}, ValueError, r"layers is \[\], expected at least one entry"),
        ({"layers": [1, 0]}, ValueError, r"layers\[1\] is 0, expected at least 1"),
        ({"stem": "tiny"}, ValueError, "stem is 'tiny', expected 'imagenet' or 'small'"),
        ({"stem_channels": 33}, ValueError, "stem_channels is 33, expected an even number"),
        ({"stem_channels": 24}, ValueError, "group_channels is 16, expected a divisor of channels=12"),
        ({"num_classes": -1}, ValueError, "num_classes is -1, expected at least 0"),
        ({"num_classes": 2.5}, TypeError, r"num_classes is 2\.5, expected an int"),
        ({"in_channels": 0}, ValueError, "in_channels is 0, expected at least 1"),
        ({"strides": [1, 2, 2]}, ValueError, r"strides is \[1, 2, 2\], expected 2 entries, one for each stage"),
        ({"dilations": [1, 0]}, ValueError, r"dilations\[1\] is 0, expected at least 1"),
        ({"output_stride": 3}, ValueError, r"output_stride is 3, expected one of \[4, 8\]"),
        ({"output_stride": 4, "strides": [1, 1]}, ValueError, "expected None with output_stride"),
        ({"frozen_stages": 3}, ValueError, "frozen_stages is 3, expected at most the number of stages, 2"),
        ({"conv_stages": 3}, ValueError, "conv_stages is 3, expected at most the number of stages, 2"),
        ({"conv_stages": True}, TypeError, "conv_stages is True, expected an int"),
        ({"conv_stages": -2}, ValueError, "conv_stages is -2, expected at least -1"),
        ({"frozen_stages": -2}, ValueError, "frozen_stages is -2, expected at least -1"),
        ({"drop_rate": 1.0}, ValueError, r"drop_rate is 1\.0, expected a value in \[0, 1\)"),
        ({"global_pool": "max"}, ValueError, "global_pool is 'max', expected 'avg' or ''"),
        ({"depth": 50}, TypeError, "depth"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        RedNet(**{"layers": [1, 1], **arguments})


def test_bad_input():
    model = small(in_channels=1)
    for image in (torch.zeros(2, 3, 16, 16), torch.zeros(1, 16, 16)):
        with pytest.raises(ValueError, match=r"RedNet: input has shape .*, expected \(N, 1, H, W\)"):
            model(image)
    with pytest.raises(TypeError, match=r"RedNet: input has dtype torch\.uint8, expected a floating-point dtype"):
        model.features(torch.zeros(2, 1, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"indices is \[3\], expected one or more of -3 to 2"):
        model.forward_intermediates(torch.zeros(2, 1, 16, 16), [3])


@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_functional_call_differentiates_its_own_parameters(grad_checkpointing):
    """What is computed again in backward sees the parameters of the call, not those that the module has got back."""
    from torch.func import functional_call

    options = {"layers": [1, 1], "stem": "small", "stem_channels": 32, "base_channels": 16, "num_classes": 3}
    model = create_model("rednet", grad_checkpointing=grad_checkpointing, **options).double()
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    given = {
        name: (value + 0.3 * torch.randn(value.shape, generator=draw, dtype=torch.float64)).detach().requires_grad_()
        for name, value in model.named_parameters()
    }
    other = create_model("rednet", **options).double()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(given[name])
    functional_call(model, given, (x,)).square().sum().backward()
    other(x).square().sum().backward()
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(given[name].grad, parameter.grad, rtol=1e-8, atol=1e-10)
    assert all(parameter.grad is None for parameter in model.parameters())
