"""Projectors with parameters of their own train under ZeRO-3 on two ranks as they do unsharded, and are saved whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
from safetensors.torch import load_file
from trials import losses, make_recipe, write

from mm_moslora.config import ProjectorConfig
from mm_moslora.models.load_model import load

pytestmark = pytest.mark.slow
KINDS = ("c_abstractor", "perceiver", "qformer")


@pytest.fixture(scope="module")
def runs(parts, ranks, tmp_path_factory):
    """Every projector at stage 0 and at stage 3, all in one launch."""
    folder = tmp_path_factory.mktemp("projectors")
    recipes = []
    for kind in KINDS:
        for stage in ("zero0", "zero3"):
            recipe = make_recipe(parts, folder / f"{kind}-{stage}", stage, steps=2)
            projector = ProjectorConfig(kind=kind, queries=4, depth=1)
            recipes.append(write(replace(recipe, model=replace(recipe.model, projector=projector))))
    ranks.run(recipes)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_stage_3_gives_the_losses_and_weights_of_stage_0(kind, runs):
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
