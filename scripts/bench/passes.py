#!/usr/bin/env python
"""Operators and bytes between the matrix products of a lean decoder layer, forward and backward, counted.

    python scripts/bench/passes.py          print a table; seconds, needs no GPU
    python scripts/bench/passes.py --json   one object on stdout

Every operator of PyTorch is a kernel launch on a GPU that reads its tensors and writes its results. One fused kernel
for a pass (`model.kernels: triton`, `train.compile`) is one launch that reads the inputs and writes the outputs once.
The passes run on the meta device, where operators are counted without data.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from json_output import results_alone
from measuring import head
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mm_moslora.kernels.fused_ops.torch_ops import TORCH_OPS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIB = 2**20
WIDTH, MLP_WIDTH, HEAD_WIDTH, KV_HEADS = 4096, 11008, 128, 32
"""Sizes of Vicuna 7B."""


class Counter(TorchDispatchMode):
    """Operators that access memory, and the bytes of their tensors, each counted once per operator."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.moved = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view and any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
            self.operators += 1
            self.moved += size((args, kwargs)) + size(result)
        return result


def size(tree: Any) -> int:
    """Bytes of the tensors in a tree, each tensor once."""
    tensors = {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@dataclass(frozen=True)
class Pass:
    """One of the functions of `mm_moslora.kernels.fused_ops.torch_ops`."""

    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    times: int
    """Calls in a layer's forward and backward pass."""
    unread: tuple[Tensor, ...] = ()
    """Inputs and outputs that a fused kernel does not access."""


def passes(tokens: int, dtype: torch.dtype) -> dict[str, Pass]:
    """All passes of a layer with their numbers of calls."""
    S, D, F = tokens, WIDTH, MLP_WIDTH

    def blank(*shape: int) -> Tensor:
        return torch.ones(*shape, dtype=dtype, device="meta")

    x, e, inverse, weight = blank(S, D), blank(S, F), torch.ones(S, 1, device="meta"), blank(D)
    activated = blank(S, F)
    heads, turn = (blank(S, n, HEAD_WIDTH) for n in (D // HEAD_WIDTH, 1))
    keys = blank(S, KV_HEADS, HEAD_WIDTH)
    return {
        "normalise": Pass(TORCH_OPS.rms_norm, (x, weight, 1e-5), 2),
        "normalised": Pass(TORCH_OPS.recompute_rms_norm, (x, weight, inverse), 2),
        "normalise_backward": Pass(TORCH_OPS.rms_norm_backward, (blank(S, D), x, weight, inverse), 2),
        "gated": Pass(TORCH_OPS.gated_silu, (e, blank(S, F)), 1),
        "regated": Pass(TORCH_OPS.recompute_gated, (e, blank(S, F)), 1, (activated,)),
        "gated_backward": Pass(
            TORCH_OPS.gated_silu_backward, (blank(S, F), e, blank(S, F), activated), 1, (activated,)
        ),
        "rotated, queries": Pass(TORCH_OPS.rotary_embedding, (heads, turn, turn), 2),
        "rotated, keys": Pass(TORCH_OPS.rotary_embedding, (keys, turn, turn), 2),
    }


def row(name: str, dtype: str, counted: Pass) -> dict[str, Any]:
    """A pass as separate operators and as one kernel."""
    with Counter() as counter:
        result = counted.function(*counted.inputs)
    return {
        "pass": name, "dtype": dtype, "times": counted.times, "operators": counter.operators,
        "moved_bytes": counter.moved, "one_kernel_bytes": size(counted.inputs) + size(result) - size(counted.unread),
    }  # fmt: skip


def total(rows: list[dict[str, Any]], key: str) -> int:
    """Totals of a layer."""
    return sum(item["times"] * item[key] for item in rows)


def main() -> int:
    """Run the count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    output = results_alone() if options.json else sys.stdout
    rows = [
        row(name, dtype, one) for dtype, kind in DTYPES.items() for name, one in passes(options.tokens, kind).items()
    ]
    layers = {dtype: [item for item in rows if item["dtype"] == dtype] for dtype in DTYPES}
    if options.json:
        summary = {
            f"{key}_{dtype}": total(own, key)
            for dtype, own in layers.items()
            for key in ("operators", "moved_bytes", "one_kernel_bytes")
        }
        print(json.dumps(head("passes") | {"rows": rows, "summary": summary}), file=output)
        return 0
    print(f"{'dtype':5} {'pass':19} {'times':>5} {'operators':>9} {'MiB':>6} {'as one kernel, MiB':>19}")
    for dtype, own in layers.items():
        for item in own:
            sizes = f"{item['moved_bytes'] / MIB:6.0f} {item['one_kernel_bytes'] / MIB:19.0f}"
            print(f"{dtype:5} {item['pass']:19} {item['times']:5} {item['operators']:9} {sizes}")
        kernels = sum(item["times"] for item in own)
        print(
            f"{dtype:5} a layer: {total(own, 'operators')} operators, {total(own, 'moved_bytes') / MIB:.0f} MiB; as "
            f"kernels {kernels}, {total(own, 'one_kernel_bytes') / MIB:.0f} MiB"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
