"""Settings for every test."""

import os

# cuBLAS has deterministic algorithms on a GPU only with this, which it reads once.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Threads of tests that run side by side wait for each other asleep, not busily. OpenMP reads that once, too.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

# The accuracy policy is about float32, and torch's convolutions would use 10 bits of it.
torch.backends.cudnn.allow_tf32 = False

# Tests that look for forgotten elements fill new memory with NaN. A tool that knows what was written must not see that.
torch.utils.deterministic.fill_uninitialized_memory = os.environ.get("PYINVOLUTION_TEST_FILL", "1") != "0"


@pytest.fixture
def poisoned_outputs():
    """torch.empty gives NaN, so that an element that a kernel forgets is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
