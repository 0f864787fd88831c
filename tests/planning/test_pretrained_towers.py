"""Plans with ready-made models and tiles: counts, tiles and kept bytes are those of the real model."""

from __future__ import annotations

import pytest
from PIL import Image
from planning_configs import memory_of
from tiny import make_language, make_vision
from vlms import FAMILIES, make_vlm

from mm_moslora import cli
from mm_moslora.config import Recipe
from mm_moslora.models.assembly import load_parts
from mm_moslora.models.batching.padded_batch import picture_inputs
from mm_moslora.models.meta_model import kept_bytes
from mm_moslora.models.pretrained_vlm import PICTURE
from mm_moslora.models.trainable_parts import attach_adapters, component_table
from mm_moslora.planning.run_plan import DataSize, plan
from mm_moslora.training.metrics.gpu_specs import parse_gpus
from mm_moslora.training.parameter_groups import parameter_groups
from mm_moslora.utils.errors import ConfigError

TILES = {"llava_next": 5, "llava_onevision": 5, "smolvlm": 5, "idefics3": 5, "internvl": 5}
"""Of a picture of 640 x 480 pixels, the whole view included; all other families look at it once."""


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_in_a_ready_made_tower_are_planned_as_they_train(family: str, tmp_path) -> None:
    model = {"vlm": str(make_vlm(tmp_path / family, family)), "vision": {"mode": "adapter"}}
    optim = {"lr": 1e-4, "vision_lr": 2e-4, "projector_lr": 3e-4, "lora_plus_ratio": 4.0, "mixer_factor": 3}
    recipe = Recipe.from_dict({"model": model, "adapter": {"rank": 4}, "optim": optim})
    assembly = load_parts(recipe.model)
    attach_adapters(assembly, recipe.model, recipe.adapter)
    real = {row.name: (row.total, row.trainable) for row in component_table(assembly)}

    rates = {group.name: group.peak_lr for group in parameter_groups(assembly.model, recipe.optim)}
    of_the_tower = {"vision": 2e-4, "vision B": 8e-4, "vision mixer": pytest.approx(6e-4)}
    assert rates == {"adapter": 1e-4, "adapter B": 4e-4, "mixer": pytest.approx(3e-4), **of_the_tower}

    found = plan(recipe, parse_gpus("8xA100-80G"), DataSize(samples=1000, tokens=300))
    parts = dict(found.cost.parts)
    mixers = [parts.pop(name) for name in ("mixer", "vision mixer")]
    assert parts | {"mixer": tuple(map(sum, zip(*mixers, strict=True)))} == real

    (seen,) = assembly.image_processing.process([Image.new("RGB", PICTURE, "white")])
    assert found.picture == PICTURE
    assert found.cost.tokens_per_image == len(seen.placeholders)
    assert found.cost.picture.tiles == TILES.get(family, 1)
    inputs = picture_inputs(assembly.model.bfloat16().train(), seen.tensors.pop("pixel_values"), seen.tensors)
    kept = kept_bytes(lambda: assembly.model.base_model.get_image_features(**inputs), assembly.model)
    assert found.cost.picture.kept == pytest.approx(kept, rel=0.15)  # of few patches
    assert found.flops.vision > 0


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_checkpointing_a_ready_made_tower_is_planned(family: str, tmp_path) -> None:
    model = {"vlm": str(make_vlm(tmp_path / family, family)), "vision": {"mode": "adapter"}}
    plain, again = (
        Recipe.from_dict({"model": model, "train": {"vision_gradient_checkpointing": wanted}})
        for wanted in (False, True)
    )
    data = DataSize(samples=1000, tokens=300)
    found, cheaper = (plan(recipe, parse_gpus("8xA100-80G"), data) for recipe in (plain, again))
    assert 0 < cheaper.cost.picture.kept < found.cost.picture.kept
    assert found.flops.vision < cheaper.flops.vision < 1.5 * found.flops.vision


@pytest.mark.parametrize("family", ["llava_next", "internvl", "qwen2_5_vl"])
def test_a_plan_says_what_a_picture_of_the_size_asked_for_takes(family: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    folder = make_vlm(tmp_path / "vlm", family)
    (tmp_path / "recipe.yaml").write_text(f"model:\n  vlm: {folder}\n")
    words = ["plan", str(tmp_path / "recipe.yaml"), "--gpus", "1xA100-80G", "--samples", "9"]
    words += ["--tokens-per-sample", "99", "--image-size"]
    assert cli.run([*words, "32x32"]) == 0
    tokens = {"llava_next": "3 tiles, 36", "internvl": "6", "qwen2_5_vl": "1"}[family]
    assert f"Pictures: of 32 x 32 pixels (--image-size), {tokens} tokens each.\n" in capsys.readouterr().out
    assert cli.run([*words, "640"]) == 1
    assert "--image-size is '640', expected width and height in pixels: 640x480." in capsys.readouterr().err

    for file in ("processor_config.json", "preprocessor_config.json"):
        (folder / file).unlink(missing_ok=True)
    assert cli.run([*words, "64x48"]) == 0  # nobody knows how the processor would cut it
    assert "tokens each. Computed from the configuration, not by the model's processor:" in capsys.readouterr().out


def test_tiles_of_an_assembled_model_are_planned(tmp_path) -> None:
    parts = {"language": str(make_language(tmp_path / "language")), "vision": {"mode": "adapter"}}
    parts["vision"]["name"] = str(make_vision(tmp_path / "vision", "clip"))
    square = Recipe.from_dict({"model": parts, "adapter": {"rank": 2}})
    cut = Recipe.from_dict({"model": parts | {"image_aspect": "anyres"}, "adapter": {"rank": 2}})
    one, five = (memory_of(recipe, picture=(64, 64)) for recipe in (square, cut))
    assert (one.picture.tiles, five.picture.tiles) == (1, 5)
    (seen,) = load_parts(cut.model).image_processing.process([Image.new("RGB", (64, 64))])
    assert five.tokens_per_image == len(seen.placeholders)
    assert five.picture.kept > 4.5 * one.picture.kept
    assert five.picture.flops == pytest.approx(5 * one.picture.flops, rel=0.01)
    with pytest.raises(ConfigError, match=r"one square of the same size\. Leave --image-size out"):
        plan(square, parse_gpus("1xA100-80G"), DataSize(samples=9, tokens=99), picture=(64, 64))
