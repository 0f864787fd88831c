#!/usr/bin/env python
"""What an adapter costs: MoSLoRA against PEFT's LoRA, against our own LoRA, and against the frozen model.

    python scripts/bench/adapters.py            table for people
    python scripts/bench/adapters.py --json     one object on stdout
    python scripts/bench/adapters.py --quick    512 tokens and 3 rounds

All contenders of a case run in turn in one process, on the same weights and inputs, in an order that rotates from round
to round; one thread, process CPU time; every figure is the median of the ratios of single rounds. Saved bytes and FLOPs
are counted. A step is a forward and a backward pass down to the input.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

import mm_moslora
from mm_moslora.adapters import MoSLoRAConfig, add_moslora, one_product_per_step, use_kernel

SHAPES = ((576, 1536), (2048, 2048), (2048, 5504))
RANKS = (16, 64)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MICRO_BATCHES = 4
PLAIN: dict[str, Any] = {"mixer_init": "identity", "mixer_trainable": False}
TARGETS = {"overhead_fp32": 0.12, "overhead_bf16": 0.07, "time_ratio_vs_peft_geomean": 0.85}
TARGETS |= {"saved_bytes_ratio_vs_peft_bf16": 0.5, "moslora_vs_own_lora": 1.01}

Step = Callable[[], None]


class Single(nn.Module):
    """One linear layer, for PEFT to wrap."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width_in, width_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, D_out]``."""
        return self.proj(x)


def llama(dtype: torch.dtype) -> LlamaModel:
    """Six small Llama blocks; equal weights at every call."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 9}
    return LlamaModel(LlamaConfig(vocab_size=64, num_key_value_heads=9, **sizes)).to(dtype)


def adapt(base: nn.Module, kind: str, *, rank: int, dropout: float = 0.0, wide: bool = True) -> nn.Module:
    """The base with one contender's adapter in every linear layer.

    Args:
        base: changed in place.
        kind: frozen, peft, own lora or moslora.
        rank: R.
        dropout: on the adapter's input.
        wide: keep the factors in float32 under a bfloat16 base, as PEFT does unless told otherwise; our training loop
            keeps them in the base's dtype and float32 masters in the optimiser.
    """
    options: dict[str, Any] = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": dropout}
    torch.manual_seed(1)
    if kind == "frozen":
        return base.requires_grad_(False)
    if kind == "peft":
        names = {path.rpartition(".")[2] for path, module in base.named_modules() if isinstance(module, nn.Linear)}
        config = peft.LoraConfig(**options, target_modules=sorted(names))
        return peft.get_peft_model(base, config, autocast_adapter_dtype=wide).train()
    own = MoSLoRAConfig(**options, **(PLAIN if kind == "own lora" else {}))
    return add_moslora(base, own, autocast_adapter_dtype=wide).train()


def step(model: nn.Module, kind: str, given: Tensor, *, micro_batches: int = 1) -> Step:
    """One optimiser step's forward and backward passes."""
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    by_name = isinstance(inner, LlamaModel)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    pull = None

    def run() -> None:
        nonlocal pull
        accumulating = kind == "moslora" and micro_batches > 1
        sharing = one_product_per_step(model) if accumulating else nullcontext()
        with use_kernel("fused" if kind == "own lora" else "auto"), sharing as window:
            for index in range(micro_batches):
                if window is not None and index == micro_batches - 1:
                    window.last_micro_batch()
                x = given.detach().requires_grad_()
                y = model(inputs_embeds=x).last_hidden_state if by_name else model(x)
                pull = torch.ones_like(y) if pull is None else pull
                y.backward(pull)
        for parameter in trained:
            parameter.grad = None

    return run


def interleaved(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every contender in every round."""
    for warm in steps.values():
        warm()
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.process_time()
            steps[name]()
            times[name].append(time.process_time() - start)
    return times


def ratio(times: dict[str, list[float]], name: str, against: str) -> float:
    """Median over the rounds of one contender's time over another's."""
    return statistics.median(mine / theirs for mine, theirs in zip(times[name], times[against], strict=True))


def single_rows(rounds: int, tokens: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """One linear layer, every combination."""
    for name, (width_in, width_out), rank, count, dropout in itertools.product(
        DTYPES, SHAPES, RANKS, tokens, (0.0, 0.05)
    ):
        torch.manual_seed(2)
        given = torch.randn(count, width_in).to(DTYPES[name])
        steps = {}
        for kind in ("frozen", "peft", "moslora"):
            torch.manual_seed(0)
            base = Single(width_in, width_out).to(DTYPES[name])
            steps[kind] = step(adapt(base, kind, rank=rank, dropout=dropout), kind, given)
        times = interleaved(steps, rounds)
        yield {
            "case": f"{width_in}->{width_out}", "dtype": name, "rank": rank, "tokens": count, "dropout": dropout,
            "vs_peft": ratio(times, "moslora", "peft"),
            "vs_frozen": ratio(times, "moslora", "frozen"),
            "flop_bound_vs_frozen": 1 + 1.5 * rank * (width_in + width_out) / (width_in * width_out),
        }  # fmt: skip


def model_rows(rounds: int, tokens: int) -> Iterator[dict[str, Any]]:
    """The small Llama, all linear layers, rank 16; our factors as our training loop keeps them, PEFT's both ways."""
    for name, dtype in DTYPES.items():
        torch.manual_seed(2)
        given = torch.randn(1, tokens, 576).to(dtype)
        models = {kind: adapt(llama(dtype), kind, rank=16) for kind in ("frozen", "peft")}
        models |= {kind: adapt(llama(dtype), kind, rank=16, wide=False) for kind in ("own lora", "moslora")}
        steps = {kind: step(model, kind, given) for kind, model in models.items()}
        if name == "bf16":
            narrow, wide = adapt(llama(dtype), "peft", rank=16, wide=False), adapt(llama(dtype), "moslora", rank=16)
            steps |= {"peft bf16": step(narrow, "peft", given), "moslora fp32": step(wide, "moslora", given)}
        times = interleaved(steps, rounds)
        linears = [module for module in models["frozen"].modules() if isinstance(module, nn.Linear)]
        work = sum(4 * layer.in_features * layer.out_features for layer in linears)
        extra = sum(6 * 16 * (layer.in_features + layer.out_features) for layer in linears)
        accumulated = interleaved(
            {kind: step(models[kind], kind, given, micro_batches=MICRO_BATCHES) for kind in ("own lora", "moslora")},
            rounds,
        )
        others = {kind: ratio(times, kind, "frozen") for kind in ("peft", "peft bf16", "moslora fp32") if kind in times}
        yield {
            "case": "llama 576 x 6", "dtype": name, "rank": 16, "tokens": tokens, "dropout": 0.0,
            "vs_peft": ratio(times, "moslora", "peft"),
            "vs_frozen": ratio(times, "moslora", "frozen"),
            "others_vs_frozen": others,
            "flop_bound_vs_frozen": 1 + extra / work,
            "vs_own_lora_one_batch": ratio(times, "moslora", "own lora"),
            "vs_own_lora": ratio(accumulated, "moslora", "own lora"),
        }  # fmt: skip


def saved_row(tokens: int) -> dict[str, Any]:
    """Bytes kept for the backward pass by the linear layers of one Llama block, bf16, counted once per storage."""
    kept = {kind: _saved_bytes(kind, tokens) for kind in ("peft", "moslora")}
    return {
        "case": "linears of a llama block", "dtype": "bf16", "rank": 16, "tokens": tokens, "dropout": 0.0,
        "saved_bytes": kept, "saved_ratio": kept["moslora"] / kept["peft"],
    }  # fmt: skip


def _saved_bytes(kind: str, tokens: int) -> int:
    model = adapt(llama(torch.bfloat16), kind, rank=16)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    block = model.base_model.model.layers[0]
    hidden, inner = (torch.randn(1, tokens, width).bfloat16().requires_grad_() for width in (576, 1536))
    attended = torch.randn_like(hidden).requires_grad_()
    normed = torch.randn_like(hidden).requires_grad_()
    attention, mlp = block.self_attn, block.mlp
    uses = [(attention.q_proj, hidden), (attention.k_proj, hidden), (attention.v_proj, hidden)]
    uses += [(attention.o_proj, attended), (mlp.gate_proj, normed), (mlp.up_proj, normed), (mlp.down_proj, inner)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = [layer(x) for layer, x in uses]
    del results
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


def summarise(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The stable keys."""
    models = {row["dtype"]: row for row in rows if "vs_own_lora" in row}
    singles = [row["vs_peft"] for row in rows if "->" in row["case"]]
    return {
        "overhead_fp32": models["fp32"]["vs_frozen"] - 1,
        "overhead_bf16": models["bf16"]["vs_frozen"] - 1,
        "time_ratio_vs_peft_geomean": statistics.geometric_mean(singles),
        "saved_bytes_ratio_vs_peft_bf16": next(row["saved_ratio"] for row in rows if "saved_ratio" in row),
        "moslora_vs_own_lora": statistics.geometric_mean(row["vs_own_lora"] for row in models.values()),
    }


def show(rows: list[dict[str, Any]], summary: dict[str, float]) -> None:
    """A table for people."""
    print(f"{'case':26} dtype rank tokens drop   vs PEFT  vs frozen  FLOP bound")
    for row in rows:
        if "vs_peft" in row:
            print(
                f"{row['case']:26} {row['dtype']:5} {row['rank']:4} {row['tokens']:6} {row['dropout']:4}   "
                f"{row['vs_peft']:7.3f}  {row['vs_frozen']:9.3f}  {row['flop_bound_vs_frozen']:10.3f}"
            )
    for key, value in summary.items():
        print(f"{key:32} {value:7.3f}   target <= {TARGETS[key]}")


def main() -> int:
    """Measure, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--quick", action="store_true", help="512 tokens only, 3 rounds")
    parser.add_argument("--rounds", type=int, default=0, help="rounds per case (default 5, with --quick 3)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds = options.rounds or (3 if options.quick else 5)
    tokens = (512,) if options.quick else (512, 2048)
    rows: list[dict[str, Any]] = []
    cases = itertools.chain(model_rows(max(rounds, 5), 512), [saved_row(512)], single_rows(rounds, tokens))
    for row in cases:
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    summary = summarise(rows)
    if not options.json:
        show(rows, summary)
        return 0
    versions = {"torch": torch.__version__, "peft": peft.__version__, "mm_moslora": mm_moslora.__version__}
    result = {
        "benchmark": "adapters", "hardware": f"{platform.processor() or platform.machine()}, 1 thread",
        "versions": versions | {"python": platform.python_version()}, "rows": rows, "summary": summary,
    }  # fmt: skip
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
