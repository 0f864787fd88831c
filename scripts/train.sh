#!/usr/bin/env bash
# Trains a recipe with torchrun, on all GPUs of this machine (or its CPU), or on several hosts.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
Usage: scripts/train.sh [OPTIONS] RECIPE [OVERRIDES...]

Trains RECIPE (a YAML file or the name of a preset) with one process per GPU, or one process on the CPU. This is
`mm-moslora launch`, with the Python of this checkout; `mm-moslora launch --help` has all options.

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
  --log-dir FOLDER   also write the output of every rank to rank-00000.log and so on
  --dry-run          check and print the recipe and the command, and start nothing
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

case "${1:-}" in -h | --help) usage; exit 0 ;; esac
launch "$@"
