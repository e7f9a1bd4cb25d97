"""benchmarks/gpu_session.sh as a dry run: a part at a time, limits, and what earlier parts left."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks/gpu_session.sh"
pytestmark = pytest.mark.skipif(not SCRIPT.exists() or shutil.which("bash") is None, reason="needs the checkout")


def session(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run([SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=False)


def parts() -> list[str]:
    return session("--list").stdout.split()


def test_parts_are_listed_and_described() -> None:
    assert parts() == ["build", "doctor", "tests", "sanitize", "ops", "models"]
    described = re.findall(r"^  (\w+) +(\d+)  ", session("--help").stdout, re.MULTILINE)
    assert [name for name, _ in described] == parts()
    assert all(int(minutes) < 10 for _, minutes in described)
    assert all((ROOT / file).is_file() for file in re.findall(r"tests/\w+\.py", SCRIPT.read_text()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no directory for the results"),
        (["somewhere", "test"], 'unknown part "test", expected one of build doctor tests'),
        (["--quick", "somewhere"], 'unknown option "--quick", expected --list, --resume or --dry-run'),
        (["ops", "models"], 'OUT is "ops", expected a directory before the parts'),
    ],
)
def test_wrong_arguments_do_nothing(arguments: list[str], message: str) -> None:
    result = session(*arguments)
    assert result.returncode == 2
    assert message in result.stderr


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    result = session(tmp_path / "out", "doctor", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert result.returncode == 2
    assert "there is no NVIDIA GPU here" in result.stderr
    assert not (tmp_path / "out").exists()


def test_parts_by_themselves_keep_what_others_left(tmp_path: Path) -> None:
    first = session("--dry-run", tmp_path, "build", "doctor")
    assert first.returncode == 0, first.stdout + first.stderr
    status = (tmp_path / "build.status").read_text()
    assert re.match(r"exit status 0 after \d+ s\ndate \d{4}-\S+\nGPU none, a dry run\ncommit \w+", status)
    log = (tmp_path / "build.log").read_text()
    assert "'version'" in log
    assert (tmp_path / "doctor/doctor.json").stat().st_size > 0
    assert "checks are right" in (tmp_path / "doctor.log").read_text()

    # One that is stopped does not stop the next; one that succeeded is not repeated.
    second = session("--dry-run", "--resume", tmp_path, "models", "build", "sanitize", MODELS_MINUTES="0.01")
    assert second.returncode == 1
    lines = second.stdout.splitlines()[-4:]
    assert re.fullmatch(r"models: exit status 124 after \d+ s, stopped after 0.01 minutes", lines[0])
    assert lines[1] == "build: done before"
    assert lines[2].startswith("sanitize: exit status 0")
    assert (tmp_path / "models.status").read_text().startswith("exit status 124")
    assert (tmp_path / "build.status").read_text() == status
    assert (tmp_path / "build.log").read_text() == log
    assert (tmp_path / "doctor/doctor.json").exists()
