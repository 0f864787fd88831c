"""ZeRO-3: one rank reads the weights, so that the memory of a machine does not grow with its ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import make_tokenizer
from trials import make_recipe, write

pytestmark = pytest.mark.slow
MIB = 2**20


def make_large_language(folder: Path) -> int:
    """Save a Llama with few and wide layers; gives the size of its weights in MiB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=1024, intermediate_size=4096, num_hidden_layers=4,
        num_attention_heads=8, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.uniform_(-0.02, 0.02)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) // MIB


def test_ranks_but_the_first_hold_no_more_than_their_shard_under_zero3(parts, ranks, tmp_path):
    """The peaks hold 90 MiB per rank besides weights: DeepSpeed's modules, the data set, one whole weight."""
    whole = make_large_language(tmp_path / "language")
    assert whole > 200
    found = {}
    for world in (2, 4):
        recipe = make_recipe(
            parts | {"language": tmp_path / "language"}, tmp_path / f"on-{world}", "zero3", micro_batch=1
        )
        ranks.run(["host_memory:prepare_measured", write(recipe)], ranks=world)
        first, *others = json.loads((tmp_path / f"on-{world}" / "peaks.json").read_text())
        assert max(others) < whole * (1 / world + 0.6), (whole, others)
        assert first < whole * (1 + 1 / world + 0.6), (whole, first)
        found[world] = [first, *others]
    assert max(found[4]) < max(found[2])
    assert max(found[4][1:]) < found[2][1]
    assert sum(found[4]) < sum(found[2]) + whole, found
