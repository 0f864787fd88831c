"""A model with a loss that does not depend on its images is found in the first step, and no other is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import make_records
from trials import hexed
from vlm_runs import picture, recipe_for, write_records
from vlms import make_vlm

from mm_moslora.batch import Batch, Example, ProcessedImage
from mm_moslora.config import ProjectorConfig, SourceConfig, VisionConfig
from mm_moslora.models import vlm
from mm_moslora.models.batching import padded_batch
from mm_moslora.training.engine.engine_base import TrainingEngine
from mm_moslora.training.image_dependence import ImageCheck, to_replace, with_noise
from mm_moslora.training.training_loop import train
from mm_moslora.utils.errors import ModelError, TrainingError

IMAGE = 9


def on(recipe, records: Path, **train_config):
    source = SourceConfig(path=str(records), image_folder=str(records.parent / "images"))
    config = replace(recipe.train, **({"steps": 2, "rehearsal": False} | train_config))
    return replace(recipe, data=replace(recipe.data, train=[source]), train=config)


def change_features(monkeypatch, change) -> None:
    features = vlm.image_features
    monkeypatch.setattr(vlm, "image_features", lambda *args, **kwargs: change(features(*args, **kwargs)))


def test_images_that_are_ignored_stop_the_run(recipe, monkeypatch):
    change_features(monkeypatch, torch.zeros_like)
    with pytest.raises(TrainingError, match=r"does not depend on the images.*equal bit for bit.*doctor"):
        train(replace(recipe, train=replace(recipe.train, save_every=1)))
    assert not list(Path(recipe.train.output).glob("checkpoint-*"))


def test_a_projector_that_trains_without_a_gradient_stops_the_run(recipe, monkeypatch):
    change_features(monkeypatch, torch.Tensor.detach)
    with pytest.raises(TrainingError, match=r"trains of model.projector got a gradient of exactly 0 in step 1"):
        train(recipe)
    frozen = replace(recipe.model, projector=replace(recipe.model.projector, mode="frozen"))
    assert train(replace(recipe, model=frozen)).finished


def test_a_tower_that_trains_without_a_gradient_stops_the_run(recipe):
    """The layer that trains is behind the one that is read."""
    tower = replace(recipe.model.vision, mode="last_n", last_n=1, feature_layer=-2)
    with pytest.raises(TrainingError, match=r"trains of model.vision .*feature_layer"):
        train(replace(recipe, model=replace(recipe.model, vision=tower)))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_keyword_that_transformers_would_ignore_stops_the_run(family, tmp_path, monkeypatch):
    taken = padded_batch.takes
    monkeypatch.setattr(
        "mm_moslora.models.batching.packed_batch.takes",
        lambda model, name: name != "mm_encoder_outputs" and taken(model, name),
    )
    recipe = recipe_for(make_vlm(tmp_path / "model", family), write_records(tmp_path), tmp_path / "run")
    with pytest.raises(ModelError, match=r"does not take mm_encoder_outputs: it would ignore the pictures"):
        train(recipe)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next", "smolvlm", "internvl", "paligemma"])
def test_ready_made_models_pass_and_a_deaf_one_does_not(family, tmp_path, monkeypatch):
    folder, records = make_vlm(tmp_path / "model", family), write_records(tmp_path)
    model = replace(recipe_for(folder, records, tmp_path / "run").model, projector=ProjectorConfig(mode="full"))
    recipe = replace(recipe_for(folder, records, tmp_path / "run"), model=model)
    recipe = replace(recipe, train=replace(recipe.train, steps=1))
    assert train(recipe).finished
    given = padded_batch.picture_inputs

    def blank(*args, **kwargs):
        inputs = given(*args, **kwargs)
        return inputs | {"pixel_values": torch.ones_like(inputs["pixel_values"])}

    monkeypatch.setattr(padded_batch, "picture_inputs", blank)
    monkeypatch.setattr("mm_moslora.models.batching.packed_batch.picture_inputs", blank)
    with pytest.raises(TrainingError, match="does not depend on the images"):
        train(replace(recipe, train=replace(recipe.train, output=str(tmp_path / "deaf"))))


@pytest.mark.parametrize("mode", ["frozen", "adapter"])
def test_white_images_are_no_reason_to_stop(mode, recipe, tmp_path):
    records = make_records(tmp_path / "white")
    for path in (records.parent / "images").iterdir():
        Image.new("RGB", (24, 24), (255, 255, 255)).save(path)
    tower: VisionConfig = replace(recipe.model.vision, mode=mode)
    assert train(on(replace(recipe, model=replace(recipe.model, vision=tower)), records)).finished


def test_data_without_images_is_no_reason_to_stop(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageCheck, "_compare", lambda *_: pytest.fail("there is nothing to compare"))
    assert train(on(recipe, make_records(tmp_path / "text", text_only_every=1))).finished


def test_it_is_done_once_a_start_and_changes_nothing(recipe, tmp_path, monkeypatch):
    asked = []
    evaluate = TrainingEngine.evaluate
    monkeypatch.setattr(TrainingEngine, "evaluate", lambda *args: asked.append(1) or evaluate(*args))
    train(recipe)
    assert len(asked) == 2
    monkeypatch.setattr(ImageCheck, "__call__", lambda *_: None)
    unchecked = replace(recipe, train=replace(recipe.train, output=str(tmp_path / "unchecked")))
    train(unchecked)
    assert len(asked) == 2
    assert hexed(Path(recipe.train.output)) == hexed(Path(unchecked.train.output))


def batch_of(*conversations: tuple[list[int], list[int]]) -> Batch:
    return Batch.from_examples(
        [
            Example(
                id=f"r{number}", input_ids=torch.tensor(ids), supervised=torch.tensor(supervised).bool(),
                pictures=[ProcessedImage(tensors={"pixel_values": torch.ones(1, 3, 2, 2)})] * ids.count(IMAGE),
            )
            for number, (ids, supervised) in enumerate(conversations)
        ]
    )  # fmt: skip


def test_an_image_counts_where_an_answer_comes_after_it():
    before, after, text = ([IMAGE, 1, 2], [0, 0, 1]), ([1, 2, IMAGE], [0, 1, 0]), ([1, 2, 3], [0, 1, 1])
    (found,) = to_replace(batch_of(before), IMAGE)
    assert (found.what, found.rows, found.targets) == ("image 1 of 1 of record r0", slice(0, 1), slice(0, 1))
    assert not to_replace(batch_of(after), IMAGE)
    assert not to_replace(batch_of(after, text), IMAGE)
    assert not to_replace(batch_of(text), IMAGE)
    (found,) = to_replace(batch_of(text, after, before), IMAGE)
    assert (found.what, found.rows, found.targets) == ("image 1 of 1 of record r2", slice(1, 2), slice(3, 4))
    assert len(to_replace(batch_of(after), None)) == 1


def test_of_several_images_of_a_record_one_is_replaced_another_one_in_the_next():
    three, late = ([IMAGE, 1, IMAGE, IMAGE, 2], [0, 0, 0, 0, 1]), ([IMAGE, 1, 2, IMAGE], [0, 0, 1, 0])
    found = to_replace(batch_of(three, ([IMAGE, 1], [0, 1]), three, late, three), IMAGE)
    assert [item.what for item in found] == [
        "image 2 of 3 of record r0", "image 1 of 1 of record r1", "image 3 of 3 of record r2",
        "image 1 of 2 of record r3", "image 1 of 3 of record r4",
    ]  # fmt: skip
    assert [item.rows for item in found] == [slice(1, 2), slice(3, 4), slice(6, 7), slice(7, 8), slice(9, 10)]
    batch = batch_of(three, three)
    pixels = with_noise(batch, to_replace(batch, IMAGE))
    assert [bool((image != 1).any()) for image in pixels] == [False, True, False, False, False, True]


def two_images(records: Path, folder: Path) -> Path:
    """Those of the records that show an image, which they do twice."""
    lines = []
    for line in records.read_text().splitlines():
        record = json.loads(line)
        if "image" in record:
            record["image"] = [record["image"]] * 2
            record["conversations"][0]["value"] = "<image>\n" + record["conversations"][0]["value"]
            lines.append(json.dumps(record))
    (folder / "images").symlink_to(records.parent / "images")
    (folder / "two.jsonl").write_text("\n".join(lines))
    return folder / "two.jsonl"


@pytest.mark.parametrize("kept", [0, 1])
def test_a_model_that_reads_one_of_two_images_is_stopped(kept, recipe, records, tmp_path, monkeypatch):
    recipe = on(recipe, two_images(records, tmp_path), micro_batch=8)
    assert train(replace(recipe, train=replace(recipe.train, output=str(tmp_path / "sees")))).finished

    def one_of_two(features):
        return features[[image // 2 * 2 + kept for image in range(len(features))]] if len(features) > 1 else features

    change_features(monkeypatch, one_of_two)
    told = (
        rf"does not depend on the images: with noise in place of image {2 - kept} of 2 of record r\d+.*of 8 that were"
    )
    with pytest.raises(TrainingError, match=told):
        train(recipe)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "llava_onevision"])
def test_a_ready_made_model_that_reads_one_of_two_images_is_stopped(family, tmp_path, monkeypatch):
    """Images are patches or tiles of one tensor, or its entries."""
    folder, records = make_vlm(tmp_path / "model", family), tmp_path / "train.jsonl"
    (tmp_path / "images").mkdir()
    lines = []
    for index in range(4):
        for half in "ab":
            picture(40 + 9 * index, 30 + ord(half) % 9).save(tmp_path / "images" / f"{index}{half}.png")
        turns = [{"from": "human", "value": "<image>\n<image>\nwhat color?"}, {"from": "gpt", "value": "red"}]
        lines.append(
            json.dumps({"id": f"r{index}", "image": [f"{index}a.png", f"{index}b.png"], "conversations": turns})
        )
    records.write_text("\n".join(lines))
    recipe = recipe_for(folder, records, tmp_path / "run")
    assert train(replace(recipe, train=replace(recipe.train, output=str(tmp_path / "sees")))).finished
    hidden = vlm.packed_hidden

    def without_the_second(model, batch, **kwargs):
        pixels, row = batch.pixel_values.clone(), 0
        for first, second in batch.image_rows:
            pixels[row + first : row + first + second] = 0.5
            row += first + second
        return hidden(model, replace(batch, pixel_values=pixels), **kwargs)

    monkeypatch.setattr(vlm, "packed_hidden", without_the_second)
    with pytest.raises(TrainingError, match="image 2 of 2 of record"):
        train(recipe)
