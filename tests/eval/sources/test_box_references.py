"""References of boxes: what one answer cannot be compared with is a counted failure of its question."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mm_moslora_eval.protocol.task import Source, Task
from mm_moslora_eval.run.request_preparation import Preparation
from mm_moslora_eval.sources.document import Document
from mm_moslora_eval.sources.image_controls import Hasher
from mm_moslora_eval.sources.llava_file import read
from PIL import Image

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
