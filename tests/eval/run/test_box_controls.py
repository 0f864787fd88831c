"""Boxes of the controls: an answer that is the same to every picture scores alike, whichever picture was shown."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from mm_moslora_eval.backends.answer_boxes import boxes_of
from mm_moslora_eval.protocol.task import Source, Task
from mm_moslora_eval.run.request_preparation import Preparation
from mm_moslora_eval.scoring.answer_scoring import score_answer
from mm_moslora_eval.sources.document import Document
from mm_moslora_eval.sources.image_controls import MODES, Hasher, ImageMode, image_size
from PIL import Image

from mm_moslora.batch import PictureFrame

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
