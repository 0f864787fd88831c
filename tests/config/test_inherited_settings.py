"""A recipe that starts from the weights of a run takes over what that run was trained with."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import yaml

from mm_moslora.config import load_recipe
from mm_moslora.utils.errors import ConfigError

TRAINED = {
    "language": "lm", "system_prompt": "", "chat_template": "chatml", "thinking": "mask", "image_aspect": "resize",
    "vision": {"name": "tower", "feature_layer": -4, "image_size": 56, "select": "cls_patch", "mode": "full"},
    "projector": {"kind": "mlp3x_gelu"}, "language_mode": "adapter", "lean_layers": False,
}  # fmt: skip
"""No value is the default; the last three say how the run trained, which the next run decides anew."""


@pytest.fixture
def run(tmp_path):
    checkpoint = tmp_path / "first" / "checkpoint-000002"
    checkpoint.mkdir(parents=True)
    recipe = tmp_path / "first.yaml"
    sources = [{"path": "a.jsonl", "video_frames": 4}, {"path": "b.jsonl", "video_frames": 4}]
    recipe.write_text(
        yaml.safe_dump({"model": TRAINED, "adapter": {"rank": 4, "alpha": 12}, "data": {"train": sources}})
    )
    (checkpoint / "config.yaml").write_text(load_recipe(recipe).to_yaml())
    (checkpoint / "manifest.json").write_text(json.dumps({"files": {}}))
    (checkpoint / "projector.safetensors").touch()
    (checkpoint / "adapter").mkdir()
    return checkpoint.parent


def read(tmp_path, data):
    file = tmp_path / "next.yaml"
    file.write_text(yaml.safe_dump(data))
    return load_recipe(file)


WAYS = {"the run": "{run}", "a checkpoint": "{run}/checkpoint-000002", "its adapter": "{run}/checkpoint-000002/adapter"}


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_brings_pictures_prompts_projector_and_frames(tmp_path, run, way):
    recipe = read(tmp_path, {
        "objective": "dpo",
        "model": {"language": "lm", "vision": {"name": "tower"}, "projector": {"mode": "frozen"}},
        "adapter": {"weights": WAYS[way].format(run=run)}, "data": {"train": [{"path": "pairs.jsonl"}]},
    })  # fmt: skip
    model = recipe.model
    assert (model.system_prompt, model.chat_template, model.thinking) == ("", "chatml", "mask")
    assert (model.image_aspect, model.vision.feature_layer, model.vision.image_size) == ("resize", -4, 56)
    assert (model.vision.select, model.projector.kind) == ("cls_patch", "mlp3x_gelu")
    assert model.projector.weights == str(run if way == "the run" else run / "checkpoint-000002")
    assert (recipe.adapter.rank, recipe.adapter.alpha) == (4, 12)
    assert recipe.data.train[0].video_frames == 4
    assert (model.vision.mode, model.lean_layers) == ("frozen", True)


def test_without_a_base_the_recipe_takes_that_of_the_run(tmp_path, run):
    recipe = read(tmp_path, {"adapter": {"weights": str(run)}})
    assert (recipe.model.language, recipe.model.vision.name, recipe.model.image_aspect) == ("lm", "tower", "resize")


def test_relative_paths_of_the_run_need_not_be_there_any_more(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = run / "checkpoint-000002" / "config.yaml"
    stored = yaml.safe_load(config.read_text())
    stored["train"]["output"], stored["data"]["train"][0]["path"] = "first", "gone/train.jsonl"
    stored["model"]["projector"]["weights"] = "gone/before"
    config.write_text(yaml.safe_dump(stored))
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "train.jsonl").touch()
    assert read(tmp_path, {"adapter": {"weights": "first"}}).model.image_aspect == "resize"


@pytest.mark.parametrize("way", WAYS)
def test_the_same_command_reads_the_same_when_the_first_run_went_on_or_is_gone(tmp_path, run, way):
    data = {
        "model": {"language": "lm", "vision": {"name": "tower"}}, "train": {"output": str(tmp_path / "second")},
        "adapter": {"weights": WAYS[way].format(run=run)}, "data": {"train": [{"path": "more.jsonl"}]},
    }  # fmt: skip
    first = read(tmp_path, data)
    own = tmp_path / "second" / "checkpoint-000001"
    shutil.copytree(run / "checkpoint-000002", own)
    (own / "config.yaml").write_text(first.to_yaml())
    shutil.copytree(run / "checkpoint-000002", run / "checkpoint-000004")
    assert read(tmp_path, data) == first
    shutil.rmtree(run)
    assert read(tmp_path, data) == first


@pytest.mark.parametrize("output", ["first", "{folder}/first", "elsewhere/before"], ids=["here", "absolute", "moved"])
def test_relative_names_of_parts_are_those_of_the_working_folder_wherever_the_run_lies(
    tmp_path, run, monkeypatch, output
):
    monkeypatch.chdir(tmp_path)
    for name in ("lm", "tower"):
        (tmp_path / name).mkdir()
    config = run / "checkpoint-000002" / "config.yaml"
    stored = yaml.safe_load(config.read_text())
    stored["train"]["output"] = output.format(folder=tmp_path)
    stored["model"]["language"], stored["model"]["vision"]["name"] = "lm", "tower"
    config.write_text(yaml.safe_dump(stored))
    named = {"language": "lm", "vision": {"name": "tower"}}
    for model in ({}, named):
        taken = read(tmp_path, {"model": model, "adapter": {"weights": str(run)}}).model
        assert (taken.language, taken.vision.name, taken.vision.image_size) == ("lm", "tower", 56)


def test_a_projector_brings_pictures_alone(tmp_path, run):
    model = read(tmp_path, {
        "model": {"language": "lm", "vision": {"name": "tower"}, "projector": {"weights": str(run)}},
    }).model  # fmt: skip
    assert (model.image_aspect, model.vision.image_size, model.projector.kind) == ("resize", 56, "mlp3x_gelu")
    assert (model.system_prompt, model.chat_template, model.thinking) == (None, None, "auto")


def test_other_values_stay_and_are_remarked_with_both(tmp_path, run, caplog):
    with caplog.at_level(logging.WARNING):
        recipe = read(tmp_path, {
            "model": {
                "language": "lm", "system_prompt": "", "image_aspect": "pad",
                "vision": {"name": "tower", "image_size": 84},
            },
            "adapter": {"weights": str(run), "rank": 4},
            "data": {"train": [{"path": "a", "video_frames": 16}, {"path": "b", "video_fps": 1.0}]},
        })  # fmt: skip
    assert (recipe.model.image_aspect, recipe.model.vision.image_size) == ("pad", 84)
    assert [source.video_frames for source in recipe.data.train] == [16, 8]
    size, aspect, frames = caplog.messages
    assert "data.train: video_frames is 16" in frames
    assert "were trained with 4" in frames
    assert "model.image_aspect is 'pad'" in aspect
    assert "were trained with 'resize'" in aspect
    assert "model.vision.image_size is 84" in size


def test_a_resolved_recipe_and_weights_of_others_are_read_as_they_stand(tmp_path, run, caplog):
    assert load_recipe(run).model.image_aspect == "resize"
    alone = read(tmp_path, {"model": {"language": "lm"}, "adapter": {"weights": str(tmp_path / "peft_folder")}})
    assert (alone.model.system_prompt, alone.adapter.rank) == (None, 64)
    text = read(tmp_path, {"model": {"language": "lm"}, "adapter": {"weights": str(run)}})
    assert text.model.vision is None
    assert not caplog.messages


def test_an_error_still_names_the_override_that_causes_it(tmp_path, run):
    file = tmp_path / "next.yaml"
    file.write_text(yaml.safe_dump({"adapter": {"weights": str(run)}}))
    with pytest.raises(ConfigError, match=r"^Override 'optim.lr=-1'"):
        load_recipe(file, ["train.steps=2", "optim.lr=-1"])
