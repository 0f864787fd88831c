#!/usr/bin/env bash
# Everything that wants a GPU, in one command that continues where it stopped: the tests of tests/gpu, then the benchmark.
set -uo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
Usage: scripts/gpu.sh

Installs the wheels of build/gpu_wheels (scripts/gpu_wheels.py) into a folder of their own. Then it runs the tests of the
kernels, the rows of scripts/bench/gpu.py that the targets compare, all of tests/gpu, and the other rows, until the time is
over. Tests that have ended on the same sources, and rows that are there, are not repeated: run the same command again until
it exits with 0. Nothing is fetched from a network. Where the machine lacks something (scripts/gpu_preflight.py), a list is
all that comes of it.

On a machine that starts bare each time, bring build/gpu_wheels and, from the second call on, build/gpu with the results
of the earlier calls.

Environment
  OUT       folder of results (default build/gpu): rows.jsonl, table.md, tests.log
  LIMIT     seconds of one call (default 570); a test that is cut off twice counts as failed
  SHAPES    shapes of the benchmark, in order (default "llava-1.5-7b 1b 3b")
  DEVICE    cuda (default), or cpu for a try with SHAPES=tiny
  WHEELS    folder of wheels (default build/gpu_wheels)
  PYTHON    Python to use (default: .venv/bin/python of the checkout, else python3)
  PIP       pip to use (default: that of PYTHON)

Exit codes: 0 finished, 75 tests or rows are left (run the same command again), 1 tests failed or nothing can run, 2 usage.
TEXT
}

# Install the wheels for this process alone.
install_wheels() {
  if ! compgen -G "$wheels/*.whl" >/dev/null; then
    say "No wheels in $wheels: the run takes what is installed."
    return
  fi
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  # shellcheck disable=SC2086  # PIP may be several words
  $PIP install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir --target "$site" \
    "$wheels"/*.whl || fail "the wheels of $wheels cannot be installed"
  export PYTHONPATH="$site:$PYTHONPATH"
  # Now also what was in the wheels can be asked: without a GPU every test would be skipped, and count as ended.
  "$PYTHON" scripts/gpu_preflight.py --device "$device" --wheels "$site" || exit 1
}

# Run tests of tests/gpu that have not ended on these sources: SECONDS, then pytest's arguments. The tests record
# themselves one by one (tests/gpu/conftest.py). Returns 75 where the time was over, 1 where pytest could not run them.
run_tests() {
  local seconds=$1 code
  shift
  [ "$seconds" -ge 30 ] || return 75
  timeout --signal INT --kill-after 10 "$seconds" "$PYTHON" -m pytest -q -n0 -p no:cacheprovider "$@" 2>&1 |
    tee -a "$out/tests.log"
  code=${PIPESTATUS[0]}
  case "$code" in
    0 | 1 | 5) return 0 ;;  # 5: all have ended before
    2 | 124 | 137) return 75 ;;
  esac
  say "The tests did not run (exit code $code of pytest); the next call tries them again."
  return 1
}

# Measure contenders of a shape as far as the time goes: SHAPE, then options of the benchmark. Returns 75 where rows are left.
run_benchmark() {
  local shape=$1 code=0
  shift
  "$PYTHON" scripts/bench/gpu.py --out "$out/rows.jsonl" --shape "$shape" --device "$device" \
    --budget "$((limit - SECONDS))" "$@" || code=$?
  if [ -f "$out/rows.jsonl" ]; then
    "$PYTHON" scripts/bench/gpu.py --table "$out/rows.jsonl" >"$out/table.md"
  fi
  return "$code"
}

say() {
  echo "$*" >&2
}

if [ $# -gt 0 ]; then
  usage
  [ "$1" = --help ] && exit 0
  exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
find_python
own_pip=${PIP:-} PIP=${PIP:-$PYTHON -m pip}
wheels=${WHEELS:-build/gpu_wheels} out=${OUT:-build/gpu} shapes=${SHAPES:-llava-1.5-7b 1b 3b} device=${DEVICE:-cuda}
claims="ours hf-best hf ours-zero2 ours-torch ours-lora ours-dropout"
limit=${LIMIT:-570}
if ! [[ "$limit" =~ ^[0-9]+$ ]] || [ "$limit" -lt 60 ]; then
  fail "LIMIT is '$limit', expected a number from 60 on"
fi
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$PWD/eval${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" scripts/gpu_preflight.py --device "$device" --wheels "$wheels" --pip "$own_pip" || exit 1
mkdir -p "$out"
for name in rows.jsonl tests.ended; do  # of earlier calls, whose folder of results was another one
  if [ ! -f "$out/$name" ] && [ -f "build/gpu/$name" ]; then
    cp "build/gpu/$name" "$out/$name"
  fi
done
install_wheels
sources=$(find mm_moslora tests/gpu -name '*.py' -print0 | sort -z | xargs -0 cat | sha256sum | cut -c 1-12)
export GPU_TESTS_ENDED="$out/tests.ended" GPU_TESTS_SOURCES="$sources"
# A wrong kernel makes the rest worthless. Then come the rows that the targets compare, all tests, and the other rows.
run_tests 90 tests/gpu -k "segments_agree or lean_layers"
kernels=$?
# shellcheck disable=SC2086  # several words
run_benchmark "${shapes%% *}" --only $claims || exit
run_tests "$((limit - SECONDS - 15))" tests/gpu
tests=$?
for shape in $shapes; do
  [ "$tests" -ne 75 ] || exit 75
  run_benchmark "$shape" || exit
done
if grep -q "^$sources \(failed\|cut\) " "$GPU_TESTS_ENDED" 2>/dev/null; then
  say "Tests of tests/gpu failed, see $out/tests.log."
  exit 1
fi
[ "$kernels" -ne 1 ] || exit 1
exit "$tests"
