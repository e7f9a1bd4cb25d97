#!/usr/bin/env bash
# Checks and measures the library on this machine's GPU, within 25 minutes:
#
#   benchmarks/gpu_session.sh [--resume] [--output DIRECTORY] [PART...]
#
#   part      minutes  what                                                            written
#   build     6        the library for this GPU's architecture                         build.log
#   tests     6        the GPU tests                                                   tests.log
#   sanitize  5        some of them under compute-sanitizer (benchmarks/sanitize.sh)   DATE-sanitize-GPU.txt
#   bench     8        python -m benchmarks.gpu                                        tables, charts, JSON, CSV
#
# All parts by default, each with its own limit; one that fails does not stop the next. --resume leaves out what succeeded
# in the same directory before (a build goes on where it was anyway). The directory: --output, else $OUT, else
# build/gpu_session. BUILD_MINUTES, TESTS_MINUTES, SANITIZE_MINUTES, BENCH_MINUTES change the limits.
#
# Nothing is downloaded where PYTHON, or python3, has torch and the tools that build the library (CONTRIBUTING.md): the
# library goes into build/gpu_session/site, not into that environment. Else `make` sets .venv up first.
set -uo pipefail
cd "$(dirname "$0")/.."
parts=() resume=false out=${OUT:-build/gpu_session}
while [ $# -gt 0 ]; do
  case $1 in
    --resume) resume=true ;;
    --output) out=${2:?--output needs a directory} && shift ;;
    build | tests | sanitize | bench) parts+=("$1") ;;
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" && exit ;;
    *) echo "gpu_session: unknown part \"$1\", expected build, tests, sanitize or bench" >&2 && exit 2 ;;
  esac
  shift
done
[ ${#parts[@]} -gt 0 ] || parts=(build tests sanitize bench)

nvidia-smi --query-gpu=name --format=csv,noheader >/dev/null 2>&1 || {
  echo "gpu_session: there is no NVIDIA GPU here (nvidia-smi finds none); nothing was done" >&2
  exit 2
}
export PATH="$PATH:/usr/local/cuda/bin"
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$PWD/build/gpu_session
mkdir -p "$work"
PYINVOLUTION_CUDA_ARCHITECTURES=${PYINVOLUTION_CUDA_ARCHITECTURES:-$(nvidia-smi --query-gpu=compute_cap \
  --format=csv,noheader | tr -d . | sort -u | paste -sd ';')}
export PYINVOLUTION_CUDA_ARCHITECTURES PYINVOLUTION_CUDA=ON PYTHONUNBUFFERED=1

has() { command -v "$1" >/dev/null && "$1" -c "import torch, pybind11, scikit_build_core, pytest, hypothesis" 2>/dev/null; }
own=false
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
if [ "$PYTHON" != .venv/bin/python ] && has "$PYTHON"; then
  own=true
  export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
else
  PYTHON=.venv/bin/python
fi
export PYTHON

build() {
  nvidia-smi
  if $own; then
    "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index --upgrade --target "$work/site" \
      --config-settings build-dir="$work/objects" . || return
    "$PYTHON" - "$work/site" <<'PYTHON' || return
import sys, pyinvolution
if not pyinvolution.__file__.startswith(sys.argv[1]):
    sys.exit(f"{pyinvolution.__file__} comes before what was built: uninstall it there, or set PYTHON to another interpreter")
PYTHON
  else
    make .venv/.installed || return
  fi
  "$PYTHON" -c 'import pyinvolution; print(pyinvolution.build_info())'
}

tests() {
  "$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else f"torch {torch.__version__} finds no GPU")' ||
    return
  "$PYTHON" -m pytest -q --durations 10 tests/test_cuda.py tests/test_kernels.py tests/test_span.py -k cuda
}

sanitize() {
  # A minute each for what a tool spends before the first test.
  OUT=$out MINUTES=${SANITIZE_TOOL_MINUTES:-1.2} benchmarks/sanitize.sh
}

bench() {
  "$PYTHON" -m benchmarks.gpu --minutes "$(awk "BEGIN { print 0.85 * $1 }")" --output "$out"
}

# Runs a part in a process group of its own, which its limit ends.
run() {
  local part=$1 minutes=$2 log=$3 status
  export -f "$part"
  timeout --signal=INT --kill-after=20 "${minutes}m" bash -c "$part $minutes" 2>&1 | tee "$log"
  status=${PIPESTATUS[0]}
  echo "== $part: exit status $status$([ "$status" = 124 ] && echo ", stopped after $minutes minutes")" | tee -a "$log"
  return "$status"
}

export work out own
summary=() worst=0
for part in "${parts[@]}"; do
  log=$work/$part.log
  case $part in build | tests) log=$out/$part.log ;; esac
  if $resume && grep -qs "^== $part: exit status 0" "$log"; then
    summary+=("$part: done before") && continue
  fi
  if [ "$part" != build ] && ! "$PYTHON" -c 'import pyinvolution' 2>/dev/null; then
    summary+=("$part: left out, the library is not built") && worst=1 && continue
  fi
  limit=${part^^}_MINUTES
  case $part in build | tests) minutes=6 ;; sanitize) minutes=5 ;; bench) minutes=8 ;; esac
  started=$SECONDS
  run "$part" "${!limit:-$minutes}" "$log"
  status=$?
  summary+=("$part: exit status $status after $((SECONDS - started)) s")
  [ $status = 0 ] || worst=1
done
printf '\n'
printf '%s\n' "${summary[@]}" "in $out"
exit $worst
