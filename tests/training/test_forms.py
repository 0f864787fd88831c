"""Other forms of mixer and factors in our trainer, to the merged model; and checkpoints older than a key of recipes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from mm_moslora.cli import run
from mm_moslora.config import Recipe
from mm_moslora.training.checkpointing.checkpoint_folder import read_manifest
from mm_moslora.training.training_loop import train


def formed(recipe: Recipe, **form: str) -> Recipe:
    adapter = replace(recipe.adapter, mixer_init="orthogonal", **form)
    return replace(recipe, adapter=adapter, train=replace(recipe.train, steps=2, rehearsal=False))


@pytest.mark.slow
@pytest.mark.parametrize("form", [{"mixer_form": "diagonal"}, {"factor_form": "svd"}])
def test_other_forms_train_and_hand_over_a_merged_model(recipe: Recipe, tmp_path: Path, capsys, form: dict) -> None:
    recipe = formed(recipe, **form)
    train(recipe)
    mixers = json.loads((Path(recipe.train.output) / "mixers.json").read_text())
    assert mixers
    assert all(len(row) == mixer["rank"] == 4 for mixer in mixers for row in mixer.get("after", []))
    assert all(mixer["moved"] > 0 for mixer in mixers)
    capsys.readouterr()
    assert run(["merge", recipe.train.output, str(tmp_path / "merged")]) == 0
    found = re.search(r"largest logit difference from the live adapter (\S+)", capsys.readouterr().out)
    assert found
    assert float(found[1]) < 1e-5


@pytest.mark.slow
def test_a_checkpoint_older_than_a_key_of_recipes_goes_on(recipe: Recipe) -> None:
    recipe = formed(recipe)
    train(recipe, stop_at=1)
    folder = Path(recipe.train.output) / "checkpoint-000001"
    manifest = read_manifest(folder)
    del manifest.recipe["adapter"]["factor_form"]
    (folder / "manifest.json").write_text(json.dumps(manifest.to_json()))
    assert train(recipe).step == 2
