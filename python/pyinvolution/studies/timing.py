"""Time and memory of functions: clocks, calls by turns, medians with quartiles, peak memory in a process of its own.

What is compared runs by turns, so that a machine that becomes busy slows all of it; a comparison is the median of the
ratios of neighbouring calls.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
from typing_extensions import Self

from pyinvolution.explain import processor_name

__all__ = [
    "Clock",
    "DeviceClock",
    "Function",
    "Ratio",
    "Spread",
    "Stopwatch",
    "clock",
    "device_peak",
    "fastest_passes",
    "forked",
    "high_water",
    "host_clock",
    "interleaved",
    "peak_growth",
    "processor_name",
    "resident",
    "stopwatch",
]

Result = TypeVar("Result")
Function = Callable[[], Any]
Stopwatch = Callable[[], float]
"""Reads seconds from some start."""
Clock = Callable[[Function], float]
"""Calls a function and returns the seconds that it took."""


# --- clocks -----------------------------------------------------------------------------------------------------------


def stopwatch(device: torch.device | str, processor_time: bool = False) -> Stopwatch:
    """Seconds, read once ``device`` has done all that it was given.

    Args:
        device: where the measured work runs.
        processor_time: on a CPU, the time that this process computes, without that of others.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return time.process_time if processor_time else time.perf_counter

    def synchronized() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronized


def clock(read: Stopwatch) -> Clock:
    """A clock that reads ``read`` before and after the call."""

    def seconds(function: Function) -> float:
        start = read()
        function()
        return read() - start

    return seconds


host_clock: Clock = clock(time.perf_counter)
"""For calls that compute on the CPU."""


class DeviceClock:
    """Seconds between two events around a call on the GPU.

    A buffer larger than the second level of cache is written before the first event: this removes the operands from the
    cache, and gives the host the time to enqueue the call, so that a kernel's time is not that of its launch.

    Args:
        flush: whether to write that buffer.
    """

    def __init__(self, flush: bool = True) -> None:
        self.buffer = None
        if flush:
            size = torch.cuda.get_device_properties(0).L2_cache_size
            self.buffer = torch.empty(max(4 * size, 1 << 28), dtype=torch.uint8, device="cuda")
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self, function: Function) -> float:
        start, end = self.events
        if self.buffer is not None:
            self.buffer.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


# --- calls ------------------------------------------------------------------------------------------------------------


def interleaved(
    functions: Mapping[str, Function],
    seconds: float = 0.0,
    least: int = 5,
    clock: Clock = host_clock,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each call, all functions by turns.

    Args:
        functions: what is measured, by name.
        seconds: for how long the turns go on.
        least: turns that there are in any case.
        clock: takes the time of a call.
        warm_up: call each function once before.
    """
    if warm_up:
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    turns = 0
    while turns < least or time.perf_counter() < end:
        for name, function in functions.items():
            times[name].append(clock(function))
        turns += 1
    return times


def fastest_passes(parts: Sequence[Callable[[Any], Any]], input: Any, read: Stopwatch, seconds: float) -> list[float]:
    """Seconds of each of the ``parts``, which make a pass one after the other: the mean of the fastest tenth of passes.

    Whole passes count, because the shortest times of the parts need not have been possible together.

    Args:
        parts: each takes what the one before it returns.
        input: of the first.
        read: reads the time.
        seconds: for how long passes are made, at least six; the first does not count.
    """
    passes: list[list[float]] = []
    start = time.perf_counter()
    while len(passes) < 6 or time.perf_counter() - start < seconds:
        value, times = input, [read()]
        for part in parts:
            value = part(value)
            times.append(read())
        passes.append([end - begin for begin, end in pairwise(times)])
    fastest = sorted(passes[1:], key=sum)[: max(len(passes) // 10, 1)]
    return [statistics.fmean(times) for times in zip(*fastest, strict=True)]


# --- statistics -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        """Of one or more values; the quartiles lie between the smallest and the largest of them."""
        values = sorted(values)
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


class Ratio(Spread):
    """How many times longer another function takes."""

    @classmethod
    def between(cls, ours: Sequence[float], other: Sequence[float]) -> Self:
        """Over the pairs of neighbouring calls."""
        return cls.of(b / a for a, b in zip(ours, other, strict=True))

    def columns(self, other: str) -> dict[str, float]:
        """As columns of a row in which several functions are compared with ours."""
        return {f"{other}: ratio": self.median, f"{other}: low": self.low, f"{other}: high": self.high}

    @classmethod
    def from_row(cls, row: Mapping[str, Any], other: str) -> Self:
        """What `columns` has written."""
        return cls(row[f"{other}: ratio"], row[f"{other}: low"], row[f"{other}: high"])


# --- memory -----------------------------------------------------------------------------------------------------------


def _status(field: str) -> int:
    with Path("/proc/self/status").open() as file:
        line = next(line for line in file if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def resident() -> int:
    """Bytes of memory that this process has resident (Linux)."""
    return _status("VmRSS")


def high_water() -> int:
    """Bytes that it had resident at its peak. Not by getrusage, which includes the peak of the process that started
    it."""
    return _status("VmHWM")


def peak_growth(function: Function) -> int:
    """Bytes by which the peak of a call exceeds what was resident before it.

    Earlier peaks of the process count too: call it in a process that has done little (`forked`). Code that is read
    into memory by the call counts as well, some tens of MiB after a fork.
    """
    before = resident()
    function()
    return high_water() - before


def device_peak(function: Function, device: torch.device | str = "cuda") -> int:
    """Bytes that a call adds to what torch has allocated on the GPU, at its peak."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def forked(function: Callable[..., Result], *arguments: Any) -> Result:
    """The result of ``function(*arguments)`` in a fork of this process, in which nothing else has taken memory.

    torch must not have computed with several threads before: a fork has none of these threads and would wait for them
    forever.

    Raises:
        ChildProcessError: the process ended without a result; its error is on stderr.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def send(connection: Connection) -> None:
        connection.send(function(*arguments))

    process = context.Process(target=send, args=(sender,))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        name = getattr(function, "__name__", type(function).__name__)
        raise ChildProcessError(f"the process that ran {name}{arguments} ended without a result") from None
    finally:
        process.join()
