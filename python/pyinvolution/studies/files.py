"""Results in files, from which an interrupted search continues."""

import json
from pathlib import Path
from typing import Any

from pyinvolution._files import replacing

__all__ = ["read_json", "write_json"]


def read_json(path: Path) -> dict[str, Any]:
    """The content of the file; an empty dict if there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` to ``path``, whose folder is made; a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")
