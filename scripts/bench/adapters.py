#!/usr/bin/env python
"""The cost of an adapter: MoSLoRA against PEFT's LoRA, this project's LoRA, and the frozen model.

    python scripts/bench/adapters.py                    print a table; minutes
    python scripts/bench/adapters.py --json             one object on stdout
    python scripts/bench/adapters.py --rows rows.jsonl  keep finished rows there; a stopped run continues
    python scripts/bench/adapters.py --quick            512 tokens and 3 rounds

All contenders of a case run in turn in one process, on the same weights and inputs, in an order that rotates from
round to round. Times are process CPU times of one thread. Every figure is the median of the ratios of single rounds.
Saved bytes and FLOPs are counted. A step is a forward and a backward pass down to the input. glibc keeps memory between
steps, as in training on a CPU: the cost of fresh pages differs between machines and would hide that of the adapters.

Two bounds accompany the cost relative to the frozen model. The FLOP bound is the cost of the adapters' products at the
speed of the base's products. The product bound is the time of torch's own kernels for them within the step. The
products have one small dimension, so memory bandwidth limits them, not arithmetic.
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
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import peft
import torch
import transformers
from json_output import results_alone
from measuring import PRODUCTS, Rows, head, interleaved, kernel_seconds, ratio, settings_of
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel
from yardstick import saved_by

from mm_moslora.adapters import MoSLoRAConfig, add_moslora, use_kernel
from mm_moslora.utils.hardware import keep_freed_memory
from mm_moslora.utils.progress_bar import Progress

SHAPES = ((576, 1536), (2048, 2048), (2048, 5504))
RANKS = (16, 64)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PLAIN: dict[str, Any] = {"mixer_init": "identity", "mixer_trainable": False}
TARGETS = {"overhead_fp32": 0.12, "overhead_bf16": 0.07, "time_ratio_vs_peft_geomean": 0.85}
TARGETS |= {"saved_bytes_ratio_vs_peft_bf16": 0.5, "moslora_vs_own_lora": 1.01}

MODEL, OWN, BYTES = "llama 576 x 6", "llama 576 x 6, own LoRA", "linears of a llama block"
SEQUENCE = 512
"""Tokens of a sequence; 2,048 tokens are the four sequences of the yardstick's batch."""

Step = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """The settings of one row."""

    case: str
    """`MODEL`, `OWN`, `BYTES`, or the widths of a single linear layer."""
    dtype: str
    rank: int
    tokens: int
    dropout: float = 0.0

    @property
    def widths(self) -> tuple[int, int]:
        """``(D_in, D_out)`` of a single layer."""
        width_in, width_out = self.case.split("->")
        return int(width_in), int(width_out)

    @property
    def weight(self) -> float:
        """Estimated share of the run's time, in units of a 2048 x 2048 layer on 2048 tokens in bfloat16."""
        if self.case == BYTES:
            return 0.0
        if self.case in (MODEL, OWN):
            return self.tokens / 2**10 * (1.0 if self.case == MODEL else 2.5)
        width_in, width_out = self.widths
        return width_in * width_out * self.tokens / 2**33 * (1.5 if self.dtype == "fp32" else 1.0)


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
        base: the model; changed in place.
        kind: frozen, peft, own lora or moslora.
        rank: R.
        dropout: dropout on the adapter's input.
        wide: keep the factors in float32 under a bfloat16 base, PEFT's default; this project's training loop keeps them
            in the base's dtype, and float32 masters in the optimiser.
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


def step(model: nn.Module, kind: str, inputs: Tensor) -> Step:
    """Forward and backward pass of one optimiser step."""
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    by_name = isinstance(inner, LlamaModel)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    pull = None

    def run() -> None:
        nonlocal pull
        with use_kernel(model, "fused" if kind == "own lora" else "auto"):
            x = inputs.detach().requires_grad_()
            y = model(inputs_embeds=x).last_hidden_state if by_name else model(x)
            pull = torch.ones_like(y) if pull is None else pull
            y.backward(pull)
        for parameter in trained:
            parameter.grad = None

    return run


def single_row(case: Case, rounds: int) -> dict[str, Any]:
    """One linear layer."""
    torch.manual_seed(2)
    width_in, width_out = case.widths
    inputs = torch.randn(case.tokens, width_in).to(DTYPES[case.dtype])
    steps = {}
    for kind in ("frozen", "peft", "moslora"):
        torch.manual_seed(0)
        base = Single(width_in, width_out).to(DTYPES[case.dtype])
        steps[kind] = step(adapt(base, kind, rank=case.rank, dropout=case.dropout), kind, inputs)
    times = interleaved(steps, rounds)
    return {
        "vs_peft": ratio(times, "moslora", "peft"),
        "vs_frozen": ratio(times, "moslora", "frozen"),
        "flop_bound_vs_frozen": 1 + 1.5 * case.rank * (width_in + width_out) / (width_in * width_out),
    }


def model_row(case: Case, rounds: int) -> dict[str, Any]:
    """The small Llama with adapters in all linear layers; this project's factors as in training, PEFT's both ways."""
    torch.manual_seed(2)
    name, rank, dtype = case.dtype, case.rank, DTYPES[case.dtype]
    inputs = torch.randn(case.tokens // SEQUENCE, SEQUENCE, 576).to(dtype)
    models = {kind: adapt(llama(dtype), kind, rank=rank) for kind in ("frozen", "peft")}
    models["moslora"] = adapt(llama(dtype), "moslora", rank=rank, wide=False)
    steps = {kind: step(model, kind, inputs) for kind, model in models.items()}
    if name == "bf16":
        steps["peft bf16"] = step(adapt(llama(dtype), "peft", rank=rank, wide=False), "peft", inputs)
        steps["moslora fp32"] = step(adapt(llama(dtype), "moslora", rank=rank), "moslora", inputs)
    times = interleaved(steps, rounds)
    linears = [module for module in models["frozen"].modules() if isinstance(module, nn.Linear)]
    work = sum(4 * layer.in_features * layer.out_features for layer in linears)
    extra = sum(6 * rank * (layer.in_features + layer.out_features) for layer in linears)
    thin, _ = kernel_seconds(steps["moslora"], partial(_is_thin, rank=rank))
    others = {kind: ratio(times, kind, "frozen") for kind in ("peft", "peft bf16", "moslora fp32") if kind in times}
    return {
        "vs_peft": ratio(times, "moslora", "peft"),
        "vs_frozen": ratio(times, "moslora", "frozen"),
        "others_vs_frozen": others,
        "flop_bound_vs_frozen": 1 + extra / work,
        "products_vs_frozen": 1 + thin / statistics.median(times["frozen"]),
    }


def _is_thin(name: str, shapes: list[list[int]], *, rank: int) -> bool:
    """Whether an operator is a product with a factor of an adapter, or with up to three stacked factors."""
    return name in PRODUCTS and min(size for shape in shapes for size in shape) <= 3 * rank


def own_lora_row(case: Case, rounds: int) -> dict[str, Any]:
    """The small Llama with and without mixers under the same kernel."""
    torch.manual_seed(2)
    dtype = DTYPES[case.dtype]
    inputs = torch.randn(case.tokens // SEQUENCE, SEQUENCE, 576).to(dtype)
    kinds = ("own lora", "moslora")
    models = {kind: adapt(llama(dtype), kind, rank=case.rank, wide=False) for kind in kinds}
    steps = {kind: step(model, kind, inputs) for kind, model in models.items()}
    return {"vs_own_lora": ratio(interleaved(steps, rounds), "moslora", "own lora")}


def saved_row(case: Case, rounds: int) -> dict[str, Any]:
    """Bytes that the linear layers of one Llama block save for the backward pass, counted once per storage."""
    saved = {kind: _saved_bytes(kind, case.tokens) for kind in ("peft", "moslora")}
    return {"saved_bytes": saved, "saved_ratio": saved["moslora"] / saved["peft"]}


def _saved_bytes(kind: str, tokens: int) -> int:
    model = adapt(llama(torch.bfloat16), kind, rank=16)
    block = model.base_model.model.layers[0]
    hidden, inner = (torch.randn(1, tokens, width).bfloat16().requires_grad_() for width in (576, 1536))
    attended = torch.randn_like(hidden).requires_grad_()
    normed = torch.randn_like(hidden).requires_grad_()
    attention, mlp = block.self_attn, block.mlp
    uses = [(attention.q_proj, hidden), (attention.k_proj, hidden), (attention.v_proj, hidden)]
    uses += [(attention.o_proj, attended), (mlp.gate_proj, normed), (mlp.up_proj, normed), (mlp.down_proj, inner)]
    return saved_by(model, lambda: [layer(x) for layer, x in uses])


def cases(tokens: tuple[int, ...]) -> list[Case]:
    """All rows; models before single layers."""
    whole = [
        *(Case(MODEL, dtype, 16, count) for count in tokens for dtype in DTYPES),
        *(Case(OWN, dtype, 16, SEQUENCE) for dtype in DTYPES),
        Case(BYTES, "bf16", 16, SEQUENCE),
    ]
    singles = [
        Case(f"{width_in}->{width_out}", dtype, rank, count, dropout)
        for dtype, (width_in, width_out), rank, count, dropout in itertools.product(
            DTYPES, SHAPES, RANKS, tokens, (0.0, 0.05)
        )
    ]
    return [*whole, *singles]


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """One row."""
    kinds: dict[str, Callable[[Case, int], dict[str, Any]]] = {MODEL: model_row, OWN: own_lora_row, BYTES: saved_row}
    return asdict(case) | kinds.get(case.case, single_row)(case, rounds)


def run(wanted: list[Case], rounds: int, rows: Rows) -> list[dict[str, Any]]:
    """Measure the missing rows; returns the rows in the order of `wanted`."""
    share = 100 / sum(case.weight for case in wanted)
    measured = {case: row for case in wanted if (row := rows.find(**asdict(case))) is not None}
    ready = sum(case.weight for case in measured) * share
    with Progress("adapters", 100, unit="part", initial=round(ready)) as progress:
        for case in wanted:
            if case in measured:
                continue
            measured[case] = rows.add(measure(case, rounds))
            ready += case.weight * share
            progress.update(round(ready), f"{case.case} {case.dtype} r {case.rank}, {case.tokens} tokens")
    return [measured[case] for case in wanted]


def summarise(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The summary under stable keys."""
    # The yardstick's batch, which with --quick is the only one.
    models = {row["dtype"]: row for row in sorted(rows, key=lambda row: row["tokens"]) if row["case"] == MODEL}
    singles = [row["vs_peft"] for row in rows if "->" in row["case"]]
    return {
        "overhead_fp32": models["fp32"]["vs_frozen"] - 1,
        "overhead_bf16": models["bf16"]["vs_frozen"] - 1,
        "time_ratio_vs_peft_geomean": statistics.geometric_mean(singles),
        "saved_bytes_ratio_vs_peft_bf16": next(row["saved_ratio"] for row in rows if row["case"] == BYTES),
        "moslora_vs_own_lora": statistics.geometric_mean(row["vs_own_lora"] for row in rows if row["case"] == OWN),
    }


def show(rows: list[dict[str, Any]], summary: dict[str, float]) -> None:
    """Print the table."""
    print(f"{'case':26} dtype rank tokens drop   vs PEFT  vs frozen  FLOP bound  products")
    for row in rows:
        if "vs_peft" in row:
            print(
                f"{row['case']:26} {row['dtype']:5} {row['rank']:4} {row['tokens']:6} {row['dropout']:4}   "
                f"{row['vs_peft']:7.3f}  {row['vs_frozen']:9.3f}  {row['flop_bound_vs_frozen']:10.3f}"
                + (f"  {row['products_vs_frozen']:8.3f}" if "products_vs_frozen" in row else "")
            )
    for key, value in summary.items():
        print(f"{key:32} {value:7.3f}   target <= {TARGETS[key]}")


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--quick", action="store_true", help="512 tokens only, 3 rounds")
    parser.add_argument("--rounds", type=int, default=0, help="rounds per case (default 5, with --quick 3)")
    parser.add_argument("--rows", type=Path, help="JSON Lines file of finished rows; only missing rows are measured")
    options = parser.parse_args()
    output = results_alone() if options.json else sys.stdout
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    keep_freed_memory()
    rounds = options.rounds or (3 if options.quick else 5)
    opening = head("adapters", "peft")
    stored = Rows(options.rows, settings_of(opening, rounds=rounds))
    rows = run(cases((512,) if options.quick else (512, 2048)), rounds, stored)
    summary = summarise(rows)
    if options.json:
        print(json.dumps(opening | {"rows": rows, "summary": summary}), file=output)
    else:
        show(rows, summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
