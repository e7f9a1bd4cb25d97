"""What the CUDA compiler makes of the kernels, on machines that have one; no GPU is needed."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = re.findall(r"LIST_DIR}/(\S+\.cu)", (ROOT / "cuda/sources.cmake").read_text())


def find_tool(name: str, variable: str) -> str | None:
    default = f"/usr/local/cuda/bin/{name}"
    return os.environ.get(variable) or shutil.which(name) or (default if Path(default).exists() else None)


NVCC = find_tool("nvcc", "CUDACXX")
CUOBJDUMP = find_tool("cuobjdump", "CUOBJDUMP")
pytestmark = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")


@pytest.fixture(scope="module", params=SOURCES)
def compiled(request, tmp_path_factory) -> tuple[str, Path, str]:
    """A source with kernels, its object for one architecture, and what ptxas said."""
    target = tmp_path_factory.mktemp("cuda") / "object.o"
    command = [
        NVCC,
        "-std=c++17",
        "-arch=sm_90",
        f"-I{ROOT / 'cpp/include'}",
        "-Xptxas",
        "-v",
        "-Werror",
        "all-warnings",
    ]
    result = subprocess.run(
        [*command, "-c", str(ROOT / "cuda" / request.param), "-o", str(target)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return request.param, target, result.stderr


def test_no_register_spills(compiled):
    source, _, log = compiled
    spills = [(int(stores), int(loads)) for stores, loads in re.findall(r"(\d+) bytes spill stores, (\d+) bytes", log)]
    assert bool(spills) == (Path(source).name != "variant.cu"), "kernels are in instances"
    assert not any(stores or loads for stores, loads in spills), log


@pytest.mark.skipif(CUOBJDUMP is None, reason="there is no cuobjdump")
def test_wanted_instructions(compiled):
    source, target, _ = compiled
    sass = subprocess.run([CUOBJDUMP, "-sass", str(target)], capture_output=True, text=True, check=True).stdout
    for kernel in re.split(r"Function : ", sass)[1:]:
        name, *instructions = kernel.splitlines()
        code = "\n".join(instructions)
        assert not re.search(r"\b(ATOM|RED)\b", code), f"{name} has atomics"
        if source.startswith(("mma/", "fused/")) and "sum_partials" not in name:
            assert len(re.findall(r"HMMA\.(?:16816|1688)\.F32", code)) >= 6, f"{name} does not multiply matrices"
            assert "LDSM.16" in code, f"{name} reads matrices in small pieces"
            assert "LDGSTS" in code, f"{name} does not copy to shared memory in the background"
            assert re.search(r"STG\S*\.(64|128)", code), f"{name} writes in small pieces"
        if source.startswith("sliding/") and re.search(r"Li4ELi[0-9]", name):
            assert "LDS.128" in code, f"{name} reads shared memory in small pieces"
        if source.startswith("tiled/"):
            assert "LDS.128" in code, f"{name} reads shared memory in small pieces"
        if source == "tiled/instances/f32.cu":
            assert re.search(r"LDGSTS\S*\.128", code), f"{name} does not copy 16 bytes at a time to shared memory"
