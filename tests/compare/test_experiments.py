"""The paper's experiments: their recipes are recipes, their question sets are sound and split without overlap."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from mm_moslora.config import load_recipe

EXPERIMENTS = Path(__file__).parents[2] / "examples" / "experiments"


@pytest.fixture(scope="module")
def commonsense():
    spec = importlib.util.spec_from_file_location("commonsense", EXPERIMENTS / "commonsense.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["commonsense"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["commonsense"]


@pytest.mark.parametrize("recipe", sorted((EXPERIMENTS / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_recipes(recipe: Path):
    assert load_recipe(recipe).name.replace("-", "_") == recipe.stem


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_small_sets_ask_nothing_that_was_taught(commonsense, tmp_path: Path):
    folders = list(commonsense.KINDS)
    stamps = [(f"A thing number {n}.", folders[n % len(folders)]) for n in range(60)]
    words = [(f"word{chr(97 + n // 26)}{chr(97 + n % 26)}", f"meaning {n}") for n in range(60)]
    commonsense.build_small(stamps, words, tmp_path, train=20, validation=8, test=16)
    taught = {turn["value"] for row in rows(tmp_path / "train.jsonl") for turn in row["conversations"][::2]}
    chosen_by = {turn["value"] for row in rows(tmp_path / "validation.jsonl") for turn in row["conversations"][::2]}
    assert len(taught) == 40
    for name in commonsense.SETS:
        asked = rows(tmp_path / f"{name}.jsonl")
        assert len(asked) == 16
        assert not {row["text"] for row in asked} & (taught | chosen_by)
    kinds = rows(tmp_path / "kind.jsonl")
    assert {row["answer"] for row in kinds} <= set(commonsense.KINDS.values())
    assert all(row["answer"] in row["text"] for row in rows(tmp_path / "word.jsonl"))
    assert not taught & chosen_by


def test_the_full_set_is_put_in_the_prompt_that_the_evaluation_uses(commonsense, tmp_path: Path):
    record = {"instruction": "Is water wet?", "input": "", "output": "the correct answer is true", "answer": "true"}
    (tmp_path / "170k.json").write_text(json.dumps([record]))
    assert commonsense.convert_full(tmp_path / "170k.json", tmp_path / "out.jsonl") == 1
    (row,) = rows(tmp_path / "out.jsonl")
    question, answer = (turn["value"] for turn in row["conversations"])
    assert "### Instruction:" in question
    assert "Is water wet?" in question
    assert answer == "the correct answer is true"
