#!/usr/bin/env python
"""What runs between the matrix products of a lean decoder layer, forward and backward: operators and bytes, counted.

    python scripts/bench/passes.py          table for people; seconds, needs no GPU
    python scripts/bench/passes.py --json   one object on stdout
    python scripts/bench/passes.py --time   and our kernels for CPUs timed against PyTorch's operators

Every operator of PyTorch is a kernel launch on a GPU, reads its tensors and writes its results. A kernel of its
own for a pass (`model.kernels: liger`, `train.compile`) is one launch that reads and writes what goes in and comes out,
once. To be counted, the passes run on the meta device.

With --time they run on the CPU, PyTorch's operators and our kernels (`model.kernels: native`) in turn, on several sets
of tensors in turn; one thread, process CPU time, medians of the ratios of single rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from measuring import head, interleaved, ratio
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mm_moslora.machine import keep_memory
from mm_moslora.models.elementwise import EAGER, Elementwise
from mm_moslora.models.native_passes import NATIVE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIB = 2**20
SETS, ROUNDS = 4, 11


class Counter(TorchDispatchMode):
    """Operators that touch memory, and the bytes of their tensors, each once per operator."""

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
    """One of the functions of `mm_moslora.models.elementwise`."""

    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    times: int
    """In a layer's forward and backward pass."""
    unread: tuple[Tensor, ...] = ()
    """Inputs and outputs that a kernel of its own has no use for."""


def passes(
    options: argparse.Namespace, dtype: torch.dtype, device: str = "meta", those: Elementwise = EAGER
) -> dict[str, Pass]:
    """All of a layer, with how often each runs."""
    S, D, F = options.tokens, options.width, options.mlp_width

    def blank(*shape: int) -> Tensor:
        return torch.ones(*shape, dtype=dtype, device=device)

    x, e, inverse, weight = blank(S, D), blank(S, F), torch.ones(S, 1, device=device), blank(D)
    activated = blank(S, F)
    heads, turn = (blank(S, n, options.head_width) for n in (D // options.head_width, 1))
    keys = blank(S, options.kv_heads, options.head_width)
    return {
        "normalise": Pass(those.normalise, (x, weight, 1e-5), 2),
        "normalised": Pass(those.normalised, (x, weight, inverse), 2),
        "normalise_backward": Pass(those.normalise_backward, (blank(S, D), x, weight, inverse), 2),
        "gated": Pass(those.gated, (e, blank(S, F)), 1),
        "regated": Pass(those.regated, (e, blank(S, F)), 1, (activated,)),
        "gated_backward": Pass(those.gated_backward, (blank(S, F), e, blank(S, F), activated), 1, (activated,)),
        "rotated, queries": Pass(those.rotated, (heads, turn, turn), 2),
        "rotated, keys": Pass(those.rotated, (keys, turn, turn), 2),
    }


def row(name: str, dtype: str, counted: Pass) -> dict[str, Any]:
    """A pass as it is and as one kernel."""
    with Counter() as counter:
        result = counted.function(*counted.inputs)
    return {
        "pass": name, "dtype": dtype, "times": counted.times, "operators": counter.operators,
        "moved_bytes": counter.moved, "one_kernel_bytes": size(counted.inputs) + size(result) - size(counted.unread),
    }  # fmt: skip


def time_ratios(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, float]:
    """Time of our kernels over that of PyTorch's operators, by pass, and for a layer as a whole."""
    sets = [
        {"ours": passes(options, dtype, "cpu", NATIVE), "torch": passes(options, dtype, "cpu")} for _ in range(SETS)
    ]
    found, layer = {}, {"ours": [0.0] * ROUNDS, "torch": [0.0] * ROUNDS}
    for name, one in sets[0]["torch"].items():
        turns = dict.fromkeys(layer, 0)

        def step(whose: str, name: str = name, turns: dict[str, int] = turns) -> None:
            own = sets[turns[whose] % SETS][whose][name]
            turns[whose] += 1
            own.function(*own.inputs)

        times = interleaved({whose: partial(step, whose) for whose in layer}, ROUNDS)
        found[name] = ratio(times, "ours", "torch")
        for whose, spent in times.items():
            layer[whose] = [a + one.times * b for a, b in zip(layer[whose], spent, strict=True)]
    return found | {"a layer": ratio(layer, "ours", "torch")}


def total(rows: list[dict[str, Any]], key: str) -> int:
    """Of a layer."""
    return sum(item["times"] * item[key] for item in rows)


def main() -> int:
    """Count, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--time", action="store_true", help="time our kernels for CPUs against PyTorch's operators")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=4096, help="the default is Vicuna 7B")
    parser.add_argument("--mlp-width", type=int, default=11008)
    parser.add_argument("--head-width", type=int, default=128)
    parser.add_argument("--kv-heads", type=int, default=32)
    options = parser.parse_args()
    rows = [row(name, dtype, one) for dtype, kind in DTYPES.items() for name, one in passes(options, kind).items()]
    ratios: dict[str, dict[str, float]] = {}
    if options.time:
        torch.set_num_threads(1)
        keep_memory()
        ratios = {dtype: time_ratios(options, kind) for dtype, kind in DTYPES.items()}
    layers = {dtype: [item for item in rows if item["dtype"] == dtype] for dtype in DTYPES}
    if options.json:
        summary = {
            f"{key}_{dtype}": total(own, key)
            for dtype, own in layers.items()
            for key in ("operators", "moved_bytes", "one_kernel_bytes")
        }
        print(json.dumps(head("passes") | {"rows": rows, "summary": summary, "time_ratios": ratios}))
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
    for dtype, own_ratios in ratios.items():
        words = ", ".join(f"{name} {found:.2f}" for name, found in own_ratios.items())
        print(f"{dtype:5} time of our kernels over that of PyTorch's operators: {words}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
