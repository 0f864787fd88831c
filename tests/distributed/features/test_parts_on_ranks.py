"""Parts of a model on two ranks: ready-made models, projectors, frozen parts, a feature cache, optimisers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from safetensors.torch import load_file
from tiny import make_records
from trials import divided_weights, full, hexed, losses, make_recipe, metrics, with_optimizer, write
from vlms import make_vlm

from mm_moslora.config import ModelConfig, ProjectorConfig, Recipe, VisionConfig
from mm_moslora.models.load_model import load
from mm_moslora.training.checkpointing.checkpoint_folder import rank_folder
from mm_moslora.training.snapshot import OPTIMIZER
from mm_moslora.training.training_loop import train

pytestmark = pytest.mark.slow
STAGES = ("none", "zero2", "zero3")
SHAPES = {
    "blind": ("qwen3_vl", 2, "adapter"),
    "accumulating": ("llava_next", 4, "adapter"),
    "whole": ("qwen2_5_vl", 2, "full"),
}
"""Models with features in several layers, with tiles and with windows, records per step, and how the tower trains.

Every other record has no picture, so that one of two ranks never sees one, or micro-batches see none.
"""


@pytest.fixture(scope="module")
def ready_made(parts, ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ready-made")
    mixed = parts | {"records": make_records(folder / "records", 16, text_only_every=2)}
    recipes, divided = {}, divided_weights(folder / "zero3.json")
    for shape, (family, size, mode) in SHAPES.items():
        model = ModelConfig(vlm=str(make_vlm(folder / family, family)), vision=VisionConfig(mode=mode))
        for stage in STAGES:
            recipe = make_recipe(
                mixed, folder / f"{shape}-{stage}", divided if stage == "zero3" else stage, order="sequential",
                global_batch=size, micro_batch=1, steps=2,
            )  # fmt: skip
            recipes[shape, stage] = write(replace(recipe, model=model))
    ranks.run([path for (_, stage), path in recipes.items() if stage != "none"])
    ranks.run([path for (_, stage), path in recipes.items() if stage == "none"], ranks=1)
    return folder


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stage", STAGES[1:])
def test_losses_and_gradients_are_those_of_one_rank(shape, stage, ready_made):
    expected, found = (metrics(ready_made / f"{shape}-{name}") for name in ("none", stage))
    norms = [f"{kind}_norm/{part}" for kind in ("weight", "momentum") for part in ("adapter", "mixer", "vision")]
    for key in ("loss", "grad_norm", *norms):
        assert [line[key] for line in found] == pytest.approx([line[key] for line in expected], rel=1e-5), key


@pytest.mark.parametrize("stage", STAGES)
def test_a_patch_embedding_that_trains_keeps_its_name_and_shape(stage, ready_made):
    found = load_file(ready_made / f"whole-{stage}" / "checkpoint-000002" / "vision.safetensors")
    assert found["model.visual.patch_embed.proj.weight"].shape == (32, 3, 2, 14, 14)


KINDS = ("c_abstractor", "perceiver", "qformer")


@pytest.fixture(scope="module")
def projectors(parts, ranks, tmp_path_factory):
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
def test_stage_3_gives_the_losses_and_weights_of_stage_0(kind, projectors):
    assert losses(projectors / f"{kind}-zero3") == pytest.approx(losses(projectors / f"{kind}-zero0"), rel=1e-5)
    plain, sharded = (
        load_file(projectors / f"{kind}-{stage}" / "checkpoint-000002" / "projector.safetensors")
        for stage in ("zero0", "zero3")
    )
    assert plain.keys() == sharded.keys()
    for name, value in plain.items():
        assert value.shape == sharded[name].shape
        assert (value - sharded[name]).abs().max() < 1e-4
    assert load(projectors / f"{kind}-zero3").tokens_per_image == 4


def test_a_text_alone_gives_frozen_parts_no_gradient_and_no_error(parts, ranks, tmp_path):
    """Micro-batches in which the projector would have no gradient."""
    mixed = parts | {"records": make_records(tmp_path / "records", 8, text_only_every=2)}

    def recipe(name: str, zero: str) -> Recipe:
        return make_recipe(mixed, tmp_path / name, zero, order="sequential", micro_batch=1, global_batch=4)

    align = [recipe(f"align-{zero}", zero) for zero in ("zero2", "none")]
    align = [replace(item, model=replace(item.model, language_mode="frozen")) for item in align]
    ranks.run([*map(write, align)], ranks=1)
    assert losses(tmp_path / "align-zero2") == pytest.approx(losses(tmp_path / "align-none"), rel=1e-5)


def test_two_ranks_share_a_cache_and_change_no_number(parts, ranks, tmp_path):
    """Ranks find different pictures there, and one step has a rank without any; ZeRO-3 gathers the encoder on all."""
    plain = make_recipe(parts, tmp_path / "plain", "zero3", order="sequential", global_batch=4, micro_batch=1, steps=4)
    vision = replace(plain.model.vision, feature_cache=str(tmp_path / "features"))
    runs = [
        replace(
            plain,
            model=replace(plain.model, vision=vision),
            train=replace(plain.train, output=str(tmp_path / name), steps=steps),
        )
        for name, steps in (("first", 2), ("second", 4), ("third", 4))
    ]
    ranks.run([write(plain), *map(write, runs)])
    for name in ("second", "third"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert 0 < metrics(tmp_path / "second")[-1]["feature_cache_hits"] < 1
    assert metrics(tmp_path / "third")[-1]["feature_cache_hits"] == 1


@pytest.mark.parametrize("name", ["adamw_8bit", "muon"])
def test_two_ranks_share_the_checkpoint_and_one_goes_on_from_it(name, parts, ranks, tmp_path):
    """`train.zero: auto` is ZeRO-0, and every rank writes the states of its part of the parameters."""

    def recipe(folder):
        return with_optimizer(full(make_recipe(parts, tmp_path / folder, "auto", save_every=2, keep_last=0)), name)

    straight, run, other = map(recipe, ("straight", "run", "other"))
    ranks.run([write(straight), f"{write(run)}@2", write(run), f"{write(other)}@2"])
    assert hexed(tmp_path / "run") == hexed(tmp_path / "straight")
    written = [set(load_file(rank_folder(tmp_path / "run" / "checkpoint-000004", rank) / OPTIMIZER)) for rank in (0, 1)]
    assert all(written)
    assert not written[0] & written[1]
    assert train(other).finished
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "straight"), rel=2e-3)
