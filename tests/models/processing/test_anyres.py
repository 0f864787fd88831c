"""Anyres tiles: as many tokens as LLaVA-NeXT gives, trained with the newline embedding, exported as LLaVA-NeXT."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_vision
from transformers import LlavaNextForConditionalGeneration
from vlm_runs import picture, recipe_for, write_records

from mm_moslora.config import ModelConfig, ProjectorConfig, VisionConfig
from mm_moslora.models.assembly import load_parts
from mm_moslora.models.export.export_huggingface import export_model
from mm_moslora.models.load_model import load
from mm_moslora.training.training_loop import train
from mm_moslora.utils.errors import ConfigError, ModelError

TILES = [(1, 2), (2, 1), (2, 2)]


def config_for(language, tower, **more):
    return ModelConfig(
        language=str(language), vision=VisionConfig(name=str(tower)), image_aspect="anyres", anyres_tiles=TILES, **more
    )


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_a_picture_takes_the_whole_view_its_tiles_and_a_newline_per_row(kind, language_folder, tmp_path):
    config = config_for(language_folder, make_vision(tmp_path / kind, kind))
    assembly, parts = load_parts(config), load_parts(config, weights="none")
    # A grid of 4 x 4 patches per view. Wide: one row of two tiles; the padding above and below is cut off.
    expected = {(64, 32): 16 + 4 * (8 + 1), (32, 64): 16 + 8 * (4 + 1), (64, 64): 16 + 8 * (8 + 1)}
    for size, tokens in expected.items():
        (seen,) = assembly.image_processing.process([picture(*size)])
        assert len(seen.placeholders) == tokens == len(parts.image_processing.placeholders([size])[0])
        features = assembly.model.model.get_image_features(**seen.tensors).pooler_output
        assert features[0].shape == (tokens, 64)
    cut = len(assembly.image_processing.placeholders([(64, 20)])[0])
    assert cut < expected[64, 32]


def test_a_run_trains_the_newline_and_is_exported_as_llava_next(language_folder, tmp_path):
    recipe = recipe_for("x", write_records(tmp_path), tmp_path / "run")
    model = config_for(language_folder, make_vision(tmp_path / "clip", "clip"))
    model = dataclasses.replace(model, projector=ProjectorConfig(fit_to_answers=True))
    recipe = dataclasses.replace(recipe, model=model)
    train(recipe)
    assert not (tmp_path / "run" / "quarantine.jsonl").read_text()
    checkpoint = tmp_path / "run" / "checkpoint-000002"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert "model.image_newline" in manifest["trainable"]
    tuned = load(tmp_path / "run")
    stored = load_file(checkpoint / "projector.safetensors")
    torch.testing.assert_close(tuned.model.model.image_newline.detach(), stored["image_newline"], rtol=0, atol=0)
    exported = export_model(tuned, tmp_path / "out", require_stock=True)
    assert exported.architecture == LlavaNextForConditionalGeneration.__name__
    assert exported.max_logit_difference < 1e-5
    again = load(tmp_path / "out")
    assert again.image_processing.placeholders([(64, 32)]) == tuned.image_processing.placeholders([(64, 32)])
    # The projector and its newline start the next stage.
    weights = ProjectorConfig(weights=str(checkpoint / "projector.safetensors"))
    started = load_parts(dataclasses.replace(model, projector=weights))
    torch.testing.assert_close(started.model.model.image_newline, tuned.model.model.image_newline, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("clip", {"projector": ProjectorConfig(kind="linear")}, "Choose these, or image_aspect"),
        ("dinov3", {}, "Choose these, or image_aspect"),
    ],
)
def test_what_llava_next_cannot_hold_is_refused(kind, more, message, language_folder, tmp_path):
    with pytest.raises(ModelError, match=message):
        load_parts(config_for(language_folder, make_vision(tmp_path / kind, kind), **more))


def test_tiles_are_of_the_towers_own_size(language_folder, tmp_path):
    vision = VisionConfig(name=str(make_vision(tmp_path / "d", "dinov2")), image_size=14)
    with pytest.raises(ModelError, match="image_size to 28"):
        load_parts(ModelConfig(language=str(language_folder), vision=vision, image_aspect="anyres"))
    with pytest.raises(ConfigError, match="anyres_tiles"):
        ModelConfig(language="x", anyres_tiles=[(0, 1)])
