#!/usr/bin/env bash
# The CUDA tests under compute-sanitizer: out-of-bounds and misaligned accesses (memcheck), races in shared memory
# (racecheck), reads of memory that nobody wrote (initcheck), wrong barriers (synccheck).
#
#   benchmarks/sanitize.sh [TOOL...]      all four by default
#
# Writes DATE-sanitize-GPU.txt with the GPU, the driver, torch, the commit and what each tool said. Exits with 0 where all
# tests passed and no tool found anything. Environment:
#   PYTHON     an interpreter that has the library (.venv/bin/python)
#   OUT        a directory for the file (benchmarks/results)
#   TESTS      pytest's -k: which tests of tests/test_cuda.py
#   MINUTES    for each tool (4)
#   SANITIZER  compute-sanitizer, where it is neither on PATH nor in /usr/local/cuda/bin
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-benchmarks/results}
MINUTES=${MINUTES:-4}
TESTS=${TESTS:-"(test_taken and (mma or tiled) and (bfloat16 or float32-16)) or (test_taken and float64-3) or test_unaligned or test_fused_forward"}
SANITIZER=${SANITIZER:-$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)}
FOUND=86

fail() { echo "sanitize: $*" >&2; exit 2; }

tools=("$@")
[ $# -gt 0 ] || tools=(memcheck racecheck initcheck synccheck)
for tool in "${tools[@]}"; do
  case $tool in memcheck | racecheck | initcheck | synccheck) ;;
    *) fail "unknown tool \"$tool\", expected memcheck, racecheck, initcheck or synccheck" ;;
  esac
done
command -v "$PYTHON" >/dev/null || fail "there is no $PYTHON; run make test, or set PYTHON"
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
  fail "there is no GPU here that the torch of $PYTHON can use; nothing was checked"
"$PYTHON" -c 'import pyinvolution, sys; sys.exit(pyinvolution.build_info()["cuda"].startswith("none"))' ||
  fail "the library of $PYTHON has no CUDA kernels; build it where nvcc is found"
[ -x "$SANITIZER" ] || fail "there is no compute-sanitizer (a part of the CUDA toolkit) on PATH or in /usr/local/cuda/bin; set SANITIZER"

gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name())')
mkdir -p "$OUT"
file=$OUT/$(date +%F)-sanitize-$(tr 'A-Z /()' 'a-z----' <<<"$gpu" | tr -s -).txt
{
  echo "date:     $(date -u +%FT%TZ)"
  echo "GPU:      $gpu"
  echo "driver:   $(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -1)"
  echo "torch:    $("$PYTHON" -c 'import torch; print(torch.__version__, "CUDA", torch.version.cuda)')"
  echo "library:  $("$PYTHON" -c 'import pyinvolution; print(pyinvolution.build_info()["cuda"])')"
  echo "commit:   $(git describe --always --dirty 2>/dev/null || echo unknown)"
  echo "tool:     $("$SANITIZER" --version | tail -1)"
  echo "tests:    tests/test_cuda.py -k \"$TESTS\""
} | tee "$file"

# Only this library's kernels, where the tool can choose: torch's need not be instrumented.
ours=(--kernel-regex kns=pyinvolution)
"$SANITIZER" "${ours[@]}" "$PYTHON" -c '' >/dev/null 2>&1 || ours=()

worst=0
for tool in "${tools[@]}"; do
  options=(--tool "$tool" --error-exitcode $FOUND --print-limit 20 "${ours[@]}")
  # Without its cache torch asks CUDA for each tensor, so that the tools know where tensors end.
  variables=(PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS="$(nproc)")
  if [ "$tool" = initcheck ]; then
    # It must see all that is written, and no memory that tests fill beforehand.
    options=(--tool initcheck --error-exitcode $FOUND --print-limit 20)
    variables+=(PYINVOLUTION_TEST_FILL=0)
  fi
  printf '\n== %s\n' "$tool" | tee -a "$file"
  log=$(mktemp)
  env "${variables[@]}" timeout --signal=INT --kill-after=30 "${MINUTES}m" "$SANITIZER" "${options[@]}" \
    "$PYTHON" -m pytest -q -x -p no:cacheprovider tests/test_cuda.py -k "$TESTS" >"$log" 2>&1
  status=$?
  # Findings, and of pytest the end.
  { grep '^=========' "$log" | head -200; grep -v '^=========' "$log" | tail -8; } | tee -a "$file"
  if grep -q 'Device not supported' "$log"; then
    verdict="compute-sanitizer does not support this device or driver; nothing was checked"
  else
    case $status in
      0) verdict="nothing found" ;;
      $FOUND) verdict="FOUND ERRORS" ;;
      124 | 137) verdict="stopped after $MINUTES minutes, what ran until then is above" ;;
      *) verdict="tests failed, exit status $status" ;;
    esac
  fi
  echo "$tool: $verdict" | tee -a "$file"
  [ "$verdict" = "nothing found" ] || worst=1
  rm -f "$log"
done
echo "written to $file"
exit $worst
