"""Reads PTX: the kernels (entries) of a file and their instructions, without knowing what an instruction means."""

import re
from dataclasses import dataclass, field, replace
from functools import lru_cache


class PtxError(Exception):
    """PTX that the interpreter cannot read or run."""


@dataclass(frozen=True)
class Instruction:
    """``@!guard opcode operands``; ``negated`` is the exclamation mark."""

    opcode: str
    operands: tuple[str, ...]
    guard: str | None = None
    negated: bool = False

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}".rstrip()


@dataclass(frozen=True)
class Parameter:
    name: str
    size: int  # bytes


@dataclass(frozen=True)
class Kernel:
    name: str
    parameters: tuple[Parameter, ...]
    registers: dict[str, str] = field(repr=False)  # name: type
    instructions: tuple[Instruction, ...] = field(repr=False)
    labels: dict[str, int] = field(repr=False)  # name: number of the instruction after it
    shared: dict[str, int] = field(repr=False)  # static arrays and the dynamic one: offset in shared memory
    static_shared_bytes: int = 0

    def changed(self, number: int, instruction: Instruction) -> "Kernel":
        """The kernel with another instruction at this place."""
        instructions = list(self.instructions)
        instructions[number] = instruction
        return replace(self, instructions=tuple(instructions))


SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(")
PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.[a-z](\d+)\s+([\w$]+)(?:\[(\d+)\])?")
SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.[a-z](\d+)\s+([\w$]+)(?:\[(\d*)\])?")
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
GUARD = re.compile(r"@(!?)(%\w+)\s+(.*)", re.DOTALL)
LABEL = re.compile(r"([\w$]+):\s*(?!:)")


@lru_cache(maxsize=64)
def _read(path: str) -> tuple[str, dict[str, int]]:
    with open(path) as file:
        text = re.sub(r"//[^\n]*", "", file.read())
    return text, {match[1]: match.start() for match in ENTRY.finditer(text)}


def kernel_names(path: str) -> tuple[str, ...]:
    return tuple(_read(path)[1])


def entry_text(path: str, names: set[str]) -> str:
    """PTX with only the named kernels of a file."""
    text, starts = _read(path)
    first = min(starts.values())
    head = text[: text.rindex(";", 0, first) + 1] if ";" in text[:first] else text[: text.index(".visible")]
    parts = [head]
    for name in names:
        start = text.rfind("\n", 0, starts[name]) + 1
        parts.append(text[start : _body(text, starts[name])[1] + 1])
    return "\n\n".join(parts) + "\n"


def _body(text: str, start: int) -> tuple[int, int]:
    """Where the braces of an entry are."""
    opening = text.index("{", start)
    # A body ends with a brace at the start of a line; nested scopes are indented or within a line.
    return opening, text.index("\n}", opening) + 1


@lru_cache(maxsize=512)
def read_kernel(path: str, name: str) -> Kernel:
    text, starts = _read(path)
    if name not in starts:
        raise PtxError(f"kernel is {name}, expected one of {path}")
    start = starts[name]
    opening, closing = _body(text, start)
    head, body = text[text.index("(", start) : opening], text[opening + 1 : closing]
    parameters = tuple(
        Parameter(match[2], int(match[1]) // 8 * int(match[3] or 1)) for match in PARAMETER.finditer(head)
    )
    registers: dict[str, str] = {}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    declared = [match for match in SHARED.finditer(text[: min(starts.values())]) if match[3] in body]
    for statement in body.split(";"):
        statement = statement.strip()
        while True:
            if statement[:1] in ("{", "}"):
                statement = statement[1:].lstrip()
            elif (label := LABEL.match(statement)) is not None:
                labels[label[1]] = len(instructions)
                statement = statement[label.end() :]
            else:
                break
        if not statement or statement.startswith(".pragma"):
            continue
        if (match := REGISTERS.match(statement)) is not None:
            for item in match[2].split(","):
                base, _, count = item.strip().partition("<")
                names = [f"{base}{i}" for i in range(int(count.rstrip(">")))] if count else [base]
                for register in names:
                    if registers.setdefault(register, match[1]) != match[1]:
                        raise PtxError(f"{name}: register {register} is declared twice")
        elif (shared := SHARED.match(statement)) is not None:
            declared.append(shared)
        elif statement.startswith("."):
            raise PtxError(f"{name}: unknown directive {statement!r}")
        else:
            instructions.append(_instruction(statement))
    shared_offsets, bytes_ = _shared_layout(declared)
    return Kernel(name, parameters, registers, tuple(instructions), labels, shared_offsets, bytes_)


def _shared_layout(declared: list[re.Match[str]]) -> tuple[dict[str, int], int]:
    """Static arrays one after another, and the dynamic one (without a size) behind them."""
    offsets, end, dynamic = {}, 0, {}
    for match in declared:
        align = int(match[1] or int(match[2]) // 8)
        if match[4] == "":
            dynamic[match[3]] = align
            continue
        end = -(-end // align) * align
        offsets[match[3]] = end
        end += int(match[2]) // 8 * int(match[4] or 1)
    for align in dynamic.values():
        end = -(-end // align) * align if end else 0
    return {**offsets, **dict.fromkeys(dynamic, end)}, end


def _instruction(statement: str) -> Instruction:
    guard, negated = None, False
    if (match := GUARD.match(statement)) is not None:
        guard, negated, statement = match[2], bool(match[1]), match[3]
    opcode, _, rest = statement.partition(" ")
    if "\t" in opcode:
        opcode, _, more = statement.partition("\t")
        rest = more
    return Instruction(opcode, split_operands(rest), guard, negated)


@lru_cache(maxsize=100000)
def split_operands(text: str) -> tuple[str, ...]:
    """At commas outside of brackets."""
    if "{" not in text:
        return tuple(part.strip() for part in text.split(",")) if text.strip() else ()
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return (*parts, current.strip())
