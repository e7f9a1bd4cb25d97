"""What the compiler made of the inner loops for AVX-512: sums stay in registers, and broadcasts are parts of products.

GCC has left sums in memory and broadcasts to instructions of their own without a word, at the cost of up to half of the
speed, and no other test sees that.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from pyinvolution import _native, build_info

LIBRARY = _native.folder() / "libpyinvolution.so"
# Kernels and their template arguments; some of each kind.
APPLY = [
    f"apply_block<{columns}, {stride}, {width}>" for columns in (7, 14) for stride in (1, 2) for width in (0, 3, 5, 7)
]
GATHER = [f"gather_block<{columns}, 1, {width}, 0>" for columns in (7, 14) for width in (0, 3, 5, 7)] + [
    f"gather_block<{columns}, 2, {width}, {phase}>" for columns in (7, 14) for width in (0, 3, 5, 7) for phase in (0, 1)
]
# For products of float32 and of pairs of bfloat16: most rows at a vector, and at two.
MULTIPLY = [
    (kernel, rows, vectors)
    for kernel, most in (("multiply_blocks", (16, 14)), ("sum_pairs_blocks", (14, 14)))
    for vectors in (1, 2)
    for rows in range(1, most[vectors - 1] + 1)
]
GRAD_WEIGHT = [f"grad_weight_rows<{vectors}, 1, {stride}, 7>" for vectors in (1, 2) for stride in (1, 2)] + [
    f"grad_weight_rows<2, 3, {stride}, 3>" for stride in (1, 2)
]

Code = list[tuple[int, str]]  # address and instruction


@pytest.fixture(scope="module")
def functions() -> dict[str, list[Code]]:
    """The functions of the library that compute with registers of 64 bytes, by name: one for each instruction set."""
    if os.uname().machine != "x86_64":
        pytest.skip("the kernels for AVX-512 are compiled on x86-64 only")
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    if not build_info()["compiler"].startswith("GNU"):
        pytest.skip(f"the library was compiled by {build_info()['compiler']}; these are the ways of GCC")
    command = ["objdump", "--disassemble", "--no-show-raw-insn", "--demangle", LIBRARY]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, list[Code]] = {}
    for header, body in re.findall(r"^[0-9a-f]+ <(.*)>:\n((?:.+\n)*)", listing, re.MULTILINE):
        name = re.search(r"\(anonymous namespace\)::(\w+<[-\d, ]+>)\(", header)
        if name and "zmm" in body:
            lines = re.findall(r"^ *([0-9a-f]+):\t(.*)$", body, re.MULTILINE)
            found.setdefault(name[1], []).append([(int(address, 16), text) for address, text in lines])
    if not found:
        pytest.skip("the library has no symbols of its kernels, or was compiled without optimisation")
    return found


def inner_loops(code: Code) -> Iterator[list[str]]:
    """The instructions of each loop that contains no other one."""
    places = {address: place for place, (address, _) in enumerate(code)}
    jumps = [(re.match(r"j\w+ +([0-9a-f]+)", text), place) for place, (_, text) in enumerate(code)]
    loops = [(places.get(int(jump[1], 16), place + 1), place) for jump, place in jumps if jump]
    loops = [loop for loop in loops if loop[0] <= loop[1]]
    for begin, end in loops:
        if not any((begin, end) != other and begin <= other[0] and other[1] <= end for other in loops):
            yield [text for _, text in code[begin : end + 1]]


def products(instructions: list[str]) -> list[str]:
    return [text for text in instructions if re.match(r"(vfmadd\d+ps|vdpbf16ps) .*%zmm", text)]


def broadcasts(instructions: list[str]) -> list[str]:
    """Loads of a weight that are instructions of their own."""
    return [text for text in instructions if re.match(r"(vbroadcastss|vpbroadcastd) .*\(.*%zmm", text)]


def on_the_stack(instructions: list[str]) -> list[str]:
    return [text for text in instructions if re.search(r"\(%r[sb]p[,)]", text)]


@pytest.mark.parametrize("name", [*APPLY, *GATHER])
def test_weights_are_broadcast_by_the_products(functions: dict[str, list[Code]], name: str) -> None:
    columns, stride, width = map(int, re.findall(r"\d+", name)[:3])
    phase = name.startswith("gather") and int(name[-2])
    if name.startswith("gather"):
        width, stride = -(-(width - phase) // stride), 1
    for code in functions[name]:
        instructions = [text for _, text in code]
        assert broadcasts(instructions) == []
        assert [text for text in on_the_stack(instructions) if "%zmm" in text] == []
        if width > 0:
            # The weights of four columns come by shuffles; a load of four serves these.
            row = columns * width
            assert sum("{1to16}" in text for text in products(instructions)) == row - 4 * width
            assert len(re.findall("vbroadcastf32x4|vbroadcasti32x4", "\n".join(instructions))) == width


@pytest.mark.parametrize(("kernel", "rows", "vectors"), MULTIPLY)
def test_the_loop_of_a_product_works_in_registers(
    functions: dict[str, list[Code]], kernel: str, rows: int, vectors: int
) -> None:
    for code in functions[f"{kernel}<{rows}, {vectors}>"]:
        loops = [loop for loop in inner_loops(code) if len(products(loop)) == rows * vectors]
        assert loops
        for loop in loops:
            # Of the sums none, and of the addresses of all rows no more than one.
            assert [text for text in on_the_stack(loop) if "%zmm" in text] == []
            assert len(on_the_stack(loop)) <= 1
            # Where an element of A serves one vector, the product broadcasts it.
            assert len(broadcasts(loop)) == (0 if vectors == 1 else rows)


@pytest.mark.parametrize("name", GRAD_WEIGHT)
def test_x_is_shifted_in_registers(functions: dict[str, list[Code]], name: str) -> None:
    vectors, rows, stride, width = map(int, re.findall(r"\d+", name))
    for code in functions[name]:
        (loop,) = [loop for loop in inner_loops(code) if products(loop)]
        assert len(products(loop)) == vectors * rows * width
        assert on_the_stack(loop) == []
        # A tap of each phase needs no shift. The others are not loaded, since most of them lie in two cache lines.
        assert len(re.findall("valign[dq] ", "\n".join(loop))) == vectors * rows * (width - stride)
