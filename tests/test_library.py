"""The native library: what it says of itself, its switches, and what it is linked against."""

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

import pyinvolution
from pyinvolution import _native, build_info, explain, override_isa
from pyinvolution.explain import available_isas, disable_variants, disabled_variants, force_variant, variants

ROOT = Path(__file__).parents[1]
# Instruction set -> compiler flags, as the build has them.
INSTANCES = dict(
    re.findall(r'pyinvolution_instance\((\w+)\s+"([^"]*)"\)', (ROOT / "cpp/core/sources.cmake").read_text())
)
LIBRARY = _native.folder() / "libpyinvolution.so"
X, W = torch.randn(1, 4, 6, 6), torch.randn(1, 2, 3, 3, 6, 6)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def output_of(*command: str | Path) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_build_info() -> None:
    info = build_info()
    assert info["version"] == pyinvolution.__version__
    assert info["torch_running"] == torch.__version__
    assert tuple(map(int, info["torch_built"].split(".")[:2])) >= (2, 10)
    assert info["compiler"].split()[0] in ("GNU", "Clang", "AppleClang")
    assert info["isa"].split()[0] in available_isas()
    assert info["cuda"].startswith(("none: ", "CUDA "))


def test_explain_names_the_choice_and_every_refusal() -> None:
    explanation = explain(X, W, padding=1)
    names = [verdict.variant for verdict in explanation.verdicts]
    assert names == [name.removeprefix("cpu/") for name in variants("involution2d") if name.startswith("cpu/")]
    assert sum(verdict.chosen for verdict in explanation.verdicts) == 1
    assert explanation.chosen == next(v.variant for v in explanation.verdicts if v.refusal is None)
    assert all(name in str(explanation) for name in names)
    for isa in available_isas():
        with override_isa(isa):
            explanation = explain(X, W, padding=1)
        assert explanation.isa == isa
        assert f"instruction set {isa}" in str(explanation)
    with force_variant("scalar"):
        assert explain(X, W, padding=1).chosen == "scalar"
    assert explain(X, W, padding=1, pass_="grad_input").chosen == explanation.chosen


def test_a_disabled_variant_refuses_and_the_next_one_runs() -> None:
    x, w = torch.randn(1, 16, 6, 6), torch.randn(1, 1, 3, 3, 6, 6)
    reason = "requires that PYINVOLUTION_DISABLE does not name it"
    with force_variant("columns"):
        expected = pyinvolution.involution2d(x, w, padding=1)
    with disable_variants("cpu/channels"):
        explanation = explain(x, w, padding=1)
        assert explanation.chosen == "columns"
        assert [v.refusal for v in explanation.verdicts] == [reason, None, None]
        assert torch.equal(pyinvolution.involution2d(x, w, padding=1), expected)
        with disable_variants("scalar, columns"):
            assert disabled_variants() == ["cpu/channels", "cpu/columns", "cpu/scalar"]
            with pytest.raises(ValueError, match=f"no cpu variant can run this forward; channels: {reason}; columns"):
                pyinvolution.involution2d(x, w, padding=1)
        assert disabled_variants() == ["cpu/channels"]
        with (
            pytest.raises(ValueError, match=f"the forced variant cpu/channels cannot run this forward: it {reason}"),
            force_variant("channels"),
        ):
            pyinvolution.involution2d(x, w, padding=1)
    assert explain(x, w, padding=1).chosen == "channels"
    with pytest.raises(ValueError, match='unknown variant "quick"'), disable_variants("quick"):
        pass
    assert disabled_variants() == []


def test_without_a_fused_kernel_a_layer_is_composed() -> None:
    x, layer = torch.randn(1, 32, 8, 8), pyinvolution.Involution2d(32)
    fused = layer(x)
    assert fused.grad_fn.name() == "_SpanInvolution2dBackward"
    with disable_variants("fused"):
        composed = layer(x)
        assert composed.grad_fn.name() == "_Involution2dBackward"
    torch.testing.assert_close(fused, composed)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pass_": "sideways"}, ["pass_", "'sideways'", "grad_input"]),
        ({"stride": 2}, ["weight", "6 x 6", "3 x 3"]),
    ],
)
def test_explain_refuses(arguments: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        explain(X, W, **{"padding": 1, **arguments})
    assert all(word in str(caught.value) for word in words)


def test_unknown_switches_are_refused() -> None:
    with (
        pytest.raises(ValueError, match=r'unknown variant "quick", expected one of .*cpu/columns, cpu/scalar'),
        force_variant("quick"),
    ):
        pass
    with (
        pytest.raises(ValueError, match='unknown instruction set "sse9", expected one of baseline, avx2'),
        override_isa("sse9"),
    ):
        pass


def test_environment_switches() -> None:
    code = "import torch, pyinvolution as p; x, w = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1, 2, 2); "
    code += "print(p.explain(x, w).chosen, p.build_info()['isa'].split()[0], p.involution2d(x, w).sum().item())"
    result = python(code, PYINVOLUTION_VARIANT="scalar", PYINVOLUTION_ISA="baseline")
    assert result.stdout.split() == ["scalar", "baseline", "4.0"], result.stderr
    wrong = python(code, PYINVOLUTION_VARIANT="quick")
    assert wrong.returncode == 1
    assert 'unknown variant "quick"' in wrong.stderr
    disabled = python(code, PYINVOLUTION_DISABLE=" columns,cuda/mma", PYINVOLUTION_VARIANT="")
    assert disabled.stdout.split()[0] == "scalar", disabled.stderr
    wrong = python(code, PYINVOLUTION_DISABLE="columns,quick")
    assert wrong.returncode == 1
    assert 'PYINVOLUTION_DISABLE: unknown variant "quick", expected one of cuda/mma' in wrong.stderr
    wrong = python(code, PYINVOLUTION_ISA="sse9")
    assert wrong.returncode == 1
    assert 'unknown instruction set "sse9"' in wrong.stderr


def test_a_second_copy_is_refused(tmp_path: Path) -> None:
    copy = shutil.copy(LIBRARY, tmp_path)
    result = python(f"import torch; torch.ops.load_library({str(copy)!r}); import pyinvolution")
    assert result.returncode == 1
    assert "another copy of the pyinvolution library is already loaded" in result.stderr


def test_the_library_needs_no_particular_torch() -> None:
    dynamic = output_of("readelf", "-d", LIBRARY)
    assert "libtorch_cuda" not in dynamic
    assert "libcudart" not in dynamic
    assert "libc10" not in dynamic
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    unstable = [line for line in output_of("nm", "-DCu", LIBRARY).splitlines() if " at::" in line or " c10::" in line]
    assert unstable == []


@pytest.mark.parametrize("isa", INSTANCES)
def test_code_for_newer_processors_keeps_to_itself(isa: str, tmp_path: Path) -> None:
    """A function that the linker may merge with another file's would bring these instructions to old processors.

    The instance is compiled without optimisation, which leaves a symbol for every inline function that is used.
    """
    if os.uname().machine != "x86_64" or shutil.which("g++") is None:
        pytest.skip("needs g++ on x86-64")
    flags = [f"-I{ROOT}/cpp", f"-I{ROOT}/cpp/include", *filter(None, INSTANCES[isa].split(";"))]
    source = ROOT / f"cpp/cpu/instances/{isa}.cpp"
    subprocess.run(["g++", "-std=c++20", "-O0", *flags, "-c", source, "-o", tmp_path / "object.o"], check=True)
    names = output_of("nm", "-C", "--defined-only", "--extern-only", tmp_path / "object.o").splitlines()
    symbols = [name.split(maxsplit=2)[2] for name in names]
    # DW.ref.* is the compiler's pointer to what unwinds the stack: data, and the same in every object.
    assert [name for name in symbols if not name.startswith("DW.ref.")] == [f"pyinvolution::cpu::{isa}_kernels"]


PRODUCTS = """
#define VECTOR_BYTES 64
#include "cpu/channels/forward_pairs.inl"
#include "cpu/channels/backward_pairs.inl"
namespace pyinvolution::cpu {
[[gnu::used]] const void* const kept[] = {
    (void*)apply_pairs_block<1, 14, 1, 7, 16>, (void*)apply_pairs_block<2, 7, 1, 7, 16>,
    (void*)apply_pairs_block<1, 14, 2, 7, 16>, (void*)apply_pairs_block<1, 14, 1, 7, 8>,
    (void*)apply_pairs_block<1, 14, 1, 3, 16>,
    (void*)multiply_pairs_blocks<7, true, 2, false>, (void*)multiply_pairs_blocks<7, true, 1, true>,
    (void*)multiply_pairs_blocks<7, false, 4, false>, (void*)multiply_pairs_blocks<3, true, 4, false>,
    (void*)gather_pairs_block<14, 1, 7, 0>, (void*)gather_pairs_block<16, 1, 7, 0>,
    (void*)gather_pairs_block<7, 1, 7, 0>, (void*)gather_pairs_block<14, 2, 7, 1>,
    (void*)grad_weight_pairs_block<3, 1, 7, false>, (void*)grad_weight_pairs_block<3, 1, 7, true>,
    (void*)grad_weight_pairs_block<3, 2, 7, false>, (void*)grad_weight_pairs_block<4, 1, 5, true>};
}
"""
# Function -> products, and how many of them read a pair that the instruction repeats; the others' pairs are shuffled.
EMBEDDED = {
    "apply_pairs_block<1, 14, 1, 7, 16>": (2 * 98, 2 * 70),
    "apply_pairs_block<2, 7, 1, 7, 16>": (2 * 98, 2 * 42),
    "apply_pairs_block<1, 14, 2, 7, 16>": (2 * 98, 2 * 42),
    "apply_pairs_block<1, 14, 1, 7, 8>": (2 * 98, 2 * 70),
    "apply_pairs_block<1, 14, 1, 3, 16>": (2 * 42, 2 * 30),
    "multiply_pairs_blocks<7, true, 2, false>": (28, 28),
    "multiply_pairs_blocks<7, true, 1, true>": (28, 28),
    "multiply_pairs_blocks<7, false, 4, false>": (28, 28),
    "multiply_pairs_blocks<3, true, 4, false>": (24, 24),
    "gather_pairs_block<14, 1, 7, 0>": (2 * 98, 2 * 70),
    "gather_pairs_block<16, 1, 7, 0>": (2 * 112, 2 * 84),
    "gather_pairs_block<7, 1, 7, 0>": (4 * 49, 4 * 21),
    "gather_pairs_block<14, 2, 7, 1>": (2 * 42, 2 * 30),
    "grad_weight_pairs_block<3, 1, 7, false>": (21, 0),
    "grad_weight_pairs_block<3, 1, 7, true>": (21, 0),
    "grad_weight_pairs_block<3, 2, 7, false>": (21, 0),
    "grad_weight_pairs_block<4, 1, 5, true>": (20, 0),
}


def test_products_of_pairs_read_memory_and_keep_their_sums_in_registers(tmp_path: Path) -> None:
    """What compilers make of the inner loops: an instruction for each product, and no vector on the stack."""
    if os.uname().machine != "x86_64" or shutil.which("g++") is None or shutil.which("objdump") is None:
        pytest.skip("needs g++ and objdump on x86-64")
    (tmp_path / "products.cpp").write_text(PRODUCTS)
    includes = [f"-I{ROOT / part}" for part in ("cpp", "cpp/include", "cpp/core")]
    flags = ["-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-ffp-contract=fast", *INSTANCES["avx512_bf16"].split(";")]
    output_of("g++", *flags, *includes, "-c", tmp_path / "products.cpp", "-o", tmp_path / "products.o")
    listing = output_of("objdump", "-d", "-C", "--no-show-raw-insn", tmp_path / "products.o")
    found = {}
    for function in re.split(r"\n(?=[0-9a-f]+ <)", listing):
        name = re.search(r"(\w+_pairs_blocks?<[^>]*>)", function.split("\n")[0])
        if name is None or name[1] not in EMBEDDED:
            continue
        assert not re.search(r"[yz]mm\d+,\S*\(%r[sb]p|\(%r[sb]p[^)]*\),%[yz]mm", function), f"{name[1]} spills vectors"
        products = re.findall(r"vdpbf16ps .*", function)
        found[name[1]] = (len(products), sum("{1to" in product for product in products))
    assert found == EMBEDDED


MODEL = """
#include <cstdio>
#include <random>
#include "cpu/simd/pairs.h"
using namespace pyinvolution;
using namespace pyinvolution::cpu;
int main() {
  std::mt19937 engine(1);
  long others = 0;
  for (int round = 0; round < 200000; ++round) {
    // All numbers; some whose sums round; and some near the smallest ones.
    const uint32_t keep = round % 3 == 0 ? ~0u : round % 3 == 1 ? 0x83ff83ffu : 0x80ff80ffu;
    const uint32_t set = round % 3 == 1 ? 0x3e003e00u : round % 3 == 2 ? 0x20002000u : 0;
    const auto number = [&] { return (uint32_t(engine()) & keep) | set; };
    PairSums<16> sums;
    Pairs<16> x;
    for (int lane = 0; lane < 16; ++lane) {
      sums.value[lane] = float_of(round % 3 == 2 ? engine() & 0x80ffffffu : number());
      x.bits[lane] = number();
    }
    const uint32_t w = number();
    Pair pair;
    std::memcpy(&pair, &w, sizeof pair);
    const PairSums<16> before = sums;
    sums.add_dot(x, pair);
    BFloat16 rounded[16], expected;
    sums.round_to(rounded);
    for (int lane = 0; lane < 16; ++lane) {
      const float model = dot_model(before.value[lane], x.bits[lane], w), found = sums.value[lane];
      store(flushed(found), &expected);
      others += !(bits_of(model) == bits_of(found) || (model != model && found != found));
      others += expected.bits != rounded[lane].bits;
    }
  }
  std::printf("%ld", others);
}
"""


@pytest.mark.skipif("avx512_bf16" not in available_isas(), reason="needs a processor with AVX512-BF16")
def test_the_model_of_products_of_pairs_is_what_the_processor_computes(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    (tmp_path / "model.cpp").write_text(MODEL)
    flags = ["-std=c++20", "-O1", f"-I{ROOT}/cpp", f"-I{ROOT}/cpp/include", *INSTANCES["avx512_bf16"].split(";")]
    output_of("g++", *flags, tmp_path / "model.cpp", "-o", tmp_path / "model")
    assert output_of(tmp_path / "model") == "0"


def test_every_instruction_set_has_an_instance() -> None:
    assert set(available_isas()) <= set(INSTANCES)
    assert set(INSTANCES) == {path.stem for path in (ROOT / "cpp/cpu/instances").glob("*.cpp")}


def test_a_build_without_torch_stops_with_advice(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    interpreter = tmp_path / "bare/bin/python"
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if cmake is None:
        pytest.skip("cmake is not installed")
    configure = [cmake, "-S", ROOT, "-B", tmp_path / "build", f"-DPython_EXECUTABLE={interpreter}"]
    # pip asks the backend for requirements before it resolves, let alone downloads, any dependency.
    scikit_build = pytest.importorskip("scikit_build_core").__path__[0]
    ask = f"""if True:
        import importlib.util, sys
        sys.path += [{str(ROOT / "cmake")!r}, {str(Path(scikit_build).parent)!r}]
        importlib.util.find_spec = lambda name: None
        import backend
        backend.get_requires_for_build_wheel()"""
    for command in (configure, [interpreter, "-c", ask]):
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode != 0
        message = " ".join(result.stderr.split())
        assert "pyinvolution needs PyTorch 2.10 or newer" in message
        assert "pip install torch" in message
