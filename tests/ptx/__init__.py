"""An interpreter of the PTX that nvcc makes of the CUDA kernels; README.md says what it checks and how to run it."""

import sys
from pathlib import Path

# The accuracy policy of the tests, where this runs as `python -m tests.ptx.run`.
sys.path.append(str(Path(__file__).parents[1]))
