"""The launches that the library makes for a problem, and the PTX of its kernels, without a GPU.

nvcc compiles each source of cuda/sources.cmake to PTX and to an object with the launch code. These objects are linked
with recorder.cpp, which takes the place of the CUDA runtime and hands each launch to Python.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from filelock import FileLock

from .program import Kernel, kernel_names, read_kernel

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build/ptx"
ARCHITECTURE = "90"
FLAGS = ("-std=c++17", f"-gencode=arch=compute_{ARCHITECTURE},code=compute_{ARCHITECTURE}")


def find_tool(name: str, variable: str) -> str | None:
    default = f"/usr/local/cuda/bin/{name}"
    return os.environ.get(variable) or shutil.which(name) or (default if Path(default).exists() else None)


NVCC = find_tool("nvcc", "CUDACXX")
PTXAS = find_tool("ptxas", "PTXAS")


def missing() -> str | None:
    """Why kernels cannot be compiled here, if they cannot."""
    if NVCC is None:
        return "there is no nvcc"
    return None if shutil.which("g++") else "there is no g++"


@lru_cache(maxsize=1)
def nvcc_version() -> str:
    """ "13.0" """
    assert NVCC is not None
    text = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    assert match is not None, text
    return match[1]


@lru_cache(maxsize=1)
def _compiler() -> str:
    assert NVCC is not None
    return subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout


def sources() -> list[Path]:
    names = re.findall(r"LIST_DIR}/(\S+\.cu)", (ROOT / "cuda/sources.cmake").read_text())
    return [ROOT / "cuda" / name for name in names]


def strategies(problem: str = r"\w*Problem") -> list[str]:
    """The strategies that cuda/variants.h declares, for problems of this type."""
    return re.findall(rf"Refusal (\w+)_refusal\(const {problem}&", (ROOT / "cuda/variants.h").read_text())


def _headers(source: Path) -> list[Path]:
    """Whatever a source may include: the shared headers and those of its strategy."""
    strategy = ROOT / "cuda" / source.relative_to(ROOT / "cuda").parts[0]
    shared = (*ROOT.glob("cuda/*.cuh"), *ROOT.glob("cuda/*.h"), *(ROOT / "cpp/include").rglob("*.h"))
    return sorted({*shared, *strategy.rglob("*.cuh"), *strategy.rglob("*.h")})


def _digest(files: Sequence[Path], *texts: str) -> str:
    digest = hashlib.sha256("\0".join(texts).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: Sequence[str | Path], folder: Path | None = None) -> str:
    result = subprocess.run([str(word) for word in command], cwd=folder, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(str(word) for word in command)}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def _compile(source: Path) -> Path:
    """A folder with kernels.ptx (but for sources without kernels) and launches.o; made once for the same contents."""
    assert NVCC is not None
    label = "-".join(source.relative_to(ROOT / "cuda").with_suffix("").parts).replace("instances-", "")
    target = BUILD / f"{label}-{_digest([source, *_headers(source)], _compiler(), *FLAGS)}"
    BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILD / f"{label}.lock"):  # tests in other processes need the same
        if not target.exists():
            _compile_to(target, source)
    return target


def _compile_to(target: Path, source: Path) -> None:
    assert NVCC is not None
    with tempfile.TemporaryDirectory(dir=BUILD) as made:
        folder = Path(made)
        (folder / "kept").mkdir()
        _run(
            [
                NVCC, *FLAGS, "-Xcompiler=-O0,-fPIC", "--keep", f"--keep-dir={folder / 'kept'}", "-c",
                f"-I{ROOT / 'cpp/include'}", source, "-o", folder / "launches.o",
            ]
        )  # fmt: skip
        for ptx in (folder / "kept").glob("*.ptx"):
            if ".entry" in ptx.read_text():
                ptx.rename(folder / "kernels.ptx")
        shutil.rmtree(folder / "kept")
        result = Path(tempfile.mkdtemp(dir=BUILD))
        for file in folder.iterdir():
            file.rename(result / file.name)
    result.chmod(0o755)
    result.rename(target)


@dataclass(frozen=True)
class Launch:
    kernel: Kernel
    path: str  # of the PTX
    blocks: int
    threads: int
    shared_bytes: int
    arguments: tuple[bytes, ...]


ON_LAUNCH = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int64, ctypes.POINTER(ctypes.c_void_p)
)
ON_OCCUPANCY = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_int64)
Occupancy = Callable[[str, str, int, int], int]
"""How many blocks of a kernel (path of the PTX, name) with so many threads and bytes a multiprocessor can hold."""


class Caller(ctypes.Structure):
    _fields_ = (("multiprocessors", ctypes.c_int), ("on_launch", ON_LAUNCH), ("on_occupancy", ON_OCCUPANCY))


def two_blocks(path: str, name: str, threads: int, shared_bytes: int) -> int:
    return 2


class Refused(Exception):
    """The strategy does not run the problem."""


class Recorder:
    """Compiles all kernels and says what the library would launch."""

    def __init__(self) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            # The longest first.
            order = sorted(sources(), key=lambda source: "mma" not in source.parts)
            self.folders = list(pool.map(_compile, order))
        self.paths: dict[str, str] = {}
        for folder in self.folders:
            ptx = folder / "kernels.ptx"
            if ptx.exists():
                self.paths |= dict.fromkeys(kernel_names(str(ptx)), str(ptx))
        self.library = ctypes.CDLL(str(self._link()))
        for name in ("record", "record_span"):
            getattr(self.library, name).restype = ctypes.c_char_p

    def _link(self) -> Path:
        recorder = Path(__file__).with_name("recorder.cpp")
        headers = sorted((ROOT / "cpp/include").rglob("*.h"))
        names = sorted(folder.name for folder in self.folders)
        macros = [
            f"-D{macro}={''.join(f'{kind}({name})' for name in strategies(problem))}"
            for kind, macro, problem in (
                ("STRATEGY", "STRATEGIES", "Problem"),
                ("SPAN_STRATEGY", "SPAN_STRATEGIES", "SpanProblem"),
            )
        ]
        target = BUILD / f"recorder-{_digest([recorder, *headers, ROOT / 'cuda/variants.h'], *names)}.so"
        if not target.exists():
            made = target.with_suffix(f".{os.getpid()}")
            _run(
                [
                    "g++", "-std=c++17", "-shared", "-fPIC", "-O1", f"-I{ROOT / 'cpp/include'}", *macros, recorder,
                    # The CUDA runtime that torch may have brought into the process must not be called.
                    "-Wl,-z,defs,-Bsymbolic", *(folder / "launches.o" for folder in self.folders), "-o", made,
                ]
            )  # fmt: skip
            made.rename(target)
        return target

    def launches(
        self, strategy: str, pass_: int, numbers: Sequence[int], addresses: Sequence[int], *, multiprocessors: int,
        span: bool, occupancy: Occupancy = two_blocks,
    ) -> list[Launch]:  # fmt: skip
        """What a strategy launches; ``numbers`` as recorder.cpp reads them. Raises Refused or RuntimeError."""
        found: list[Launch] = []
        errors: list[BaseException] = []

        def on_launch(name: bytes, blocks: int, threads: int, shared_bytes: int, arguments: "ctypes.Array") -> None:  # type: ignore[type-arg]
            try:
                path = self.paths[name.decode()]
                kernel = read_kernel(path, name.decode())
                values = tuple(ctypes.string_at(arguments[i], p.size) for i, p in enumerate(kernel.parameters))
                found.append(Launch(kernel, path, blocks, threads, shared_bytes, values))
            except BaseException as error:
                errors.append(error)

        def on_occupancy(name: bytes, threads: int, shared_bytes: int) -> int:
            try:
                return occupancy(self.paths[name.decode()], name.decode(), threads, shared_bytes)
            except BaseException as error:
                errors.append(error)
                return 1

        caller = Caller(multiprocessors, ON_LAUNCH(on_launch), ON_OCCUPANCY(on_occupancy))
        arguments = (
            strategy.encode(), pass_, (ctypes.c_int64 * len(numbers))(*numbers),
            (ctypes.c_void_p * len(addresses))(*addresses), ctypes.byref(caller),
        )  # fmt: skip
        function = self.library.record_span if span else self.library.record
        self._check(function(*arguments, *([None] if span else [])), errors)
        return found

    def scratch_bytes(self, strategy: str, op: int, numbers: Sequence[int], multiprocessors: int) -> int:
        size = ctypes.c_int64()
        caller = Caller(multiprocessors, ON_LAUNCH(lambda *_: None), ON_OCCUPANCY(lambda *_: 2))
        answer = self.library.record_span(
            strategy.encode(), op, (ctypes.c_int64 * len(numbers))(*numbers), (ctypes.c_void_p * 14)(),
            ctypes.byref(caller), ctypes.byref(size),
        )  # fmt: skip
        self._check(answer, [])
        return size.value

    def _check(self, answer: bytes, errors: Sequence[BaseException]) -> None:
        if errors:
            raise errors[0]
        if answer.startswith(b"refused"):
            raise Refused(answer.decode())
        if answer:
            raise RuntimeError(answer.decode())


@lru_cache(maxsize=1)
def _recorder() -> Recorder | Exception:
    """An error is kept, too, so that not every test tries to compile again."""
    try:
        return Recorder()
    except Exception as error:
        return error


def recorder() -> Recorder:
    made = _recorder()
    if isinstance(made, Exception):
        raise made
    return made
