"""Runs a kernel: the threads of several blocks are the elements of numpy arrays, a register is an array.

The threads with the lowest program counter go first, so that those that diverged meet again as early as they can. What
an instruction does is in opcodes.py.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .memory import Fault, Memory
from .program import Instruction, Kernel, PtxError

Array = NDArray[Any]
Where = Any  # True for all lanes, or an array of bool

WARP = 32
# A program counter says what a lane waits for: these are added to the number of the instruction.
AT_BARRIER, AT_WARP, GONE = 1 << 20, 1 << 21, 1 << 30
MOST_BYTES = 227 * 1024
PARAMETERS = 1 << 44  # address of parameter 0; the others follow at distances of PARAMETER_BYTES
PARAMETER_BYTES = 4096

STORAGE = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.uint8, "b16": np.uint16, "u16": np.uint16,
    "s16": np.uint16, "f16": np.uint16, "b32": np.uint32, "u32": np.uint32, "s32": np.uint32, "f32": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.uint64, "f64": np.uint64,
}  # fmt: skip


class Active:
    """The lanes that execute an instruction."""

    __slots__ = ("_idx", "_uniform", "_warps", "machine", "where")

    def __init__(self, machine: "Machine", where: Where) -> None:
        self.machine, self.where = machine, where
        self._idx: Array | None = None
        self._warps: Array | None = None
        self._uniform: bool | None = True if where is True else None

    @property
    def idx(self) -> Array:
        """Their numbers."""
        if self._idx is None:
            self._idx = self.machine.every if self.where is True else np.flatnonzero(self.where)
        return self._idx

    @property
    def warps(self) -> Array:
        """The numbers of the warps that have one of them."""
        if self._warps is None:
            if self.where is True:
                self._warps = np.arange(self.machine.lanes // WARP)
            else:
                self._warps = np.flatnonzero(self.where.reshape(-1, WARP).any(1))
        return self._warps

    @property
    def uniform(self) -> bool:
        """Whether every warp is here as a whole or not at all."""
        if self._uniform is None:
            self._uniform = len(self.idx) == WARP * len(self.warps)
        return self._uniform

    def of(self, values: Any) -> Any:
        """The active lanes' elements."""
        return values if self.where is True or np.ndim(values) == 0 else values[self.idx]

    def full(self, values: Any, dtype: Any) -> Array:
        """The same as an array, for one value in all lanes, too."""
        if np.ndim(values) == 0:
            return np.full(len(self.idx), values, dtype)
        return self.of(values)

    def assign(self, to: Array, values: Any) -> None:
        """Results for all lanes, of which those of active ones count."""
        if self.where is True:
            to[...] = values
        else:
            np.copyto(to, values, where=self.where)

    def scatter(self, to: Array, values: Any) -> None:
        """Results for active lanes only."""
        if self.where is True:
            to[...] = values
        else:
            to[self.idx] = values


Action = Callable[[Active], None]


@dataclass
class Counts:
    """What blocks executed; divide by ``blocks``."""

    blocks: int = 0
    instructions: Counter[str] = field(default_factory=Counter)  # warp instructions by class
    traffic: Counter[str] = field(default_factory=Counter)  # bytes, wavefronts, sectors, lanes
    waits_for_lanes: int = 0  # times that lanes of a warp had to wait for others at .aligned

    def add(self, other: "Counts") -> None:
        self.blocks += other.blocks
        self.instructions.update(other.instructions)
        self.traffic.update(other.traffic)
        self.waits_for_lanes += other.waits_for_lanes


class Machine:
    """Lanes for ``blocks`` blocks of ``threads`` threads that run one kernel.

    Args:
        check: look for races, reads of shared memory that nobody wrote, and copies nobody waited for.
        count: count bytes, bank conflicts and sectors, too; instructions are always counted.
        reads_unwritten: the kernel may read shared memory that nobody wrote, which holds NaN, as long as its results do
            not depend on that.
    """

    def __init__(
        self, kernel: Kernel, threads: int, blocks: int, shared_bytes: int, memory: Memory, *,
        check: bool = True, count: bool = False, reads_unwritten: bool = False,
    ) -> None:  # fmt: skip
        from .opcodes import compile_instruction

        self.kernel, self.threads, self.blocks, self.memory = kernel, threads, blocks, memory
        self.check, self.count, self.reads_unwritten = check, count, reads_unwritten
        self.shared_bytes = kernel.static_shared_bytes + shared_bytes
        if self.shared_bytes > MOST_BYTES:
            raise Fault(f"shared memory is {self.shared_bytes} bytes, expected at most {MOST_BYTES}")
        self.padded = -(-threads // WARP) * WARP
        self.lanes = blocks * self.padded
        self.every = np.arange(self.lanes)
        self.thread = (self.every % self.padded).astype(np.uint32)
        self.block_of_lane = self.every // self.padded
        self.ctaid = np.zeros(self.lanes, np.uint32)
        self.grid = np.uint32(0)
        self.where_now = "the start"
        self.counts = Counts()

        # Shared memory of all blocks one after the other.
        self.pitch = -(-max(self.shared_bytes, 1) // 256) * 256 + 256
        self.shared_base = (self.block_of_lane * self.pitch).astype(np.int64)
        self.shared = np.zeros(self.pitch * blocks, np.uint8)
        self.shared_views: dict[int, Array] = {n: self.shared.view(f"u{n}") for n in (1, 2, 4, 8)}
        self.races = Races(self) if check else None
        self.copies = Copies(self)

        self.parameters = np.zeros(PARAMETER_BYTES * (len(kernel.parameters) + 1), np.uint8)
        self.symbols = {p.name: PARAMETERS + PARAMETER_BYTES * i for i, p in enumerate(kernel.parameters)}
        self.symbols |= kernel.shared
        self.registers: dict[str, Array] = {
            name: np.zeros(self.lanes, STORAGE[type_]) for name, type_ in kernel.registers.items()
        }

        total = len(kernel.instructions)
        starts = {0, total} | set(kernel.labels.values())
        compiled = [compile_instruction(self, instruction) for instruction in kernel.instructions]
        self.kinds = [kind for kind, _, _ in compiled]
        self.classes = [class_ for _, class_, _ in compiled]
        self.actions: list[Action] = [action for _, _, action in compiled]
        for i, kind in enumerate(self.kinds):
            if kind in ("branch", "exit", "barrier"):
                starts |= {i + 1}
        ends = sorted(starts)
        self.end = np.zeros(total + 1, np.int64)
        for begin, end in pairwise(ends):
            self.end[begin:end] = end
        self.whole_warps = np.zeros(total + 1, bool)
        self.whole_warps[:total] = [kind == "warp" for kind in self.kinds]
        self.targets = {
            i: kernel.labels[instruction.operands[0]]
            for i, instruction in enumerate(kernel.instructions)
            if self.kinds[i] == "branch"
        }
        self.guards: dict[int, tuple[Array, bool]] = {
            i: (self.registers[instruction.guard], instruction.negated)
            for i, instruction in enumerate(kernel.instructions)
            if instruction.guard is not None
        }
        self.executed = np.zeros(total + 1, np.int64)  # differences of warp instructions
        self.segments: dict[tuple[int, int], list[Action]] = {}
        self.all = Active(self, True)

    # --- operands

    def source(self, text: str, dtype: Any) -> Any:
        """A register as an array of ``dtype``, or an immediate value or special register."""
        dtype = np.dtype(dtype)
        if text in self.registers:
            register = self.registers[text]
            if dtype == np.bool_ or register.dtype.itemsize == dtype.itemsize:
                return register.view(dtype)
            if register.dtype.itemsize > dtype.itemsize:  # a wide register gives its lower part
                return register.view(dtype)[:: register.dtype.itemsize // dtype.itemsize]
            raise PtxError(f"register {text} has {register.dtype.itemsize} bytes, expected {dtype.itemsize}")
        special = {"%tid.x": self.thread, "%ctaid.x": self.ctaid}
        if text in special:
            return special[text].view(dtype)
        if text == "%laneid":
            return (self.thread % WARP).astype(np.uint32).view(dtype)
        if text == "%ntid.x":
            return np.uint32(self.threads)
        if text == "%nctaid.x":
            return Late(lambda: self.grid)
        if text in self.symbols:
            return np.array(self.symbols[text], np.uint64).astype(f"u{dtype.itemsize}").view(dtype)[()]
        return immediate(text, dtype)

    def target(self, text: str, dtype: Any) -> Array:
        """A register to write as an array of ``dtype``, which must have its size."""
        register = self.registers[text.partition("|")[0]]
        if np.dtype(dtype) != np.bool_ and register.dtype.itemsize != np.dtype(dtype).itemsize:
            raise PtxError(f"register {text} has {register.dtype.itemsize} bytes, expected {np.dtype(dtype).itemsize}")
        return register.view(dtype)

    def address(self, text: str) -> tuple[Array | None, int]:
        """The register, or None, and the offset of ``[register + offset]``."""
        base, _, offset = text.strip("[]").partition("+")
        base = base.strip()
        number = int(offset, 0) if offset else 0
        if base in self.registers:
            return self.registers[base], number
        if base in self.symbols:
            return None, self.symbols[base] + number
        raise PtxError(f"address is {text}, expected a register or a symbol")

    # --- running

    def run(self, arguments: Sequence[bytes], grid: int, first_blocks: Sequence[int]) -> None:
        """Runs the blocks with these numbers, as many as the machine has lanes for at a time."""
        for i, (parameter, value) in enumerate(zip(self.kernel.parameters, arguments, strict=True)):
            if len(value) != parameter.size:
                raise PtxError(f"argument {i} has {len(value)} bytes, expected {parameter.size}")
            begin = i * PARAMETER_BYTES
            self.parameters[begin : begin + len(value)] = np.frombuffer(value, np.uint8)
        self.grid = np.uint32(grid)
        for begin in range(0, len(first_blocks), self.blocks):
            self._run_together(first_blocks[begin : begin + self.blocks])
        self._finish_counts()

    def _run_together(self, blocks: Sequence[int]) -> None:
        self.counts.blocks += len(blocks)
        self.shared[:] = 0xFF
        if self.races is not None:
            self.races.reset()
        numbers = np.zeros(self.blocks, np.uint32)
        numbers[: len(blocks)] = blocks
        self.ctaid[:] = numbers[self.block_of_lane]
        exists = (self.thread < self.threads) & (self.block_of_lane < len(blocks))
        self.pc = np.where(exists, 0, GONE).astype(np.int64)
        try:
            with np.errstate(all="ignore"):
                self._schedule()
        except Fault as fault:
            raise Fault(f"{fault}, in {self.where_now} of {self.kernel.name}") from None
        self.copies.check_finished()

    def _schedule(self) -> None:
        pc = self.pc
        while True:
            now = int(pc.min())
            if now >= AT_BARRIER:
                if now == GONE:
                    return
                self._release()
                continue
            here = pc == now
            if here.all():
                self._walk(now, self.all, GONE)
            else:
                later = int(pc[~here].min())
                self._walk(now, Active(self, here), later)

    def _walk(self, now: int, active: Active, later: int) -> None:
        """Runs these lanes, which are at ``now``, until they divide or reach others at ``later``."""
        pc, kinds, ends = self.pc, self.kinds, self.end
        total = len(kinds)
        while True:
            if now >= later:
                active.scatter(pc, now)
                return
            if now >= total:
                raise Fault("threads run past the end of the kernel")
            end = int(ends[now])
            if not active.uniform and self.whole_warps[now:end].any():
                end = self._stop_before(now, end, active)
                if end == now:
                    return
            kind = kinds[end - 1]
            plain = end - (kind in ("branch", "exit", "barrier"))
            self.executed[now] += len(active.warps)
            self.executed[end] -= len(active.warps)
            i = now
            try:
                for i, action in enumerate(self._actions(now, plain), now):  # noqa: B007
                    action(active)
            except Fault:
                self.where_now = describe(i, self.kernel.instructions[i])
                raise
            if plain == end:
                now = end
                continue
            if kind == "barrier":
                if plain in self.guards:
                    raise Fault("a barrier with a guard is not modelled")
                active.scatter(pc, AT_BARRIER + end)
                return
            taken: Where = active.where
            if plain in self.guards:
                guard, negated = self.guards[plain]
                taken = (~guard if negated else guard) & active.where
                number = int(np.count_nonzero(taken))
                if number == 0:
                    now = end
                    continue
                if number < len(active.idx):
                    active.scatter(pc, end)
                    pc[taken] = self.targets[plain] if kind == "branch" else GONE
                    return
            if kind == "exit":
                active.scatter(pc, GONE)
                return
            now = self.targets[plain]

    def _actions(self, begin: int, end: int) -> list[Action]:
        key = (begin, end)
        found = self.segments.get(key)
        if found is None:
            found = self.segments[key] = self.actions[begin:end]
        return found

    def _stop_before(self, now: int, end: int, active: Active) -> int:
        """Where lanes must stop because an instruction needs whole warps; if that is here, they wait."""
        first = now + int(np.argmax(self.whole_warps[now:end]))
        if first > now:
            return first
        present = np.zeros(self.lanes, bool)
        present[active.idx] = True
        whole = np.repeat(present.reshape(-1, WARP).all(1), WARP)
        self.pc[present & ~whole] = AT_WARP + now
        self.pc[present & whole] = now
        self.counts.waits_for_lanes += 1
        return now

    def _release(self) -> None:
        """Nobody can run: lanes of warps that are complete go on, or all threads at the barrier."""
        pc = self.pc
        parked = (pc >= AT_WARP) & (pc < GONE)
        if parked.any():
            by_warp = pc.reshape(-1, WARP)
            whole = (by_warp == by_warp[:, :1]).all(1) & parked.reshape(-1, WARP)[:, 0]
            if not whole.any():
                number = int(pc[parked].min()) - AT_WARP
                self.where_now = describe(number, self.kernel.instructions[number])
                raise Fault("lanes of a warp wait for others that do not come")
            lanes = np.repeat(whole, WARP)
            pc[lanes] -= AT_WARP
            return
        waiting = (pc >= AT_BARRIER) & (pc < AT_WARP)
        places = np.unique(pc[waiting])
        exists = (self.thread < self.threads) & np.isin(self.block_of_lane, self.block_of_lane[waiting])
        gone = exists & (pc == GONE)
        number = int(places[0]) - AT_BARRIER - 1
        self.where_now = describe(number, self.kernel.instructions[number])
        if gone.any():
            raise Fault("threads left while others of the block wait at a barrier")
        by_block = pc.reshape(self.blocks, self.padded)
        for block in by_block[np.unique(self.block_of_lane[waiting])]:
            if len(set(block[: self.threads].tolist())) > 1:
                raise Fault("threads of a block wait at different barriers")
        pc[waiting] -= AT_BARRIER
        if self.races is not None:
            self.races.barrier()

    def _finish_counts(self) -> None:
        warps = np.cumsum(self.executed)[:-1]
        self.by_instruction = warps
        for class_, number in zip(self.classes, warps.tolist(), strict=True):
            if class_:
                self.counts.instructions[class_] += number
        self.executed = np.zeros_like(self.executed)

    # --- shared memory

    def shared_cells(self, active: Active, register: Array | None, offset: int, size: int) -> tuple[Array, Array]:
        """Addresses in the block, and in the memory of all blocks, of the active lanes' accesses."""
        if register is None:
            addresses = np.full(len(active.idx), offset, np.int64)
        else:
            addresses = active.of(register).astype(np.int64) + offset
        self.check_shared(addresses, size)
        return addresses, addresses + active.of(self.shared_base)

    def check_shared(self, addresses: Array, size: int) -> None:
        if addresses.size == 0:
            return
        if size > 1 and (addresses & (size - 1)).any():
            wrong = addresses[(addresses & (size - 1)) != 0][0]
            raise Fault(f"misaligned access of {size} bytes at {wrong} in shared memory")
        if int(addresses.min()) < 0 or int(addresses.max()) + size > self.shared_bytes:
            wrong = addresses[(addresses < 0) | (addresses + size > self.shared_bytes)][0]
            raise Fault(f"access of {size} bytes at {wrong}, outside of {self.shared_bytes} bytes of shared memory")


class Late:
    """An operand that is known only when the kernel runs."""

    def __init__(self, value: Callable[[], Any]) -> None:
        self.value = value


def immediate(text: str, dtype: Any) -> Any:
    dtype = np.dtype(dtype)
    bits = np.dtype(f"u{dtype.itemsize}") if dtype != np.bool_ else dtype
    if text.startswith(("0f", "0F")):
        return np.array(int(text[2:], 16), np.uint32).view(dtype)[()]
    if text.startswith(("0d", "0D")):
        return np.array(int(text[2:], 16), np.uint64).view(dtype)[()]
    try:
        value = int(text.rstrip("U"), 0)
    except ValueError:
        raise PtxError(f"operand is {text}, expected a register, a symbol or a number") from None
    if dtype == np.bool_:
        return np.bool_(value)
    if dtype.kind == "f":
        raise PtxError(f"operand is {text}, expected a floating-point number")
    return np.array(value & ((1 << 8 * dtype.itemsize) - 1), bits).view(dtype)[()]


SEVERAL_OF_WARP, SEVERAL_WARPS, THREADS = 1024, 2047, 2048
UNDER_WAY = np.int32(2**31 - 1)


class Races:
    """Who wrote and read each pair of bytes of shared memory since the last barrier.

    Two accesses of different threads, one of them a write, must have a barrier between them (or, in one warp, a
    bar.warp.sync). That does not depend on the order in which the threads happened to run. A record is the number of
    barriers so far times THREADS plus a thread, or SEVERAL_OF_WARP plus a warp, or SEVERAL_WARPS.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        cells = machine.shared.size // 2
        self.writer = np.full(cells, -1, np.int32)
        self.reader = np.full(cells, -1, np.int32)
        # With bar.warp.sync: how many of these the warp had met at its last write and read.
        self.warp_syncs: Array | None = None
        if any(i.opcode.startswith("bar.warp") for i in machine.kernel.instructions):
            self.warp_syncs = np.zeros(machine.lanes // WARP, np.int32)
            self.write_syncs, self.read_syncs = np.zeros(cells, np.int32), np.zeros(cells, np.int32)
        self.reset()

    def reset(self) -> None:
        self.writer[:] = -1
        self.reader[:] = -1
        self.base = np.int32(0)
        self.tags = self.machine.thread.astype(np.int32)

    def barrier(self) -> None:
        self.base = np.int32(self.base + THREADS)
        self.tags = self.machine.thread.astype(np.int32) + self.base

    def sync_warps(self, active: Active) -> None:
        assert self.warp_syncs is not None
        self.warp_syncs[active.warps] += 1

    def _conflicts(self, records: Array, mine: Array, syncs: Array | None, cells: Array, lanes: Array) -> Array:
        """Which records are of accesses by others that no barrier separates from these."""
        bad = (records >= self.base) & (records != mine)
        if self.warp_syncs is not None and syncs is not None and bad.any():
            code = records - self.base
            warp = np.where(code < SEVERAL_OF_WARP, code // WARP, code - SEVERAL_OF_WARP)
            lane_warp = (self.machine.thread[lanes] // WARP).astype(np.int32)[:, None]
            known = (code < SEVERAL_WARPS) & (warp == lane_warp)
            bad &= ~(known & (syncs[cells] < self.warp_syncs[lanes // WARP][:, None]))
        return bad

    def _cells(self, addresses: Array, size: int) -> Array:
        if size < 2:
            raise PtxError("accesses to single bytes of shared memory are not modelled")
        return (addresses >> 1)[:, None] + np.arange(size // 2)

    def _name(self, record: int) -> str:
        code = record - int(self.base)
        if record == UNDER_WAY:
            return "an asynchronous copy that nobody waited for"
        if code < SEVERAL_OF_WARP:
            return f"thread {code}"
        return "several threads" if code == SEVERAL_WARPS else f"several threads of warp {code - SEVERAL_OF_WARP}"

    def _fail(self, what: str, bad: Array, records: Array, cells: Array, lanes: Array) -> None:
        row, column = (int(i[0]) for i in np.nonzero(bad))
        at = int(cells[row, column]) * 2 % self.machine.pitch
        thread = int(self.machine.thread[lanes[row]])
        raise Fault(f"race: thread {thread} {what} {self._name(int(records[row, column]))}, byte {at} of shared memory")

    def read(self, addresses: Array, size: int, lanes: Array) -> None:
        """Threads read; an address may be that of several lanes."""
        cells = self._cells(addresses, size)
        mine = self.tags[lanes][:, None]
        written = self.writer[cells]
        if int(written.max(initial=0)) >= self.base:
            bad = self._conflicts(
                written, mine, self.write_syncs if self.warp_syncs is not None else None, cells, lanes
            )
            if bad.any():
                self._fail("reads what was written since the last barrier by", bad, written, cells, lanes)
        if int(written.min(initial=0)) < 0 and not self.machine.reads_unwritten:
            bad = written < 0
            row, column = (int(i[0]) for i in np.nonzero(bad))
            at = int(cells[row, column]) * 2 % self.machine.pitch
            raise Fault(f"thread {self.machine.thread[lanes[row]]} reads byte {at} of shared memory, never written")
        before = self.reader[cells]
        record = np.broadcast_to(mine, before.shape)
        if int(before.max(initial=0)) >= self.base:
            record = self._merge(before, record)
        self.reader[cells] = record
        after = self.reader[cells]
        different = after != record
        if different.any():  # several lanes of this instruction read one place
            at = cells[different]
            both = self._merge(after[different], record[different])
            self.reader[at] = both
            more = self.reader[at] != both
            self.reader[at[more]] = self.base + SEVERAL_WARPS
        if self.warp_syncs is not None:
            self.read_syncs[cells] = self.warp_syncs[lanes // WARP][:, None]

    def _merge(self, before: Array, record: Array) -> Array:
        """The records of both."""
        if self.warp_syncs is None:
            return np.where((before >= self.base) & (before != record), self.base + SEVERAL_WARPS, record)
        code, other = record - self.base, before - self.base
        warp = np.where(code < SEVERAL_OF_WARP, code // WARP, code - SEVERAL_OF_WARP)
        other_warp = np.where(other < SEVERAL_OF_WARP, other // WARP, other - SEVERAL_OF_WARP)
        one_warp = (warp == other_warp) & (code < SEVERAL_WARPS) & (other < SEVERAL_WARPS)
        both = np.where(one_warp, SEVERAL_OF_WARP + warp, SEVERAL_WARPS).astype(np.int32) + self.base
        return np.where(before < self.base, record, np.where(before == record, record, both))

    def write(self, addresses: Array, size: int, lanes: Array, *, under_way: bool = False) -> None:
        cells = self._cells(addresses, size)
        mine = self.tags[lanes][:, None]
        written = self.writer[cells]
        if int(written.max(initial=0)) >= self.base:
            bad = self._conflicts(
                written, mine, self.write_syncs if self.warp_syncs is not None else None, cells, lanes
            )
            if bad.any():
                self._fail("writes over what was written since the last barrier by", bad, written, cells, lanes)
        read = self.reader[cells]
        if int(read.max(initial=0)) >= self.base:
            bad = self._conflicts(read, mine, self.read_syncs if self.warp_syncs is not None else None, cells, lanes)
            if bad.any():
                self._fail("writes over what was read since the last barrier by", bad, read, cells, lanes)
        self.writer[cells] = mine
        twice = self.writer[cells] != mine
        if twice.any():
            self._fail("writes the same place in one instruction as", twice, self.writer[cells], cells, lanes)
        if under_way:
            self.writer[cells] = UNDER_WAY
        if self.warp_syncs is not None:
            self.write_syncs[cells] = self.warp_syncs[lanes // WARP][:, None]

    def arrived(self, addresses: Array, size: int, lanes: Array) -> None:
        """Copies of these lanes have been waited for: for the others that is a write."""
        cells = self._cells(addresses, size)
        self.writer[cells] = self.tags[lanes][:, None]
        if self.warp_syncs is not None:
            self.write_syncs[cells] = self.warp_syncs[lanes // WARP][:, None]


@dataclass
class Copy:
    lanes: Array
    groups: Array
    addresses: Array  # in the shared memory of all blocks
    data: Array  # [lane, byte]


class Copies:
    """cp.async: what was copied is in shared memory only when its thread has waited for the group."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.committed = np.zeros(machine.lanes, np.int64)  # groups of each lane
        self.pending: list[Copy] = []

    def start(self, lanes: Array, addresses: Array, data: Array) -> None:
        machine = self.machine
        if machine.races is not None:
            machine.races.write(addresses, data.shape[1], lanes, under_way=True)
            machine.shared[addresses[:, None] + np.arange(data.shape[1])] = 0xFF
        self.pending.append(Copy(lanes, self.committed[lanes], addresses, data))

    def commit(self, active: Active) -> None:
        self.committed[active.idx] += 1

    def wait(self, active: Active, groups_left: int | None) -> None:
        """For all but the newest groups; None: for copies of groups that are not yet ended, too."""
        here = np.zeros(self.machine.lanes, bool)
        here[active.idx] = True
        left = []
        for copy in self.pending:
            done = here[copy.lanes]
            if groups_left is not None:
                done = done & (copy.groups < self.committed[copy.lanes] - groups_left)
            if done.all():
                self._arrive(copy)
            elif done.any():
                self._arrive(Copy(copy.lanes[done], copy.groups[done], copy.addresses[done], copy.data[done]))
                rest = ~done
                left.append(Copy(copy.lanes[rest], copy.groups[rest], copy.addresses[rest], copy.data[rest]))
            else:
                left.append(copy)
        self.pending = left

    def _arrive(self, copy: Copy) -> None:
        machine, size = self.machine, copy.data.shape[1]
        unit = min(size, 8)
        view = machine.shared_views[unit]
        words = np.ascontiguousarray(copy.data).view(f"u{unit}")
        for i in range(size // unit):
            view[(copy.addresses >> (unit.bit_length() - 1)) + i] = words[:, i]
        if machine.races is not None:
            machine.races.arrived(copy.addresses, size, copy.lanes)

    def check_finished(self) -> None:
        if self.pending:
            self.pending = []
            raise Fault(f"threads of {self.machine.kernel.name} left asynchronous copies that nobody waited for")


def describe(number: int, instruction: Instruction) -> str:
    return f"instruction {number} ({instruction})"
