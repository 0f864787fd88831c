#!/usr/bin/env python
"""Cost of a training step: this project against Hugging Face's Llava with PEFT's LoRA and the authors' mixer.

    python scripts/bench/train.py                    print a table
    python scripts/bench/train.py --json             one object on stdout
    python scripts/bench/train.py --rows rows.jsonl  keep finished rows there; a stopped run continues
    python scripts/bench/train.py --quick            3 rounds, the large vocabulary only

The model is small (CLIP 6 x 256 at 224 pixels, Llama 512 x 6, rank 16, four conversations of 304 to
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

The case `patches` times the patch embedding of Qwen2.5-VL 7B alone, as transformers has it (a convolution) and as this
project runs it.

Useful MFU is the speed of the needed FLOPs relative to the step's fastest matrix product, measured in the same rounds.
Needed FLOPs exclude padding, unsupervised positions in the head and after the last attention, gradients of frozen
weights, and recomputation; a multiply-add counts as two. The bound of useful MFU is its value if this project's step
took only the time of its matrix-product and attention kernels.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import random
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from contenders import Way
from harness import PRODUCTS, Benchmark, Case, Row, interleaved, kernel_seconds, ratio
from llava_models import DTYPES, Runner, Shape, check_equal, examples, hf, needed_flops, ours, small, trl
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionPatchEmbed

from mm_moslora.data.epoch_order import MicroBatchLimit, deal, plan_epoch
from mm_moslora.models.memory_efficient.kernel_selection import choose_kernels
from mm_moslora.models.meta_model import kept_bytes
from mm_moslora.models.vision.patch_embedding import use_linear_patches

logger = logging.getLogger(__name__)
VOCABULARIES = (32_000, 4_000)
LENGTHS = (304, 352, 416, 512)
"""Tokens per conversation, 256 visual ones included: 1,584 in total, 2,048 when padded."""
SUPERVISED = (20, 40, 63, 100)
"""Supervised tokens at the end of each conversation: 223 in total."""
DROPOUT = 0.05


class Product:
    """A bare matrix product, timed like a contender."""

    def __init__(self, rows: int, inner: int, columns: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.left, self.right = (torch.randn(n, inner).to(dtype) for n in (rows, columns))
        self.flops = 2 * rows * inner * columns

    def step(self) -> None:
        """One product with a transposed right side, as a linear layer does it."""
        self.left @ self.right.t()


def products(shape: Shape, dtype: torch.dtype) -> dict[str, Product]:
    """The matrix products by rows, inner and columns; the fastest one is the peak."""
    tokens, width, inner = sum(LENGTHS), shape.width, shape.inner
    shapes = ((tokens, width, inner), (tokens, inner, width), (tokens, width, width), (1024, 1024, 1024))
    return {f"product {sizes}": Product(*sizes, dtype) for sizes in shapes}


def contenders_on(shape: Shape, name: str, *, dropout: float = 0.0) -> dict[str, Runner]:
    """The contenders with targets."""
    way = partial(Way, dtype=name, dropout=dropout, mixed=True)
    return {
        "hf": hf(shape, way(wide_adapters=True)),
        "best hf": hf(shape, way(supervised_only=True)),
        "ours": ours(shape, way()),
    }


def shown_beside(shape: Shape, name: str) -> dict[str, Runner]:
    """Contenders without targets, as far as their requirements are installed."""
    contenders = {"stock layers": ours(shape, Way(dtype=name, mixed=True, lean=False))}
    if any(map(shutil.which, ("c++", "g++", "clang++"))):
        contenders["compiled"] = ours(shape, Way(dtype=name, mixed=True, kernels="inductor"))
    else:
        logger.warning("No C++ compiler here: the compiled step is left out.")
    if importlib.util.find_spec("trl") is not None:
        contenders["trl"] = trl(shape, Way(dtype=name, mixed=True))
    else:
        logger.warning("TRL is not installed and left out.")
    return contenders


def saved_mib(contenders: dict[str, Runner], items: list[Any]) -> dict[str, float]:
    """What each contender keeps for the backward pass."""
    return {
        kind: kept_bytes(partial(runner.loss, runner.prepare(items)), runner.model) / 2**20
        for kind, runner in contenders.items()
    }


def step_row(vocabulary: int, name: str, rounds: int, *, beside: bool) -> Row:
    """All contenders on one vocabulary in one dtype."""
    shape = small(vocabulary=vocabulary)
    contenders = contenders_on(shape, name) | (shown_beside(shape, name) if beside else {})
    items, bare = examples(shape, LENGTHS, SUPERVISED, seed=1), products(shape, DTYPES[name])
    equal, saved = check_equal(contenders, items, "hf", name), saved_mib(contenders, items)
    steps: dict[str, Callable[[], Any]] = {kind: runner.step_on(items) for kind, runner in contenders.items()}
    times = interleaved(steps | {kind: product.step for kind, product in bare.items()}, rounds)
    kernels, whole = kernel_seconds(steps["ours"], lambda name, _: name in PRODUCTS or "attention" in name.lower())
    peak = max(product.flops / statistics.median(times[key]) for key, product in bare.items())
    seconds = {kind: statistics.median(times[kind]) for kind in contenders}
    seen = replace(shape, vision=(256, 1024, 5, 4))  # features come from the layer before the last
    (flops,) = needed_flops(seen, [items])
    mfu = {kind: flops / spent / peak for kind, spent in seconds.items()}
    return {
        **equal,
        "speedup_vs": {kind: ratio(times, kind, "ours") for kind in contenders if kind != "ours"},
        "seconds": seconds, "saved_mib": saved, "saved_ratio": saved["ours"] / saved["hf"],
        "gemm_peak_gflops": peak / 1e9,
        "useful_mfu": mfu, "useful_mfu_bound": mfu["ours"] * whole / kernels,
    }  # fmt: skip


def dropout_row(name: str, rounds: int) -> Row:
    """The large vocabulary with adapter dropout; every contender draws its own masks."""
    shape = small()
    contenders = contenders_on(shape, name, dropout=DROPOUT) | {
        "stock layers": ours(shape, Way(dtype=name, mixed=True, lean=False, dropout=DROPOUT)),
        "ours without dropout": ours(shape, Way(dtype=name, mixed=True)),
    }
    items = examples(shape, LENGTHS, SUPERVISED, seed=1)
    times = interleaved({kind: runner.step_on(items) for kind, runner in contenders.items()}, rounds)
    return {
        "dropout": DROPOUT, "speedup_vs": {kind: ratio(times, kind, "ours") for kind in contenders if kind != "ours"},
        "saved_mib": saved_mib(contenders, items),
    }  # fmt: skip


def patches_row(name: str, rounds: int, *, patches: int = 4096) -> Row:
    """A picture of 896 x 896 pixels as patches of 1,176 numbers, without and with gradients of the weights."""
    torch.manual_seed(0)
    contenders = {kind: Qwen2_5_VisionPatchEmbed(embed_dim=1280).to(DTYPES[name]) for kind in ("hf", "ours")}
    contenders["ours"].load_state_dict(contenders["hf"].state_dict())
    use_linear_patches(contenders["ours"])
    pixels, pull = torch.randn(patches, 1176).to(DTYPES[name]), torch.randn(patches, 1280).to(DTYPES[name])
    steps = {kind: partial(layer, pixels) for kind, layer in contenders.items()}
    with torch.no_grad():
        forward = ratio(interleaved(steps, rounds), "hf", "ours")
    trained = {kind: partial(_step_of, layer, pixels, pull) for kind, layer in contenders.items()}
    return {
        "patches": patches,
        "speedup_vs_hf": {"forward": forward, "step": ratio(interleaved(trained, rounds), "hf", "ours")},
    }


def _step_of(layer: nn.Module, pixels: Tensor, pull: Tensor) -> None:
    layer(pixels).backward(pull)
    layer.zero_grad()


def padding_row(*, samples: int = 66_500, ranks: int = 8, per_rank: int = 16) -> Row:
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
    return {"samples": samples, "ranks": ranks, "per_rank": per_rank, "useful_share": shares}


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Padding, patches, dropout, and steps for each vocabulary and dtype."""
    yield Case(names={"case": "padding"}, measure=padding_row)
    for name in DTYPES:
        yield Case(names={"case": "patches", "dtype": name}, measure=partial(patches_row, name, options.rounds))
    for name in () if options.quick else DTYPES:
        yield Case(names={"case": "dropout", "dtype": name}, measure=partial(dropout_row, name, options.rounds))
    for vocabulary in VOCABULARIES[: 1 if options.quick else None]:
        for name in DTYPES:
            beside = not options.quick and vocabulary == VOCABULARIES[0]
            yield Case(
                names={"case": "step", "dtype": name, "vocabulary": vocabulary},
                measure=partial(step_row, vocabulary, name, options.rounds, beside=beside),
            )


def summarise(rows: list[Row]) -> dict[str, float]:
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


def lines(row: Row) -> Iterator[dict[str, str]]:
    """Contenders of a step, speed-ups with dropout, or shares of useful tokens."""
    for kind in row.get("seconds", ()):
        yield {
            "vocabulary": f"{row['vocabulary']:,}", "dtype": row["dtype"], "contender": kind,
            "ours faster by": f"{row['speedup_vs'].get(kind, 1.0):.2f}", "saved MiB": f"{row['saved_mib'][kind]:.0f}",
            "useful MFU": f"{row['useful_mfu'][kind]:.2f}",
        }  # fmt: skip
    if row["case"] == "dropout":
        for kind, speedup in row["speedup_vs"].items():
            yield {f"dropout {row['dropout']}": row["dtype"], "contender": kind, "ours faster by": f"{speedup:.2f}"}
    for kind, speedup in row.get("speedup_vs_hf", {}).items():
        yield {f"{row['patches']:,} patches": row["dtype"], "pass": kind, "ours faster by": f"{speedup:.2f}"}
    for kind, share in row.get("useful_share", {}).items():
        yield {f"{row['ranks']} ranks x {row['per_rank']}": kind, "useful tokens": f"{share:.3f}"}


BENCHMARK = Benchmark(
    name="train", about=__doc__, cases=cases, lines=lines, summarise=summarise,
    targets={
        "step_speedup_vs_hf_fp32": ">= 2.3", "step_speedup_vs_hf_bf16": ">= 2.7", "step_speedup_vs_best_hf": ">= 1.5",
        "saved_activation_ratio": "<= 0.35", "useful_mfu_fp32": ">= 0.80", "useful_mfu_bf16": ">= 0.60",
        "padding_efficiency": ">= 0.97",
    },
    packages=("transformers", "peft", "trl"), facts={"kernels": choose_kernels("auto", torch.device("cpu")).words},
    quick="the large vocabulary only", keeps_memory=True,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
