"""A fresh projector is fitted to the training data before the first step."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mm_moslora.config import ProjectorConfig, Recipe, SourceConfig
from mm_moslora.models.vlm import image_features
from mm_moslora.training import weight_init
from mm_moslora.training.run_setup import Run, prepare
from mm_moslora.training.training_loop import train
from mm_moslora.utils.errors import ModelError

SHADES = {"black": 10, "gray": 120, "white": 245}


def sorted_records(folder: Path, count: int, *, answers: dict[str, str]) -> SourceConfig:
    """Pictures of one shade each, sorted by it as in a folder per class, with an answer to each."""
    lines = []
    for place in range(count):
        shade = list(SHADES)[place * len(SHADES) // count]
        Image.new("L", (32, 32), SHADES[shade] + place % 7).convert("RGB").save(folder / f"{place}.png")
        turns = [{"from": "human", "value": "<image>\nwhich?"}, {"from": "gpt", "value": answers[shade]}]
        lines.append(json.dumps({"id": str(place), "image": f"{place}.png", "conversations": turns}))
    (folder / "sorted.jsonl").write_text("\n".join(lines))
    return SourceConfig(path=str(folder / "sorted.jsonl"), image_folder=str(folder))


def prepared(recipe: Recipe, source: SourceConfig) -> Run:
    recipe = replace(recipe, data=replace(recipe.data, train=[source]))
    return prepare(replace(recipe, model=replace(recipe.model, projector=ProjectorConfig(fit_to_answers=True))))


def tokens(run: Run, place: int) -> torch.Tensor:
    (picture,) = run.training_set.load(place).pictures
    with torch.no_grad():
        return image_features(run.assembly.model, picture.tensors["pixel_values"]).float().mean((0, 1))


def test_visual_tokens_point_to_the_answers_of_a_sorted_file(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("mm_moslora.training.weight_init.PICTURES_TO_STANDARDISE", 6)
    monkeypatch.setattr("mm_moslora.training.weight_init.PICTURES_TO_FIT", 12)  # of 60: the first twelve are all black
    run = prepared(recipe, sorted_records(tmp_path, 60, answers={"black": "one", "gray": "two", "white": "six"}))
    embeddings = run.assembly.model.get_input_embeddings().weight.float()
    ids = [run.assembly.tokenizer.encode(word, add_special_tokens=False) for word in ("one", "two", "six")]
    words = torch.stack([embeddings[some].mean(0) for some in ids])
    words -= words.mean(0)
    for place, label in ((1, 0), (18, 0), (23, 1), (37, 1), (41, 2), (58, 2)):
        likeness = torch.nn.functional.cosine_similarity(words, tokens(run, place), dim=-1)
        assert int(likeness.argmax()) == label, (place, likeness)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"black": "one", "gray": "two", "white": "six"}, "Projector fitted: visual tokens explain"),
        (dict.fromkeys(SHADES, "yes"), "The projector is not fitted to the answers: the answers, or the pictures, are"),
    ],
)
def test_the_run_says_how_far_tokens_follow_the_answers(answers, said, recipe, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run = prepared(recipe, sorted_records(tmp_path, 12, answers=answers))
    assert said in caplog.text
    words = run.assembly.model.get_input_embeddings().weight.float().pow(2).mean().sqrt()
    together = torch.stack([tokens(run, place) for place in range(12)])
    assert 0.3 * words < together.pow(2).mean().sqrt() < 3 * words, "visual tokens have the size of words"


@pytest.mark.parametrize("mode", ["full", "frozen"])
def test_a_run_that_goes_on_keeps_its_projector(mode, recipe, tmp_path, monkeypatch):
    source = sorted_records(tmp_path, 24, answers={"black": "one", "gray": "two", "white": "six"})
    projector = ProjectorConfig(fit_to_answers=True, mode=mode)
    recipe = replace(
        recipe, data=replace(recipe.data, train=[source]), model=replace(recipe.model, projector=projector)
    )
    whole = train(replace(recipe, train=replace(recipe.train, output=str(tmp_path / "whole"))))
    train(recipe, stop_at=2)
    monkeypatch.setattr("mm_moslora.training.weight_init._fit", None)  # all of it is in the checkpoint
    assert train(recipe).step == whole.step
    both = [
        load_file(run / "checkpoint-000006" / "projector.safetensors") for run in (tmp_path / "whole", tmp_path / "run")
    ]
    for name, value in both[0].items():
        torch.testing.assert_close(both[1][name], value, rtol=0, atol=0)


def test_features_that_are_not_finite_are_an_error_and_no_fit(recipe, tmp_path, monkeypatch):
    source = sorted_records(tmp_path, 12, answers={"black": "one", "gray": "two", "white": "six"})
    real = weight_init._spread_out

    def overflowing(*arguments, **keywords):
        for place, (example, pixels) in enumerate(real(*arguments, **keywords)):
            yield example, torch.full_like(pixels, torch.inf) if place == 5 else pixels

    monkeypatch.setattr(weight_init, "_spread_out", overflowing)
    with pytest.raises(ModelError, match=r"not finite for a picture .* Train in fp32 or bf16"):
        prepared(recipe, source)


def test_data_without_a_picture_fit_nothing_and_the_run_says_so(recipe, tmp_path, caplog):
    turns = [{"from": "human", "value": "which?"}, {"from": "gpt", "value": "one"}]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"id": str(n), "conversations": turns}) for n in range(8)))
    prepared(recipe, SourceConfig(path=str(path)))
    assert "starts from random weights: no record of the training data has a picture" in caplog.text


@pytest.mark.parametrize(("mode", "remarked"), [("adapter", True), ("frozen", False)])
def test_a_random_projector_is_remarked_where_the_language_model_learns(mode, remarked, recipe, caplog):
    prepare(replace(recipe, model=replace(recipe.model, language_mode=mode)))
    assert ("starts from random weights while the language model trains" in caplog.text) == remarked
