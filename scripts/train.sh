#!/usr/bin/env bash
# Trains a recipe with torchrun, on all GPUs of this machine (or its CPU), or on several hosts.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
Usage: scripts/train.sh [OPTIONS] RECIPE [OVERRIDES...]

Trains RECIPE (a YAML file or the name of a preset) with one process per GPU, or one process on the CPU.
Everything after RECIPE is passed on to `mm-moslora train`.

  scripts/train.sh llava15_7b_moslora --optim.lr 1e-4 --train.output runs/first
  NPROC=2 scripts/train.sh my.yaml --train.zero zero2

On several hosts, run the same command on each. All of them need the rendezvous HOST:PORT, an address of one of them,
and the same run folder:

  scripts/train.sh --nnodes 2 --rdzv node-1:29400 llava15_7b_moslora --train.zero zero3

Options
  --nnodes N         number of hosts (default 1)
  --rdzv HOST:PORT   rendezvous of the hosts
  --rdzv-id WORD     distinguishes runs with the same rendezvous (default mm-moslora)
  --local-addr ADDR  this host's address, where its name resolves to another one
  --max-restarts N   after a rank dies or hangs, restart all from the newest checkpoint, at most N times (default 0)
  --dry-run          print the resolved recipe and the command, and start nothing
  --help             this text

Environment
  NPROC       processes on this machine (default: number of GPUs, else 1)
  PYTHON      Python to use (default: .venv/bin/python of the checkout, or that of the environment that
              mm-moslora is installed in, else python3)
  GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME   network interface between hosts, where the default is the wrong one
  TORCH_ELASTIC_SHUTDOWN_TIMEOUT   seconds for saving after SIGTERM (default 300)

Exit codes: 0 finished, 75 stopped on request (run the same command again), anything else failed.
TEXT
}

dry_run=false
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry_run=true; shift ;;
    --nnodes | --rdzv | --rdzv-id | --local-addr | --max-restarts) elastic_option "$@"; shift 2 ;;
    -*) fail "unknown option $1 before RECIPE; see --help" ;;
    *) break ;;
  esac
done
[ $# -gt 0 ] || fail "RECIPE is missing; see --help"

find_python
run_environment
show_recipe "$@"
elastic_arguments
command=(
  "$PYTHON" -m torch.distributed.run "${ELASTIC[@]}" --nproc_per_node "$(process_count)" -m mm_moslora train "$@"
)
printf '# %q' "${command[0]}" >&2
printf ' %q' "${command[@]:1}" >&2
echo >&2
if $dry_run; then exit 0; fi
run_and_report "${command[@]}"
