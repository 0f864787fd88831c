"""Other forms of mixer and factors in our trainer, to the merged model; and checkpoints older than a key of recipes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from mm_moslora.adapters import MIXER_FORMS
from mm_moslora.cli import run
from mm_moslora.config import Recipe
from mm_moslora.models.load_model import load
from mm_moslora.training.checkpointing.checkpoint_folder import read_manifest
from mm_moslora.training.training_loop import train
from tests.adapters.test_mixer_forms import Gated


def formed(recipe: Recipe, **form: str) -> Recipe:
    adapter = replace(recipe.adapter, mixer_init="orthogonal", **form)
    return replace(recipe, adapter=adapter, train=replace(recipe.train, steps=2, rehearsal=False))


FORMS = [
    {"mixer_form": "diagonal"}, {"mixer_form": "low_rank:2"},
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
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
@pytest.mark.parametrize("form", ["gated"])
def test_a_mixer_that_depends_on_its_input_trains_and_is_used_unmerged(
    recipe: Recipe, tmp_path: Path, capsys, monkeypatch, form: str
):
    monkeypatch.setitem(MIXER_FORMS, "gated", Gated)
    recipe = formed(recipe, mixer_form=form)
    train(recipe, stop_at=1)
    assert train(recipe).step == 2
    assembly = load(recipe.train.output)
    assert assembly.peft_model is not None
    assert sum("lora_mixer" in name for name, _ in assembly.model.named_buffers()) == 0
    assert any("lora_mixer" in name for name, _ in assembly.model.named_parameters())
    images = Path(recipe.data.train[0].image_folder or Path(recipe.data.train[0].path).parent)
    shown = next(images.rglob("*.png"))
    asked = [{"question_id": str(n), "text": "what is it?", "answer": "red", "image": shown.name} for n in range(2)]
    asked.append({"question_id": "text", "text": "say red", "answer": "red"})
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)) + "\n")
    task, out = f"llava:{tmp_path / 'asked.jsonl'}@{shown.parent}", str(tmp_path / "eval")
    assert run(["eval", "run", task, "--model", recipe.train.output, "--output", out, "--max-new-tokens", "3"]) == 0
    capsys.readouterr()
    assert run(["merge", recipe.train.output, str(tmp_path / "merged")]) == 1
    assert f"{form!r} depends on the layer's input" in capsys.readouterr().err


@pytest.mark.slow
def test_a_checkpoint_older_than_a_key_of_recipes_goes_on(recipe: Recipe) -> None:
    recipe = formed(recipe)
    train(recipe, stop_at=1)
    folder = Path(recipe.train.output) / "checkpoint-000001"
    manifest = read_manifest(folder)
    del manifest.recipe["adapter"]["factor_form"]
    (folder / "manifest.json").write_text(json.dumps(manifest.to_json()))
    assert train(recipe).step == 2
