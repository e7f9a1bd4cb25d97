"""Batch norm, addition and ReLU as operators in graphs of torch.compile: results, buffers, and where modules run."""

import copy
from collections import Counter

import pytest
import torch
from surgeries import in_order
from test_normalization import FORMS, MODULES, problem, results
from tolerance import assert_step_accurate
from torch import nn
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.autograd import forward_ad

from pyinvolution.models import create_model
from pyinvolution.normalization import norm_relu

NAMES = ("batch_norm_statistics", "batch_norm_output", "batch_norm_backward")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Compiled:
    """`norm_relu` in a graph without breaks, and how often the operators are in it."""

    def __init__(self, **options):
        self.backend = AotEagerAndRecordGraphs()
        self.call = torch.compile(norm_relu, backend=self.backend, fullgraph=True, **options)

    def __call__(self, *arguments):
        return self.call(*arguments)

    @property
    def operators(self):
        graphs = [*self.backend.fw_graphs, *self.backend.bw_graphs]
        return operators(graphs)


def operators(graphs):
    found: Counter = Counter()
    for graph in graphs:
        for node in graph.graph.nodes:
            # A mutable operator is wrapped: it is an argument then.
            for name in NAMES:
                found[name] += f"pyinvolution.{name}" in f"{node.target} {node.args}"
    return tuple(found[name] for name in NAMES)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results(dtype, form):
    adds, relu = FORMS[form]
    norm, x, residual, gy = problem((4, 24, 6, 5), dtype, "channels_last", adds)
    compiled = Compiled()
    found = results(copy.deepcopy(norm), x, residual, gy, compiled, relu=relu)
    assert compiled.operators == (1, 1, 1)
    # The operators are those of the eager step, in the same order.
    for value, other in zip(found, results(norm, x, residual, gy, norm_relu, relu=relu), strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_buffers_of_steps_without_another_compilation(momentum, track, grad):
    norms = [nn.BatchNorm2d(6, momentum=momentum, track_running_stats=track) for _ in range(2)]
    compiled = Compiled()
    with torch.set_grad_enabled(grad):
        for seed in range(3):
            x = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(seed))
            x = x.to(memory_format=torch.channels_last)
            with torch._dynamo.config.patch(error_on_recompile=seed > 0):
                compiled(norms[0], nn.ReLU(), x)
            norms[1](x)
    for (name, found), (_, expected) in zip(norms[0].named_buffers(), norms[1].named_buffers(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)
    assert sum(1 for _ in norms[0].buffers()) == (3 if track else 0)


@pytest.mark.parametrize("frozen", ["weight", "bias", "input", "all"])
def test_frozen(frozen):
    found = []
    for function in (norm_relu, Compiled()):
        norm, x, residual, gy = problem((3, 5, 4, 6), torch.float32, "channels_last", True)
        norm.weight.requires_grad_(frozen not in ("weight", "all"))
        norm.bias.requires_grad_(frozen not in ("bias", "all"))
        x.requires_grad_(frozen not in ("input", "all"))
        residual.requires_grad_()
        output = function(norm, nn.ReLU(), x, residual)
        output.backward(gy)
        found.append([output, x.grad, residual.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()])
    for value, other in zip(*found, strict=True):
        assert (value is None) == (other is None)
        assert value is None or torch.equal(value, other)


def test_any_size():
    norm, *_ = problem((2, 5, 4, 6), torch.float32, "channels_last", True)
    twin, compiled = copy.deepcopy(norm), Compiled(dynamic=True)
    for index, shape in enumerate([(2, 5, 4, 6), (3, 5, 7, 9), (6, 5, 8, 5)]):
        _, x, residual, gy = problem(shape, torch.float32, "channels_last", True, seed=index)
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            found = results(norm, x, residual, gy, compiled)
        for value, other in zip(found, results(twin, x, residual, gy, norm_relu), strict=True):
            assert torch.equal(value, other)
        norm.zero_grad(), twin.zero_grad()
    assert compiled.operators[0] == 1


@pytest.mark.parametrize("name", [*MODULES, "NCHW"])
def test_where_the_modules_run(name):
    norm, activation = (make() for make in MODULES.get(name, (lambda: nn.BatchNorm2d(8), nn.ReLU)))
    x = torch.randn(3, 8, 6, 6, dtype=next(iter(norm.parameters()), torch.empty(0)).dtype)
    if name != "NCHW":
        x = x.to(memory_format=torch.channels_last)
    twin, compiled = copy.deepcopy(norm), Compiled()
    torch.testing.assert_close(compiled(norm, activation, x, x), activation(twin(x) + x))
    assert compiled.operators == (0, 0, 0)
    for (key, found), expected in zip(norm.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(found, expected, msg=key)


def test_transforms_run_the_modules():
    x, tangent = torch.randn(2, 4, 6, 5, 5).unbind()
    x, tangent = (t.to(memory_format=torch.channels_last) for t in (x, tangent))
    norm = nn.BatchNorm2d(6, track_running_stats=False)

    def run(x):
        return norm_relu(norm, nn.ReLU(), x)

    for function in (torch.func.grad(lambda x: run(x).square().sum()), lambda x: torch.vmap(run)(x[None])[0]):
        backend = AotEagerAndRecordGraphs()
        torch.testing.assert_close(torch.compile(function, backend=backend)(x), function(x))
        assert operators([*backend.fw_graphs, *backend.bw_graphs]) == (0, 0, 0)
    compiled = torch.compile(run, backend="aot_eager")
    with forward_ad.dual_level():
        found, expected = (forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent))) for f in (compiled, run))
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other)


def test_an_export_has_the_modules():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.act = nn.BatchNorm2d(6), nn.ReLU()

        def forward(self, x):
            return norm_relu(self.norm, self.act, x)

    x = torch.randn(4, 6, 5, 5).to(memory_format=torch.channels_last)
    program = torch.export.export(Net().train(), (x,))
    assert operators([program.graph_module]) == (0, 0, 0)
    assert "batch_norm" in str(program.graph)


def test_gradients_of_gradients_are_refused():
    """As for every compiled graph; they are those of the eager step."""
    norm, x, *_ = problem((2, 5, 4, 4), torch.float32, "channels_last", False)
    output = Compiled()(norm, nn.ReLU(), x.requires_grad_())
    first = torch.autograd.grad(output.square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        torch.autograd.grad(first.square().sum(), x)


def network(stages=(1, 1)):
    torch.manual_seed(0)
    model = create_model("rednet", layers=stages, stem_channels=32, base_channels=16, zero_init_residual=False)
    return model.to(memory_format=torch.channels_last)


def step(model, run, x, amp=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        output = run(x)
    output.double().square().sum().backward()
    return {
        "output": output.detach(),
        **{name: parameter.grad for name, parameter in model.named_parameters()},
        **dict(model.named_buffers()),
    }


@pytest.mark.parametrize(("backend", "amp"), [("inductor", False), ("aot_eager", True)])
def test_a_network(backend, amp):
    """Two steps of a RedNet, against one whose modules are called one by one in float64 and in the step's dtype."""
    model = network((1,))
    x = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    compiled, twin = copy.deepcopy(model), in_order(copy.deepcopy(model))
    exact = in_order(copy.deepcopy(model).double())
    run = torch.compile(compiled, fullgraph=True, backend=backend)
    for index in range(2):
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            found = step(compiled, run, x, amp)
        usual, oracle = step(twin, twin, x, amp), step(exact, exact, x.double())
    assert found["output"].dtype is usual["output"].dtype
    assert_step_accurate(found, oracle, usual)


def test_operators_of_a_network():
    model, backend = network(), AotEagerAndRecordGraphs()
    x = torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)
    torch.compile(model, backend=backend, fullgraph=True)(x).sum().backward()
    # 4 of the stem, and in each of 2 blocks 4 and that of the shortcut.
    assert operators(backend.fw_graphs) == (14, 14, 0)
    assert operators(backend.bw_graphs) == (0, 0, 14)
    evaluated = AotEagerAndRecordGraphs()
    with torch.no_grad():
        torch.compile(model.eval(), backend=evaluated, fullgraph=True)(x)
    assert operators(evaluated.fw_graphs) == (0, 0, 0)
