"""benchmarks/gpu_session.sh as a dry run: a part at a time, limits, and what earlier parts left."""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyinvolution.commands import doctor

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


STUB = """#!/bin/sh
echo "ran: $*"
case "$*" in *"--only models"*) sleep 60 ;; *"--only ops"*) echo row >"$6/rows.csv" ;; *"-m pytest"*) exit 3 ;; esac
"""


def test_parts_by_themselves_keep_what_others_left(tmp_path: Path) -> None:
    stub, out = tmp_path / "python", tmp_path / "out"
    stub.write_text(STUB)
    stub.chmod(0o755)
    first = session("--dry-run", out, "build", "ops", PYTHON=str(stub))
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.splitlines()[-3:-1] == [
        f"{part}: {(out / part).with_suffix('.status').read_text().splitlines()[0]}" for part in ("build", "ops")
    ]
    status, log = (out / "ops.status").read_text(), (out / "ops.log").read_text()
    assert re.match(r"exit status 0 after \d+ s\ndate \d{4}-\S+\nGPU none, a dry run\ncommit \w+", status)
    assert log == f"ran: -m benchmarks.gpu --only ops --output {out}/ops --minutes 7.65 --device cpu --quick\n"

    # One that fails, or is stopped, does not stop the next; one that succeeded is not repeated.
    variables = {"PYTHON": str(stub), "MODELS_MINUTES": "0.01"}
    second = session("--dry-run", "--resume", out, "tests", "models", "ops", "doctor", **variables)
    assert second.returncode == 1
    lines = second.stdout.splitlines()[-5:-1]
    assert lines[0].startswith("tests: exit status 3 after ")
    assert re.fullmatch(r"models: exit status 124 after \d+ s, stopped after 0.01 minutes", lines[1])
    assert lines[2] == "ops: done before"
    assert lines[3].startswith("doctor: exit status 0 after ")
    assert (out / "tests.status").read_text().startswith("exit status 3")
    assert (out / "ops.status").read_text() == status
    assert (out / "ops.log").read_text() == log
    assert (out / "ops/rows.csv").read_text() == "row\n"
    # The commands are understood by what they call.
    (line,) = (out / "doctor.log").read_text().splitlines()
    parser = argparse.ArgumentParser()
    doctor.configure(parser)
    options = parser.parse_args(line.partition(" doctor ")[2].split())
    assert (options.json, options.quick, options.device) == (out / "doctor/doctor.json", True, ["cpu"])
