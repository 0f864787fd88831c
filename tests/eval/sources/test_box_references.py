"""References of boxes: what one answer cannot be compared with is a counted failure of its question."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mm_moslora_eval.sources.llava_file import read
from PIL import Image

from mm_moslora.data.images.record_picture import PictureRules


def problem_of(folder: Path, answer: str, question: str = "Where?", images: Any = "a.png", **objects: Any) -> Any:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (800, 400)).save(folder / name)
    talk = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    record = {"id": "1", "image": images, "conversations": talk, "objects": {"ref": ["dog"], **objects}}
    (folder / "t.jsonl").write_text(json.dumps(record) + "\n")
    (document,) = read(folder / "t.jsonl", rules=PictureRules(folder=folder.resolve()))
    return document


def test_a_reference_has_the_digits_of_its_box(tmp_path: Path) -> None:
    document = problem_of(tmp_path, "<bbox>", bbox=[[12345.678, 0.00001, 12350.5, 3]])
    assert document.answers == ("[12345.678, 0, 12350.5, 3]",)
    assert document.problem is None


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
