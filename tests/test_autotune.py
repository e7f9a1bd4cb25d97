"""`autotune`: what is measured, what is kept and where, and that everybody takes the choice."""

import json
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import pyinvolution
from pyinvolution import autotune, disable_variants, explain, explain_layer, explain_span, force_variant, ops
from pyinvolution._library import _C
from pyinvolution.autotuning import autotune_file
from pyinvolution.explain import processor_name
from pyinvolution.functional import involution2d, span_involution2d

GENERATOR = torch.Generator().manual_seed(0)
X, W = (torch.randn(s, generator=GENERATOR) for s in ((2, 32, 12, 12), (2, 2, 7, 7, 12, 12)))
WINDOW = ((1, 1), (3, 3), (1, 1))
R, S, A = (torch.randn(s, generator=GENERATOR) for s in ((2, 8, 12, 12), (98, 8), (8, 32)))


INTEL = "processor\t: 0\ncpu family\t: 6\nmodel\t\t: 207\nmodel name\t: Xeon\nstepping\t: 2\n\n"
ARM = "processor\t: 0\nBogoMIPS\t: 243.75\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (INTEL + INTEL.replace("207", "208"), "Xeon (family 6, model 207)"),
        (INTEL.replace("model name\t: Xeon\n", ""), "mill (family 6, model 207)"),
        (ARM, "mill (implementer 0x41, part 0xd40)"),
        ("vendor_id       : IBM/S390\n", "mill"),
        (None, "mill"),
    ],
    ids=["x86", "x86 without a name", "aarch64", "another", "no file"],
)
def test_processors_of_one_name_are_told_apart(
    content: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Choices and times are kept by this name."""

    def read_text(self: Path, **_: Any) -> str:
        assert str(self) == "/proc/cpuinfo"
        if content is None:
            raise FileNotFoundError(self)
        return content

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "mill")
    assert processor_name.__wrapped__() == expected


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Autotune is on, with an empty file in a folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _C.forget_choices()
    autotune()
    yield autotune_file()
    autotune(False)
    _C.forget_choices()


def kept() -> dict[str, dict[str, str]]:
    """The choices in the file, by the words before the sizes."""
    if not autotune_file().exists():
        return {}
    (choices,) = json.loads(autotune_file().read_text())["machines"].values()
    return {problem.partition(":")[0]: choice for problem, choice in choices.items()}


def measured(explanation: Any) -> str | None:
    return next((v.variant for v in explanation.verdicts if v.measured), None)


def forget_process() -> None:
    """What a new process does not know."""
    _C.forget_choices()
    autotune()


def test_it_is_off_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not _C.autotunes()
    involution2d(X, W, None, *WINDOW)
    assert measured(explain(X, W, *WINDOW)) is None
    assert list(tmp_path.iterdir()) == []


def test_the_first_call_of_a_problem_chooses(tuned: Path) -> None:
    assert measured(explain(X, W, *WINDOW)) is None
    first = involution2d(X, W, None, *WINDOW)
    explanation = explain(X, W, *WINDOW)
    chosen = measured(explanation)
    assert chosen is not None
    assert chosen == explanation.chosen
    assert f"-> {chosen}: runs, the fastest when autotune measured it" in str(explanation)
    choice = kept()["involution2d forward float32 cpu"]
    assert choice["variant"] == chosen
    times = {name: float(time) for name, time in re.findall(r"(\w+) ([\d.e+]+) us", choice["times"])}
    assert set(times) == {"channels", "columns", "scalar"}
    # One that is first in the table is taken unless another is clearly faster.
    assert times[chosen] <= 1.04 * min(times.values())
    with force_variant(chosen):
        assert torch.equal(first, involution2d(X, W, None, *WINDOW))
    assert torch.equal(first, involution2d(X, W, None, *WINDOW))
    # Another batch is another problem.
    assert measured(explain(X[:1], W[:1], *WINDOW)) is None


def test_what_is_kept_decides_for_everybody(tuned: Path) -> None:
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    involution2d(x, w, None, *WINDOW).backward(torch.ones(2, 32, 12, 12))
    choices = json.loads(tuned.read_text())
    (problems,) = choices["machines"].values()
    assert {problem.split()[1] for problem in problems} == {"forward", "grad_input", "grad_weight"}
    for choice in problems.values():
        choice["variant"] = "scalar"  # never the fastest here
    tuned.write_text(json.dumps(choices))
    before = tuned.stat().st_mtime_ns
    forget_process()
    compiled = torch.compile(lambda x, w: involution2d(x, w, None, *WINDOW), backend="aot_eager", fullgraph=True)
    with force_variant("scalar"):
        expected = involution2d(X, W, None, *WINDOW)
    with force_variant("channels"):
        other = involution2d(X, W, None, *WINDOW)
    assert not torch.equal(expected, other), "the variants can be told apart"
    for result in (involution2d(X, W, None, *WINDOW), involution2d(x, w, None, *WINDOW), compiled(X, W)):
        assert torch.equal(result, expected)
    assert measured(explain(X, W, *WINDOW)) == "scalar"
    grads = torch.autograd.grad(involution2d(x, w, None, *WINDOW), (x, w), torch.ones(2, 32, 12, 12))
    with force_variant("scalar"):
        exact = torch.autograd.grad(involution2d(x, w, None, *WINDOW), (x, w), torch.ones(2, 32, 12, 12))
    assert all(map(torch.equal, grads, exact))
    assert tuned.stat().st_mtime_ns == before, "nothing is measured again"


def test_a_compiled_graph_measures_when_it_runs(tuned: Path) -> None:
    with FakeTensorMode():
        ops.involution2d(torch.empty(X.shape), torch.empty(W.shape), *WINDOW)
    assert not tuned.exists()
    seen = []

    def backend(graph: Any, example_inputs: Any) -> Any:
        seen.append(tuned.exists())
        return graph

    torch._dynamo.reset()
    torch.compile(lambda x, w: involution2d(x, w, None, *WINDOW), backend=backend)(X, W)
    assert seen == [False]
    assert list(kept()) == ["involution2d forward float32 cpu"]


def test_tracing_measures_nothing(tuned: Path) -> None:
    traced = torch.jit.trace(lambda x, w: involution2d(x, w, None, *WINDOW), (X, W), check_trace=False)
    assert not tuned.exists()
    traced(X, W)
    assert list(kept()) == ["involution2d forward float32 cpu"]


def test_span_and_layer_are_measured(tuned: Path) -> None:
    leaves = [t.clone().requires_grad_() for t in (X, R, S)]
    span = {"kernel_size": 7, "padding": 3}
    gy = torch.randn(2, 32, 12, 12)
    expected = torch.autograd.grad(span_involution2d(*leaves, None, **span), leaves, gy)
    ops.involution_layer2d(X, A, None, S, None, None, None, False, (7, 7), *WINDOW)
    assert {"span_involution2d forward float32 cpu", "span_involution2d layer float32 cpu"} <= set(kept())
    assert measured(explain_span(X, R, S, None, **span)) is not None
    assert measured(explain_layer(X, A, S, 7, 1, 3)) is not None
    choices = tuned.read_text()
    for variant in ("composed", "fused"):
        tuned.write_text(choices.replace('"fused"', f'"{variant}"').replace('"composed"', f'"{variant}"'))
        forget_process()
        assert explain_span(X, R, S, None, **span, pass_="forward").chosen == variant
        fuses = torch.ops.pyinvolution.fuses_span(X, R, S, (7, 7), *WINDOW, False)
        assert fuses == (variant == "fused")
        grads = torch.autograd.grad(span_involution2d(*leaves, None, **span), leaves, gy)
        for grad, exact in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, exact, rtol=1e-4, atol=1e-4)


def test_values_that_are_not_finite_do_not_disqualify(tuned: Path) -> None:
    x = X.clone()
    x[0, 3, 4, 5], x[1, 2, 2, 2] = float("nan"), float("inf")
    involution2d(x, W, None, *WINDOW)
    assert kept()["involution2d forward float32 cpu"]["times"].count(" us") == 3


def test_disabled_and_forced_variants(tuned: Path) -> None:
    with force_variant("scalar"):
        involution2d(X, W, None, *WINDOW)
    assert not tuned.exists(), "what is forced is not measured"
    involution2d(X, W, None, *WINDOW)
    chosen = explain(X, W, *WINDOW).chosen
    with disable_variants(f"cpu/{chosen}"):
        assert explain(X, W, *WINDOW).chosen != chosen
        involution2d(X, W, None, *WINDOW)
        assert measured(explain(X, W, *WINDOW)) not in (None, chosen)


def test_reset_forgets_and_off_returns_to_the_table(tuned: Path) -> None:
    involution2d(X, W, None, *WINDOW)
    autotune(False)
    assert measured(explain(X, W, *WINDOW)) is None
    autotune()
    assert measured(explain(X, W, *WINDOW)) is not None
    others = json.loads(tuned.read_text())
    others["machines"]["another machine"] = {"a problem": {"variant": "scalar", "times": ""}}
    tuned.write_text(json.dumps(others))
    autotune(reset=True)
    assert measured(explain(X, W, *WINDOW)) is None
    assert list(json.loads(tuned.read_text())["machines"]) == ["another machine"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"machines": {"a": {"b": 3}}}', '{"machines": {"a": {"b": {}}}}'])
def test_a_damaged_file_is_replaced(tuned: Path, text: str) -> None:
    tuned.parent.mkdir(exist_ok=True)
    tuned.write_text(text)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        involution2d(X, W, None, *WINDOW)
    assert list(kept()) == ["involution2d forward float32 cpu"]


def test_choices_of_another_version_are_not_taken(tuned: Path) -> None:
    involution2d(X, W, None, *WINDOW)
    tuned.write_text(tuned.read_text().replace(f"pyinvolution {pyinvolution.__version__}", "pyinvolution 0.0.0"))
    forget_process()
    assert _C.autotunes()
    involution2d(X[:1], W[:1], None, *WINDOW)  # reads the file
    assert measured(explain(X, W, *WINDOW)) is None


def test_names_in_the_file_that_do_not_exist_are_measured_again(tuned: Path) -> None:
    involution2d(X, W, None, *WINDOW)
    chosen = explain(X, W, *WINDOW).chosen
    tuned.write_text(tuned.read_text().replace(f'"variant": "{chosen}"', '"variant": "quick"'))
    forget_process()
    involution2d(X, W, None, *WINDOW)
    assert measured(explain(X, W, *WINDOW)) is not None
    assert kept()["involution2d forward float32 cpu"]["variant"] != "quick"


def test_without_a_folder_choices_last_as_long_as_the_process(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    with pytest.warns(RuntimeWarning, match="autotune cannot write /dev/null/nowhere"):
        involution2d(X, W, None, *WINDOW)
    assert measured(explain(X, W, *WINDOW)) is not None


def test_threads_agree(tuned: Path) -> None:
    results: list[Tensor] = []
    start = threading.Barrier(6)

    def call() -> None:
        start.wait()
        for batch in (2, 1):
            results.append(involution2d(X[:batch], W[:batch], None, *WINDOW))

    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 12
    for result in results:
        torch.testing.assert_close(result, involution2d(X, W, None, *WINDOW)[: len(result)])
    assert measured(explain(X, W, *WINDOW)) is not None


CALLS = """if True:
    import sys, torch, pyinvolution as p
    for size in map(int, sys.argv[1:]):
        x, w = torch.randn(1, 32, size, size), torch.randn(1, 2, 3, 3, size, size)
        p.involution2d(x, w, None, 1, 1)
        print(size, next(v.variant for v in p.explain(x, w, padding=1).verdicts if v.measured))
"""


def process(folder: Path, *sizes: int, **variables: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder), "PYINVOLUTION_AUTOTUNE": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", CALLS, *map(str, sizes)], env=environment | variables, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_processes_share_the_file(tmp_path: Path) -> None:
    running = [process(tmp_path, 5, 10 + number, 6, 20 + number) for number in range(2)]
    for each in running:
        out, errors = each.communicate()
        assert each.returncode == 0, errors
        assert len(out.splitlines()) == 4
    (file,) = tmp_path.glob("pyinvolution/*.json")
    (problems,) = json.loads(file.read_text())["machines"].values()
    assert len(problems) == 6
    assert not list(tmp_path.glob("pyinvolution/*.part"))
    by_size = {int(problem.split(":")[1].split()[6]): choice["variant"] for problem, choice in problems.items()}
    again = process(tmp_path, *by_size)
    out, errors = again.communicate()
    assert dict(line.split() for line in out.splitlines()) == {str(size): name for size, name in by_size.items()}, (
        errors
    )


def test_a_wrong_variant_is_not_chosen(tmp_path: Path) -> None:
    both = [process(tmp_path / v, 9, PYINVOLUTION_TEST_FAULT=f"cpu/{v}") for v in ("channels", "columns")]
    for wrong, each in zip(("channels", "columns"), both, strict=True):
        out, errors = each.communicate()
        assert each.returncode == 0, errors
        (file,) = (tmp_path / wrong).glob("pyinvolution/*.json")
        ((choice,),) = (problems.values() for problems in json.loads(file.read_text())["machines"].values())
        assert choice["variant"] != wrong
        assert wrong not in choice["times"]
        assert out.split()[1] == choice["variant"]


def test_the_variable_is_checked(tmp_path: Path) -> None:
    wrong = process(tmp_path, 5, PYINVOLUTION_AUTOTUNE="yes")
    _, errors = wrong.communicate()
    assert wrong.returncode == 1
    assert 'PYINVOLUTION_AUTOTUNE is "yes", expected 0 or 1' in errors
