"""Ranks with other recipes, data or software end together before the first step, and say what differs where."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import Group, Ranks
from trials import losses, make_recipe, with_train, write

from mm_moslora.config import Recipe

pytestmark = pytest.mark.slow

CHANGES = {
    "optim.lr": lambda r: replace(r, optim=replace(r.optim, lr=1e-2)),
    "train.seed": lambda r: with_train(r, seed=5),
    "adapter.rank": lambda r: replace(r, adapter=replace(r.adapter, rank=8)),
    "train.zero": lambda r: with_train(r, zero="zero1"),
    "train.save_every": lambda r: with_train(r, save_every=2),
}


def together(ranks: Ranks, *recipes: Recipe) -> Group:
    words = [write(recipe, f"{recipe.name}-{number}") for number, recipe in enumerate(recipes)]
    return ranks.finish(ranks.start(["faults:each_its_own", *words]))


def refused(group: Group, run: Path, *said: str) -> None:
    assert group.codes == [1, 1], group.outputs
    for rank in (0, 1):
        assert all(text in group.output(rank) for text in ("The ranks do not agree", "on rank 1 (", *said)), (
            group.outputs
        )
    assert not (run / "metrics.jsonl").exists()


@pytest.mark.parametrize("key", CHANGES)
def test_another_value_of_a_key_is_named(key, parts, ranks, tmp_path):
    recipe = make_recipe(parts, tmp_path / "run", "zero2")
    refused(together(ranks, recipe, CHANGES[key](recipe)), tmp_path / "run", f"{key} is ")


def test_another_file_of_engine_settings_at_another_place_is_named(parts, ranks, tmp_path):
    preset = json.loads((Path(__file__).parents[2] / "deepspeed_configs" / "zero2.json").read_text())
    files = [tmp_path / f"{name}.json" for name in ("one", "same", "other")]
    for file in files:
        preset["zero_optimization"]["overlap_comm"] = file.stem == "other"
        file.write_text(json.dumps(preset))
    recipes = [make_recipe(parts, tmp_path / "run", str(file), steps=1) for file in files]
    refused(together(ranks, recipes[0], recipes[2]), tmp_path / "run", "train.zero.zero_optimization.overlap_comm is ")
    assert together(ranks, *recipes[:2]).codes == [0, 0]


def test_another_version_of_a_package_is_named(parts, ranks, tmp_path):
    recipe = make_recipe(parts, tmp_path / "run", "zero2")
    group = ranks.finish(ranks.start(["faults:other_version", write(recipe)]))
    refused(group, tmp_path / "run", "peft is ", "'0.1.0' on rank 1")


def copied(parts, folder: Path, change) -> dict[str, Path]:
    """Records at another place, changed, with the same pictures."""
    shutil.copytree(parts["records"].parent, folder)
    path = folder / parts["records"].name
    lines = path.read_text().splitlines()
    path.write_text("\n".join(change(lines)) + "\n")
    return parts | {"records": path}


@pytest.mark.parametrize("what", ["reversed", "other text"])
def test_other_records_are_named_also_on_resume(what, parts, ranks, tmp_path):
    assert parts["records"].suffix == ".jsonl"
    change = {
        "reversed": lambda lines: lines[::-1],
        "other text": lambda lines: [lines[0], *lines[2:3], *lines[2:]],
    }[what]  # fmt: skip
    other = copied(parts, tmp_path / "copy", change)
    recipe, wrong = (make_recipe(found, tmp_path / "run", "zero2") for found in (parts, other))
    refused(together(ranks, recipe, wrong), tmp_path / "run", "the content of data.train.0 is ")
    ranks.run([f"{write(recipe)}@2"])
    group = together(ranks, recipe, wrong)
    assert group.codes == [1, 1], group.outputs
    assert all("the content of data.train.0 is " in group.output(rank) for rank in (0, 1)), group.outputs
    assert len(losses(tmp_path / "run")) == 2


def test_equal_copies_at_other_places_train(parts, ranks, tmp_path):
    other = copied(parts, tmp_path / "copy", lambda lines: lines)
    for name in ("language", "vision"):
        other[name] = shutil.copytree(parts[name], tmp_path / name)
    recipe, same = (make_recipe(found, tmp_path / "run", "zero2", steps=2) for found in (parts, other))
    assert together(ranks, recipe, same).codes == [0, 0]
