"""Recipes: strict in, complete out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mm_moslora.config import Recipe, load_recipe, override_items, recipe_names
from mm_moslora.config.recipe_keys import facts_at, leaves
from mm_moslora.config.recipe_paths import absolute
from mm_moslora.config.usual_names import OF_OTHER_TRAINERS
from mm_moslora.utils.errors import ConfigError

MINIMAL = {"model": {"language": "x"}}


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_parses_and_survives_a_round_trip(name):
    recipe = load_recipe(name)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optm": {}}, r"unknown key 'optm'\. Did you mean 'optim'"),
        ({"train": {"learning_rate": 1e-4}}, r"unknown key 'train\.learning_rate'\. Did you mean 'optim\.lr'"),
        ({"adapter": {"lora_r": 8}}, r"unknown key 'adapter\.lora_r'\. Did you mean 'adapter\.rank'"),
        ({"max_steps": 3}, r"unknown key 'max_steps'\. Did you mean 'train\.steps'"),
        ({"model": {"language": "x", "vision": {"nam": "y"}}}, r"unknown key 'model\.vision\.nam'"),
        ({"adapter": {"mixer_init": "zeros"}}, r"adapter\.mixer_init is 'zeros', expected one of orthogonal"),
        ({"adapter": {"rank": 0}}, r"adapter\.rank is 0, expected at least 1"),
        ({"train": {"steps": "many"}}, r"train\.steps is 'many' \(str\), expected a whole number"),
        ({"train": {"global_batch": 6, "micro_batch": 4}}, r"multiple of train\.micro_batch \(4\)"),
        (
            {"train": {"micro_tokens": 2047}},
            r"train\.micro_tokens is 2047, expected at least data\.max_length \(2048\)",
        ),
        (
            {"train": {"micro_tokens": 2048}, "data": {"pack_tokens": 4096}},
            r"train\.micro_tokens is 2048, expected at least data\.pack_tokens \(4096\)",
        ),
        ({"optim": {"betas": [0.9]}}, r"optim\.betas has 1 items, expected 2"),
        ({"optim": {"lr": float("nan")}}, r"optim\.lr is nan, expected a finite number"),
        ({"train": {"epochs": float("inf")}}, r"train\.epochs is inf, expected a finite number"),
        ({"optim": {"betas": [0.9, 1.0]}}, r"optim\.betas is \(0\.9, 1\.0\), expected two numbers"),
        ({"optim": {"eps": 0.0}}, r"optim\.eps is 0\.0, expected more than 0"),
        ({"optim": {"weight_decay": -0.1}}, r"optim\.weight_decay is -0\.1, expected at least 0"),
        ({"optim": {"min_lr_ratio": 7}}, r"optim\.min_lr_ratio is 7\.0, expected 0 to 1"),
        ({"train": {"log_every": 0}}, r"train\.log_every is 0, expected at least 1"),
        ({"train": {"max_skipped_steps": 0}}, r"train\.max_skipped_steps is 0, expected at least 1"),
        ({"train": {"gradient_checkpointing": -1}}, r"train\.gradient_checkpointing is -1, expected at least 0"),
        (
            {"train": {"gradient_checkpointing": "all"}},
            r"train\.gradient_checkpointing is 'all' \(str\), expected true or false",
        ),
        ({"train": {"sequence_parallel": 0}}, r"train\.sequence_parallel is 0, expected at least 1"),
        ({"train": {"sequence_parallel": 2, "zero": "none"}}, r"Set train\.zero to zero2 or zero3"),
        ({"train": {"activation_offload": True}}, r"no layer is checkpointed\. Set train\.gradient_checkpointing"),
        ({"adapter": {"alpha": 0}}, r"adapter\.alpha is 0\.0, expected more than 0"),
        ({"model": {}}, r"name exactly one of them"),
        ({"data": {"train": {"path": "x"}}}, r"data\.train is .* expected a list"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        Recipe.from_dict({**MINIMAL, **change})


@pytest.mark.parametrize(
    ("key", "outcome"),
    [
        pytest.param("train.output", "free", id="a key"),
        pytest.param("track.tags", "free", id="a group"),
        pytest.param("data.train.0.image_folder", "free", id="a key of an item"),
        pytest.param("data.validation.0.limit", "free", id="a group of items"),
        pytest.param("train.zero", "rounding", id="order of sums"),
        pytest.param("model.vision.feature_cache", "rounding", id="order of sums in a group"),
        pytest.param("data.train.0.limit", None, id="other records"),
        pytest.param("adapter.rank_pattern.q_proj", None, id="a mapping"),
        pytest.param("adapter.gone", None, id="a key that there is not"),
    ],
)
def test_a_key_says_what_another_value_means_to_a_checkpoint(key, outcome):
    assert facts_at(Recipe, key).get("resume") == outcome


def test_numbers_are_read_as_people_write_them():
    recipe = Recipe.from_yaml("model: {language: x}\noptim: {lr: 1e-4, projector_lr: 3}\ntrain: {steps: 10.0}\n")
    assert (recipe.optim.lr, recipe.optim.projector_lr, recipe.train.steps) == (1e-4, 3.0, 10)
    for written, value in (("true", True), ("12", 12), ("false", False)):
        text = f"model: {{language: x}}\ntrain: {{gradient_checkpointing: {written}}}\n"
        found = Recipe.from_yaml(text).train.gradient_checkpointing
        assert found is value or (found == value and type(found) is int)
        assert Recipe.from_yaml(Recipe.from_yaml(text).to_yaml()).train.gradient_checkpointing == found


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
    more = load_recipe(path, ["data.train.2.path=c", "data.validation.0.path=d", "validate.tasks.0=pope"])
    assert [Path(source.path).name for source in more.data.train] == ["a", "b", "c"]
    assert [source.path for source in more.data.validation] == ["d"]
    assert more.validate.tasks == ["pope"]
    with pytest.raises(ConfigError, match=r"'3' is not an index of this list: 0 to 1 change the items .*, 2 adds one"):
        load_recipe(path, ["data.train.3.path=c"])
    with pytest.raises(ConfigError, match=r"'-1' is not an index of this list: it has no item, 0 adds one"):
        load_recipe(path, ["data.validation.0.columns.a=b", "validate.tasks.-1=pope"])
    with pytest.raises(ConfigError, match=r"data\.train\.0\.path holds a value, not a group"):
        load_recipe(path, ["data.train.0.path.x=c"])
    with pytest.raises(ConfigError, match=r"'\[' is no YAML value"):
        load_recipe(path, ["optim.lr=["])
    with pytest.raises(ConfigError, match="not of the form key=value"):
        load_recipe(path, ["optim.lr"])


def test_an_override_that_does_not_fit_is_named_and_the_file_is_not_blamed(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: {language: x}\ndata: {train: [{path: a}]}\n")
    fits = "train.output=runs/x"
    for wrong, said in (
        ("optim.lrr=3", "Override 'optim.lrr=3': unknown key 'optim.lrr'. Did you mean 'lr'?"),
        ("train.steps=0", "Override 'train.steps=0': train.steps is 0"),
        ("data.train.1.weight=2", "Override 'data.train.1.weight=2': missing data.train.1.path"),
        ("model.vlm=y", "Override 'model.vlm=y': model: language is 'x' and vlm is 'y'"),
        ("track.trackers.0=wandbb", "Override 'track.trackers.0=wandbb': track.trackers holds 'wandbb'"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_recipe(path, [fits, wrong])
        assert str(caught.value).startswith(said)
        assert str(path) not in str(caught.value)
    with pytest.raises(ConfigError, match=r"^Overrides 'train.global_batch=7', 'train.micro_batch=5': "):
        load_recipe(path, [fits, "train.global_batch=7", "train.micro_batch=5"])
    path.write_text("model: {language: x}\noptim: {lrr: 3}\n")
    with pytest.raises(ConfigError, match=f"^{path}: unknown key 'optim.lrr'"):
        load_recipe(path, [fits])


@pytest.mark.parametrize(
    ("name", "content"),
    [("d.json", b'\xef\xbb\xbf\n [{"id": 1}]'), ("d.jsonl", b'{"id": 1}\n{"id": 2}\n'), ("d.parquet", b"PAR1\xff\x00")],
)
def test_data_in_place_of_a_recipe_are_told_from_one(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"holds data, expected a recipe.*--data\.train '\[\{path: .*d\."):
        load_recipe(path)


def test_an_unknown_preset_gets_a_suggestion():
    with pytest.raises(ConfigError, match="Did you mean 'quickstart_tune'"):
        load_recipe("quickstart_tun")


RELATIVE = """
model:
  language: parts/lm
  vision: {name: openai/clip, pretrained: openai}
  projector: {weights: start/projector.safetensors}
data:
  train: [{path: train.jsonl, image_folder: images}, {path: "shards/*.tar"}, {path: "hf:org/set"}, {path: /abs/x.jsonl}]
  cache: cache
train: {output: runs/it, zero: zero2}
validate: {tasks: ["llava:q.jsonl@images", "pope@llava", "own.yaml@mine", "tsv:/abs/q.tsv", "@groups.yaml:a", "@paper"]}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A recipe in a folder of its own, with what it names beside it."""
    folder = tmp_path / "project"
    for name in ("parts/lm", "images", "start", "shards"):
        (folder / name).mkdir(parents=True)
    for name in ("train.jsonl", "q.jsonl", "own.yaml", "groups.yaml", "start/projector.safetensors"):
        (folder / name).touch()
    (folder / "recipe.yaml").write_text(RELATIVE)
    return folder


def test_paths_of_a_recipe_start_at_the_recipe(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = project.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    recipe = load_recipe(project / "recipe.yaml", ["model.vision.fuse_with=other/tower"])
    first, tars, hub, absolute = recipe.data.train
    assert (first.path, first.image_folder) == (str(project / "train.jsonl"), str(project / "images"))
    assert (tars.path, hub.path, absolute.path) == (str(project / "shards/*.tar"), "hf:org/set", "/abs/x.jsonl")
    assert (recipe.data.cache, recipe.train.output) == (str(project / "cache"), str(project / "runs/it"))
    assert recipe.model.language == str(project / "parts/lm")
    assert recipe.model.vision is not None
    assert (recipe.model.vision.name, recipe.model.vision.pretrained) == ("openai/clip", "openai")
    assert recipe.model.projector.weights == str(project / "start/projector.safetensors")
    tasks = [f"llava:{project / 'q.jsonl'}@{project / 'images'}", "pope@llava", f"{project / 'own.yaml'}@mine"]
    assert recipe.validate.tasks == [*tasks, "tsv:/abs/q.tsv", f"@{project / 'groups.yaml'}:a", "@paper"]
    monkeypatch.chdir(project)
    assert load_recipe("recipe.yaml").train.output == "runs/it"
    monkeypatch.chdir(project.parent)
    assert load_recipe("project/recipe.yaml").train.output == "project/runs/it"
    assert load_recipe("project/recipe.yaml").data.train[0].path == "project/train.jsonl"


def test_tasks_of_a_recipe_may_lie_in_folders_with_an_at_sign(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = project.rename(project.parent / "me@home")
    (project / "im@ges").mkdir()
    (project / "im@ges" / "own.yaml").touch()
    tasks = '["llava:q.jsonl@im@ges", "im@ges/own.yaml@mine", "tsv:im@ges/q.tsv", "llava:q.jsonl"]'
    (project / "recipe.yaml").write_text(RELATIVE.replace('["llava:q.jsonl@images", ', f"{tasks[:-1]}, "))
    monkeypatch.chdir(project / "images")
    assert load_recipe(project / "recipe.yaml").validate.tasks[:4] == [
        f"llava:{project / 'q.jsonl'}@{project / 'im@ges'}", f"{project / 'im@ges' / 'own.yaml'}@mine",
        f"tsv:{project / 'im@ges' / 'q.tsv'}", f"llava:{project / 'q.jsonl'}",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["train.jsonl", "parts/lm", "runs/it", "images", "q.jsonl"])
def test_a_path_that_only_the_working_directory_has_is_one_error_that_names_both(
    project: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = project.parent / "elsewhere"
    (elsewhere / name).mkdir(parents=True)
    if name.startswith("runs"):
        (elsewhere / name / "run.lock").touch()
    if (project / name).exists():
        (project / name).rename(project / "moved")
    monkeypatch.chdir(elsewhere)
    with pytest.raises(ConfigError) as caught:
        load_recipe(project / "recipe.yaml")
    assert str(project / name) in str(caught.value)
    assert str(elsewhere / name) in str(caught.value)


def test_an_output_need_not_exist_whatever_else_has_its_name(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = project.parent / "elsewhere"
    (elsewhere / "runs" / "it").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    assert load_recipe(project / "recipe.yaml").train.output == str(project / "runs" / "it")


def test_overrides_and_presets_start_at_the_working_directory(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project.parent / "runs" / "it").mkdir(parents=True)
    monkeypatch.chdir(project.parent)
    assert load_recipe("project/recipe.yaml", ["train.output=runs/mine"]).train.output == "runs/mine"
    assert load_recipe("llava15_7b_moslora").data.train[0].path == "data/llava_v1_5_mix665k.json"
    (project / "none.yaml").write_text("model: {language: org/model}\n")
    assert load_recipe("project/none.yaml").train.output == "project/runs/run"


@pytest.mark.parametrize("place", ["runs/it", "runs/it/checkpoint-000002"])
def test_the_recipe_of_a_run_is_found_from_everywhere(
    project: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds paths as they were reached from where the run was started."""
    folder = project / place
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(RELATIVE)
    monkeypatch.chdir(project.parent)
    for name in (folder, folder / "config.yaml"):
        recipe = load_recipe(name)
        assert (recipe.data.train[0].path, recipe.train.output) == ("project/train.jsonl", "project/runs/it")


def test_a_recipe_with_absolute_paths_may_lie_anywhere(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    recipe = Recipe.from_dict(absolute(Recipe, load_recipe("recipe.yaml").to_dict()))
    (project.parent / "moved.yaml").write_text(recipe.to_yaml())
    monkeypatch.chdir("/")
    again = load_recipe(project.parent / "moved.yaml")
    assert again == recipe
    assert again.data.train[0].path == str(project / "train.jsonl")


@pytest.mark.parametrize(
    ("train", "mode", "world", "before", "expected"),
    [
        ({"global_batch": 16, "micro_batch": 4}, "adapter", 2, None, "zero1"),
        ({"global_batch": 16, "micro_batch": 4}, "adapter", 4, None, "zero2"),
        ({"global_batch": 16, "micro_batch": 4}, "full", 2, None, "zero2"),
        ({"global_batch": 16, "micro_batch": 4, "micro_tokens": 4096}, "adapter", 4, None, "zero1"),
        ({"global_batch": 16, "micro_batch": 4}, "adapter", 2, "zero2", "zero2"),
        ({"global_batch": 16, "micro_batch": 4, "zero": "zero3"}, "adapter", 2, "zero2", "zero3"),
        ({"global_batch": 16, "micro_batch": 4, "zero": "none"}, "adapter", 1, None, "none"),
        ({"global_batch": 16, "micro_batch": 4}, "adapter", 1, "none", "none"),
        ({"global_batch": 16, "micro_batch": 4}, "adapter", 2, "none", "zero1"),
    ],
)
def test_the_default_stage_reduces_gradients_once_in_a_step(
    train: dict[str, Any], mode: str, world: int, before: str | None, expected: str
) -> None:
    recipe = Recipe.from_dict({"model": {"language": "x", "language_mode": mode}, "train": train})
    assert recipe.for_ranks(world, before=before).train.zero == expected


def test_keys_of_other_trainers_stand_for_keys_that_there_are():
    known = leaves(load_recipe("llava15_7b_moslora").to_dict())
    assert {key for key in OF_OTHER_TRAINERS.values() if not any(name.startswith(key) for name in known)} == set()
    with pytest.raises(ConfigError, match=r"No option --learning_rate\. Did you mean --optim\.lr"):
        override_items(["--learning_rate", "1e-4"])
