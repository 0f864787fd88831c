#!/usr/bin/env bash
# Trains a recipe with DeepSpeed's launcher, on one machine or on the machines of a host file.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
Usage: scripts/train_deepspeed.sh [--dry-run] [--hostfile FILE] RECIPE [OVERRIDES...]

Trains RECIPE with the `deepspeed` launcher: one process per GPU of this machine, or of the machines in FILE
(lines such as `worker-1 slots=8`; passwordless ssh and the same paths everywhere). On one machine, prefer
scripts/train.sh, which stops more gracefully. Everything after RECIPE is passed on to `mm-moslora train`.

  scripts/train_deepspeed.sh llava15_7b_moslora --train.zero zero3
  scripts/train_deepspeed.sh --hostfile hosts llava15_7b_moslora

Options
  --hostfile FILE   machines to use
  --dry-run         print the resolved recipe and the command, and start nothing
  --help            this text

Environment
  NPROC         processes on this machine (default: number of GPUs, else 1); not used with --hostfile
  PYTHON        Python to use (default: .venv/bin/python of the checkout, or that of the environment that
              mm-moslora is installed in, else python3)
  MASTER_PORT   port of rank 0 (default: a free one)

Exit codes: 0 finished, 75 stopped on request (run the same command again), anything else failed.
TEXT
}

dry_run=false hostfile=""
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry_run=true; shift ;;
    --hostfile) [ $# -gt 1 ] || fail "--hostfile needs a file"; hostfile=$2; shift 2 ;;
    -*) fail "unknown option $1 before RECIPE; see --help" ;;
    *) break ;;
  esac
done
[ $# -gt 0 ] || fail "RECIPE is missing; see --help"
[ -z "$hostfile" ] || [ -f "$hostfile" ] || fail "no host file $hostfile"

find_python
run_environment
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
show_recipe "$@"
# Below the ephemeral ports of Linux, so that the port stays free until rank 0 listens there.
port=${MASTER_PORT:-$("$PYTHON" -c 'import random, socket
ports = iter(lambda: random.randrange(15000, 32768), None)
print(next(port for port in ports if socket.socket().connect_ex(("127.0.0.1", port))))')}
command=("$PYTHON" -m deepspeed.launcher.runner --master_port "$port" --no_local_rank)
if [ -n "$hostfile" ]; then
  command+=(--hostfile "$hostfile")
else
  command+=(--num_gpus "$(process_count)")
fi
command+=(--module mm_moslora train "$@")
printf '# %q' "${command[0]}" >&2
printf ' %q' "${command[@]:1}" >&2
echo >&2
if $dry_run; then exit 0; fi
hand_on() {
  "$PYTHON" -c 'import sys; from mm_moslora.launch.launcher import end_deepspeed; end_deepspeed(int(sys.argv[1]))' "$CHILD" \
    2>/dev/null || true
}
run_and_report "${command[@]}"
