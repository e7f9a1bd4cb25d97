"""Choosing kernels by measurement: `autotune`, and the file in which its choices outlive the process.

The measurements are made by the operators themselves (cpp/ops/autotune.cpp), so that every caller of them takes the
same choice. They ask this module once for each device what is known, and tell it each new choice.
"""

import atexit
import fcntl
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pyinvolution._files import replacing
from pyinvolution._library import _C
from pyinvolution.explain import driver_version, processor_name, variants

__all__ = ["autotune", "autotune_file"]


def autotune(on: bool = True, *, reset: bool = False) -> None:
    """Lets each new problem run on the kernel variant that was measured to be the fastest for it here.

    At the first call of a problem (operator, pass, dtype, sizes and strides) every variant that takes it is run on the
    call's own tensors, compared with the last one of the dispatch table (``generic`` on a GPU, ``scalar`` on a CPU, the
    composition of a span involution), and timed; wrong and failing ones are left out. The fastest runs from then on,
    also in compiled and exported programs, and `explain` names it. Off by default; PYINVOLUTION_AUTOTUNE=1 turns it on
    for a process. Nothing is measured while a CUDA graph is captured or torch.jit traces, nor on fake tensors.

    Choices are kept in `autotune_file`, by processor, instruction set and number of threads or by GPU and driver, and
    by the version of this library. Results of different variants differ in their last bits; the choice for a problem
    does not change once it is made.

    Args:
        on: False returns to the order of the dispatch table.
        reset: forget every choice, in the process and, for this machine, in the file.
    """
    if reset:
        _C.forget_choices()
        _forget()
    _C.set_store(_recall, _remember)
    _C.autotune(on)


def autotune_file() -> Path:
    """Where choices are kept: pyinvolution/autotune.json in XDG_CACHE_HOME, by default ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "pyinvolution" / "autotune.json"


def _machine(device: str) -> str | None:
    """What the times of ``device`` depend on, or None where its GPUs differ."""
    from pyinvolution import __version__

    if device == "cpu":
        where = f"{processor_name()}, {_C.current_isa()}, {torch.get_num_threads()} threads"
    else:
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        if len(names) != 1:
            return None
        where = f"{names.pop()}, driver {driver_version()}"
    return f"{where}, pyinvolution {__version__} ({_C.cuda_build()})"


Machines = dict[str, dict[str, dict[str, str]]]
"""For each machine, for each problem: the variant, and what the candidates took."""


def _read() -> Machines:
    try:
        machines = json.loads(autotune_file().read_text())["machines"]
        for problems in machines.values():
            for choice in problems.values():
                str.lower(choice["variant"])
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        _warn(f"{autotune_file()} cannot be read ({type(error).__name__}: {error}); what it held is measured again")
        return {}
    return machines


@contextmanager
def _changed() -> Iterator[Machines]:
    """What the file holds, to be changed; other processes wait, and readers see the old or the new file."""
    file = autotune_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        machines = _read()
        yield machines
        with replacing(file) as part:
            part.write_text(json.dumps({"machines": machines}, indent=1))


def _recall(device: str) -> bool:
    machine = _machine(device)
    if machine is None:
        _warn("autotune needs GPUs of one kind in a process (CUDA_VISIBLE_DEVICES selects them); nothing is measured")
        return False
    for problem, choice in _read().get(machine, {}).items():
        _C.keep_choice(problem, choice["variant"])
    return True


def _remember(device: str, problem: str, variant: str, times: str) -> bool:
    machine = _machine(device)
    try:
        with _changed() as machines:
            problems = machines.setdefault(str(machine), {})
            # Of several processes that measured at the same time the first one has chosen.
            if f"{device}/{problems.get(problem, {}).get('variant')}" not in variants(problem.split()[0]):
                problems[problem] = {"variant": variant, "times": times}
    except OSError as error:
        _warn(f"autotune cannot write {autotune_file()} ({error}); its choices last as long as the process")
    return True


def _forget() -> None:
    if not autotune_file().exists():
        return
    with _changed() as machines:
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            machines.pop(str(_machine(device)), None)


_warned: set[str] = set()


def _warn(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, RuntimeWarning, stacklevel=3)


def _release(*_: Any) -> None:
    # The library lives longer than the interpreter.
    _C.set_store(None, None)


_C.set_store(_recall, _remember)
atexit.register(_release)
