"""Answers that run folders share: what decides an answer decides whether it is asked again."""

from __future__ import annotations

import dataclasses
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mm_moslora_eval.backends.open_model import open_model
from mm_moslora_eval.protocol.model_interface import (
    IMAGE,
    Answer,
    Message,
    OptionRequest,
    OptionScore,
    Request,
)
from mm_moslora_eval.protocol.task_registry import get_task
from mm_moslora_eval.run.evaluate_suite import evaluate
from mm_moslora_eval.run.task_runner import EvaluationSettings
from mm_moslora_eval.run.wrapped_models import answer_cache
from mm_moslora_eval.run.wrapped_models.answer_cache import CachedModel
from mm_moslora_eval.run.wrapped_models.model_wrapping import opened_with

from tests.eval.eval_data import picture
from tests.eval.eval_fake import FakeModel
from tests.eval.eval_models import export_tiny

ONE = EvaluationSettings(batch_size=4, rank=0, world_size=1)


def question(text: str = "what?", *images: bytes, **options: Any) -> Request:
    content = (*([IMAGE] * len(images)), text)
    return Request(id="q", messages=(Message(role="user", content=content),), images=images, **options)


def ask(model: FakeModel, folder: Path, *requests: Any, method: str = "generate") -> list[Any]:
    cached = CachedModel(model, folder)
    found = dict(getattr(cached, method)(requests, batch_size=2))
    cached.close()
    return [found[index] for index in range(len(requests))]


def test_another_run_folder_asks_nothing_again_and_has_the_same_files(question_file: Path, tmp_path: Path) -> None:
    task = get_task(f"llava:{question_file}")
    first, second = FakeModel(), FakeModel()
    for model, run in ((first, "a"), (second, "b")):
        with_cache = opened_with(lambda model=model: model, cache=tmp_path / "cache")  # type: ignore[misc]
        evaluate(with_cache, task, tmp_path / run, settings=ONE, baselines=())
        with_cache.close()
    assert len(first.asked) == 36
    assert second.asked == []
    assert first.closed
    rows = []
    for run in "ab":
        path = tmp_path / run / task.id / "blind" / "answers.jsonl"
        rows.append([json.loads(line) | {"time": 0, "seconds": 0} for line in path.read_text().splitlines()])
    assert sorted(rows[0], key=str) == sorted(rows[1], key=str)


BASE = question("what?", picture(1))
OTHERS = {
    "text": question("what!", picture(1)),
    "picture": question("what?", picture(2)),
    "a tag that is text": question("<image>what?", picture(1)),
    "length": dataclasses.replace(BASE, max_new_tokens=65),
    "stop": dataclasses.replace(BASE, stop=("a",)),
    "beams": dataclasses.replace(BASE, beams=2),
    "raw": dataclasses.replace(BASE, raw=True),
    "reference": dataclasses.replace(BASE, reference="yes"),
    "boxes": dataclasses.replace(BASE, boxes=True),
    "role": dataclasses.replace(BASE, messages=(Message(role="system", content=("s",)), *BASE.messages)),
    "order": Request(id="q", messages=(Message(role="user", content=("what?", IMAGE)),), images=(picture(1),)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_everything_that_is_asked_counts(kind: str, tmp_path: Path) -> None:
    ask(FakeModel(), tmp_path, BASE)
    model = FakeModel()
    ask(model, tmp_path, BASE, dataclasses.replace(BASE, id="another name", aliases=("x",)))
    assert model.asked == []
    ask(model, tmp_path, OTHERS[kind])
    assert len(model.asked) == 1


def test_every_part_of_a_request_is_in_the_key() -> None:
    known = set(answer_cache._plain(BASE)["Request"]) | {"images"}  # pictures count by their content
    assert {field.name for field in dataclasses.fields(Request)} - known == {"id", "aliases"}


class DetailedModel(FakeModel):
    def __init__(self, **details: str) -> None:
        super().__init__()
        self.details = details


def test_model_precision_and_versions_count_and_the_number_of_a_device_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(model: FakeModel) -> int:
        ask(model, tmp_path, BASE)
        return len(model.asked)

    assert asked(DetailedModel(precision="bfloat16", device="cuda:0 (H100)", threads="4")) == 1
    assert asked(DetailedModel(precision="bfloat16", device="cuda:3 (H100)", threads="8")) == 0
    assert asked(DetailedModel(precision="float32", device="cuda:0 (H100)")) == 1
    assert asked(DetailedModel(precision="bfloat16", device="cuda:0 (A100)")) == 1
    assert asked(FakeModel(fingerprint="other weights")) == 1
    monkeypatch.setattr(answer_cache.provenance, "environment", lambda: {"torch": "9"})
    assert asked(DetailedModel(precision="float32", device="cuda:0 (H100)")) == 1


class FullModel(FakeModel):
    def _answer(self, request: Request) -> Answer:
        self.asked.append(request.id)
        score = OptionScore(logprob=-1.25, tokens=3, greedy=True)
        return Answer(
            text="\ud800 half a pair", tokens=4, finish_reason="length", reference=score, prompt_tokens=7,
            boxes=((1.0, 2.0, 3.0, 4.5), (1.0, 2.0)),
        )  # fmt: skip


def test_answers_come_back_whole_and_so_do_options(tmp_path: Path) -> None:
    (first,) = ask(FullModel(), tmp_path, BASE)
    model = FullModel()
    (again,) = ask(model, tmp_path, BASE)
    assert model.asked == []
    assert dataclasses.replace(again, text="") == dataclasses.replace(first, text="")
    options = OptionRequest(request=BASE, options=("A", "B"))
    (scores,) = ask(model, tmp_path, options, method="loglikelihood")
    assert len(model.asked) == 1
    assert ask(model, tmp_path, options, method="loglikelihood") == [scores]
    assert len(model.asked) == 1
    ask(model, tmp_path, dataclasses.replace(options, options=("B", "A")), method="loglikelihood")
    assert len(model.asked) == 2


@pytest.mark.parametrize(
    ("old", "new"),
    [('"text": "', '"text": "not '), ('"tokens": 2', '"tokens": "2"'), ("{", ""), ('"sum"', '"some"'), ("}\n", "}")],
)
def test_a_damaged_entry_is_asked_again(old: str, new: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (answer,) = ask(FakeModel(), tmp_path, BASE)
    (path,) = tmp_path.glob("*/answers-*.jsonl")
    path.write_text(path.read_text().replace(old, new, 1))
    model = FakeModel()
    with caplog.at_level(logging.WARNING):
        assert ask(model, tmp_path, BASE) == [answer]
    assert len(model.asked) == 1
    assert "damaged" in caplog.text
    assert ask(model, tmp_path, BASE) == [answer]
    assert len(model.asked) == 1


def test_a_failure_is_no_entry(tmp_path: Path) -> None:
    for expected in (1, 2):
        model = FakeModel(fail_on=["q"])
        for _ in range(expected):
            with pytest.raises(RuntimeError):
                ask(model, tmp_path, BASE)
        assert len(model.asked) == expected


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for part in range(5):
            ask(FakeModel(), tmp_path, *(question(f"{number} {part} {n}") for n in range(4)), question("common"))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    model = FakeModel()
    ask(model, tmp_path, *(question(f"{n} {part} {k}") for n in range(4) for part in range(5) for k in range(4)))
    assert len(model.asked) <= 4, "a reader may miss what is merged at that moment, and asks it again"
    assert len([*tmp_path.glob("*/answers-*.jsonl")]) < 21, "files of ended processes are put together"


def test_a_picture_that_cannot_be_read_is_left_to_the_model(tmp_path: Path) -> None:
    broken = Request(id="q", messages=BASE.messages, images=(tmp_path / "missing.png",))
    with pytest.raises(Exception, match=r"missing\.png"):
        ask(FakeModel(), tmp_path / "cache", broken)


def test_a_local_model_answers_from_the_cache_as_it_would_itself(
    tmp_path: Path, language_folder: Path, vision_folder: Path
) -> None:
    folder = export_tiny(tmp_path / "model", language_folder, vision_folder)
    questions = [question("what color?", picture(1), max_new_tokens=4), question("a circle?", max_new_tokens=4)]
    model = CachedModel(open_model(str(folder), precision="fp32"), tmp_path / "cache")
    first = dict(model.generate(questions, batch_size=2))
    assert model.reads_boxes
    model.close()
    other = CachedModel(open_model(str(folder), precision="fp32"), tmp_path / "cache")
    assert dict(other.generate(questions, batch_size=1)) == first
    assert (other.found, other.asked) == (2, 0)
    half = CachedModel(open_model(str(folder), precision="bf16"), tmp_path / "cache")
    assert half.folder != other.folder
