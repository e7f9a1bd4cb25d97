"""What the kernels cost has not changed unnoticed: the table budgets/nvcc-VERSION.json, and the documents made from it.

After a change that is meant: `python -m tests.ptx.budgets --rebase`.
"""

import copy
from typing import Any

import pytest

from . import launches
from .budgets import (
    DOCUMENTS,
    MARKED,
    blocks_per_multiprocessor,
    classes,
    differences,
    identity,
    measure,
    read_table,
    short_name,
    table_path,
    with_figures,
)
from .launches import ROOT, nvcc_version

Row = dict[str, Any]


@pytest.fixture(scope="module")
def measured() -> dict[str, Row]:
    if launches.missing() is not None:
        pytest.skip(str(launches.missing()))
    if launches.PTXAS is None:
        pytest.skip("there is no ptxas")
    if not table_path().exists():
        pytest.skip(f"there is no table for nvcc {nvcc_version()}: python -m tests.ptx.budgets --rebase")
    return {identity(row): row for row in measure(list(classes()))}


def test_rows(measured):
    assert list(measured) == [identity(row) for row in read_table(table_path())]


@pytest.mark.parametrize("committed", read_table(), ids=identity)
def test_budget(committed, measured):
    if committed not in read_table(table_path()):
        pytest.skip("the table of this nvcc has another row")
    assert differences(committed, measured[identity(committed)]) == []


def test_nothing_spills():
    assert [identity(row) for row in read_table() if row["spill_bytes"]] == []


def test_tiled_hides_latency():
    """It waits for its tile, so others must run meanwhile."""
    rows = [row for row in read_table() if row["strategy"] == "tiled"]
    assert len(rows) > 20
    assert [identity(row) for row in rows if row["blocks_per_sm"] * -(-row["threads"] // 32) < 16] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_agree(name):
    text = (ROOT / name).read_text()
    assert MARKED.search(text), f"{name} has no markers"
    assert with_figures(text, read_table()) == text, "python -m tests.ptx.budgets --rebase"


def test_differences_are_noticed():
    row = read_table()[0]
    assert differences(row, row) == []
    for part, name, factor, noticed in (
        ("instructions", "integer", 1.02, False), ("instructions", "integer", 1.04, True),
        ("instructions", "mma", 0.9, True), ("traffic", "shared read wavefronts", 1.1, True),
    ):  # fmt: skip
        changed = copy.deepcopy(row)
        changed[part][name] = row[part][name] * factor
        assert bool(differences(row, changed)) == noticed, name
    assert differences(row, {**row, "registers": row["registers"] + 1})
    assert differences(row, {**row, "instructions": {**row["instructions"], "global load": 100}})


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [(256, 128, 0, 2), (256, 128, 94208, 2), (512, 64, 116000, 1), (64, 32, 0, 32), (1024, 32, 0, 2), (256, 129, 0, 1)],
)
def test_blocks_per_multiprocessor(threads, registers, shared, blocks):
    assert blocks_per_multiprocessor(threads, registers, shared) == blocks


def test_names():
    mangled = (
        "_ZN12pyinvolution4cuda3mma7forwardINS0_10TileConfigILi7ELi1ELi8ELi16ELi16EEELb1ELb1E13__nv_bfloat16EEvNS0_1"
    )
    assert short_name(mangled) == ("forward", [("TileConfig", [7, 1, 8, 16, 16])])
