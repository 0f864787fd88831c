#!/usr/bin/env python
"""Attention of one segment on a CPU, forward and backward: written as matrix products, against PyTorch's kernel.

    python scripts/bench/attention.py          table for people; a minute
    python scripts/bench/attention.py --json   one object on stdout

Training takes the one named under `taken` on this machine. The contenders run in turn in one process, on the same
tensors; one thread, process CPU time; every figure is the median of the ratios of single rounds. The error is that of
the gradients, relative to float64 on the same values.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from measuring import head, interleaved, ratio
from torch import Tensor
from torch.nn import functional as F

from mm_moslora.machine import keep_memory
from mm_moslora.models import attention
from mm_moslora.models.attention_products import products_are_faster

HEADS, WIDTH = 8, 64
LENGTHS = (32, 64, 128, 256, 512, 1024, 2048)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Ours, ``[1, H, T, E]`` to ``[1, T, H, E]``."""
    return attention.segment_attention(torch.nn.Module(), q, k, v, None, segment_lengths=(q.shape[2],))[0]


def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def gradients(contender: Attention, given: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Of q, k and v."""
    *inputs, pull = (tensor.to(dtype) for tensor in given)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    contender(*leaves).backward(pull)
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def measure(tokens: int, name: str, rounds: int) -> dict[str, Any]:
    """One row; short segments run several times a round."""
    torch.manual_seed(tokens)
    shapes = [(1, HEADS, tokens, WIDTH)] * 3 + [(1, tokens, HEADS, WIDTH)]
    given = [torch.randn(shape).to(DTYPES[name]).double() for shape in shapes]
    contenders: dict[str, Attention] = {"kernel": kernel, "products": products}
    repeats = max(1, 2**19 // tokens**2)

    def step(contender: Attention) -> Callable[[], None]:
        tensors = [tensor.to(DTYPES[name]) for tensor in given]

        def run() -> None:
            for _ in range(repeats):
                gradients(contender, [tensor.detach() for tensor in tensors], DTYPES[name])

        return run

    times = interleaved({kind: step(contender) for kind, contender in contenders.items()}, rounds)
    exact = gradients(kernel, [tensor.clone() for tensor in given], torch.float64)
    errors = {}
    for kind, contender in contenders.items():
        found = gradients(contender, [tensor.clone() for tensor in given], DTYPES[name])
        errors[kind] = max(float((g.double() - e).norm() / e.norm()) for g, e in zip(found, exact, strict=True))
    return {
        "tokens": tokens, "dtype": name, "time_ratio_vs_kernel": ratio(times, "products", "kernel"),
        "taken": "products" if products_are_faster(given[0][0].to(DTYPES[name])) else "kernel",
        "milliseconds": {kind: statistics.median(spent) / repeats * 1e3 for kind, spent in times.items()},
        "gradient_error": errors,
    }  # fmt: skip


def main() -> int:
    """Measure, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="T", help="tokens of the segments")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    attention.products_are_faster = lambda _: True  # both are measured, whatever training would take here
    rows = [measure(tokens, name, options.rounds) for name in DTYPES for tokens in options.lengths]
    if options.json:
        summary = {
            f"time_ratio_vs_kernel_geomean_{name}": statistics.geometric_mean(
                row["time_ratio_vs_kernel"] for row in rows if row["dtype"] == name
            )
            for name in DTYPES
        }
        print(json.dumps(head("attention") | {"rows": rows, "summary": summary}))
        return 0
    heads = f"{'dtype':5} {'tokens':>6} {'kernel ms':>9} {'products ms':>11} {'ratio':>6}  {'taken':8}"
    print(f"{heads}  error: kernel, products")
    for row in rows:
        spent, errors = row["milliseconds"], row["gradient_error"]
        print(
            f"{row['dtype']:5} {row['tokens']:6} {spent['kernel']:9.3f} {spent['products']:11.3f} "
            f"{row['time_ratio_vs_kernel']:6.2f}  {row['taken']:8}  {errors['kernel']:.1e}, {errors['products']:.1e}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
