#!/usr/bin/env python
"""Cost of a training step on a 4-bit base: PEFT's modules, the fused kernel, and lean layers with it.

    python scripts/bench/quantised.py                    print a table
    python scripts/bench/quantised.py --json             one object on stdout
    python scripts/bench/quantised.py --rows rows.jsonl  keep finished rows there; a stopped run continues

The model is that of `yardstick.py` with its language model in bitsandbytes' nf4 (double quantisation, the model's dtype
as compute dtype). A step is a forward and a backward pass. All contenders have the same packed weights, adapters,
padding-free rows and loss. They run in turn, in an order that rotates from round to round. Times are process CPU times
of one thread, and every figure is the median of the ratios of single rounds. Losses and fp32 gradients are compared
before the timing. Saved bytes are counted.

Contenders:
    modules     transformers' layers, PEFT's layers module by module (`use_kernel(model, "reference")`)
    kernel      transformers' layers, adapted layers in the fused kernel (`model.lean_layers: false`)
    lean        the step of `mm-moslora train`
    unpacked    lean, on the same model in the compute dtype
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
import yardstick
from json_output import results_alone
from measuring import Rows, head, interleaved, ratio
from torch import Tensor
from train import DROPOUT, DTYPES, VOCABULARIES
from yardstick import Contender

from mm_moslora import adapters
from mm_moslora.utils.hardware import keep_freed_memory


def contenders(dtype: torch.dtype, dropout: float) -> dict[str, Contender]:
    """The contenders; see the module docstring."""
    vocabulary = VOCABULARIES[0]
    plain = yardstick.ours(vocabulary, dtype, lean=False, dropout=dropout, four_bits=True)

    def by_modules() -> Tensor:
        with adapters.use_kernel(plain.model, "reference"):
            return plain.forward()

    return {
        "modules": replace(plain, forward=by_modules),
        "kernel": plain,
        "lean": yardstick.ours(vocabulary, dtype, dropout=dropout, four_bits=True),
        "unpacked": yardstick.ours(vocabulary, dtype, dropout=dropout),
    }


def check_equal(found: dict[str, Contender], name: str) -> dict[str, float]:
    """Largest relative differences from `modules`: of the loss, and of any gradient in fp32.

    Raises:
        SystemExit: a difference is too large.
    """
    packed = {kind: contender for kind, contender in found.items() if kind != "unpacked"}
    losses = {kind: float(contender.forward().detach()) for kind, contender in packed.items()}
    differences = {"loss_difference": max(abs(loss / losses["modules"] - 1) for loss in losses.values())}
    if name == "fp32":
        wanted, worst = packed["modules"].gradients(), 0.0
        for contender in packed.values():
            mine = contender.gradients()
            worst = max(worst, *(float((mine[key] - grad).norm() / grad.norm()) for key, grad in wanted.items()))
        differences["gradient_difference"] = worst
    if max(differences.values()) > (1e-5 if name == "fp32" else 5e-3):
        raise SystemExit(f"Differs from modules ({name}): {differences}")
    return differences


def step_row(name: str, dropout: float, rounds: int) -> dict[str, Any]:
    """All contenders in one dtype."""
    found = contenders(DTYPES[name], dropout)
    equal = {} if dropout else check_equal(found, name)  # with dropout every contender draws its own masks
    saved = {kind: yardstick.saved_bytes(contender) / 2**20 for kind, contender in found.items()}
    times = interleaved({kind: contender.step for kind, contender in found.items()}, rounds)
    return {
        "case": "four bits", "dtype": name, "dropout": dropout, **equal,
        "time_ratio": {kind: ratio(times, kind, "modules") for kind in found},
        "cpu_seconds": {kind: statistics.median(spent) for kind, spent in times.items()}, "saved_mib": saved,
    }  # fmt: skip


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--rounds", type=int, default=5, help="rounds per case (default 5)")
    parser.add_argument("--rows", type=Path, help="JSON Lines file of finished rows; only missing rows are measured")
    options = parser.parse_args()
    output = results_alone() if options.json else sys.stdout
    torch.set_num_threads(1)
    keep_freed_memory()
    transformers.logging.set_verbosity_error()
    opening = head("quantised", "transformers", "peft", "bitsandbytes")
    settings = {name: opening[name] for name in ("benchmark", "hardware", "versions")} | {"rounds": options.rounds}
    rows = Rows(options.rows, settings)
    for name in DTYPES:
        for dropout in (0.0, DROPOUT):
            if rows.find(dtype=name, dropout=dropout) is None:
                rows.add(step_row(name, dropout, options.rounds))
    summary = {
        f"{figure}_ratio_lean_vs_modules_{row['dtype']}": value
        for row in rows.rows if not row["dropout"]
        for figure, value in (
            ("time", row["time_ratio"]["lean"]), ("saved", row["saved_mib"]["lean"] / row["saved_mib"]["modules"])
        )
    }  # fmt: skip
    if options.json:
        print(json.dumps(opening | {"rows": rows.rows, "summary": summary}), file=output)
        return 0
    print(f"{'dtype':5} {'dropout':>7} {'contender':10} {'time / modules':>14} {'CPU seconds':>11} {'saved MiB':>10}")
    for row in rows.rows:
        for kind, spent in row["cpu_seconds"].items():
            print(
                f"{row['dtype']:5} {row['dropout']:7} {kind:10} {row['time_ratio'][kind]:14.3f} {spent:11.2f} "
                f"{row['saved_mib'][kind]:10.0f}"
            )
    for key, value in summary.items():
        print(f"{key:34} {value:6.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
