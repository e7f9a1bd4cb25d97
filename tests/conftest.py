"""Settings for every test."""

import os

# cuBLAS has deterministic algorithms on a GPU only with this, which it reads once.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

# The accuracy policy is about float32, and torch's convolutions would use 10 bits of it.
torch.backends.cudnn.allow_tf32 = False

# Tests that look for forgotten elements fill new memory with NaN. A tool that knows what was written must not see that.
torch.utils.deterministic.fill_uninitialized_memory = os.environ.get("PYINVOLUTION_TEST_FILL", "1") != "0"

OF_EXTRAS = ("lightning", "PIL", "yaml")
"""What test modules import, and `pip install "pyinvolution[test]"` alone does not bring."""


class Module(pytest.Module):
    def collect(self):
        try:
            return super().collect()
        except self.CollectError as error:
            missing = getattr(error.__cause__, "name", None) or ""
            if missing.partition(".")[0] not in OF_EXTRAS:
                raise
            pytest.skip(f"needs {missing}, which pyinvolution[dev] brings", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    return Module.from_parent(parent, path=module_path)
