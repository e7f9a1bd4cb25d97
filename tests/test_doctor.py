"""`pyinvolution doctor`: a wrong variant is found and named, and the line that disables it works."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pyinvolution import cli, ops
from pyinvolution.explain import PASSES, variants
from pyinvolution.studies import doctor
from pyinvolution.studies.doctor import Problem

FEW = [
    Problem("involution2d", "float32", "contiguous", 3, 1, 1, 16),
    Problem("involution2d", "bfloat16", "channels_last", 7, 2, 1, 16),
    Problem("span_involution2d", "float32", "channels_last", 7, 1, 1, 16, 16),
    Problem("involution_layer2d", "float16", "contiguous", 3, 2, 1, 16, 16),
]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "problems", lambda quick: iter(FEW))
    monkeypatch.setattr(doctor, "layers", lambda quick, device: iter(()))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", *arguments])
    return (int(ended.value.code or 0), *capsys.readouterr())


@pytest.mark.usefixtures("few")
def test_a_right_library(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, progress = run(capsys, "--device", "cpu", "--json", str(tmp_path / "found.json"))
    assert status == 0, out
    assert "All 24 checks are right" in out
    assert "PYINVOLUTION_DISABLE" not in out
    assert "checking involution2d on cpu: cpu/channels, cpu/columns, cpu/scalar" in progress
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["wrong"] == []
    assert found["remedy"] is None
    assert found["machine"]["version"] == cli.__version__
    assert {check["variant"] for check in found["checks"]} == {
        name for op in ("involution2d", "span_involution2d") for name in variants(op) if name.startswith("cpu/")
    }


def test_problems_are_of_every_class() -> None:
    for quick in (True, False):
        found = list(doctor.problems(quick))
        assert len(set(found)) == len(found)
        for operator in doctor.RESULTS:
            mine = [p for p in found if p.operator == operator]
            for dtype, layout, kernel, width in product(doctor.DTYPES, doctor.LAYOUTS[:2], (3, 7), (3, 16)):
                assert any((p.dtype, p.layout, p.kernel, p.width) == (dtype, layout, kernel, width) for p in mine)
            assert {p.stride for p in mine} == {1, 2}
    assert {p.layout for p in doctor.problems(False)} == set(doctor.LAYOUTS)
    assert {p.dilation for p in doctor.problems(True)} == {1, 2}


def test_every_variant_of_the_cpu_is_checked_and_timed() -> None:
    examination = doctor.Examination("cpu")
    for problem in doctor.problems(True):
        if problem.dtype in ("float32", "float64") and problem.kernel == 3:
            examination.examine(problem)
    for operator, passes in doctor.RESULTS.items():
        for variant, pass_ in product(examination.of(operator), passes):
            check = examination.checks[variant, operator, pass_]
            assert check.right > 0, check
            assert not check.wrong, check
    tiny = Problem("involution2d", "float32", "channels_last", 7, 1, 1, 16, size=(8, 8))
    timings = list(doctor.measure("tiny", tiny, "cpu", doctor.host_clock, examination, 0))
    assert [timing.what for timing in timings] == ["tiny, forward", "tiny, backward"]
    for timing in timings:
        assert list(timing.milliseconds) == [*examination.of("involution2d"), "unfold", "oneDNN 3x3"]
        assert all(milliseconds > 0 for milliseconds in timing.milliseconds.values())


FAULT = f"""if True:
    import sys
    from pyinvolution._library import _C
    from pyinvolution.studies import doctor
    from pyinvolution.studies.doctor import Problem

    doctor.problems = lambda quick: iter({FEW!r})
    doctor.layers = lambda quick, device: iter(())
    status = doctor.run(["cpu"], True, None)
    assert status == 1, status
    report = doctor.examine(["cpu"])
    print("wrong:", *report.wrong)
    prefix, names = report.remedy.split("=")
    assert prefix == "export PYINVOLUTION_DISABLE"
    _C.disable_variants(names)
    sys.exit(doctor.run(["cpu"], True, None))
"""


@pytest.mark.parametrize("variant", ["cpu/channels", "cpu/columns", "cpu/scalar", "cpu/fused"])
def test_a_kernel_that_is_wrong_is_named_and_can_be_disabled(variant: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYINVOLUTION_TEST_FAULT": variant}
    result = subprocess.run([sys.executable, "-c", FAULT], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    before, after = result.stdout.split(f"wrong: {variant}\n")
    assert f"{variant} is WRONG, first in" in before
    assert f"    export PYINVOLUTION_DISABLE={variant}\n" in before
    assert "PYINVOLUTION_TEST_FAULT" in before
    assert "checks are right" in after
    assert "disabled" in after


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("fault", ["shifted", "not written", "error", "shape"])
def test_an_operator_that_is_wrong_in_one_gradient(
    fault: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = ops.involution2d_backward

    def wrong(gy: Tensor, x: Tensor, w: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        grads = right(gy, x, w, *rest)
        if rest[3] != (False, True):
            return grads
        match fault:
            case "shifted":
                return grads[0], grads[1].roll(1, -1)
            case "not written":
                grads[1][-1, -1, -1, -1, -1, -1] = float("nan")
                return grads
            case "shape":
                return grads[0], grads[1][..., 1:]
        raise RuntimeError("the kernel failed")

    monkeypatch.setattr(ops, "involution2d_backward", wrong)
    status, out, _ = run(capsys, "--device", "cpu", "--json", str(tmp_path / "found.json"))
    assert status == 1
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["wrong"] == ["cpu/channels", "cpu/columns", "cpu/scalar"]
    assert found["remedy"] == "export PYINVOLUTION_DISABLE=cpu/channels,cpu/columns,cpu/scalar"
    assert found["remedy"] in out
    wrong_passes = {check["pass_"] for check in found["checks"] if check["wrong"]}
    assert wrong_passes == {"grad_weight"} < {*PASSES}
    assert ("the kernel failed" in out) == (fault == "error")


@pytest.mark.usefixtures("few")
def test_a_variant_that_is_disabled_already(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyinvolution import disable_variants

    right = ops.span_involution2d
    monkeypatch.setattr(ops, "span_involution2d", lambda *arguments: right(*arguments) + 1)
    with disable_variants("cpu/fused"):
        status, out, _ = run(capsys, "--device", "cpu")
    assert status == 1
    assert "cpu/fused is WRONG" not in out
    assert "export PYINVOLUTION_DISABLE=cpu/fused,cpu/composed" in out


def test_switches_that_are_wrong_are_one_line() -> None:
    for variable, words in (
        ("PYINVOLUTION_DISABLE", 'PYINVOLUTION_DISABLE: unknown variant "quick"'),
        ("PYINVOLUTION_VARIANT", 'unknown variant "quick"'),
    ):
        result = subprocess.run(
            [sys.executable, "-m", "pyinvolution", "doctor", "--quick"], env=os.environ | {variable: "quick"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 2, result.stderr
        (line,) = result.stderr.splitlines()
        assert line.startswith("pyinvolution doctor: error: ")
        assert words in line


def test_a_file_that_cannot_be_written_is_refused_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, err = run(capsys, "--json", str(tmp_path / "missing/found.json"))
    assert (status, out) == (2, "")
    assert "--json is" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "--device", "cuda")
    assert status == 2
    assert "--device is 'cuda', expected a device that torch finds" in err


@pytest.mark.parametrize(
    ("capability", "build", "expected"),
    [
        ((9, 0), "CUDA 12.8, architectures 80 86 90, PTX 80 90", "the code for compute capability 9.0"),
        ((8, 7), "CUDA 12.8, architectures 80 86 90, PTX 80 90", "the code for compute capability 8.6"),
        ((8, 0), "CUDA 12.8, architectures 86, PTX 86", None),
        ((10, 3), "CUDA 12.8, architectures 80 86 90, PTX 80 90", "the PTX for compute capability 9.0, which"),
        ((12, 0), "CUDA 12.8, architectures 80, PTX 80", "the PTX for compute capability 8.0, which"),
        ((7, 5), "CUDA 12.8, architectures 80 86 90, PTX 80 90", None),
        ((9, 0), "CUDA 13.0, architectures 90a, PTX 90a", "the code for compute capability 9.0"),
    ],
)
def test_what_a_gpu_runs(capability: tuple[int, int], build: str, expected: str | None) -> None:
    found = doctor.code_for(capability, build)
    assert found == expected or (expected is not None and found is not None and found.startswith(expected))
