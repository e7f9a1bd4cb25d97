"""What the CUDA compiler makes of the kernels, on machines that have one; no GPU is needed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ptx.launches import NVCC, find_tool

ROOT = Path(__file__).parents[1]
SOURCES = re.findall(r"LIST_DIR}/(\S+\.cu)", (ROOT / "cuda/sources.cmake").read_text())


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
            # The fused forward kernel has templates for tensors that cannot be moved in vectors, its first bool.
            elements = source.startswith("fused/") and re.search(r"StripeConfigI\w+?EEELb0E", name)
            assert elements or re.search(r"STG\S*\.(64|128)", code), f"{name} writes in small pieces"
        if source.startswith("sliding/") and re.search(r"Li4ELi[0-9]", name):
            assert "LDS.128" in code, f"{name} reads shared memory in small pieces"
        if source.startswith("tiled/"):
            assert "LDS.128" in code, f"{name} reads shared memory in small pieces"
        if source == "tiled/instances/f32.cu":
            assert re.search(r"LDGSTS\S*\.128", code), f"{name} does not copy 16 bytes at a time to shared memory"


# --- a machine that the build does not fit ----------------------------------------------------------------------------

REPORTED = r"""
#include <cstdio>
#include <cuda_runtime_api.h>
#include "errors.cuh"

const char* pyinvolution::cuda::build() { return "THE BUILD"; }

void report(const char* name, cudaError_t error) {
  try {
    pyinvolution::cuda::check(error, "a kernel");
    std::printf("%s\tsuccess\n", name);
  } catch (const std::runtime_error& caught) {
    std::printf("%s\t%s\n", name, caught.what());
  }
}

int main() {
#define REPORT(error) report(#error, error);
  ERRORS(REPORT)
  int count = 0;
  report("call", cudaGetDeviceCount(&count));
}
"""

ADVICE = {
    "cudaErrorNoKernelImageForDevice": "has no code for the GPU",
    "cudaErrorInvalidDeviceFunction": "has no code for the GPU",
    "cudaErrorInvalidKernelImage": "has no code for the GPU",
    "cudaErrorUnsupportedPtxVersion": "but PTX, which its driver does not compile",
    "cudaErrorJitCompilerNotFound": "but PTX, which its driver does not compile",
    "cudaErrorInsufficientDriver": "update the driver, or build with an older CUDA toolkit",
    "cudaErrorCallRequiresNewerDriver": "update the driver, or build with an older CUDA toolkit",
    "cudaErrorSystemDriverMismatch": "update the driver, or build with an older CUDA toolkit",
    "cudaErrorNoDevice": "finds no GPU",
    "cudaErrorMemoryAllocation": None,
    "cudaErrorIllegalAddress": None,
}


def test_errors_say_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "main.cu").write_text(REPORTED)
    errors = "-DERRORS(_)=" + " ".join(f"_({name})" for name in ADVICE)
    command = [NVCC, "-std=c++17", f"-I{ROOT / 'cpp/include'}", f"-I{ROOT / 'cuda'}", errors, tmp_path / "main.cu"]
    subprocess.run([*command, "-o", tmp_path / "main"], check=True)
    printed = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True).stdout
    reported = dict(line.split("\t") for line in printed.splitlines())
    for name, advice in ADVICE.items():
        assert reported[name].startswith("a kernel: ")
        assert ("(" in reported[name]) == (advice is not None), reported[name]
        assert advice is None or advice in reported[name], reported[name]
        assert "THE BUILD" in reported[name] or advice is None or "no code" not in advice
    # Where there is no driver, the first call of any kind says so.
    assert reported["call"] == "success" or re.search(r"NVIDIA driver|finds no GPU|the driver is of", reported["call"])


@pytest.mark.parametrize(
    ("architectures", "expected"),
    [
        ("75;90", 'has "75", expected 80 or newer'),
        ("8.6", 'has "8.6", expected compute capabilities such as 80;90'),
        ("90;86;120;80", "architectures 80 86 90 120, PTX 80 90 120"),
        ("86", "architectures 86, PTX 86"),
    ],
)
def test_architectures(architectures: str, expected: str, tmp_path: Path) -> None:
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if cmake is None:
        pytest.skip("cmake is not installed")
    (tmp_path / "CMakeLists.txt").write_text(
        # The compiler need not be tried: nothing is built.
        "cmake_minimum_required(VERSION 3.26)\nset(CMAKE_CUDA_COMPILER_FORCED ON)\nproject(test LANGUAGES CXX CUDA)\n"
        f"include({ROOT}/cuda/CMakeLists.txt)\n"
        'get_target_property(targets pyinvolution_cuda CUDA_ARCHITECTURES)\nmessage(STATUS "targets ${targets}")\n'
    )
    command = [cmake, "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_CUDA_COMPILER={NVCC}"]
    result = subprocess.run(
        [*command, "-DCMAKE_CUDA_ARCHITECTURES=90", f"-DPYINVOLUTION_CUDA_ARCHITECTURES={architectures}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = " ".join((result.stdout + result.stderr).split())
    assert expected in said
    refused = "expected" in expected
    assert (result.returncode != 0) == refused
    if not refused:
        real, ptx = (names.split() for names in re.findall(r"[\d ]+\d", expected))
        targets = [*(f"{name}-real" for name in real), *(f"{name}-virtual" for name in ptx)]
        assert f"targets {';'.join(targets)}" in said
