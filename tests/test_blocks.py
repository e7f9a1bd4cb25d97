"""The blocks that involution is compared with: equations, identity at the beginning, places in a ResNet."""

import pytest
import torch
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("torchvision")
from torchvision.models import resnet50

from pyinvolution import involution2d
from pyinvolution.blocks import BLOCKS, CrissCross2d, GlobalContext2d, NonLocal2d, create_block, insert_block
from pyinvolution.blocks.deformable import DeformableConv2d
from pyinvolution.blocks.dynamic_graph import DynamicGraph2d

CHANNELS, SIZE = 16, (5, 7)


def randomised(block):
    """``block`` in float64 with random parameters, so that nothing is zero by initialisation."""
    generator = torch.Generator().manual_seed(0)
    block = block.double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return block


@pytest.fixture
def x():
    return torch.randn(2, CHANNELS, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", BLOCKS)
def test_shape_and_gradient(name, x):
    block = randomised(create_block(name, CHANNELS)).eval()
    input = x[:1, :, :3, :4].clone().requires_grad_()
    assert block(input).shape == input.shape
    inputs = (input, *block.parameters())
    assert torch.autograd.gradcheck(lambda input, *_: block(input), inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["non_local", "criss_cross", "global_context"])
def test_begins_as_identity(name, x):
    torch.testing.assert_close(create_block(name, CHANNELS).double()(x), x)


def test_non_local_is_softmax_attention(x):
    block = randomised(NonLocal2d(CHANNELS)).eval()
    theta, phi, g = (conv(x).flatten(2) for conv in (block.theta, block.phi, block.g))
    attention = torch.einsum("ncp,ncq->npq", theta, phi).softmax(2)
    y = torch.einsum("npq,ncq->ncp", attention, g).unflatten(2, SIZE)
    torch.testing.assert_close(block(x), x + block.norm(block.w(y)))


def test_criss_cross_is_attention_within_the_cross(x):
    block = randomised(CrissCross2d(CHANNELS, recurrence=1))
    query, key, value = (conv(x).flatten(2) for conv in (block.query, block.key, block.value))
    rows, columns = torch.meshgrid(*map(torch.arange, SIZE), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    cross = (rows[:, None] == rows) | (columns[:, None] == columns)
    energy = torch.einsum("ncp,ncq->npq", query, key).masked_fill(~cross, -torch.inf)
    y = torch.einsum("npq,ncq->ncp", energy.softmax(2), value).unflatten(2, SIZE)
    torch.testing.assert_close(block(x), x + block.gamma * y)

    block.recurrence = 2
    once = x + block.gamma * y
    torch.testing.assert_close(block(x), once + block.gamma * block.attend(once))
    # Two steps carry a pixel's value into every other one.
    input = x[:1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(block(input)[0, :, 0, 0].sum(), input)
    assert (gradient.abs().sum(1) > 0).all()


def test_global_context_adds_one_vector(x):
    block = randomised(GlobalContext2d(CHANNELS, ratio=4))
    weights = block.attention(x).flatten(1).softmax(1)
    context = torch.stack([(x[n].flatten(1) * weights[n]).sum(1) for n in range(len(x))])
    torch.testing.assert_close(block(x) - x, block.transform(context[:, :, None, None]).expand_as(x))


@pytest.mark.parametrize("stride", [1, 2])
def test_deformable_without_offsets_is_a_convolution(x, stride):
    block = DeformableConv2d(CHANNELS, stride).double()
    torch.testing.assert_close(block(x), conv2d(x, block.conv.weight, None, stride, 1) / 2)


def test_deformable_takes_its_offsets(x):
    """An offset of one row for every tap is the convolution one row further down."""
    block = DeformableConv2d(CHANNELS).double()
    with torch.no_grad():
        block.offset.bias[:18:2] = 1
        block.offset.bias[18:] = 100  # modulation of 1
    expected = conv2d(x, block.conv.weight, None, 1, 1)
    torch.testing.assert_close(block(x)[:, :, : SIZE[0] - 2], expected[:, :, 1 : SIZE[0] - 1])


@pytest.mark.parametrize("index", [0, 1])
def test_dynamic_graph_without_walks_is_an_involution(x, index):
    block = DynamicGraph2d(CHANNELS, groups=4, rates=(1, 2)).double()
    rate = block.rates[index]
    features = conv2d(x, block.filter[index].weight, None, 1, rate, rate)
    kernels = features[:, :36].unflatten(1, (4, 9)).softmax(2) * features[:, 36:].sigmoid().unsqueeze(1)
    expected = involution2d(x, kernels.unflatten(2, (3, 3)), padding=rate, dilation=rate)
    torch.testing.assert_close(block.message(x, index), expected)


def test_dynamic_graph_sums_its_messages(x):
    block = randomised(DynamicGraph2d(CHANNELS, rates=(1, 2, 3)))
    assert not torch.allclose(block.message(x, 0), block.message(x, 1))
    expected = x + sum(block.gamma[index] * block.message(x, index) for index in range(3))
    torch.testing.assert_close(block(x), expected)
    with pytest.raises(ValueError, match="groups is 3, expected a divisor of channels=16"):
        DynamicGraph2d(CHANNELS, groups=3)


@pytest.mark.parametrize(
    ("name", "count", "parent", "channels"),
    [
        ("non_local", 1, "layer3.5", 1024),
        ("criss_cross", 1, "layer3.5", 1024),
        ("global_context", 3, "layer4.0.bn3.1", 2048),
        ("deformable", 3, "layer4.0.conv2", 512),
        ("dynamic_graph", 3, "layer4.0.conv3.0", 512),
    ],
)
def test_places(name, count, parent, channels):
    resnet = insert_block(resnet50(), name)
    found = {path: module for path, module in resnet.named_modules() if isinstance(module, BLOCKS[name].cls)}
    assert len(found) == count
    assert parent in found
    seen = []
    found[parent].register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].shape[1], output.shape[1])))
    assert resnet.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    assert seen == [(channels, channels)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("non_local", 35 * 16 * 8 * 4 + 35 * 35 * 8 * 2),
        ("criss_cross", 2 * (35 * 16 * (2 + 2 + 16) + 35 * 12 * (2 + 16))),
        ("deformable", 35 * 16 * 9 * (27 + 16)),
        ("dynamic_graph", 4 * 35 * 16 * 9 * (18 + 45 + 1)),
    ],
)
def test_multiply_adds(name, expected):
    """35 pixels of 16 channels."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        create_block(name, CHANNELS).eval()(torch.randn(1, CHANNELS, *SIZE))
    assert counter.get_total_flops() == 2 * expected


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"block is 'senet', expected one of non_local, "):
        create_block("senet", 8)
    with pytest.raises(ValueError, match="stride is 2, expected 1 for the block 'non_local'"):
        create_block("non_local", 8, stride=2)
