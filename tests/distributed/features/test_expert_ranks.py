"""Adapters of experts train on two ranks under ZeRO-3 as they do unsharded, and are saved and measured whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import make_experts
from trials import losses, make_recipe, write

from mm_moslora.models.load_model import load

pytestmark = pytest.mark.slow
STAGES = ("zero0", "zero2", "zero3")


@pytest.fixture(scope="module")
def runs(parts, ranks, tmp_path_factory) -> Path:
    """Every stage, all in one launch."""
    folder = tmp_path_factory.mktemp("experts")
    language = str(make_experts(folder / "language"))
    recipes = []
    for stage in STAGES:
        made = make_recipe(parts, folder / stage, stage, steps=3, log_every=1)
        adapter = replace(made.adapter, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
        recipes.append(write(replace(made, model=replace(made.model, language=language), adapter=adapter)))
    ranks.run(recipes)
    return folder


@pytest.mark.parametrize("stage", STAGES[1:])
def test_sharded_stages_give_the_losses_weights_and_balance_of_stage_0(stage, runs):
    assert losses(runs / stage) == pytest.approx(losses(runs / "zero0"), rel=1e-5)
    plain, sharded = (
        load_file(runs / name / "checkpoint-000003" / "adapter" / "moslora.safetensors") for name in ("zero0", stage)
    )
    assert plain.keys() == sharded.keys()
    assert sum("experts" in name and "lora_mixer" in name for name in plain) == 4
    for name, value in plain.items():
        assert value.shape == sharded[name].shape
        assert (value - sharded[name]).abs().max() < 1e-4, name
        assert "lora_B" not in name or value.any(), name
    first, second = (json.loads((runs / name / "experts.json").read_text()) for name in ("zero0", stage))
    assert first == {path: pytest.approx(row, abs=0.02) for path, row in second.items()}
    assert load(runs / stage).peft_model is None
