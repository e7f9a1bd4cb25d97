"""Run as modules from the repository's root: `python -m benchmarks.cpu`, `python -m benchmarks.gpu`."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The shapes and the accuracy policy of the tests.
sys.path.append(str(ROOT / "tests"))
