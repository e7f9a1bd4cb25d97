"""What releases are made with: workflows, the wheel builder's configuration, one version."""

import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import abi
import pytest
import release
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
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in WORKFLOWS:
        jobs = yaml.safe_load(path.read_text())["jobs"]
        for step in (step for job in jobs.values() for step in job["steps"]):
            command = step.get("run", "")
            assert set(re.findall(r"\bmake ([\w-]+)", command)) <= targets
            assert all((ROOT / file).is_file() for file in re.findall(r"python (\S+\.py)", command))


def test_dev_brings_the_tools_of_the_makefile() -> None:
    makefile, project = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
    tools = set(re.findall(r"\$\(BIN\)/([\w-]+)", makefile)) | set(re.findall(r"python -m (\w+)", makefile))
    ours = {"python", "pip", "pyinvolution", "benchmarks", "ctest"}  # ctest comes with cmake
    extras = project[project.index("[project.optional-dependencies]") : project.index("[project.scripts]")]
    assert tools - ours
    for tool in tools - ours:
        assert re.search(rf'^\s*(test = \[)?"{tool}\b', extras, re.MULTILINE), f"no extra brings {tool}"


@pytest.mark.parametrize("processor", ["x86_64", "aarch64"])
def test_wheels_are_built_for_every_python_that_is_supported(processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cibuildwheel")
    monkeypatch.setenv("CIBW_ARCHS", processor)
    built = output_of("cibuildwheel", "--print-build-identifiers", "--platform", "linux").split()
    least = int(re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())[1])
    assert f"cp3{least}-manylinux_{processor}" in built
    assert f"cp3{sys.version_info.minor}-manylinux_{processor}" in built
    matrix = re.search(r"python: \[(cp3.*)\]", (ROOT / ".github/workflows/wheels.yml").read_text())[1].split(", ")
    assert {f"{python}-manylinux_{processor}" for python in matrix} <= set(built)


def test_every_wheel_is_tried_and_published() -> None:
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load((ROOT / ".github/workflows/wheels.yml").read_text())["jobs"]
    built, tried = (jobs[name]["strategy"]["matrix"]["kind"] for name in ("build", "abi"))
    assert sorted(built) == sorted(tried) == ["aarch64", "cpu", "cuda"]
    names = [f"wheel-{kind}-{python}" for kind in built for python in jobs["build"]["strategy"]["matrix"]["python"]]
    # The two wheels for x86-64 would have the same name in an index.
    (pattern,) = [step["with"]["pattern"] for step in jobs["publish"]["steps"] if "pattern" in step.get("with", {})]
    patterns = pattern.strip("{}").split(",")
    published = {name for name in names if any(fnmatch(name, each) for each in patterns)}
    assert published == {name for name in names if "-cpu-" not in name}
    assert "source" in patterns
    assert all((ROOT / "tests" / name).is_file() for name in abi.TESTS)


def test_a_release_names_one_version(tmp_path: Path) -> None:
    assert release.disagreements(ROOT) == []

    def told(tag: str | None = "v1.2.3", heading: str = "[1.2.3] - 2026-01-31", cited: str = "1.2.3") -> list[str]:
        (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
        (tmp_path / "CITATION.cff").write_text(f"cff-version: 1.2.0\nversion: {cited}\ndate-released: 2026-01-31\n")
        (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## {heading}\n\n- News.\n\n## [1.0.0] - 2025-01-01\n")
        return release.disagreements(tmp_path, tag)

    assert told() == told(heading="[Unreleased]\n\n## [1.2.3] - 2026-01-31") == told(None, "[Unreleased]") == []
    assert told("v1.2.4") == ["the tag is v1.2.4, expected v1.2.3"]
    assert told("v1.2.3", cited="1.2.0") == ["the version in CITATION.cff is 1.2.0, expected 1.2.3"]
    assert told(heading="[1.2.3] - 2026-01-30") == ["the date in CITATION.cff is 2026-01-31, expected 2026-01-30"]
    for newest in ("[Unreleased]\n\n- More.", "[1.2.2] - 2026-01-31"):
        (problem, *_) = told(heading=newest)
        assert problem.startswith("the newest version in CHANGELOG.md is [")
        assert problem.endswith(", expected [1.2.3]")


def test_the_version_is_in_no_other_place() -> None:
    (version,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert pyinvolution.__version__ == version
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    assert "pyproject.toml" in files or not files
    for name in files:
        # Others name versions of the past, and what was measured.
        if Path(name).suffix in (".py", ".cpp", ".h", ".cmake", ".toml", ".yml", ".in", ".cff", ".txt"):
            found = re.findall(rf"(?<![\d.]){re.escape(version)}(?![\d.])", (ROOT / name).read_text())
            assert len(found) == (name in ("pyproject.toml", "CITATION.cff")), name


def test_the_oldest_torch_is_the_same_everywhere() -> None:
    (least,) = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    major, minor = map(int, least.split("."))
    assert f"TORCH_TARGET_VERSION=0x{major:02x}{minor:02x}" in (ROOT / "cmake/FindTorchStable.cmake").read_text()
    assert f'"{least}.0"' in (ROOT / "tests/abi.py").read_text()
    assert f'torch: ["{least}.0", newest]' in (ROOT / ".github/workflows/wheels.yml").read_text()
    assert tuple(map(int, torch.__version__.split(".")[:2])) >= (major, minor)
