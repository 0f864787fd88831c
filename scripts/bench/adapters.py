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
import math
import statistics
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import peft
import torch
from harness import PRODUCTS, Benchmark, Case, Row, interleaved, kernel_seconds, ratio
from llava_models import DTYPES
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from mm_moslora.adapters import MoSLoRAConfig, add_moslora, use_kernel
from mm_moslora.models.meta_model import kept_bytes

SHAPES = ((576, 1536), (2048, 2048), (2048, 5504))
RANK, RANKS = 16, (16, 64)
"""Of the small Llama, and of single layers."""
PLAIN: dict[str, Any] = {"mixer_init": "identity", "mixer_trainable": False}
MODEL, OWN, BYTES = "llama 576 x 6", "llama 576 x 6, own LoRA", "linears of a llama block"
SEQUENCE = 512
"""Tokens of a sequence; 2,048 tokens are four sequences."""

Step = Callable[[], None]


def llama(dtype: torch.dtype) -> LlamaModel:
    """Six small Llama blocks; equal weights at every call."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 9}
    return LlamaModel(LlamaConfig(vocab_size=64, num_key_value_heads=9, **sizes)).to(dtype)


def adapt(base: nn.Module, kind: str, *, rank: int, dropout: float = 0.0, wide: bool = True) -> nn.Module:
    """The base, which is changed in place, with one contender's adapter in every linear layer.

    Wide factors are in float32 under a bfloat16 base, PEFT's default. This project's training loop keeps them in the
    base's dtype, and float32 masters in the optimiser.
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


def single_row(name: str, widths: tuple[int, int], rank: int, tokens: int, dropout: float, rounds: int) -> Row:
    """One linear layer."""
    torch.manual_seed(2)
    inputs, steps = torch.randn(tokens, widths[0]).to(DTYPES[name]), {}
    for kind in ("frozen", "peft", "moslora"):
        torch.manual_seed(0)
        base = nn.Sequential(OrderedDict(proj=nn.Linear(*widths, bias=False))).to(DTYPES[name])
        steps[kind] = step(adapt(base, kind, rank=rank, dropout=dropout), kind, inputs)
    times = interleaved(steps, rounds)
    return {
        "vs_peft": ratio(times, "moslora", "peft"),
        "vs_frozen": ratio(times, "moslora", "frozen"),
        "flop_bound_vs_frozen": 1 + 1.5 * rank * sum(widths) / math.prod(widths),
    }


def llama_steps(name: str, tokens: int, contenders: Mapping[str, tuple[str, bool]]) -> dict[str, Step]:
    """Steps of the small Llama for contenders, whose adapters are of a kind and wide or not."""
    torch.manual_seed(2)
    inputs = torch.randn(tokens // SEQUENCE, SEQUENCE, 576).to(DTYPES[name])
    return {
        contender: step(adapt(llama(DTYPES[name]), kind, rank=RANK, wide=wide), kind, inputs)
        for contender, (kind, wide) in contenders.items()
    }


def model_row(name: str, tokens: int, rounds: int) -> Row:
    """The small Llama with adapters in all linear layers; this project's factors as in training, PEFT's both ways."""
    contenders = {"frozen": ("frozen", True), "peft": ("peft", True), "moslora": ("moslora", False)}
    if name == "bf16":
        contenders |= {"peft bf16": ("peft", False), "moslora fp32": ("moslora", True)}
    steps = llama_steps(name, tokens, contenders)
    times = interleaved(steps, rounds)
    linears = [module for module in llama(DTYPES[name]).modules() if isinstance(module, nn.Linear)]
    work = sum(4 * layer.in_features * layer.out_features for layer in linears)
    extra = sum(6 * RANK * (layer.in_features + layer.out_features) for layer in linears)
    thin, _ = kernel_seconds(steps["moslora"], _is_thin)
    return {
        "vs_peft": ratio(times, "moslora", "peft"),
        "vs_frozen": ratio(times, "moslora", "frozen"),
        "others_vs_frozen": {kind: ratio(times, kind, "frozen") for kind in times if kind not in ("frozen", "moslora")},
        "flop_bound_vs_frozen": 1 + extra / work,
        "products_vs_frozen": 1 + thin / statistics.median(times["frozen"]),
    }


def _is_thin(name: str, shapes: list[list[int]]) -> bool:
    """Whether an operator is a product with a factor of an adapter, or with up to three stacked factors."""
    return name in PRODUCTS and min(size for shape in shapes for size in shape) <= 3 * RANK


def own_lora_row(name: str, rounds: int) -> Row:
    """The small Llama with and without mixers under the same kernel."""
    steps = llama_steps(name, SEQUENCE, {kind: (kind, False) for kind in ("own lora", "moslora")})
    return {"vs_own_lora": ratio(interleaved(steps, rounds), "moslora", "own lora")}


def saved_row() -> Row:
    """Bytes that the linear layers of one Llama block save for the backward pass, counted once per storage."""
    saved = {kind: _saved_bytes(kind, SEQUENCE) for kind in ("peft", "moslora")}
    return {"saved_bytes": saved, "saved_ratio": saved["moslora"] / saved["peft"]}


def _saved_bytes(kind: str, tokens: int) -> int:
    model = adapt(llama(torch.bfloat16), kind, rank=RANK)
    block = model.base_model.model.layers[0]
    hidden, inner = (torch.randn(1, tokens, width).bfloat16().requires_grad_() for width in (576, 1536))
    attended = torch.randn_like(hidden).requires_grad_()
    normed = torch.randn_like(hidden).requires_grad_()
    attention, mlp = block.self_attn, block.mlp
    uses = [(attention.q_proj, hidden), (attention.k_proj, hidden), (attention.v_proj, hidden)]
    uses += [(attention.o_proj, attended), (mlp.gate_proj, normed), (mlp.up_proj, normed), (mlp.down_proj, inner)]
    return kept_bytes(lambda: [layer(x) for layer, x in uses], model)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """All rows; models before single layers."""
    sizes, rounds = (SEQUENCE,) if options.quick else (SEQUENCE, 2048), options.rounds

    def case(what: str, dtype: str, measure: Callable[[], Row], *, rank: int = RANK, tokens: int = SEQUENCE, **more):
        names = {"case": what, "dtype": dtype, "rank": rank, "tokens": tokens, "dropout": 0.0}
        return Case(names=names | more, measure=measure)

    for tokens, name in itertools.product(sizes, DTYPES):
        yield case(MODEL, name, partial(model_row, name, tokens, rounds), tokens=tokens)
    for name in DTYPES:
        yield case(OWN, name, partial(own_lora_row, name, rounds))
    yield case(BYTES, "bf16", saved_row)
    for name, widths, rank, tokens, dropout in itertools.product(DTYPES, SHAPES, RANKS, sizes, (0.0, 0.05)):
        measure = partial(single_row, name, widths, rank, tokens, dropout, rounds)
        what = f"{widths[0]}->{widths[1]}"
        yield case(what, name, measure, rank=rank, tokens=tokens, dropout=dropout)


def summarise(rows: list[Row]) -> dict[str, float]:
    """The summary under stable keys."""
    # The larger batch, which with --quick is the only one.
    models = {row["dtype"]: row for row in sorted(rows, key=lambda row: row["tokens"]) if row["case"] == MODEL}
    singles = [row["vs_peft"] for row in rows if "->" in row["case"]]
    return {
        "overhead_fp32": models["fp32"]["vs_frozen"] - 1,
        "overhead_bf16": models["bf16"]["vs_frozen"] - 1,
        "time_ratio_vs_peft_geomean": statistics.geometric_mean(singles),
        "saved_bytes_ratio_vs_peft_bf16": next(row["saved_ratio"] for row in rows if row["case"] == BYTES),
        "moslora_vs_own_lora": statistics.geometric_mean(row["vs_own_lora"] for row in rows if row["case"] == OWN),
    }


def lines(row: Row) -> Iterator[dict[str, str]]:
    """Ratios of times; the summary has the others."""
    if "vs_peft" in row:
        yield {
            "case": row["case"], "dtype": row["dtype"], "rank": str(row["rank"]), "tokens": str(row["tokens"]),
            "dropout": str(row["dropout"]), "over PEFT": f"{row['vs_peft']:.3f}",
            "over frozen": f"{row['vs_frozen']:.3f}", "FLOP bound": f"{row['flop_bound_vs_frozen']:.3f}",
            "products": f"{row['products_vs_frozen']:.3f}" if "products_vs_frozen" in row else "",
        }  # fmt: skip


BENCHMARK = Benchmark(
    name="adapters", about=__doc__, cases=cases, lines=lines, summarise=summarise,
    targets={
        "overhead_fp32": "<= 0.12", "overhead_bf16": "<= 0.07", "time_ratio_vs_peft_geomean": "<= 0.85",
        "saved_bytes_ratio_vs_peft_bf16": "<= 0.5", "moslora_vs_own_lora": "<= 1.01",
    },
    packages=("peft",), quick="512 tokens only", keeps_memory=True,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
