"""What releases are made with: workflows, the wheel builder's configuration, one version."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyinvolution

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="needs the checkout")


def output_of(*command: str) -> str:
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_workflows_are_valid() -> None:
    pytest.importorskip("check_jsonschema")
    assert {path.stem for path in WORKFLOWS} == {"ci", "docs", "lint", "wheels"}
    output_of("check_jsonschema", "--builtin-schema", "vendor.github-workflows", *map(str, WORKFLOWS))


def test_workflows_run_what_is_there() -> None:
    yaml = pytest.importorskip("yaml")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in WORKFLOWS:
        jobs = yaml.safe_load(path.read_text())["jobs"]
        for step in (step for job in jobs.values() for step in job["steps"]):
            command = step.get("run", "")
            assert set(re.findall(r"\bmake ([a-z-]+)", command)) <= targets
            assert all((ROOT / file).is_file() for file in re.findall(r"python (\S+\.py)", command))


def test_dev_brings_the_tools_of_the_makefile() -> None:
    makefile, project = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
    tools = set(re.findall(r"\$\(BIN\)/([\w-]+)", makefile)) | set(re.findall(r"python -m (\w+)", makefile))
    ours = {"python", "pip", "pyinvolution", "benchmarks", "ctest"}  # ctest comes with cmake
    extras = project[project.index("[project.optional-dependencies]") : project.index("[project.scripts]")]
    assert tools - ours
    for tool in tools - ours:
        assert re.search(rf'^\s*(test = \[)?"{tool}\b', extras, re.MULTILINE), f"no extra brings {tool}"


def test_wheels_are_built_for_every_python_that_is_supported() -> None:
    pytest.importorskip("cibuildwheel")
    built = output_of("cibuildwheel", "--print-build-identifiers", "--platform", "linux").split()
    least = int(re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())[1])
    assert f"cp3{least}-manylinux_x86_64" in built
    assert f"cp3{sys.version_info.minor}-manylinux_x86_64" in built
    matrix = re.search(r"python: \[(cp3.*)\]", (ROOT / ".github/workflows/wheels.yml").read_text())[1].split(", ")
    assert {f"{python}-manylinux_x86_64" for python in matrix} <= set(built)


def test_the_version_is_in_one_place() -> None:
    (version,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert pyinvolution.__version__ == version
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    assert "pyproject.toml" in files or not files
    for name in files:
        # Others name versions of the past, and what was measured.
        if Path(name).suffix in (".py", ".cpp", ".h", ".cmake", ".toml", ".yml", ".in", ".cff", ".txt"):
            found = re.findall(rf"(?<![\d.]){re.escape(version)}(?![\d.])", (ROOT / name).read_text())
            assert len(found) == (name == "pyproject.toml"), name


def test_the_oldest_torch_is_the_same_everywhere() -> None:
    (least,) = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    major, minor = map(int, least.split("."))
    assert f"TORCH_TARGET_VERSION=0x{major:02x}{minor:02x}" in (ROOT / "cmake/FindTorchStable.cmake").read_text()
    assert f'"{least}.0"' in (ROOT / "tests/abi.py").read_text()
    assert f'torch: ["{least}.0", newest]' in (ROOT / ".github/workflows/wheels.yml").read_text()
    assert tuple(map(int, torch.__version__.split(".")[:2])) >= (major, minor)
