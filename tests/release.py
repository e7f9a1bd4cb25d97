"""Checks that everything that names the version of a release agrees, before its wheels are built.

    python tests/release.py [TAG]

pyproject.toml has the version. CITATION.cff has the same one. With a tag, the tag is v and that version, the
changelog's newest section is that version with its date, "## [1.2.3] - 2026-01-31", and CITATION.cff has the same date.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def disagreements(folder: Path, tag: str | None = None) -> list[str]:
    """What does not fit the version in ``folder``'s pyproject.toml, a sentence each."""

    def find(name: str, pattern: str) -> str | None:
        match = re.search(pattern, (folder / name).read_text(), re.MULTILINE)
        return match and match[1]

    version = find("pyproject.toml", r'^version = "(.*)"$')
    problems = []

    def expect(name: str, found: str | None, expected: str | None) -> None:
        if found != expected:
            problems.append(f"{name} is {found}, expected {expected}")

    expect("the version in CITATION.cff", find("CITATION.cff", r"^version: (\S+)$"), version)
    if tag is not None:
        expect("the tag", tag, f"v{version}")
        # An empty section for what comes next may stand before it.
        newest = find("CHANGELOG.md", r"\A(?:(?!## ).*\n)*(?:## \[Unreleased\]\n\s*)?## (.*)$")
        named, _, date = (newest or "").partition(" - ")
        expect("the newest version in CHANGELOG.md", named, f"[{version}]")
        expect("the date in CITATION.cff", find("CITATION.cff", r"^date-released: '?(\d{4}-\d\d-\d\d)'?$"), date)
    return problems


if __name__ == "__main__":
    sys.exit("\n".join(disagreements(ROOT, *sys.argv[1:2])) or 0)
