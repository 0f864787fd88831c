"""Ready-made models on packed rows train on two ranks, sharded, as they do on one, rank without pictures or not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny import make_records
from trials import make_recipe, metrics, write
from vlms import make_vlm

from mm_moslora.config import ModelConfig, VisionConfig

pytestmark = pytest.mark.slow
STAGES = ("none", "zero2", "zero3")
SHAPES = {"blind": ("qwen3_vl", 2), "accumulating": ("llava_next", 4)}
"""A model with features in several layers and one with tiles, and records per step.

Every other record has no picture, so that one of two ranks never sees one, or micro-batches see none.
"""


@pytest.fixture(scope="module")
def runs(parts, ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ready-made")
    mixed = parts | {"records": make_records(folder / "records", 16, text_only_every=2)}
    recipes = {}
    for shape, (family, size) in SHAPES.items():
        model = ModelConfig(vlm=str(make_vlm(folder / family, family)), vision=VisionConfig(mode="adapter"))
        for stage in STAGES:
            recipe = make_recipe(
                mixed, folder / f"{shape}-{stage}", stage, order="sequential", global_batch=size, micro_batch=1, steps=2
            )
            recipes[shape, stage] = write(replace(recipe, model=model))
    ranks.run([path for (_, stage), path in recipes.items() if stage != "none"])
    ranks.run([path for (_, stage), path in recipes.items() if stage == "none"], ranks=1)
    return folder


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stage", STAGES[1:])
def test_losses_and_gradients_are_those_of_one_rank(shape, stage, runs):
    expected, found = (metrics(runs / f"{shape}-{name}") for name in ("none", stage))
    norms = [f"{kind}_norm/{part}" for kind in ("weight", "momentum") for part in ("adapter", "mixer", "vision")]
    for key in ("loss", "grad_norm", *norms):
        assert [line[key] for line in found] == pytest.approx([line[key] for line in expected], rel=1e-5), key
