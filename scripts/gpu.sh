#!/usr/bin/env bash
# Everything that wants a GPU, in one command that continues where it stopped: the tests of tests/gpu, then the benchmark.
set -uo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
Usage: scripts/gpu.sh

Installs the wheels of build/gpu_wheels (scripts/gpu_wheels.py) into a folder of their own, runs tests/gpu on the GPU, and
then scripts/bench/gpu.py until the time is over. Files of tests that have ended on the same sources, and rows that are
there, are not repeated: run the same command again until it exits with 0. Nothing is fetched from a network. Where the
machine lacks something (scripts/gpu_preflight.py), a list is all that comes of it.

On a machine that starts bare each time, bring build/gpu_wheels and, from the second call on, build/gpu with the results
of the earlier calls.

Environment
  OUT       folder of results (default build/gpu): rows.jsonl, table.md, tests.log
  LIMIT     seconds of one call (default 570); a file of tests that takes longer is stopped, with exit code 124
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

# Run the files of tests/gpu that have not ended on these sources. Returns 1 where tests failed, 75 where files are left.
# Only tests that ran are recorded: pytest's other exit codes speak of the machine, such as errors in the collection.
run_tests() {
  local sources file code began failed=0
  if ! compgen -G "tests/gpu/test_*.py" >/dev/null; then
    say "There are no tests in tests/gpu."
    return 0
  fi
  sources=$(find mm_moslora tests/gpu -name '*.py' -print0 | sort -z | xargs -0 cat | sha256sum | cut -c 1-12)
  touch "$out/tests.ended"
  for file in tests/gpu/test_*.py; do
    code=$(sed -n "s|^$sources $file ||p" "$out/tests.ended")
    if [ -n "$code" ]; then
      say "$file has ended on these sources with exit code $code; delete $out/tests.ended to run it again."
    else
      began=$SECONDS
      [ $((limit - began)) -ge 60 ] || return 75
      timeout --signal INT --kill-after 10 "$((limit - began - 15))" "$PYTHON" -m pytest -q -n0 -p no:cacheprovider \
        "$file" 2>&1 | tee -a "$out/tests.log"
      code=${PIPESTATUS[0]}
      if [ "$code" -ge 124 ] && [ "$began" -gt 60 ]; then  # stopped, and it had less than a whole call
        return 75
      fi
      case "$code" in
        0 | 1 | 124 | 137) echo "$sources $file $code" >>"$out/tests.ended" ;;
        *) say "The tests of $file did not run (exit code $code of pytest); the next call tries them again." ;;
      esac
    fi
    [ "$code" -eq 0 ] || failed=1
  done
  return "$failed"
}

# Measure every shape as far as the time goes. Returns 75 where rows are left.
run_benchmark() {
  local shape code=0 left
  for shape in $shapes; do
    left=$((limit - SECONDS))
    "$PYTHON" scripts/bench/gpu.py --out "$out/rows.jsonl" --shape "$shape" --device "$device" --budget "$left" || code=$?
    [ "$code" -eq 0 ] || break
  done
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
run_tests
tests=$?
[ "$tests" -ne 75 ] || exit 75
run_benchmark
rows=$?
[ "$rows" -eq 0 ] || exit "$rows"
if [ "$tests" -ne 0 ]; then
  say "Tests of tests/gpu failed, see $out/tests.log."
fi
exit "$tests"
