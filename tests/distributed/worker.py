"""Runs recipes one after the other in the ranks that torchrun started: `worker.py RECIPE[:stop_at] ...`."""

from __future__ import annotations

import sys

import torch

from mm_moslora.config import load_recipe
from mm_moslora.training.loop import train


def main() -> None:
    torch.set_num_threads(1)
    for argument in sys.argv[1:]:
        path, _, stop_at = argument.partition("@")
        train(load_recipe(path), stop_at=int(stop_at) if stop_at else None)


if __name__ == "__main__":
    main()
