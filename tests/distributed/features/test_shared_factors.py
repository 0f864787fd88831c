"""Shared factors on two ranks and cut up by ZeRO: the numbers of plain torch, also resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trials import HALF, STEPS, hexed, losses, make_recipe, metrics, weights, write

from mm_moslora.adapters.folder_format import OWN_WEIGHTS

pytestmark = pytest.mark.slow
SHARES = {"inputs": "zero2", "layers": "zero3"}


@pytest.fixture(scope="module")
def runs(parts, ranks, tmp_path_factory) -> Path:
    """Two ranks straight and in two halves, with checkpointing; and one process of plain torch."""
    folder = tmp_path_factory.mktemp("shared")

    def recipe(name: str, kind: str, zero: str) -> str:
        made = make_recipe(parts, folder / f"{kind}-{name}", zero, micro_batch=2, gradient_checkpointing=True)
        share = "layers:2" if kind == "layers" else "inputs"
        adapter = replace(made.adapter, mixer_init="orthogonal", share=share)
        return write(replace(made, adapter=adapter, optim=replace(made.optim, mixer_factor=4.0)))

    ranks.run(
        [
            *(recipe("straight", *item) for item in SHARES.items()),
            *(f"{recipe('halves', *item)}@{HALF}" for item in SHARES.items()),
        ]
    )
    ranks.run([recipe("halves", *item) for item in SHARES.items()])
    ranks.run([recipe("plain", kind, "none") for kind in SHARES], ranks=1)
    return folder


@pytest.mark.parametrize("kind", SHARES)
def test_they_give_the_numbers_of_plain_torch(kind, runs):
    plain = runs / f"{kind}-plain"
    assert losses(runs / f"{kind}-straight") == pytest.approx(losses(plain), rel=1e-5)
    norms = [[line["grad_norm"] for line in metrics(run)] for run in (runs / f"{kind}-straight", plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize("kind", SHARES)
def test_a_resumed_run_continues_exactly(kind, runs):
    assert hexed(runs / f"{kind}-halves") == hexed(runs / f"{kind}-straight")
    assert weights(runs / f"{kind}-halves", STEPS) == weights(runs / f"{kind}-straight", STEPS)


@pytest.mark.parametrize("kind", SHARES)
def test_every_layer_has_the_masters_of_what_it_shares_in_the_folder(kind, runs):
    factors = load_file(runs / f"{kind}-straight" / f"checkpoint-{STEPS:06d}" / "adapter" / OWN_WEIGHTS)
    first, second = (
        ("layers.0.self_attn.q_proj.lora_B", "layers.1.self_attn.q_proj.lora_B")
        if kind == "layers"
        else ("layers.1.mlp.gate_proj.lora_A", "layers.1.mlp.up_proj.lora_A")
    )
    found = [next(value for name, value in factors.items() if end in name) for end in (first, second)]
    assert torch.equal(*found)
    assert found[0].any()
