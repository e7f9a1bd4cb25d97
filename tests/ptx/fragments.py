"""The table fragments.inl as index arrays."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TABLE = Path(__file__).with_name("fragments.inl")
ROW = re.compile(r"^ELEMENT\((\w+), (\w+), (\d), (\d), ([^,()]+), ([^,()]+)\)$", re.MULTILINE)
TERM = re.compile(r"(group|thread|\d+)(?: \* (\d+))?")

Array = NDArray[Any]
LANE = np.arange(32)
VALUES = {"group": LANE // 4, "thread": LANE % 4}


def _evaluate(text: str) -> Array:
    """A sum of ``group``, ``thread``, their multiples and numbers, for each lane."""
    total = np.zeros(32, np.int64)
    for part in text.split(" + "):
        match = TERM.fullmatch(part)
        if match is None:
            raise ValueError(f"fragment element is {text!r}, expected sums of multiples of group and thread")
        total = total + VALUES.get(match[1], np.int64(int(match[1]) if match[1].isdigit() else 0)) * int(match[2] or 1)
    return total


@cache
def positions(instruction: str, operand: str) -> Array:
    """[register, half, lane, (row, column)]: which element of the matrix is where."""
    rows = [match for match in ROW.finditer(TABLE.read_text()) if match[1] == instruction and match[2] == operand]
    if not rows:
        raise ValueError(f"fragment is {instruction} {operand}, expected a row of {TABLE.name}")
    registers, halves = 1 + max(int(row[3]) for row in rows), 1 + max(int(row[4]) for row in rows)
    result = np.full((registers, halves, 32, 2), -1)
    for row in rows:
        result[int(row[3]), int(row[4])] = np.stack([_evaluate(row[5]), _evaluate(row[6])], -1)
    if (result < 0).any():
        raise ValueError(f"{TABLE.name} does not name every element of {instruction} {operand}")
    return result


def gather(instruction: str, operand: str, columns: int) -> Array:
    """For each element of the matrix, in row-major order, its index in [register, lane, half]."""
    at = positions(instruction, operand)
    registers, halves = at.shape[:2]
    flat = at[..., 0] * columns + at[..., 1]  # [register, half, lane]
    order = np.full(flat.size, -1)
    register, half, lane = np.meshgrid(*(np.arange(n) for n in flat.shape), indexing="ij")
    order[flat] = (register * 32 + lane) * halves + half
    if (order < 0).any() or registers * halves * 32 != order.size:
        raise ValueError(f"{TABLE.name} does not name every element of {instruction} {operand} once")
    return order


def scatter(instruction: str, operand: str, columns: int) -> Array:
    """For [register, lane, half] the index of the element in row-major order."""
    at = positions(instruction, operand)
    flat = at[..., 0] * columns + at[..., 1]
    return np.ascontiguousarray(flat.transpose(0, 2, 1)).reshape(-1)
