# Shared by the launchers in this folder; sourced, never run.
# shellcheck shell=bash

# The Python to use: $PYTHON, else the checkout's own environment or the one that this folder is installed in, else the
# one on the PATH.
find_python() {
  local root
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  if [ -n "${PYTHON:-}" ]; then
    return
  elif [ -x "$root/.venv/bin/python" ]; then
    PYTHON="$root/.venv/bin/python"
  elif [[ "$root" = */site-packages/mm_moslora ]] && [ -x "${root%/lib*/python*/site-packages/*}/bin/python" ]; then
    PYTHON="${root%/lib*/python*/site-packages/*}/bin/python"
  elif PYTHON=$(command -v python3); then
    :
  else
    fail "no Python found; install Python 3.11 or later, or set PYTHON"
  fi
}

# Starts `mm-moslora launch` with "$@" in place of this script.
launch() {
  [ $# -gt 0 ] || fail "RECIPE is missing; see --help"
  find_python
  exec "$PYTHON" -P -m mm_moslora launch "$@"
}

fail() {
  echo "${0##*/}: $*" >&2
  exit 2
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  echo "Shared functions of train.sh and train_deepspeed.sh. Run one of them with --help."
fi
