"""Recipes: strict in, complete out."""

from __future__ import annotations

import pytest

from mm_moslora.config import Recipe, load_recipe, recipe_names
from mm_moslora.errors import ConfigError

MINIMAL = {"model": {"language": "x"}}


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_parses_and_survives_a_round_trip(name):
    recipe = load_recipe(name)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optm": {}}, r"unknown key 'optm'\. Did you mean 'optim'"),
        ({"model": {"language": "x", "vision": {"nam": "y"}}}, r"unknown key 'model\.vision\.nam'"),
        ({"adapter": {"mixer_init": "zeros"}}, r"adapter\.mixer_init is 'zeros', expected one of orthogonal"),
        ({"adapter": {"rank": 0}}, r"adapter\.rank is 0, expected at least 1"),
        ({"train": {"steps": "many"}}, r"train\.steps is 'many' \(str\), expected int"),
        ({"train": {"global_batch": 6, "micro_batch": 4}}, r"multiple of train\.micro_batch \(4\)"),
        ({"optim": {"betas": [0.9]}}, r"optim\.betas has 1 items, expected 2"),
        ({"optim": {"lr": float("nan")}}, r"optim\.lr is not a number"),
        ({"model": {}}, r"name exactly one of them"),
        ({"data": {"train": {"path": "x"}}}, r"data\.train is .* expected a list"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        Recipe.from_dict({**MINIMAL, **change})


def test_numbers_are_read_as_people_write_them():
    recipe = Recipe.from_yaml("model: {language: x}\noptim: {lr: 1e-4, projector_lr: 3}\ntrain: {steps: 10.0}\n")
    assert (recipe.optim.lr, recipe.optim.projector_lr, recipe.train.steps) == (1e-4, 3.0, 10)


def test_a_repeated_key_is_refused():
    with pytest.raises(ConfigError, match="'language' is written twice"):
        Recipe.from_yaml("model: {language: x, language: y}\n")


def test_dotted_overrides_reach_into_lists_and_new_groups(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: {language: x}\ndata: {train: [{path: a}, {path: b}]}\n")
    recipe = load_recipe(path, ["data.train.1.weight=0.5", "optim.lr=1e-5", "model.vision.name=dino"])
    assert [source.weight for source in recipe.data.train] == [1.0, 0.5]
    assert recipe.optim.lr == 1e-5
    assert recipe.model.vision is not None
    with pytest.raises(ConfigError, match="'2' is not an index of a list of 2"):
        load_recipe(path, ["data.train.2.weight=1"])
    with pytest.raises(ConfigError, match=r"'\[' is no YAML value"):
        load_recipe(path, ["optim.lr=["])
    with pytest.raises(ConfigError, match="not of the form key=value"):
        load_recipe(path, ["optim.lr"])


def test_an_unknown_preset_gets_a_suggestion():
    with pytest.raises(ConfigError, match="Did you mean 'quickstart_tune'"):
        load_recipe("quickstart_tun")
