"""What each PTX instruction does: one table, OPCODES. An instruction that is not in it is an error that names it.

A row has a regular expression that must match the whole opcode, the class that it is counted in, the kind, and a
function that compiles an instruction to an action for the active lanes. Kinds:

- plain: every lane for itself;
- warp: whole warps (.aligned), which wait for their lanes;
- branch, exit, barrier: the machine runs these itself.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import fragments
from .machine import PARAMETERS, WARP, Action, Active, Late, Machine
from .memory import Fault
from .program import Instruction, PtxError, split_operands

Array = NDArray[Any]
Build = Callable[[Machine, Instruction, "re.Match[str]"], Action]

TYPES: dict[str, Any] = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16,
    "s16": np.int16, "f16": np.float16, "bf16": np.uint16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32,
    "f32": np.float32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
WIDER: dict[str, Any] = {
    "s16": np.int32, "u16": np.uint32, "s32": np.int64, "u32": np.uint64, "s64": np.int64, "u64": np.uint64,
}  # fmt: skip


def float_of_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bf16_of_float(values: Array) -> Array:
    """To the nearest, halves to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


# --- arithmetic


def elementwise(function: Callable[..., Any], sources: int) -> Build:
    """``function`` of all lanes' operands in the instruction's type."""

    def build(machine: Machine, instruction: Instruction, match: "re.Match[str]") -> Action:
        dtype = TYPES[match["type"]]
        to = machine.target(instruction.operands[0], dtype)
        values = [machine.source(text, dtype) for text in instruction.operands[1 : 1 + sources]]
        if isinstance(function, np.ufunc):
            if sources == 2:
                x, y = values
                return lambda active: function(x, y, out=to, where=active.where)
            if sources == 1:
                return lambda active: function(values[0], out=to, where=active.where)
        return lambda active: active.assign(to, function(*values))

    return build


def widening(function: Callable[..., Any], sources: int) -> Build:
    """Products of double width; a third operand is added to the double-width product."""

    def build(machine: Machine, instruction: Instruction, match: "re.Match[str]") -> Action:
        narrow, wide = TYPES[match["type"]], WIDER[match["type"]]
        to = machine.target(instruction.operands[0], wide)
        x, y = (machine.source(text, narrow) for text in instruction.operands[1:3])
        rest = [machine.source(text, wide) for text in instruction.operands[3 : 1 + sources]]
        return lambda active: active.assign(to, function(x.astype(wide), y.astype(wide), *rest))

    return build


def high_product(x: Any, y: Any) -> Any:
    dtype = x.dtype
    if dtype.itemsize == 8:
        wide = [int(a) * int(b) >> 64 for a, b in np.broadcast(x, y)]
        return np.array([value & (2**64 - 1) for value in wide], np.uint64).view(dtype)
    wide_type = WIDER[("s" if dtype.kind == "i" else "u") + str(8 * dtype.itemsize)]
    return (x.astype(wide_type) * y.astype(wide_type) >> wide_type(8 * dtype.itemsize)).astype(dtype)


def quotient(x: Any, y: Any) -> Any:
    """Towards zero; by zero it is all ones, as on a GPU."""
    x, y = np.broadcast_arrays(x, y)
    safe = np.where(y == 0, y.dtype.type(1), y)
    floor = x // safe
    if x.dtype.kind == "i":
        floor = floor + ((floor * safe != x) & ((x < 0) != (safe < 0))).astype(x.dtype)
    return np.where(y == 0, x.dtype.type(-1) if x.dtype.kind == "i" else np.iinfo(x.dtype).max, floor)


def remainder(x: Any, y: Any) -> Any:
    return x - quotient(x, y) * y


def fused(x: Any, y: Any, z: Any) -> Any:
    """In float: exact in double but for the last rounding. In double the product is rounded, too."""
    if x.dtype == np.float32:
        return (x.astype(np.float64) * y + z).astype(np.float32)
    return x * y + z


def shift(left: bool) -> Build:
    """Amounts of the width of the type or more give zeros, or copies of the sign."""

    def build(machine: Machine, instruction: Instruction, match: "re.Match[str]") -> Action:
        dtype = TYPES[match["type"]]
        to, x = machine.target(instruction.operands[0], dtype), machine.source(instruction.operands[1], dtype)
        by = machine.source(instruction.operands[2], np.uint32)
        bits = 8 * np.dtype(dtype).itemsize
        if np.ndim(by) == 0 and int(by) < bits and np.ndim(x):
            function: Any = np.left_shift if left else np.right_shift
            amount = dtype(int(by))
            return lambda active: function(x, amount, out=to, where=active.where)

        def run(active: Active) -> None:
            limited = np.minimum(by, bits - 1).astype(dtype)
            value = x << limited if left else x >> limited
            if left or np.dtype(dtype).kind == "u":
                value = np.where(by >= bits, dtype(0), value)
            active.assign(to, value)

        return run

    return build


COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "ne": lambda x, y: (x < y) | (x > y), "neu": np.not_equal, "equ": lambda x, y: ~((x < y) | (x > y)),
    "ltu": lambda x, y: ~(x >= y), "leu": lambda x, y: ~(x > y), "gtu": lambda x, y: ~(x <= y),
    "geu": lambda x, y: ~(x < y), "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    "nan": lambda x, y: np.isnan(x) | np.isnan(y), "num": lambda x, y: ~(np.isnan(x) | np.isnan(y)),
}  # fmt: skip
COMBINE: dict[str, Any] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def predicate(machine: Machine, text: str) -> Callable[[], Any]:
    value = machine.source(text.lstrip("!"), np.bool_)
    return (lambda: ~value) if text.startswith("!") else (lambda: value)


def compare(machine: Machine, instruction: Instruction, match: "re.Match[str]") -> Action:
    dtype = TYPES[match["type"]]
    first, _, second = instruction.operands[0].partition("|")
    x, y = machine.source(instruction.operands[1], dtype), machine.source(instruction.operands[2], dtype)
    name = match["compare"]
    function = np.not_equal if name == "ne" and np.dtype(dtype).kind != "f" else COMPARE[name]
    to = machine.target(first, np.bool_)
    if match["combine"] is None and not second and isinstance(function, np.ufunc):
        return lambda active: function(x, y, out=to, where=active.where)
    other = machine.target(second, np.bool_) if second and second != "_" else None
    third = predicate(machine, instruction.operands[3]) if match["combine"] else None

    def run(active: Active) -> None:
        result, opposite = function(x, y), ~function(x, y)
        if third is not None:
            combine = COMBINE[match["combine"]]
            result, opposite = combine(result, third()), combine(opposite, third())
        active.assign(to, result)
        if other is not None:
            active.assign(other, opposite)

    return run


def select(machine: Machine, instruction: Instruction, match: "re.Match[str]") -> Action:
    dtype = TYPES[match["type"]]
    to = machine.target(instruction.operands[0], dtype)
    x, y = (machine.source(text, dtype) for text in instruction.operands[1:3])
    choice = predicate(machine, instruction.operands[3])
    return lambda active: active.assign(to, np.where(choice(), x, y))


def move(machine: Machine, instruction: Instruction, match: "re.Match[str]") -> Action:
    to, source = instruction.operands
    dtype = TYPES[match["type"]]
    if to.startswith("{"):
        names = split_operands(to.strip("{}"))
        part = np.dtype(f"u{np.dtype(dtype).itemsize // len(names)}")
        value = machine.source(source, f"u{np.dtype(dtype).itemsize}")
        targets = [machine.target(name, part) if name != "_" else None for name in names]

        def split(active: Active) -> None:
            for i, target in enumerate(targets):
                if target is not None:
                    active.assign(target, (value >> value.dtype.type(8 * part.itemsize * i)).astype(part))

        return split
    if source.startswith("{"):
        names = split_operands(source.strip("{}"))
        whole = np.dtype(f"u{np.dtype(dtype).itemsize}")
        part = np.dtype(f"u{whole.itemsize // len(names)}")
        parts = [machine.source(name, part) for name in names]
        target = machine.target(to, whole)

        def join(active: Active) -> None:
            value = parts[0].astype(whole)
            for i, p in enumerate(parts[1:], 1):
                value = value | (p.astype(whole) << whole.type(8 * part.itemsize * i))
            active.assign(target, value)

        return join
    target, operand = machine.target(to, dtype), machine.source(source, dtype)
    if isinstance(operand, Late):
        return lambda active: active.assign(target, operand.value())
    return lambda active: active.assign(target, operand)


ROUNDING: dict[str, Callable[[Any], Any]] = {"n": np.rint, "z": np.trunc, "m": np.floor, "p": np.ceil}


def convert(machine: Machine, instruction: Instruction, match: "re.Match[str]") -> Action:
    to_name, from_name = match["to"], match["from"]
    to_type, from_type = TYPES[to_name], TYPES[from_name]
    register = machine.registers[instruction.operands[0]]
    x = machine.source(instruction.operands[1], from_type)

    def value() -> Any:
        number = float_of_bf16(x) if from_name == "bf16" else x
        if match["integer"]:
            number = ROUNDING[match["integer"]](number)
        if to_name == "bf16":
            return bf16_of_float(number)
        if np.dtype(to_type).kind in "iu" and np.dtype(number.dtype).kind == "f":
            limits = np.iinfo(to_type)
            return np.where(np.isnan(number), 0, np.clip(number, limits.min, limits.max)).astype(to_type)
        return number.astype(to_type)

    if match["relu"]:
        raise PtxError(f"{instruction.opcode} is not modelled")
    if register.dtype.itemsize == np.dtype(to_type).itemsize:
        to = register.view(to_type)
        return lambda active: active.assign(to, value())
    signed = np.dtype(f"i{register.dtype.itemsize}") if np.dtype(to_type).kind == "i" else register.dtype
    return lambda active: active.assign(register, value().astype(signed).view(register.dtype))


def convert_pair(machine: Machine, instruction: Instruction, match: "re.Match[str]") -> Action:
    """Two floats to the halves of a register; the first one is the upper half."""
    to = machine.target(instruction.operands[0], np.uint32)
    high, low = (machine.source(text, np.float32) for text in instruction.operands[1:3])

    def bits(x: Any) -> Any:
        if match["to"] == "bf16":
            return bf16_of_float(np.asarray(x)).astype(np.uint32)
        return np.asarray(x).astype(np.float16).view(np.uint16).astype(np.uint32)

    return lambda active: active.assign(to, (bits(high) << np.uint32(16)) | bits(low))


def permute(machine: Machine, instruction: Instruction, match: "re.Match[str]") -> Action:
    to = machine.target(instruction.operands[0], np.uint32)
    x, y, selector = (machine.source(text, np.uint32) for text in instruction.operands[1:4])
    one, eight = np.uint64(1), np.uint64(8)

    def run(active: Active) -> None:
        both = np.asarray(x).astype(np.uint64) | (np.asarray(y).astype(np.uint64) << np.uint64(32))
        which = np.asarray(selector).astype(np.uint64)
        result: Any = np.uint64(0)
        for i in range(4):
            nibble = (which >> np.uint64(4 * i)) & np.uint64(15)
            byte = (both >> ((nibble & np.uint64(7)) * eight)) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            byte = np.where((nibble >> np.uint64(3)) & one, sign, byte)
            result = result | (byte << np.uint64(8 * i))
        active.assign(to, result.astype(np.uint32))

    return run


def insert_bits(machine: Machine, instruction: Instruction, match: "re.Match[str]") -> Action:
    dtype = TYPES[match["type"]]
    bits = 8 * np.dtype(dtype).itemsize
    to = machine.target(instruction.operands[0], dtype)
    field, base = (machine.source(text, dtype) for text in instruction.operands[1:3])
    start, length = (machine.source(text, np.uint32) for text in instruction.operands[3:5])

    def run(active: Active) -> None:
        begin, count = np.asarray(start & 255), np.minimum(length & 255, bits)
        ones = np.where(count >= bits, ~dtype(0), (dtype(1) << np.minimum(count, bits - 1).astype(dtype)) - dtype(1))
        shift_by = np.minimum(begin, bits - 1).astype(dtype)
        mask = np.where(begin >= bits, dtype(0), ones << shift_by)
        active.assign(to, (base & ~mask) | ((field << shift_by) & mask))

    return run


def extract_bits(machine: Machine, instruction: Instruction, match: "re.Match[str]") -> Action:
    """A field; a signed one is extended by its own sign (fields that end beyond the register are not modelled)."""
    dtype = TYPES[match["type"]]
    bits = 8 * np.dtype(dtype).itemsize
    to, x = machine.target(instruction.operands[0], dtype), machine.source(instruction.operands[1], dtype)
    start, length = (machine.source(text, np.uint32) for text in instruction.operands[2:4])

    def run(active: Active) -> None:
        begin, count = active.full(start, np.uint32) & 255, active.full(length, np.uint32) & 255
        if (begin + count > bits).any() or (count == 0).any():
            raise PtxError(f"{instruction} with such a field is not modelled")
        value = active.full(x, dtype) << (bits - begin - count).astype(dtype)
        active.scatter(to, value >> (bits - count).astype(dtype))

    return run


def logic(machine: Machine, instruction: Instruction, match: "re.Match[str]") -> Action:
    """lop3: any function of three bits, whose values for 111 to 000 are the bits of the last operand."""
    to = machine.target(instruction.operands[0], np.uint32)
    values = [machine.source(text, np.uint32) for text in instruction.operands[1:4]]
    table = int(instruction.operands[4], 0)

    def run(active: Active) -> None:
        result: Any = np.uint32(0)
        for row in range(8):
            if table >> row & 1:
                terms = [v if row >> (2 - i) & 1 else ~v for i, v in enumerate(values)]
                result = result | (terms[0] & terms[1] & terms[2])
        active.assign(to, result)

    return run


def funnel_shift(machine: Machine, instruction: Instruction, match: "re.Match[str]") -> Action:
    to = machine.target(instruction.operands[0], np.uint32)
    low, high, by = (machine.source(text, np.uint32) for text in instruction.operands[1:4])

    def run(active: Active) -> None:
        both = np.asarray(low).astype(np.uint64) | (np.asarray(high).astype(np.uint64) << np.uint64(32))
        amount = np.minimum(by, 32) if match["mode"] == "clamp" else by & 31
        if match["side"] == "l":
            value = (both << np.asarray(amount).astype(np.uint64)) >> np.uint64(32)
        else:
            value = both >> np.asarray(amount).astype(np.uint64)
        active.assign(to, value.astype(np.uint32))

    return run


def count_bits(x: Any) -> Any:
    return np.bitwise_count(x).astype(np.uint32)


def leading_zeros(x: Any) -> Any:
    return (32 - np.frexp(np.asarray(x).astype(np.float64))[1]).astype(np.uint32)


# --- memory


def vector(instruction: Instruction, number: str | None) -> list[str]:
    """The registers of an access of v2 or v4."""
    text = instruction.operands[1] if instruction.opcode.startswith("st") else instruction.operands[0]
    names = list(split_operands(text.strip("{}"))) if number else [text]
    if len(names) != int(number or 1):
        raise PtxError(f"{instruction} has {len(names)} registers, expected {number}")
    return names


def loaded(machine: Machine, name: str, dtype: Any) -> Callable[[Active, Any], None]:
    """Puts a loaded value into a register that may be wider."""
    register = machine.registers[name]
    bits = np.dtype(f"u{np.dtype(dtype).itemsize}")
    if register.dtype.itemsize == bits.itemsize:
        return lambda active, value: active.scatter(register, value)
    signed = np.dtype(f"i{register.dtype.itemsize}") if np.dtype(dtype).kind == "i" else register.dtype
    return lambda active, value: active.scatter(register, value.view(dtype).astype(signed).view(register.dtype))


def load_parameter(machine: Machine, instruction: Instruction, match: "re.Match[str]") -> Action:
    dtype = TYPES[match["type"]]
    size = np.dtype(dtype).itemsize
    register, offset = machine.address(instruction.operands[1])
    targets = [loaded(machine, name, dtype) for name in vector(instruction, match["vector"])]

    def run(active: Active) -> None:
        if register is None:
            at = np.full(len(active.idx), offset - PARAMETERS, np.int64)
        else:
            at = active.of(register).astype(np.int64) + (offset - PARAMETERS)
        if (at % size).any() or (at < 0).any() or (at + size * len(targets) > machine.parameters.size).any():
            raise Fault("access outside of the kernel's parameters")
        words = machine.parameters.view(f"u{size}")
        for i, target in enumerate(targets):
            target(active, words[at // size + i])

    return run


def global_addresses(machine: Machine, text: str) -> Callable[[Active], Array]:
    register, offset = machine.address(text)
    if register is None:
        raise PtxError(f"address is {text}, expected a register")
    return lambda active: active.of(register).astype(np.int64) + offset


def count_global(machine: Machine, active: Active, addresses: Array, size: int, kind: str) -> None:
    """Bytes that lanes ask for, and sectors of 32 bytes that a warp touches."""
    machine.counts.traffic[f"{kind} bytes"] += size * len(addresses)
    first, last = addresses >> 5, (addresses + size - 1) >> 5
    warp = active.idx // WARP
    keys = np.concatenate([warp << 40 | first, (warp << 40 | last)[last != first]]) if len(addresses) else first
    machine.counts.traffic[f"{kind} sectors"] += len(np.unique(keys))


def load_global(machine: Machine, instruction: Instruction, match: "re.Match[str]") -> Action:
    dtype = TYPES[match["type"]]
    size = np.dtype(dtype).itemsize
    targets = [loaded(machine, name, dtype) for name in vector(instruction, match["vector"])]
    address = global_addresses(machine, instruction.operands[1])
    whole, shift_by = size * len(targets), size.bit_length() - 1

    def run(active: Active) -> None:
        addresses = address(active)
        at = machine.memory.check(addresses, whole, write=False) >> shift_by
        if machine.count:
            count_global(machine, active, addresses, whole, "global read")
        words = machine.memory.views[size]
        for i, target in enumerate(targets):
            target(active, words[at + i])

    return run


def store_global(machine: Machine, instruction: Instruction, match: "re.Match[str]") -> Action:
    size = np.dtype(TYPES[match["type"]]).itemsize
    values = [machine.source(name, f"u{size}") for name in vector(instruction, match["vector"])]
    address = global_addresses(machine, instruction.operands[0])
    whole, shift_by = size * len(values), size.bit_length() - 1

    def run(active: Active) -> None:
        addresses = address(active)
        at = machine.memory.check(addresses, whole, write=True) >> shift_by
        if machine.count:
            count_global(machine, active, addresses, whole, "global write")
        words = machine.memory.views[size]
        for i, value in enumerate(values):
            words[at + i] = active.of(value)

    return run


def wavefronts(active: Active, addresses: Array, size: int) -> int:
    """Cycles that a warp's access takes: 32 banks of 4 bytes; 8-byte accesses take half a warp at a time, 16-byte ones
    a quarter; lanes that read the same word share it."""
    lanes_together = WARP if size <= 4 else WARP * 4 // size
    words = max(1, size // 4)
    part = active.idx // lanes_together
    word = ((addresses >> 2)[:, None] + np.arange(words)).reshape(-1)
    key = np.unique((np.repeat(part, words) << 32) | word)
    banks = np.bincount((key >> 32) * 32 + (key & 31), minlength=(int(part.max()) + 1) * 32)
    return int(banks.reshape(-1, 32).max(1).sum())


def count_shared(machine: Machine, active: Active, addresses: Array, size: int, kind: str) -> None:
    if len(addresses) == 0:
        return
    traffic = machine.counts.traffic
    traffic[f"shared {kind} bytes"] += size * len(addresses)
    taken = wavefronts(active, addresses, size)
    traffic[f"shared {kind} wavefronts"] += taken
    parts = active.idx // (WARP if size <= 4 else WARP * 4 // size)
    traffic[f"shared {kind} conflicts"] += taken - len(np.unique(parts))


def load_shared(machine: Machine, instruction: Instruction, match: "re.Match[str]") -> Action:
    dtype = TYPES[match["type"]]
    size = np.dtype(dtype).itemsize
    targets = [loaded(machine, name, dtype) for name in vector(instruction, match["vector"])]
    register, offset = machine.address(instruction.operands[1])
    whole, shift_by = size * len(targets), size.bit_length() - 1

    def run(active: Active) -> None:
        addresses, cells = machine.shared_cells(active, register, offset, whole)
        if machine.races is not None:
            machine.races.read(cells, whole, active.idx)
        if machine.count:
            count_shared(machine, active, addresses, whole, "read")
        words, at = machine.shared_views[size], cells >> shift_by
        for i, target in enumerate(targets):
            target(active, words[at + i])

    return run


def store_shared(machine: Machine, instruction: Instruction, match: "re.Match[str]") -> Action:
    size = np.dtype(TYPES[match["type"]]).itemsize
    values = [machine.source(name, f"u{size}") for name in vector(instruction, match["vector"])]
    register, offset = machine.address(instruction.operands[0])
    whole, shift_by = size * len(values), size.bit_length() - 1

    def run(active: Active) -> None:
        addresses, cells = machine.shared_cells(active, register, offset, whole)
        if machine.races is not None:
            machine.races.write(cells, whole, active.idx)
        if machine.count:
            count_shared(machine, active, addresses, whole, "write")
        words, at = machine.shared_views[size], cells >> shift_by
        for i, value in enumerate(values):
            words[at + i] = active.of(value)

    return run


def copy_async(machine: Machine, instruction: Instruction, match: "re.Match[str]") -> Action:
    """Bytes beyond the size of the source (the last operand) are zeros."""
    size = int(instruction.operands[2])
    if size not in ((16,) if match["cache"] == "cg" else (4, 8, 16)):
        raise PtxError(f"{instruction} copies {size} bytes, expected 4, 8 or 16")
    to_register, to_offset = machine.address(instruction.operands[0])
    address = global_addresses(machine, instruction.operands[1])
    given = machine.source(instruction.operands[3], np.uint32) if len(instruction.operands) > 3 else np.uint32(size)
    unit = min(size, 8)

    def run(active: Active) -> None:
        shared, cells = machine.shared_cells(active, to_register, to_offset, size)
        source, bytes_ = address(active), active.full(given, np.uint32)
        if ((bytes_ != size) & (bytes_ != 0)).any():
            raise PtxError(f"{instruction} with a part of the source is not modelled")
        if (source % size).any():
            raise Fault(f"misaligned source of a copy of {size} bytes")
        valid = bytes_ == size
        at = machine.memory.check(source[valid], size, write=False) // unit
        words = np.zeros((len(source), size // unit), f"u{unit}")
        for i in range(size // unit):
            words[valid, i] = machine.memory.views[unit][at + i]
        if machine.count:
            traffic = machine.counts.traffic
            traffic["copy instructions"] += len(active.warps)
            traffic["copy lanes"] += len(active.idx)
            traffic["shared copy bytes"] += size * len(shared)
            traffic["shared copy wavefronts"] += wavefronts(active, shared, size)
            lanes = Active(machine, np.isin(machine.every, active.idx[valid]))
            count_global(machine, lanes, source[valid], size, "global read")
        machine.copies.start(active.idx, cells, words.view(np.uint8))

    return run


def commit_copies(machine: Machine, instruction: Instruction, match: "re.Match[str]") -> Action:
    return machine.copies.commit


def wait_for_copies(machine: Machine, instruction: Instruction, match: "re.Match[str]") -> Action:
    left = int(instruction.operands[0]) if instruction.operands else None
    return lambda active: machine.copies.wait(active, left)


# --- warps


def by_warp(active: Active, values: Any, dtype: Any) -> Array:
    """[warp, lane]"""
    return active.full(values, dtype).reshape(-1, WARP)


def shuffle(machine: Machine, instruction: Instruction, match: "re.Match[str]") -> Action:
    """The source lane is limited to a segment of the warp by the mask and the clamp of operand 3."""
    first, _, second = instruction.operands[0].partition("|")
    to = machine.target(first, np.uint32)
    inside = machine.target(second, np.bool_) if second and second != "_" else None
    value, lane_operand, limits = (machine.source(text, np.uint32) for text in instruction.operands[1:4])
    check_mask = whole_mask(machine, instruction, instruction.operands[4])
    mode, lane = match["mode"], np.arange(WARP)

    def run(active: Active) -> None:
        check_mask(active)
        values = by_warp(active, value, np.uint32)
        by = by_warp(active, lane_operand, np.uint32).astype(np.int64) & 31
        limit = by_warp(active, limits, np.uint32).astype(np.int64)
        segment, clamp = limit >> 8 & 31, limit & 31
        most, least = (lane & segment) | (clamp & ~segment), lane & segment
        if mode == "up":
            source = lane - by
            valid = source >= most
        elif mode == "down":
            source = lane + by
            valid = source <= most
        elif mode == "bfly":
            source = lane ^ by
            valid = source <= most
        else:
            source = least | (by & ~segment)
            valid = source <= most
        source = np.where(valid, source, lane)
        active.scatter(to, np.take_along_axis(values, source, 1).reshape(-1))
        if inside is not None:
            active.scatter(inside, valid.reshape(-1))

    return run


def whole_mask(machine: Machine, instruction: Instruction, text: str) -> Callable[[Active], None]:
    """Checks that the mask of an instruction names all lanes."""
    mask = machine.source(text, np.uint32)

    def check(active: Active) -> None:
        if (active.of(mask) != np.uint32(0xFFFFFFFF)).any():
            raise PtxError(f"{instruction} with a mask of some lanes is not modelled")

    return check


def vote(machine: Machine, instruction: Instruction, match: "re.Match[str]") -> Action:
    check_mask = whole_mask(machine, instruction, instruction.operands[2])
    value = predicate(machine, instruction.operands[1])
    mode = match["mode"]
    to = machine.target(instruction.operands[0], np.uint32 if mode == "ballot" else np.bool_)

    def run(active: Active) -> None:
        check_mask(active)
        values = by_warp(active, value(), np.bool_)
        if mode == "ballot":
            result: Any = (values.astype(np.uint32) << np.arange(WARP, dtype=np.uint32)).sum(1, dtype=np.uint32)
        elif mode == "uni":
            result = (values == values[:, :1]).all(1)
        else:
            result = values.any(1) if mode == "any" else values.all(1)
        active.scatter(to, np.repeat(result, WARP))

    return run


def sync_warp(machine: Machine, instruction: Instruction, match: "re.Match[str]") -> Action:
    check_mask = whole_mask(machine, instruction, instruction.operands[0])

    def run(active: Active) -> None:
        check_mask(active)
        if machine.races is not None:
            machine.races.sync_warps(active)

    return run


def stacked(active: Active, registers: list[Any]) -> Array:
    """[warp, register * lane * half] of 16-bit elements."""
    values = np.stack([by_warp(active, r, np.uint32) for r in registers], 1)
    return values.view(np.uint16).reshape(len(values), -1)


def load_matrices(machine: Machine, instruction: Instruction, match: "re.Match[str]") -> Action:
    number = int(match["number"])
    name = "ldmatrix_trans" if match["trans"] else "ldmatrix"
    targets = [machine.target(r, np.uint32) for r in split_operands(instruction.operands[0].strip("{}"))]
    if len(targets) != number:
        raise PtxError(f"{instruction} has {len(targets)} registers, expected {number}")
    register, offset = machine.address(instruction.operands[1])
    order = fragments.scatter(name, "d", 8)

    def run(active: Active) -> None:
        warps = len(active.warps)
        lanes = active.idx.reshape(warps, WARP)[:, : 8 * number]
        if register is None:
            addresses = np.full(lanes.shape, offset, np.int64)
        else:
            addresses = register[lanes].astype(np.int64) + offset
        machine.check_shared(addresses.reshape(-1), 16)
        cells = addresses + machine.shared_base[lanes]
        if machine.races is not None:
            machine.races.read(cells.reshape(-1), 16, lanes.reshape(-1))
        if machine.count:
            # Each matrix is a wavefront: eight rows of 16 bytes should be in different banks.
            row = np.sort((addresses >> 4).reshape(-1, 8), axis=1)
            new = np.concatenate([np.ones((len(row), 1), bool), np.diff(row, axis=1) != 0], 1)
            banks = np.bincount((np.arange(len(row))[:, None] * 8 + row % 8)[new], minlength=8 * len(row))
            taken = int(banks.reshape(-1, 8).max(1).sum())
            traffic = machine.counts.traffic
            traffic["shared read bytes"] += 128 * len(row)
            traffic["shared read wavefronts"] += taken
            traffic["ldmatrix matrices"] += len(row)
            traffic["ldmatrix conflicts"] += taken - len(row)
        quads = machine.shared_views[8]
        at = cells.reshape(-1) >> 3
        rows = np.stack([quads[at], quads[at + 1]], 1).view(np.uint16).reshape(warps, number, 64)
        pairs = np.ascontiguousarray(rows[:, :, order]).view(np.uint32).reshape(warps, number, WARP)
        for i, target in enumerate(targets):
            active.scatter(target, pairs[:, i].reshape(-1))

    return run


def move_matrix(machine: Machine, instruction: Instruction, match: "re.Match[str]") -> Action:
    to = machine.target(instruction.operands[0], np.uint32)
    source = machine.source(instruction.operands[1], np.uint32)
    order = fragments.gather("movmatrix", "a", 8)[fragments.scatter("movmatrix", "d", 8)]

    def run(active: Active) -> None:
        moved = np.ascontiguousarray(stacked(active, [source])[:, order])
        active.scatter(to, moved.view(np.uint32).reshape(-1))

    return run


def multiply(machine: Machine, instruction: Instruction, match: "re.Match[str]") -> Action:
    """D = A * B + C, with products and sums in float (a tensor core rounds sums differently)."""
    shape, depth = match["shape"], int(match["depth"])
    d, a, b, c = (split_operands(text.strip("{}")) for text in instruction.operands)
    for name, registers in zip("abdd", (a, b, d, c), strict=True):
        expected = len(fragments.positions(shape, name))
        if len(registers) != expected:
            raise PtxError(f"{instruction} has {len(registers)} registers for {name}, expected {expected}")
    targets = [machine.target(r, np.float32) for r in d]
    sources_a, sources_b = ([machine.source(r, np.uint32) for r in registers] for registers in (a, b))
    sources_c = [machine.source(r, np.float32) for r in c]
    order_a, order_b = fragments.gather(shape, "a", depth), fragments.gather(shape, "b", 8)
    from_d, to_d = fragments.gather(shape, "d", 8), fragments.scatter(shape, "d", 8)

    def numbers(bits: Array) -> Array:
        return float_of_bf16(bits) if match["type"] == "bf16" else bits.view(np.float16).astype(np.float32)

    def run(active: Active) -> None:
        warps = len(active.warps)
        left = numbers(stacked(active, sources_a)[:, order_a]).reshape(warps, 16, depth)
        right = numbers(stacked(active, sources_b)[:, order_b]).reshape(warps, depth, 8)
        sums = np.stack([by_warp(active, r, np.float32) for r in sources_c], 1).reshape(warps, -1)[:, from_d]
        result = (np.matmul(left, right).reshape(warps, -1) + sums)[:, to_d].reshape(warps, -1, WARP)
        for i, target in enumerate(targets):
            active.scatter(target, result[:, i].reshape(-1))

    return run


def nothing(machine: Machine, instruction: Instruction, match: "re.Match[str]") -> Action:
    return lambda active: None


# --- the table


@dataclass(frozen=True)
class Opcode:
    pattern: str
    counted_as: str  # "": not an instruction
    build: Build
    kind: str = "plain"


INTEGER = r"(?P<type>[su](16|32|64))"
BITS = r"(?P<type>b(16|32|64)|pred)"
FLOAT = r"(?P<type>f32|f64)"
ANY = r"(?P<type>[bsuf](8|16|32|64))"
VECTOR = r"(\.v(?P<vector>[24]))?"

OPCODES: tuple[Opcode, ...] = (
    Opcode(rf"add\.{INTEGER}", "integer", elementwise(np.add, 2)),
    Opcode(rf"sub\.{INTEGER}", "integer", elementwise(np.subtract, 2)),
    Opcode(rf"mul\.lo\.{INTEGER}", "integer", elementwise(np.multiply, 2)),
    Opcode(rf"mul\.hi\.{INTEGER}", "integer", elementwise(high_product, 2)),
    Opcode(r"mul\.wide\.(?P<type>[su](16|32))", "integer", widening(lambda x, y: x * y, 2)),
    Opcode(rf"mad\.lo\.{INTEGER}", "integer", elementwise(lambda x, y, z: x * y + z, 3)),
    Opcode(rf"mad\.hi\.{INTEGER}", "integer", elementwise(lambda x, y, z: high_product(x, y) + z, 3)),
    Opcode(r"mad\.wide\.(?P<type>[su](16|32))", "integer", widening(lambda x, y, z: x * y + z, 3)),
    Opcode(rf"div\.{INTEGER}", "integer", elementwise(quotient, 2)),
    Opcode(rf"rem\.{INTEGER}", "integer", elementwise(remainder, 2)),
    Opcode(rf"min\.{INTEGER}", "integer", elementwise(np.minimum, 2)),
    Opcode(rf"max\.{INTEGER}", "integer", elementwise(np.maximum, 2)),
    Opcode(r"neg\.(?P<type>s(16|32|64))", "integer", elementwise(np.negative, 1)),
    Opcode(r"abs\.(?P<type>s(16|32|64))", "integer", elementwise(np.absolute, 1)),
    Opcode(rf"and\.{BITS}", "integer", elementwise(np.bitwise_and, 2)),
    Opcode(rf"or\.{BITS}", "integer", elementwise(np.bitwise_or, 2)),
    Opcode(rf"xor\.{BITS}", "integer", elementwise(np.bitwise_xor, 2)),
    Opcode(rf"not\.{BITS}", "integer", elementwise(np.invert, 1)),
    Opcode(r"shl\.(?P<type>b(16|32|64))", "integer", shift(left=True)),
    Opcode(r"shr\.(?P<type>[bsu](16|32|64))", "integer", shift(left=False)),
    Opcode(r"shf\.(?P<side>[lr])\.(?P<mode>clamp|wrap)\.b32", "integer", funnel_shift),
    Opcode(r"lop3\.b32", "integer", logic),
    Opcode(r"prmt\.b32", "integer", permute),
    Opcode(r"bfi\.(?P<type>b(32|64))", "integer", insert_bits),
    Opcode(r"bfe\.(?P<type>[su](32|64))", "integer", extract_bits),
    Opcode(r"popc\.(?P<type>b32)", "integer", elementwise(count_bits, 1)),
    Opcode(r"clz\.(?P<type>b32)", "integer", elementwise(leading_zeros, 1)),
    Opcode(
        rf"setp\.(?P<compare>{'|'.join(COMPARE)})(\.(?P<combine>and|or|xor))?\.(?P<type>[bsu](16|32|64))",
        "integer", compare,
    ),
    Opcode(rf"setp\.(?P<compare>{'|'.join(COMPARE)})(\.(?P<combine>and|or|xor))?\.{FLOAT}", "float", compare),
    Opcode(r"selp\.(?P<type>[bsu](16|32|64))", "integer", select),
    Opcode(rf"selp\.{FLOAT}", "float", select),
    Opcode(rf"add(\.rn)?\.{FLOAT}", "float", elementwise(np.add, 2)),
    Opcode(rf"sub(\.rn)?\.{FLOAT}", "float", elementwise(np.subtract, 2)),
    Opcode(rf"mul(\.rn)?\.{FLOAT}", "float", elementwise(np.multiply, 2)),
    Opcode(rf"div\.rn\.{FLOAT}", "float", elementwise(np.divide, 2)),
    Opcode(rf"fma\.rn\.{FLOAT}", "float", elementwise(fused, 3)),
    Opcode(rf"neg\.{FLOAT}", "float", elementwise(np.negative, 1)),
    Opcode(rf"abs\.{FLOAT}", "float", elementwise(np.absolute, 1)),
    Opcode(rf"min\.{FLOAT}", "float", elementwise(np.fmin, 2)),
    Opcode(rf"max\.{FLOAT}", "float", elementwise(np.fmax, 2)),
    Opcode(rf"max\.NaN\.{FLOAT}", "float", elementwise(np.maximum, 2)),
    Opcode(r"mov\.(?P<type>pred|[bsuf](16|32|64))", "other", move),
    Opcode(r"cvta(\.to)?\.(global|shared)\.(?P<type>u64)", "other", move),
    Opcode(r"cvt\.rn\.(?P<to>f16|bf16)x2\.f32", "float", convert_pair),
    Opcode(
        r"cvt(\.r(?P<integer>[nzmp])i)?(\.rn)?(?P<relu>\.relu)?\.(?P<to>f16|bf16|f32|f64)\.(?P<from>f16|bf16|f32|f64)",
        "float", convert,
    ),
    Opcode(r"cvt(?P<integer>)(\.rn)?(?P<relu>)\.(?P<to>f32|f64)\.(?P<from>[su](8|16|32|64))", "float", convert),
    Opcode(r"cvt\.r(?P<integer>[nzmp])i(?P<relu>)\.(?P<to>[su](8|16|32|64))\.(?P<from>f32|f64)", "float", convert),
    Opcode(r"cvt(?P<integer>)(?P<relu>)\.(?P<to>[su](8|16|32|64))\.(?P<from>[su](8|16|32|64))", "integer", convert),
    Opcode(rf"ld\.param{VECTOR}\.{ANY}", "other", load_parameter),
    Opcode(rf"ld\.global(\.nc)?(\.L[12]::\w+)?{VECTOR}\.{ANY}", "global load", load_global),
    Opcode(rf"st\.global{VECTOR}\.{ANY}", "global store", store_global),
    Opcode(rf"ld\.shared{VECTOR}\.{ANY}", "shared load", load_shared),
    Opcode(rf"st\.shared{VECTOR}\.{ANY}", "shared store", store_shared),
    Opcode(r"cp\.async\.(?P<cache>ca|cg)\.shared\.global(\.L2::\w+)?", "async copy", copy_async),
    Opcode(r"cp\.async\.commit_group", "other", commit_copies),
    Opcode(r"cp\.async\.wait_group", "other", wait_for_copies),
    Opcode(r"cp\.async\.wait_all", "other", wait_for_copies),
    Opcode(r"shfl\.sync\.(?P<mode>up|down|bfly|idx)\.b32", "shuffle", shuffle, "warp"),
    Opcode(r"vote\.sync\.(?P<mode>any|all|uni|ballot)\.(pred|b32)", "shuffle", vote, "warp"),
    Opcode(r"movmatrix\.sync\.aligned\.m8n8\.trans\.b16", "shuffle", move_matrix, "warp"),
    Opcode(
        r"ldmatrix\.sync\.aligned\.m8n8\.x(?P<number>[124])(?P<trans>\.trans)?\.shared\.b16", "ldmatrix",
        load_matrices, "warp",
    ),
    Opcode(
        r"mma\.sync\.aligned\.(?P<shape>m16n8k(?P<depth>8|16))\.row\.col\.f32\.(?P<type>f16|bf16)\.(?P=type)\.f32",
        "mma", multiply, "warp",
    ),
    Opcode(r"bar\.warp\.sync", "other", sync_warp, "warp"),
    Opcode(r"(bar\.sync|barrier\.sync(\.aligned)?)", "barrier", nothing, "barrier"),
    Opcode(r"bra(\.uni)?", "branch", nothing, "branch"),
    Opcode(r"(ret|exit)", "branch", nothing, "exit"),
    Opcode(r"nop", "", nothing),
)  # fmt: skip


@cache
def find_opcode(name: str) -> tuple[Opcode, "re.Match[str]"]:
    for opcode in OPCODES:
        match = re.fullmatch(opcode.pattern, name)
        if match is not None:
            return opcode, match
    raise PtxError(f"unknown opcode {name}: opcodes.py has no row for it")


def compile_instruction(machine: Machine, instruction: Instruction) -> tuple[str, str, Action]:
    """Kind, class for counting, and what it does; the machine looks at the guards of branches itself."""
    opcode, match = find_opcode(instruction.opcode)
    if opcode.kind == "barrier" and instruction.operands != ("0",):
        raise PtxError(f"{instruction}: only barrier 0 of all threads is modelled")
    action = opcode.build(machine, instruction, match)
    if instruction.guard is not None and opcode.kind not in ("branch", "exit", "barrier"):
        action = guarded(machine, instruction, action, opcode.kind)
    return opcode.kind, opcode.counted_as, action


def guarded(machine: Machine, instruction: Instruction, action: Action, kind: str) -> Action:
    value = predicate(machine, ("!" if instruction.negated else "") + str(instruction.guard))

    def run(active: Active) -> None:
        lanes = value() & active.where
        number = int(np.count_nonzero(lanes))
        if number == machine.lanes:
            action(machine.all)
        elif number:
            some = Active(machine, lanes)
            if kind == "warp" and not some.uniform:
                raise Fault("the guard divides a warp, which must be whole")
            action(some)

    return run
