"""Tries a wheel on other versions of PyTorch than the one it was built with: the promise of the stable ABI.

    python tests/abi.py [--torch 2.10.0] [--torch newest] [--folder DIR] WHEEL

Makes an environment for each version (a download of up to 3 GB each), installs the wheel, runs the tests of the
operators there, and compiles the C++ programs against that libtorch. `make test-abi` does it for a wheel it has built.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ("test_functional.py", "test_kernels.py", "test_modules.py", "test_consumer.py")
PACKAGES = ("numpy", "pytest", "hypothesis", "cmake", "ninja")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", action="append", metavar="VERSION", help="default: 2.10.0 and newest")
    parser.add_argument("--folder", type=Path, help="keeps the environments for the next time")
    options = parser.parse_args()
    failed = []
    with tempfile.TemporaryDirectory() as temporary:
        for version in options.torch or ["2.10.0", "newest"]:
            root = (options.folder or Path(temporary)).absolute() / version
            if not attempt(root, options.wheel.absolute(), version):
                failed.append(version)
    if failed:
        sys.exit(f"the wheel does not work with torch {', '.join(failed)}")


def attempt(root: Path, wheel: Path, version: str) -> bool:
    python = root / "bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", root], check=True)
    install = [python, "-m", "pip", "install", "--quiet"]
    requirement = "torch" if version == "newest" else f"torch=={version}"
    subprocess.run([*install, requirement, *PACKAGES], check=True)
    subprocess.run([*install, "--force-reinstall", "--no-deps", wheel], check=True)
    tests = [ROOT / "tests" / name for name in TESTS]
    # Not from the checkout, whose tests would find nothing built there.
    switches = {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "2", "PYINVOLUTION_WHEEL": str(wheel)}
    environment = os.environ | switches
    show = "import torch, pyinvolution; print(pyinvolution.build_info())"
    subprocess.run([python, "-c", show], cwd=root, env=environment, check=True)
    # torch.export of 2.10 cannot prove the size of the output of a layer with a stride; the rest must pass.
    skipped = ["-k", "not compiles_and_exports"] if version.startswith("2.10.") else []
    command = [python, "-m", "pytest", "-q", *skipped, "-p", "no:cacheprovider", f"--rootdir={root}", *tests]
    return subprocess.run(command, cwd=root, env=environment, check=False).returncode == 0


if __name__ == "__main__":
    main()
