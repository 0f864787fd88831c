#!/usr/bin/env python
"""Cost of a training step: this project against Hugging Face's Llava with PEFT's LoRA and the authors' mixer.

    python scripts/bench/train.py                    print a table
    python scripts/bench/train.py --json             one object on stdout
    python scripts/bench/train.py --rows rows.jsonl  keep finished rows there; a stopped run continues
    python scripts/bench/train.py --quick            3 rounds, the large vocabulary only

The model is that of `yardstick.py` (CLIP 6 x 256 at 224 pixels, Llama 512 x 6, rank 16, four conversations of 304 to
512 tokens). A step is a forward and a backward pass. All contenders have the same weights and samples. They run in
turn, in an order that rotates from round to round. Times are process CPU times of one thread, and figures are medians
of the ratios of single rounds. Losses and fp32 gradients are compared before the timing. Saved bytes are counted.

`gpu.py` is the benchmark for GPUs.

The process keeps memory from step to step, as `mm-moslora train` does (`keep_freed_memory`), which speeds up the peers,
too.

Contenders:
    hf          padded batch, all logits, PEFT's default adapters (fp32 under a bf16 base)
    best hf     the same with logits at supervised positions only, and adapters in the dtype of the base
    ours        the step of `mm-moslora train`
With the large vocabulary and without --quick, there are also:
    stock layers  `ours` with transformers' own decoder layers (`model.lean_layers: false`)
    compiled      `ours` with `train.compile: inductor`, where a C++ compiler is installed
    trl           TRL's SFTTrainer, where it is installed, padded and without checkpointing. Its head is limited to
                  supervised positions on GPUs only, so its time on a CPU does not predict its time on a GPU

Useful MFU is the speed of the needed FLOPs relative to the step's fastest matrix product, measured in the same rounds.
Needed FLOPs exclude padding, unsupervised positions in the head and after the last attention, gradients of frozen
weights, and recomputation; a multiply-add counts as two. The bound of useful MFU is its value if this project's step
took only the time of its matrix-product and attention kernels.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import logging
import os
import random
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed prints its choice to stdout
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
import yardstick
from json_output import results_alone
from measuring import (
    PRODUCTS,
    Rows,
    head,
    interleaved,
    kernel_seconds,
    ratio,
    settings_of,
)  # fmt: skip
from yardstick import YARDSTICK, Contender, check_equal

from mm_moslora.data.epoch_order import MicroBatchLimit, deal, plan_epoch
from mm_moslora.models.memory_efficient.kernel_selection import choose_kernels
from mm_moslora.utils.hardware import keep_freed_memory
from mm_moslora.utils.progress_bar import Progress

logger = logging.getLogger(__name__)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VOCABULARIES = (32_000, 4_000)
DROPOUT = 0.05
TARGETS = {
    "step_speedup_vs_hf_fp32": 2.3, "step_speedup_vs_hf_bf16": 2.7, "step_speedup_vs_best_hf": 1.5,
    "saved_activation_ratio": 0.35, "useful_mfu_fp32": 0.80, "useful_mfu_bf16": 0.60, "padding_efficiency": 0.97,
}  # fmt: skip


class Product:
    """A bare matrix product, timed like a contender."""

    def __init__(self, rows: int, inner: int, columns: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.left, self.right = (torch.randn(n, inner).to(dtype) for n in (rows, columns))
        self.flops = 2 * rows * inner * columns

    def step(self) -> None:
        """One product with a transposed right side, as a linear layer does it."""
        self.left @ self.right.t()


def products(dtype: torch.dtype) -> dict[str, Product]:
    """The matrix products by rows, inner and columns; the fastest one is the peak."""
    tokens, width, inner = sum(yardstick.LENGTHS), YARDSTICK.width, YARDSTICK.inner
    shapes = ((tokens, width, inner), (tokens, inner, width), (tokens, width, width), (1024, 1024, 1024))
    return {f"product {shape}": Product(*shape, dtype) for shape in shapes}


def needed_flops(vocabulary: int) -> float:
    """FLOPs that a step on the yardstick needs; see the module docstring."""
    width, inner, layers, rank = YARDSTICK.width, YARDSTICK.inner, YARDSTICK.layers, yardstick.RANK
    tokens, supervised = sum(yardstick.LENGTHS), sum(yardstick.SUPERVISED)
    pairs = sum(length * (length + 1) // 2 for length in yardstick.LENGTHS)
    attention_in, rest = 3 * width * width, width * width + 3 * width * inner
    adapters_in, adapters_rest = 3 * rank * 2 * width, rank * (2 * width + 3 * (width + inner))
    per_token = 4 * attention_in + 6 * adapters_in
    behind = 4 * rest + 6 * adapters_rest
    decoder = layers * tokens * per_token + ((layers - 1) * tokens + supervised) * behind
    scores = layers * pairs * width * 2 * (2 + 4)
    head = 4 * vocabulary * width * supervised
    pictures, patches, vision = len(yardstick.LENGTHS), yardstick.IMAGE_TOKENS + 1, 256
    blocks = 5  # features come from the layer before the last
    tower = pictures * patches * (blocks * (2 * 12 * vision * vision + 4 * patches * vision) + 2 * 3 * 14 * 14 * vision)
    projector = pictures * yardstick.IMAGE_TOKENS * (4 * vision * width + 6 * width * width)
    return float(decoder + scores + head + tower + projector)


def measure_steps(rows: Rows, rounds: int, vocabularies: tuple[int, ...], *, extras: bool) -> None:
    """Add the missing rows, one per vocabulary and dtype."""
    cases = list(itertools.product(vocabularies, DTYPES))
    missing = [case for case in cases if rows.find(vocabulary=case[0], dtype=case[1]) is None]
    total, done = len(cases) * (rounds + 1), (len(cases) - len(missing)) * (rounds + 1)
    with Progress("train benchmark", total, unit="round", initial=done) as progress:
        for vocabulary, name in missing:

            def after_round(note: str = f"{name}, vocabulary {vocabulary:,}") -> None:
                progress.update(progress.done + 1, note)

            beside = extras and vocabulary == VOCABULARIES[0]
            rows.add(step_row(vocabulary, name, rounds, beside=beside, after_round=after_round))


def shown_beside(vocabulary: int, dtype: torch.dtype) -> dict[str, Contender]:
    """Contenders without targets, as far as their requirements are installed."""
    contenders = {"stock layers": yardstick.ours(vocabulary, dtype, lean=False)}
    if any(map(shutil.which, ("c++", "g++", "clang++"))):
        contenders["compiled"] = yardstick.ours(vocabulary, dtype, compiler="inductor")
    else:
        logger.warning("No C++ compiler here: the compiled step is left out.")
    if importlib.util.find_spec("trl") is not None:
        contenders["trl"] = yardstick.trl(vocabulary, dtype)
    else:
        logger.warning("TRL is not installed and left out.")
    return contenders


def step_row(
    vocabulary: int,
    name: str,
    rounds: int,
    *,
    beside: bool,
    after_round: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """All contenders on one vocabulary in one dtype."""
    dtype = DTYPES[name]
    contenders = {
        "hf": yardstick.peer(vocabulary, dtype),
        "best hf": yardstick.peer(vocabulary, dtype, supervised_only=True, wide_adapters=False),
        "ours": yardstick.ours(vocabulary, dtype),
    }
    if beside:
        contenders |= shown_beside(vocabulary, dtype)
    equal = check_equal(contenders, "hf", name)
    saved = {kind: yardstick.saved_bytes(contender) / 2**20 for kind, contender in contenders.items()}
    bare = products(dtype)
    steps = {kind: timed.step for kind, timed in (contenders | bare).items()}
    times = interleaved(steps, rounds, after_round=after_round)
    kernels, whole = kernel_seconds(
        contenders["ours"].step,
        lambda name, _: name in PRODUCTS or "attention" in name.lower(),
    )
    peak = max(product.flops / statistics.median(times[key]) for key, product in bare.items())
    seconds = {kind: statistics.median(times[kind]) for kind in contenders}
    mfu = {kind: needed_flops(vocabulary) / spent / peak for kind, spent in seconds.items()}
    return {
        "case": "step", "dtype": name, "vocabulary": vocabulary, **equal,
        "speedup_vs": {kind: ratio(times, kind, "ours") for kind in contenders if kind != "ours"},
        "seconds": seconds, "saved_mib": saved, "saved_ratio": saved["ours"] / saved["hf"],
        "gemm_peak_gflops": peak / 1e9,
        "useful_mfu": mfu, "useful_mfu_bound": mfu["ours"] * whole / kernels,
    }  # fmt: skip


def dropout_row(name: str, rounds: int) -> dict[str, Any]:
    """The large vocabulary with adapter dropout; every contender draws its own masks."""
    vocabulary, dtype = VOCABULARIES[0], DTYPES[name]
    contenders = {
        "hf": yardstick.peer(vocabulary, dtype, dropout=DROPOUT),
        "best hf": yardstick.peer(vocabulary, dtype, supervised_only=True, wide_adapters=False, dropout=DROPOUT),
        "stock layers": yardstick.ours(vocabulary, dtype, lean=False, dropout=DROPOUT),
        "ours": yardstick.ours(vocabulary, dtype, dropout=DROPOUT),
        "ours without dropout": yardstick.ours(vocabulary, dtype),
    }
    steps = {kind: timed.step for kind, timed in contenders.items()}
    times = interleaved(steps, rounds)
    return {
        "case": "dropout", "dtype": name, "dropout": DROPOUT,
        "speedup_vs": {kind: ratio(times, kind, "ours") for kind in contenders if kind != "ours"},
        "saved_mib": {kind: yardstick.saved_bytes(timed) / 2**20 for kind, timed in contenders.items()},
    }  # fmt: skip


def padding_row(*, samples: int = 66_500, ranks: int = 8, per_rank: int = 16) -> dict[str, Any]:
    """Share of real tokens among all computed ones, on lengths like those of LLaVA's 665k mix, ranks in lock-step.

    The waiting time of a rank counts as padding. The text lengths are assumed (log-normal, mean 297, at most 1,472);
    the share of text-only samples (6.1 %) is the mix's.
    """
    rng = random.Random(0)
    has_image = [rng.random() > 0.061 for _ in range(samples)]
    lengths = [min(1472, max(20, int(rng.lognormvariate(5.45, 0.7)))) + 576 * image for image in has_image]
    whole = ranks * per_rank
    ours = plan_epoch(lengths, has_image, seed=0, epoch=0, global_batch=whole)
    dealt = [deal(step, lengths, world_size=ranks, limit=MicroBatchLimit(examples=per_rank)) for step in ours]
    spent = sum(ranks * max(sum(lengths[i] for i in rank[0]) for rank in step) for step in dealt)
    shares = {"ours": sum(lengths) / spent}
    for name, order in (("random, padded", "random"), ("LLaVA's grouping, padded", "grouped")):
        spent = 0
        for step in plan_epoch(lengths, has_image, seed=0, epoch=0, global_batch=whole, order=order):
            members = sorted(step, key=lambda i: -lengths[i]) if order == "grouped" else step
            for start in range(0, len(members), whole):
                spent += whole * max(lengths[i] for i in members[start : start + whole])
        shares[name] = sum(lengths) / spent
    return {"case": "padding", "samples": samples, "ranks": ranks, "per_rank": per_rank, "useful_share": shares}


def summarise(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The summary under stable keys; the slower dtype decides the speed-up over the best peer."""
    large = {row["dtype"]: row for row in rows if row.get("vocabulary") == VOCABULARIES[0]}
    return {
        "step_speedup_vs_hf_fp32": large["fp32"]["speedup_vs"]["hf"],
        "step_speedup_vs_hf_bf16": large["bf16"]["speedup_vs"]["hf"],
        "step_speedup_vs_best_hf": min(row["speedup_vs"]["best hf"] for row in large.values()),
        "saved_activation_ratio": large["bf16"]["saved_ratio"],
        "useful_mfu_fp32": large["fp32"]["useful_mfu"]["ours"],
        "useful_mfu_bf16": large["bf16"]["useful_mfu"]["ours"],
        "useful_mfu_bound_fp32": large["fp32"]["useful_mfu_bound"],
        "useful_mfu_bound_bf16": large["bf16"]["useful_mfu_bound"],
        "padding_efficiency": next(row["useful_share"]["ours"] for row in rows if row["case"] == "padding"),
    }


def show(rows: list[dict[str, Any]], summary: dict[str, float]) -> None:
    """Print the table."""
    print(f"{'vocabulary':>10} dtype {'contender':14} {'ours faster by':>14} {'saved MiB':>10} {'useful MFU':>10}")
    for row in rows:
        for kind in row.get("seconds", ()):
            speedup = row["speedup_vs"].get(kind, 1.0)
            print(
                f"{row['vocabulary']:10,} {row['dtype']:5} {kind:14} {speedup:14.2f} {row['saved_mib'][kind]:10.0f} "
                f"{row['useful_mfu'][kind]:10.2f}"
            )
        if row["case"] == "dropout":
            for kind, speedup in row["speedup_vs"].items():
                print(f"dropout {row['dropout']}, {row['dtype']}: ours faster by {speedup:5.2f} than {kind}")
        if row["case"] == "padding":
            for kind, share in row["useful_share"].items():
                print(f"useful tokens, {row['ranks']} ranks x {row['per_rank']}: {kind:26} {share:.3f}")
    for key, value in summary.items():
        sign = "<=" if key == "saved_activation_ratio" else ">="
        target = f"   target {sign} {TARGETS[key]}" if key in TARGETS else ""
        print(f"{key:28} {value:6.3f}{target}")


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--quick", action="store_true", help="the large vocabulary only, 3 rounds")
    parser.add_argument("--rounds", type=int, default=0, help="rounds per case (default 5, with --quick 3)")
    parser.add_argument("--rows", type=Path, help="JSON Lines file of finished rows; only missing rows are measured")
    options = parser.parse_args()
    output = results_alone() if options.json else sys.stdout
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    keep_freed_memory()
    transformers.logging.set_verbosity_error()
    peers = ["trl"] if importlib.util.find_spec("trl") is not None else []
    opening = head("train", "transformers", "peft", *peers)
    kernels = choose_kernels("auto", torch.device("cpu")).words
    opening |= {"kernels": kernels}
    rounds = options.rounds or (3 if options.quick else 5)
    rows = Rows(options.rows, settings_of(opening, rounds=rounds))
    if rows.find(case="padding") is None:
        rows.add(padding_row())
    for name in () if options.quick else DTYPES:
        if rows.find(case="dropout", dtype=name) is None:
            rows.add(dropout_row(name, rounds))
    vocabularies = VOCABULARIES[:1] if options.quick else VOCABULARIES
    measure_steps(rows, rounds, vocabularies, extras=not options.quick)
    summary = summarise(rows.rows)
    if options.json:
        print(json.dumps(opening | {"rows": rows.rows, "summary": summary}), file=output)
    else:
        show(rows.rows, summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
