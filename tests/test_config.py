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
        ({"optim": {"lr": float("nan")}}, r"optim\.lr is nan, expected a finite number"),
        ({"train": {"epochs": float("inf")}}, r"train\.epochs is inf, expected a finite number"),
        ({"optim": {"betas": [0.9, 1.0]}}, r"optim\.betas is \(0\.9, 1\.0\), expected two numbers"),
        ({"optim": {"eps": 0.0}}, r"optim\.eps is 0\.0, expected more than 0"),
        ({"optim": {"weight_decay": -0.1}}, r"optim\.weight_decay is -0\.1, expected at least 0"),
        ({"optim": {"min_lr_ratio": 7}}, r"optim\.min_lr_ratio is 7\.0, expected 0 to 1"),
        ({"train": {"log_every": 0}}, r"train\.log_every is 0, expected at least 1"),
        ({"train": {"max_skipped_steps": 0}}, r"train\.max_skipped_steps is 0, expected at least 1"),
        ({"adapter": {"alpha": 0}}, r"adapter\.alpha is 0\.0, expected more than 0"),
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


def test_a_placeholder_that_was_never_filled_in_is_told():
    with pytest.raises(ConfigError, match=r"a key is itself a list or mapping \(line 2\)"):
        Recipe.from_yaml("model: {language: x}\ntrain: {output: {{ folder }}}\n")


def test_groups_are_merged_and_files_from_windows_are_read():
    recipe = Recipe.from_yaml(
        "\ufeffmodel: {language: x}\r\n"
        "data:\r\n  train:\r\n  - &one {path: a, weight: 2}\r\n  - {<<: *one, path: b}\r\n"
    )
    assert [(source.path, source.weight) for source in recipe.data.train] == [("a", 2.0), ("b", 2.0)]


def test_the_home_folder_is_put_in_place(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    text = "model: {language: ~/llm}\ndata: {train: [{path: ~/a.json, image_folder: ~/pictures}]}\n"
    recipe = Recipe.from_yaml(text + "train: {output: ~/runs/x}\n")
    source = recipe.data.train[0]
    places = [recipe.model.language, source.path, source.image_folder, recipe.train.output]
    assert places == [f"/home/me/{name}" for name in ("llm", "a.json", "pictures", "runs/x")]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("7", "7"), ("12e4567", "12e4567"), ("yes", "yes"), ("Be brief: one word. # 1", "Be brief: one word. # 1"),
        ("'quoted'", "quoted"), ("it's", "it's"), ("@home", "@home"), ("null", None), ("", ""),
    ],
)  # fmt: skip
def test_text_is_taken_as_it_stands(tmp_path, written, read):
    path = tmp_path / "r.yaml"
    path.write_text("model: {language: x}\ndata: {train: [{path: a}]}\n")
    recipe = load_recipe(path, [f"model.system_prompt={written}", f"data.train.0.image_folder={written}"])
    assert recipe.model.system_prompt == read
    assert recipe.data.train[0].image_folder == read
    assert load_recipe(path, ["adapter.targets=[q_proj]"]).adapter.targets == ["q_proj"]


def test_steps_of_a_run_are_rounded_up_but_for_the_noise_of_fractions():
    steps = [Recipe.from_dict({**MINIMAL, "train": {"epochs": epochs}}).train for epochs in (1.1, 1.11)]
    assert [train.total_steps(10) for train in steps] == [11, 12]


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
