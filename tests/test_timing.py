"""The harness of all measurements: turns, statistics, memory."""

import math
import os

import pytest
import torch

from pyinvolution.studies import timing


def test_functions_run_by_turns_and_each_call_is_timed() -> None:
    calls: list[str] = []
    now = iter(range(1000))
    times = timing.interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        least=3,
        clock=timing.clock(lambda: float(next(now) ** 2)),
    )
    assert calls == ["a", "b"] + ["a", "b"] * 3
    # The clock is read twice a call: 0 and 1, 4 and 9, 16 and 25, ...
    assert times == {"a": [1.0, 9.0, 17.0], "b": [5.0, 13.0, 21.0]}
    timing.interleaved({"a": lambda: calls.append("cold")}, least=2, warm_up=False)
    assert calls.count("cold") == 2


def test_turns_last_for_the_given_time() -> None:
    times = timing.interleaved({"wait": lambda: math.factorial(1000)}, seconds=0.05, least=1)["wait"]
    assert len(times) > 1
    assert sum(times) < 1


def test_spread_and_ratio_by_hand() -> None:
    spread = timing.Spread.of([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (spread.low, spread.median, spread.high) == (2.0, 3.0, 4.0)
    assert timing.Spread.of([7.0]) == timing.Spread(7.0, 7.0, 7.0)
    two = timing.Spread.of([1.0, 2.0])
    assert 1 <= two.low < two.median < two.high <= 2
    ratio = timing.Ratio.between([1.0, 2.0, 4.0], [3.0, 4.0, 4.0])
    assert (ratio.low, ratio.median, ratio.high) == (1.5, 2.0, 2.5)
    assert timing.Ratio.from_row(ratio.columns("other"), "other") == ratio
    assert str(ratio) == "2.00 (1.50-2.50)"


def test_fastest_passes_count_whole() -> None:
    """The fastest part of a slow pass does not count."""
    durations = iter([9, 9, 1, 8, 2, 3, 4, 4, 4, 4, 4, 4] + [50] * 1000)  # pass by pass, two parts each
    now = [0.0]

    def part(value: int) -> int:
        now[0] += next(durations)
        return value + 1

    taken = timing.fastest_passes([part, part], 0, lambda: now[0], 0.0)
    assert taken == [2.0, 3.0]


def test_a_fork_returns_its_result_and_says_when_it_ends_without(capfd: pytest.CaptureFixture[str]) -> None:
    assert timing.forked(os.getpid) != os.getpid()
    with pytest.raises(ChildProcessError, match=r"isqrt\(-1,\) ended without a result"):
        timing.forked(math.isqrt, -1)
    assert "isqrt() argument must be nonnegative" in capfd.readouterr().err


def _fill(mib: int, keep: bool) -> int:
    kept: list[torch.Tensor] = []
    torch.set_num_threads(1)  # a fork waits forever for the threads that other tests have used
    torch.ones(1 << 14)  # torch's own code is read into memory by the first call

    def function() -> None:
        block = torch.ones(mib << 18)
        if keep:
            kept.append(block)

    return timing.peak_growth(function)


@pytest.mark.parametrize("keep", [False, True])
def test_peak_memory(keep: bool) -> None:
    assert timing.forked(_fill, 64, keep) == pytest.approx(64 << 20, abs=4 << 20)
    assert timing.high_water() >= timing.resident() > 1 << 20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_memory_of_a_gpu() -> None:
    kept = torch.ones(1 << 18, device="cuda")
    assert timing.device_peak(lambda: torch.ones(1 << 20, device="cuda")) == 4 << 20
    assert len(kept) == 1 << 18
