# Shared by the launchers in this folder; sourced, never run.
# shellcheck shell=bash

# Environment of every run. Variables that are already set are kept.
run_environment() {
  [ -z "${NPROC:-}" ] || needs_number NPROC 1 "$NPROC"
  export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
  export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
  export PYTHONUNBUFFERED=1
  # Each restart gets a new store: torchrun shares one between restarts, in which ranks would find the addresses of dead
  # ranks.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
  # Seconds for ranks to save after SIGTERM before they are killed.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
}

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

# Processes on this machine: $NPROC, else the number of GPUs, else 1.
process_count() {
  if [ -n "${NPROC:-}" ]; then
    echo "$NPROC"
  else
    "$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))'
  fi
}

# Parses an option for several hosts or restarts, which consists of two words.
NNODES=1 RDZV="" RDZV_ID=mm-moslora LOCAL_ADDR="" MAX_RESTARTS=0
elastic_option() {
  [ -n "${2:-}" ] || fail "$1 has no value; see --help"
  case "$1" in
    --nnodes) NNODES=$2; needs_number --nnodes 1 "$NNODES" ;;
    --rdzv) RDZV=$2 ;;
    --rdzv-id) RDZV_ID=$2 ;;
    --local-addr) LOCAL_ADDR=$2 ;;
    --max-restarts) MAX_RESTARTS=$2; needs_number --max-restarts 0 "$MAX_RESTARTS" ;;
  esac
}

# Sets the array ELASTIC to torchrun's own arguments.
elastic_arguments() {
  # --standalone picks a free port, so that several runs fit on one machine.
  ELASTIC=(--standalone)
  if [ "$NNODES" != 1 ]; then
    [ -n "$RDZV" ] || fail "--nnodes $NNODES needs --rdzv HOST:PORT, the same on every host"
    [[ "$RDZV" =~ ^.+:[0-9]{1,5}$ ]] || fail "--rdzv is '$RDZV', expected HOST:PORT such as node-1:29400"
    ELASTIC=(--nnodes "$NNODES" --rdzv_backend c10d --rdzv_endpoint "$RDZV" --rdzv_id "$RDZV_ID")
  fi
  if [ -n "$LOCAL_ADDR" ]; then
    ELASTIC+=(--local_addr "$LOCAL_ADDR")
  fi
  if [ "$MAX_RESTARTS" != 0 ]; then
    ELASTIC+=(--max_restarts "$MAX_RESTARTS")
  fi
}

# Prints the resolved recipe of "$@" on stderr and sets RUN_FOLDER to its run folder.
show_recipe() {
  local resolved recipe=()
  while [ $# -gt 0 ]; do
    case "$1" in
      --resume | --stop-at) shift 2 || fail "$1 has no value" ;; # of `train`, not of the recipe
      --resume=* | --stop-at=*) shift ;;
      *) recipe+=("$1"); shift ;;
    esac
  done
  resolved=$("$PYTHON" -m mm_moslora config "${recipe[@]}") || exit $?
  printf '%s\n' "# resolved recipe" "$resolved" >&2
  RUN_FOLDER=$("$PYTHON" -c 'import sys, yaml; print(yaml.safe_load(sys.stdin)["train"]["output"])' <<<"$resolved")
}

# Number of signals and of requests to stop, time of the last request, process that gets the signal, and whether it did.
SIGNALS=0 REQUESTS=0 SINCE=0 CHILD="" TOLD=""
trap heard TERM USR1 HUP
trap 'heard INT' INT

# Counts requests as mm_moslora.launch.launcher.RequestCounter does: the first signal, and each Ctrl-C some seconds
# later. The first is forwarded once, since torchrun abandons its ranks on a second signal. The third kills all.
heard() {
  SIGNALS=$((SIGNALS + 1))
  if [ "$REQUESTS" != 0 ] && ! { [ "${1:-}" = INT ] && [ $((SECONDS - SINCE)) -gt 3 ]; }; then
    return
  fi
  REQUESTS=$((REQUESTS + 1)) SINCE=$SECONDS
  if [ -z "$CHILD" ]; then
    return
  elif [ "$REQUESTS" = 1 ]; then
    tell_once
  elif [ "$REQUESTS" -ge 3 ]; then
    kill_tree "$CHILD"
  else
    echo "The run saves before it ends. Ctrl-C again, more than 3 s later, ends it unsaved." >&2
  fi
}

tell_once() {
  [ -n "$TOLD" ] || { TOLD=yes; hand_on; }
}

hand_on() {
  kill -TERM "$CHILD" 2>/dev/null || true
}

# Kills a process with all its descendants: kill_tree PROCESS.
kill_tree() {
  local child children
  children=$(cat /proc/"$1"/task/*/children 2>/dev/null) || true
  kill -KILL "$1" 2>/dev/null || true
  for child in $children; do
    kill_tree "$child"
  done
}

# Runs "$@", forwards signals to it, and returns 75 (try again later) after a requested stop.
run_and_report() {
  local heard status
  # Delete only a run's own mark: a run folder holds run.lock.
  [ ! -e "$RUN_FOLDER/run.lock" ] || rm -f "$RUN_FOLDER/STOPPED"
  if [ "$SIGNALS" != 0 ]; then
    echo "Stopped on request before anything was started." >&2
    return 75
  fi
  # In its own process group: Ctrl-C reaches whole groups, and a launcher abandons its ranks on a second signal.
  set -m
  "$@" </dev/null &
  CHILD=$!
  set +m
  [ "$SIGNALS" = 0 ] || tell_once
  # wait returns early on a trapped signal; the next wait returns the exit code, even if the child has ended already.
  heard=""
  while [ "$heard" != "$SIGNALS" ]; do
    heard=$SIGNALS status=0
    wait "$CHILD" || status=$?
  done
  trap - TERM INT USR1 HUP
  if [ -e "$RUN_FOLDER/run.lock" ] && [ -e "$RUN_FOLDER/STOPPED" ]; then
    echo "Stopped on request; nothing is unsaved. The same command continues the run." >&2
    return 75
  elif [ "$SIGNALS" != 0 ] && ! { [ "$status" = 0 ] && grep -qs '"state": "finished"' "$RUN_FOLDER/state.json"; }; then
    # The code alone is not enough: DeepSpeed's runner reports success for a launcher that a signal ended.
    echo "Stopped on request without saving. The same command resumes from the newest checkpoint, if any." >&2
    return 75
  fi
  return "$status"
}

fail() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# Refuses a number that torchrun would answer with a traceback: needs_number NAME LEAST VALUE.
needs_number() {
  [[ "$3" =~ ^[0-9]+$ ]] && [ "$3" -ge "$2" ] || fail "$1 is '$3', expected a number from $2 on"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  echo "Shared functions of train.sh, train_deepspeed.sh and train_slurm.sbatch. Run one of them with --help."
fi
