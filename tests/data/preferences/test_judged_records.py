"""Answers with labels and questions with references, in the forms of ms-swift, LLaMA-Factory, TRL and EasyR1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mm_moslora.data.chat.preference_records import parse_judged, parse_question
from mm_moslora.data.images.record_picture import PictureRules
from mm_moslora.data.record_faults import RecordError, Where

WHERE = Where(file=Path("records.jsonl"), line=1, row=0)
RULES = PictureRules(folder=Path("/tmp"))
ASKED = {"role": "user", "content": "which colour?"}
SEEN = {"role": "user", "content": "<image>which colour?"}
SAID = {"role": "assistant", "content": "red"}
JUDGED: dict[str, dict[str, Any]] = {
    "ms-swift": {"messages": [SEEN, SAID], "images": ["a.png"]},
    "LLaMA-Factory": {"conversations": [SEEN, {"from": "gpt", "value": "red"}], "images": ["a.png"]},
    "TRL": {"prompt": [ASKED], "completion": [SAID], "images": ["a.png"]},
    "TRL, texts": {"prompt": "which colour?", "completion": "red", "image": "a.png"},
    "a question": {"question": "which colour?", "answer": "red", "image": "a.png"},
}
ASKING: dict[str, dict[str, Any]] = {
    "ms-swift": {"messages": [SEEN], "solution": "red", "images": ["a.png"]},
    "ms-swift, with another answer": {
        "messages": [SEEN, {"role": "assistant", "content": "blue"}], "solution": "red", "images": ["a.png"],
    },
    "TRL": {"prompt": [ASKED], "ground_truth": "red", "images": ["a.png"]},
    "EasyR1": {"problem": "<image>which colour?", "answer": "red", "images": ["a.png"]},
    "several references": {"prompt": "which colour?", "answers": ["red", "crimson"], "image": "a.png"},
    "tuning, question": {"question": "which colour?", "answer": "red", "image": "a.png"},
    "tuning, messages": {"messages": [SEEN, SAID], "image": "a.png"},
}  # fmt: skip


@pytest.mark.parametrize("form", JUDGED)
@pytest.mark.parametrize(
    ("label", "good"),
    [({"label": True}, True), ({"kto_tag": False}, False), ({"label": "false"}, False), ({"label": 1.0}, True)],
)
def test_every_form_of_a_judged_answer_is_one_record(form: str, label: dict[str, Any], good: bool) -> None:
    (answer,) = parse_judged({"id": "a", **JUDGED[form], **label}, WHERE, RULES)
    assert (answer.good, answer.record.id) == (good, "a")
    assert [part.strip() for part in answer.record.turns[0].parts()] == ["", "which colour?"]
    assert answer.record.turns[1].text == "red"
    assert answer.record.image_names == ["/tmp/a.png"]


def test_a_pair_is_a_good_and_a_bad_answer() -> None:
    answers = parse_judged({"messages": [ASKED, SAID], "rejected_response": "blue"}, WHERE, RULES)
    assert [(answer.good, answer.record.turns[-1].text) for answer in answers] == [(True, "red"), (False, "blue")]


@pytest.mark.parametrize("form", ASKING)
def test_every_form_of_a_question_is_a_record_with_its_reference(form: str) -> None:
    asked = parse_question({"id": "a", "level": 3, **ASKING[form]}, WHERE, RULES)
    assert [part.strip() for part in asked.record.turns[0].parts()] == ["", "which colour?"]
    assert asked.record.turns[-1].text == asked.references[0] == "red"
    assert asked.references[1:] == (("crimson",) if "several" in form else ())
    assert dict(asked.extra) == {"level": "3"}


def test_options_have_letters_and_the_text_of_one_names_it() -> None:
    asked = parse_question({"prompt": "which?", "solution": "blue", "options": ["red", "blue"]}, WHERE, RULES)
    assert (dict(asked.options), asked.references) == ({"A": "red", "B": "blue"}, ("B",))
    lettered = parse_question({"prompt": "which?", "solution": "x", "options": {"x": "red", "y": "blue"}}, WHERE, RULES)
    assert lettered.references == ("x",)


@pytest.mark.parametrize(
    ("parse", "value", "fault"),
    [
        (parse_judged, [1], "NOT_AN_OBJECT"),
        (parse_judged, {"messages": [ASKED, SAID]}, "NO_LABEL.*label: is missing; write label: true"),
        (parse_judged, {"messages": [ASKED, SAID], "label": "cat"}, "NO_LABEL.*is given as label 'cat'"),
        (
            parse_judged,
            {"messages": [ASKED, SAID], "label": True, "kto_tag": False},
            "NO_LABEL.*True and kto_tag False",
        ),
        (parse_judged, {"messages": [ASKED], "label": True}, "NO_ANSWER"),
        (parse_judged, {"completion": "red", "label": True}, "NO_PAIR.*prompt"),
        (
            parse_judged,
            {"messages": [ASKED, {**SAID, "weight": 0.5}], "label": True},
            "UNFOLLOWED_KEY.*weighs an answer",
        ),
        (parse_judged, {"messages": [ASKED, SAID], "rejected_response": "red"}, "EQUAL_ANSWERS"),
        (parse_question, {"messages": [ASKED]}, "NO_REFERENCE.*is missing; write the right answer"),
        (parse_question, {"prompt": "which?"}, "NO_REFERENCE.*is missing"),
        (parse_question, {"prompt": "which?", "solution": []}, "NO_REFERENCE.*is empty"),
        (parse_question, {"prompt": "which?", "solution": {"a": 1}}, "NO_REFERENCE.*is an object"),
        (parse_question, {"prompt": "which?", "solution": " "}, "EMPTY_ANSWER"),
        (parse_question, {"prompt": "which?", "solution": "F", "options": ["a", "b"]}, "NO_REFERENCE.*not one of"),
        (parse_question, {"prompt": "which?", "solution": "A", "options": 3}, "BAD_TEXT.*options"),
        (parse_question, {"solution": "A"}, "NO_PAIR.*prompt"),
    ],
)
def test_what_cannot_be_judged_is_named(parse: Any, value: Any, fault: str) -> None:
    with pytest.raises(RecordError, match=fault):
        parse(value, WHERE, RULES)
