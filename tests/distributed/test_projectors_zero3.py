"""Projectors with parameters of their own train under ZeRO-3 on two ranks as they do unsharded, and are saved whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.distributed.test_two_ranks import launch, losses, make_recipe, write
from tiny import make_language, make_records, make_vision

from mm_moslora.config import ProjectorConfig
from mm_moslora.models.load import load

KINDS = ("c_abstractor", "perceiver", "qformer")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every projector at stage 0 and at stage 3, all in one launch."""
    folder = tmp_path_factory.mktemp("projectors")
    parts = {
        "language": make_language(folder / "language"),
        "vision": make_vision(folder / "vision"),
        "records": make_records(folder / "records", 16),
    }
    recipes = []
    for kind in KINDS:
        for stage in ("zero0", "zero3"):
            recipe = make_recipe(parts, folder / f"{kind}-{stage}", stage)
            projector = ProjectorConfig(kind=kind, queries=4, depth=1)
            recipe = replace(
                recipe,
                model=replace(recipe.model, projector=projector),
                adapter=replace(recipe.adapter, dropout=0.0),
                train=replace(recipe.train, steps=2),
            )
            recipes.append(write(recipe, folder))
    launch(recipes)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_stage_3_gives_the_losses_and_weights_of_stage_0(kind: str, runs: Path) -> None:
    assert losses(runs / f"{kind}-zero3") == pytest.approx(losses(runs / f"{kind}-zero0"), rel=1e-5)
    plain, sharded = (
        load_file(runs / f"{kind}-{stage}" / "checkpoint-000002" / "projector.safetensors")
        for stage in ("zero0", "zero3")
    )
    assert plain.keys() == sharded.keys()
    for name, value in plain.items():
        assert value.shape == sharded[name].shape
        assert (value - sharded[name]).abs().max() < 1e-4
    assert load(runs / f"{kind}-zero3").tokens_per_image == 4
