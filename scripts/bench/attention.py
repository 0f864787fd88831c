#!/usr/bin/env python
"""Attention of one segment on a CPU, forward and backward: this project's kernel, matrix products, PyTorch's kernel.

    python scripts/bench/attention.py          print a table; a minute
    python scripts/bench/attention.py --json   one object on stdout

Training uses the one named under `taken` on this machine (`model.kernels: torch`: the faster of the other two, as
measured). The contenders run in turn in one process, on the same tensors. Times are process CPU times of one thread.
Every figure is the median of the ratios of single rounds. The error is that of the gradients, relative to float64 on
the same values.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from json_output import results_alone
from measuring import head, interleaved, ratio
from torch import Tensor
from torch.nn import functional as F

from mm_moslora.kernels.attention import matmul_attention, native_cpu_attention, segment_attention
from mm_moslora.kernels.attention.matmul_attention import products_are_faster
from mm_moslora.kernels.attention.native_cpu_attention import runs_native
from mm_moslora.kernels.native import NativeError, library
from mm_moslora.utils.hardware import keep_freed_memory, multiplies_tiles

HEADS, WIDTH = 8, 64
LENGTHS = (32, 64, 128, 256, 512, 1024, 2048)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(q: Tensor, k: Tensor, v: Tensor, *, native: bool = True) -> Tensor:
    """This project's kernel where it supports the dtype, ``[1, H, T, E]`` to ``[1, T, H, E]``."""
    row = segment_attention.segment_arguments((q.shape[2],), q.device)
    return segment_attention.segment_attention(torch.nn.Module(), q, k, v, None, native=native, **row)[0]


products = partial(ours, native=False)
"""Matrix products."""


def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def gradients(contender: Attention, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Gradients of q, k and v."""
    *inputs, pull = (tensor.to(dtype) for tensor in tensors)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    contender(*leaves).backward(pull)
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def measure(tokens: int, name: str, rounds: int) -> dict[str, Any]:
    """One row; short segments run several times per round."""
    torch.manual_seed(tokens)
    shapes = [(1, HEADS, tokens, WIDTH)] * 3 + [(1, tokens, HEADS, WIDTH)]
    exact_inputs = [torch.randn(shape).to(DTYPES[name]).double() for shape in shapes]
    contenders: dict[str, Attention] = {"ours": ours, "products": products, "pytorch": kernel}
    repeats = max(1, 2**19 // tokens**2)

    def step(contender: Attention) -> Callable[[], None]:
        tensors = [tensor.to(DTYPES[name]) for tensor in exact_inputs]

        def run() -> None:
            for _ in range(repeats):
                gradients(contender, [tensor.detach() for tensor in tensors], DTYPES[name])

        return run

    times = interleaved({kind: step(contender) for kind, contender in contenders.items()}, rounds)
    exact = gradients(kernel, [tensor.clone() for tensor in exact_inputs], torch.float64)
    errors = {}
    for kind, contender in contenders.items():
        computed = gradients(contender, [tensor.clone() for tensor in exact_inputs], DTYPES[name])
        errors[kind] = max(float((g.double() - e).norm() / e.norm()) for g, e in zip(computed, exact, strict=True))
    q, k, v = (tensor.to(DTYPES[name]) for tensor in exact_inputs[:3])
    by_ours = runs_native(q, k, v, segments=1) and not (name == "bf16" and multiplies_tiles())
    taken = "ours" if by_ours else "products" if products_are_faster(q[0]) else "pytorch"
    return {
        "tokens": tokens, "dtype": name, "taken": taken,
        "time_ratio_vs_pytorch": {kind: ratio(times, kind, "pytorch") for kind in contenders if kind != "pytorch"},
        "milliseconds": {kind: statistics.median(spent) / repeats * 1e3 for kind, spent in times.items()},
        "gradient_error": errors,
    }  # fmt: skip


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="T", help="tokens of the segments")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    output = results_alone() if options.json else sys.stdout
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        library()  # compiled before anything is timed
    except NativeError as error:
        raise SystemExit(f"This project's kernel cannot be measured: {error}.") from error
    matmul_attention.products_are_faster = lambda _: True  # measure all, whatever training would choose here
    native_cpu_attention.multiplies_tiles = lambda: False
    rows = [measure(tokens, name, options.rounds) for name in DTYPES for tokens in options.lengths]
    if options.json:
        summary = {
            f"time_ratio_{kind}_vs_pytorch_geomean_{name}": statistics.geometric_mean(
                row["time_ratio_vs_pytorch"][kind] for row in rows if row["dtype"] == name
            )
            for name in DTYPES
            for kind in ("ours", "products")
        }
        print(json.dumps(head("attention") | {"rows": rows, "summary": summary}), file=output)
        return 0
    print(f"{'':12} milliseconds{'':17} time over PyTorch's{'':10} error of the gradients")
    columns = f"{'ours':>9} {'products':>9} {'pytorch':>9} {'ours':>8} {'products':>8}"
    print(f"{'dtype':5} {'tokens':>6} {columns}  {'taken':8}  ours, products, pytorch")
    for row in rows:
        spent, ratios, errors = row["milliseconds"], row["time_ratio_vs_pytorch"], row["gradient_error"]
        print(
            f"{row['dtype']:5} {row['tokens']:6} {spent['ours']:9.3f} {spent['products']:9.3f} {spent['pytorch']:9.3f} "
            f"{ratios['ours']:8.2f} {ratios['products']:8.2f}  {row['taken']:8}  "
            + ", ".join(f"{errors[kind]:.1e}" for kind in ("ours", "products", "pytorch"))
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
