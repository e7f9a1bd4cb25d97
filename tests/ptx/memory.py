"""Global memory: one address space with an allocation for each tensor."""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
BASE = 1 << 32
PAGE = 4096


class Fault(Exception):
    """What a kernel did wrong."""


@dataclass(frozen=True)
class Allocation:
    name: str
    begin: int
    end: int
    writable: bool
    output: bool  # each byte must be written exactly once


class Memory:
    """Allocations apart from each other, so that a wrong address is in none of them.

    Pages that nobody touches cost nothing. With ``count_writes`` it counts how often each pair of bytes is written.
    """

    def __init__(self, capacity: int = 1 << 24, *, count_writes: bool = True) -> None:
        self.data = np.zeros(capacity, np.uint8)
        self.writes = np.zeros(capacity // 2 if count_writes else 0, np.uint8)
        self.count_writes = count_writes
        self.views: dict[int, Array] = {n: self.data.view(f"u{n}") for n in (1, 2, 4, 8)}
        self.allocations: list[Allocation] = []
        self.begins: list[int] = []
        self.top = BASE

    def reserve(self, name: str, size: int, *, offset: int = 0, writable: bool = False, output: bool = False) -> int:
        """Address of ``size`` bytes, ``offset`` bytes after a multiple of 1024."""
        begin = (self.top + PAGE + 1023) // 1024 * 1024 + offset
        if begin + size + PAGE > BASE + self.data.size:
            raise ValueError(f"memory for {name} is {size} bytes, expected less than {self.data.size} in all")
        self.allocations.append(Allocation(name, begin, begin + size, writable or output, output))
        self.begins.append(begin)
        self.top = begin + size
        return begin

    def put(self, name: str, array: Array, **kinds: Any) -> int:
        address = self.reserve(name, array.nbytes, **kinds)
        self.data[address - BASE : address - BASE + array.nbytes] = array.reshape(-1).view(np.uint8)
        return address

    def get(self, name: str) -> Array:
        found = self._named(name)
        return self.data[found.begin - BASE : found.end - BASE]

    def _named(self, name: str) -> Allocation:
        return next(a for a in self.allocations if a.name == name)

    def check(self, addresses: Array, size: int, *, write: bool) -> Array:
        """Offsets in ``data`` of accesses of ``size`` bytes; a Fault where one of them is not allowed."""
        if addresses.size == 0:
            return addresses
        if size > 1 and (addresses & (size - 1)).any():
            wrong = addresses[(addresses & (size - 1)) != 0][0]
            raise Fault(f"misaligned access of {size} bytes at {self.name(int(wrong))}")
        low, high = int(addresses.min()), int(addresses.max())
        found = self._at(low)
        if found is None or high + size > found.end:
            for address in np.unique(addresses).tolist():
                one = self._at(address)
                if one is None or address + size > one.end:
                    raise Fault(f"access of {size} bytes outside of all tensors at {self.name(address)}")
                if write and not one.writable:
                    raise Fault(f"write to {one.name}, which is only read")
        elif write and not found.writable:
            raise Fault(f"write to {found.name}, which is only read")
        offsets = addresses - BASE
        if write and self.count_writes:
            np.add.at(self.writes, (offsets >> 1)[:, None] + np.arange(size // 2), 1)
        return offsets

    def _at(self, address: int) -> Allocation | None:
        i = bisect_right(self.begins, address) - 1
        return self.allocations[i] if i >= 0 and address < self.allocations[i].end else None

    def name(self, address: int) -> str:
        """An address as an offset from the allocation before it."""
        i = bisect_right(self.begins, address) - 1
        if i < 0:
            return hex(address)
        return f"{self.allocations[i].name} + {address - self.allocations[i].begin}"

    def check_written(self) -> None:
        """A Fault unless each byte of every output was written exactly once."""
        for output in self.allocations:
            if output.output:
                counts = self.writes[(output.begin - BASE) >> 1 : (output.end - BASE) >> 1]
                wrong = np.flatnonzero(counts != 1)
                if wrong.size:
                    raise Fault(
                        f"{wrong.size} of {counts.size} pairs of bytes of {output.name} were not written exactly once; "
                        f"the first is {2 * wrong[0]}, written {counts[wrong[0]]} times"
                    )
