"""`objective: grpo` with boxes: references in pixels of the file, answers in the form of the model's family."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pairs import logged, make_recipe
from PIL import Image

from mm_moslora.config import ModelConfig, Recipe
from mm_moslora.data.boxes.box_forms import FORMS, coordinates, write_region
from mm_moslora.data.images.record_picture import LocalPicture
from mm_moslora.preferences.preference_setup import PreferenceRun, prepare
from mm_moslora.preferences.preference_training import train_preferences
from mm_moslora.preferences.rewards import REWARDS, Scorer, box_reader, document_of
from mm_moslora.utils.errors import ConfigError

pytest.importorskip("trl", reason="trl is not installed")
BOX = (10.0, 20.0, 50.0, 60.0)


def line(name: str, objects: Any = None, *, question: str = "Where is the dog?", **more: Any) -> dict[str, Any]:
    objects = {"bbox": [list(BOX)]} if objects is None else objects
    prompt = [{"role": "user", "content": f"<image>{question}"}]
    return {"id": name, "images": ["a.png"], "prompt": prompt, "solution": "<bbox>", "objects": objects} | more


def recipe_of(
    folder: Path, vlm: Path, *lines: dict[str, Any], rewards: tuple[str, ...] = ("iou",), **data: Any
) -> Recipe:
    (folder / "images").mkdir(exist_ok=True)
    for name, size in (("a.png", (160, 120)), ("b.png", (64, 200))):
        Image.new("RGB", size, "red").save(folder / "images" / name)
    (folder / "q.jsonl").write_text("".join(json.dumps(item) + "\n" for item in lines))
    return make_recipe(
        folder / "run", folder / "q.jsonl", {"vlm": str(vlm)}, objective="grpo", data=data,
        grpo={"rewards": list(rewards), "generations": 4, "max_new_tokens": 4},
        train={"steps": 1, "global_batch": 4, "micro_batch": 4},
    )  # fmt: skip


def scores(run: PreferenceRun, number: int, answer: str) -> list[float]:
    question = run.records.load_item(number)
    read = box_reader(question, run.assembly.image_processing)
    good = document_of(question)
    return [Scorer(name, REWARDS[name]).scores([answer], [good], [read])[0] for name in ("iou", "iou_50")]


def written(run: PreferenceRun, box: tuple[float, ...], size: tuple[int, int]) -> str:
    processing = run.assembly.image_processing
    form = FORMS[processing.boxes]
    return write_region(coordinates(box, form, processing.frame(size)), form)


def test_answers_in_the_models_form_are_compared_in_pixels_of_the_file(vlm: Path, tmp_path: Path) -> None:
    shares = {"bbox": [[1 / 16, 1 / 6, 5 / 16, 1 / 2]], "bbox_type": "norm1"}
    asked = {"ref": ["dog"], "bbox": [[80, 60, 120, 90], list(BOX)]}
    second = {"bbox": [list(BOX)], "image_id": [1]}
    run = prepare(recipe_of(
        tmp_path, vlm, line("plain"), line("shares", shares),
        line("asked", asked, question="What is beside the <ref-object> at <bbox>?"),
        line("second", second, question="<image>Where?", images=["a.png", "b.png"]),
        line("text", solution="[10, 20, 50, 60]", objects={}),
        rewards=("iou", "iou_50"),
    ))  # fmt: skip
    decode = run.records.encoder.tokenizer.decode
    for number, size in enumerate([(160, 120), (160, 120), (160, 120), (64, 200), (160, 120)]):
        question = run.records.load_item(number)
        assert question.asked.references == ("[10, 20, 50, 60]",)
        iou, half = scores(run, number, f"<think>[0, 0, 1, 1]</think>It is at {written(run, BOX, size)}.")
        assert (iou > 0.85, half) == (True, 1.0)
        assert scores(run, number, "nowhere") == [0.0, 0.0]
        assert "<bbox>" not in decode(question.prompt.input_ids)
    prompt = run.records.load_item(2)
    assert written(run, (80, 60, 120, 90), (160, 120)) in decode(prompt.prompt.input_ids)
    assert prompt.text == "What is beside the dog at [80, 60, 120, 90]?"


def test_a_run_learns_from_boxes_and_counts_bad_ones(vlm: Path, tmp_path: Path) -> None:
    bad = [
        line("outside", {"bbox": [[10, 20, 500, 60]]}), line("listed", solution="<objects>"),
        line("several", solution=["<bbox>", "left"]), line("beside", [], solution=["left", "<bbox>"]),
        line("two", {"bbox": [list(BOX), [1, 2, 3, 4]]}, solution="<bbox> and <bbox>"),
        line("shares", {"bbox": [[0.1, 0.2, 0.3, 0.4]]}),
    ]  # fmt: skip
    train_preferences(recipe_of(tmp_path, vlm, line("good"), *bad, max_bad_share=0.9))
    assert logged(tmp_path / "run", "rewards/iou/mean") == [0.0]
    rows = [json.loads(text) for text in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["id"], row["code"]) for row in rows] == [(item["id"], "BAD_BOX") for item in bad]


def test_references_that_no_answer_can_equal_are_counted_before_training(vlm: Path, tmp_path: Path) -> None:
    bad = {
        "text": "left", "outside": "[0, 0, 900, 9]", "shares": "[0.1, 0.2, 0.5, 0.6]", "numbers": [80, 100, 90, 110],
        "second": ["[10, 20, 50, 60]", "[5, 5, 5, 5]"],
    }  # fmt: skip
    lines = [line(name, {}, solution=solution) for name, solution in bad.items()]
    blind = {"prompt": [{"role": "user", "content": "Where?"}], "solution": "[10, 20, 50, 60]", "id": "blind"}
    run = prepare(
        recipe_of(tmp_path, vlm, line("good", {}, solution="[10, 20, 50, 60]"), blind, *lines, max_bad_share=1)
    )
    assert len(run.records.usable) == 1
    rows = [json.loads(text) for text in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["id"], row["code"]) for row in rows] == [(name, "BAD_BOX") for name in ("blind", *bad)]
    assert "holds shares of the picture" in str(rows[3])
    assert len(prepare(recipe_of(tmp_path, vlm, *lines, rewards=("exact",))).records.usable) == 5


def test_references_that_are_no_boxes_of_the_picture_teach_nothing(
    vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = [line("1", {}, solution="left"), line("2", {}, solution="[0, 0, 900, 9]")]
    monkeypatch.setattr(LocalPicture, "size", lambda _: None)  # as of one that is not fetched yet
    run = prepare(recipe_of(tmp_path, vlm, *bad))
    scorer, answers = Scorer("iou", REWARDS["iou"]), ["[0, 0, 5, 5]"] * 2
    questions = [run.records.load_item(number) for number in range(2)]
    readers = [*(box_reader(question, run.assembly.image_processing) for question in questions), str]
    documents = [document_of(question) for question in (*questions, questions[1])]
    found = scorer.scores([*answers, "[0, 0, 5, 5]"], documents, readers)
    assert [math.isnan(value) for value in found] == [True, True, False]
    assert scorer.failed == 2


def test_boxes_need_a_reward_that_reads_them_and_a_form(vlm: Path, language_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"1 references are boxes .* none of grpo.rewards \(exact\) reads"):
        prepare(recipe_of(tmp_path, vlm, line("1"), rewards=("exact",)))
    caption = line("1", question="What is at <bbox>?", solution="a dog")
    assert prepare(recipe_of(tmp_path, vlm, caption, rewards=("exact",))).records.item(0).asked.references == ("a dog",)
    plain = {"prompt": [{"role": "user", "content": "Where?"}], "solution": "[0, 0, 1, 1]"}
    with pytest.raises(ConfigError, match=r"grpo.rewards holds iou.* Set model.boxes"):
        prepare(replace(recipe_of(tmp_path, vlm, plain), model=ModelConfig(language=str(language_folder))))
