"""The code in the documentation, for the tests that run it."""

import contextlib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NAMES = ("*.md", "docs/**/*.md", "benchmarks/README.md", "cpp/cpu/README.md", "cuda/README.md")
PAGES = [page for name in NAMES for page in sorted(ROOT.glob(name))]
FENCE = re.compile(r"^(?:<!-- not executed: (\S[^\n]*) -->\n+)?```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of code; ``reason`` is why nothing executes it, from the comment before it."""

    name: str
    language: str
    code: str
    reason: str

    def commands(self) -> list[str]:
        """The lines of a shell's block without comments; those that a backslash continues are one."""
        lines = re.sub(r"\\\n", " ", self.code).splitlines()
        return [command for line in lines if (command := re.sub(r"(^|\s)#.*", "", line).strip())]

    def outputs(self) -> list[str]:
        """What the comment after each ``print(...)`` of Python code says that it prints."""
        return re.findall(r"^print\(.*\)\s+# (.+)$", self.code, re.MULTILINE)


def read(page: Path) -> list[Block]:
    """The blocks of a page. A fence without a language holds commands."""
    return [
        Block(f"{page.relative_to(ROOT)}-{number}", language or "bash", code, reason)
        for number, (reason, language, code) in enumerate(FENCE.findall(page.read_text()))
    ]


BLOCKS = [block for page in PAGES for block in read(page)]


def defined(page: str, mark: str) -> dict[str, Any]:
    """What the block of ``docs/PAGE.md`` with ``mark`` in it defines. It must print what its comments say."""
    (block,) = [b for b in BLOCKS if b.name.startswith(f"docs/{page}.md") and mark in b.code]
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block.code, block.name, "exec"), names)
    for line in block.outputs():
        assert line in printed.getvalue(), f"{block.name} does not print {line}"
    return names


def spans(pattern: str) -> list[str]:
    """What stands between backticks in the text and matches ``pattern``."""
    texts = [FENCE.sub("", page.read_text()) for page in PAGES]
    return sorted({span for text in texts for span in re.findall(r"`([^`\n]+)`", text) if re.fullmatch(pattern, span)})
