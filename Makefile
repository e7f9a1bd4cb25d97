# Two commands set everything up on a machine with Python >= 3.10 and g++:
#   make demo    trains a small RedNet on real handwritten digits and draws what it learned
#   make test    runs the tests
# PYTHON picks the interpreter. Where nvcc is found, CUDA kernels are built for this machine's GPU (without one, for compute
# capability 9.0, which compiles them at least); PYINVOLUTION_CUDA_ARCHITECTURES="80;90" names others, PYINVOLUTION_CUDA=OFF none.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILD := build/editable
SOURCES := CMakeLists.txt pyproject.toml $(shell find cpp cuda cmake -type f -not -name "*.pyc")
GPUS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | sort -u | paste -sd ';')
export PYINVOLUTION_CUDA_ARCHITECTURES ?= $(or $(GPUS),90)
COMMA := ,
CPP_FILES = $(shell git ls-files '*.cpp' '*.h' '*.inl' '*.cu' '*.cuh')

.PHONY: demo test test-python test-cpp test-aarch64 lint format bench bench-gpu sanitize-gpu wheel test-abi docs clean

demo: $(VENV)/.installed
	$(BIN)/pyinvolution demo

test: test-cpp test-python

# Each file in one process, for what its tests share.
test-python: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# The torch-free core and, emulated on the CPU, the CUDA kernels, under the address and undefined-behaviour sanitizers.
test-cpp: $(VENV)/.installed
	$(BIN)/cmake -S tests/cpp -B build/cpp -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja
	$(BIN)/cmake --build build/cpp
	$(BIN)/ctest --test-dir build/cpp --output-on-failure

# The torch-free core on 64-bit Arm: cross-compiled, and run in qemu's emulation of such a processor. Needs no .venv but
# cmake, and apt-get install g++-aarch64-linux-gnu qemu-user
AARCH64_TESTS := test_cpu test_fuzz test_cuda_emulator test_cuda_emulator_ucontext
test-aarch64: export PATH := $(abspath $(BIN)):$(PATH)
test-aarch64:
	cmake -S tests/cpp -B build/aarch64 -DPYINVOLUTION_SANITIZE=OFF \
		-DCMAKE_TOOLCHAIN_FILE=$(abspath cmake/aarch64-linux-gnu.cmake)
	cmake --build build/aarch64 --parallel 2 --target $(AARCH64_TESTS)
	ctest --test-dir build/aarch64 --output-on-failure --tests-regex "^($(subst $() $(),|,$(AARCH64_TESTS)))$$"

# dist/: a wheel for this Python and every torch from 2.10 on. Where nvcc is found it has CUDA code for all architectures of
# cuda/CMakeLists.txt (an hour on two cores), or for those of `make wheel PYINVOLUTION_CUDA_ARCHITECTURES="80;90"`. The second
# wheel is tagged for the oldest glibc that it runs with, torch's library and our own left out. The version of nvcc decides which
# drivers it runs with; for those of the oldest torch it is 12.8 (tool.cibuildwheel in pyproject.toml).
wheel: export PYINVOLUTION_CUDA_ARCHITECTURES =
wheel: $(VENV)/.installed
	rm -rf dist
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist \
		--config-settings build-dir=build/wheel .
	$(BIN)/python -m twine check --strict dist/*.whl
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude libtorch_cpu.so --exclude libpyinvolution.so \
		--wheel-dir dist/manylinux dist/*.whl
	@find dist -name '*.whl' -size +20M | grep . && { echo "a wheel is larger than 20 MB"; exit 1; } || ls -l dist dist/manylinux

# The wheel on the oldest and the newest torch: downloads both, about 3 GB each.
test-abi: wheel
	$(BIN)/python tests/abi.py --folder build/abi dist/*.whl

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.cpu

# Without a GPU it prints what bounds each shape.
bench-gpu: $(VENV)/.installed
	$(BIN)/python -m benchmarks.gpu

# The GPU tests under compute-sanitizer.
sanitize-gpu: $(VENV)/.installed
	PYTHON=$(BIN)/python benchmarks/sanitize.sh

# The documentation site, build/docs/index.html. DOCS_REPOSITORY=https://github.com/OWNER/NAME adds links to the source files.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -E -W --keep-going --quiet -c docs . build/docs
	@echo build/docs/index.html

clean:
	rm -rf build $(VENV)

$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "pyinvolution needs Python 3.10 or newer, set PYTHON")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch torchvision
	touch $@

# Without isolation the build uses the torch of the environment; this target rebuilds what changed, so imports need not.
define install
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation \
		--config-settings build-dir=$(BUILD) --config-settings editable.rebuild=false --editable ".[$(1)]"
	touch $@
endef

$(VENV)/.installed: $(VENV)/.created $(SOURCES)
	$(BIN)/python -m pip install --quiet "scikit-build-core>=0.11" "pybind11>=2.13" "cmake>=3.26" ninja
	$(call install,dev)

$(VENV)/.docs: $(VENV)/.installed
	$(call install,dev$(COMMA)docs)
