#!/usr/bin/env bash
# Checks and measures the library on this machine's GPU, in parts that can be run one at a time:
#
#   benchmarks/gpu_session.sh [--list] [--resume] [--dry-run] OUT [PART...]
#
#   part      minutes  what
#   build     9        the library for this GPU's architecture
#   doctor    3        pyinvolution doctor: every kernel against the equation, and times
#   tests     9        the GPU tests
#   sanitize  9        some of them under compute-sanitizer (benchmarks/sanitize.sh)
#   ops       9        python -m benchmarks.gpu --only ops
#   models    9        python -m benchmarks.gpu --only models
#
# Without a PART all of them, in this order; one that fails does not stop the next. Each is stopped at its limit
# (BUILD_MINUTES and so on change it) and leaves in OUT what it wrote in the folder PART, PART.log, and PART.status: its
# exit status, duration, date, GPU and commit. What other parts left stays. --resume leaves out parts that succeeded in OUT
# before. --dry-run tries the parts where there is no GPU, with the library that is installed and small problems on the
# CPU; its figures mean nothing. --list prints the parts.
#
# Nothing is downloaded where PYTHON, or python3, has torch and the tools that build the library (CONTRIBUTING.md): the
# library goes into build/gpu_session/site, not into that environment. Else `make` sets .venv up first.
set -uo pipefail
cd "$(dirname "$0")/.."
all=(build doctor tests sanitize ops models)
fail() { echo "gpu_session: $*" >&2; exit 2; }

out='' parts=() resume=false dry=false
for word in "$@"; do
  case $word in
    --list) printf '%s\n' "${all[@]}" && exit ;;
    --resume) resume=true ;;
    --dry-run) dry=true ;;
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" && exit ;;
    -*) fail "unknown option \"$word\", expected --list, --resume or --dry-run" ;;
    *)
      if [ -z "$out" ]; then
        out=$word
      else
        [[ " ${all[*]} " = *" $word "* ]] || fail "unknown part \"$word\", expected one of ${all[*]}"
        parts+=("$word")
      fi
      ;;
  esac
done
[ -n "$out" ] || fail "there is no directory for the results, expected gpu_session.sh OUT [PART...]"
[[ " ${all[*]} " != *" $out "* ]] || fail "OUT is \"$out\", expected a directory before the parts (./$out is one)"
[ ${#parts[@]} -gt 0 ] || parts=("${all[@]}")

gpu="none, a dry run"
if ! $dry; then
  gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -1) && [ -n "$gpu" ] ||
    fail "there is no NVIDIA GPU here (nvidia-smi finds none); nothing was done (--dry-run tries the parts without one)"
fi
export PATH="$PATH:/usr/local/cuda/bin"
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$PWD/build/gpu_session
mkdir -p "$work"
if ! $dry; then
  PYINVOLUTION_CUDA_ARCHITECTURES=${PYINVOLUTION_CUDA_ARCHITECTURES:-$(nvidia-smi --query-gpu=compute_cap \
    --format=csv,noheader | tr -d . | sort -u | paste -sd ';')}
  export PYINVOLUTION_CUDA_ARCHITECTURES PYINVOLUTION_CUDA=ON
fi
export PYTHONUNBUFFERED=1

has() { command -v "$1" >/dev/null && "$1" -c "import torch, pybind11, scikit_build_core, pytest, hypothesis" 2>/dev/null; }
own=false
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
if $dry; then
  has "$PYTHON" || fail "PYTHON is \"$PYTHON\", expected for a dry run an interpreter with torch, pytest and the library"
elif [ "$PYTHON" != .venv/bin/python ] && has "$PYTHON"; then
  own=true
  export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
else
  PYTHON=.venv/bin/python
fi
export PYTHON

# --- the parts: $1 is the directory for what they write, $2 their limit in minutes -------------------------------------

build() {
  if $dry; then
    "$PYTHON" -c 'import pyinvolution; print(pyinvolution.build_info())'
    return
  fi
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

doctor() {
  "$PYTHON" -m pyinvolution doctor --json "$1/doctor.json" $($dry && echo --quick --device cpu)
}

tests() {
  if $dry; then
    "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_kernels.py -k table_has
    return
  fi
  "$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else f"torch {torch.__version__} finds no GPU")' ||
    return
  "$PYTHON" -m pytest -q --durations 10 tests/test_cuda.py tests/test_kernels.py -k cuda
}

sanitize() {
  if $dry; then
    bash -n benchmarks/sanitize.sh && echo "a dry run has no GPU code to sanitize"
    return
  fi
  # Each tool spends up to a minute before the first test.
  OUT=$1 MINUTES=${SANITIZE_TOOL_MINUTES:-2.2} benchmarks/sanitize.sh
}

measure() {
  "$PYTHON" -m benchmarks.gpu --only "$1" --output "$2" --minutes "$(awk "BEGIN { print 0.85 * $3 }")" \
    $($dry && echo --device cpu --quick)
}

ops() { measure ops "$@"; }

models() { measure models "$@"; }

# --- each in a process group of its own, which its limit ends ---------------------------------------------------------

run() {
  local part=$1 minutes=$2 log=$out/$1.log status started=$SECONDS
  mkdir -p "$out/$part"
  rm -f "$out/$part.status"
  export -f "$part" measure
  timeout --signal=INT --kill-after=20 "${minutes}m" bash -c "$part '$out/$part' $minutes" 2>&1 | tee "$log"
  status=${PIPESTATUS[0]}
  {
    echo "exit status $status after $((SECONDS - started)) s$([ "$status" = 124 ] && echo ", stopped after $minutes minutes")"
    echo "date $(date -u +%FT%TZ)"
    echo "GPU $gpu"
    echo "commit $(git describe --always --dirty 2>/dev/null || echo unknown)"
  } >"$out/$part.status"
  return "$status"
}

export work own dry
summary=() worst=0
for part in "${parts[@]}"; do
  if $resume && grep -qs "^exit status 0 " "$out/$part.status"; then
    summary+=("$part: done before") && continue
  fi
  if [ "$part" != build ] && ! "$PYTHON" -c 'import pyinvolution' 2>/dev/null; then
    summary+=("$part: left out, the library is not built") && worst=1 && continue
  fi
  limit=${part^^}_MINUTES
  case $part in doctor) minutes=3 ;; *) minutes=9 ;; esac
  run "$part" "${!limit:-$minutes}" || worst=1
  summary+=("$part: $(head -1 "$out/$part.status")")
done
printf '\n'
printf '%s\n' "${summary[@]}" "in $out"
exit $worst
