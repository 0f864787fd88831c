"""Ranks are never in one place at a time: what one does to files that others read, it does when they have read them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from tiny import make_records
from trials import hexed, make_recipe, weights, write

from mm_moslora.config import SourceConfig, ValidateConfig

pytestmark = pytest.mark.slow


def test_a_rank_that_is_late_everywhere_changes_nothing(parts, ranks, tmp_path):
    held_out = make_records(tmp_path / "held-out", 6)
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question_id": 1, "text": "say red", "answer": "red"}\n')
    source = SourceConfig(path=str(held_out), image_folder=str(held_out.parent / "images"))
    straight = make_recipe(parts, tmp_path / "straight", "zero2", dropout=0.1)
    recipe = make_recipe(
        parts, tmp_path / "run", "zero2", dropout=0.1, rehearsal=True, save_every=1, keep_last=1, validate_every=1
    )
    recipe = replace(
        recipe,
        data=replace(recipe.data, validation=[source], cache=str(tmp_path / "tokens")),
        validate=ValidateConfig(samples=1, sample_tokens=2, tasks=[f"llava:{questions}"], best="validation_loss"),
    )
    for words in (["--stop-at", "2"], []):  # and on from the checkpoint
        group = ranks.run(["faults:late", "1", str(tmp_path), "train", write(recipe), *words])
        assert int(re.search(r"late (\d+) times", group.output(1))[1]) > 15
    ranks.run([write(straight)])
    assert hexed(tmp_path / "run") == hexed(tmp_path / "straight")
    assert weights(tmp_path / "run") == weights(tmp_path / "straight")
    assert not list((tmp_path / "run").glob(".t*"))
