"""A weight is a multiple of the loss: twice the weight is the record twice, however a step is split."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from trials import losses, make_parts, make_recipe, metrics, with_train

from mm_moslora.config import Recipe, SourceConfig
from mm_moslora.training.preflight import LOSS
from mm_moslora.training.training_loop import train


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_parts(tmp_path_factory.mktemp("parts"), records=12)


def records_with(parts: dict[str, Path], folder: Path, *weights: float, copies: bool = False) -> dict[str, Path]:
    """The same records, each with one of these weights in turn, or as often as its weight says."""
    lines = [json.loads(line) for line in parts["records"].read_text().splitlines()]
    made = []
    for number, record in enumerate(lines):
        weight = weights[number % len(weights)]
        if not copies:
            for answer in record["conversations"][1::2]:
                answer["weight"] = weight
        made += [record] * (int(weight) if copies else 1)
    path = folder / f"records-{len(made)}-{copies}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in made))
    return parts | {"data": path}


def recipe_of(parts: dict[str, Path], output: Path, **settings) -> Recipe:
    recipe = make_recipe(parts, output, "none", order="sequential", **({"steps": 3} | settings))
    images = str(parts["records"].parent / "images")
    source = SourceConfig(path=str(parts["data"]), image_folder=images)
    return replace(recipe, data=replace(recipe.data, train=[source]))


def curve(recipe: Recipe) -> list[float]:
    train(recipe)
    return [line[name] for line in metrics(Path(recipe.train.output)) for name in ("loss", "grad_norm")]


def test_a_weight_of_two_is_the_record_twice(parts: dict[str, Path], tmp_path: Path) -> None:
    """In the training loss, its gradient and the validation loss."""
    found = []
    for name, copies in (("weights", False), ("copies", True)):
        data = records_with(parts, tmp_path, 2, 1, copies=copies)
        size = {"global_batch": 6, "micro_batch": 6} if copies else {"global_batch": 4, "micro_batch": 4}
        recipe = recipe_of(data, tmp_path / name, validate_every=1, **size)
        recipe = replace(recipe, data=replace(recipe.data, validation=recipe.data.train))
        values = curve(recipe)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        values += [line[LOSS] for line in map(json.loads, lines) if LOSS in line]
        found.append(values)
    assert len(found[0]) >= 9
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_equal_weights_cancel_out(parts: dict[str, Path], tmp_path: Path) -> None:
    plain, small = (curve(recipe_of(records_with(parts, tmp_path, w), tmp_path / f"{w}")) for w in (1, 1e-3))
    assert small == pytest.approx(plain, rel=1e-5)


def test_the_split_of_a_step_does_not_matter(parts: dict[str, Path], tmp_path: Path) -> None:
    data = records_with(parts, tmp_path, 0.25, 3, 1)
    plain = recipe_of(data, tmp_path / "plain")
    variants = {
        "alone": with_train(plain, micro_batch=1),
        "stock": replace(plain, model=replace(plain.model, lean_layers=False)),
        "cached": replace(plain, data=replace(plain.data, cache=str(tmp_path / "cache"))),
        "workers": replace(plain, data=replace(plain.data, workers=1)),
    }  # fmt: skip
    expected = curve(plain)
    for name, recipe in variants.items():
        found = curve(with_train(recipe, output=str(tmp_path / name)))
        assert found == pytest.approx(expected, rel=1e-5), name
    packed = {
        name: replace(with_train(plain, global_batch=2, micro_batch=size, output=str(tmp_path / name)),
                      data=replace(plain.data, max_length=64, pack_tokens=150))
        for name, size in (("rows", 2), ("row by row", 1))
    }  # fmt: skip
    assert curve(packed["rows"]) == pytest.approx(curve(packed["row by row"]), rel=1e-5)
    assert losses(tmp_path / "rows") != pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_context_answers_are_those_that_supervise_last_leaves_out(parts: dict[str, Path], tmp_path: Path) -> None:
    found = {}
    for name, keys in {"record": {"loss": False}, "recipe": {}, "all": {}}.items():
        lines = [json.loads(line) for line in parts["records"].read_text().splitlines()]
        for record in lines:
            for answer in record["conversations"][1::2]:
                answer |= keys
            record["conversations"] += [{"from": "human", "value": "sure?"}, {"from": "gpt", "value": "yes"}]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in lines))
        recipe = recipe_of(parts | {"data": path}, tmp_path / name, steps=2)
        supervise = "last" if name == "recipe" else "all"
        found[name] = curve(replace(recipe, data=replace(recipe.data, supervise=supervise)))
    assert found["record"] == found["recipe"]
    assert found["record"] != found["all"]
