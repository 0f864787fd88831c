"""What travels between two ranks in an optimiser step, and what they hold while a run is prepared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import make_language, make_tokenizer
from trials import STAGES, make_recipe, metrics, write

pytestmark = pytest.mark.slow
LAYERS, MICRO_BATCHES = 4, 2
DIRECTIONS = 2
SETTINGS = {"micro_batch": 2, "steps": 3}


@pytest.fixture(scope="module")
def counted(parts, ranks, tmp_path_factory) -> Path:
    """Two ranks, two micro-batches a step; ZeRO-3 cuts up all but the adapters and fetches nothing ahead."""
    folder = tmp_path_factory.mktemp("traffic")
    given = parts | {"language": make_language(folder / "language", layers=LAYERS)}
    preset = json.loads((Path(__file__).parents[2] / "deepspeed_configs" / "zero3.json").read_text())
    preset["zero_optimization"] |= {
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_reuse_distance": 0,
    }
    (folder / "small.json").write_text(json.dumps(preset))
    recipes = [make_recipe(given, folder / stage, stage, **SETTINGS) for stage in STAGES[:3]]
    small = str(folder / "small.json")
    recipes += [make_recipe(given, folder / "zero3", small, **SETTINGS)]
    recipes += [make_recipe(given, folder / "zero3-checkpointing", small, gradient_checkpointing=True, **SETTINGS)]
    stock = make_recipe(given, folder / "zero3-stock", small, **SETTINGS)
    recipes += [replace(stock, model=replace(stock.model, lean_layers=False))]
    ranks.run(["traffic:train_counting", *map(write, recipes)])
    return folder


def traffic(folder: Path) -> dict:
    """Of the last step."""
    return json.loads((folder / "traffic.json").read_text())


@pytest.mark.parametrize("stage", STAGES[:3])
def test_only_what_trains_travels(stage: str, counted: Path) -> None:
    """Gradients of adapters and projector, and their new values where ZeRO splits them; the rest costs nothing."""
    found = traffic(counted / stage)
    trained = 4 * found["trainable"]
    assert trained < 4 * found["parameters"] / 9
    gradients = MICRO_BATCHES if stage == "zero2" else 1
    assert trained <= found["bytes"]["allreduce"] <= gradients * trained
    assert found["bytes"].get("allgather_base", 0) == (0 if stage == "zero0" else trained)
    assert {"allreduce"} <= set(found["calls"]) <= {"allreduce", "allgather_base"}


@pytest.mark.parametrize("run", ["zero3", "zero3-checkpointing"])
def test_zero3_gathers_a_layer_once_in_each_direction(run: str, counted: Path) -> None:
    found = traffic(counted / run)
    assert found["layer"] > 0
    assert found["sizes"][str(found["layer"])] == LAYERS * DIRECTIONS * MICRO_BATCHES
    assert found["bytes"]["reduce_scatter_base"] == MICRO_BATCHES * 4 * found["trainable"]


def test_zero3_leaves_adapters_whole(counted: Path) -> None:
    found = traffic(counted / "zero3")
    assert found["adapters"] > 0
    assert found["adapters_cut_up"] == 0


def test_zero3_gathers_nothing_else_by_the_piece(counted: Path) -> None:
    tower, patches, positions, projector, words_and_head = 3, 1, 1, 2 * DIRECTIONS, 3
    in_a_pass = LAYERS * DIRECTIONS + tower + patches + positions + projector + words_and_head
    small_ones_after_the_step = 1
    found = traffic(counted / "zero3")
    assert found["calls"]["allgather_base"] == MICRO_BATCHES * in_a_pass + small_ones_after_the_step
    assert found["calls"]["reduce_scatter_base"] == MICRO_BATCHES


@pytest.mark.parametrize("run", [*STAGES, "zero3-checkpointing"])
def test_lean_layers_run_on_every_stage(run: str, counted: Path) -> None:
    repeated = 2 if run.endswith("checkpointing") else 1
    assert traffic(counted / run)["lean_passes"] == repeated * LAYERS * MICRO_BATCHES
    assert traffic(counted / "zero3-stock")["lean_passes"] == 0
    for key in ("loss", "grad_norm"):
        found, lean, stock = ([line[key] for line in metrics(counted / n)] for n in (run, "zero0", "zero3-stock"))
        assert found == pytest.approx(lean, rel=1e-5), key
        assert found == pytest.approx(stock, rel=1e-5), key


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
        ranks.run(["traffic:prepare_measured", write(recipe)], ranks=world)
        first, *others = json.loads((tmp_path / f"on-{world}" / "peaks.json").read_text())
        assert max(others) < whole * (1 / world + 0.6), (whole, others)
        assert first < whole * (1 + 1 / world + 0.6), (whole, first)
        found[world] = [first, *others]
    assert max(found[4]) < max(found[2])
    assert max(found[4][1:]) < found[2][1]
    assert sum(found[4]) < sum(found[2]) + whole, found
