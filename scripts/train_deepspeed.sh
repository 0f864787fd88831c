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
scripts/train.sh, which stops more gracefully. This is `mm-moslora launch --deepspeed`, with the Python of this checkout;
`mm-moslora launch --help` has all options.

  scripts/train_deepspeed.sh llava15_7b_moslora --train.zero zero3
  scripts/train_deepspeed.sh --hostfile hosts llava15_7b_moslora

Options
  --hostfile FILE   machines to use. Variables such as HF_*, NCCL_*, GLOO_*, OMP_*, WANDB_* and MM_MOSLORA_* are passed
                    on to them, except keys and tokens, and so are the lines of .deepspeed_env files
  --log-dir FOLDER  also write the output of every rank to rank-00000.log and so on
  --dry-run         check and print the recipe and the command, and start nothing
  --help            this text

Environment
  NPROC         processes on this machine (default: number of GPUs, else 1); not used with --hostfile
  PYTHON        Python to use (default: .venv/bin/python of the checkout, or that of the environment that
              mm-moslora is installed in, else python3)
  MASTER_PORT   port of rank 0 (default: a free one)

Exit codes: 0 finished, 75 stopped on request (run the same command again), anything else failed.
TEXT
}

case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  "") fail "RECIPE is missing; see --help" ;;
esac
launch --deepspeed "$@"
