"""The torch-free core for other processors and compilers than those of this machine, as far as they are installed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
ARM = "aarch64-linux-gnu-g++"
SOURCES = [file for name in ("core", "cpu") for file in sorted((ROOT / "cpp" / name).rglob("*.cpp"))]
INCLUDES = [f"-I{ROOT / folder}" for folder in ("cpp", "cpp/core", "cpp/include")]
NO_CUDA = '-DPYINVOLUTION_NO_CUDA="the core only"'


def run(*command: str | Path, input: str | None = None) -> str:
    result = subprocess.run(
        command, input=input, env=os.environ | {"PATH": PATH}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program, path=PATH) is None:
            pytest.skip(f"needs {program}")


def flags(source: Path) -> list[str]:
    """Of the instruction set that a file of cpp/cpu/instances is for, from cpp/core/sources.cmake."""
    text = (ROOT / "cpp/core/sources.cmake").read_text()
    found = re.search(rf'pyinvolution_instance\({source.stem}\s+"([^"]*)"\)', text)
    return found[1].split(";") if found and found[1] and source.parent.name == "instances" else []


def test_the_tests_in_cpp_can_be_built_for_arm(tmp_path: Path) -> None:
    need("cmake", "ninja", ARM)
    toolchain = ROOT / "cmake/aarch64-linux-gnu.cmake"
    run("cmake", "-G", "Ninja", "-S", ROOT / "tests/cpp", "-B", tmp_path, "-DPYINVOLUTION_SANITIZE=OFF",
        f"-DCMAKE_TOOLCHAIN_FILE={toolchain}", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON")  # fmt: skip
    commands = (tmp_path / "compile_commands.json").read_text()
    assert f"{ARM} " in commands
    assert "instances/baseline.cpp" in commands
    assert "-mavx" not in commands  # of another processor
    assert re.search(r'add_test\(\S*test_cpu\S* "\S*qemu-aarch64" "-L"', (tmp_path / "CTestTestfile.cmake").read_text())


def test_products_on_arm_are_of_vectors(tmp_path: Path) -> None:
    """The inner loop of the forward pass: for each tap of a row a multiply-add of every accumulator, with NEON."""
    need(ARM)
    baseline = (ROOT / "cpp/cpu/instances/baseline.cpp").read_text()
    columns = int(re.search(r"__aarch64__\)\n#define APPLY_COLUMNS (\d+)", baseline)[1])
    # Only this of the instance, which takes three times as long to compile.
    code = baseline.replace('#include "cpu/instances/kernels.inl"', '#include "cpu/channels/forward.inl"')
    code += "\nauto kept() { return pyinvolution::cpu::channels_task; }\n"
    options = ["-std=c++20", "-O3", "-DNDEBUG", "-ffp-contract=fast", *INCLUDES]
    assembly = run(ARM, *options, "-S", "-x", "c++", "-", "-o", "-", input=code)
    functions = re.findall(
        r"^(_Z\w+5applyILi(\d)ELi(\d)EE\w+):\n(.*?)^\t\.size\t\1", assembly, re.MULTILINE | re.DOTALL
    )
    assert {(int(stride), int(width)) for _, stride, width, _ in functions} >= {
        (stride, width) for stride in (1, 2) for width in (3, 5, 7)
    }
    # Blocks of 2 to the most columns; that of one column may be a function of its own.
    accumulators = 16 * sum(range(2, columns + 1)) // 4
    for name, _, width, body in functions:
        assert "fmadd" not in body, name
        assert len(re.findall(r"\tfmla\tv\d+\.4s", body)) >= accumulators * max(int(width), 1), name


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
@pytest.mark.parametrize(
    "compiler", [["clang++"], ["clang++", "--target=aarch64-linux-gnu"], ["x86_64-w64-mingw32-g++-posix"]], ids=" ".join
)
def test_other_compilers(compiler: list[str], source: Path) -> None:
    """Clang, which compiles for macOS; and GCC for Windows, where a long has 32 bits and the C library is another."""
    need(compiler[0])
    extra = flags(source)
    if "aarch64" in compiler[-1]:
        need(ARM)  # its headers
        if extra:
            pytest.skip("an instruction set of x86-64")
    run(*compiler, "-std=c++20", "-Wall", "-Wextra", "-Werror", "-ffp-contract=fast", NO_CUDA, *INCLUDES, f"-I{ROOT}",
        *extra, "-fsyntax-only", source)  # fmt: skip
