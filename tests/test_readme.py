"""Every block of Python in the documentation runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = [
    pytest.param(block, id=f"{path.name}-{number}")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE))
]


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize("block", BLOCKS)
def test_block(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    for line in re.findall(r"^print\(.*\)\s+# (.+)$", block, re.MULTILINE):
        assert line in printed


@pytest.mark.parametrize(
    "path", re.findall(r"!\[.*?\]\((\S+?)\)|\]\(([A-Za-z/]+\.md)\)", (ROOT / "README.md").read_text())
)
def test_links_lead_somewhere(path: tuple[str, str]) -> None:
    assert (ROOT / "".join(path)).is_file()
