"""Boxes: references in pixels of the file, and what models write about the pictures of controls."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mm_moslora_eval.backends.local_model import boxes_of
from mm_moslora_eval.protocol.task import Source, Task
from mm_moslora_eval.run.request_preparation import Preparation
from mm_moslora_eval.scoring.answer_scoring import score_answer
from mm_moslora_eval.sources.document import Document
from mm_moslora_eval.sources.llava_file import read
from mm_moslora_eval.sources.source_images import MODES, Hasher, ImageMode, image_size
from PIL import Image

from mm_moslora.batch import PictureFrame
from mm_moslora.data.images.record_picture import PictureRules


def problem_of(folder: Path, answer: str, question: str = "Where?", images: Any = "a.png", **objects: Any) -> Any:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (800, 400)).save(folder / name)
    talk = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    given = objects.get("objects", {"ref": ["dog"], **objects})
    record = {"id": "1", "image": images, "conversations": talk, "objects": given}
    (folder / "t.jsonl").write_text(json.dumps(record) + "\n")
    (document,) = read(folder / "t.jsonl", rules=PictureRules(folder=folder.resolve()))
    return document


def test_a_reference_has_the_digits_of_its_box(tmp_path: Path) -> None:
    document = problem_of(tmp_path, "<bbox>", bbox=[[345.678, 0.00001, 350.5, 3]])
    assert document.answers == ("[345.678, 0, 350.5, 3]",)
    assert document.problem is None


def test_references_are_cut_and_in_pixels_of_the_file(tmp_path: Path) -> None:
    shares = problem_of(tmp_path, "<bbox>", bbox=[[0.1, 0.25, 0.5, 0.75]], bbox_type="norm1")
    edge = problem_of(tmp_path, "<bbox>", bbox=[[-1, -1, 2, 401]])
    assert [(document.answers, document.problem) for document in (shares, edge)] == [
        (("[80, 100, 400, 300]",), None), (("[0, 0, 2, 400]",), None),
    ]  # fmt: skip


@pytest.mark.parametrize("objects", [[], None])
def test_placeholders_without_objects_are_a_problem(objects: Any, tmp_path: Path) -> None:
    assert problem_of(tmp_path, "<objects>", objects=objects).problem


@pytest.mark.parametrize(
    ("answer", "question", "images", "said"),
    [
        ("<objects>", "Where?", "a.png", "scores compare one box"),
        ("<bbox>", "<bbox>?", "a.png", "2 <bbox> for 1"),
        ("here", "<objects>?", "a.png", "a question has <bbox> or <objects>"),
        ("<bbox> <bbox>", "Where?", "a.png", "2 <bbox> for 1"),
        ("<bbox>", "Where?<image>", ["a.png", "b.png"], "several pictures are not scored"),
    ],
)
def test_what_cannot_be_compared_is_a_problem(
    answer: str, question: str, images: Any, said: str, tmp_path: Path
) -> None:
    document = problem_of(tmp_path, answer, question, images, bbox=[[1, 2, 30, 40]])
    assert said in str(document.problem)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (["[80, 100, 4000, 300]"], "[80, 100, 4000, 300] lies outside of its picture (800 x 400 pixels)"),
        (["[-5, 0, 40, 40]"], "lies outside"), (["at [10, 10, 5, 20]"], "holds no box"), (["left"], "holds no box"),
        (["[1, 1, 2, 2] and [3, 3, 4, 4]"], "holds 2 boxes, and scores compare one"),
        (["[0.1, 0.2, 0.5, 0.6]"], "[0.1, 0.2, 0.5, 0.6] holds shares"), (["[0, 0, 1, 1]"], None),
        (["[1, 1, 2, 2]", "[0, 0, 10, 900]"], "lies outside"), (["[-0.5, 0, 801, 400]"], None),
    ],
)  # fmt: skip
def test_a_reference_that_no_answer_equals_is_a_problem(answers: list[str], said: str | None, tmp_path: Path) -> None:
    Image.new("RGB", (800, 400)).save(tmp_path / "a.png")
    document = Document(id="1", images=(tmp_path / "a.png",), question="Where?", answers=tuple(answers))
    boxes = Task(name="t", source=Source(kind="llava", path="x"), extraction="boxes", metric="iou")
    for task, expected in ((boxes, said), (replace(boxes, extraction="text", metric="exact"), None)):
        (item,) = Preparation(task, [document], mode="own", seed=0, fingerprint="", hasher=Hasher()).items
        assert (expected or "") in (item.problem or "")
        assert (item.problem is None) == (expected is None)


SIZES = [(200, 300), (400, 150), (800, 600)]
MIDDLE = (0.25, 0.25, 0.75, 0.75)
TASK = Task(name="t", source=Source(kind="llava", path="x"), extraction="boxes", metric="iou")


def resized(size: tuple[int, int]) -> PictureFrame:
    """Half as large."""
    return PictureFrame(width=size[0] / 2, height=size[1] / 2, scale=(0.5, 0.5))


def padded(size: tuple[int, int]) -> PictureFrame:
    """In the middle of a square."""
    side = max(size)
    return PictureFrame(width=side, height=side, offset=((side - size[0]) / 2, (side - size[1]) / 2))


def scores(folder: Path, mode: ImageMode, form: str, frame: object, shares: tuple[float, ...]) -> list[float]:
    """Of a model that answers with the same shares of what it sees of every picture."""
    documents = []
    for number, (width, height) in enumerate(SIZES):
        Image.new("RGB", (width, height), (number, 0, 0)).save(folder / f"{number}.png")
        box = [share * side for share, side in zip(MIDDLE, (width, height) * 2, strict=True)]
        answers = (json.dumps(box),)
        documents.append(Document(id=f"{number}", images=(folder / f"{number}.png",), question="?", answers=answers))
    processing, found = SimpleNamespace(boxes=form, frame=frame), []
    prepared = Preparation(TASK, documents, mode=mode, seed=0, fingerprint="", hasher=Hasher())
    for item in prepared.items:
        request = prepared.request(item)
        seen = processing.frame(image_size(request.images[-1]))
        units = (1000, 1000) if form == "qwen3_vl" else (seen.width, seen.height)
        said = json.dumps([round(share * unit) for share, unit in zip(shares, units * 2, strict=True)])
        boxes = json.dumps(boxes_of(request, said, processing))
        found.append(score_answer(item.document, boxes, extraction=TASK.extraction, metric=TASK.metric).score)
    return found


@pytest.mark.parametrize("frame", [resized, padded])
@pytest.mark.parametrize("form", ["qwen3_vl", "qwen2_5_vl"])
def test_a_model_that_does_not_look_scores_alike_in_every_mode(form: str, frame: object, tmp_path: Path) -> None:
    for shares in (MIDDLE, (0.1, 0.3, 0.55, 0.6)):
        own, *controls = (scores(tmp_path, mode, form, frame, shares) for mode in MODES)
        assert min(own) > 0.1
        for control in controls:
            assert control == pytest.approx(own, abs=0.03)  # whole pixels of a small picture
