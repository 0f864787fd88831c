#!/usr/bin/env python
"""Speed-up of a training step by each C++ kernel: the time without it, relative to the time with all of them.

    python scripts/bench/cpp_kernels.py                    print a table; minutes
    python scripts/bench/cpp_kernels.py --json             one object on stdout
    python scripts/bench/cpp_kernels.py --rows rows.jsonl  keep finished rows there; a stopped run continues

The model is that of `yardstick.py` with a vocabulary of 32,000, and a step is a forward and a backward pass. All
contenders run on one model in turn, in an order that rotates from round to round. Times are process CPU times of one
thread. Every figure is the median of the ratios of single rounds. PyTorch's operators replace a missing kernel.
A kernel stays in the project where its ratio is at least 1.05. Triton kernels run on GPUs and are not measured here.

Contenders:
    all              the step of `mm-moslora train` with `model.kernels: native`
    all again        the same once more, which shows the resolution of the measurement
    without X        all kernels but X
    by torch alone   without attention, and without the matrix products that replace it on AMD's processors
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
import yardstick
from json_output import results_alone
from measuring import Rows, head, interleaved, ratio, settings_of
from torch import Tensor

from mm_moslora.kernels.attention import matmul_attention, native_cpu_attention
from mm_moslora.models.memory_efficient.kernel_selection import choose_kernels
from mm_moslora.utils.hardware import keep_freed_memory
from mm_moslora.utils.progress_bar import Progress

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DROPOUTS = (0.0, 0.05)
VOCABULARY = 32_000
KEPT = 1.05

Question = tuple[ModuleType, str]
KERNEL: Question = (native_cpu_attention, "runs_native")
PRODUCTS: Question = (matmul_attention, "products_are_faster")
CONTENDERS: dict[str, list[Question]] = {
    "all": [], "all again": [], "without attention": [KERNEL], "by torch alone": [KERNEL, PRODUCTS],
}  # fmt: skip
"""Functions that return False for each contender; such a function decides whether a kernel takes given tensors."""


def without(left_out: list[Question], step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A step during which these functions return False."""

    def run() -> Tensor:
        with ExitStack() as stack:
            for module, name in left_out:
                stack.enter_context(patch.object(module, name, lambda *_, **__: False))
            return step()

    return run


def measure(dtype: str, dropout: float, rounds: int, after_round: Callable[[], None]) -> dict[str, Any]:
    """One row."""
    step = yardstick.ours(VOCABULARY, DTYPES[dtype], dropout=dropout).step
    steps = {name: without(left_out, step) for name, left_out in CONTENDERS.items()}
    losses: dict[str, list[Tensor]] = {}
    times = interleaved(steps, rounds, after_round=after_round, results=losses)
    limit = 1e-5 if dtype == "fp32" else 5e-3
    loss = {name: statistics.fmean(map(float, values)) for name, values in losses.items()}
    if not dropout and max(abs(values - loss["all"]) for values in loss.values()) > limit * loss["all"]:
        raise SystemExit(f"The contenders have different losses: {loss}.")
    return {
        "dtype": dtype, "dropout": dropout,
        "ratios": {name: ratio(times, name, "all") for name in steps if name != "all"},
        "seconds": {name: statistics.median(spent) for name, spent in times.items()},
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    names = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    print(f"{'step over that with all kernels':32}" + "".join(f"{r['dtype']:>6}, p {r['dropout']:<4}" for r in rows))
    for name in names:
        print(f"{name:32}" + "".join(f"{row['ratios'].get(name, float('nan')):13.3f}" for row in rows))
    print(f"A kernel stays where its ratio is at least {KEPT}.")


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--rows", type=Path, help="JSON Lines file of finished rows; only missing rows are measured")
    options = parser.parse_args()
    output = results_alone() if options.json else sys.stdout
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    keep_freed_memory()
    transformers.logging.set_verbosity_error()
    words = choose_kernels("native", torch.device("cpu")).words
    opening = head("cpp_kernels", "transformers", "peft") | {"kernels": words, "vocabulary": VOCABULARY}
    rows = Rows(options.rows, settings_of(opening, rounds=options.rounds))
    cases = [case for case in itertools.product(DTYPES, DROPOUTS) if not rows.find(dtype=case[0], dropout=case[1])]
    with Progress("C++ kernels benchmark", len(cases) * (options.rounds + 1), unit="round") as progress:
        for dtype, dropout in cases:

            def after_round(note: str = f"{dtype}, dropout {dropout}") -> None:
                progress.update(progress.done + 1, note)

            rows.add(measure(dtype, dropout, options.rounds, after_round))
    if options.json:
        summary = {
            f"{name.replace(' ', '_')}_{row['dtype']}_{row['dropout']}": value
            for row in rows.rows
            for name, value in row["ratios"].items()
        }
        print(json.dumps(opening | {"rows": rows.rows, "summary": summary}), file=output)
    else:
        show(rows.rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
